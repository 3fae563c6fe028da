"""Documents (str) from text, JSON lines, Parquet, TensorFlow Datasets or the installation's own documentation.

`counters`, where a function takes it, is a dict that is updated while reading: `bytes_read` and `bytes_total` of
the files as stored (both absent when unknown), `invalid_utf8_lines`.
"""

import bz2
import glob
import gzip
import io
import itertools
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from electra_jax.config import UserError
from electra_jax.data import pydocs
from electra_jax.data.packing import make_key

_LONGEST = 1 << 22    # characters; a longer document goes on as a new one, so that memory stays bounded
_READ_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error)


@dataclass(frozen=True)
class Part:
    """One of the sources joined by ";"."""
    text: str        # as written, for messages
    scheme: str
    where: str       # glob, or name of the dataset
    field: str       # column, field or feature
    weight: float


def parse(source: str) -> list[Part]:
    """Returns the parts of a `data.source` string; raises UserError when one cannot be understood."""
    parts = []
    for text in filter(None, (piece.strip() for piece in source.split(";"))):
        body, weight = text, 1.0
        if match := re.fullmatch(r"(.*)@([0-9.eE+-]+)", text):
            body, weight = match.group(1), _number(match.group(2), text)
        scheme, _, where = body.partition(":")
        where, _, field = where.rpartition("#") if scheme in ("jsonl", "parquet", "tfds") else (where, "", "")
        known = scheme in ("pydocs", "text", "jsonl", "parquet", "tfds")
        if not known or (scheme != "pydocs" and not (where or field)):
            raise _error(text, "unknown source", "give pydocs, text:GLOB, jsonl:GLOB#field, parquet:GLOB#column or "
                         "tfds:NAME:SPLIT#feature")
        if scheme in ("jsonl", "parquet", "tfds") and not (where and field):
            kind = {"jsonl": "field", "parquet": "column", "tfds": "feature"}[scheme]
            raise _error(text, f"the {kind} that holds the text is missing", f"append #{kind.upper()}")
        if scheme == "tfds" and ":" not in where:
            raise _error(text, "the split is missing", "write tfds:NAME:SPLIT#feature, e.g. tfds:lm1b:train#text")
        parts.append(Part(text, scheme, where, field, weight))
    if not parts:
        raise _error(source, "it is empty", "give e.g. pydocs or text:corpus/*.txt")
    return parts


def documents(source: str, text_documents: str = "blank", counters: dict | None = None, skip: int = 0) -> Iterator[str]:
    """Yields the documents of a `data.source` string, always in the same order, from number `skip` on.

    `text_documents` says what ends a document in text files: "blank" line, "line" or "file". A part with weight
    2.5 gives each document two or three times. Raises UserError for what cannot be found or read.
    """
    counters = {} if counters is None else counters
    parts = parse(source)
    files = {part: _files(part) for part in parts if part.scheme in _READERS}
    if files and len(files) == len(parts):
        counters["bytes_total"] = sum(Path(file).stat().st_size for group in files.values() for file in group)
    return itertools.islice(_all(parts, files, text_documents, counters), skip, None)


