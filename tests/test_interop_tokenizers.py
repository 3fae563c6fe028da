"""Hugging Face folders give our ids, and their tokenizers ours: read by the `tokenizers` library, by both transformers.

The two sides may differ in one way: where two segmentations of a word score the same, SentencePiece's sums of 32-bit
floats decide, and the library's of 64-bit ones. `untied` leaves such lines out, and the tests count them.
"""

import functools
import io
import itertools
import json
import lzma
import random
import tarfile
import unicodedata
from pathlib import Path

import pytest

from electra_jax.config import UserError
from electra_jax.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from electra_jax.interop.tokenizers import from_huggingface, huggingface_files

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LINES = (Path(__file__).parent / "data" / "multilingual.txt").read_bytes().decode().split("\n")[:-1]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = sorted({c for line in LINES for c in line.lower() if c.isalnum()})
PIECES = [*SPECIALS, *"[],.!?'’-", "un", "##want", "##ed", "the", "##in", *LETTERS, *("##" + c for c in LETTERS)]  # noqa: RUF001


@functools.cache
def exported(fingerprint: str, tokenizer) -> dict[str, bytes]:
    return huggingface_files(tokenizer, 512)


def files_of(tokenizer) -> dict[str, bytes]:
    return exported(tokenizer.fingerprint, tokenizer)


def library(tokenizer, specials_are_text=True):
    from tokenizers import Tokenizer as Library
    read = Library.from_str(files_of(tokenizer)["tokenizer.json"].decode())
    read.encode_special_tokens = specials_are_text
    return read


def different(tokenizer, lines, read=None) -> list[str]:
    theirs = (read or library(tokenizer)).encode_batch(lines, add_special_tokens=False)
    ours = tokenizer.encode_batch(lines)
    return [line for line, a, b in zip(lines, theirs, ours, strict=True) if a.ids != b.tolist()]


def untied(tokenizer, lines) -> list[str]:
    """Those of `lines`, all segmented differently by both sides, in which the scores differ too."""
    import sentencepiece
    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.files()["tokenizer.model"])
    read, out = library(tokenizer), []
    for line in lines:
        a, b = read.encode(line, add_special_tokens=False).ids, tokenizer.encode(line)
        unknown = a.count(tokenizer.unk_id) == b.count(tokenizer.unk_id)
        if not unknown or read.decode(a) != read.decode(b) or abs(
                sum(map(model.get_score, a)) - sum(map(model.get_score, b))) > 1e-3:
            out.append(line)
    return out


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "config.json").write_text('{"model_type": "electra"}')
    return folder


@pytest.fixture
def vocab(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    return tmp_path / "source" / "vocab.txt"


@pytest.fixture(scope="module", params=["lower", "cased", "half"])
def trained(request):
    """Models that know all of the text's scripts, in lower case or not, or only those of every other line."""
    lines = LINES[::2] if request.param == "half" else LINES
    return train_sentencepiece(lines, 1500, lowercase=request.param != "cased")


def foreign(**options) -> Tokenizer:
    import sentencepiece
    model = io.BytesIO()
    options = {"vocab_size": 1400, "unk_id": 1, "bos_id": -1, "eos_id": -1, "pad_id": 0, "pad_piece": "[PAD]",
               "unk_piece": "[UNK]", "control_symbols": ["[CLS]", "[SEP]", "[MASK]"]} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=model, minloglevel=2,
                                             hard_vocab_limit=False, **options)
    return Tokenizer("sentencepiece", model.getvalue(), {}, "a model by others")


@pytest.mark.parametrize(("lowercase", "accents"), [(True, "auto"), (True, "no"), (False, "auto"), (False, "yes")])
def test_wordpiece_gives_the_same_ids_in_every_script_final_sigma_included(vocab, lowercase, accents):
    tokenizer = load_tokenizer(vocab, lowercase, accents)
    assert different(tokenizer, [*LINES, "ΟΔΟΣ ΑΣ' 'Σ Σ ΑΣ.Α α" + "Σ" * 9]) == []  # noqa: RUF001
    assert "ς" in LETTERS and len(LINES) >= 300


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
def test_wordpiece_of_bert_gives_the_ids_of_the_original_code():
    with tarfile.open(DATA / "tasks.tar.xz") as archive:
        rows = archive.extractfile("tasks/tokenization/bert_uncased_vectors.jsonl").read().decode().splitlines()
    rows = [json.loads(row) for row in rows]
    read = library(load_tokenizer(DATA / "vocab_uncased.txt"))
    assert len(rows) == 1098
    assert [r["text"] for r in rows if read.encode(r["text"], add_special_tokens=False).ids != r["ids"]] == []


