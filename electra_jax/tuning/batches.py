"""Batches of features by length: few shapes, little padding, an order that is a function of (seed, epoch)."""

from collections.abc import Sequence

import numpy as np

from electra_jax.config import UserError
from electra_jax.tasks.base import Feature


def padded_length(length: int, bucket: int, longest: int) -> int:
    """The length that a row is padded to: a multiple of `bucket`, or four lengths an octave where those are sparser.

    With 8 that is 8, 16, ..., 64, 80, 96, 112, 128, 160, ...: a quarter of padding at most beyond 32, and shapes, hence
    compiles, grow with the logarithm of the length.
    """
    step = max(bucket, (1 << (length - 1).bit_length()) // 8)
    return min(-(-length // step) * step, max(longest, length))


def epoch(lengths: np.ndarray, batch_size: int, pool_batches: int, seed: int, number: int) -> list[np.ndarray]:
    """Returns the batches of one pass: arrays of indices, each batch of rows of about one length, in random order.

    Rows are drawn at random into pools of `pool_batches` batches, which are sorted by length; what does not fill a
    batch is left out of this pass (the original drops it as well).
    """
    rng = np.random.default_rng((seed, number))
    order = rng.permutation(len(lengths))[:len(lengths) // batch_size * batch_size]
    batches = []
    for start in range(0, len(order), batch_size * pool_batches):
        pool = order[start:start + batch_size * pool_batches]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += np.split(pool, len(pool) // batch_size)
    return [batches[i] for i in rng.permutation(len(batches))]


def in_order_of_length(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Returns batches of indices over all rows, longest first so that memory runs out at once or not at all."""
    order = np.argsort(-lengths, kind="stable")
    return [order[i:i + batch_size] for i in range(0, len(order), batch_size)]


def collate(features: Sequence[Feature], rows: int, bucket: int, longest: int, pad_id: int) -> dict[str, np.ndarray]:
    """Returns a batch [rows, L] of features, padded to a bucket's length and, with empty rows, to `rows`.

    `input_ids`, `attention_mask`, `token_type_ids`, the targets by name, and for qa `allowed`.
    """
    length = padded_length(max(len(f.input_ids) for f in features), bucket, longest)
    batch = {name: np.zeros((rows, length), np.int32) for name in ("input_ids", "attention_mask", "token_type_ids")}
    batch["input_ids"] += pad_id
    batch["attention_mask"][len(features):, 0] = 1    # a row without any token has no softmax
    if features[0].allowed is not None:
        batch["allowed"] = np.zeros((rows, length), bool)
    for name, value in features[0].targets.items():
        kind = np.float32 if isinstance(value, float) else np.int32
        batch[name] = np.full((rows, length), -1, np.int32) if np.ndim(value) else np.zeros(rows, kind)
    for i, f in enumerate(features):
        here = slice(len(f.input_ids))
        batch["input_ids"][i, here], batch["attention_mask"][i, here] = f.input_ids, 1
        batch["token_type_ids"][i, here] = f.token_type_ids
        if f.allowed is not None:
            batch["allowed"][i, here] = f.allowed
        for name, value in f.targets.items():
            batch[name][(i, here) if np.ndim(value) else i] = value
    return batch


class Batches:
    """The training batches of a run, as a function of the step; what `data.loader.Prefetcher` reads ahead."""

    def __init__(self, features: Sequence[Feature], data, seed: int, pad_id: int):
        """`data` is the config's section. Raises UserError when the features do not fill one batch."""
        self._features, self._data, self._seed, self._pad_id = features, data, seed, pad_id
        self._lengths = np.array([len(f.input_ids) for f in features])
        self.steps_per_epoch = len(features) // data.batch_size
        if not self.steps_per_epoch:
            raise UserError(f"data.batch_size={data.batch_size} is more than the {len(features)} sequences to train "
                            "on: lower it.")
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])

    def batch_at(self, step: int) -> dict[str, np.ndarray]:
        """Returns the batch of a step, counted from 0 over all epochs."""
        number, index = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != number:
            self._epoch = number, epoch(self._lengths, self._data.batch_size, self._data.pool_batches, self._seed,
                                        number)
        rows = [self._features[i] for i in self._epoch[1][index]]
        return collate(rows, self._data.batch_size, self._data.bucket, self._data.seq_len, self._pad_id)
