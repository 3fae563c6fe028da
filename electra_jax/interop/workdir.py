"""Foreign weights as a checkpoint of ours, and the command-line manners that both importers share."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from electra_jax import checkpoint, cli, config, runtime
from electra_jax import model as model_lib
from electra_jax.config import UserError
from electra_jax.data.tokenizer import Tokenizer


def write(output: str | os.PathLike, model: dict[str, Any], params: dict[str, Any], tokenizer: Tokenizer,
          moments: tuple[dict, dict] | None = None, step: int | None = None, source: str = "",
          objective: str = "electra") -> None:
    """Writes a workdir whose one checkpoint `run.init_from` and `load_discriminator` take, or nothing at all.

    `model` holds the fields of the config's `model` section, `params` numpy arrays as our parameter tree.
    `moments` are Adam's first and second, trees like `params`, after `step` updates. Prints how to go on.
    Raises UserError if `output` is there already, or the tokenizer has more pieces than the model has rows.
    """
    output = Path(output)
    fields = config.get_config()
    fields.model.update(model)
    fields.objective.name = objective
    if tokenizer.vocab_size > fields.model.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} pieces, but the token table only "
                        f"{fields.model.vocab_size} rows: they do not belong together.")
    state = {"step": jnp.asarray(step or 0, jnp.int32), "params": jax.tree.map(jnp.asarray, params)}
    if moments is not None:
        from electra_jax import optimizer  # late: whoever only loads a network needs no optax
        state["opt_state"] = optimizer.with_moments(
            optimizer.build(fields.optimizer).init(state["params"]), *moments, state["step"])
    with new_folder(output) as folder:
        checkpointer = checkpoint.Checkpointer(folder / "checkpoints", keep=1, every_steps=0, every_minutes=0)
        meta = {"config": fields.to_dict(), "tokenizer": tokenizer.fingerprint, "source": source}
        checkpointer.save(state, meta, tokenizer.files())
        if not checkpointer.close():
            raise UserError(f"--output={output}: the checkpoint could not be written: make room there.")
        runtime.write_json_atomic(folder / "config.json", fields.to_dict())
        tokenizer.save(folder / "tokenizer")
    changed = {name: value for name, value in model.items() if value != config.get_config().model[name]}
    flags = " ".join(f"--config.model.{name}={value}" for name, value in changed.items() if name != "vocab_size")
    print(f"wrote {output} ({sum(x.size for x in jax.tree.leaves(params)):,} parameters). To continue pretraining:\n"
          "  python -m electra_jax.train --config=configs/small.py --workdir=... --config.data.source=...\n"
          f"    --config.run.init_from={output} --config.data.tokenizer={output}/tokenizer {flags}")
    if moments is not None:
        print("with the optimizer's moments and schedule as well: --config.run.init_optimizer=True")


def generator_fields(disc: model_lib.Architecture, gen: model_lib.Architecture, sharing: str) -> dict[str, Any]:
    """Returns the fields of `model` that make the generator `gen` beside `disc`; 0 where the derived value holds."""
    derived = {"heads": max(1, gen.hidden_size // disc.head_size),
               "intermediate_size": round(gen.hidden_size * disc.intermediate_size / disc.hidden_size),
               "embedding_size": gen.hidden_size if sharing == "none" else disc.embedding_size}
    actual = {"heads": gen.num_heads, "intermediate_size": gen.intermediate_size, "embedding_size": gen.embedding_size}
    return {"sharing": sharing, "generator_size": gen.hidden_size / disc.hidden_size,
            "generator_layers": gen.num_layers / disc.num_layers,
            **{f"generator_{name}": value if value != derived[name] else 0 for name, value in actual.items()}}


def fresh_generator(model: dict[str, Any], seed: int) -> dict[str, Any]:
    """Draws the generator that fields of `model` describe, on the discriminator's tables, and says so."""
    section = config.get_config().model
    section.update(model)
    arch = model_lib.generator_architecture(section)
    params = model_lib.init_params(model_lib.build(section), jax.random.key(seed), "generator_logits")
    print(f"no generator given: drew a fresh one, {arch.hidden_size} wide with {arch.num_layers} layers and "
          f"{arch.num_heads} heads (--generator_size={section.generator_size} --generator_layers="
          f"{section.generator_layers} --seed={seed}), on the discriminator's token, position and segment tables")
    return jax.tree.map(np.asarray, params["generator"])


def add_generator_flags(parser) -> None:
    """Adds the flags of `fresh_generator` to an argparse parser."""
    parser.add_argument("--generator_size", type=float, default=0.25, help="width of a fresh generator, as a share")
    parser.add_argument("--generator_layers", type=float, default=1.0, help="depth of a fresh generator, as a share")
    parser.add_argument("--seed", type=int, default=0, help="of a fresh generator")


class new_folder:
    """`with new_folder(path) as temporary`: what is written there appears under `path` at the end, or not at all."""

    def __init__(self, path: Path):
        """Raises UserError if `path` holds anything, or cannot be made."""
        self._path = path
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise UserError(f"--output={path} exists and is not empty: give a new folder.")

    def __enter__(self) -> Path:
        parent = self._path.absolute().parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self._temporary = Path(tempfile.mkdtemp(prefix=f".{self._path.name}-", dir=parent))
        except OSError as error:
            raise UserError(f"--output={self._path} cannot be made ({error.strerror}): give another folder.") from error
        self._temporary.chmod(0o777 & ~_umask())    # mkdtemp's own is for its owner alone
        return self._temporary

    def __exit__(self, failed, *unused: Any) -> None:
        if failed:
            shutil.rmtree(self._temporary, ignore_errors=True)
            return
        if self._path.is_dir():
            self._path.rmdir()
        self._temporary.rename(self._path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def run(main: Callable[[list[str]], None]) -> int:
    """Calls `main(arguments)` and returns the exit code: a UserError is one line and code 2."""
    runtime.quiet_logging()
    return cli.exit_code(lambda: main(sys.argv[1:]))


def read_json(path: Path) -> dict:
    """Returns the JSON object in a file; raises UserError when it is missing or is none."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a whole folder.") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): fetch or write it anew.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: fetch or write it anew.")
    return content


def check_finite(tensors: dict[str, np.ndarray], where: str) -> None:
    """Raises UserError for the first tensor with a NaN or an infinity: a damaged file, or a run that diverged."""
    for name, array in tensors.items():    # bfloat16 is of kind V
        if array.dtype.kind in "fV" and not np.isfinite(array).all():
            raise UserError(f"{where}: {name} has values that are not finite: the file is damaged or the run diverged.")