def test_sentencepiece_gives_the_same_ids_in_every_script(trained):
    lines = different(trained, LINES)
    assert untied(trained, lines) == []
    assert len(lines) <= 8 and all(len(line) > 50 for line in lines)    # runs of one letter


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize("lowercase", [True, False])
def test_sentencepiece_gives_the_same_ids_on_20000_lines_of_an_encyclopaedia(lowercase):
    lines = []
    for name in ("valid-enwiki", "train-enwiki-00"):
        with lzma.open(DATA / f"{name}.txt.xz", "rt", encoding="utf-8", newline="\n") as file:
            lines += [line.rstrip("\n")[:400] for line in itertools.islice(file, 20_000 - len(lines))]
    tokenizer = train_sentencepiece(lines[:4000], 2000, lowercase=lowercase)
    found = different(tokenizer, lines)
    assert len(lines) == 20_000 and untied(tokenizer, found) == [] and len(found) <= 12
    assert any(tokenizer.unk_id in ids for ids in tokenizer.encode_batch(lines))


@pytest.mark.parametrize("options", [
    {"normalization_rule_name": "nfkc_cf"}, {"normalization_rule_name": "identity", "vocab_size": 2500},
    {"byte_fallback": True, "vocab_size": 2500}, {"add_dummy_prefix": False},
    {"remove_extra_whitespaces": False, "normalization_rule_name": "identity", "vocab_size": 2500},
    {"split_by_whitespace": False},
    {"user_defined_symbols": ["<br>", "xx"], "normalization_rule_name": "nfkc"}], ids=str)
def test_sentencepiece_models_by_others_give_the_same_ids(options):
    tokenizer = foreign(**options)
    found = different(tokenizer, [*LINES, "a<br>b <br> xxx", "xx", "x ▁", "▁", " ▁▁x "])
    assert untied(tokenizer, found) == [] and len(found) <= 8


def test_normalisation_equals_sentencepieces_for_its_table_and_for_random_strings():
    import sentencepiece

    from electra_jax.interop.tokenizers import _charsmap, _read_model
    tokenizer = train_sentencepiece(["the quick brown fox"], 40)
    data = tokenizer.files()["tokenizer.model"]
    model, read = sentencepiece.SentencePieceProcessor(model_proto=data), library(tokenizer).normalizer
    keys = list(_charsmap(_read_model(data)[1][2]))
    assert len(keys) > 200_000 and {len(key) for key in keys} == {1, 2, 3, 4}
    rng = random.Random(0)
    old = [key for key in keys if all(ord(c) < 0x10000 for c in key)]    # the library's NFC is older
    marks = [chr(c) for c in range(0x10000) if unicodedata.combining(chr(c))]
    some = "abEI\u0391\u03c9\u03b9. \u200d\u00ad\n\r\x01▁"
    kinds = [[k for k in old if len(k) > 1], [k for k in old if len(k) == 1], marks, some, LINES]
    texts = rng.sample(old, 3000) + ["".join(rng.choice(rng.choice(kinds)) for _ in range(8)) for _ in range(1000)]

    def theirs(text):
        text = read.normalize_str(text).replace(" ", "▁")
        return text if not text or text.startswith("▁") else "▁" + text    # the pre-tokenizer's work
    nonchars = {c: None for c in range(0xFDD0, 0xFDF0)}    # any is any unknown
    wrong = [t for t in texts if theirs(t).translate(nonchars) != model.normalize(t).translate(nonchars)]
    assert wrong == []


