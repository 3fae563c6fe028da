"""Small configurations and hand-made batches for the tests."""

import jax
import numpy as np

from electra_jax import config as config_lib

PAD, UNK, CLS, SEP, MASK = range(5)
SPECIAL_IDS = {"pad": PAD, "cls": CLS, "sep": SEP, "mask": MASK}   # [UNK] is an ordinary token


def config(**fields):
    """A two-layer model; fields by dotted name with "__" for the dot: config(model__norm="pre")."""
    c = config_lib.get_config()
    c.model.update(vocab_size=67, embedding_size=8, hidden_size=16, num_layers=2, num_heads=4, intermediate_size=32,
                   max_positions=32, generator_size=0.5, hidden_dropout=0.0, attention_dropout=0.0)
    c.data.update(seq_len=24, batch_size=8)
    c.optimizer.update(steps=10, warmup_steps=2, learning_rate=1e-3)
    for name, value in fields.items():
        section, field = name.split("__")
        c[section][field] = value
    config_lib.validate(c)
    return c


def row(rng, seq_len, piece_lengths, vocab_size, ordinary=1.0):
    """One row: pieces [CLS] A [SEP] B [SEP] of the given lengths, then padding.

    `ordinary` is the share of the tokens between that are no specials.
    """
    out = {name: np.zeros(seq_len, np.int32) for name in ("input_ids", "token_type_ids", "piece_ids", "position_ids")}
    start = 0
    for number, length in enumerate(piece_lengths, 1):
        ids = np.where(rng.random(length) < ordinary, rng.integers(UNK, vocab_size, length), SEP)
        ids[ids == CLS] = UNK
        ids[0], ids[-1] = CLS, SEP
        middle = rng.integers(1, max(2, length - 1))
        if length > 6:
            ids[middle] = SEP
        here = slice(start, start + length)
        out["input_ids"][here], out["piece_ids"][here] = ids, number
        out["position_ids"][here] = np.arange(length)
        out["token_type_ids"][here] = np.arange(length) > middle
        start += length
    return out


def batch(seed, size, seq_len, vocab_size):
    """A batch that mixes full, padded and packed rows, rows with few candidates and one with none."""
    rng = np.random.default_rng(seed)
    third = seq_len // 3
    kinds = [
        ([seq_len], 1.0),                                # full
        ([seq_len - 5], 1.0),                            # padded
        ([third, seq_len - third], 1.0),                 # packed, full
        ([third, third - 1, 4], 1.0),                    # packed, padded
        ([seq_len], 0.1),                                # few candidates among many tokens
        ([3], 1.0),                                      # one candidate
        ([2], 1.0),                                      # none
        ([seq_len // 2, 2, 3], 1.0),                     # packed, very short pieces
    ]
    rows = [row(rng, seq_len, *kinds[i % len(kinds)][:1], vocab_size, kinds[i % len(kinds)][1]) for i in range(size)]
    return {name: np.stack([r[name] for r in rows]) for name in rows[0]}


def params(init, seed=0):
    """Parameters of the shapes that `init()` gives, all noise, so that biases and norms take part in what is compared.

    Kernels keep the size of what they multiply, norms' scales lie around one.
    """
    rng = np.random.default_rng(seed)

    def draw(path, x):
        deviation = 0.8 * x.shape[0] ** -0.5 if "kernel" in path[-1].key else 0.2
        return rng.normal(path[-1].key == "scale", deviation, x.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init))


def float64(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def flat(params):
    """{"a/b/c": array} of a parameter tree."""
    return {"/".join(key.key for key in path): np.asarray(x) for path, x in jax.tree.leaves_with_path(params)}
