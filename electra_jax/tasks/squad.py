"""SQuAD 1.1 and 2.0: windows over long contexts, n-best spans, the official metrics and files."""

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from electra_jax.config import UserError
from electra_jax.data.tokenizer import Tokenizer
from electra_jax.tasks.base import Feature, Outputs, Task, read_text
from electra_jax.tasks.scores import against_gold, best_threshold, normalise_answer

_DEFAULTS = {
    "version": "v1.1",         # "v1.1", or "v2.0": some questions have no answer
    "doc_stride": 128,         # tokens from one window's start to the next one's
    "max_query": 64,           # longest question in tokens, cut at its end
    "max_answer": 30,          # longest answer in tokens
    "n_best": 20,              # spans kept a question
    "joint_head": False,       # the network's head: ends scored given the start, as the original does, or plain
    "null_threshold": None,    # null odds above it mean "no answer"; None: chosen on dev
}


@dataclasses.dataclass(frozen=True)
class _Context:
    text: str
    ids: np.ndarray      # int32 [T]
    spans: np.ndarray    # int32 [T, 2], characters of `text`


@dataclasses.dataclass(frozen=True)
class _Question:
    id: str
    ids: np.ndarray               # int32, cut to max_query
    context: _Context
    answers: tuple[str, ...]
    span: tuple[int, int] | None    # first and last token of the first answer in the context; None: no answer there
    impossible: bool
    known: bool                     # False: a test question, nobody tells


@dataclasses.dataclass(frozen=True)
class _Window:
    start: int           # first token of the context in it
    offset: int          # where that token stands in the feature
    owned: np.ndarray    # bool [n], tokens that have no more context in any other window

    def __len__(self):
        return len(self.owned)


@dataclasses.dataclass(frozen=True)
class _Prediction:
    n_best: list[dict[str, Any]]    # {"text", "probability", "score", "start", "end"}, best first; may be empty
    null_odds: float                # higher: rather no answer

    @property
    def text(self) -> str:
        return self.n_best[0]["text"] if self.n_best else ""


