"""SQuAD as published: `squad.py:v1.1` or `squad.py:v2.0`, from train-VERSION.json and dev-VERSION.json in data_dir.

  python -m electra_jax.finetune --config=configs/finetune/squad.py:v1.1 --config.init_from=runs/base \
      --config.task.data_dir=squad

The original's joint head; `--config.model.qa_head=plain` has two logits a token and exports to Hugging Face.
"""

from electra_jax.tuning import config as defaults


def get_config(variant: str = ""):
    c = defaults.get_config()
    c.task.kind = "squad"
    c.data.update({"seq_len": 512, "bucket": 64, "eval_batch_size": 32})
    versions = {v: (lambda c, v=v: c.task.update({"version": v})) for v in ("v1.1", "v2.0")}
    return defaults.apply_variants(c, variant, versions)
