"""The token store: documents as tokens on disk, to be read at any sequence length.

A folder with `manifest.json`, the tokenizer's files, `counts.bin` (how often each token occurs in train) and,
for each split, shards `train-00000.tokens` + `train-00000.index`. See docs/data.md for the layout.

Tokens lie in plain little-endian files that are mapped into memory, with a CRC-32 for every block of 4096
tokens, checked when a process first touches the block: reading 128 random rows takes 0.05 ms, where
ArrayRecord takes 1.6 ms (12 us a record at best, one core), see docs/decisions.md.
"""

import functools
import hashlib
import json
import mmap
import os
import zlib
from pathlib import Path

import numpy as np

from electra_jax.config import UserError

FORMAT = 1
BLOCK_TOKENS = 4096      # of one CRC: 8 kB of uint16, so that a random read touches two or three pages
_OPEN_SHARDS = 256       # mapped at once; each holds a file descriptor, and many systems allow 1024


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest unsigned little-endian dtype that holds every id below `vocab_size`."""
    return np.dtype("u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= 1 << 16 else "<u4")


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `data` so that `path` is either absent (or as before) or complete, also after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_shard(folder: Path, name: str, tokens: np.ndarray, lengths: np.ndarray) -> dict:
    """Writes one shard and returns its entry for the manifest.

    `tokens` [sum of lengths] are whole documents one after the other, `lengths` [documents] their sizes.
    """
    data = memoryview(np.ascontiguousarray(tokens)).cast("B")
    step = BLOCK_TOKENS * tokens.dtype.itemsize
    checks = [zlib.crc32(data[i:i + step]) for i in range(0, len(data), step)]
    index = lengths.astype("<u4").tobytes() + np.array(checks, "<u4").tobytes()
    write_atomically(folder / f"{name}.tokens", data)
    write_atomically(folder / f"{name}.index", index)
    return {"name": name, "tokens": len(tokens), "documents": len(lengths),
            "index_crc32": zlib.crc32(index), "sha256": hashlib.sha256(data).hexdigest()}


def write_manifest(folder: Path, content: dict, options: dict) -> None:
    """Writes `manifest.json`, which makes the store complete.

    `content` determines every batch and is what `manifest_hash` covers; `options` only tell where it came from.
    """
    manifest = {"format": FORMAT, "hash": _hash(content), "options": options, "content": content}
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1).encode())


def _hash(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class TokenStore:
    """A complete token store, opened for reading.

    Attributes: `manifest` (dict), `manifest_hash` (hex), `path`, `vocab_size`, `token_counts` [vocab_size] of train.
    Raises UserError that names the file when something is missing, damaged or of another format.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        file = self.path / "manifest.json"
        try:
            self.manifest = json.loads(file.read_bytes())
            content, stored = self.manifest["content"], self.manifest["hash"]
            if self.manifest["format"] != FORMAT:
                raise UserError(f"{file} has format {self.manifest['format']}, this version reads {FORMAT}: "
                                "prepare the data again in another data.path.")
            damaged = _hash(content) != stored
        except FileNotFoundError as error:
            raise UserError(f"data.path={self.path} holds no finished token store (no manifest.json): "
                            "run python -m electra_jax.data.prepare.") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} cannot be read ({error}): {_REMEDY}") from error
        if damaged:
            raise UserError(f"{file} is damaged (its hash does not match its content): {_REMEDY}")
        self.manifest_hash = stored
        self.vocab_size = content["vocab_size"]
        self._splits = {name: Split(self.path, shards, np.dtype(content["dtype"]))
                        for name, shards in content["splits"].items()}
        counts = _read_checked(self.path / "counts.bin", content["counts_crc32"])
        self.token_counts = np.frombuffer(counts, "<u8").astype(np.int64)

    def split(self, name: str) -> "Split":
        """Returns the documents of "train" or "eval"."""
        return self._splits[name]

    def tokenizer_files(self) -> dict[str, bytes]:
        """Returns the tokenizer's files by name, as `tokenizer_from_files` takes them."""
        files = self.manifest["content"]["tokenizer_crc32"]
        return {name: _read_checked(self.path / "tokenizer" / name, crc) for name, crc in files.items()}

    @property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer that made the tokens."""
        return self.manifest["content"]["fingerprint"]

    @property
    def unigram_entropy(self) -> float:
        """Entropy of the train tokens' frequencies, in nats: the loss of a model that knows nothing else."""
        share = self.token_counts[self.token_counts > 0] / max(1, self.token_counts.sum())
        return float(-(share * np.log(share)).sum())

    @property
    def unk_rate(self) -> float:
        """Share of [UNK] among the train tokens."""
        return float(self.token_counts[self.manifest["content"]["unk_id"]] / max(1, self.token_counts.sum()))


