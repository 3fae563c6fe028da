"""Trained networks for downstream code, in three lines:

    m = electra_jax.load_discriminator("runs/quickstart")
    ids = np.array([[m.tokenizer.cls_id, *m.tokenizer.encode("a sentence"), m.tokenizer.sep_id]])
    hidden_BLD = m.module.apply({"params": m.params}, ids, method="encode")
"""

import dataclasses
import os
from typing import Any

import ml_collections

from electra_jax import checkpoint, model
from electra_jax.data.tokenizer import Tokenizer, tokenizer_from_files


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """What a downstream user needs of a run."""

    module: model.Electra               # a model.Discriminator or model.Generator
    params: dict[str, Any]              # numpy arrays, for `module.apply({"params": params}, ...)`
    tokenizer: Tokenizer
    config: ml_collections.ConfigDict   # of the run


def load_discriminator(path: str | os.PathLike) -> Pretrained:
    """Loads a run's discriminator: `module.apply` gives RTD logits [B, L], with `method="encode"` states [B, L, D].

    `path` is a workdir, its checkpoints folder or one checkpoint. Only the parameters needed are read. A run of
    the MLM baseline has the encoder alone. Raises UserError when there is no readable checkpoint.
    """
    return _load(path, model.Discriminator, ("embeddings", "discriminator"))


def load_generator(path: str | os.PathLike) -> Pretrained:
    """Loads a run's generator: `module.apply` gives vocabulary logits [B, L, V]; otherwise as `load_discriminator`."""
    return _load(path, model.Generator, ("embeddings", "generator"))


def _load(path, kind: type[model.Electra], parts: tuple[str, ...]) -> Pretrained:
    params, meta, files = checkpoint.load_params(path, parts)
    config = ml_collections.ConfigDict(meta["config"])
    is_mlm = config.objective.name == "mlm"
    if kind is model.Generator and (is_mlm or config.model.sharing == "all"):
        # Its encoder is the discriminator's.
        params, _, _ = checkpoint.load_params(path, (*parts, "discriminator"))
    # On a user's machine neither recomputation nor a fused kernel of the training machine is wanted.
    config.model.update({"remat": "none", "attention": "xla"})
    return Pretrained(model.build(config.model, is_mlm, kind), params, tokenizer_from_files(files), config)
