"""Classes or scores for one text or two: the user's own tables here, GLUE's in `tasks.glue`."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from electra_jax.config import UserError
from electra_jax.data.tokenizer import Tokenizer
from electra_jax.tasks import scores
from electra_jax.tasks.base import Feature, Outputs, Task, join
from electra_jax.tasks.tables import Record, clean, read_table

_HELD_OUT = 0.1          # share of train that is dev, where no dev file is given
_ENCODED_AT_ONCE = 10_000


class Row(NamedTuple):
    """One example as the task reads it."""
    texts: tuple[str, ...]     # one or two
    label: int | float | None  # class number or score; None where it is not known
    index: int                 # its number in predictions files


class TextTask(Task):
    """Classification (with `labels`) or regression (without) of rows with one or two texts.

    `columns` are the names of the texts in a new record, `metrics` names in `scores.METRICS`, the one that chooses
    checkpoints first. Scores from `low` to `high` are trained on as 0 to 1; answers are scaled back, and with `clip`
    kept within. With `swap` train is doubled by its rows with the two texts exchanged. `files` names the predictions
    files of splits that are not called NAME-SPLIT.tsv. Raises UserError when `seq_len` leaves no room for text and
    when a split has no rows.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, seq_len: int, columns: Sequence[str], labels: Sequence[str],
                 metrics: Sequence[str], rows: Mapping[str, Sequence[Row]], *, low: float = 0.0, high: float = 1.0,
                 clip: bool = False, swap: bool = False, files: Mapping[str, str] | None = None):
        smallest = 2 * len(columns) + 1
        if seq_len < smallest:
            raise UserError(f"data.seq_len={seq_len} leaves no room for text between the special tokens: give at least "
                            f"{smallest}, better 128.")
        for split, found in rows.items():
            if not found:
                raise UserError(f"task.{split} has no rows: give a file with examples.")
        self.name, self.tokenizer, self.seq_len = name, tokenizer, seq_len
        self.head = "classification" if labels else "regression"
        self.labels, self.metrics, self.metric = tuple(labels), tuple(metrics), metrics[0]
        self._columns, self._low, self._high, self._clip = tuple(columns), low, high, clip
        self._files = dict(files or {})
        self._rows = {split: list(found) for split, found in rows.items()}
        if swap:
            self._rows["train"] += [row._replace(texts=row.texts[::-1]) for row in self._rows["train"]]
        self._features = {}

    def splits(self) -> tuple[str, ...]:
        return tuple(self._rows)

    def features(self, split: str) -> list[Feature]:
        """Returns the features of a split, in order; encoded at the first call."""
        if split not in self._features:
            self._features[split] = self._encode(self._rows[split])
        return self._features[split]

    def score(self, split: str, outputs: Sequence[Outputs]) -> dict[str, float]:
        """Returns the metrics in percent; raises UserError for a split without labels."""
        true = [row.label for row in self._rows[split]]
        if None in true:
            raise UserError(f"task.{split} has no labels to compare with: write its predictions instead.")
        if len(true) != len(outputs):
            raise ValueError(f"{len(outputs)} outputs for {len(true)} features of {split}")
        predicted = self._predicted(outputs)
        return {name: scores.METRICS[name](true, predicted) for name in self.metrics}

    def write_predictions(self, split: str, outputs: Sequence[Outputs], folder: Path) -> None:
        """Writes index and prediction of every row, and its label where that is known, tab separated without quotes.

        Scores are as `score` takes them, as in GLUE's own evaluation; only in submissions, of test, are they clipped.
        """
        rows, predicted = self._rows[split], self._predicted(outputs)
        known = all(row.label is not None for row in rows)
        Path(folder).mkdir(parents=True, exist_ok=True)
        if split.startswith("test"):
            predicted = map(self._clipped, predicted)
        with open(Path(folder) / self._files.get(split, f"{self.name}-{split}.tsv"), "w", encoding="utf-8") as file:
            file.write("\t".join(["index", "prediction", "label"][:2 + known]) + "\n")
            for row, value in zip(rows, predicted, strict=True):
                label = [self._spell(row.label)] if known else []
                file.write("\t".join([str(row.index), self._spell(value), *label]) + "\n")

    def spec(self) -> dict[str, Any]:
        return {"kind": "text", "name": self.name, "seq_len": self.seq_len, "columns": list(self._columns),
                "labels": list(self.labels), "metrics": list(self.metrics), "low": self._low, "high": self._high,
                "clip": self._clip}

    def columns(self) -> tuple[str, ...]:
        """Returns the names of the texts in a record, one or two."""
        return self._columns

    def encode(self, record: Mapping[str, Any]) -> list[Feature]:
        """Returns the one feature of a record; raises UserError when a text column is missing or not text."""
        for column in self._columns:
            if not isinstance(record.get(column), str):
                problem = "is not a string" if column in record else "is missing"
                raise UserError(f"input: field {column!r} {problem}: this task reads {', '.join(self._columns)} (the "
                                f"record has {', '.join(map(str, record)) or 'nothing'}).")
        return self._encode([Row(tuple(clean(record[column]) for column in self._columns), None, 0)])

    def answer(self, record: Mapping[str, Any], outputs: Sequence[Outputs]) -> dict[str, Any]:
        """Returns {"label", "probabilities": {label: share}} or {"score"}."""
        value = self._predicted(outputs)[0]
        if not self.labels:
            return {"score": self._clipped(value)}
        logits = np.asarray(outputs[0]["logits"], np.float64)
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        return {"label": self.labels[value], "probabilities": dict(zip(self.labels, shares.tolist(), strict=True))}

    def _encode(self, rows: Sequence[Row]) -> list[Feature]:
        features = []
        for start in range(0, len(rows), _ENCODED_AT_ONCE):
            part = rows[start:start + _ENCODED_AT_ONCE]
            # Lists, because `join` shortens them; NumPy numbers one by one would take several times as long.
            encoded = [[ids.tolist() for ids in self.tokenizer.encode_batch(list(texts))]
                       for texts in zip(*(row.texts for row in part), strict=True)]
            pairs = zip(*encoded, strict=True) if len(encoded) == 2 else ((a, None) for a in encoded[0])
            features += [join(self.tokenizer, a, b, self.seq_len, self._targets(row.label))
                         for row, (a, b) in zip(part, pairs, strict=True)]
        return features

    def _targets(self, label) -> dict[str, Any]:
        if label is None:
            return {}
        return {"label": label if self.labels else (label - self._low) / (self._high - self._low)}

    def _predicted(self, outputs: Sequence[Outputs]) -> list:
        """Class numbers, or scores on the scale of the data."""
        if self.labels:
            return [int(np.argmax(output["logits"])) for output in outputs]
        return [float(output["score"]) * (self._high - self._low) + self._low for output in outputs]

    def _clipped(self, value):
        return min(max(value, self._low), self._high) if self._clip else value

    def _spell(self, value) -> str:
        return re.sub(r"[\t\n\r]", " ", self.labels[value]) if self.labels else f"{value:.6g}"


