"""Token labelling from CoNLL-style files: chunking, named entities (BIO, BIOES, IOB1) or one tag a word (plain)."""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from electra_jax.config import UserError
from electra_jax.data.tokenizer import Tokenizer
from electra_jax.tasks.base import Feature, Outputs, Task, read_text

Chunk = tuple[str, int, int]    # type, first word, one past the last word

_HELD_OUT = 0.1    # share of train that is dev, where no dev file is given
_SCHEMES = ("bio", "iob1", "bioes", "plain")
_MARKED = re.compile(r"O|[BIES]-.+", re.DOTALL)
_BILOU = re.compile(r"O|[BILU]-.+", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class _Sentence:
    words: list[str]
    tags: list[str] | None    # in the file's scheme; None: not known
    line: int                 # of its first word in the file, counted from 1


@dataclasses.dataclass(frozen=True)
class _Window:
    first: int               # first word of the sentence in it
    ids: list[int]           # of all its words
    positions: np.ndarray    # int [words], where the words' first tokens stand in the feature


class TaggingTask(Task):
    """One label a word. `from_config` makes it from files, `restore` without data.

    `scheme` is the files' tagging scheme, in which predictions are scored and written; `train_scheme` the one the
    network learns. `labels` are the tags of `train_scheme`, "O" first.
    """

    head = "tagging"

    def __init__(self, tokenizer: Tokenizer, seq_len: int, labels: Sequence[str], scheme: str, train_scheme: str,
                 segment_ones: bool, name: str = "tagging"):
        if seq_len < 3:
            raise UserError(f"data.seq_len={seq_len} leaves no room for a word between [CLS] and [SEP]: give at least "
                            "3, better 128.")
        self.tokenizer, self.seq_len, self.labels = tokenizer, seq_len, tuple(labels)
        self.scheme, self.train_scheme, self.segment_ones = scheme, train_scheme, segment_ones
        self.name = name
        self.metric = "accuracy" if scheme == "plain" else "f1"
        self._sentences: dict[str, list[_Sentence]] = {}

    # --- Features -------------------------------------------------------------------------------

    def splits(self) -> tuple[str, ...]:
        return tuple(self._sentences)

    def features(self, split: str) -> list[Feature]:
        number = {label: i for i, label in enumerate(self.labels)}
        features = []
        for sentence, windows in self._windows(split):
            tags = None
            if sentence.tags is not None:
                tags = [number[tag] for tag in convert(sentence.tags, self.scheme, self.train_scheme)]
            features += [self._feature(window, tags) for window in windows]
        return features

    def _windows(self, split: str) -> Iterable[tuple[_Sentence, list[_Window]]]:
        sentences = self._sentences[split]
        known = self._word_ids({word for sentence in sentences for word in sentence.words})
        return ((sentence, self._cut(sentence.words, known)) for sentence in sentences)

    def _word_ids(self, words: Iterable[str]) -> dict[str, list[int]]:
        words = sorted(words)
        room = self.seq_len - 2    # a word longer than that loses its end
        return {word: ids[:room].tolist() or [self.tokenizer.unk_id]
                for word, ids in zip(words, self.tokenizer.encode_batch(words), strict=True)}

    def _cut(self, words: Sequence[str], word_ids: Mapping[str, list[int]]) -> list[_Window]:
        """Returns windows of whole words, each word in one of them."""
        windows, first, ids, positions = [], 0, [], []
        for i, word in enumerate(words):
            if len(ids) + len(word_ids[word]) > self.seq_len - 2:
                windows.append(_Window(first, ids, np.array(positions)))
                first, ids, positions = i, [], []
            positions.append(len(ids) + 1)
            ids = ids + word_ids[word]
        return [*windows, _Window(first, ids, np.array(positions))]

    def _feature(self, window: _Window, tags: Sequence[int] | None) -> Feature:
        ids = np.array([self.tokenizer.cls_id, *window.ids, self.tokenizer.sep_id], np.int32)
        targets = {}
        if tags is not None:
            targets["label"] = np.full(len(ids), -1, np.int32)
            targets["label"][window.positions] = tags[window.first:window.first + len(window.positions)]
        return Feature(ids, np.full(len(ids), int(self.segment_ones), np.int32), targets)

    # --- Predictions, scores and files ----------------------------------------------------------

    def _tags(self, windows: Sequence[_Window], outputs: Sequence[Outputs]) -> tuple[list[str], np.ndarray]:
        """Returns a sentence's tags in `scheme` and the probabilities [words] of what the network chose."""
        logits = np.concatenate([np.asarray(out["logits"], float)[window.positions]
                                 for window, out in zip(windows, outputs, strict=True)])    # [words, labels]
        odds = np.exp(logits - logits.max(1, keepdims=True))
        tags = [self.labels[i] for i in logits.argmax(1)]
        return convert(tags, self.train_scheme, self.scheme), 1 / odds.sum(1)

    def _predict_all(self, split: str, outputs: Sequence[Outputs]) -> list[tuple[_Sentence, list[str]]]:
        found, used = [], 0
        for sentence, windows in self._windows(split):
            found.append((sentence, self._tags(windows, outputs[used:used + len(windows)])[0]))
            used += len(windows)
        if used != len(outputs):
            raise ValueError(f"{len(outputs)} outputs for {used} features of {split}")
        return found

    def score(self, split: str, outputs: Sequence[Outputs]) -> dict[str, float]:
        """Returns "f1", "precision" and "recall" of the chunks (not for plain tags) and "accuracy", in percent.

        Raises UserError for a split without tags.
        """
        pairs = [(sentence.tags, tags) for sentence, tags in self._predict_all(split, outputs)]
        if any(gold is None for gold, _ in pairs):
            raise UserError(f"task.{split} has no tags to compare with: write its predictions instead.")
        right = sum(a == b for gold, tags in pairs for a, b in zip(gold, tags, strict=True))
        accuracy = {"accuracy": 100 * right / sum(len(gold) for gold, _ in pairs)}
        return accuracy if self.scheme == "plain" else {**chunk_scores(pairs), **accuracy}

    def write_predictions(self, split: str, outputs: Sequence[Outputs], folder: Path) -> None:
        """Writes tagging-SPLIT.txt: word, gold tag (where known) and predicted tag, a blank line after a sentence."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"tagging-{split}.txt", "w", encoding="utf-8", newline="\n") as file:
            for sentence, tags in self._predict_all(split, outputs):
                columns = [sentence.words, *([] if sentence.tags is None else [sentence.tags]), tags]
                # Words and tags with a space in them come from files with tabs.
                gap = "\t" if any(" " in cell for column in columns for cell in column) else " "
                file.writelines(gap.join(row) + "\n" for row in zip(*columns, strict=True))
                file.write("\n")

    # --- New text -------------------------------------------------------------------------------

    def spec(self) -> dict[str, Any]:
        return {"kind": "tagging", "name": self.name, "seq_len": self.seq_len, "labels": list(self.labels),
                "scheme": self.scheme, "train_scheme": self.train_scheme, "segment_ones": self.segment_ones}

    def columns(self) -> tuple[str, ...]:
        """Returns the name of the text in a record; "words", a list, does as well."""
        return ("text",)

    def encode(self, record: Mapping[str, Any]) -> list[Feature]:
        words = _words(record)
        return [self._feature(window, None) for window in self._cut(words, self._word_ids(set(words)))]

    def answer(self, record: Mapping[str, Any], outputs: Sequence[Outputs]) -> dict[str, Any]:
        """Returns {"words", "tags", "probabilities"}, and "entities" [{"type", "start", "end", "text"}] in words."""
        words = _words(record)
        tags, probabilities = self._tags(self._cut(words, self._word_ids(set(words))), outputs)
        told = {"words": words, "tags": tags, "probabilities": probabilities.tolist()}
        if self.scheme != "plain":
            told["entities"] = [{"type": kind, "start": a, "end": b, "text": " ".join(words[a:b])}
                                for kind, a, b in chunks(tags)]
        return told


def from_config(config: Mapping[str, Any], tokenizer: Tokenizer, seq_len: int) -> TaggingTask:
    """Returns the task with its data from the fields of `config.task`.

    `train`, `dev`, `test`: paths; without `dev`, a tenth of train is held out, always the same sentences.
    `word_column` 0, `tag_column` -1. `scheme`: "auto" (found from train), "bio", "iob1", "bioes", "plain";
    `train_scheme`: "" (as the files) or one of them, plain tags stay plain; `segment_ones` True; `name`. Prints which
    tags were found. Raises UserError, which names file and line.
    """
    word_column, tag_column = config.get("word_column", 0), config.get("tag_column", -1)
    if not config.get("train"):
        raise UserError("task.train is empty: give the path of a CoNLL-style file.")
    files, width = {}, 0
    for split in ("train", "dev", "test"):
        if config.get(split):
            files[split], columns = _read(f"task.{split}", config.get(split), word_column, tag_column,
                                          width if split == "test" else 0)
            width = width or columns
    train = files["train"]
    scheme, train_scheme = config.get("scheme") or "auto", config.get("train_scheme") or ""
    if scheme == "auto":
        scheme = _find_scheme(train, config.get("train"))
    if "plain" in (scheme, train_scheme) or not train_scheme:
        train_scheme = scheme
    for field, value in (("scheme", scheme), ("train_scheme", train_scheme)):
        if value not in _SCHEMES:
            raise UserError(f"task.{field}={value} is unknown: give one of {', '.join(_SCHEMES)}.")
    for split, sentences in files.items():
        try:
            _check_tags(f"task.{split}: {config.get(split)}", sentences, train, scheme)
        except UserError:
            if split != "test":
                raise    # test sets are published with placeholders for tags
            files[split] = [dataclasses.replace(sentence, tags=None) for sentence in sentences]
    if "dev" not in files:
        files["train"], files["dev"] = _hold_out(train)
        print(f"task.dev is empty: {len(files['dev'])} of the {len(train)} sentences of task.train are held out as dev")
    task = TaggingTask(tokenizer, seq_len, _labels(train, train_scheme), scheme, train_scheme,
                       bool(config.get("segment_ones", True)), config.get("name") or "tagging")
    found = sorted({tag for sentence in train for tag in sentence.tags})
    print(f"task.train: {len(found)} tags ({', '.join(found[:8])}{', ...' * (len(found) > 8)}) in the scheme {scheme}, "
          f"learnt as {train_scheme}; the metric is {task.metric}", flush=True)
    task._sentences = {split: files[split] for split in ("train", "dev", "test") if split in files}
    return task


def restore(spec: Mapping[str, Any], tokenizer: Tokenizer) -> TaggingTask:
    """Returns a task without data from `TaggingTask.spec()`."""
    return TaggingTask(tokenizer, spec["seq_len"], spec["labels"], spec["scheme"], spec["train_scheme"],
                       spec["segment_ones"], spec["name"])


# --- Chunks ------------------------------------------------------------------------------------------


def chunks(tags: Sequence[str]) -> list[Chunk]:
    """Returns the chunks of a sentence by conlleval's rules, for BIO, IOB1 and BIOES alike.

    Any tag but "O" is inside a chunk, also in a sequence that breaks its scheme: an I or E begins one where none of its
    type goes on. A chunk ends before B, S, O and another type, and after E and S.
    """
    found, start, before = [], None, ("O", "")
    for i, tag in enumerate([*tags, "O"]):
        mark, _, kind = tag.partition("-")
        if start is not None and (mark in "BSO" or before[0] in "ES" or kind != before[1]):
            found.append((before[1], start, i))
            start = None
        if start is None and mark != "O":
            start = i
        before = (mark, kind)
    return found


def convert(tags: Sequence[str], scheme: str, to: str) -> list[str]:
    """Returns the tags of a sentence in another scheme; the same tags, well-formed or not, if it is the same."""
    if scheme == to:
        return list(tags)
    spelled, previous = ["O"] * len(tags), ("", -1, -1)
    for kind, start, end in chunks(tags):
        spelled[start:end] = [f"I-{kind}"] * (end - start)
        if to != "iob1" or (previous[0], previous[2]) == (kind, start):
            spelled[start] = f"B-{kind}"
        if to == "bioes":
            spelled[end - 1] = f"{'S' if end - start == 1 else 'E'}-{kind}"
        previous = (kind, start, end)
    return spelled


def chunk_scores(pairs: Iterable[tuple[Sequence[str], Sequence[str]]]) -> dict[str, float]:
    """Returns precision, recall and F1 of (gold, predicted) sentences in percent, as conlleval: all types together.

    Written here because seqeval, the usual library, has had no release since 2020 and has no wheel.
    """
    right = gold_total = our_total = 0
    for gold, ours in pairs:
        gold, ours = set(chunks(gold)), set(chunks(ours))
        right, gold_total, our_total = right + len(gold & ours), gold_total + len(gold), our_total + len(ours)
    return {"f1": 200 * right / max(1, gold_total + our_total), "precision": 100 * right / max(1, our_total),
            "recall": 100 * right / max(1, gold_total)}


def _find_scheme(train: list[_Sentence], path) -> str:
    sentences = [sentence.tags for sentence in train]
    tags = {tag for sentence in sentences for tag in sentence}
    stray = {tag for tag in tags if not _MARKED.fullmatch(tag) and not _BILOU.fullmatch(tag)}
    if 2 * len(stray) < len(tags) and stray and tags - stray != {"O"}:
        line, tag = next((sentence.line + i, tag) for sentence in train for i, tag in enumerate(sentence.tags)
                         if tag in stray)
        raise UserError(f"task.train: {path}:{line}: the tag {json.dumps(tag)} has no span's mark (B-, I-, ...), but "
                        f"most of the {len(tags)} different tags have: correct the line, or set task.scheme=plain.")
    if not all(map(_MARKED.fullmatch, tags)):
        if all(map(_BILOU.fullmatch, tags)):
            raise UserError(f"task.train: {path} has tags in BILOU, which is not read: spell L- as E- and U- as S-, or "
                            "set task.scheme=plain.")
        return "plain"
    if any(tag[0] in "ES" for tag in tags):
        return "bioes"
    # In IOB1 a chunk begins with I, unless one of its type ends just before it.
    iob1 = all(convert(sentence, "bio", "iob1") == sentence for sentence in sentences)
    bio = all(convert(sentence, "iob1", "bio") == sentence for sentence in sentences)
    return "iob1" if iob1 and not bio else "bio"


def _labels(sentences: list[_Sentence], scheme: str) -> list[str]:
    tags = {tag for sentence in sentences for tag in sentence.tags}
    if scheme != "plain":    # every mark of every type: that a type's chunks are never long in train means nothing
        marks = {"bio": "BI", "iob1": "BI", "bioes": "BIES"}[scheme]
        tags = {"O"} | {f"{mark}-{tag[2:]}" for tag in tags if tag != "O" for mark in marks}
    return sorted(tags, key=lambda tag: (tag != "O", tag))


# --- Files and records -------------------------------------------------------------------------------


def _read(field: str, path, word_column: int, tag_column: int, train_width: int) -> tuple[list[_Sentence], int]:
    """Returns a file's sentences and its number of columns; a test file narrower than train's has no tags."""
    sentences, words, tags, width, line_number, start = [], [], [], 0, 0, 0
    labelled = True
    for line_number, line in enumerate([*read_text(field, path).split("\n"), ""], 1):
        row = line.strip(" \r")
        # Not str.split(): a no-break space is part of a word.
        row = row.split("\t") if "\t" in row else re.split(" +", row)
        if not any(row) or row[0] == "-DOCSTART-":
            if words:
                sentences.append(_Sentence(words, tags if labelled else None, start))
                words, tags = [], []
            continue
        if not width:
            width = len(row)
            labelled = width >= train_width
            for name, column in (("word_column", word_column), *([("tag_column", tag_column)] if labelled else [])):
                if not -width <= column < width:
                    raise UserError(f"task.{name}={column} is not in {field}: {path}:{line_number}, which has "
                                    f"{width} columns: give a number from 0 to {width - 1}.")
            if labelled and word_column % width == tag_column % width:
                raise UserError(f"{field}: {path}:{line_number} has {width} column(s), so that task.word_column="
                                f"{word_column} and task.tag_column={tag_column} are the same: correct "
                                "them, or the file.")
        if len(row) != width:
            raise UserError(f"{field}: {path}:{line_number} has {len(row)} columns, the first line has {width}: "
                            "correct the row.")
        if not words:
            start = line_number
        words.append(row[word_column])
        if labelled:
            tags.append(row[tag_column])
    if not sentences:
        raise UserError(f"{field}: {path} has no sentences: give a file with a word a line.")
    return sentences, width


def _check_tags(where: str, sentences: list[_Sentence], train: list[_Sentence], scheme: str) -> None:
    known = {tag if scheme == "plain" else tag[2:] for sentence in train for tag in sentence.tags}
    marks = {"bio": "BI", "iob1": "BI", "bioes": "BIES", "plain": ""}[scheme]
    for sentence in sentences:
        for i, tag in enumerate(sentence.tags or ()):
            line = sentence.line + i
            if scheme != "plain" and tag != "O" and not re.fullmatch(f"[{marks}]-.+", tag):
                raise UserError(f"{where}:{line}: the tag {json.dumps(tag)} is not in the scheme {scheme}: correct "
                                "it, or set task.scheme.")
            if (tag if scheme == "plain" else tag[2:]) not in known and tag != "O":
                raise UserError(f"{where}:{line}: the tag {json.dumps(tag)} does not occur in task.train: add "
                                "examples there, or correct it.")


def _hold_out(sentences: list[_Sentence]) -> tuple[list[_Sentence], list[_Sentence]]:
    count = max(1, round(_HELD_OUT * len(sentences)))
    if count >= len(sentences):
        raise UserError("task.dev is empty, and the one sentence of task.train cannot be both trained and evaluated "
                        "on: give task.dev, or more sentences.")
    held = set(np.random.default_rng(0).permutation(len(sentences))[:count].tolist())
    return ([s for i, s in enumerate(sentences) if i not in held], [s for i, s in enumerate(sentences) if i in held])


def _words(record: Mapping[str, Any]) -> list[str]:
    words = record.get("words")
    if words is None and isinstance(record.get("text"), str):
        words = record["text"].split()
    if not isinstance(words, (list, tuple)) or not words or not all(isinstance(word, str) for word in words):
        raise UserError("input: field 'words' (a list) or 'text' is missing or has no words (the record has "
                        f"{', '.join(map(str, record)) or 'nothing'}).")
    return [word.encode(errors="replace").decode() for word in words]    # a lone surrogate is legal JSON
