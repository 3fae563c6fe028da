"""Every epoch holds every token once, and a batch depends on nothing but store, seed and step."""

import os
import time
from types import SimpleNamespace

import numpy as np
import pytest

from electra_jax.config import UserError
from electra_jax.data.loader import _PLANS, Loader, Prefetcher
from electra_jax.data.packing import Layout, make_plan, permute
from electra_jax.data.store import TokenStore, write_atomically, write_manifest, write_shard

SPECIALS = SimpleNamespace(pad_id=0, unk_id=1, cls_id=2, sep_id=3, mask_id=4)
FIRST = 10    # tokens of the test stores are FIRST, FIRST + 1, ...: the value tells the place in the stream
OPTIONS = dict(split="train", batch_size=8, seq_len=32, segment_pairs=True, single_segment_prob=0.1, short_prob=0.05,
               pack=True, seed=0)
LAYOUTS = [dict(pack=pack, segment_pairs=pairs) for pack in (True, False) for pairs in (True, False)]


def make_store(folder, lengths, shards=3, eval_lengths=(40, 3, 200)):
    """A store in which every token of a split is different."""
    folder.mkdir(exist_ok=True)
    splits = {}
    for split, sizes in (("train", np.array(lengths)), ("eval", np.array(eval_lengths, int))):
        start, splits[split] = FIRST, []
        for k, part in enumerate(np.array_split(sizes, min(shards, max(1, len(sizes))))):
            if len(part):
                tokens = np.arange(start, start + part.sum()).astype("<u4")
                splits[split].append(write_shard(folder, f"{split}-{k:05d}", tokens, part))
                start += int(part.sum())
    import zlib
    counts = np.ones(100, "<u8").tobytes()
    write_atomically(folder / "counts.bin", counts)
    write_manifest(folder, {"dtype": "<u4", "vocab_size": 1 << 20, "unk_id": 1, "fingerprint": "", "splits": splits,
                            "counts_crc32": zlib.crc32(counts), "tokenizer_crc32": {}}, {})
    return TokenStore(folder)


def lengths_of(kind, rng=None):
    rng = rng or np.random.default_rng(0)
    return {"mixed": np.maximum(1, rng.lognormal(3.5, 1.5, 400).astype(int)), "tiny": rng.integers(1, 12, 3000),
            "one": np.array([5000]), "same": np.full(2000, 16), "ones": np.ones(900, int)}[kind]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("mixed"), lengths_of("mixed"))


