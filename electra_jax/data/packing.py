"""How one epoch's tokens become rows: cut documents into pieces, put short pieces together.

Everything is a pure function of (document lengths, options, key) and vectorised over documents: about 0.2 s a
million documents.
"""

import bisect
import hashlib
from dataclasses import dataclass

import numpy as np

_SPLIT_ABOVE = 0.015    # share of padding above which whole short pieces are cut to fill the rows


@dataclass(frozen=True)
class Layout:
    """The options that decide how a document is cut (fields of `data` in the config)."""
    seq_len: int
    segment_pairs: bool
    single_segment_prob: float
    short_prob: float
    pack: bool

    @property
    def capacity(self) -> int:
        """Tokens of a full piece: what [CLS] A [SEP] B [SEP] or [CLS] A [SEP] leaves."""
        return self.seq_len - (3 if self.segment_pairs else 2)

    def single(self, starts: np.ndarray, lengths: np.ndarray, key: int) -> np.ndarray:
        """Which of the pieces that start at `starts` in the stream stay [CLS] A [SEP]."""
        if not self.segment_pairs:
            return np.ones(len(starts), bool)
        return (lengths < 2) | (uniform(starts, key) < self.single_segment_prob)


@dataclass(frozen=True)
class Plan:
    """The rows of one epoch: `num_full` rows of one full piece by arithmetic, then rows of short pieces.

    Full row i lies in the unit u with full_before[u] <= i < full_before[u + 1] and starts at
    unit_starts[u] + (i - full_before[u]) * capacity. Row num_full + j holds the short pieces
    members[row_starts[j]:row_starts[j + 1]], each with its start in the stream, length and kind.
    """
    num_full: int
    unit_starts: np.ndarray
    full_before: np.ndarray
    row_starts: np.ndarray
    members: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    single: np.ndarray
    num_tokens: int

    @property
    def num_rows(self) -> int:
        return self.num_full + len(self.row_starts) - 1


