"""Text to token store: `python -m electra_jax.data.prepare --config=configs/x.py [--workdir=DIR]`.

The main process reads and decompresses, worker processes tokenise, the main process writes. The unit of resume
is a shard: documents are collected until a shard is full, its files are written, and last its `part-*.json`,
which says where in the source the next one starts. A rerun keeps every part whose meta file exists.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np

from electra_jax.config import UserError
from electra_jax.data import sources
from electra_jax.data.loader import Loader
from electra_jax.data.progress import Progress
from electra_jax.data.store import TokenStore, token_dtype, write_atomically, write_manifest, write_shard
from electra_jax.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_files, train_sentencepiece
from electra_jax.data.workers import WorkerPool

SHARD_TOKENS = 1 << 25       # 64 MB of uint16, about 140 MB of English: what a kill can cost is a minute's work
_JOB_CHARS = 1 << 19         # text handed to a worker at once
_CHUNK_CHARS = 1 << 16       # longer documents are tokenised piecewise: WordPiece's cost per byte grows with length
_SAMPLE_CHARS = 5_000_000    # text that trains a SentencePiece model: 5 s, more changes little at these sizes


def prepare(config, path, progress: bool = True) -> TokenStore:
    """Makes the token store of `config.data` in folder `path`, or opens it if it is there already.

    Resumes what an earlier call left unfinished; the result is bit for bit that of an uninterrupted call.
    Raises UserError for bad sources, an empty corpus, a folder that cannot be written, and a folder that holds
    a store made with other options.
    """
    path, d = Path(os.path.expanduser(path)), config.data
    options = {"source": d.source, "text_documents": d.text_documents, "tokenizer": d.tokenizer,
               "vocab_size": d.vocab_size if d.tokenizer == "train" else 0, "lowercase": d.lowercase,
               "strip_accents": d.strip_accents, "eval_fraction": d.eval_fraction}
    if (path / "manifest.json").exists():
        store = TokenStore(path)
        _check_same(store.manifest["options"], options, path)
        if progress:
            print(_summary(store), flush=True)
        return store
    started = time.perf_counter()
    if progress:
        what = f"training a vocabulary of {d.vocab_size:,}, then " if d.tokenizer == "train" else ""
        print(f"prepare: {what}tokenising {d.source} into {path}", flush=True)
    inputs = sources.describe(d.source)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with open(path / ".lock", "w") as lock:    # two processes of one run may both find no store
            with contextlib.suppress(OSError):         # some network file systems have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if (path / "manifest.json").exists():
                return prepare(config, path, progress)
            _start_or_resume(path, options, inputs)
            tokenizer = _tokenizer(path, d)
            report = _write_parts(path, d, tokenizer, Progress("prepare", enabled=progress))
            _finish(path, options, tokenizer)
    except OSError as error:
        raise UserError(f"data.path={path} cannot be written ({error.strerror or error}): "
                        "free space there or give another folder.") from error
    store = TokenStore(path)
    if progress:
        for line in statistics(store, tokenizer, config, report, time.perf_counter() - started):
            print(line, flush=True)
    return store


def statistics(store: TokenStore, tokenizer: Tokenizer, config, report: dict, elapsed_s: float) -> list[str]:
    """Returns the lines that `prepare` ends with."""
    d = config.data
    loader = Loader(store, tokenizer, split="train", batch_size=1, seq_len=d.seq_len, segment_pairs=d.segment_pairs,
                    single_segment_prob=d.single_segment_prob, short_prob=d.short_prob, pack=d.pack, seed=0)
    lines = [
        _summary(store),
        f"vocabulary {store.vocab_size:,}; [UNK] {store.unk_rate:.4%} of the train tokens, unigram entropy "
        f"{store.unigram_entropy:.3f} nats",
        f"at data.seq_len={d.seq_len}: {loader.sequences_per_epoch:,} sequences an epoch, padding {loader.padding:.2%}"]
    if report["text_bytes"]:
        lines.append(f"{report['text_bytes'] / 1e6:,.1f} MB of text, "
                     f"{report['text_bytes'] / max(1, report['tokens']):.2f} bytes a token, "
                     f"{elapsed_s:.1f} s, {report['text_bytes'] / 1e6 / elapsed_s:.1f} MB/s"
                     + (f" (this run; {report['resumed_parts']} shards were there)" if report["resumed_parts"] else ""))
    if report["invalid_utf8_lines"]:
        lines.append(f"{report['invalid_utf8_lines']:,} lines were not valid UTF-8: their bad bytes became U+FFFD")
    return lines


def _summary(store: TokenStore) -> str:
    train, held_out = store.split("train"), store.split("eval")
    return (f"token store {store.path}: {train.num_documents + held_out.num_documents:,} documents, "
            f"{train.num_tokens + held_out.num_tokens:,} tokens "
            f"({held_out.num_documents:,} documents, {held_out.num_tokens:,} tokens held out)")


def _load(file: Path) -> dict:
    """Reads one of the JSON files of an unfinished store."""
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): delete the folder {file.parent} to start anew.") from error


def _check_same(found: dict, wanted: dict, path: Path) -> None:
    for field, value in wanted.items():
        if found.get(field) != value:
            raise UserError(f"data.path={path} holds a token store made with data.{field}={found.get(field)!r}, not "
                            f"{value!r}: delete that folder or give another data.path.")


def _start_or_resume(path: Path, options: dict, inputs: list) -> None:
    """Records the options of an unfinished store, or checks that they are the same as when it was begun."""
    file = path / "unfinished.json"
    wanted = json.loads(json.dumps({"options": options, "inputs": inputs, "shard_tokens": SHARD_TOKENS}))
    if file.exists():
        found = _load(file)
        _check_same(found["options"], options, path)
        if found != wanted:
            raise UserError(f"data.path={path} holds an unfinished token store, but the files of data.source changed "
                            "since: delete that folder to start anew.")
    elif any(path.glob("*.tokens")):
        raise UserError(f"data.path={path} holds shards but no manifest.json: delete that folder to start anew.")
    else:
        write_atomically(file, json.dumps(wanted).encode())


def _tokenizer(path: Path, d) -> Tokenizer:
    """Returns the tokenizer, from the store if it is there, and leaves it there."""
    folder = path / "tokenizer"
    if folder.exists():
        return load_tokenizer(folder)
    if d.tokenizer == "train":
        texts = sources.sample(d.source, d.text_documents, _SAMPLE_CHARS)
        first = next(texts, None)
        if first is None:
            raise UserError(_EMPTY.format(d.source))
        tokenizer = train_sentencepiece(_chain(first, texts), d.vocab_size, lowercase=d.lowercase)
    else:
        tokenizer = load_tokenizer(d.tokenizer, d.lowercase, d.strip_accents)
    temporary = path / "tokenizer.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.save(temporary)
    os.replace(temporary, folder)
    return tokenizer


def _chain(first, rest):
    yield first
    yield from rest


def _write_parts(path: Path, d, tokenizer: Tokenizer, progress: Progress) -> dict:
    """Tokenises what the parts already there do not hold; returns numbers of this run for the statistics."""
    metas = sorted(path.glob("part-*.json"))
    done = _load(metas[-1]) if metas else {"next_document": 0}
    number, counters = len(metas), {}
    report = {"text_bytes": 0, "tokens": 0, "resumed_parts": number}
    part = _Part(tokenizer, d.eval_fraction)
    stream = sources.documents(d.source, d.text_documents, counters, skip=done["next_document"])
    with progress, WorkerPool("electra_jax.data.prepare:tokenise", tokenizer.files(), d.num_workers) as pool:
        for tokens, lengths, hashes, text_bytes in pool.map(_jobs(stream)):
            # Cut where a document would start beyond the limit: depends on the documents alone, not on the jobs.
            while len(lengths):
                room = SHARD_TOKENS - part.num_tokens
                take = int(np.searchsorted(np.cumsum(lengths) - lengths, room, side="left")) if room > 0 else 0
                if take == 0:
                    done = part.write(path, number, done["next_document"])
                    number, part = number + 1, _Part(tokenizer, d.eval_fraction)
                    continue
                cut = int(lengths[:take].sum())
                part.add(tokens[:cut], lengths[:take], hashes[:take])
                tokens, lengths, hashes = tokens[cut:], lengths[take:], hashes[take:]
                report["tokens"] += cut
            report["text_bytes"] += text_bytes
            progress.update(text_bytes, report["tokens"], done["next_document"] + part.num_documents, counters)
    if part.num_documents:
        has = {split: any(_load(m)[split] for m in path.glob("part-*.json"))
               for split in ("train", "eval")}
        part.balance(has)
        part.write(path, number, done["next_document"])
    report["invalid_utf8_lines"] = counters.get("invalid_utf8_lines", 0)
    return report


def _jobs(stream: Iterator[str]) -> Iterator[list[str]]:
    """Groups documents into jobs of about _JOB_CHARS."""
    job, size = [], 0
    for text in stream:
        job.append(text)
        size += len(text)
        if size >= _JOB_CHARS:
            yield job
            job, size = [], 0
    if job:
        yield job


def tokenise(files: dict):
    """Worker: returns the function documents -> (tokens, lengths [documents], hashes [documents], bytes of text)."""
    tokenizer = tokenizer_from_files(files)
    dtype = token_dtype(tokenizer.vocab_size)

    def work(texts: list[str]):
        chunks, owners = [], []
        for i, text in enumerate(texts):
            for chunk in _chunks(text):
                chunks.append(chunk)
                owners.append(i)
        ids = tokenizer.encode_batch(chunks)
        lengths = np.bincount(owners, weights=[len(x) for x in ids], minlength=len(texts)).astype(np.int64)
        encoded = [text.encode(errors="replace") for text in texts]
        hashes = np.frombuffer(b"".join(blake2b(data, digest_size=8).digest() for data in encoded), "<u8")
        return np.concatenate([np.zeros(0, dtype), *ids]), lengths, hashes, sum(map(len, encoded))
    return work


def _chunks(text: str) -> Iterator[str]:
    """Cuts a long document after white space."""
    while len(text) > _CHUNK_CHARS:
        cut = max(text.rfind(" ", _CHUNK_CHARS // 2, _CHUNK_CHARS), text.rfind("\n", _CHUNK_CHARS // 2, _CHUNK_CHARS))
        cut = cut + 1 or _CHUNK_CHARS
        yield text[:cut]
        text = text[cut:]
    yield text


class _Part:
    """Documents on their way into one train and one eval shard."""

    def __init__(self, tokenizer: Tokenizer, eval_fraction: float):
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._limit = int(eval_fraction * 2**64)
        self._tokens, self._lengths, self._hashes, self._held_out = [], [], [], []
        self.num_tokens = self.num_documents = 0

    def add(self, tokens, lengths, hashes) -> None:
        # By a hash of the text: equal documents, copies by weight among them, fall on the same side.
        self._held_out.append(hashes < np.uint64(self._limit))
        for column, values in ((self._tokens, tokens), (self._lengths, lengths), (self._hashes, hashes)):
            column.append(values)
        self.num_tokens += len(tokens)
        self.num_documents += len(lengths)

    def balance(self, has: dict) -> None:
        """In the last part: sees to it that neither split of a tiny corpus stays empty; `has`: which have documents."""
        hashes, held_out = np.concatenate(self._hashes), np.concatenate(self._held_out)
        filled = np.concatenate(self._lengths) > 0
        if not filled.any():
            return
        if not has["eval"] and not held_out[filled].any() and self._limit:
            held_out = hashes == hashes[filled].min()
        if not has["train"] and held_out[filled].all():
            held_out = hashes != hashes[filled].max()
        self._held_out = [held_out]

    def write(self, path: Path, number: int, first_document: int) -> dict:
        """Writes the shards and then their meta file; returns its content."""
        tokens = np.concatenate([np.zeros(0, self._dtype), *self._tokens])
        lengths, held_out = np.concatenate(self._lengths), np.concatenate(self._held_out)
        meta = {"next_document": first_document + self.num_documents}
        of_eval = np.repeat(held_out, lengths)
        for split, documents, which in (("train", ~held_out, ~of_eval), ("eval", held_out, of_eval)):
            sizes = lengths[documents & (lengths > 0)]    # a document may come out empty, e.g. control characters
            meta[split] = write_shard(path, f"{split}-{number:05d}", tokens[which], sizes) if len(sizes) else None
        write_atomically(path / f"part-{number:05d}.json", json.dumps(meta).encode())
        return meta


def _finish(path: Path, options: dict, tokenizer: Tokenizer) -> None:
    """Reads all shards once, checks them and counts tokens, and writes the manifest."""
    metas = [_load(file) for file in sorted(path.glob("part-*.json"))]
    splits = {split: [meta[split] for meta in metas if meta[split]] for split in ("train", "eval")}
    if not splits["train"]:
        raise UserError(_EMPTY.format(options["source"]))
    dtype = token_dtype(tokenizer.vocab_size)
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for shard in splits["train"] + splits["eval"]:
        file = path / f"{shard['name']}.tokens"
        data = file.read_bytes() if file.exists() else b""
        if hashlib.sha256(data).hexdigest() != shard["sha256"]:    # may have lain there since an interrupted call
            raise UserError(f"{file} is missing or damaged: delete the folder {path} and run prepare again.")
        if shard["name"].startswith("train"):
            counts += np.bincount(np.frombuffer(data, dtype), minlength=len(counts))
    data = counts.astype("<u8").tobytes()
    write_atomically(path / "counts.bin", data)
    write_manifest(path, {
        "dtype": dtype.str, "vocab_size": tokenizer.vocab_size, "unk_id": tokenizer.unk_id,
        "fingerprint": tokenizer.fingerprint, "counts_crc32": zlib.crc32(data),
        "tokenizer_crc32": {name: zlib.crc32(content) for name, content in sorted(tokenizer.files().items())},
        "splits": splits}, options)
    for file in [*path.glob("part-*.json"), path / "unfinished.json"]:
        file.unlink(missing_ok=True)


_EMPTY = "data.source={}: it holds no text; check the files."


def main(config, workdir) -> None:
    """The command line's entry; `data.path` or WORKDIR/tokens is where the store goes."""
    prepare(config, config.data.path or Path(workdir) / "tokens")


if __name__ == "__main__":
    from electra_jax.cli import run_main
    sys.exit(run_main(main))
