"""The sentences that a run ends with."""

import numpy as np

from electra_jax import show

PIECES = ["[PAD]", "[CLS]", "[SEP]", "▁the", "▁c", "at", "▁", "og"]


def test_each_token_shows_its_probability_and_each_replacement_its_original():
    original = np.array([[1, 3, 4, 5, 6, 2, 0, 0]])
    batch = {"input_ids": original, "piece_ids": np.array([[1, 1, 1, 1, 1, 1, 0, 0]])}
    seen = {"input_ids": np.array([[1, 3, 4, 7, 6, 2, 0, 0]]), "labels": np.array([[0, 0, 0, 1, 0, 0, 0, 0]]),
            "probabilities": np.array([[0.0, 0.01, 0.2, 0.876, 0.5, 0.0, 0.9, 0.9]])}
    (text,) = show.examples(batch, seen, PIECES.__getitem__, count=4)
    assert text.plain == "the·1 c·20 ##at→##og·88 ▁·50 [SEP]·0"
