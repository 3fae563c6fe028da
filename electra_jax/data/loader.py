"""Batches as a pure function of (store, seed, step): resume needs no state, any number of hosts sees the same data."""

import queue
import threading
import time
from collections.abc import Sequence

import numpy as np

from electra_jax.config import UserError
from electra_jax.data.packing import Layout, Plan, make_key, make_plan, permute, uniform

# Where the cuts of short pieces fall repeats after so many epochs; order and A/B boundaries never do. It bounds
# the work of finding the epoch of a late step, since every plan has its own number of rows.
_PLANS = 16


class Loader:
    """Rows of one split of a token store.

    `specials` has `pad_id`, `cls_id`, `sep_id` (a Tokenizer does). batch_size is global; `rows` are those of each
    batch that this process gets, ascending numbers below batch_size (None: all, see `sharding.local_rows`).
    split="eval" has a fixed order, no random cuts, and wraps around at its end.
    Attributes: `sequences_per_epoch` (of the first epoch; others differ by a few, since random cuts do),
    `padding` (share of the first epoch's positions that are padding).
    Raises UserError when the split is empty.
    """

    def __init__(self, store, specials, *, split: str, batch_size: int, seq_len: int, segment_pairs: bool,
                 single_segment_prob: float, short_prob: float, pack: bool, seed: int,
                 rows: Sequence[int] | None = None):
        self._split = store.split(split)
        self._specials = int(specials.pad_id), int(specials.cls_id), int(specials.sep_id)
        self._is_eval = split == "eval"
        self._seed = "eval" if self._is_eval else int(seed)
        if not self._split.num_tokens:
            remedy = "raise data.eval_fraction and prepare again" if self._is_eval else "give more text"
            raise UserError(f"data.path={store.path}: its {split} split has no tokens: {remedy}.")
        self._global_batch, self._rows = batch_size, np.arange(batch_size) if rows is None else np.asarray(rows)
        self._layout = Layout(seq_len, segment_pairs, single_segment_prob, 0.0 if self._is_eval else short_prob, pack)
        self._plans, self._counts, self._lock = {}, {}, threading.Lock()
        plan = self._plan(0)
        self.sequences_per_epoch = plan.num_rows
        pieces = plan.num_full + len(plan.members)
        singles = int(plan.single[plan.members].sum()) + (0 if segment_pairs else plan.num_full)
        if segment_pairs:
            singles += round(plan.num_full * single_segment_prob)
        used = plan.num_tokens + 3 * pieces - singles
        self.padding = 1.0 - used / (plan.num_rows * seq_len)

    def batch_at(self, step: int) -> dict[str, np.ndarray]:
        """Returns this process's rows of the step's global batch: int32 arrays [rows, seq_len].

        `input_ids`; `token_type_ids` 0 and 1; `piece_ids` 1, 2, ... number the pieces of a row, 0 is padding;
        `position_ids` restart at 0 in each piece.
        """
        parts, done = [], 0
        while done < len(self._rows):    # more than once only where an epoch ends within the batch
            ahead = self._rows[done:] - self._rows[done]
            epoch, index, left = self._locate(step * self._global_batch + int(self._rows[done]))
            ahead = ahead[ahead < left]
            parts.append(self._pieces(epoch, index + ahead, done))
            done += len(ahead)
        return self._assemble(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _plan(self, variant: int) -> Plan:
        with self._lock:
            if variant not in self._plans:
                while len(self._plans) > 1:    # two are enough: a batch may hold the end of one epoch and the next
                    self._plans.pop(next(iter(self._plans)))
                key = make_key(self._seed, "plan", variant)
                self._plans[variant] = make_plan(self._split.document_lengths, self._layout, key)
                self._counts[variant] = self._plans[variant].num_rows
            return self._plans[variant]

    def _count(self, variant: int) -> int:
        if variant not in self._counts:
            self._plan(variant)
        return self._counts[variant]

    def _locate(self, row: int) -> tuple[int, int, int]:
        """Returns (epoch, index in the epoch, rows left in the epoch) of a row of the endless sequence."""
        if self._is_eval:
            row %= self._count(0)
            return 0, row, self._count(0) - row
        epoch = 0
        for variant in range(_PLANS):
            if row < self._count(variant):
                return epoch, row, self._count(variant) - row
            row -= self._count(variant)
            epoch += 1
        cycles, row = divmod(row, sum(self._counts.values()))
        epoch += cycles * _PLANS
        for variant in range(_PLANS):
            if row < self._counts[variant]:
                break
            row -= self._counts[variant]
            epoch += 1
        return epoch, row, self._counts[variant] - row

    def _pieces(self, epoch: int, indices: np.ndarray, first_row: int):
        """Returns (row, start in the stream, length, single segment?, tokens of A) of each piece, by rows."""
        variant = epoch % _PLANS
        plan, layout = self._plan(variant), self._layout
        ids = permute(indices, plan.num_rows, make_key(self._seed, "order", epoch))
        full = ids < plan.num_full
        packed = np.where(full, 0, ids - plan.num_full)
        first = plan.row_starts[packed]
        pieces = np.where(full, 1, plan.row_starts[np.minimum(packed + 1, len(plan.row_starts) - 1)] - first)
        rows = np.repeat(np.arange(len(ids)), pieces)
        nth = np.arange(len(rows)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        is_full = full[rows]
        starts = np.empty(len(rows), np.int64)
        lengths = np.full(len(rows), layout.capacity, np.int64)
        single = np.empty(len(rows), bool)
        unit = np.searchsorted(plan.full_before, ids[full], side="right") - 1
        starts[is_full] = plan.unit_starts[unit] + (ids[full] - plan.full_before[unit]) * layout.capacity
        single[is_full] = layout.single(starts[is_full], lengths[is_full],
                                        make_key(make_key(self._seed, "plan", variant), "single"))
        member = plan.members[(first[rows] + nth)[~is_full]]
        starts[~is_full], lengths[~is_full] = plan.starts[member], plan.lengths[member]
        single[~is_full] = plan.single[member]
        # The boundary of A and B is uniform in the middle half, and leaves both at least one token.
        share = 0.25 + 0.5 * uniform(starts, make_key(self._seed, "boundary", epoch))
        cut = np.where(single, lengths, np.clip(np.rint(lengths * share).astype(np.int64), 1, lengths - 1))
        return rows + first_row, starts, lengths, single, cut

    def _assemble(self, rows, starts, lengths, single, cut) -> dict[str, np.ndarray]:
        """Lays the pieces out: every array is one `repeat` over runs, no loop over rows."""
        pad_id, cls_id, sep_id = self._specials
        num_rows, seq_len = len(self._rows), self._layout.seq_len
        widths = lengths + 3 - single
        ends = np.cumsum(widths)
        row_first = np.searchsorted(rows, np.arange(num_rows))
        before_row = (ends - widths)[row_first][rows]
        base = rows * seq_len + (ends - widths) - before_row    # flat position of each [CLS]
        a_sep, end = base + 1 + cut, base + widths
        # Three runs a piece: [CLS] A [SEP], B [SEP] (empty if single), and the padding up to the next piece.
        next_base = np.append(base[1:], num_rows * seq_len)
        runs = np.stack([a_sep + 1 - base, end - a_sep - 1, next_base - end], axis=1).ravel()
        number = np.arange(len(rows)) - row_first[rows] + 1
        zero = np.zeros_like(number)
        kinds = np.stack([[zero, number, base], [zero + 1, number, base], [zero, zero, zero]]).astype(np.int32)
        types, piece_ids, origin = np.repeat(kinds.transpose(1, 2, 0).reshape(3, -1), runs, axis=1)
        real = piece_ids > 0
        is_token = real.copy()
        is_token[base] = is_token[a_sep] = is_token[end - 1] = False
        ids = np.full(num_rows * seq_len, pad_id, np.int32)
        ids[is_token] = self._split.read(starts, lengths)
        ids[base] = cls_id
        ids[a_sep] = ids[end - 1] = sep_id
        positions = (np.arange(num_rows * seq_len, dtype=np.int32) - origin) * real
        flat = {"input_ids": ids, "token_type_ids": types, "piece_ids": piece_ids, "position_ids": positions}
        return {name: array.reshape(num_rows, seq_len) for name, array in flat.items()}


class Prefetcher:
    """Makes the batches of consecutive steps ahead of their use, in a thread.

    `next()` returns the batch of the next step; `wait_s` is the time spent waiting in it, in seconds. An error in
    the thread is raised by `next()`. depth=0 makes each batch when asked.
    """

    def __init__(self, loader, start_step: int, depth: int):
        self._loader, self._step, self.wait_s = loader, start_step, 0.0
        self._ready = queue.Queue(max(1, depth))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True) if depth else None
        if self._thread:
            self._thread.start()

    def next(self) -> dict[str, np.ndarray]:
        """Returns the batch of the next step."""
        started = time.perf_counter()
        if self._thread:
            batch = self._ready.get()
            if isinstance(batch, BaseException):
                self._ready.put(batch)    # so that a second call fails too, and does not wait for ever
                raise batch
        else:
            batch = self._loader.batch_at(self._step)
            self._step += 1
        self.wait_s += time.perf_counter() - started
        return batch

    def close(self) -> None:
        """Stops the thread."""
        self._stop.set()
        while self._thread and self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                batch = self._loader.batch_at(self._step)
                self._step += 1
                self._ready.put(batch)
        except BaseException as error:
            self._ready.put(error)
