"""Every tokenizer gives the original's ids, never a special one from text, and is rebuilt exactly from its files."""

import json
import pickle
import tarfile
import unicodedata
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


def bert_words(text: str, lowercase: bool, strip: bool):
    """BERT's BasicTokenizer, from its description."""
    clean = ""
    for c in text:
        kind, code = unicodedata.category(c), ord(c)
        if c in "\t\n\r" or kind == "Zs":
            clean += " "
        elif any(a <= code <= b for a, b in ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF),
                                             (0x2A700, 0x2B73F), (0x2B740, 0x2CEAF), (0x2F800, 0x2FA1F))):
            clean += f" {c} "
        elif c not in "\0\ufffd" and kind not in ("Cc", "Cf"):
            clean += c
    for word in clean.split():
        word = word.lower() if lowercase else word
        if strip:
            word = "".join(c for c in unicodedata.normalize("NFD", word) if unicodedata.category(c) != "Mn")
        for c in word:
            if unicodedata.category(c)[0] == "P" or (c.isascii() and not c.isalnum()):
                word = word.replace(c, f" {c} ")
        yield from word.split(" ")


def bert_pieces(word: str, vocabulary: dict[str, int]) -> list[int]:
    """Greedy, the longest piece first; a word of over 200 characters, or with no such split, is unknown."""
    ids, start = [], 0
    while start < len(word) <= 200:
        ends = [e for e in range(len(word), start, -1) if "##" * bool(start) + word[start:e] in vocabulary]
        if not ends:
            return [vocabulary["[UNK]"]]
        ids.append(vocabulary["##" * bool(start) + word[start:ends[0]]])
        start = ends[0]
    return ids if len(word) <= 200 else [vocabulary["[UNK]"]]


@pytest.mark.parametrize(("lowercase", "accents", "strip"), [
    (True, "auto", True), (True, "no", False), (False, "auto", False), (False, "yes", True)])
def test_wordpiece_follows_berts_rules_in_every_script_cased_or_not_accents_kept_or_not(
        tmp_path, lowercase, accents, strip):
    lines = (Path(__file__).parent / "data" / "multilingual.txt").read_bytes().decode().split("\n")
    # The library takes characters for private use for control characters and drops them; BERT's code does not.
    lines = [line for line in lines if not any(unicodedata.category(c) == "Co" for c in line)]
    lines += [c * n for c in "ué\u0130漢" for n in (99, 100, 101, 150, 199, 200, 201)]
    words = sorted({w for line in lines for w in (line + " " + line.lower()).split() if w.isalpha()})
    letters = sorted(set("".join(words)) | set("uoe.,'[]()"))
    pieces = [*SPECIALS, *letters[::2], *("##" + c for c in letters), *words[::5], *("##" + w[-3:] for w in words[::3])]
    pieces = list(dict.fromkeys(pieces))
    (tmp_path / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path / "vocab.txt", lowercase, accents)
    ids_of = {piece: i for i, piece in enumerate(pieces)}
    expected = [[i for word in bert_words(line, lowercase, strip) for i in bert_pieces(word, ids_of)] for line in lines]
    assert [line for line, ids in zip(lines, expected, strict=True) if tokenizer.encode(line) != ids] == []
    known = [i for ids in expected for i in ids if i != tokenizer.unk_id]
    assert len(lines) > 300 and len(known) > 2000 and len(set(known)) > 300


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


def test_a_token_added_to_tokenizer_json_may_hold_a_space(vocab, tmp_path):
    from tokenizers import Tokenizer
    library = Tokenizer.from_file(str(json_file(tmp_path)))
    library.no_truncation()
    library.no_padding()
    library.add_tokens(["run un"])
    library.save(str(tmp_path / "tokenizer.json"))
    text = "a run un mask"
    ids = library.encode(text, add_special_tokens=False).ids
    assert library.token_to_id("run un") in ids and load_tokenizer(tmp_path / "tokenizer.json").encode(text) == ids


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


# --- Offsets ------------------------------------------------------------------------------------------


def byte_level(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE({p: i for i, p in enumerate([*SPECIALS, *letters, "th", "Ġth"])},
                                   [("t", "h"), ("Ġ", "th")]))
    library.normalizer, library.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.post_processor = processors.ByteLevel(trim_offsets=False)
    library.save(str(folder / "byte.json"))
    return folder / "byte.json"


ODD = ["", " ", "\n\t ", "the quick fox", "  the\u00a0fox \u2028 x", "UNwantéd,running\tΟΔΟΣ\nΣİΣ Σ.",  # noqa: RUF001
       "e\u0301\u0301t q\u0308u", "ﬁne ﬃ ½ ① ﷺ", "漢字quick 漢", "a\u200bb \x00a\x01 \u0301", "👩\u200d👧 fox 🇬🇷",
       "the [MASK] fox [UNK]", "x" * 300 + " the", "ǅ ŉ ẖ ß ẞ", "한국어 ก็ हिन्दी العربية", "the  fox\r\nquick"]