def make_plan(document_lengths: np.ndarray, layout: Layout, key: int) -> Plan:
    """Cuts documents of these lengths [documents] into the pieces of an epoch; `key` decides the random cuts.

    Cut points are one a stratum of capacity / short_prob tokens, at a random place: each adds one short piece of
    random length, so that about `short_prob` of the pieces are shorter than they need be, as published (facts
    b.13), and cut points move from epoch to epoch. No token is dropped.
    """
    capacity = layout.capacity
    ends = np.cumsum(document_lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    num_cuts = round(layout.short_prob * total / capacity)
    strata = np.arange(num_cuts)
    cuts = ((strata + uniform(strata, make_key(key, "cut"))) * (total / max(1, num_cuts))).astype(np.int64)
    # Two sorted runs: the stable sort merges them in linear time.
    bounds = np.sort(np.concatenate([[0], ends, cuts]).astype(np.int64), kind="stable")
    sizes = np.diff(bounds)
    unit_starts, sizes = bounds[:-1][sizes > 0], sizes[sizes > 0]
    full = sizes // capacity
    full_before = np.concatenate([[0], np.cumsum(full)]).astype(np.int64)
    rest = sizes - full * capacity
    tails = np.flatnonzero(rest)
    starts, lengths = (unit_starts + full * capacity)[tails], rest[tails].astype(np.int32)
    single = layout.single(starts, lengths, make_key(key, "single"))
    if layout.pack:
        pool = _Pool(starts, lengths, single)
        row_starts, members = pool.pack(layout.seq_len, split=False)
        gaps = (len(row_starts) - 1) * layout.seq_len - int((lengths + 3 - single).sum())
        if gaps > _SPLIT_ABOVE * layout.seq_len * (full_before[-1] + len(row_starts) - 1):
            row_starts, members = pool.pack(layout.seq_len, split=True)
        starts, lengths, single = pool.starts, pool.lengths, pool.single
    else:
        members = np.arange(len(starts))
        row_starts = np.arange(len(starts) + 1)
    return Plan(int(full_before[-1]), unit_starts, full_before, row_starts, members, starts, lengths, single, total)


class _Pool:
    """Short pieces by width (their tokens and specials), and rows made of them.

    Widths are at most a row, so first-fit decreasing works on the histogram: one pattern of widths, found once,
    is taken as many times as the counts allow; the number of patterns is about the number of widths.
    """

    def __init__(self, starts, lengths, single):
        self.starts, self.lengths, self.single = starts, lengths, single

    def pack(self, seq_len: int, split: bool) -> tuple[np.ndarray, np.ndarray]:
        """Returns (row_starts [rows + 1], members [pieces]).

        With `split` rows are filled harder: one piece may give way to two that fit better, and what is still left
        takes the first part of a piece that does not fit. Needed where documents have one size, e.g. 65 of 128,
        and rows would stay half empty.
        """
        self._waiting = {}
        self._add(np.arange(len(self.starts)))
        members, sizes = [], []
        widths = sorted(self._waiting)
        while widths:
            pattern, gap, donor = self._pattern(widths, seq_len, split)
            need = pattern | ({donor: pattern.get(donor, 0) + 1} if donor else {})
            rows = min(len(self._waiting[w]) // n for w, n in need.items())
            columns = [self._take(w, rows * n).reshape(rows, n) for w, n in pattern.items()]
            if donor:
                columns.append(self._cut(self._take(donor, rows), gap - 2)[:, None])
            block = np.concatenate(columns, axis=1)
            members.append(block.ravel())
            sizes.append(np.full(rows, block.shape[1]))
            widths = sorted(w for w, items in self._waiting.items() if len(items)) if donor else [
                w for w in widths if len(self._waiting[w])]
        row_starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes))] if sizes else [[0]]).astype(np.int64)
        return row_starts, np.concatenate(members) if members else np.zeros(0, np.int64)

    def _pattern(self, widths: list[int], seq_len: int, split: bool) -> tuple[dict, int, int]:
        """Returns how many of which width make one row, the gap that stays, and the width to cut to fill it or 0."""
        used, gap = {}, seq_len
        i = len(widths) - 1
        while i >= 0:
            width = widths[i]
            fit = min(gap // width, len(self._waiting[width]))
            if fit:
                used[width] = fit
                gap -= fit * width
            i = min(i, bisect.bisect_right(widths, gap)) - 1
        if split and gap:
            gap = self._exchange(widths, used, gap)
        if split and gap >= 3 and gap * 64 > seq_len:
            for width in reversed(widths):
                if len(self._waiting[width]) > used.get(width, 0):
                    return used, gap, width
        return used, gap, 0

    def _exchange(self, widths: list[int], used: dict, gap: int) -> int:
        """Replaces one piece of the pattern by two that leave less of the gap, if there are such; returns the gap."""
        def free(width):
            return len(self._waiting.get(width, ())) - used.get(width, 0)
        for left in range(gap):
            for out in sorted(used):
                for first in widths:
                    second = out + gap - left - first
                    if second < first:
                        break
                    if free(first) > (first == second) and free(second) > 0:
                        used[out] -= 1
                        for width in (first, second):
                            used[width] = used.get(width, 0) + 1
                        for width in [w for w, n in used.items() if not n]:
                            del used[width]
                        return left
        return gap

    def _take(self, width: int, count: int) -> np.ndarray:
        items = self._waiting[width]
        self._waiting[width] = items[count:]
        return items[:count]

    def _add(self, items: np.ndarray) -> None:
        widths = self.lengths[items] + 3 - self.single[items]
        order = np.argsort(widths.astype(np.int32), kind="stable")
        values, first = np.unique(widths[order], return_index=True)
        for width, group in zip(values.tolist(), np.split(items[order], first[1:]), strict=True):
            old = self._waiting.get(width)
            self._waiting[width] = group if old is None or not len(old) else np.concatenate([old, group])

    def _cut(self, items: np.ndarray, size: int) -> np.ndarray:
        """Returns new single-segment pieces of the first `size` tokens of each item; what is left waits again."""
        rest = self.lengths[items] - size
        left = items[rest > 0]
        first, count = len(self.starts), len(items) + len(left)
        self.starts = np.concatenate([self.starts, self.starts[items], self.starts[left] + size])
        self.lengths = np.concatenate([self.lengths, np.minimum(self.lengths[items], size), rest[rest > 0]])
        self.single = np.concatenate([self.single, np.ones(count, bool)])
        if len(left):
            self._add(np.arange(first + len(items), first + count))
        return np.arange(first, first + len(items))


def make_key(*parts) -> int:
    """Returns 64 bits that depend on every part, equal on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def mix(values: np.ndarray, key: int) -> np.ndarray:
    """Returns 64 random-looking bits a value (the finaliser of SplitMix64: Steele, Lea and Flood, 2014)."""
    x = np.asarray(values).astype(np.uint64) + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(values: np.ndarray, key: int) -> np.ndarray:
    """Returns one number in [0, 1) a value."""
    return (mix(values, key) >> np.uint64(11)) * 2.0**-53


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """Returns where a pseudo-random permutation of range(size) sends `indices`, without storing it.

    A Feistel network of six rounds over the next power of four; what falls outside `size` is sent through again
    (cycle walking), which ends because the network is a bijection: on average less than four times.
    """
    half = max(1, ((max(2, size) - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = [make_key(key, "round", r) for r in range(6)]
    out = np.asarray(indices).astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        left, right = out[todo] >> np.uint64(half), out[todo] & mask
        for k in keys:
            left, right = right, left ^ (mix(right, k) & mask)
        out[todo] = (left << np.uint64(half)) | right
        todo = todo[out[todo] >= size]
    return out.astype(np.int64)
