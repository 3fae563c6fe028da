"""ELECTRA-Large as published (paper, Table 6, ELECTRA-400K): 335 M parameters, 355 M with the generator.

  python -m electra_jax.train --config=configs/large.py --workdir=runs/large \
      --config.data.source='text:corpus/*.txt' --config.data.tokenizer=vocab.txt --config.mesh.fsdp=8

Score, as published: GLUE dev average 89.0 after 400 k steps and 89.5 after 1.75 M (7.1e20 and 3.1e21 FLOPs).
A quarter of the tokens is masked: at 15 % so good a generator leaves only about 7 % replaced.
Variant: `large.py:reference`, the original's code with its quirks.
"""

from electra_jax import config as defaults


def get_config(variant: str = ""):
    c = defaults.get_config()
    c.model.update({"embedding_size": 1024, "hidden_size": 1024, "num_layers": 24, "num_heads": 16,
                    "intermediate_size": 4096, "generator_size": 0.25, "dtype": "bfloat16", "remat": "dots",
                    "scan_layers": True})
    c.objective.mask_prob = 0.25
    c.data.update({"tokenizer": "vocab.txt", "seq_len": 512, "batch_size": 2048})
    c.optimizer.update({"learning_rate": 2e-4, "steps": 400_000})
    return defaults.apply_variants(c, variant)
