"""Tokenizers behind one small interface: SentencePiece, BERT's WordPiece and Hugging Face's tokenizer.json.

None of them adds special tokens, and no text ever produces one: the literal "[MASK]" in a document is three
ordinary pieces (or [UNK]), as in the original's code.
"""

import hashlib
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from electra_jax.config import UserError
from electra_jax.data.store import token_dtype, write_atomically

_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_MAX_WORD_CHARS = 200      # longer words are one [UNK]; BERT's own code says 200, many ports 100
_CACHED_WORDS = 400_000    # about 80 MB a process
_LONGEST_CACHED = 64       # characters; longer ones are addresses, or text without spaces: they do not come back
OPTIONS_FILE = "electra_tokenizer.json"
EXPORT_KEY = "huggingface"    # in the options file of a Hugging Face folder: {source, tokenizer_json_sha256}
_SUFFIXES = (".model", ".txt", ".json")
_FILE_OF_KIND = {"sentencepiece": "tokenizer.model", "wordpiece": "vocab.txt", "json": "tokenizer.json"}


class Tokenizer:
    """Text to ids and back.

    Attributes: `vocab_size`, `pad_id`, `unk_id`, `cls_id`, `sep_id`, `mask_id`, and `fingerprint`, the sha256 (hex)
    of everything that determines ids. Rebuild it in another process with `tokenizer_from_files(t.files())`.
    """

    def __init__(self, kind: str, data: bytes, options: dict, name: str):
        """Use `load_tokenizer`, `tokenizer_from_files` or `train_sentencepiece`; `name` is for error messages."""
        self._kind, self._data, self._options = kind, data, options
        self._backend = {"sentencepiece": _SentencePiece, "wordpiece": _WordPiece, "json": _Json}[kind](
            data, options, name)
        self.vocab_size = self._backend.vocab_size
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = _special_ids(self._backend, name)
        self._dtype = token_dtype(self.vocab_size)
        self._special = np.zeros(self.vocab_size, bool)
        self._special[[self.pad_id, self.cls_id, self.sep_id, self.mask_id]] = True
        digest = hashlib.sha256()
        for file, content in sorted(self.files().items()):
            digest.update(f"{file}\0{len(content)}\0".encode() + content)
        self.fingerprint = digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, no specials added."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Returns one array of ids a text, in the smallest unsigned dtype that holds the vocabulary."""
        batch = [np.asarray(ids, self._dtype) for ids in self._backend.encode(texts)]
        for i, ids in enumerate(batch):
            if self._special[ids].any():    # a foreign model may spell specials as ordinary pieces
                batch[i] = np.where(self._special[ids], self._dtype.type(self.unk_id), ids)
        return batch

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns `encode(text)` and (start, end) of the characters of `text` that each token stands for.

        White space at the ends is left out, with or without width; combining accents after the last letter are taken
        in. The span is empty where a token has no character of its own: a lone "▁", or the f of "ﬁ" if two tokens.
        """
        offsets = []
        for start, end in self._backend.offsets(text):
            while start < end and _is_blank(text[start]):
                start += 1
            while start < end and _is_blank(text[end - 1]):
                end -= 1
            while start < end < len(text) and unicodedata.combining(text[end]):
                end += 1
            offsets.append((start, end))
        return self.encode(text), offsets

    def join(self, a: Iterable[int], b: Iterable[int] | None, length: int) -> tuple[list[int], list[int]]:
        """Returns ids and segment ids of [CLS] A [SEP] or [CLS] A [SEP] B [SEP].

        Cut to `length` from the end of the longer text, of B where they are equal, as BERT does.
        """
        a, b = list(a), list(b or ())
        room = length - (3 if b else 2)
        while len(a) + len(b) > room:
            (a if len(a) > len(b) else b).pop()
        first, second = [self.cls_id, *a, self.sep_id], [*b, self.sep_id] if b else []
        return first + second, [0] * len(first) + [1] * len(second)

    def token(self, token_id: int) -> str:
        """Returns the piece as the vocabulary spells it."""
        return self._backend.token(int(token_id))

    def decode(self, ids: Iterable[int]) -> str:
        """Returns readable text: specials by name, padding left out."""
        parts, run = [], []
        for i in [*(int(i) for i in ids), self.pad_id]:
            if self._special[i] or i == self.unk_id:
                parts += [self._backend.decode(run)] * bool(run) + [self.token(i)] * (i != self.pad_id)
                run = []
            else:
                run.append(i)
        return " ".join(parts)

    def files(self) -> dict[str, bytes]:
        """Returns the tokenizer's files by name."""
        return {_FILE_OF_KIND[self._kind]: self._data,
                OPTIONS_FILE: json.dumps({"kind": self._kind, **self._options}, sort_keys=True).encode()}

    def save(self, folder) -> None:
        """Writes the tokenizer's files into `folder`; `load_tokenizer(folder)` reads them."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, data in self.files().items():
            write_atomically(Path(folder) / name, data)

    def __reduce__(self):
        return tokenizer_from_files, (self.files(),)


def load_tokenizer(path, lowercase: bool = True, strip_accents: str = "auto") -> Tokenizer:
    """Loads *.model (SentencePiece), vocab.txt (WordPiece), tokenizer.json, or a folder with one of them.

    `lowercase` and `strip_accents` ("auto", "yes", "no") apply to vocab.txt only: the others carry their own rules.
    Raises UserError for a missing or unreadable file and for a vocabulary without [CLS], [SEP], [MASK], [PAD] or [UNK].
    """
    path = Path(os.path.expanduser(path))    # pathlib's raises for a user that does not exist
    if path.is_dir():
        if (path / OPTIONS_FILE).exists():
            files = {f.name: f.read_bytes() for f in path.iterdir() if f.is_file() and f.suffix in _SUFFIXES}
            if _changed_since_export(files):
                return Tokenizer("json", files["tokenizer.json"], {}, str(path / "tokenizer.json"))
            return tokenizer_from_files(files, str(path))
        found = [path / name for name in ("tokenizer.model", "spiece.model", "spm.model", "tokenizer.json",
                                          "vocab.txt") if (path / name).exists()]
        if not found:
            raise UserError(f"data.tokenizer={path} is a folder without *.model, tokenizer.json or vocab.txt: "
                            "give the path of the file.")
        path = found[0]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"data.tokenizer={path} cannot be read ({error.strerror}): give \"train\" or the path of a "
                        "*.model, vocab.txt or tokenizer.json.") from error
    if path.suffix == ".model":
        return Tokenizer("sentencepiece", data, {}, str(path))
    if path.suffix == ".json":
        return Tokenizer("json", data, {}, str(path))
    if path.suffix == ".txt":
        strip = lowercase if strip_accents == "auto" else strip_accents == "yes"
        return Tokenizer("wordpiece", data, {"lowercase": bool(lowercase), "strip_accents": bool(strip)}, str(path))
    raise UserError(f"data.tokenizer={path}: the name must end in .model (SentencePiece), .txt (WordPiece vocabulary) "
                    "or .json (tokenizer.json).")


def tokenizer_from_files(files: dict[str, bytes], name: str = "the stored tokenizer") -> Tokenizer:
    """Returns the tokenizer whose `files()` these are."""
    try:
        options = json.loads(files[OPTIONS_FILE])
        kind = options.pop("kind")
        source = options.pop(EXPORT_KEY, {}).get("source", _FILE_OF_KIND[kind])
        return Tokenizer(kind, files[source], options, name)
    except (KeyError, ValueError) as error:
        raise UserError(f"{name} is incomplete or damaged ({error}): restore its folder.") from error


def _changed_since_export(files: dict[str, bytes]) -> bool:
    """Whether a Hugging Face folder's tokenizer.json was edited after we wrote it: then it counts, not its source."""
    try:
        recorded = json.loads(files[OPTIONS_FILE])[EXPORT_KEY]["tokenizer_json_sha256"]
        return hashlib.sha256(files["tokenizer.json"]).hexdigest() != recorded
    except (KeyError, TypeError, ValueError):
        return False    # not such a folder; `tokenizer_from_files` reports a damaged one