class SquadTask(Task):
    """Extractive question answering. `from_config` makes it from files, `restore` without data.

    `inexact` counts, by split, first answers that no span of tokens gives back (compared as the metric does). An answer
    that is not at its answer_start is a mistake in the data: `load` prints how many there are, and refuses many.
    `threshold` is what null odds must exceed for "no answer" in v2.0.
    """

    head = "qa"

    def __init__(self, tokenizer: Tokenizer, seq_len: int, options: Mapping[str, Any]):
        self.tokenizer, self.seq_len = tokenizer, seq_len
        self.options = _DEFAULTS | dict(options)
        if self.options["version"] not in ("v1.1", "v2.0"):
            raise UserError(f"task.version={self.options['version']} is unknown: give v1.1 or v2.0.")
        for field in ("doc_stride", "max_query", "max_answer", "n_best"):
            if self.options[field] < 1:
                raise UserError(f"task.{field}={self.options[field]} is too small: give at least 1.")
        self.name = f"squad-{self.options['version']}"
        self._v2 = self.options["version"] == "v2.0"
        self.joint_head = self.options["joint_head"]
        self.metric = "best_f1" if self._v2 else "f1"
        given = self.options["null_threshold"]
        self.threshold = 0.0 if given is None else float(given)    # null odds are log odds: 0 is even
        self.inexact: dict[str, int] = {}
        self._questions: dict[str, list[_Question]] = {}

    # --- Reading --------------------------------------------------------------------------------

    def load(self, split: str, field: str, path) -> None:
        """Reads a split from SQuAD's JSON; `field` names the file in messages. Raises UserError."""
        where = f"{field}: {path}"
        self.inexact[split] = 0
        questions = self._questions[split] = []
        self._misplaced: list[str] = []    # ids
        try:
            articles = json.loads(read_text(field, path))["data"]
            paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
            for paragraph in paragraphs:
                context = self._context(paragraph["context"])
                questions += [self._question(qa, context, split, where) for qa in paragraph["qas"]]
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({error}): give a file in SQuAD's layout.") from error
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise UserError(f"{where} is not in SQuAD's layout ({type(error).__name__}: {error}): it is {{\"data\": "
                            "[{\"paragraphs\": [{\"context\", \"qas\": [{\"id\", \"question\", \"answers\"}]}]}]}."
                            ) from error
        if not questions:
            raise UserError(f"{where} has no questions: give another file.")
        twice = [name for name, n in collections.Counter(q.id for q in questions).items() if n > 1]
        if twice:
            raise UserError(f"{where} has the question id {twice[0]} more than once: make ids unique.")
        self._tell_misplaced(split, where)

    def _tell_misplaced(self, split: str, where: str) -> None:
        """Warns of answers that are not where their answer_start says; UserError if that is every hundredth."""
        answers = sum(q.span is not None for q in self._questions[split])
        if self._misplaced:
            told = (f"{where}: {len(self._misplaced)} of {answers} answers are not at their answer_start, the first is "
                    f"of question {self._misplaced[0]}")
            if 100 * len(self._misplaced) > answers:
                raise UserError(f"{told}: count characters (not bytes) of the context from 0, or leave these out.")
            print(f"warning: {told}; they are trained on as they are", flush=True)
        if self.inexact[split]:
            print(f"{where}: {self.inexact[split]} of {answers} answers begin or end inside a token", flush=True)

    def _context(self, text: str) -> _Context:
        text = _clean(text)
        ids, spans = self.tokenizer.encode_with_offsets(text)
        return _Context(text, np.array(ids, np.int32), np.array(spans, np.int32).reshape(-1, 2))

    def _query(self, text: str) -> np.ndarray:
        ids = np.array(self.tokenizer.encode(_clean(text))[:self.options["max_query"]], np.int32)
        if len(ids) + 4 > self.seq_len:
            raise UserError(f"data.seq_len={self.seq_len} leaves no room for a context beside a question of {len(ids)} "
                            f"tokens: give at least {len(ids) + 4}, or a smaller task.max_query.")
        return ids

    def _question(self, qa: Mapping, context: _Context, split: str, where: str) -> _Question:
        impossible, answers = qa.get("is_impossible"), qa.get("answers") or []
        if impossible not in (True, False, None):    # the string "false" would be true
            raise UserError(f"{where}: question {qa['id']} has \"is_impossible\": {json.dumps(impossible)[:40]}: write "
                            "true or false, without quotes.")
        impossible = bool(impossible)
        if impossible and not self._v2:
            raise UserError(f"task.version=v1.1 has an answer to every question, but {where} has none to {qa['id']}: "
                            "set task.version=v2.0.")
        if split != "test" and not impossible and not answers:
            raise UserError(f"{where}: question {qa['id']} has no answers: add them, or \"is_impossible\": true.")
        span = None
        if answers and not impossible:
            text, start = answers[0]["text"], int(answers[0]["answer_start"])
            if not 0 <= start < start + len(text) <= len(context.text):
                raise UserError(f"{where}: the answer of question {qa['id']} (answer_start {start}, {len(text)} "
                                f"characters) is not in its context of {len(context.text)}: correct it.")
            if context.text[start:start + len(text)] != _clean(text):
                self._misplaced.append(str(qa["id"]))
            span = _tokens_of(context, start, start + len(text))
            self.inexact[split] += span is None or normalise_answer(_text(context, *span)) != normalise_answer(text)
        return _Question(str(qa["id"]), self._query(qa["question"]), context,
                         () if impossible else tuple(_clean(a["text"]) for a in answers), span, impossible,
                         impossible or bool(answers))

    # --- Features -------------------------------------------------------------------------------

    def splits(self) -> tuple[str, ...]:
        return tuple(self._questions)

    def features(self, split: str) -> list[Feature]:
        return [feature for question in self._questions[split] for feature in self._features(question)]

    def _windows(self, question: _Question) -> list[_Window]:
        """BERT's scheme: full windows, `doc_stride` apart; an empty context has one empty window."""
        total, offset = len(question.context.ids), len(question.ids) + 2
        room = self.seq_len - offset - 1
        starts = [0]
        while starts[-1] + room < total:
            starts.append(starts[-1] + min(room, self.options["doc_stride"]))
        starts = np.array(starts)[:, None]
        ends, position = np.minimum(starts + room, total), np.arange(total)
        # The smaller side counts; equal ones are told apart by length, then by order.
        context = np.minimum(position - starts, ends - 1 - position) + 0.01 * (ends - starts)
        context[(position < starts) | (position >= ends)] = -np.inf
        owned = context.argmax(0) == np.arange(len(starts))[:, None] if total else np.zeros((1, 0), bool)
        return [_Window(a, offset, owned[i, a:b]) for i, (a, b) in
                enumerate(zip(starts[:, 0].tolist(), ends[:, 0].tolist(), strict=True))]

    def _features(self, question: _Question) -> list[Feature]:
        features = []
        for window in self._windows(question):
            ids = np.concatenate([[self.tokenizer.cls_id], question.ids, [self.tokenizer.sep_id],
                                  question.context.ids[window.start:window.start + len(window)],
                                  [self.tokenizer.sep_id]]).astype(np.int32)
            types = (np.arange(len(ids)) >= window.offset).astype(np.int32)
            allowed = types == 1        # the last [SEP] too, as in the original: never predicted, see `_spans`
            allowed[0] = True           # where answers that are not in this window point
            targets = {}
            if question.known:
                first, last = question.span or (-1, -1)
                inside = window.start <= first and last < window.start + len(window)
                shift = window.offset - window.start
                targets = {"start": first + shift if inside else 0, "end": last + shift if inside else 0,
                           "impossible": int(question.impossible)}
            features.append(Feature(ids, types, targets, allowed))
        return features

    # --- Predictions ----------------------------------------------------------------------------

    def _spans(self, question: _Question, window: _Window, out: Outputs) -> tuple[np.ndarray, ...]:
        """Returns scores and first and last tokens (in the context) of at least the window's `n_best` best spans."""
        n, longest = len(window), min(self.options["max_answer"], len(window))
        spans = question.context.spans[window.start:window.start + n]
        real = spans[:, 1] > spans[:, 0]
        if "start_positions" in out:
            first = np.asarray(out["start_positions"])[:, None] - window.offset
            last = np.asarray(out["end_positions"]) - window.offset
            first = np.broadcast_to(first, last.shape)
            scores = np.asarray(out["start_log_probs"], float)[:, None] + np.asarray(out["end_log_probs"], float)
            good = (first >= 0) & (first <= last) & (last < n) & (last - first < longest)
            first, last, scores = first[good], last[good], scores[good]
        elif n:
            start, end = (np.asarray(out[name][window.offset:window.offset + n], float) for name in ("start", "end"))
            padded = np.concatenate([end, np.full(longest - 1, -np.inf)])
            scores = (start[:, None] + sliding_window_view(padded, longest)).ravel()    # [n * longest]
            first, more = np.divmod(np.arange(n * longest), longest)
            last = first + more
            inside = last < n
            first, last, scores = first[inside], last[inside], scores[inside]
        else:
            first = last = scores = np.zeros(0, int)
        good = window.owned[first] & real[first] & real[last] & np.isfinite(scores)
        first, last, scores = first[good], last[good], scores[good]
        if len(scores) > self.options["n_best"]:
            best = np.argpartition(-scores, self.options["n_best"] - 1)[:self.options["n_best"]]
            first, last, scores = first[best], last[best], scores[best]
        return scores, first + window.start, last + window.start

    def _predict(self, question: _Question, outputs: Sequence[Outputs]) -> _Prediction:
        windows = self._windows(question)
        found = [self._spans(question, w, out) for w, out in zip(windows, outputs, strict=True)]
        scores, first, last = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.lexsort((last, first, -scores))[:self.options["n_best"]]
        scores = scores[order]
        weights = np.exp(scores - scores[:1])
        n_best = []
        for i, score, weight in zip(order, scores, weights, strict=True):
            start, end = int(question.context.spans[first[i], 0]), int(question.context.spans[last[i], 1])
            n_best.append({"text": question.context.text[start:end], "probability": float(weight / weights.sum()),
                           "score": float(score), "start": start, "end": end})
        if "start_positions" in outputs[0]:    # the original's: the classifier's logit alone, of the surest window
            return _Prediction(n_best, float(min(out["impossible"] for out in outputs)))
        null = min(float(out["start"][0]) + float(out["end"][0]) for out in outputs)
        return _Prediction(n_best, null - (n_best[0]["score"] if n_best else -1e4))

    def _predict_all(self, split: str, outputs: Sequence[Outputs]) -> list[_Prediction]:
        predictions, used = [], 0
        for question in self._questions[split]:
            count = len(self._windows(question))
            predictions.append(self._predict(question, outputs[used:used + count]))
            used += count
        if used != len(outputs):
            raise ValueError(f"{len(outputs)} outputs for {used} features of {split}")
        return predictions

    # --- Scores and files -----------------------------------------------------------------------

    def score(self, split: str, outputs: Sequence[Outputs]) -> dict[str, float]:
        """Returns "em" and "f1", in percent; raises UserError for a split without answers.

        v2.0 also: "threshold" (chosen on dev, then kept, unless `null_threshold` is given) at which em and f1 and their
        HasAns_ and NoAns_ parts are taken; "best_em" and "best_f1", the maxima over all thresholds.
        """
        return self._score(split, self._predict_all(split, outputs))

    def _score(self, split: str, predictions: list[_Prediction]) -> dict[str, float]:
        known = [(q, p) for q, p in zip(self._questions[split], predictions, strict=True) if q.known]
        if not known:
            raise UserError(f"task.{split} has no answers to compare with: write its predictions instead.")
        answered = 100 * np.array([against_gold(p.text, q.answers, self._v2) for q, p in known])    # [N, (em, f1)]
        if not self._v2:
            em, f1 = answered.mean(0).tolist()
            return {"em": em, "f1": f1}
        empty = 100 * np.array([against_gold("", q.answers, self._v2) for q, _ in known])
        odds, impossible = np.array([p.null_odds for _, p in known]), np.array([q.impossible for q, _ in known])
        best_em, _ = best_threshold(answered[:, 0], empty[:, 0], odds)
        best_f1, threshold = best_threshold(answered[:, 1], empty[:, 1], odds)
        if split == "dev" and self.options["null_threshold"] is None:
            self.threshold = threshold
        values = np.where((odds > self.threshold)[:, None], empty, answered)
        scores = {}
        for prefix, rows in (("", values), ("HasAns_", values[~impossible]), ("NoAns_", values[impossible])):
            if len(rows):
                scores[prefix + "em"], scores[prefix + "f1"] = rows.mean(0).tolist()
        return scores | {"best_em": best_em, "best_f1": best_f1, "threshold": self.threshold}

    def write_predictions(self, split: str, outputs: Sequence[Outputs], folder: Path) -> None:
        """Writes predictions-SPLIT.json {id: text, "" for no answer}, nbest-SPLIT.json, in v2.0 null_odds-SPLIT.json.

        On dev the threshold is chosen from these outputs, as in `score`.
        """
        predictions = self._predict_all(split, outputs)
        if self._v2 and split == "dev":
            self._score(split, predictions)
        ids = [question.id for question in self._questions[split]]
        files = {"predictions": [self._final(p) for p in predictions], "nbest": [p.n_best for p in predictions]}
        if self._v2:
            files["null_odds"] = [p.null_odds for p in predictions]
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, values in files.items():
            text = json.dumps(dict(zip(ids, values, strict=True)), ensure_ascii=False, indent=1)
            (folder / f"{name}-{split}.json").write_text(text + "\n", encoding="utf-8")

    def _final(self, prediction: _Prediction) -> str:
        return "" if self._v2 and prediction.null_odds > self.threshold else prediction.text

    # --- New text -------------------------------------------------------------------------------

    def spec(self) -> dict[str, Any]:
        threshold = self.threshold if self._v2 else None
        return {"kind": "squad", "seq_len": self.seq_len, **self.options, "null_threshold": threshold}

    def columns(self) -> tuple[str, ...]:
        """Returns the names of the texts in a record."""
        return "question", "context"

    def encode(self, record: Mapping[str, Any]) -> list[Feature]:
        return self._features(self._asked(record))

    def answer(self, record: Mapping[str, Any], outputs: Sequence[Outputs]) -> dict[str, Any]:
        """Returns {"answer", "probability", "start", "end", "n_best"}, in v2.0 also "impossible", a probability.

        Probabilities are shares among the n best. No answer is "", with "start" and "end" None.
        """
        prediction = self._predict(self._asked(record), outputs)
        told = {"answer": "", "probability": 0.0, "start": None, "end": None, "n_best": prediction.n_best}
        if self._v2:
            told["impossible"] = float(1 / (1 + np.exp(-np.clip(prediction.null_odds, -500, 500))))
            told["probability"] = told["impossible"]
        if self._final(prediction):
            best = prediction.n_best[0]
            told |= {"answer": best["text"]} | {name: best[name] for name in ("probability", "start", "end")}
        return told

    def _asked(self, record: Mapping[str, Any]) -> _Question:
        for field in self.columns():
            if not isinstance(record.get(field), str):
                problem = "is not a string" if field in record else "is missing"
                raise UserError(f"input: field {field!r} {problem}: this task reads question, context (the record has "
                                f"{', '.join(map(str, record)) or 'nothing'}).")
        return _Question("", self._query(record["question"]), self._context(record["context"]), (), None, False, False)


