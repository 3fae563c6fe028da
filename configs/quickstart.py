"""A tiny ELECTRA in minutes on two CPU cores, from the documentation that comes with Python."""

from electra_jax import config as defaults


def get_config():
    c = defaults.get_config()
    c.model.update({"embedding_size": 128, "hidden_size": 128, "num_layers": 2, "num_heads": 4, "intermediate_size": 512,
                    "generator_size": 0.5, "positions": "rotary", "rotary_theta": 100.0, "norm": "pre",
                    "hidden_dropout": 0.0, "attention_dropout": 0.0})
    c.data.update({"source": "pydocs", "vocab_size": 512, "seq_len": 64, "batch_size": 32, "segment_pairs": False})
    c.optimizer.update({"learning_rate": 3e-3, "beta2": 0.98, "warmup_steps": 200, "steps": 2000})
    c.run.update({"log_every_steps": 100, "eval_every_steps": 500, "eval_batches": 40, "checkpoint_every_steps": 500})
    return c
