"""Token labelling from CoNLL-style files, one word a line: chunking, named entities, parts of speech.

  python -m electra_jax.finetune --config=configs/finetune/tagging.py --config.init_from=runs/small \
      --config.task.train=train.txt --config.task.dev=test.txt

Chunking on CoNLL-2000, as the original: BIOES tags learnt, the first piece of a word speaks for it, entity F1.
"""

from electra_jax.tuning import config as defaults


def get_config(variant: str = ""):
    c = defaults.get_config()
    c.task.update({"kind": "tagging", "name": "chunk"})
    c.data.seq_len = 256
    return defaults.apply_variants(c, variant)