def epoch_of(loader, epoch=0):
    """All rows of an epoch as one dict of arrays, whatever the batch size."""
    starts = [0]
    for e in range(epoch + 1):
        starts.append(starts[-1] + loader._count(e % _PLANS))
    size = loader._global_batch
    first, last = starts[epoch], starts[epoch + 1]
    batches = [loader.batch_at(step) for step in range(first // size, -(-last // size))]
    skip = first - first // size * size
    return {name: np.concatenate([b[name] for b in batches])[skip:skip + last - first] for name in batches[0]}


def pieces_of(rows):
    """Yields (ids, types, positions) of every piece, checking that they lie one after the other."""
    for ids, types, numbers, positions in zip(rows["input_ids"], rows["token_type_ids"], rows["piece_ids"],
                                              rows["position_ids"], strict=True):
        used = (numbers > 0).sum()
        assert (numbers[:used] > 0).all() and (np.diff(numbers[:used]) >= 0).all() and numbers[0] == 1
        assert not ids[used:].any() and not types[used:].any() and not positions[used:].any()
        for k in range(1, numbers.max() + 1):
            yield ids[numbers == k], types[numbers == k], positions[numbers == k]


@pytest.mark.parametrize("kind", ["mixed", "tiny", "one", "same", "ones"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_epoch_holds_every_token_exactly_once(tmp_path, kind, layout):
    lengths = lengths_of(kind)
    loader = Loader(make_store(tmp_path / "store", lengths), SPECIALS, **OPTIONS | layout)
    for epoch in (0, 1, 3 * _PLANS + 1):    # the last: where cuts repeat, found by arithmetic
        ids = epoch_of(loader, epoch)["input_ids"]
        assert np.array_equal(np.sort(ids[ids >= FIRST]), np.arange(FIRST, FIRST + lengths.sum()))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_piece_is_contiguous_text_of_one_document_in_the_published_layout(mixed, layout):
    loader = Loader(mixed, SPECIALS, **OPTIONS | layout)
    ends = np.cumsum(lengths_of("mixed"))
    cuts, singles, count = [], 0, 0
    for ids, types, positions in pieces_of(epoch_of(loader)):
        text = ids[ids >= FIRST] - FIRST
        assert ids[0] == 2 and ids[-1] == 3 and np.array_equal(positions, np.arange(len(ids)))
        assert np.array_equal(text, np.arange(text[0], text[0] + len(text)))
        assert np.searchsorted(ends, text[0], "right") == np.searchsorted(ends, text[-1], "right")
        separators = np.flatnonzero(ids == 3)
        assert np.array_equal(types, np.arange(len(ids)) > separators[0])
        assert len(ids) == len(text) + 1 + len(separators)
        assert len(separators) <= (2 if layout["segment_pairs"] else 1)
        if len(text) == loader._layout.capacity:
            count, singles = count + 1, singles + (len(separators) == 1)
        if len(separators) == 2:
            assert 1 <= separators[0] - 1 < len(text)
            cuts += [(separators[0] - 1) / len(text)] * (len(text) > 16)
    if layout["segment_pairs"]:
        assert min(cuts) > 0.2 and max(cuts) < 0.8 and abs(np.mean(cuts) - 0.5) < 0.03 and np.std(cuts) > 0.12
        assert 0.05 < singles / count < 0.17
    if not layout["pack"]:
        assert epoch_of(loader)["piece_ids"].max() == 1


def test_about_short_prob_of_the_pieces_is_cut_short(tmp_path):
    store = make_store(tmp_path / "store", [80_000])
    for share in (0.0, 0.05, 0.3):
        loader = Loader(store, SPECIALS, **OPTIONS | dict(short_prob=share, pack=False))    # a row a piece
        sizes = (epoch_of(loader)["piece_ids"] > 0).sum(axis=1)
        short = np.mean(sizes < 31)
        assert abs(short - share / (1 + share)) < 0.03, (share, short)


def test_the_global_batch_is_the_same_for_any_number_of_processes(mixed):
    options = OPTIONS | dict(batch_size=12)
    whole = Loader(mixed, SPECIALS, **options)
    for count in (2, 4):
        parts = [Loader(mixed, SPECIALS, **options, rows=range(i * 12 // count, (i + 1) * 12 // count))
                 for i in range(count)]
        for step in (0, 7, 1000):
            wanted, found = whole.batch_at(step), [p.batch_at(step) for p in parts]
            for name in wanted:
                assert found[0][name].shape == (12 // count, 32)
                assert np.array_equal(wanted[name], np.concatenate([f[name] for f in found]))
    rows = [1, 2, 5, 10, 11]
    apart = Loader(mixed, SPECIALS, **options, rows=rows)
    for step in range(whole.sequences_per_epoch // 12 + 2):    # an epoch ends within one of the batches
        wanted, found = whole.batch_at(step), apart.batch_at(step)
        assert all(np.array_equal(wanted[name][rows], found[name]) for name in wanted)


def test_a_batch_depends_on_the_step_alone_not_on_what_was_read_before(mixed):
    loader = Loader(mixed, SPECIALS, **OPTIONS)
    steps = [0, 5, 3 * loader.sequences_per_epoch // 8, 20 * loader.sequences_per_epoch // 8, 100_000]
    forwards = [loader.batch_at(step) for step in steps]
    for step, wanted in reversed(list(zip(steps, forwards, strict=True))):
        for again in (loader.batch_at(step), Loader(mixed, SPECIALS, **OPTIONS).batch_at(step)):
            assert all(np.array_equal(wanted[name], again[name]) for name in wanted)


def test_epochs_and_seeds_differ_in_order(mixed):
    options = OPTIONS | dict(pack=False, segment_pairs=False, short_prob=0.0)    # the same rows in every epoch
    loader, other = Loader(mixed, SPECIALS, **options), Loader(mixed, SPECIALS, **options | dict(seed=1))
    first, second, third = (epoch_of(loader, epoch)["input_ids"] for epoch in (0, 1, _PLANS))
    for rows in (second, third, epoch_of(other)["input_ids"]):
        assert {row.tobytes() for row in rows} == {row.tobytes() for row in first}
        assert (rows != first).any(axis=1).mean() > 0.95
    assert (second != third).any(axis=1).mean() > 0.95


def test_epochs_and_seeds_differ_in_where_texts_are_cut(mixed):
    options = OPTIONS | dict(pack=False, segment_pairs=False, short_prob=0.3)
    loader, other = Loader(mixed, SPECIALS, **options), Loader(mixed, SPECIALS, **options | dict(seed=1))
    first, *rest = ({row.tobytes() for row in epoch["input_ids"]}
                    for epoch in (epoch_of(loader, 0), epoch_of(loader, 1), epoch_of(other)))
    assert all(len(first & rows) < 0.8 * len(first) for rows in rest)
    pairs = Loader(mixed, SPECIALS, **OPTIONS | dict(pack=False, short_prob=0.0, single_segment_prob=0.0))
    first, later = ({tuple(ids) for ids, *_ in pieces_of(epoch_of(pairs, epoch)) if len(ids) == 32} for epoch in (0, 1))
    assert len(first & later) < 0.2 * len(first)    # where A ends


def test_evaluation_has_a_fixed_order_and_wraps_around(mixed):
    options = OPTIONS | dict(split="eval", batch_size=3)
    loader, other = (Loader(mixed, SPECIALS, **options | dict(seed=seed)) for seed in (0, 9))
    rows, size = loader.sequences_per_epoch, 3
    ids = np.concatenate([loader.batch_at(step)["input_ids"] for step in range(rows)])
    assert np.array_equal(np.sort(ids[:rows][ids[:rows] >= FIRST]), np.arange(FIRST, FIRST + 243))
    assert len(ids) == rows * size
    assert all(np.array_equal(ids[k * rows:(k + 1) * rows], ids[:rows]) for k in range(size))
    assert np.array_equal(other.batch_at(1)["input_ids"], loader.batch_at(1)["input_ids"])


@pytest.mark.parametrize("seq_len", [32, 128, 512])
@pytest.mark.parametrize("pairs", [True, False])
def test_padding_stays_under_two_percent_for_documents_of_any_size(seq_len, pairs):
    rng = np.random.default_rng(1)
    layout = Layout(seq_len, pairs, 0.1, 0.05, True)
    for name, lengths in {
            "short": rng.integers(1, seq_len // 4, 50_000), "any": rng.integers(1, 4 * seq_len, 20_000),
            "just over half": np.full(20_000, seq_len // 2 + 1), "just under a row": np.full(20_000, seq_len - 8),
            "one token over": np.full(20_000, layout.capacity + 1), "long": rng.integers(5, 100_000, 200)}.items():
        plan = make_plan(lengths, layout, 7)
        widths = plan.lengths[plan.members] + 3 - plan.single[plan.members]
        sizes = np.add.reduceat(widths, plan.row_starts[:-1]) if len(plan.members) else np.zeros(0, int)
        assert (sizes <= seq_len).all(), name
        full = plan.num_full * (seq_len - 0.1 * pairs)
        assert 1 - (sizes.sum() + full) / (plan.num_rows * seq_len) < 0.02, name
        assert plan.num_full * layout.capacity + plan.lengths[plan.members].sum() == lengths.sum(), name


def test_the_padding_attribute_is_the_share_found_in_the_batches(mixed):
    for layout in LAYOUTS:
        loader = Loader(mixed, SPECIALS, **OPTIONS | layout)
        rows = epoch_of(loader)
        assert len(rows["piece_ids"]) == loader.sequences_per_epoch
        assert abs((rows["piece_ids"] == 0).mean() - loader.padding) < 0.002


def test_the_permutation_is_a_bijection_for_any_size():
    rng = np.random.default_rng(0)
    sizes = [*range(1, 70), *rng.integers(70, 5000, 40).tolist(), 1 << 16, (1 << 16) + 1]
    for size in sizes:
        out = permute(np.arange(size), size, int(rng.integers(1 << 60)))
        assert np.array_equal(np.sort(out), np.arange(size)), size


def test_the_permutation_looks_random():
    out = permute(np.arange(100_000), 100_000, 5)
    assert abs(np.corrcoef(np.arange(100_000), out)[0, 1]) < 0.02
    assert np.mean(np.abs(np.diff(out)) < 100) < 0.01 and (out != permute(np.arange(100_000), 100_000, 6)).mean() > 0.99
    counts = np.histogram(out[:20_000], 100)[0]
    assert ((counts - 200.0) ** 2 / 200).sum() < 160    # chi-square, 99 degrees of freedom: p = 0.0001


def test_planning_takes_less_than_a_second_for_a_million_documents():
    lengths = np.maximum(1, np.random.default_rng(0).lognormal(4.5, 1.0, 1_000_000).astype(np.int64))
    started = time.process_time()
    make_plan(lengths, Layout(128, True, 0.1, 0.05, True), 0)
    assert time.process_time() - started < 2.0    # 0.5 s on an idle core; the bound allows for a busy machine


def test_impossible_requests_are_one_line(mixed, tmp_path):
    store = make_store(tmp_path / "store", [50], eval_lengths=())
    with pytest.raises(UserError, match=r"eval split has no tokens: raise data.eval_fraction"):
        Loader(store, SPECIALS, **OPTIONS | dict(split="eval"))


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetched_batches_come_in_order_from_the_step_asked_for(mixed, depth):
    loader = Loader(mixed, SPECIALS, **OPTIONS)
    prefetcher = Prefetcher(loader, 17, depth)
    for step in range(17, 30):
        assert np.array_equal(prefetcher.next()["input_ids"], loader.batch_at(step)["input_ids"])
    assert prefetcher.wait_s > 0
    prefetcher.close()
    assert not (prefetcher._thread and prefetcher._thread.is_alive())


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_in_the_prefetching_thread_reaches_the_caller_after_the_good_batches(depth):
    def batch_at(step):
        if step == 3:
            raise UserError("shard 7 is damaged")
        return {"step": step}
    prefetcher = Prefetcher(SimpleNamespace(batch_at=batch_at), 0, depth)
    assert [prefetcher.next()["step"] for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(UserError, match="shard 7"):
            prefetcher.next()
    prefetcher.close()


def test_thirty_thousand_packed_sequences_a_second_on_one_core(tmp_path):
    lengths = np.maximum(1, np.random.default_rng(0).lognormal(5.0, 1.5, 5000).astype(int))
    loader = Loader(make_store(tmp_path / "store", lengths), SPECIALS, **OPTIONS | dict(batch_size=128, seq_len=128))
    for step in range(30):
        loader.batch_at(step)
    started = time.process_time()
    for step in range(100):
        loader.batch_at(step)
    per_core = 100 * 128 / (time.process_time() - started)
    assert per_core > float(os.environ.get("ELECTRA_JAX_LOADER_RATE", 30_000)), per_core
