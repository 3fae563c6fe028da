"""Downstream tasks: their files, features, scores and predictions. No JAX here."""

from collections.abc import Callable, Mapping
from typing import Any

from electra_jax.data.tokenizer import Tokenizer
from electra_jax.tasks import glue, squad, tagging, text
from electra_jax.tasks.base import Task


def makers(config, tokenizer: Tokenizer) -> dict[str, Callable[[], Task]]:
    """Returns functions that read the tasks a fine-tuning config asks for, by task name."""
    t, seq_len = config.task, config.data.seq_len
    if t.kind == "glue":
        names = [name.strip() for name in config.run.tasks.split(",") if name.strip()] or [t.name]
        if names == ["all"]:
            names = glue.present(t.data_dir)
        return {name: lambda name=name: glue.load(name, tokenizer, seq_len, t.data_dir, t.swap_pairs) for name in names}
    if t.kind == "squad":
        fields = dict(t) | {"joint_head": config.model.qa_head == "joint"}
        return {f"squad-{t.version}": lambda: squad.from_config(fields, tokenizer, seq_len)}
    if t.kind == "tagging":
        return {t.name: lambda: tagging.from_config(dict(t), tokenizer, seq_len)}
    return {t.name: lambda: text.from_config(dict(t), tokenizer, seq_len, config.run.seed)}


def restore(spec: Mapping[str, Any], tokenizer: Tokenizer) -> Task:
    """Returns the task, without data, whose `spec()` this is."""
    return {"text": text, "squad": squad, "tagging": tagging}[spec["kind"]].restore(spec, tokenizer)