def from_config(config: Mapping[str, Any], tokenizer: Tokenizer, seq_len: int) -> SquadTask:
    """Returns the task with its data from the fields of `config.task`.

    `data_dir` (with train-v1.1.json and dev-v1.1.json, or v2.0; test-... if there) or the paths `train`, `dev`, `test`;
    and the fields of `_DEFAULTS`. Raises UserError for files that are missing or not SQuAD's, and a `seq_len` that
    leaves no room for a context.
    """
    task = SquadTask(tokenizer, seq_len, {name: config.get(name, default) for name, default in _DEFAULTS.items()})
    for split, (field, path) in files(config).items():
        task.load(split, field, path)
    return task


def files(config: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Returns field and path of each split's file; raises UserError where none is given."""
    found, folder = {}, config.get("data_dir")
    for split in ("train", "dev", "test"):
        field, path = f"task.{split}", config.get(split)
        if not path and folder:
            version = config.get("version", _DEFAULTS["version"])
            field, path = "task.data_dir", Path(folder).expanduser() / f"{split}-{version}.json"
            if split == "test" and not path.exists():
                continue
        if path:
            found[split] = field, path
        elif split != "test":
            raise UserError(f"task.{split} is empty and so is task.data_dir: give one of them.")
    return found


def restore(spec: Mapping[str, Any], tokenizer: Tokenizer) -> SquadTask:
    """Returns a task without data from `SquadTask.spec()`."""
    return SquadTask(tokenizer, spec["seq_len"], {name: spec[name] for name in _DEFAULTS})


def _tokens_of(context: _Context, start: int, end: int) -> tuple[int, int] | None:
    """Returns the first and last token that touch characters start..end; the nearest token where none does."""
    if not len(context.ids):
        return None
    a, b = context.spans.T
    found = np.flatnonzero((a < b) & (a < end) & (b > start))
    if len(found):
        return int(found[0]), int(found[-1])
    nearest = int(np.argmin(np.abs(a - start)))
    return nearest, nearest


def _text(context: _Context, first: int, last: int) -> str:
    return context.text[context.spans[first, 0]:context.spans[last, 1]]


def _clean(text: str) -> str:
    """A lone surrogate is legal JSON and no legal text; one "?" for each, so that positions stay."""
    return text.encode(errors="replace").decode()
