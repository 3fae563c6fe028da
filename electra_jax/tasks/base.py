"""What a task is to the fine-tuning loop: features in, outputs of the network back, scores and predictions out."""

import codecs
import contextlib
import dataclasses
import gzip
import os
import stat
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from electra_jax.config import UserError
from electra_jax.data.tokenizer import Tokenizer

Outputs = Mapping[str, np.ndarray]   # of one feature; what it holds depends on the head, see `Task.head`


@dataclasses.dataclass(frozen=True)
class Feature:
    """One sequence as the network reads it, without padding, and what it should answer.

    `targets` by head: classification {"label": int}, regression {"label": float}, tagging {"label": int32 [L], -1
    where nothing is scored}, qa {"start", "end", "impossible": int}; empty where the answer is not known. `allowed`
    (qa): bool [L], positions an answer may start or end at.
    """

    input_ids: np.ndarray          # int32 [L], [CLS] and [SEP] included
    token_type_ids: np.ndarray     # int32 [L]
    targets: dict[str, Any]
    allowed: np.ndarray | None = None


class Task(ABC):
    """One task with its data.

    `head` says which outputs a feature gets: "classification" {"logits": [C]}, "regression" {"score": []},
    "tagging" {"logits": [L, C]}, "qa" {"start": [L], "end": [L]} (log probabilities) or, with the joint head,
    {"start_positions": [K], "start_log_probs": [K], "end_positions": [K, K], "end_log_probs": [K, K],
    "impossible": []} (a logit).
    """

    name: str
    head: str
    labels: tuple[str, ...] = ()     # classes or tags, C of them
    metric: str                      # key of `score` that chooses the best checkpoint; higher is better
    tokenizer: Tokenizer
    seq_len: int                     # longest feature

    @abstractmethod
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that are there: "train", then those to evaluate, "test" last if there is one."""

    @abstractmethod
    def features(self, split: str) -> list[Feature]:
        """Returns the features of a split, in order."""

    @abstractmethod
    def score(self, split: str, outputs: Sequence[Outputs]) -> dict[str, float]:
        """Returns the official metrics, in percent, from one output a feature."""

    @abstractmethod
    def write_predictions(self, split: str, outputs: Sequence[Outputs], folder: Path) -> None:
        """Writes the official predictions file of a split into `folder`."""

    # --- New text, with a tuned network ---------------------------------------------------------

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Returns JSON from which `tasks.restore(spec, tokenizer)` makes a task without data, to predict with."""

    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Names of the fields that a new record has to have; a lone one may come as a plain line of text."""

    @abstractmethod
    def encode(self, record: Mapping[str, Any]) -> list[Feature]:
        """Returns the features of a new record (the columns that the task was trained on), without targets."""

    @abstractmethod
    def answer(self, record: Mapping[str, Any], outputs: Sequence[Outputs]) -> dict[str, Any]:
        """Returns what to tell the user about a record, JSON: label, score, tags or span, and probabilities."""


def read_text(field: str, path: str | os.PathLike) -> str:
    """Returns the text of a UTF-8 file, also of one with .gz behind, without a byte order mark.

    Raises UserError that names the config's `field`, the file and, for other text than UTF-8, the line.
    """
    with _reading(field, path):
        data = Path(path).expanduser().read_bytes()
        data = gzip.decompress(data) if str(path).lower().endswith(".gz") else data
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{field}: {path}:{line} is not UTF-8 text: convert it, e.g. iconv -f {likely_encoding(data)} "
                        "-t UTF-8.") from error


def likely_encoding(data: bytes) -> str:
    """Returns the name of what a text that is not UTF-8 most likely is, by its byte order mark."""
    return "UTF-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "LATIN1"


def checksum(field: str, path: str | os.PathLike) -> int | None:
    """Returns a CRC of a file's bytes; None for a pipe, whose bytes come only once. Raises UserError as `read_text`."""
    crc = 0
    with _reading(field, path):
        path = Path(path).expanduser()
        if stat.S_ISFIFO(path.stat().st_mode):
            return None
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                crc = zlib.crc32(block, crc)
    return crc


@contextlib.contextmanager
def _reading(field: str, path: str | os.PathLike):
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{field}: {path} cannot be read ({reason}): check the path and the file.") from error


def join(tokenizer: Tokenizer, a: Sequence[int], b: Sequence[int] | None, seq_len: int,
         targets: dict[str, Any]) -> Feature:
    """Returns the sequence of one text or two, as `Tokenizer.join` makes it."""
    ids, types = tokenizer.join(a, b, seq_len)
    return Feature(np.array(ids, np.int32), np.array(types, np.int32), targets)