def train_sentencepiece(documents: Iterable[str], vocab_size: int, path=None, lowercase: bool = True) -> Tokenizer:
    """Trains a unigram model on all of `documents` (give a sample) and returns it; also writes it if `path` is given.

    Deterministic: the number of threads is fixed because it decides the order of floating-point sums. A corpus
    too small for `vocab_size` gives fewer pieces; one with more distinct characters than that raises UserError.
    """
    import sentencepiece
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(documents), model_writer=model, model_type="unigram", vocab_size=vocab_size,
            hard_vocab_limit=False, pad_id=0, unk_id=1, bos_id=-1, eos_id=-1, pad_piece="[PAD]", unk_piece="[UNK]",
            unk_surface="[UNK]", control_symbols=["[CLS]", "[SEP]", "[MASK]"], byte_fallback=False,
            normalization_rule_name="nmt_nfkc_cf" if lowercase else "nmt_nfkc", num_threads=2, minloglevel=2,
            # Candidate pieces: the default of 1,000,000 takes most of the time and changes nothing at these sizes.
            seed_sentencepiece_size=max(50_000, 10 * vocab_size), max_sentence_length=1 << 20)
    except RuntimeError as error:
        smallest = re.search(r"required_chars\.\s*\d+ vs (\d+)|smaller than required_chars.*?(\d+)\D*$", str(error))
        if smallest:
            needed = smallest.group(1) or smallest.group(2)
            raise UserError(f"data.vocab_size={vocab_size} is too small for this text, which has more distinct "
                            f"characters: give at least {needed}.") from error
        raise UserError(f"data.vocab_size={vocab_size}: no SentencePiece model could be trained on this text ("
                        f"{str(error).splitlines()[-1].strip()}): give more text or a ready data.tokenizer.") from error
    tokenizer = Tokenizer("sentencepiece", model.getvalue(), {}, "the trained SentencePiece model")
    if path is not None:
        write_atomically(Path(path), model.getvalue())
    return tokenizer


