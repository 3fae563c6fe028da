"""Tokenizers to and from Hugging Face folders: the same ids for any text on both sides.

Written folders load with `AutoTokenizer` of transformers 4.57 and 5.x beside a config.json of model type "electra".
Two things differ by intent. A special token spelled out in a text ("Paris is [MASK].") is a special token there, as
fill-mask users expect, and ordinary text here; `AutoTokenizer.from_pretrained(..., split_special_tokens=True)` makes
it ordinary text there too. And a decoded WordPiece text is tidied there ("it's", not "it ' s").

One thing differs by necessity, in 5 of 20,000 lines at 2,000 pieces: where "0" + "00" and "00" + "0" score the same,
SentencePiece's sums of 32-bit floats over the line decide, which the 64-bit sums there do not repeat.
"""

import base64
import functools
import hashlib
import itertools
import json
import struct
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from electra_jax.config import UserError
from electra_jax.data.tokenizer import EXPORT_KEY, OPTIONS_FILE, Tokenizer, load_tokenizer

_UNIGRAM = 1                                                         # trainer_spec.model_type
_NORMAL, _USER_DEFINED, _BYTE = 1, 4, 6                              # types of a SentencePiece piece
_NONCHARACTERS = [*map(chr, range(0xFDD0, 0xFDF0)), *map(chr, range(0xF0000, 0xF1000))]    # and private ones
# Python's rule for a final sigma: after a cased letter, not before one, case-ignorable characters skipped.
_FINAL_SIGMA = r"(?<=\p{Cased}\p{Case_Ignorable}*)Σ(?!\p{Case_Ignorable}*\p{Cased})"
_BERT_CLASSES = ("", "Bert", "BertFast", "Electra", "ElectraFast")   # which obey do_lower_case over tokenizer.json
_BERT_WORD_CHARS = 100                                               # their longest word


def huggingface_files(tokenizer: Tokenizer, max_length: int) -> dict[str, bytes]:
    """Returns the tokenizer's files of a Hugging Face folder by name.

    They are tokenizer.json, tokenizer_config.json, special_tokens_map.json, the vocabulary or model as it was
    (vocab.txt or spiece.model) and electra_tokenizer.json, by which `from_huggingface` gives back this very tokenizer.
    Sequences are [CLS] A [SEP] and [CLS] A [SEP] B [SEP], token types 0 and 1, padded on the right.

    Raises UserError for a SentencePiece model that is not a unigram model or whose rules tokenizer.json cannot express.
    """
    kind, data, options = _source(tokenizer)
    if kind == "json":
        library = _with_post_processor(data, tokenizer)
    else:
        build = _wordpiece if kind == "wordpiece" else _unigram
        library = _dump(build(data, options, tokenizer))
    specials = {f"{name}_token": tokenizer.token(getattr(tokenizer, f"{name}_id"))
                for name in ("unk", "sep", "pad", "cls", "mask")}
    config = {
        # The one class that both versions load with tokenizer.json as it is: 5.x builds Bert's and Electra's anew.
        "tokenizer_class": "PreTrainedTokenizerFast", **specials, "model_max_length": max_length,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"], "padding_side": "right",
        "truncation_side": "right", "clean_up_tokenization_spaces": False, "split_special_tokens": False}
    if kind == "wordpiece":
        config |= {"do_lower_case": options["lowercase"], "strip_accents": options["strip_accents"],
                   "tokenize_chinese_chars": True}
    files = {"tokenizer.json": library, "tokenizer_config.json": _dump(config),
             "special_tokens_map.json": _dump(specials)}
    source = {"wordpiece": "vocab.txt", "sentencepiece": "spiece.model", "json": "tokenizer.json"}[kind]
    files.setdefault(source, data)
    if files[source] == data:    # not when a post-processor was added: then tokenizer.json is another file
        export = {"source": source, "tokenizer_json_sha256": hashlib.sha256(library).hexdigest()}
        files[OPTIONS_FILE] = _dump({"kind": kind, **options, EXPORT_KEY: export})
    return files


