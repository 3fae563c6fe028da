"""The embedded corpus: English documentation that every Python installation carries.

`pydoc` topics and the docstrings of the standard library and of installed packages, read with `ast` and never
imported. No download, the same order on every run of one environment.
"""

import ast
import functools
import inspect
import re
import sysconfig
import warnings
from hashlib import blake2b
from pathlib import Path

_SHORTEST = 80         # characters of a docstring worth reading
_SKIP = re.compile(r"(^|/)(site-packages|dist-packages|tests?|testing|_?pytest[^/]*|idlelib|lib2to3|turtledemo|"
                   r"__pycache__|pip)/|(^|/)(test_[^/]*|[^/]*_test|[^/]*_pb2(_grpc)?|conftest)\.py$")
# Comments and strings of Python source, triple-quoted ones first. Scanning for them takes 1 s for 170 MB of source,
# where `ast.parse` takes 40 s; tests/test_sources.py compares the two.
_TOKEN = re.compile(rb"""
    \#[^\n]*
  | (?P<doc>(?P<raw>\b[rR]|\b[uU])?(?P<quote>\"{3}|'{3})(?P<body>(?:[^"'\\]+|\\.|(?!(?P=quote))["'])*)(?P=quote))
  | "[^"\\\n]*(?:\\.[^"\\\n]*)*"
  | '[^'\\\n]*(?:\\.[^'\\\n]*)*'
    """, re.DOTALL | re.VERBOSE)


@functools.cache
def documents() -> list[str]:
    """Returns the documents: one a `pydoc` topic, and one a module, its docstrings in order."""
    from pydoc_data import topics
    roots = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    files = sorted({(file.relative_to(root).as_posix(), str(file)) for root in roots for file in root.rglob("*.py")
                    if not _SKIP.search(file.relative_to(root).as_posix())})
    seen, found = set(), [text for _, text in sorted(topics.topics.items())]
    for _, file in files:
        texts = [text for text in docstrings(file) if not (_digest(text) in seen or seen.add(_digest(text)))]
        if texts:
            found.append("\n".join(texts))
    return found


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()


def docstrings(file: str) -> list[str]:
    """Returns the cleaned docstrings of one source file that are long enough and mostly prose."""
    try:
        data = Path(file).read_bytes()
    except OSError:
        return []
    cleaned = (clean(text) for text in raw_docstrings(data))
    return [text for text in cleaned if len(text) >= _SHORTEST]


def raw_docstrings(data: bytes) -> list[str]:
    """Returns the docstrings of Python source in order, those shorter than 80 bytes left out.

    A docstring is a triple-quoted string that stands alone after a colon or as the first thing in the file.
    """
    found, before, position = [], b":", 0
    for match in _TOKEN.finditer(data):
        code = data[position:match.start()].strip(b" \t\r\n\f\xef\xbb\xbf")
        position = match.end()
        before = code[-1:] or before
        if match["doc"] and before == b":" and len(match["body"]) >= _SHORTEST:
            text = _value(match)
            if text:
                found.append(text)
        if data[match.start()] != ord("#"):
            before = b"string"
    return found


def _value(match: re.Match) -> str:
    try:
        if b"\\" in match["body"] and match["raw"] not in (b"r", b"R"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")    # about escapes in other people's files
                return ast.literal_eval(match["doc"].decode())
        return match["body"].decode()
    except (SyntaxError, ValueError):
        return ""


def clean(docstring: str) -> str:
    """Returns the paragraphs of a docstring that read like text; code, tables and rulers are left out.

    Lines of a paragraph are joined, blank lines dropped: in a token store a document has no layout.
    """
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(docstring).encode(errors="replace").decode())
    kept = [re.sub(r"\s+", " ", paragraph).strip() for paragraph in paragraphs if _is_prose(paragraph)]
    return "\n".join(kept)


def _is_prose(paragraph: str) -> bool:
    """Most characters are letters and spaces, and it is not a doctest."""
    if ">>>" in paragraph:
        return False
    letters = sum(map(str.isalpha, paragraph)) + paragraph.count(" ") + paragraph.count("\n")
    return len(paragraph) >= 20 and letters >= 0.8 * len(paragraph)