def _sentences(documents: Iterable[str]):
    """Cuts documents into lines of at most about 2,000 characters: the trainer drops longer ones."""
    for document in documents:
        for line in document.split("\n"):
            while len(line) > 2000:
                cut = line.rfind(" ", 1000, 2000) + 1 or 2000
                yield line[:cut]
                line = line[cut:]
            if line.strip():
                yield line


def _is_blank(letter: str) -> bool:
    return letter.isspace() or unicodedata.category(letter) == "Cf"    # SentencePiece takes U+200B for a space


def _special_ids(backend, name: str) -> list[int]:
    """Finds [PAD] [UNK] [CLS] [SEP] [MASK], also spelled <pad>, <unk>, <cls> or <s>, <sep> or </s>, <mask>."""
    ids = []
    for piece in _SPECIALS:
        word = piece[1:-1].lower()
        spellings = [piece, f"<{word}>", *{"cls": ["<s>"], "sep": ["</s>"]}.get(word, [])]
        found = [i for i in map(backend.find, spellings) if i is not None]
        if not found:
            raise UserError(f"data.tokenizer: {name} has no piece {piece} (nor {', '.join(spellings[1:])}): add it to "
                            "the vocabulary, or set data.tokenizer=train.")
        ids.append(found[0])
    return ids


class _SentencePiece:
    def __init__(self, data: bytes, options: dict, name: str):
        import sentencepiece
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
            self.vocab_size = self._model.vocab_size()
        except (RuntimeError, TypeError) as error:
            raise UserError(f"data.tokenizer: {name} is not a SentencePiece model ({str(error).strip()}): "
                            "give another file.") from error
        # Models that keep line breaks as they are rarely have a piece for them; a break is white space here.
        self._break_unknown = self._model.unk_id() in self._model.encode("a\na")

    def encode(self, texts):
        if self._break_unknown:
            texts = [text.replace("\n", " ") for text in texts]
        return self._model.encode(texts, num_threads=1)

    def offsets(self, text):
        if self._break_unknown:
            text = text.replace("\n", " ")
        if hasattr(self._model, "EncodeAsOffsetMapping"):    # sentencepiece 0.2.2 has it and has dropped the other
            return self._model.encode(text, out_type="offset_mapping")["offsets"]
        return [(piece.begin, piece.end) for piece in self._model.encode(text, out_type="immutable_proto").pieces]

    def find(self, piece):
        i = self._model.piece_to_id(piece)
        return i if self._model.id_to_piece(i) == piece else None

    def token(self, i):
        return self._model.id_to_piece(i)

    def decode(self, ids):
        return self._model.decode(ids)


class _Words:
    """Encodes word by word with a cache: 25 times as fast as the library's 2 MB/s.

    Exact for BERT's rules, none of which looks across a space. Only a space, tab or line break ends a word here;
    what else is white space or punctuation is for the library to decide.
    """

    def __init__(self, encode_words, dtype):
        self._encode_words, self._dtype = encode_words, dtype
        self._known, self._known_offsets = {"": b""}, {}

    def split(self, text):
        return text.replace("\n", " ").replace("\t", " ").split(" ")

    def encode(self, texts):
        split = [self.split(text) for text in texts]
        known = self._known
        if len(known) > _CACHED_WORDS:
            known.clear()
            known[""] = b""
        new = list(set().union(*split).difference(known))
        for word, ids in zip(new, self._encode_words(new), strict=True):
            known[word] = np.asarray(ids, self._dtype).tobytes()
        encoded = [np.frombuffer(b"".join(map(known.__getitem__, words)), self._dtype) for words in split]
        for word in new:
            if len(word) > _LONGEST_CACHED:
                del known[word]
        return encoded

    def offsets(self, text, word_offsets):
        """Returns the spans in `text` from those in each word, which `word_offsets` (words to lists) gives."""
        words, known, found, start = self.split(text), self._known_offsets, [], 0
        if len(known) > _CACHED_WORDS:
            known.clear()
        new = list(set(words).difference(known))
        known.update(zip(new, word_offsets(new), strict=True))
        for word in words:
            found += [(start + a, start + b) for a, b in known[word]]
            start += len(word) + 1
        for word in new:
            if len(word) > _LONGEST_CACHED:
                del known[word]
        return found


