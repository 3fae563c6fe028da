"""A tiny ELECTRA on your own text: 1.7 M parameters, 33 M tokens, to see what fine-tuning gains by pretraining.

  python -m electra_jax.train --config=configs/tiny.py --config.data.source='text:corpus/*.txt.xz'

Choices as in quickstart.py: pre-norm and rotary positions learn sooner, so Hugging Face's ELECTRA, which knows neither,
cannot load it; and the generator has one layer, for with two it is ahead of the discriminator for the whole run.
With `--config.optimizer.steps=16000` it learns to compare sentences as well: STS-B 76 instead of 26.
Variant: `tiny.py:mlm`, the MLM baseline with 2 % more model FLOPs, for comparisons at equal compute. What both score:
docs/results.md.
"""

from electra_jax import config as defaults


def get_config(variant: str = ""):
    c = defaults.get_config()
    c.model.update({"embedding_size": 128, "hidden_size": 128, "num_layers": 3, "num_heads": 4,
                    "intermediate_size": 512, "generator_size": 0.25, "generator_layers": 0.34,
                    "positions": "rotary", "rotary_theta": 1000.0, "norm": "pre",
                    "hidden_dropout": 0.0, "attention_dropout": 0.0})
    c.data.update({"vocab_size": 8192, "seq_len": 128, "batch_size": 32, "eval_fraction": 0.005})
    c.optimizer.update({"learning_rate": 2e-3, "beta2": 0.98, "warmup_steps": 400, "steps": 8000})
    c.run.update({"eval_every_steps": 2000, "eval_batches": 40, "checkpoint_every_steps": 1000})
    return defaults.apply_variants(c, variant, {"mlm": mlm})


def mlm(c):
    """A step of the MLM baseline costs 4 % less."""
    c.objective.name = "mlm"
    c.optimizer.steps = 8565
