"""Documents come out of every kind of source whole, in one order, and bad input is one clear line."""

import ast
import functools
import gzip
import json
import lzma
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from electra_jax.config import UserError
from electra_jax.data import pydocs, sources

TEXT = "first line\nsecond line\n\nnext document\n\n\n\nlast, without a line end"
DOCUMENTS = ["first line\nsecond line", "next document", "last, without a line end"]


def read(source, **options):
    return list(sources.documents(str(source), **options))


def compress(name: str, data: bytes) -> bytes:
    import zstandard
    return {"gz": gzip.compress, "xz": lzma.compress, "zst": zstandard.compress}.get(
        name.rsplit(".", 1)[-1], lambda x: x)(data)


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text and text.startswith("data.source=")
    return text


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.xz", "a.txt.zst"])
def test_text_gives_the_same_documents_plain_and_compressed(tmp_path, name):
    (tmp_path / name).write_bytes(compress(name, TEXT.encode()))
    assert read(f"text:{tmp_path}/*") == DOCUMENTS


def test_a_document_ends_at_a_blank_line_a_line_or_a_file(tmp_path):
    (tmp_path / "b.txt").write_text("third")
    (tmp_path / "a.txt").write_text(TEXT)
    lines = [line for document in DOCUMENTS for line in document.split("\n")]
    assert read(f"text:{tmp_path}/*") == [*DOCUMENTS, "third"]
    assert read(f"text:{tmp_path}/*", text_documents="line") == [*lines, "third"]
    assert read(f"text:{tmp_path}/*", text_documents="file") == ["\n".join(lines), "third"]


def test_byte_order_mark_carriage_returns_and_nul_do_not_reach_the_text(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n \t\r\nthr\0ee\rfour\r\n")
    assert read(f"text:{tmp_path}/a") == ["one\ntwo", "three\nfour"]


def test_invalid_utf8_is_replaced_and_counted_by_line(tmp_path):
    (tmp_path / "a").write_bytes(b"good\nb\xffd\nb\xfe\xfed\n\nalso good\n")
    counters = {}
    assert read(f"text:{tmp_path}/a", counters=counters) == ["good\nb\ufffdd\nb\ufffd\ufffdd", "also good"]
    assert counters["invalid_utf8_lines"] == 2


def test_a_line_of_ten_megabytes_keeps_every_word(tmp_path):
    (tmp_path / "a").write_text("some words " * 1_000_000)
    found = read(f"text:{tmp_path}/a")
    assert max(map(len, found)) <= 1 << 22
    assert " ".join(found).split() == ["some", "words"] * 1_000_000


def test_jsonl_gives_the_field_and_names_file_and_line_of_what_is_wrong(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"body": text, "n": 1}) for text in DOCUMENTS) + '\n\n{"body": null}\n')
    assert read(f"jsonl:{file}#body") == DOCUMENTS
    with pytest.raises(UserError) as error:
        read(f"jsonl:{file}#title")
    assert "a.jsonl:1 has no field 'title'" in one_line(error) and "body" in one_line(error)
    with pytest.raises(UserError) as error:
        read(f"jsonl:{file}#n")
    assert "no string in field 'n'" in one_line(error)
    file.write_text('{"body": "x"}\n{"body": \n')
    with pytest.raises(UserError) as error:
        read(f"jsonl:{file}#body")
    assert "a.jsonl:2 is not JSON" in one_line(error)
    file.write_text('{"body": "a \\ud800 b"}\n')
    assert read(f"jsonl:{file}#body") == ["a ? b"]