class _WordPiece:
    def __init__(self, data: bytes, options: dict, name: str):
        from tokenizers import Tokenizer as Library
        from tokenizers import models, normalizers, pre_tokenizers
        try:
            lines = data.decode("utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"data.tokenizer: {name} is not UTF-8 text ({error}): give a WordPiece vocabulary, "
                            "one piece a line.") from error
        self._pieces = [line.strip() for line in lines]
        while self._pieces and not self._pieces[-1]:
            self._pieces.pop()
        vocabulary = {}
        for i, piece in enumerate(self._pieces):
            vocabulary.setdefault(piece, i)
        self._vocabulary, self.vocab_size = vocabulary, len(self._pieces)
        if "[UNK]" not in vocabulary:
            return    # reported by the search for specials
        library = Library(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=_MAX_WORD_CHARS))
        library.normalizer = normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=True, strip_accents=options["strip_accents"],
            lowercase=options["lowercase"])
        library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._library, self._lowercase = library, options["lowercase"]
        self._words = _Words(self._encode_words, token_dtype(self.vocab_size))

    def _encode_words(self, words):
        return [e.ids for e in self._library.encode_batch_fast(self._final_sigma(words), add_special_tokens=False)]

    def _final_sigma(self, words):
        # The library lower-cases letter by letter and misses the Greek final sigma.
        return [word.lower() if self._lowercase and "Σ" in word else word for word in words]

    def _word_offsets(self, words):
        shown = self._final_sigma(words)
        for word, lowered, e in zip(words, shown, self._library.encode_batch(shown, add_special_tokens=False),
                                    strict=True):
            if lowered is word:
                yield e.offsets
            else:    # İ becomes two characters
                origin = [i for i, letter in enumerate(word) for _ in letter.lower()]
                yield [(origin[a], origin[b - 1] + 1) for a, b in e.offsets]

    def encode(self, texts):
        return self._words.encode(texts)

    def offsets(self, text):
        return self._words.offsets(text, self._word_offsets)

    def find(self, piece):
        return self._vocabulary.get(piece)

    def token(self, i):
        return self._pieces[i]

    def decode(self, ids):
        return " ".join(self._pieces[i] for i in ids).replace(" ##", "")


class _Json:
    def __init__(self, data: bytes, options: dict, name: str):
        from tokenizers import Tokenizer as Library
        try:
            self._library = Library.from_str(data.decode("utf-8"))
        except Exception as error:    # the library raises plain Exception
            raise UserError(f"data.tokenizer: {name} is not a tokenizer.json ({str(error).splitlines()[0]}): "
                            "give another file.") from error
        self._library.no_padding()
        self._library.no_truncation()
        self._library.encode_special_tokens = True    # specials written in the text are ordinary text
        self.vocab_size = max(self._library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        parts = json.loads(data)
        kinds = [(parts.get(part) or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")]
        # A token added by hand may hold a space, and then words are not everything.
        spaced = any(re.search(r"\s", token["content"]) for token in parts.get("added_tokens") or [])
        by_word = kinds == ["BertNormalizer", "BertPreTokenizer", "WordPiece"] and not spaced
        self._words = _Words(self._encode, token_dtype(self.vocab_size)) if by_word else None

    def _encode(self, texts):
        return [e.ids for e in self._library.encode_batch_fast(texts, add_special_tokens=False)]

    def encode(self, texts):
        return self._words.encode(texts) if self._words else self._encode(texts)

    def _offsets(self, texts):
        return [e.offsets for e in self._library.encode_batch(texts, add_special_tokens=False)]

    def offsets(self, text):
        return self._words.offsets(text, self._offsets) if self._words else self._offsets([text])[0]

    def find(self, piece):
        return self._library.token_to_id(piece)

    def token(self, i):
        return self._library.id_to_token(i) or ""

    def decode(self, ids):
        return self._library.decode(ids)