def sample(source: str, text_documents: str, max_chars: int) -> Iterator[str]:
    """Yields about `max_chars` characters of documents from all over the source, reading little else.

    Every part and every file (of very many: 200 evenly spread) gives its share from its beginning.
    """
    parts = parse(source)
    for part in parts:
        files = _files(part) if part.scheme in _READERS else [None]
        files = files[::max(1, len(files) // 200)]
        share = max_chars / len(parts) / len(files)
        for file in files:
            if file is not None:
                stream = _READERS[part.scheme](part, file, text_documents, {})
            else:
                stream = _all([part], {}, text_documents, {})
                if part.scheme == "pydocs":    # all of it is in memory, so take every n-th instead of the beginning
                    texts = pydocs.documents()
                    stream = iter(texts[::max(1, sum(map(len, texts)) // max(1, int(share)))])
            taken = 0
            for text in stream:
                yield text
                taken += len(text)
                if taken >= share:
                    break


def describe(source: str) -> list:
    """Returns what a resumed `prepare` compares: name and size of every file behind the source."""
    found = []
    for part in parse(source):
        if part.scheme in _READERS:
            found.append([part.text, [[Path(file).name, Path(file).stat().st_size] for file in _files(part)]])
        elif part.scheme == "pydocs":
            found.append([part.text, len(pydocs.documents()), sum(map(len, pydocs.documents()))])
        else:
            found.append([part.text])
    return found


def _all(parts, files, text_documents, counters) -> Iterator[str]:
    for part in parts:
        if part.scheme == "pydocs":
            stream = pydocs.documents()
        elif part.scheme == "tfds":
            stream = _tfds(part)
        else:
            stream = itertools.chain.from_iterable(
                _READERS[part.scheme](part, file, text_documents, counters) for file in files[part])
        for number, text in enumerate(stream):
            copies = int(part.weight)
            # The fraction is decided by the document's number, so that every run repeats the same ones.
            copies += make_key("copies", number) < (part.weight - copies) * 2**64
            for piece in _bounded(text):
                for _ in range(copies):
                    yield piece


def _bounded(text: str) -> Iterator[str]:
    """Cuts what is longer than _LONGEST, at white space where there is some; drops what is blank."""
    while len(text) > _LONGEST:
        cut = max(text.rfind("\n", _LONGEST // 2, _LONGEST), text.rfind(" ", _LONGEST // 2, _LONGEST)) + 1 or _LONGEST
        yield text[:cut]
        text = text[cut:]
    if text and not text.isspace():
        yield text


def _files(part: Part) -> list[str]:
    found = sorted(f for f in glob.glob(os.path.expanduser(part.where), recursive=True) if Path(f).is_file())
    if not found:
        raise _error(part.text, "no file matches", f"check the path (looked in {Path.cwd()})")
    return found


class _Counted(io.RawIOBase):
    """A file that adds what is read from it to counters["bytes_read"]."""

    def __init__(self, path, counters):
        self._file, self._counters = open(path, "rb", buffering=0), counters  # noqa: SIM115

    def readable(self):
        return True

    def readinto(self, buffer):
        count = self._file.readinto(buffer)
        self._counters["bytes_read"] = self._counters.get("bytes_read", 0) + count
        return count

    def close(self):
        self._file.close()
        super().close()


class _Zstandard(io.RawIOBase):
    """Decompressed bytes of a .zst file of one or more frames; unlike the library's reader it notices a cut-off end."""

    def __init__(self, file):
        import zstandard
        self._new_frame = lambda: zstandard.ZstdDecompressor().decompressobj()
        self._file, self._frame, self._input, self._output = file, None, b"", b""

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self._output:
            self._input = self._input or self._file.read(1 << 17)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("compressed file ended before the end of its last frame")
                return 0
            self._frame = self._frame or self._new_frame()
            self._output = self._frame.decompress(self._input)
            self._input = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count

    def close(self):
        self._file.close()
        super().close()


def _open(file: str, counters: dict):
    """Opens a plain or compressed file for reading bytes."""
    raw = io.BufferedReader(_Counted(file, counters), 1 << 18)
    if file.endswith(".gz"):
        return gzip.open(raw)
    if file.endswith(".xz"):
        return lzma.open(raw)
    if file.endswith(".bz2"):
        return bz2.open(raw)
    if file.endswith(".zst"):
        return io.BufferedReader(_Zstandard(raw), 1 << 20)
    return raw


def _lines(part: Part, file: str, counters: dict) -> Iterator[bytes]:
    """Yields the lines of a file, stripped; UserError when it cannot be read or ends early."""
    number = 0
    try:
        with _open(file, counters) as stream:
            for line in stream:
                number += 1
                if number == 1:
                    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                        raise _error(part.text, f"{file} is UTF-16", "convert it: iconv -f UTF-16 -t UTF-8")
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if b"\0" in line:
                    line = line.replace(b"\0", b"")
                yield line.strip()
    except _READ_ERRORS as error:
        raise _unreadable(part, file, number, error) from error
    except Exception as error:
        if type(error).__module__.startswith("zstandard"):
            raise _unreadable(part, file, number, error) from error
        raise


def _text(part: Part, file: str, text_documents: str, counters: dict) -> Iterator[str]:
    """Yields the documents of one text file; its lines keep their breaks, without surrounding white space."""
    held, size = [], 0
    for line in _lines(part, file, counters):
        if line:
            held.append(line)
            size += len(line)
        if held and ((not line and text_documents == "blank") or text_documents == "line" or size > _LONGEST):
            yield _decode(held, counters)
            held, size = [], 0
    if held:
        yield _decode(held, counters)


def _decode(lines: list[bytes], counters: dict) -> str:
    try:
        text = b"\n".join(lines).decode()
    except UnicodeDecodeError:
        decoded = [line.decode(errors="replace") for line in lines]
        bad = sum(_invalid(line) for line in lines)
        counters["invalid_utf8_lines"] = counters.get("invalid_utf8_lines", 0) + bad
        text = "\n".join(decoded)
    return text.replace("\r", "\n") if "\r" in text else text


def _invalid(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return True
    return False


def _jsonl(part: Part, file: str, text_documents: str, counters: dict) -> Iterator[str]:
    for number, line in enumerate(_lines(part, file, counters), 1):
        if not line:
            continue
        try:
            record = json.loads(_decode([line], counters))
        except (ValueError, RecursionError) as error:
            raise _error(part.text, f"{file}:{number} is not JSON ({error})", "repair or remove the line") from error
        value = record.get(part.field) if isinstance(record, dict) else None
        if value is None and isinstance(record, dict) and part.field in record:
            continue    # null: no text
        if not isinstance(value, str):
            known = ", ".join(map(str, list(record)[:8])) if isinstance(record, dict) else "no fields"
            problem = f"has no field {part.field!r}" if value is None else f"has no string in field {part.field!r}"
            raise _error(part.text, f"{file}:{number} {problem}", f"name one of its fields ({known})")
        # \ud800 alone is legal JSON and no legal text.
        yield value.encode(errors="replace").decode().replace("\0", "")


def _parquet(part: Part, file: str, text_documents: str, counters: dict) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            column = part.field
            if column not in table.schema_arrow.names:
                raise _error(part.text, f"{file} has no column {column!r}",
                             f"name one of its columns ({', '.join(table.schema_arrow.names[:8])})")
            kind = table.schema_arrow.field(column).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise _error(part.text, f"{file}: column {column!r} holds {kind}, not text", "name a column of strings")
            for batch in table.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(0).to_pylist():
                    if value:
                        yield value.replace("\0", "")
    except (pyarrow.ArrowException, OSError) as error:
        raise _error(part.text, f"{file} cannot be read ({str(error).splitlines()[0]})",
                     "check that it is a complete Parquet file") from error
    counters["bytes_read"] = counters.get("bytes_read", 0) + Path(file).stat().st_size


def _tfds(part: Part) -> Iterator[str]:
    import tensorflow_datasets as tfds
    name, _, split = part.where.rpartition(":")
    try:
        records = tfds.data_source(name, split=split)
    except Exception as error:    # tfds raises a dozen types, from unknown names to missing files
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _error(part.text, f"tfds cannot open it ({first})",
                     "check the name and split, and prepare it with file_format=\"array_record\"") from error
    for start in range(0, len(records), 256):    # ArrayRecord is several times faster in batches
        indices = list(range(start, min(start + 256, len(records))))
        for record in records.__getitems__(indices):
            if part.field not in record:
                raise _error(part.text, f"has no feature {part.field!r}", f"name one of {', '.join(record)}")
            value = record[part.field]
            if not isinstance(value, (bytes, str)):
                raise _error(part.text, f"feature {part.field!r} is not text", f"name another of {', '.join(record)}")
            yield value.decode(errors="replace").replace("\0", "") if isinstance(value, bytes) else value


_READERS = {"text": _text, "jsonl": _jsonl, "parquet": _parquet}


def _number(text: str, part: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1000:
        raise _error(part, f"weight {text!r} is not a number above 0 and up to 1000", "write e.g. @2 or @0.5")
    return value


def _error(text: str, problem: str, remedy: str) -> UserError:
    return UserError(f"data.source={text}: {problem}; {remedy}.")


def _unreadable(part: Part, file: str, line: int, error: Exception) -> UserError:
    detail = str(error) or type(error).__name__
    return _error(part.text, f"{file} cannot be read after line {line} ({detail})",
                  "replace the file, it may be cut off")