def from_huggingface(folder) -> Tokenizer:
    """Loads the tokenizer of a Hugging Face folder; its ids are `AutoTokenizer`'s with add_special_tokens=False.

    A folder that `huggingface_files` wrote gives back the tokenizer it was written from, unless its tokenizer.json was
    changed since. Otherwise tokenizer.json counts, else vocab.txt with the rules of tokenizer_config.json, else
    spiece.model. Raises UserError where there is none of them, or one that cannot be read.
    """
    folder = Path(folder).expanduser()
    if (folder / OPTIONS_FILE).is_file():
        return load_tokenizer(folder)    # compares tokenizer.json with the recorded one
    config = _read_json(folder / "tokenizer_config.json")
    lowercase = config.get("do_lower_case", True)
    accents = config.get("strip_accents")
    rules = {"type": "BertNormalizer", "clean_text": True, "lowercase": lowercase, "strip_accents": accents,
             "handle_chinese_chars": config.get("tokenize_chinese_chars", True)}
    if (folder / "tokenizer.json").is_file():
        library = _read_json(folder / "tokenizer.json")
        name = (config.get("tokenizer_class") or "").replace("Tokenizer", "")
        normalizer = library.get("normalizer") or {}
        if name in _BERT_CLASSES and normalizer.get("type") == "BertNormalizer" and any(
                normalizer.get(key) != rules[key] for key in ("lowercase", "strip_accents", "handle_chinese_chars")):
            return Tokenizer("json", _dump(library | {"normalizer": normalizer | rules}), {}, str(folder))
        return load_tokenizer(folder / "tokenizer.json")
    if (folder / "vocab.txt").is_file():
        original = load_tokenizer(folder / "vocab.txt", lowercase, "auto" if accents is None else
                                  "yes" if accents else "no")
        # Hugging Face's rules: words to 100 characters, no final sigma, Chinese characters apart only if asked.
        library = _wordpiece(b"", {"lowercase": lowercase, "strip_accents": accents}, original)
        library["model"]["max_input_chars_per_word"] = _BERT_WORD_CHARS
        return Tokenizer("json", _dump(library | {"normalizer": rules}), {}, str(folder))
    for name in ("spiece.model", "spm.model", "tokenizer.model", "sentencepiece.bpe.model"):
        if (folder / name).is_file():
            return load_tokenizer(folder / name)
    raise UserError(f"{folder} has no tokenizer.json, vocab.txt or spiece.model: give the folder of a Hugging Face "
                    "model with its tokenizer.")


def _source(tokenizer: Tokenizer) -> tuple[str, bytes, dict]:
    """Returns the tokenizer's kind, its vocabulary or model file, and its options."""
    files = tokenizer.files()
    options = json.loads(files.pop(OPTIONS_FILE))
    [data] = files.values()
    return options.pop("kind"), data, options


def _wordpiece(data: bytes, options: dict, tokenizer: Tokenizer) -> dict:
    """tokenizer.json of BERT's WordPiece as `data.tokenizer` does it."""
    normalizers = [{"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                    "strip_accents": options["strip_accents"], "lowercase": options["lowercase"]}]
    if options["lowercase"]:    # the library lower-cases letter by letter, the original whole words
        normalizers.insert(0, _replace(_FINAL_SIGMA, "ς"))
    vocabulary = {}
    for i in range(tokenizer.vocab_size):
        vocabulary.setdefault(tokenizer.token(i), i)
    return _library(
        tokenizer, normalizers, {"type": "BertPreTokenizer"}, {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "WordPiece", "unk_token": tokenizer.token(tokenizer.unk_id), "continuing_subword_prefix": "##",
         "max_input_chars_per_word": 200, "vocab": vocabulary})


def _unigram(data: bytes, options: dict, tokenizer: Tokenizer) -> dict:
    """tokenizer.json of a SentencePiece unigram model. Raises UserError for what it cannot express."""
    import sentencepiece
    trainer, rules, pieces = _read_model(data)
    # Numbers are the fields' in sentencepiece_model.proto: model_type, treat_whitespace_as_suffix, escape_whitespaces.
    if trainer.get(3, _UNIGRAM) != _UNIGRAM or trainer.get(24, 0) or not rules.get(5, 1):
        raise UserError("data.tokenizer: only SentencePiece unigram models that mark white space before each word can "
                        "be written for Hugging Face: train one with data.tokenizer=train.")
    prefix, tidy = bool(rules.get(3, 1)), bool(rules.get(4, 1))    # add_dummy_prefix, remove_extra_whitespaces
    table = _charsmap(rules.get(2, b""))
    scores = {piece: score for piece, score, kind in pieces if kind == _NORMAL}
    known = set().union(*scores)
    normalizers = _charsmap_normalizers(rules[2], table, known, prefix and tidy) if table else []
    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    if model.unk_id() in model.encode("a\na"):    # as `data.tokenizer` does
        normalizers.insert(0, _replace("\n", " "))
    if tidy:
        normalizers += [_replace(" {2,}", " "), _replace(r"[ ▁]+\z", "")]
    if prefix:    # Metaspace below adds none where one seems to be there
        normalizers.append(_replace(r"\A(?=▁)" if tidy else r"\A(?=[ ▁])", "▁"))
    elif tidy:
        normalizers.append(_replace(r"\A +", ""))
    # Pieces that no text may produce have to lose against all others; the unknown is scored below the lowest. That
    # changes nothing where each character of a piece is a piece too, as in all models that were not edited.
    lowest = min(scores.values()) - 1000.0 if known <= set(scores) else 0.0
    special = {tokenizer.token(i) for i in _special_ids(tokenizer)}
    vocabulary = []
    for piece, score, kind in pieces:
        if kind == _USER_DEFINED and piece not in special:
            score = -0.1    # nothing beats it in SentencePiece either
            if any(c in table for c in piece):
                raise UserError(f"data.tokenizer: the model's normalisation changes its user-defined piece {piece!r}, "
                                "which tokenizer.json cannot express: train a model with data.tokenizer=train.")
        vocabulary.append([piece, score if kind == _NORMAL or score == -0.1 else lowest])
    # Word by word, which gives users word ids, unless a piece goes across words or unknown words would become one.
    split = "▁" in scores and not any("▁" in piece[1:] for piece in scores)
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first" if prefix else "never", "split": split}
    return _library(tokenizer, normalizers, space, space,
                    {"type": "Unigram", "unk_id": model.unk_id(), "vocab": vocabulary,
                     "byte_fallback": any(kind == _BYTE for *_, kind in pieces)})


def _special_ids(tokenizer: Tokenizer) -> list[int]:
    return sorted({tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id})


def _library(tokenizer: Tokenizer, normalizers: list, pre_tokenizer: dict, decoder: dict, model: dict) -> dict:
    added = [{"id": i, "content": tokenizer.token(i), "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for i in _special_ids(tokenizer)]
    one = len(normalizers) == 1
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": normalizers[0] if one else {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": pre_tokenizer, "post_processor": _post_processor(tokenizer), "decoder": decoder,
            "model": model}


def _post_processor(tokenizer: Tokenizer) -> dict:
    cls, sep = tokenizer.token(tokenizer.cls_id), tokenizer.token(tokenizer.sep_id)

    def special(token, segment):
        return {"SpecialToken": {"id": token, "type_id": segment}}

    def text(name, segment):
        return {"Sequence": {"id": name, "type_id": segment}}
    single = [special(cls, 0), text("A", 0), special(sep, 0)]
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, text("B", 1), special(sep, 1)],
            "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}
                               for token, i in ((cls, tokenizer.cls_id), (sep, tokenizer.sep_id))}}