def test_specials_in_a_text_are_special_there_by_default_and_text_on_demand(trained, vocab):
    for tokenizer in (trained, load_tokenizer(vocab)):
        text = "the [MASK] in [CLS] the [SEP] [PAD] [UNK]"
        there = library(tokenizer, specials_are_text=False).encode(text, add_special_tokens=False)
        assert {"[MASK]", "[CLS]", "[SEP]", "[PAD]"} <= set(there.tokens)
        assert not {tokenizer.mask_id, tokenizer.cls_id, tokenizer.sep_id} & set(tokenizer.encode(text))
        assert different(tokenizer, [text]) == []
        tokens = library(tokenizer, False).encode("the [MASK]. the", add_special_tokens=False).tokens
        the = library(tokenizer).encode("the", add_special_tokens=False).tokens
        assert tokens == [*the, "[MASK]", ".", *the]    # no space between [MASK] and the full stop


def test_sequences_have_cls_sep_and_token_types(trained, vocab):
    for tokenizer in (trained, load_tokenizer(vocab)):
        cls, sep, a, b = tokenizer.cls_id, tokenizer.sep_id, tokenizer.encode("the"), tokenizer.encode("in the")
        pair, one = library(tokenizer).encode("the", "in the"), library(tokenizer).encode("the")
        assert one.ids == [cls, *a, sep] and set(one.type_ids) == {0}
        assert pair.ids == [cls, *a, sep, *b, sep]
        assert pair.type_ids == [0] * (len(a) + 2) + [1] * (len(b) + 1)
        config = json.loads(huggingface_files(tokenizer, 77)["tokenizer_config.json"])
        assert config["model_max_length"] == 77 and config["pad_token"] == "[PAD]"


def test_what_tokenizer_json_cannot_express_is_refused():
    for options in ({"model_type": "bpe"}, {"treat_whitespace_as_suffix": True}):
        with pytest.raises(UserError, match="unigram models that mark white space before"):
            huggingface_files(foreign(**options), 512)
    with pytest.raises(UserError, match="user-defined piece 'BR'"):
        huggingface_files(foreign(user_defined_symbols=["BR"], normalization_rule_name="nmt_nfkc_cf"), 512)


