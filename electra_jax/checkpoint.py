"""Checkpoints: written in the background, verified when read, usable without the training code.

Orbax is wrapped here and nowhere else. It neither notices a flipped byte in an array nor falls back
to an older step (orbax-checkpoint 0.12.8), so each step carries a table of its leaves with a CRC32 each.
A step folder holds the items `state` (arrays), `index` (the table), `meta` and `tokenizer` (JSON).
"""

import base64
import concurrent.futures
import importlib.metadata
import json
import os
import platform
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from electra_jax import runtime
from electra_jax.config import UserError

PyTree = Any
_ITEMS = ("index", "meta", "tokenizer")
_PACKAGES = ("electra_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
_INDEX_VERSION = 1


class _Damaged(Exception):
    """A step whose files do not hold what was saved."""


def _warn(text: str) -> None:
    if jax.process_index() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)


def _sync(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _one_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


# --- Leaves: path, shape, dtype and CRC32 -------------------------------------------------------

def _leaves(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves by path, such as "params/embeddings/token/embedding"."""
    def name(key: Any) -> str:
        return str(next(getattr(key, a) for a in ("key", "idx", "name") if hasattr(key, a)))
    return {"/".join(map(name, path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _crc32(leaf: Any) -> int:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    array = np.ascontiguousarray(np.asarray(leaf))
    # As bytes: the buffer protocol does not know bfloat16.
    return zlib.crc32(array.reshape(-1).view(np.uint8))


def _crcs(leaves: Mapping[str, Any]) -> dict[str, int]:
    # zlib releases the GIL, so threads help; an all-gather must come in the same order on every host.
    if jax.process_count() > 1:
        return {path: _crc32(leaf) for path, leaf in leaves.items()}
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(leaves, pool.map(_crc32, leaves.values()), strict=True))


def _signature(leaf: Any) -> dict[str, Any]:
    return {"dtype": str(np.dtype(leaf.dtype)), "shape": list(leaf.shape)}


def _json_crc(*items: Any) -> int:
    return zlib.crc32(json.dumps(items, sort_keys=True).encode())


def _index(state: PyTree, meta: dict, tokenizer: dict) -> dict[str, Any]:
    leaves = _leaves(state)
    crcs = _crcs(leaves)
    table = {path: _signature(leaf) | {"crc32": crcs[path]} for path, leaf in leaves.items()}
    return {"version": _INDEX_VERSION, "leaves": table, "crc32": _json_crc(_INDEX_VERSION, table, meta, tokenizer)}


def _verify_items(items: Mapping[str, Any]) -> None:
    index = items["index"]
    if index["crc32"] != _json_crc(index["version"], index["leaves"], items["meta"], items["tokenizer"]):
        raise _Damaged("the CRC of index, meta and tokenizer differs")
    if index["version"] != _INDEX_VERSION:
        raise UserError(f"the checkpoint has format {index['version']}, this program reads {_INDEX_VERSION}: "
                        "install the electra_jax that wrote it.")


def _verify_leaves(tree: PyTree, table: Mapping[str, Any]) -> None:
    for path, crc in _crcs(_leaves(tree)).items():
        if crc != table[path]["crc32"]:
            raise _Damaged(f"the CRC of {path} differs")


def _is_damage(error: Exception) -> bool:
    """Tells a damaged file from a machine in trouble: the latter must not cost a good checkpoint."""
    if isinstance(error, (MemoryError, PermissionError)):
        return False
    return not any(word in str(error) for word in ("RESOURCE_EXHAUSTED", "out of memory", "Too many open files",
                                                   "PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE"))


# --- Refusals -----------------------------------------------------------------------------------

def _remedy(where: str) -> str:
    return f"give another --workdir, or start from its parameters with --config.run.init_from={where}"


def check(meta: Mapping[str, Any], expected: Mapping[str, Any], where: str = "the checkpoint") -> None:
    """Refuses a checkpoint whose metadata differ from those of this run.

    `expected` holds the fields to compare, such as `tokenizer` and `manifest_hash`; "config" is not compared.
    Raises UserError, one line, for the first field that differs.
    """
    for field, value in expected.items():
        if field != "config" and meta.get(field) != value:
            raise UserError(f"{field} is {value!r} in this run but {meta.get(field)!r} in {where}: {_remedy(where)}.")


def _config_differences(meta: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Returns " (model.hidden_size=64, was 128)" or "": which fields explain another shape."""
    ours, theirs = (m.get("config") or {} for m in (expected, meta))
    found = [f"{section}.{name}={value!r}, was {theirs[section][name]!r}"
             for section in ("model", "objective", "optimizer") for name, value in (ours.get(section) or {}).items()
             if name in (theirs.get(section) or {}) and theirs[section][name] != value]
    return f" ({'; '.join(found)})" if found else ""


def _check_leaves(table: Mapping[str, Any], abstract_state: PyTree, where: str, why: str) -> None:
    # Orbax casts silently when the dtypes differ, so this comes before any array is read.
    ours = {path: _signature(leaf) for path, leaf in _leaves(abstract_state).items()}
    for path in sorted(ours.keys() - table.keys()):
        raise UserError(f"{path} of this run is missing in {where}{why}: {_remedy(where)}.")
    for path in sorted(table.keys() - ours.keys()):
        raise UserError(f"{path} of {where} is unknown to this run{why}: {_remedy(where)}.")
    for path, mine in ours.items():
        for what in ("shape", "dtype"):
            if mine[what] != table[path][what]:
                raise UserError(f"{what} of {path} is {mine[what]} in this run but {table[path][what]} in {where}"
                                f"{why}: {_remedy(where)}.")


# --- Folders ------------------------------------------------------------------------------------

def _absolute(path: str | os.PathLike) -> epath.Path:
    # With a relative path Orbax opens, accepts a save, and fails only in the background.
    text = os.fspath(path)
    return epath.Path(text) if "://" in text else epath.Path(os.path.abspath(os.path.expanduser(text)))


def _steps(directory: epath.Path) -> list[int]:
    """Returns the committed steps, oldest first: an uncommitted one still has its temporary name."""
    if not directory.is_dir():
        return []
    names = [p.name for p in directory.iterdir() if p.name.isdigit()]
    if "://" in str(directory):   # object stores have no atomic rename, a commit file is written last
        names = [n for n in names if (directory / n / "commit_success.txt").exists()]
    return sorted(map(int, names))


class Checkpointer:
    """Saves and restores the training state under one folder; the only writer of that folder."""

    def __init__(self, directory: str | os.PathLike, keep: int, every_steps: int, every_minutes: float,
                 clock: Callable[[], float] = time.monotonic):
        """Opens `directory` (local or a bucket), which it creates, and removes what a killed save left.

        Keeps the `keep` newest steps. `every_steps` is for `is_due`, `every_minutes` for `is_overdue`; 0 switches one
        off.
        """
        runtime.quiet_orbax()
        self.directory = _absolute(directory)
        self._every_steps, self._every_s, self._clock = every_steps, 60 * every_minutes, clock
        self._last_save_s = clock()
        self._pending: int | None = None     # step of the save that is under way
        self._failures = 0                   # saves in a row that were not written
        self._recover_replaced()
        self._manager = ocp.CheckpointManager(self.directory, options=ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep), cleanup_tmp_directories=True))

    def latest_step(self) -> int | None:
        """Returns the newest committed step, which a save still under way is not."""
        steps = _steps(self.directory)
        return steps[-1] if steps else None

    def is_due(self, step: int) -> bool:
        """Says whether a checkpoint is due after `step` updates, by their count."""
        return bool(self._every_steps) and step % self._every_steps == 0

    def is_overdue(self) -> bool:
        """Says whether one is due by the time since the last save, on this host's clock; a save needs all hosts."""
        return bool(self._every_s) and self._clock() - self._last_save_s >= self._every_s

    def save(self, state: PyTree, meta: Mapping[str, Any], tokenizer_files: Mapping[str, bytes] | None = None,
             force: bool = False) -> bool:
        """Starts to save `state`, whose leaf "step" numbers the checkpoint, and returns whether it did.

        The arrays are copied before it returns, so donating them next is safe; the files follow in the
        background. `meta` is JSON; versions and time are added. A step that is there already is left as it is,
        unless `force` replaces it. A save that fails is a warning: the training goes on.
        """
        self.wait()
        step = int(state["step"])
        self._last_save_s = self._clock()
        meta = json.loads(json.dumps(dict(meta) | _provenance()))   # as it will be read: tuples become lists
        tokenizer = {name: base64.b64encode(data).decode() for name, data in (tokenizer_files or {}).items()}
        try:
            # Asked before any host changes the folder, for all must go the same way.
            if runtime.any_host(step in _steps(self.directory)):
                if not force:
                    return False
                # Set aside, not deleted: a kill before the new one is committed must not lose the step.
                if jax.process_index() == 0:
                    (self.directory / str(step)).rename(self.directory / f"replaced-{step}")
                _sync(f"replace {step}")
                self._manager.reload()
            index = _index(state, meta, tokenizer)
            started = self._manager.save(step, force=True, args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), index=ocp.args.JsonSave(index), meta=ocp.args.JsonSave(meta),
                tokenizer=ocp.args.JsonSave(tokenizer)))
        except Exception as error:
            self._failed(step, error)
            return False
        self._pending = step if started else None
        return started

    def wait(self) -> bool:
        """Waits for the save under way, if any, and returns whether the last save was written."""
        step, self._pending = self._pending, None
        try:
            self._manager.wait_until_finished()
            if step is not None and step not in _steps(self.directory):
                raise OSError("the step folder is missing after the commit")
        except Exception as error:
            self._failed(step, error)
        else:
            self._failures = 0 if step is not None else self._failures
            self._recover_replaced()
        return self._failures == 0

    def _recover_replaced(self) -> None:
        """Puts a step that was set aside back, or deletes it if its replacement was committed."""
        if jax.process_index() == 0 and self.directory.is_dir():
            for aside in [p for p in self.directory.iterdir() if p.name.startswith("replaced-")]:
                step = aside.name.removeprefix("replaced-")
                if int(step) in _steps(self.directory):
                    aside.rmtree()
                else:
                    aside.rename(self.directory / step)

    def _failed(self, step: int | None, error: Exception) -> None:
        self._failures += 1
        _warn(f"checkpoint {self.directory / str(step)} was not written ({_one_line(error)}); "
              f"{self._failures} in a row; training goes on.")
        self._recover_replaced()
        self._manager.reload()   # else the failed step stays listed, and later saves are skipped

    def restore(self, abstract_state: PyTree, expected: Mapping[str, Any] | None = None,
                refuse: Callable[[dict, str], None] = lambda meta, where: None) -> tuple[PyTree, dict] | None:
        """Returns (state, meta) of the newest step that verifies, or None if there is none.

        `abstract_state` has a `jax.ShapeDtypeStruct` with its sharding for each leaf; the mesh may be another than
        at the save. `expected`: see `check`; its "config" serves to explain a refusal. `refuse(meta, where)` may raise
        a UserError. A damaged step is renamed `damaged-N` with a warning. Raises UserError, before any array is read,
        for a checkpoint of another run.
        """
        self.wait()
        for step in reversed(_steps(self.directory)):
            try:
                return self._restore_step(step, abstract_state, expected or {}, refuse)
            except UserError:
                raise
            except Exception as error:
                if not _is_damage(error):
                    raise
                self._quarantine(step, error)
        return None

    def _restore_step(self, step: int, abstract_state: PyTree, expected, refuse) -> tuple[PyTree, dict]:
        where = str(self.directory / str(step))
        items = self._manager.restore(step, args=ocp.args.Composite(**{k: ocp.args.JsonRestore() for k in _ITEMS}))
        _verify_items(items)
        table = items["index"]["leaves"]
        check(items["meta"], expected, where)
        _check_leaves(table, abstract_state, where, _config_differences(items["meta"], expected))
        refuse(items["meta"], where)
        state = self._manager.restore(step, args=ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state)))["state"]
        _verify_leaves(state, table)
        return state, items["meta"]

    def _quarantine(self, step: int, error: Exception) -> None:
        target = self.directory / f"damaged-{step}"
        while target.exists():
            target = target.with_name(target.name + "-again")
        if jax.process_index() == 0:
            (self.directory / str(step)).rename(target)
        _sync(f"quarantine {step}")
        self._manager.reload()   # else Orbax takes the step for the newest, and later saves are skipped
        _warn(f"checkpoint {self.directory / str(step)} is damaged ({_one_line(error)}); "
              f"renamed to {target.name}, trying the one before.")

    def close(self) -> bool:
        """Waits, releases the threads, and returns whether the last save was written."""
        written = self.wait()
        self._manager.close()
        return written