class Split:
    """The token stream of one split: its documents one after the other.

    Attributes: `num_tokens`, `num_documents`, `document_lengths` [num_documents] in tokens (int64).
    """

    def __init__(self, folder: Path, shards: list[dict], dtype: np.dtype):
        self._folder, self._dtype = folder, dtype
        self._names = [shard["name"] for shard in shards]
        sizes = np.array([shard["tokens"] for shard in shards], np.int64)
        self._shard_starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        lengths, checks = [np.zeros(0, "<u4")], [np.zeros(0, "<u4")]
        for shard in shards:
            tokens_file = folder / f"{shard['name']}.tokens"
            expected = shard["tokens"] * dtype.itemsize
            actual = tokens_file.stat().st_size if tokens_file.exists() else None
            if actual != expected:
                found = "is missing" if actual is None else f"has {actual} bytes instead of {expected}"
                raise UserError(f"{tokens_file} {found}: {_REMEDY}")
            index = _read_checked(folder / f"{shard['name']}.index", shard["index_crc32"])
            index = np.frombuffer(index, "<u4")
            lengths.append(index[:shard["documents"]])
            checks.append(index[shard["documents"]:])
        self.document_lengths = np.concatenate(lengths).astype(np.int64)
        self.num_tokens, self.num_documents = int(sizes.sum()), len(self.document_lengths)
        self._checks = np.concatenate(checks)
        self._block_starts = np.concatenate([[0], np.cumsum([len(c) for c in checks[1:]])]).astype(np.int64)
        self._verified = np.zeros(len(self._checks), bool)
        self._map = functools.lru_cache(_OPEN_SHARDS)(self._open)

    def read(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Returns the tokens of many ranges one after the other, [sum of lengths], in the store's dtype.

        starts, lengths: [n] integers, positions in the split's stream. A range must lie in one shard, which
        holds for any range within a document. Raises UserError that names shard and block when they are damaged.
        """
        starts = np.asarray(starts, np.int64)
        shards = np.searchsorted(self._shard_starts, starts, side="right") - 1
        first = starts - self._shard_starts[shards]
        last = first + np.asarray(lengths, np.int64)
        if len(starts) and (starts.min() < 0 or (last + self._shard_starts[shards]
                                                 > self._shard_starts[np.minimum(shards + 1, len(self._names))]).any()):
            raise ValueError("a range leaves its shard")
        self._verify(shards, first // BLOCK_TOKENS, np.maximum(last - 1, first) // BLOCK_TOKENS)
        size, view = self._dtype.itemsize, self._map
        # Slices of memory maps joined once: 0.2 us a range, a tenth of what fancy indexing costs.
        return np.frombuffer(b"".join([view(s)[a:b] for s, a, b in zip(
            shards.tolist(), (first * size).tolist(), (last * size).tolist(), strict=True)]), self._dtype)

    def _verify(self, shards: np.ndarray, first: np.ndarray, last: np.ndarray) -> None:
        """Checks the CRC of every block from `first` to `last` that this process has not seen yet."""
        base = self._block_starts[shards]
        seen = self._verified[base + first] & self._verified[base + last] & (last - first <= 1)
        for i in np.flatnonzero(~seen).tolist():
            for block in range(int(first[i]), int(last[i]) + 1):
                self._verify_block(int(shards[i]), block)

    def _verify_block(self, shard: int, block: int) -> None:
        k = int(self._block_starts[shard]) + block
        if self._verified[k]:
            return
        step = BLOCK_TOKENS * self._dtype.itemsize
        if zlib.crc32(self._map(shard)[block * step:(block + 1) * step]) != self._checks[k]:
            file = self._folder / f"{self._names[shard]}.tokens"
            raise UserError(f"{file} is damaged in block {block} (tokens {block * BLOCK_TOKENS} to "
                            f"{(block + 1) * BLOCK_TOKENS - 1}): {_REMEDY}")
        self._verified[k] = True

    def _open(self, shard: int) -> memoryview:
        file = self._folder / f"{self._names[shard]}.tokens"
        try:
            with open(file, "rb") as handle:
                return memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read ({error}): {_REMEDY}") from error


def _read_checked(file: Path, crc: int) -> bytes:
    """Returns the file's bytes; raises UserError when it is missing or its CRC-32 differs."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): {_REMEDY}") from error
    if zlib.crc32(data) != crc:
        raise UserError(f"{file} is damaged (CRC mismatch): {_REMEDY}")
    return data


_REMEDY = "restore it from a copy, or delete the folder and run prepare again."
