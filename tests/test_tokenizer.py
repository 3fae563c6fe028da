"""Every tokenizer gives the original's ids, never a special one from text, and is rebuilt exactly from its files."""

import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from electra_jax.config import UserError
from electra_jax.data.tokenizer import load_tokenizer, tokenizer_from_files, train_sentencepiece

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GREEK = ["ο", "##δ", "##ο", "##ς", "##σ"]  # noqa: RUF001
PIECES = [*SPECIALS, "un", "##want", "##ed", "run", "##ning", ",", "[", "]", "mask", "a", *GREEK]
WORDS = [a + b + c for a in ("qu", "l", "gr", "st") for b in ("ick", "azy", "een", "orm") for c in ("ly", "est", "ing")]
CORPUS = [f"The quick {a} {b} of the fox was seen.\nAnother {b} line about {a}." for a in WORDS for b in WORDS[::5]]


@pytest.fixture
def vocab(tmp_path):
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(PIECES) + "\n")
    return file


@pytest.fixture(scope="module")
def trained():
    return train_sentencepiece(CORPUS, 80)


def json_file(folder: Path, **post) -> Path:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    library = Tokenizer(models.WordPiece({p: i for i, p in enumerate(PIECES)}, unk_token="[UNK]"))
    library.normalizer, library.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    library.add_special_tokens(SPECIALS)
    library.enable_truncation(3)
    library.enable_padding(length=3)
    library.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
def test_wordpiece_gives_the_ids_of_the_original_code():
    with tarfile.open(DATA / "tasks.tar.xz") as archive:
        lines = archive.extractfile("tasks/tokenization/bert_uncased_vectors.jsonl").read().decode().splitlines()
    rows = [json.loads(line) for line in lines]
    tokenizer = load_tokenizer(DATA / "vocab_uncased.txt")
    assert len(rows) == 1098
    assert [row["text"] for row in rows if tokenizer.encode(row["text"]) != row["ids"]] == []
    batch = tokenizer.encode_batch([row["text"] for row in rows])
    assert all(ids.tolist() == row["ids"] for ids, row in zip(batch, rows, strict=True))


def test_wordpiece_lowercases_strips_accents_and_finds_the_longest_piece(vocab):
    tokenizer = load_tokenizer(vocab)
    pieces = [tokenizer.token(i) for i in tokenizer.encode("UNwantéd,running\tΟΔΟΣ\nxyz")]  # noqa: RUF001
    assert pieces == ["un", "##want", "##ed", ",", "run", "##ning", *GREEK[:4], "[UNK]"]    # final sigma
    assert tokenizer.encode("a" * 201) == [tokenizer.unk_id]
    for lowercase, strip, text, known in [(True, "no", "wantéd", False), (False, "yes", "unwantéd", True),
                                          (False, "auto", "UN", False), (False, "auto", "un", True),
                                          (False, "auto", "unwantéd", False)]:
        ids = load_tokenizer(vocab, lowercase, strip).encode(text)
        assert (tokenizer.unk_id not in ids) == known, (lowercase, strip, text)


def test_specials_written_in_the_text_stay_text(vocab, trained, tmp_path):
    text = "[MASK] a [CLS] [SEP] [PAD] [UNK]"
    assert [load_tokenizer(vocab).token(i) for i in load_tokenizer(vocab).encode("[MASK]")] == ["[", "mask", "]"]
    for tokenizer in (load_tokenizer(vocab), trained, load_tokenizer(json_file(tmp_path))):
        special = {tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id}
        assert len(special) == 4 and not special & set(tokenizer.encode(text))


def test_trained_model_has_the_specials_first_and_is_deterministic(trained):
    assert (trained.pad_id, trained.unk_id, trained.cls_id, trained.sep_id, trained.mask_id) == (0, 1, 2, 3, 4)
    assert [trained.token(i) for i in range(5)] == SPECIALS and trained.vocab_size == 80
    assert trained.fingerprint == train_sentencepiece(CORPUS, 80).fingerprint
    assert trained.fingerprint != train_sentencepiece(CORPUS, 70).fingerprint
    assert trained.encode("THE QUICK FOX") == trained.encode("the quick fox")
    assert trained.unk_id in trained.encode("the 漢 fox")
    assert trained.decode([2, *trained.encode("The quick fox"), 4, 3, 0]) == "[CLS] the quick fox [MASK] [SEP]"
    cased = train_sentencepiece(CORPUS, 80, lowercase=False)
    assert cased.encode("THE QUICK FOX") != cased.encode("the quick fox")