def _provenance() -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:   # run from a source folder
            versions[package] = "unknown"
    return {"versions": versions, "saved_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


# --- Without the training code ------------------------------------------------------------------

def load_params(path: str | os.PathLike, parts: Sequence[str] | None = ("embeddings", "discriminator"),
                ) -> tuple[dict, dict, dict[str, bytes]]:
    """Returns (params, meta, tokenizer files) of the newest step that verifies, and changes nothing on disk.

    `path`: a run's folder, its `checkpoints` folder, or one step. `params` holds the named parts (None: all) as nested
    dicts of numpy arrays; only these are read. Needs neither the mesh nor the device count of the run. Raises UserError
    if there is no readable checkpoint, or it lacks a part.
    """
    def load(reader: ocp.Checkpointer, folder: epath.Path, table: Mapping[str, Any]) -> PyTree:
        present = sorted({leaf.split("/")[1] for leaf in table if leaf.startswith("params/")})
        for part in parts or ():
            if part not in present:
                raise UserError(f"{folder} has no parameters {part!r}: it was saved with {', '.join(present)}.")
        wanted = [p for p in table if p.startswith(tuple(f"params/{part}/" for part in parts or present))]
        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        return reader.restore(folder, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(
            item=_nest(wanted, 0), restore_args=_nest(wanted, as_numpy), partial_restore=True)))["state"]

    tree, items = _load_newest(path, load)
    files = {name: base64.b64decode(text) for name, text in items["tokenizer"].items()}
    return tree["params"], items["meta"], files


