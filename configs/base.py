"""ELECTRA-Base as published (paper, Table 6): 110 M parameters, 119 M with the generator.

  python -m electra_jax.train --config=configs/base.py --workdir=runs/base \
      --config.data.source='text:corpus/*.txt' --config.data.tokenizer=vocab.txt

Hardware and time, as published: 16 TPU v3, 4 days. Score, as published: GLUE dev average 85.1 (BERT-Base 82.2).
Variant: `base.py:reference`, the original's code with its quirks.
"""

from electra_jax import config as defaults


def get_config(variant: str = ""):
    c = defaults.get_config()
    c.model.update({"embedding_size": 768, "hidden_size": 768, "num_heads": 12, "intermediate_size": 3072,
                    "generator_size": 1 / 3, "dtype": "bfloat16"})
    c.data.update({"tokenizer": "vocab.txt", "seq_len": 512, "batch_size": 256})
    c.optimizer.update({"learning_rate": 2e-4, "steps": 766_000})
    return defaults.apply_variants(c, variant)