def _with_post_processor(data: bytes, tokenizer: Tokenizer) -> bytes:
    library = json.loads(data)
    if library.get("post_processor"):
        return data
    return _dump(library | {"post_processor": _post_processor(tokenizer)})


def _charsmap_normalizers(blob: bytes, table: dict[str, str], known: set[str], spaced: bool) -> list[dict]:
    """A SentencePiece table of replacements as normalizers of tokenizer.json.

    SentencePiece takes the longest key at each place. The library's own Precompiled takes the shortest at the start of
    each grapheme of fewer than six bytes and drops the rest of it ("E" + acute gives "e"), and sees no key that
    spans longer ones. It is right for characters on their own, and so it gets them: a mark `alone` comes before each
    that would join a grapheme. All longer keys of the Unicode tables are compositions, which NFC does afterwards; a
    mark `apart` keeps NFC from composing or reordering what no key has side by side. `known` are the characters of the
    pieces, `spaced` says that a leading space equals none. Raises UserError for other keys.
    """
    from tokenizers import normalizers
    nfc = functools.cache(normalizers.NFC().normalize_str)    # of an older Unicode than Python's
    # Noncharacters that mark places; in a text they become one that no piece has.
    apart, alone, iota, dotted_i, nowhere = [c for c in _NONCHARACTERS if c not in known and c not in table][:5]
    before, after = defaultdict(set), defaultdict(set)    # character -> those before, after it within a key
    for key in table:
        for left, right in itertools.pairwise(key):
            before[right].add(left)
            after[left].add(right)
    groups, stray = defaultdict(list), defaultdict(set)
    for middle, lefts in before.items():
        groups[frozenset(lefts)].append(middle)
        for left, right in itertools.product(lefts, after.get(middle, ())):
            if left + middle + right not in table:    # two pairs of keys, yet not a key
                pair, last = nfc(table.get(left, left) + table.get(middle, middle)), table.get(right, right)
                if nfc(pair + last) != pair + last:
                    stray[middle, right].add(left)
    marks = [c for c in map(chr, range(0x110000))
             if c not in before and unicodedata.combining(table.get(c, c)[:1] or c)]
    cases = [f"(?={_regex_class(marks)})"]
    cases += [f"(?<!{_regex_class(lefts)})(?={_regex_class(rights)})" for lefts, rights in groups.items()]
    cases += [f"(?<={_regex_class(lefts)}{middle})(?={right})" for (middle, right), lefts in stray.items()]
    # Not at the beginning: the library panics in Precompiled where something was put before the first character.
    steps = [_replace(f"[{apart}{alone}{iota}{dotted_i}]", nowhere),
             _replace(rf"(?!\A)(?={_regex_class([*before, *marks])})(?:{'|'.join(cases)})", apart)]
    if deleted := [key for key, value in table.items() if not value and len(key) == 1]:
        if spaced:    # Metaspace does not know a beginning whose first character is gone
            steps.append(_replace(rf"\A{_regex_class(deleted)}+", " "))
        steps.append(_replace(_regex_class(deleted), ""))    # Precompiled panics where a text begins with one
    restored = []
    if "\u0345" in table and "\u0345" in before:
        # Case folding makes an iota of the iota subscript, yet not where it composes.
        steps.append(_replace(f"(?<={_regex_class(before[chr(0x345)])})\u0345", iota))
        restored.append(_replace(iota, "\u0345"))
    capitals = [c for c in before.get("\u0307", ()) if table.get(c) == "i" and table.get(c + "\u0307") == "\u0130"]
    if capitals:    # nor does it reach I with a dot, which it leaves as a capital
        steps.append(_replace(f"{_regex_class(capitals)}(?=\u0307)", dotted_i))
        restored.append(_replace(dotted_i, "I"))
    for key, value in table.items():
        if len(key) < 2 or (key[1:] == "\u0307" and key[0] in capitals):
            continue
        composed = nfc("".join(c if c == "\u0345" else table.get(c, c) for c in key))
        if composed != value and known & {*value, *table.get(key[0], key[0])}:    # else a script unknown to the model
            raise UserError(f"data.tokenizer: the model's own normalisation turns {key!r} into {value!r}, which "
                            "tokenizer.json cannot express: train a model with data.tokenizer=train.")
    # All that is no letter, number, punctuation, symbol or space, for later Unicodes too; and those that still join.
    joining = (r"(?!\A)(?=[^\p{L}\p{N}\p{P}\p{S}\p{Z}]|[\x{e33}\x{eb3}\x{ff9e}\x{ff9f}\x{1f3fb}-\x{1f3ff}])"
               r"|(?<=\r)(?=\n)")
    single = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(blob).decode()}
    return [*steps, _replace(joining, alone), single, _replace(alone, ""), *restored, {"type": "NFC"},
            _replace(apart, "")]