def load_state(path: str | os.PathLike, abstract_state: PyTree) -> tuple[PyTree, dict]:
    """Returns (state, meta) of the newest step that verifies, and changes nothing on disk; `path` as `load_params`.

    `abstract_state` as for `Checkpointer.restore`. Raises UserError if there is no readable checkpoint, or its leaves
    have other names, shapes or dtypes.
    """
    def load(reader: ocp.Checkpointer, folder: epath.Path, table: Mapping[str, Any]) -> PyTree:
        _check_leaves(table, abstract_state, str(folder), "")
        return reader.restore(folder, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state)))["state"]

    state, items = _load_newest(path, load)
    return state, items["meta"]


def _load_newest(path: str | os.PathLike, load: Callable) -> tuple[PyTree, dict[str, Any]]:
    """Calls `load(reader, folder, table of leaves)` on the newest step first; returns its tree, verified, and items."""
    runtime.quiet_orbax()
    root = _absolute(path)
    folders = [root / "checkpoints"] if (root / "checkpoints").is_dir() else [root]
    folders = [folders[0] / str(s) for s in reversed(_steps(folders[0]))]
    if not folders and (root / "index").is_dir():
        folders = [root]
    if not folders:
        foreign = (root / "model.safetensors").exists() or (root / "discriminator").is_dir()
        raise UserError(f"no checkpoint found in {root}: " + (
            "a Hugging Face folder goes through python -m electra_jax.interop.huggingface import first." if foreign else
            "give the folder of a run (its --workdir), or one of its checkpoints/N."))
    for folder in folders:
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
                items = reader.restore(folder, args=ocp.args.Composite(
                    **{name: ocp.args.JsonRestore() for name in _ITEMS}))
                _verify_items(items)
                tree = load(reader, folder, items["index"]["leaves"])
            _verify_leaves(tree, items["index"]["leaves"])
            return tree, items
        except UserError:
            raise
        except Exception as error:
            if not _is_damage(error):
                raise
            _warn(f"checkpoint {folder} is damaged ({_one_line(error)}); trying the one before.")
    raise UserError(f"every checkpoint in {root} is damaged: give a copy of it, or another run's folder.")


def _nest(paths: Sequence[str], value: Any) -> dict:
    tree: dict = {}
    for path in paths:
        *folders, last = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = value
    return tree
