"""ELECTRA-Small as published (paper, Table 6): 14 M parameters.

  python -m electra_jax.train --config=configs/small.py --workdir=runs/small \
      --config.data.source='text:corpus/*.txt' --config.data.tokenizer=vocab.txt

Hardware and time, as published: one V100, 4 days. Score, as published: GLUE dev average 79.9 (BERT-Small 75.1).
Variants: `small.py:plusplus`, the released "Small" (generator as large as the discriminator, length 512,
4 M steps; published GLUE test average 79.7); `small.py:reference`, the original's code with its quirks;
both with `small.py:plusplus,reference`.
"""

from electra_jax import config as defaults


def get_config(variant: str = ""):
    c = defaults.get_config()   # the defaults are ELECTRA-Small
    c.data.tokenizer = "vocab.txt"
    c.model.dtype = "float32"
    return defaults.apply_variants(c, variant, {"plusplus": plusplus})


def plusplus(c):
    """The released Small++. Its batch size is not in print; 128 gives the 3.6e19 FLOPs that are."""
    c.model.generator_size = 1.0
    c.data.seq_len = 512
    c.optimizer.steps = 4_000_000
