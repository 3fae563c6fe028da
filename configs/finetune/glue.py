"""GLUE as published (paper, appendix B): `glue.py:TASK`, one of cola sst2 mrpc stsb qqp mnli qnli rte wnli.

  python -m electra_jax.finetune --config=configs/finetune/glue.py:sst2 --config.init_from=runs/small \
      --config.task.data_dir=glue
  python -m electra_jax.finetune --config=configs/finetune/glue.py --config.init_from=runs/small \
      --config.task.data_dir=glue --config.run.tasks=cola,mrpc,stsb --config.run.seeds=5

Variants besides: `base` and `large` (rates of those sizes), `paper` and `reference` (paper or code where they differ).
Published dev medians of the released Small (++): CoLA 57.0, SST-2 91.2, MRPC 88.0, STS-B 87.5, QQP 89.0, MNLI 81.3,
QNLI 88.4, RTE 66.7.
"""

from electra_jax.tuning import config as defaults


def get_config(variant: str = ""):
    def task(name):
        return lambda c: c.task.update({"name": name})
    return defaults.apply_variants(defaults.get_config(), variant, {name: task(name) for name in defaults.GLUE})
