"""A token store gives back what was written, and never a damaged token in silence."""

import json
import shutil
import zlib

import numpy as np
import pytest

from electra_jax.config import UserError
from electra_jax.data import store as store_lib
from electra_jax.data.store import TokenStore, token_dtype, write_atomically, write_manifest, write_shard

RNG = np.random.default_rng(0)
SIZES = [RNG.integers(1, 9000, 7), RNG.integers(1, 50, 300), np.array([20_000])]
TOKENS = [RNG.integers(0, 60_000, sizes.sum()).astype("<u2") for sizes in SIZES]


@pytest.fixture
def folder(tmp_path):
    shards = [write_shard(tmp_path, f"train-{k:05d}", tokens, sizes)
              for k, (tokens, sizes) in enumerate(zip(TOKENS, SIZES, strict=True))]
    counts = np.bincount(np.concatenate(TOKENS), minlength=60_000).astype("<u8").tobytes()
    write_atomically(tmp_path / "counts.bin", counts)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.txt").write_bytes(b"[UNK]\n")
    write_manifest(tmp_path, {
        "dtype": "<u2", "vocab_size": 60_000, "unk_id": 7, "fingerprint": "f", "splits": {"train": shards, "eval": []},
        "counts_crc32": zlib.crc32(counts), "tokenizer_crc32": {"vocab.txt": zlib.crc32(b"[UNK]\n")}}, {"source": "s"})
    return tmp_path


def read_all(path):
    split = TokenStore(path).split("train")
    ends = np.cumsum(split.document_lengths)
    return split.read(ends - split.document_lengths, split.document_lengths)


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_tokens_documents_and_statistics_are_those_written(folder):
    store, stream = TokenStore(folder), np.concatenate(TOKENS)
    split = store.split("train")
    assert np.array_equal(read_all(folder), stream) and np.array_equal(split.document_lengths, np.concatenate(SIZES))
    assert (split.num_tokens, split.num_documents, store.split("eval").num_tokens) == (len(stream), 308, 0)
    assert store.unk_rate == (stream == 7).mean()
    share = np.unique(stream, return_counts=True)[1] / len(stream)
    assert store.unigram_entropy == pytest.approx(-(share * np.log(share)).sum())
    assert store.tokenizer_files() == {"vocab.txt": b"[UNK]\n"} and store.manifest["options"] == {"source": "s"}


def test_random_ranges_come_back_in_the_order_asked_for(folder, monkeypatch):
    monkeypatch.setattr(store_lib, "_OPEN_SHARDS", 1)    # every change of shard maps it anew
    split, stream = TokenStore(folder).split("train"), np.concatenate(TOKENS)
    ends = np.cumsum(np.concatenate(SIZES))
    for _ in range(20):
        documents = RNG.integers(0, len(ends), 40)
        starts = ends[documents] - np.concatenate(SIZES)[documents]
        lengths = RNG.integers(1, np.concatenate(SIZES)[documents] + 1)
        wanted = np.concatenate([stream[a:a + n] for a, n in zip(starts, lengths, strict=True)])
        assert np.array_equal(split.read(starts, lengths), wanted)
    with pytest.raises(ValueError, match="leaves its shard"):
        split.read([TOKENS[0].size - 1], [2])
    with pytest.raises(ValueError, match="leaves its shard"):
        split.read([len(stream) - 1], [2])


def test_any_flipped_bit_is_found_and_its_shard_and_block_named(folder):
    for position in (0, 2 * 4096 * 3 + 17, TOKENS[0].nbytes - 1):
        data = bytearray(TOKENS[0].tobytes())
        data[position] ^= 4
        (folder / "train-00000.tokens").write_bytes(data)
        with pytest.raises(UserError) as error:
            read_all(folder)
        assert f"train-00000.tokens is damaged in block {position // 8192} " in one_line(error)
        sound = 8192 if position < 8192 else 0    # what does not touch the block still reads
        found = TokenStore(folder).split("train").read([sound], [50])
        assert np.array_equal(found, TOKENS[0][sound:sound + 50])