def restore(spec: Mapping[str, Any], tokenizer: Tokenizer) -> TextTask:
    """Returns the task, without data, whose `spec()` this is."""
    options = {key: value for key, value in spec.items() if key != "kind"}
    return TextTask(tokenizer=tokenizer, rows={}, **options)


def from_config(task: Mapping[str, Any], tokenizer: Tokenizer, seq_len: int, seed: int) -> TextTask:
    """Returns the task of the user's own files, called `task["name"]`, or "text".

    `task` has `train`, `dev`, `test` (paths; "" for dev holds out 10 % of train, drawn with `seed`, for test is none),
    `text`, `text_pair` ("" if there is one text), `label`: names of columns, or their numbers from 0 in tables without
    a header; `label_type` "class", "score" or "auto" (score if the labels are numbers, and not all whole). Classes are
    those of train, sorted. Prints which labels were found. Raises UserError for what `read_table` does, for labels that
    train has not, for labels that do not differ, for scores with a few labels between them that are no numbers (of
    "auto"), and for an unknown `label_type`.
    """
    if task["label_type"] not in ("auto", "class", "score"):
        raise UserError(f"task.label_type={task['label_type']!r} is not one of auto, class, score.")
    for field in ("train", "text", "label"):
        if not str(task[field]):
            raise UserError(f"task.{field} is empty: give " + (
                "the path of a .tsv, .csv or .jsonl file." if field == "train" else "the name of a column."))
    columns = {f"task.{field}": str(task[field]) for field in ("text", "text_pair", "label") if str(task[field])}
    header = not all(column.isdecimal() for column in columns.values())
    records = {split: read_table(task[split], f"task.{split}", columns, header, need_label=split != "test")
               for split in ("train", "dev", "test") if task[split]}

    train, where = records["train"], f"task.train: {task['train']}"
    known = [record.label for record in train]
    numbers = [number(label) for label in known]
    is_score = task["label_type"] == "score" or (task["label_type"] == "auto" and _are_scores(train, numbers, where))
    labels = [] if is_score else sort_labels(known)
    to_label = to_score if is_score else to_class(labels)
    rows = {split: make_rows(found, to_label, f"task.{split}: {task[split]}", split != "test")
            for split, found in records.items()}
    if len(set(known) if not is_score else set(numbers)) < 2:
        raise UserError(f"task.label={task['label']}: all rows of {where} have the same label {known[0]!r}: "
                        "there is nothing to learn, name another column.")
    if "dev" not in rows:
        rows = _hold_out(rows, task["train"], seed)
    low, high = (min(numbers), max(numbers)) if is_score else (0.0, 1.0)
    print(f"task.label={task['label']}: " + (f"scores from {low:g} to {high:g}" if is_score else
                                             f"{len(labels)} classes: {_shown(labels)}"), flush=True)
    metrics = ["spearman", "pearson"] if is_score else ["accuracy", "macro_f1"]
    if len(labels) == 2:
        metrics += ["f1", "matthews"]
    texts = list(columns.values())[:-1]
    name = task.get("name", "text")
    return TextTask(name, tokenizer, seq_len, texts, labels, metrics, rows, low=low, high=high)


