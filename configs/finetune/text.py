"""Your own texts, one or two columns, with a class or a score: TSV, CSV or JSON lines. Classes are found by themselves.

  python -m electra_jax.finetune --config=configs/finetune/text.py --config.init_from=runs/small \
      --config.task.train=train.csv --config.task.dev=dev.csv --config.task.text=review --config.task.label=stars

Without a dev file a tenth of train is held out.
"""

from electra_jax.tuning import config as defaults


def get_config(variant: str = ""):
    c = defaults.get_config()
    c.task.update({"kind": "text", "name": "text"})
    return defaults.apply_variants(c, variant)