@functools.lru_cache(2)
def _charsmap(blob: bytes) -> dict[str, str]:
    """Returns SentencePiece's precompiled table: what each sequence of characters becomes.

    It is a double-array trie of UTF-8 keys, in 32-bit units after their length in bytes, then the values, each ended
    by a zero byte. https://github.com/s-yata/darts-clone has the bits of a unit.
    """
    if not blob:
        return {}
    size, = struct.unpack_from("<I", blob)
    units, values = struct.unpack_from(f"<{size // 4}I", blob, 4), blob[4 + size:]

    def below(at: int) -> int:    # a child lies at this index, its byte put in by exclusive or
        return at ^ (units[at] >> 10 << (units[at] >> 6 & 8))
    children = defaultdict(list)
    for at, unit in enumerate(units):
        if 0 < unit & 0x800000FF < 256:
            children[at ^ unit & 255].append(at)
    table, nodes = {}, [(below(0), b"")]
    while nodes:
        place, key = nodes.pop()
        for at in children.get(place, ()):
            longer = key + bytes([units[at] & 255])
            nodes.append((below(at), longer))
            if units[at] >> 8 & 1:    # a key ends here
                start = units[below(at)] & 0x7FFFFFFF
                table[longer.decode()] = values[start:values.index(b"\0", start)].decode()
    return table


def _read_model(data: bytes) -> tuple[dict, dict, list[tuple[str, float, int]]]:
    """Returns a SentencePiece model's trainer and normalizer fields by number, and its (piece, score, type)s."""
    trainer, rules, pieces = {}, {}, []
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            pieces.append((piece.get(1, b"").decode(), piece.get(2, 0.0), piece.get(3, _NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            rules = dict(_fields(value))
    return trainer, rules, pieces


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yields the (number, value)s of a protobuf message, which takes 20 lines, not a dependency."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte, at = message[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
    while at < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
        elif wire == 2:
            size = varint()
            yield number, message[at:at + size]
            at += size
        else:
            layout, size = ("<f", 4) if wire == 5 else ("<d", 8)
            yield number, struct.unpack_from(layout, message, at)[0]
            at += size


def _regex_class(characters: Iterable[str]) -> str:
    """Returns a regular expression's class of these characters, runs as ranges."""
    runs: list[list[int]] = []
    for c in sorted(map(ord, characters)):
        if runs and runs[-1][1] == c - 1:
            runs[-1][1] = c
        else:
            runs.append([c, c])
    return "[" + "".join(f"\\x{{{a:x}}}" if a == b else f"\\x{{{a:x}}}-\\x{{{b:x}}}" for a, b in runs) + "]"


def _replace(pattern: str, content: str) -> dict:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _dump(value) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}): restore it.") from error