def test_an_exported_folder_gives_back_its_tokenizer_unless_its_tokenizer_json_was_edited(trained, vocab, tmp_path):
    originals = [trained, load_tokenizer(vocab, lowercase=False, strip_accents="yes")]
    files = huggingface_files(originals[1], 512)
    originals.append(Tokenizer("json", files["tokenizer.json"], {}, "json"))
    for i, tokenizer in enumerate(originals):
        folder = write(tmp_path / str(i), files_of(tokenizer))
        for loaded in (from_huggingface(folder), load_tokenizer(folder)):
            assert loaded.fingerprint == tokenizer.fingerprint and loaded.files() == tokenizer.files()
        edited = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        edited["normalizer"] = {"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"String": "Q"}, "content": "t"}, edited["normalizer"]]}
        assert tokenizer.encode("Qhe") != tokenizer.encode("the")
        (folder / "tokenizer.json").write_text(json.dumps(edited), encoding="utf-8")
        for loaded in (from_huggingface(folder), load_tokenizer(folder)):
            assert loaded.fingerprint != tokenizer.fingerprint
            assert loaded.encode("Qhe") == tokenizer.encode("the") == loaded.encode("the")


def test_a_stored_tokenizer_json_stays_as_it_is_but_gets_a_missing_post_processor(vocab, tmp_path):
    data = huggingface_files(load_tokenizer(vocab), 512)["tokenizer.json"]
    assert huggingface_files(Tokenizer("json", data, {}, ""), 512)["tokenizer.json"] == data
    bare = json.dumps(json.loads(data) | {"post_processor": None}).encode()
    tokenizer = Tokenizer("json", bare, {}, "")
    files = huggingface_files(tokenizer, 512)
    assert library(tokenizer).encode("the").tokens == ["[CLS]", "the", "[SEP]"]
    assert from_huggingface(write(tmp_path / "bare", files)).encode("the [SEP]") == tokenizer.encode("the [SEP]")


FOLDERS = [("vocab", {}), ("vocab", {"do_lower_case": False}), ("vocab", {"strip_accents": False}),
           ("vocab", {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False}),
           ("json", {"tokenizer_class": "ElectraTokenizer"}), ("json", {}),
           ("json", {"tokenizer_class": "BertTokenizer", "do_lower_case": False}),
           ("json", {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False})]


def bert_folder(folder: Path, kind: str, config: dict) -> Path:
    """A folder as others publish it: Hugging Face's own rules, words to 100 characters."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, normalizers, pre_tokenizers
    files = {"tokenizer_config.json": json.dumps(config).encode()}
    if kind == "vocab":
        files["vocab.txt"] = "\n".join(PIECES).encode()
    else:
        read = Library(models.WordPiece({p: i for i, p in enumerate(PIECES)}, unk_token="[UNK]"))
        read.normalizer, read.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        read.add_special_tokens(SPECIALS)
        files["tokenizer.json"] = read.to_str().encode()
    return write(folder, files)


def test_the_rules_beside_a_vocabulary_are_obeyed(tmp_path):
    def known(number, text):
        tokenizer = from_huggingface(bert_folder(tmp_path / str(number), *FOLDERS[number]))
        return tokenizer.unk_id not in tokenizer.encode(text)
    assert [known(i, "THE") for i in range(8)] == [True, False, True, False, True, True, False, True]
    assert [known(i, "unwantéd") for i in range(4)] == [True] * 4    # its letters are pieces too
    one = from_huggingface(tmp_path / "0")
    assert one.encode("é") == one.encode("e") and one.encode("ü" * 100) == one.encode("u" * 100)
    assert one.encode("u" * 101) == [one.unk_id]    # Hugging Face's limit
    kept = from_huggingface(tmp_path / "2")
    assert kept.encode("é") != kept.encode("e")


def test_a_folder_without_a_tokenizer_or_with_a_broken_one_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer.json, vocab.txt or spiece.model"):
        from_huggingface(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer.json is not JSON"):
        from_huggingface(tmp_path)


def test_a_lone_sentencepiece_model_is_found(tmp_path, trained):
    (tmp_path / "spiece.model").write_bytes(trained.files()["tokenizer.model"])
    assert from_huggingface(tmp_path).fingerprint == trained.fingerprint


def test_transformers_loads_our_folders_with_our_ids(trained, vocab, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    for i, tokenizer in enumerate((trained, load_tokenizer(vocab), load_tokenizer(vocab, False))):
        folder = write(tmp_path / str(i), files_of(tokenizer))
        auto = transformers.AutoTokenizer.from_pretrained(folder)
        assert auto.model_max_length == 512 and auto.padding_side == "right" and len(auto) == tokenizer.vocab_size
        assert (auto.pad_token_id, auto.mask_token_id) == (tokenizer.pad_id, tokenizer.mask_id)
        assert auto("the [MASK]")["input_ids"][-2:] == [tokenizer.mask_id, tokenizer.sep_id]
        batch = auto(["the", "the in"], ["in", "the"], padding=True)
        assert batch["input_ids"][0][-1] == tokenizer.pad_id and max(batch["token_type_ids"][1]) == 1
        plain = [line for line in LINES if not any(special in line for special in SPECIALS)]
        split = transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
        for reader, lines in ((auto, plain), (split, LINES)):
            found = [line for line in lines
                     if reader(line, add_special_tokens=False)["input_ids"] != tokenizer.encode(line)]
            assert len(found) <= 8 and (i or not untied(tokenizer, found)) and (i == 0 or not found)
        auto.save_pretrained(tmp_path / "again")
        (tmp_path / "again" / "config.json").write_text('{"model_type": "electra"}')
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
        assert all(again(line)["input_ids"] == auto(line)["input_ids"] for line in LINES)


@pytest.mark.parametrize(("kind", "config"), FOLDERS)
def test_other_folders_give_the_ids_transformers_gives(tmp_path, kind, config):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    folder = bert_folder(tmp_path / "folder", kind, config)
    ours, auto = from_huggingface(folder), transformers.AutoTokenizer.from_pretrained(folder)
    plain = [line for line in LINES if not any(special in line for special in SPECIALS)]
    assert [t for t in plain if auto(t, add_special_tokens=False)["input_ids"] != ours.encode(t)] == []
