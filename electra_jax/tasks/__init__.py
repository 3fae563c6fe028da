"""Downstream tasks: their files, features, scores and predictions. No JAX here."""

from collections.abc import Callable, Mapping
from typing import Any

from electra_jax.data.tokenizer import Tokenizer
from electra_jax.tasks import glue, squad, tagging, text
from electra_jax.tasks.base import Task, checksum


def makers(config, tokenizer: Tokenizer) -> dict[str, Callable[[], Task]]:
    """Returns functions that read the tasks a fine-tuning config asks for, by task name."""
    t, seq_len = config.task, config.data.seq_len
    if t.kind == "glue":
        return {name: lambda name=name: glue.load(name, tokenizer, seq_len, t.data_dir, t.swap_pairs)
                for name in _glue_names(config)}
    if t.kind == "squad":
        fields = dict(t) | {"joint_head": config.model.qa_head == "joint"}
        return {f"squad-{t.version}": lambda: squad.from_config(fields, tokenizer, seq_len)}
    if t.kind == "tagging":
        return {t.name: lambda: tagging.from_config(dict(t), tokenizer, seq_len)}
    return {t.name: lambda: text.from_config(dict(t), tokenizer, seq_len, config.run.seed)}


def checksums(config) -> dict[str, dict[str, int]]:
    """Returns CRCs of the files that each task of `makers` will read, by task and by the split or name of the file.

    Raises UserError for the first that is missing, so that no task finds out after others have trained for hours.
    """
    t = config.task
    if t.kind == "glue":
        found = {name: {file: ("task.data_dir", path) for file, path in glue.files(name, t.data_dir).items()}
                 for name in _glue_names(config)}
    elif t.kind == "squad":
        found = {f"squad-{t.version}": squad.files(t)}
    else:
        found = {t.name: {split: (f"task.{split}", t[split]) for split in ("train", "dev", "test") if t[split]}}
    return {name: {file: crc for file, where in given.items() if (crc := checksum(*where)) is not None}
            for name, given in found.items()}


def _glue_names(config) -> list[str]:
    names = [name.strip() for name in config.run.tasks.split(",") if name.strip()] or [config.task.name]
    return glue.present(config.task.data_dir) if names == ["all"] else names


def restore(spec: Mapping[str, Any], tokenizer: Tokenizer) -> Task:
    """Returns the task, without data, whose `spec()` this is."""
    return {"text": text, "squad": squad, "tagging": tagging}[spec["kind"]].restore(spec, tokenizer)