def test_damage_is_reported_again_at_a_second_read(folder):
    (folder / "train-00000.tokens").write_bytes(bytes(TOKENS[0].nbytes))
    split = TokenStore(folder).split("train")
    for _ in range(2):
        with pytest.raises(UserError, match=r"train-00000.tokens is damaged in block 0"):
            split.read([0], [10])


@pytest.mark.parametrize("bad", [1, 2])
def test_a_long_read_checks_every_block_on_its_way_also_when_its_ends_are_known_good(tmp_path, bad):
    tokens = RNG.integers(0, 60_000, 5 * 4096).astype("<u2")
    shard = write_shard(tmp_path, "train-00000", tokens, np.array([len(tokens)]))
    data = bytearray(tokens.tobytes())
    data[bad * 8192 + 100] ^= 1
    (tmp_path / "train-00000.tokens").write_bytes(data)
    split = store_lib.Split(tmp_path, [shard], np.dtype("<u2"))
    split.read([0, 3 * 4096], [4096, 4096])
    for start, length in ((0, 2 * 4096 + 1), (0, 4 * 4096), (4000, (bad - 1) * 4096 + 200)):
        with pytest.raises(UserError, match=f"damaged in block {bad} "):
            split.read([start], [length])


def test_a_block_is_checked_once_a_process(folder, monkeypatch):
    split = TokenStore(folder).split("train")
    first = split.read([0, 10], [100, 20])
    monkeypatch.setattr(store_lib.zlib, "crc32", None)
    assert np.array_equal(split.read([0, 10], [100, 20]), first)


def test_a_shard_of_the_wrong_size_is_noticed_at_opening(folder):
    (folder / "train-00002.tokens").write_bytes(TOKENS[2].tobytes()[:-2])
    with pytest.raises(UserError, match=r"train-00002.tokens has 39998 bytes instead of 40000"):
        TokenStore(folder)


def test_an_edited_manifest_is_noticed(folder):
    file = folder / "manifest.json"
    file.write_text(file.read_text().replace('"unk_id": 7', '"unk_id": 8'))
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        TokenStore(folder)


@pytest.mark.parametrize("name", ["train-00001.tokens", "train-00001.index", "counts.bin", "manifest.json",
                                  "tokenizer/vocab.txt"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped"])
def test_a_missing_empty_cut_or_changed_file_is_named(folder, name, damage):
    file = folder / name
    data = file.read_bytes()
    file.unlink()
    if damage != "missing":
        middle = len(data) // 2
        file.write_bytes({"empty": b"", "cut": data[:-1],
                          "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:]}[damage])
    with pytest.raises(UserError) as error:
        read_all(folder)
        TokenStore(folder).tokenizer_files()
    text = one_line(error)
    assert name.split("/")[-1] in text and ("prepare" in text)


def test_the_manifest_hash_follows_the_content_not_the_place(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("copy") / "store"
    shutil.copytree(folder, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["content"]["splits"]["train"][0]["sha256"] = "0"
    write_manifest(other, manifest["content"], {"source": "s"})
    changed = TokenStore(other).manifest_hash
    write_manifest(other, TokenStore(folder).manifest["content"], {"source": "elsewhere"})
    assert TokenStore(other).manifest_hash == TokenStore(folder).manifest_hash != changed


def test_an_unknown_format_and_a_folder_without_a_store_say_what_to_do(folder, tmp_path_factory):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        TokenStore(folder)
    with pytest.raises(UserError, match=r"no manifest.json.*electra_jax.data.prepare"):
        TokenStore(tmp_path_factory.mktemp("nothing"))


def test_the_smallest_dtype_that_holds_the_vocabulary_is_taken():
    sizes = [token_dtype(v).itemsize for v in (256, 257, 65_536, 65_537, 1 << 20)]
    assert sizes == [1, 2, 2, 4, 4]