LETTERS = [*"the quickfoxun ,.\t\nÉéΣσİı[]½ﬁ漢👩\u0301\u0308\u200b\u200d\u00a0\u2028\x85\x1c\ufeff\r", *" " * 8]  # noqa: RUF001


def odd_texts(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return ODD + ["".join(rng.choice(LETTERS, rng.integers(1, 60))) for _ in range(count)]


def test_offsets_come_with_the_same_ids_and_lie_in_order_inside_the_text(vocab, trained, tmp_path):
    foreign = foreign_model(tmp_path, pad_id=3, control_symbols="<mask>", normalization_rule_name="identity")
    tokenizers = [load_tokenizer(vocab), load_tokenizer(vocab, lowercase=False), trained, load_tokenizer(foreign),
                  load_tokenizer(json_file(tmp_path)), load_tokenizer(byte_level(tmp_path))]
    for tokenizer in tokenizers:
        for text in odd_texts(150):
            ids, offsets = tokenizer.encode_with_offsets(text)
            assert ids == tokenizer.encode(text) and len(offsets) == len(ids), (tokenizer._kind, text)
            assert all(0 <= a <= b <= len(text) for a, b in offsets), (tokenizer._kind, text)
            assert offsets == sorted(offsets), (tokenizer._kind, text)
            covered = [text[a:b] for a, b in offsets if a < b]
            assert all(piece == piece.strip(" \n\t\r\u00a0\u200b\ufeff") for piece in covered), (tokenizer._kind, text)


def test_offsets_point_at_the_original_text_whatever_the_normaliser_does(vocab, trained, tmp_path):
    def pieces(tokenizer, text):
        ids, offsets = tokenizer.encode_with_offsets(text)
        return [(tokenizer.token(i), text[a:b]) for i, (a, b) in zip(ids, offsets, strict=True)]

    text = "  UNwante\u0301d,running\tΟΔΟΣ a\u200b İΣ\n[MASK]"  # noqa: RUF001
    words = [("un", "UN"), ("##want", "want"), ("##ed", "e\u0301d"), (",", ","), ("run", "run"), ("##ning", "ning"),
             ("ο", "Ο"), ("##δ", "Δ"), ("##ο", "Ο"), ("##ς", "Σ"),  # noqa: RUF001
             ("a", "a"), ("[UNK]", "İΣ"), ("[", "["), ("mask", "MASK"), ("]", "]")]
    assert pieces(load_tokenizer(vocab), text) == words
    assert pieces(load_tokenizer(vocab), text) == words    # from the cache of words
    assert pieces(load_tokenizer(vocab), "unwanteé")[-1] == ("[UNK]", "unwanteé")
    assert pieces(load_tokenizer(json_file(tmp_path)), "  running é\n[") == [
        ("run", "run"), ("##ning", "ning"), ("[UNK]", "é"), ("[", "[")]

    assert pieces(trained, "  The\u00a0QUICK 漢字 ﬁ") == [
        ("▁", ""), ("the", "The"), ("▁quick", "QUICK"), ("▁", ""), ("[UNK]", "漢字"), ("▁", ""), ("f", ""), ("i", "ﬁ")]
    assert pieces(trained, "a\u200bquick\u200bb")[1:] == [("▁quick", "quick"), ("▁", ""), ("b", "b")]    # no width
    byte = pieces(load_tokenizer(byte_level(tmp_path)), "é the 漢")
    assert ("Ġth", "th") in byte and [shown for _, shown in byte if shown == "漢"] == ["漢"] * 3


def test_an_accent_stays_with_the_letter_before_it(vocab):
    text = "une\u0301 run\u0308\u0301"
    _, offsets = load_tokenizer(vocab).encode_with_offsets(text)
    assert [text[a:b] for a, b in offsets] == ["une\u0301", "run\u0308\u0301"]


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
def test_wordpiece_offsets_go_with_the_ids_of_the_original_code():
    with tarfile.open(DATA / "tasks.tar.xz") as archive:
        lines = archive.extractfile("tasks/tokenization/bert_uncased_vectors.jsonl").read().decode().splitlines()
    rows = [json.loads(line) for line in lines]
    tokenizer = load_tokenizer(DATA / "vocab_uncased.txt")
    for row in rows:
        ids, offsets = tokenizer.encode_with_offsets(row["text"])
        assert ids == row["ids"] and len(offsets) == len(ids), row["text"]
        # A piece of plain letters is the text at its offsets, but for case.
        for i, (a, b) in zip(ids, offsets, strict=True):
            shown = row["text"][a:b]
            assert not (shown.isascii() and shown.isprintable()) or i == tokenizer.unk_id \
                or tokenizer.token(i).removeprefix("##") == shown.lower(), row["text"]