def test_parquet_gives_the_column_and_lists_the_others_when_it_is_missing(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"body": [*DOCUMENTS, None], "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    assert read(f"parquet:{tmp_path}/*.parquet#body") == DOCUMENTS
    for column, hint in (("title", "body, n"), ("n", "int64")):
        with pytest.raises(UserError) as error:
            read(f"parquet:{tmp_path}/*.parquet#{column}")
        assert hint in one_line(error)
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-30])
    with pytest.raises(UserError) as error:
        read(f"parquet:{tmp_path}/*.parquet#body")
    assert "a.parquet cannot be read" in one_line(error)


@pytest.mark.parametrize("name", ["a.gz", "a.xz", "a.zst"])
@pytest.mark.parametrize("cut", ["end", "garbage", "middle"])
def test_a_damaged_compressed_file_is_an_error_that_names_it(tmp_path, name, cut):
    # Incompressible text: a short one would fit in the part that is left.
    data = compress(name, "\n\n".join(f"{i * 7919 % 10007} {i**3}" for i in range(5000)).encode())
    half = len(data) // 2
    damaged = {"end": data[:half], "garbage": b"not compressed" * 9, "middle": data[:half] + b"\xff" * 99 + data[half:]}
    (tmp_path / name).write_bytes(damaged[cut])
    with pytest.raises(UserError) as error:
        read(f"text:{tmp_path}/{name}")
    assert name in one_line(error)


@pytest.mark.parametrize(("source", "hint"), [
    ("", "empty"), ("txt:a", "unknown source"), ("text:", "unknown source"), ("text:/nowhere/*.txt", "no file matches"),
    ("jsonl:a.jsonl", "#FIELD"), ("parquet:a", "#COLUMN"), ("tfds:lm1b:train", "#FEATURE"), ("tfds:lm1b#text", "split"),
    ("pydocs@0", "weight"), ("pydocs@1e9", "weight"), ("tfds:no_such_dataset_here:train#text", "tfds cannot open"),
])
def test_a_source_that_cannot_work_is_one_line_with_a_remedy(source, hint):
    with pytest.raises(UserError) as error:
        read(source)
    assert hint in one_line(error)


def test_utf16_is_refused_not_read_as_noise(tmp_path):
    (tmp_path / "a").write_text("hello", encoding="utf-16")
    with pytest.raises(UserError) as error:
        read(f"text:{tmp_path}/a")
    assert "iconv" in one_line(error)


def test_a_weight_repeats_documents_and_its_fraction_some_of_them(tmp_path):
    (tmp_path / "a").write_text("\n".join(f"a{i}" for i in range(1000)))
    (tmp_path / "b").write_text("b")
    found = read(f"text:{tmp_path}/a@2.5; text:{tmp_path}/b", text_documents="line")
    counts = [found.count(f"a{i}") for i in range(1000)]
    assert set(counts) == {2, 3} and 2400 < sum(counts) < 2600
    assert found.count("b") == 1 and found == read(f"text:{tmp_path}/a@2.5;text:{tmp_path}/b", text_documents="line")


def test_skip_continues_exactly_where_a_reader_stopped(tmp_path):
    for name in "cab":
        (tmp_path / name).write_text("\n\n".join(f"{name}{i}" for i in range(20)))
    everything = read(f"text:{tmp_path}/*@1.5")
    for skip in (0, 1, 17, len(everything)):
        assert read(f"text:{tmp_path}/*@1.5", skip=skip) == everything[skip:]


def test_bytes_read_reach_the_total(tmp_path):
    (tmp_path / "a.xz").write_bytes(lzma.compress(TEXT.encode()))
    (tmp_path / "b").write_text(TEXT)
    counters = {}
    read(f"text:{tmp_path}/*", counters=counters)
    assert counters["bytes_read"] == counters["bytes_total"] == sum(f.stat().st_size for f in tmp_path.iterdir())


def test_a_sample_draws_on_every_file_and_stays_within_its_size(tmp_path):
    for name in "abcd":
        (tmp_path / name).write_text("\n\n".join(f"{name} " * 50 for _ in range(100)))
    found = list(sources.sample(f"text:{tmp_path}/*", "blank", 4000))
    assert {text[0] for text in found} == set("abcd") and 4000 <= sum(map(len, found)) < 5000


def test_tfds_reads_array_record_without_tensorflow(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"body": tfds.features.Text(), "n": tfds.features.Scalar(np.int64)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": ((i, {"body": text, "n": i}) for i, text in enumerate(DOCUMENTS))}

        def _generate_examples(self):
            raise NotImplementedError

    Tiny(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    monkeypatch.setattr(tfds, "data_source", functools.partial(tfds.data_source, data_dir=tmp_path))
    assert sorted(read("tfds:tiny:train#body")) == sorted(DOCUMENTS)
    for feature, hint in (("title", "no feature"), ("n", "is not text")):
        with pytest.raises(UserError) as error:
            read(f"tfds:tiny:train#{feature}")
        assert hint in one_line(error)
    assert "tensorflow" not in sys.modules


def test_pydocs_finds_the_docstrings_that_ast_finds():
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[::4]
    total = missing = extra = 0
    for file in files:
        data = file.read_bytes()
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        wanted = {text for node in ast.walk(ast.parse(data)) if isinstance(node, kinds)
                  and (text := ast.get_docstring(node, clean=False)) and len(text.encode()) >= 80}
        found = set(pydocs.raw_docstrings(data.replace(b"\r\n", b"\n")))
        total, missing, extra = total + len(wanted), missing + len(wanted - found), extra + len(found - wanted)
    assert total > 200 and missing <= 0.01 * total and extra <= 0.02 * total


def test_pydocs_takes_docstrings_only_and_reads_their_escapes():
    doc, other = ("word " * 20).strip(), ("other " * 20).strip()
    source = f'''#!/usr/bin/python  # a comment with """ in it
"""{doc} 0"""
x = """{other}"""
def f(a="it's"):  # it's
    r"""{doc} 1\\d"""
    """{other}"""
    return ("{other}", f"""{other}""")
class C:
    \'\'\'{doc} 2 \\u00e9 " \'\'\'
'''
    assert pydocs.raw_docstrings(source.encode()) == [f"{doc} 0", f"{doc} 1\\d", f"{doc} 2 é \" "]


def test_pydocs_leaves_out_code_and_tables_and_keeps_prose():
    prose = "Returns the number of things that were found, as an integer which is never negative."
    code = ">>> count([1, 2])\n2"
    table = "+----+----+\n| 12 | 34 |\n+----+----+\n| 56 | 78 |"
    assert pydocs.clean(f"{prose}\n\n    {code}\n\n    {table}\n\n    {prose}\n    And on.") == (
        f"{prose}\n{prose} And on.")
