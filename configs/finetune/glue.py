"""GLUE as published (paper, appendix B): `glue.py:TASK`, one of cola sst2 mrpc stsb qqp mnli qnli rte wnli.

  python -m electra_jax.finetune --config=configs/finetune/glue.py:sst2 --config.init_from=runs/small \
      --config.task.data_dir=glue
  python -m electra_jax.finetune --config=configs/finetune/glue.py --config.init_from=runs/small \
      --config.task.data_dir=glue --config.run.tasks=cola,mrpc,stsb --config.run.seeds=5

Variants besides: `base` and `large` (rates of those sizes), `paper` and `reference` (paper or code where they differ).
SST-2 with small: 6,312 steps, about 1 h on two CPU cores. Published dev scores of the released models: docs/results.md.
"""

from electra_jax.tuning import config as defaults


def get_config(variant: str = ""):
    def task(name):
        return lambda c: c.task.update({"name": name})
    return defaults.apply_variants(defaults.get_config(), variant, {name: task(name) for name in defaults.GLUE})
