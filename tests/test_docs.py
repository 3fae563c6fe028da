"""The programs in the documentation run as they stand."""

import contextlib
import io
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

import electra_jax
from electra_jax import checkpoint, model
from electra_jax.data.tokenizer import load_tokenizer

DOCS = Path(__file__).parent.parent / "docs"
WORDS = "the a cat sat on mat . was sitting interest rates rose again chef ate meal cooked".split()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder with a checkpoint in runs/small, as the current one."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = load_tokenizer(tmp_path / "vocab.txt")
    c = tiny.config(model__vocab_size=tokenizer.vocab_size)
    params = tiny.params(lambda: model.init_params(model.build(c.model), jax.random.key(0)))
    saver = checkpoint.Checkpointer(tmp_path / "runs/small/checkpoints", keep=1, every_steps=0, every_minutes=0)
    saver.save({"step": np.int32(1), "params": params}, {"config": c.to_dict()}, tokenizer.files())
    assert saver.close()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs/small"


def program(heading: str) -> str:
    text = (DOCS / "downstream.md").read_text(encoding="utf8")
    return re.search(rf"## {heading}\n.*?```python\n(.*?)```", text, re.DOTALL).group(1)


def output(code: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "docs/downstream.md", "exec"), {})
    return out.getvalue()


def test_the_example_that_embeds_sentences(run):
    similarity = np.array(re.findall(r"-?\d+\.?\d*", output(program("Embed sentences"))), float).reshape(3, 3)
    assert np.allclose(np.diag(similarity), 1) and np.allclose(similarity, similarity.T)
    assert (np.abs(similarity[np.triu_indices(3, 1)]) < 0.999).all()


def test_the_example_that_scores_tokens(run):
    lines = output(program("Score tokens as replaced")).splitlines()
    tokens = [[part.split(":")[0] for part in line.split()] for line in lines]
    assert tokens == [f"[CLS] the chef {verb} the meal [SEP]".split() for verb in ("ate", "cooked")]
    first, second = ([int(part.split(":")[1].rstrip("%")) for part in line.split()] for line in lines)
    assert first != second and all(0 <= p <= 100 for p in first)


def test_padding_does_not_change_what_a_text_gets(run):
    m = electra_jax.load_discriminator(run)
    texts = ["the cat", "the chef cooked a meal on the mat .", "a"]
    together = m.module.apply({"params": m.params}, **m.batch(texts, pairs=["a mat"] * 3))
    for row, text in zip(together, texts, strict=True):
        alone = m.module.apply({"params": m.params}, **m.batch([text], pairs=["a mat"]))[0]
        np.testing.assert_allclose(row[:len(alone)], alone, atol=1e-5)


def test_long_texts_are_cut_to_the_positions_there_are(run):
    m = electra_jax.load_discriminator(run)
    batch = m.batch(["the cat " * 50], pairs=["a chef ate"])
    t = m.tokenizer
    assert batch["input_ids"].shape == (1, 32) and batch["token_type_ids"].sum() == 4
    assert batch["input_ids"][0, -4:].tolist() == [*t.encode("a chef ate"), t.sep_id]