def _hold_out(rows: dict[str, list[Row]], path, seed: int) -> dict[str, list[Row]]:
    train = rows["train"]
    count = max(1, round(_HELD_OUT * len(train)))
    chosen = set(np.random.default_rng(seed).permutation(len(train))[:count].tolist())
    print(f"task.dev is empty: {count} of {len(train)} rows of {path} are held out for it (seed {seed}).", flush=True)
    return {"train": [row for i, row in enumerate(train) if i not in chosen],
            "dev": [row for i, row in enumerate(train) if i in chosen],
            **{split: found for split, found in rows.items() if split != "train"}}


def _are_scores(train: Sequence[Record], numbers: Sequence[float | None], where: str) -> bool:
    """Whether labels are scores: numbers, and not all whole; UserError where most are, but some are no numbers."""
    if all(n is None or n.is_integer() for n in numbers):
        return False
    others = [record for record, n in zip(train, numbers, strict=True) if n is None]
    distinct = {record.label for record in train}
    if not others:
        return True
    if 2 * len({record.label for record in others}) < len(distinct):
        raise UserError(f"{where}:{others[0].line}: label {others[0].label!r} is not a number, but most of the "
                        f"{len(distinct)} different labels are: correct it, or remove the row, or set "
                        "task.label_type=class.")
    return False


# --- Labels -------------------------------------------------------------------------------------


def number(text: str) -> float | None:
    """Returns the finite number that `text` spells, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def sort_labels(found: Sequence[str]) -> list[str]:
    """Returns the distinct labels in order: of their numbers if all are whole numbers, else of their spelling."""
    found, numbers = sorted(set(found)), {label: number(label) for label in found}
    whole = all(n is not None and n.is_integer() for n in numbers.values())
    return sorted(found, key=numbers.get) if whole else found


def to_class(labels: Sequence[str]) -> Callable[[str], int]:
    """Returns the function from a label to its number; ValueError, with a reason for the user, for an unknown one."""
    numbers = {label: i for i, label in enumerate(labels)}

    def convert(label: str) -> int:
        if label not in numbers:
            raise ValueError(f"is none of the known labels ({_shown(labels)})")
        return numbers[label]
    return convert


def _shown(labels: Sequence[str]) -> str:
    return ", ".join(labels[:8]) + ", ..." * (len(labels) > 8)


def to_score(label: str) -> float:
    """Returns the score that a label spells; ValueError, with a reason for the user, when it is no number."""
    value = number(label)
    if value is None:
        raise ValueError("is not a number")
    return value


def make_rows(records: Sequence[Record], to_label: Callable, where: str, need_label: bool = True) -> list[Row]:
    """Returns the rows of one file, numbered from 0.

    A label that `to_label` does not take raises UserError, or without `need_label` is unknown: test sets are published
    with placeholders.
    """
    rows = []
    for index, record in enumerate(records):
        try:
            label = None if record.label is None else to_label(record.label)
        except ValueError as error:
            if not need_label:
                rows.append(Row(record.texts, None, index))
                continue
            raise UserError(f"{where}:{record.line}: label {record.label!r} {error}: correct it, or remove the "
                            "row.") from error
        rows.append(Row(record.texts, label, index))
    return rows