def test_a_corpus_too_small_for_the_vocabulary_gives_fewer_pieces_and_one_too_rich_says_how_many():
    assert 5 < train_sentencepiece(["hello world"], 4096).vocab_size < 40
    with pytest.raises(UserError, match=r"data.vocab_size=64 is too small.*give at least \d\d"):
        train_sentencepiece(["".join(map(chr, range(0x4E00, 0x4E80)))], 64)
    with pytest.raises(UserError, match=r"data\.vocab_size=64"):
        train_sentencepiece([], 64)


def test_a_tokenizer_is_rebuilt_exactly_from_its_files(vocab, trained, tmp_path):
    text = "Unwanted running, of the quick fox [MASK] é"
    for tokenizer in (load_tokenizer(vocab, strip_accents="no"), trained, load_tokenizer(json_file(tmp_path))):
        tokenizer.save(tmp_path / "saved")
        copies = [load_tokenizer(tmp_path / "saved"), tokenizer_from_files(tokenizer.files()),
                  pickle.loads(pickle.dumps(tokenizer))]
        for copy in copies:
            assert copy.fingerprint == tokenizer.fingerprint and copy.encode(text) == tokenizer.encode(text)
        for file in (tmp_path / "saved").iterdir():
            file.unlink()
    assert load_tokenizer(vocab).fingerprint != load_tokenizer(vocab, lowercase=False).fingerprint


def test_tokenizer_json_is_neither_cut_nor_padded_and_equals_its_vocabulary_file(vocab, tmp_path):
    from_json, from_vocab = load_tokenizer(json_file(tmp_path)), load_tokenizer(vocab)
    for text in ("a", "unwanted, running a mask", "", "  \n", "[MASK]"):
        assert from_json.encode(text) == from_vocab.encode(text)


def test_the_word_cache_changes_no_id(vocab, monkeypatch):
    from electra_jax.data import tokenizer as module
    rng = np.random.default_rng(0)
    letters = np.array(list("unwantedrig ,\t\n[]Éé\u00a0\u2028\x85\x1c漢"))
    texts = ["".join(rng.choice(letters, 300)) for _ in range(50)]
    reference = load_tokenizer(vocab)
    whole = [list(reference._backend._encode_words([text])[0]) for text in texts]
    assert [ids.tolist() for ids in reference.encode_batch(texts)] == whole
    monkeypatch.setattr(module, "_CACHED_WORDS", 3)
    small = load_tokenizer(vocab)
    assert [small.encode(text) for text in texts] == whole


@pytest.mark.parametrize("missing", SPECIALS)
def test_a_vocabulary_without_a_special_is_refused_by_file_and_piece(vocab, missing):
    vocab.write_text("\n".join(p for p in PIECES if p != missing))
    with pytest.raises(UserError) as error:
        load_tokenizer(vocab)
    assert str(vocab) in str(error.value) and missing in str(error.value) and "\n" not in str(error.value)


def foreign_model(folder: Path, **options) -> Path:
    import sentencepiece
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(CORPUS).split("\n")), model_prefix=str(folder / "foreign"), vocab_size=70,
        minloglevel=2, **options)
    return folder / "foreign.model"


def test_a_foreign_sentencepiece_model_works_when_it_has_the_specials_in_any_usual_spelling(tmp_path):
    # As ALBERT's: [MASK] is a user-defined symbol there, which text can produce.
    file = foreign_model(tmp_path, pad_id=0, unk_id=1, bos_id=-1, eos_id=-1, control_symbols="[CLS],[SEP]",
                         user_defined_symbols="[MASK]")
    tokenizer = load_tokenizer(file)
    assert tokenizer.token(tokenizer.pad_id) == "<pad>" and tokenizer.token(tokenizer.mask_id) == "[MASK]"
    assert tokenizer.mask_id not in tokenizer.encode("the [MASK] fox")
    assert tokenizer.unk_id in tokenizer.encode("the [MASK] fox")
    with pytest.raises(UserError, match=r"foreign.model has no piece \[PAD\]"):
        load_tokenizer(foreign_model(tmp_path))
    plain = foreign_model(tmp_path, pad_id=3, control_symbols="<mask>", normalization_rule_name="identity")
    assert load_tokenizer(plain).encode("the\nfox") == load_tokenizer(plain).encode("the fox")


@pytest.mark.parametrize(("name", "data", "hint"), [
    ("a.model", b"nonsense", "not a SentencePiece model"), ("a.json", b"{", "not a tokenizer.json"),
    ("a.txt", b"\xff\xfe", "not UTF-8"), ("a.bin", b"", "must end in"), ("a.model", None, "cannot be read")])
def test_a_file_that_is_no_tokenizer_is_one_line(tmp_path, name, data, hint):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path / name)
    assert hint in str(error.value) and name in str(error.value) and "\n" not in str(error.value)
