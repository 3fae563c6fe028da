"""Tables of the user's own become tasks by config alone: every row read as written, every mistake named."""

import gzip
import json

import numpy as np
import pytest

from electra_jax.config import UserError
from electra_jax.data.tokenizer import load_tokenizer
from electra_jax.tasks import scores, text
from electra_jax.tasks.text import Row, TextTask, from_config, read_table, restore

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS), "good", "bad", "film"]
CLS, SEP, GOOD, BAD, FILM = 2, 3, len(PIECES) - 3, len(PIECES) - 2, len(PIECES) - 1
COLUMNS = {"task.text": "text", "task.label": "label"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    file = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    file.write_text("\n".join(PIECES))
    return load_tokenizer(file)


def write(path, content) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def config(train, **fields):
    return {"train": train, "dev": train, "test": "", "text": "text", "text_pair": "", "label": "label",
            "label_type": "auto", **fields}


def table(tmp_path, labels, name="train.tsv"):
    return write(tmp_path / name, "text\tlabel\n" + "".join(f"good film\t{label}\n" for label in labels))


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def logits(*classes, count=2):
    return [{"logits": np.eye(count, dtype=np.float32)[c]} for c in classes]


# --- Files --------------------------------------------------------------------------------------


def test_csv_reads_quotes_commas_line_breaks_bom_crlf_and_blank_ends(tmp_path):
    content = '\ufefflabel,text,n\r\nyes,"a, ""b""\nc\r\nd",1\r\n\r\nno,später\u2028x,2\r\n,,\r\n\r\n'
    found = read_table(write(tmp_path / "a.csv", content), "task.train", COLUMNS)
    assert found == [(('a, "b"\nc\r\nd',), "yes", 2), (("später\u2028x",), "no", 6)]


def test_tsv_takes_quotes_as_they_are(tmp_path):
    content = '\ufefftext\tlabel\r\n"a b\tyes\r\nc" ""\u2028\x0bd\tno\r\n\r\n'
    found = read_table(write(tmp_path / "a.tsv", content), "task.train", COLUMNS)
    assert found == [(('"a b',), "yes", 2), (('c" ""\u2028\x0bd',), "no", 3)]


def test_jsonl_reads_labels_of_any_plain_type_and_mends_lone_surrogates(tmp_path):
    rows = [{"text": "a\nb", "label": 1}, {"text": "x\ud800", "label": True}, {"label": " z ", "text": "", "more": []}]
    content = "\n\n".join(map(json.dumps, rows)) + "\n"
    found = read_table(write(tmp_path / "a.jsonl", content), "task.train", COLUMNS)
    assert found == [(("a\nb",), "1", 1), (("x?",), "true", 3), (("",), "z", 5)]


@pytest.mark.parametrize("form", [".tsv", ".csv", ".jsonl"])
@pytest.mark.parametrize("spell", [str.lower, str.upper])
def test_gz_reads_the_same(tmp_path, form, spell):
    contents = {".tsv": "text\tlabel\na\tb\n", ".csv": "text,label\na,b\n", ".jsonl": '{"text": "a", "label": "b"}\n'}
    file = write(tmp_path / spell(f"a{form}.gz"), gzip.compress(contents[form].encode()))
    assert [record[:2] for record in read_table(file, "task.train", COLUMNS)] == [(("a",), "b")]


def test_a_csv_field_may_be_longer_than_the_modules_limit(tmp_path):
    content = "text,label\n" + "a" * 200_000 + ",x\n"
    assert len(read_table(write(tmp_path / "a.csv", content), "task.train", COLUMNS)[0].texts[0]) == 200_000


@pytest.mark.parametrize(("name", "content", "hint"), [
    ("a.tsv", "text\tlabel\na\tb\nc\n", ":3 has 1 columns, the first line has 2"),
    ("a.tsv", "text\tlabel\na\tb\td\n", ":2 has 3 columns"),
    ("a.tsv", "words\tlabel\na\tb\n", "task.text=text: "),
    ("a.tsv", "words\tlabel\na\tb\n", "name one of words, label"),
    ("a.csv", "text,class\na,b\n", "task.label=label: "),
    ("a.csv", 'text,label\na,b\n"c,d\ne,f\n', ":3 is not CSV"),
    ("a.csv", 'text,label\n"a\nb",c\nd\n', ":4 has 1 columns"),
    ("a.tsv", "", "has no rows"), ("a.tsv", "text\tlabel\n\n", "has no rows"), ("a.jsonl", "\n", "has no rows"),
    ("a.tsv", b"text\tlabel\na\tb\n\xe4\tc\n", ":3 is not UTF-8"),
    ("a.tsv", "text\tlabel\n".encode("utf-16"), ":1 is not UTF-8 text: convert it, e.g. iconv -f UTF-16 -t"),
    ("a.csv", "text,label,text\na,b,c\n", "a.csv has 2 columns of that name: rename all but one"),
    ("a.tsv", "text\tlabel\na\t\n", ":2 has an empty label"),
    ("a.jsonl", '{"text": "a", "label": null}\n', ":1 has an empty label"),
    ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "a"}\n', ":2 has no such column: name one of text"),
    ("a.jsonl", '{"text": null, "label": 1}\n', ":1: task.text=text holds no string but null"),
    ("a.jsonl", '{"text": 5, "label": 1}\n', "no string but 5"),
    ("a.jsonl", '{"text": "a"\n', ":1 is not JSON"), ("a.jsonl", "[1]\n", ":1 is not a JSON object"),
    ("a.tsv.gz", b"no gzip", "cannot be read"),
    ("a.tsv.gz", gzip.compress(b"text\tlabel\na\tb\n", mtime=0)[:-9], "cannot be read"),
    ("a.txt", "text\tlabel\na\tb\n", "must end in .tsv, .csv, .jsonl"),
])
def test_a_file_that_cannot_work_is_one_line_with_field_and_place(tmp_path, name, content, hint):
    with pytest.raises(UserError) as error:
        read_table(write(tmp_path / name, content), "task.train", COLUMNS)
    assert hint in one_line(error) and str(tmp_path / name) in str(error.value) and "task." in str(error.value)


@pytest.mark.parametrize("path", ["nowhere.tsv", "."])
def test_a_missing_file_is_one_line(tmp_path, path):
    with pytest.raises(UserError) as error:
        read_table(tmp_path / path / "x.tsv", "task.dev", COLUMNS)
    assert "task.dev: " in one_line(error) and "No such file" in str(error.value)


# --- From config --------------------------------------------------------------------------------


def test_classes_are_found_sorted_and_whole_numbers_by_value(tmp_path, tokenizer):
    assert from_config(config(table(tmp_path, ["b", "c", "a", "b"])), tokenizer, 16, 0).labels == ("a", "b", "c")
    assert from_config(config(table(tmp_path, [10, 9, -1])), tokenizer, 16, 0).labels == ("-1", "9", "10")
    mixed = from_config(config(table(tmp_path, ["10", "9", "x"])), tokenizer, 16, 0)
    assert mixed.labels == ("10", "9", "x") and mixed.head == "classification" and mixed.name == "text"
    assert from_config(config(table(tmp_path, "ab"), name="mine"), tokenizer, 16, 0).name == "mine"
    assert [f.targets["label"] for f in mixed.features("train")] == [0, 1, 2]


def test_label_type_decides_between_classes_and_scores(tmp_path, tokenizer):
    def heads(labels):
        file = table(tmp_path, labels)
        return [from_config(config(file, label_type=kind), tokenizer, 16, 0).head
                for kind in ("auto", "class", "score")]
    assert heads([1, 2, 3]) == ["classification", "classification", "regression"]
    assert heads(["1.0", "2.5", "3"]) == ["regression", "classification", "regression"]
    for file in (table(tmp_path, ["1.5", "nan", "N/A"]), table(tmp_path, ["v1.5", "2.5", "3.5", "x", "y"])):
        assert from_config(config(file), tokenizer, 16, 0).head == "classification"


def test_what_was_found_is_told_and_scores_with_a_few_words_between_them_are_refused(tmp_path, tokenizer, capsys):
    from_config(config(table(tmp_path, ["0.5", "-1", "3.9"])), tokenizer, 16, 0)
    assert capsys.readouterr().out == "task.label=label: scores from -1 to 3.9\n"
    from_config(config(table(tmp_path, "cab")), tokenizer, 16, 0)
    assert capsys.readouterr().out == "task.label=label: 3 classes: a, b, c\n"
    with pytest.raises(UserError):
        from_config(config(table(tmp_path, ["0", "0.5", "1", "2", "3", "N/A", "x"])), tokenizer, 16, 0)
    labels = [f"{i / 10:.1f}" for i in range(40)]
    for odd in ("N/A", "nan"):
        file = table(tmp_path, [*labels, odd, odd, *labels])
        with pytest.raises(UserError) as error:
            from_config(config(file), tokenizer, 16, 0)
        assert f"task.train: {file}:42: label '{odd}' is not a number, but most of the 41 different" in one_line(error)
        assert "task.label_type=class" in str(error.value)
        assert len(from_config(config(file, label_type="class"), tokenizer, 16, 0).labels) == 41


def test_a_whole_number_is_one_class_however_json_spells_it(tmp_path, tokenizer):
    rows = [{"text": "good", "label": label} for label in (1, 1.0, 0, 0.0, "1")]
    file = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert from_config(config(file), tokenizer, 16, 0).labels == ("0", "1")


def test_metrics_follow_the_kind_of_label(tmp_path, tokenizer):
    two = from_config(config(table(tmp_path, "ab")), tokenizer, 16, 0)
    assert two.metric == "accuracy" and two.encode({"text": "film"})[0].input_ids.tolist() == [CLS, FILM, SEP]
    assert list(two.score("dev", logits(0, 1))) == ["accuracy", "macro_f1", "f1", "matthews"]
    assert two.score("dev", logits(0, 0))["accuracy"] == 50
    three = from_config(config(table(tmp_path, "abc")), tokenizer, 16, 0)
    assert list(three.score("dev", logits(0, 1, 2, count=3))) == ["accuracy", "macro_f1"]
    real = from_config(config(table(tmp_path, ["0.5", "1", "9"])), tokenizer, 16, 0)
    assert real.metric == "spearman"
    found = real.score("dev", [{"score": x} for x in (0, .1, .2)])
    assert found["spearman"] == pytest.approx(100) and 0 < found["pearson"] < 99


def test_scores_are_trained_on_as_0_to_1_of_train_and_answered_on_their_own_scale(tmp_path, tokenizer):
    train, dev = table(tmp_path, [-2, 0.5, 8]), table(tmp_path, [10, 3], "dev.tsv")
    task = from_config(config(train, dev=dev), tokenizer, 16, 0)
    assert [f.targets["label"] for f in task.features("train")] == [0, 0.25, 1]
    assert [f.targets["label"] for f in task.features("dev")] == [1.2, 0.5]
    assert task.answer({"text": "a"}, [{"score": np.float32(0.75)}]) == {"score": 5.5}
    assert task.answer({"text": "a"}, [{"score": 2.0}]) == {"score": 18}    # the range is train's, not a law


def test_tables_without_a_header_name_columns_by_number(tmp_path, tokenizer):
    file = write(tmp_path / "a.tsv", "x\tgood\tbad\t1\ny\tfilm\tfilm\t0\n")
    task = from_config(config(file, text="2", text_pair="1", label="3"), tokenizer, 16, 0)
    assert [f.input_ids.tolist() for f in task.features("train")] == [
        [CLS, BAD, SEP, GOOD, SEP], [CLS, FILM, SEP, FILM, SEP]]
    with pytest.raises(UserError) as error:
        from_config(config(file, text="4", label="3"), tokenizer, 16, 0)
    assert "task.text=4: " in one_line(error) and "name one of 0, 1, 2, 3" in str(error.value)


def test_an_empty_dev_holds_out_a_tenth_of_train_the_same_for_a_seed(tmp_path, tokenizer, capsys):
    file = write(tmp_path / "a.tsv", "text\tlabel\n" + "".join(f"{LETTERS[i % 26]} {LETTERS[i // 26]}\t{i % 2}\n"
                                                                for i in range(100)))
    task = from_config(config(file, dev=""), tokenizer, 16, 3)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 2 and "10 of 100 rows" in printed and file in printed and "seed 3" in printed
    rows = {split: [tuple(f.input_ids) for f in task.features(split)] for split in task.splits()}
    assert list(rows) == ["train", "dev"] and (len(rows["train"]), len(rows["dev"])) == (90, 10)
    assert len(set(rows["train"] + rows["dev"])) == 100

    def dev(seed):
        return [tuple(f.input_ids) for f in from_config(config(file, dev=""), tokenizer, 16, seed).features("dev")]
    assert dev(3) == rows["dev"] != dev(4)


def test_a_class_that_is_all_held_out_is_still_known(tmp_path, tokenizer):
    file = table(tmp_path, LETTERS[:10])
    assert from_config(config(file, dev=""), tokenizer, 16, 0).labels == tuple(LETTERS[:10])


def test_a_test_file_needs_no_labels(tmp_path, tokenizer):
    train = table(tmp_path, "ab")
    for content in ("text\ngood\n\nfilm\n", "text\tlabel\ngood\t\nfilm\t\n", "text\tlabel\ngood\ta\nfilm\t\n",
                    "text\tlabel\ngood\t-1\nfilm\t-1\n"):
        test = write(tmp_path / "test.tsv", content)
        task = from_config(config(train, test=test), tokenizer, 16, 0)
        assert task.splits() == ("train", "dev", "test") and task.features("test")[1].targets == {}
        with pytest.raises(UserError) as error:
            task.score("test", logits(0, 0))
        assert "task.test has no labels" in one_line(error)
        task.write_predictions("test", logits(1, 0), tmp_path)
        assert (tmp_path / "text-test.tsv").read_text() == "index\tprediction\n0\tb\n1\ta\n"


def test_a_test_file_needs_its_texts(tmp_path, tokenizer):
    with pytest.raises(UserError) as error:
        from_config(config(table(tmp_path, "ab"), test=write(tmp_path / "t.tsv", "label\na\n")), tokenizer, 16, 0)
    assert "task.text=text: task.test: " in one_line(error)


@pytest.mark.parametrize(("labels", "dev", "fields", "hint"), [
    ("ab", "abc", {}, "dev.tsv:4: label 'c' is none of the known labels (a, b)"),
    ("ab", "ab", {"label_type": "number"}, "task.label_type='number'"),
    ("ab", "ab", {"label_type": "score"}, "train.tsv:2: label 'a' is not a number"),
    (["1.5", "2.5"], ["x"], {}, "dev.tsv:2: label 'x' is not a number"),
    ("aaa", "a", {}, "task.label=label: all rows"), (["1.50", "1.5"], ["1.5"], {}, "same label '1.50'"),
    ("ab", "ab", {"train": ""}, "task.train is empty"), ("ab", "ab", {"text": ""}, "task.text is empty"),
    ("ab", "ab", {"label": ""}, "task.label is empty"), ("ab", "", {}, "task.dev: "),
    ("ab", "ab", {"text_pair": "other"}, "task.text_pair=other: "),
    ("ab", "ab", {"dev": "nowhere.csv"}, "task.dev: nowhere.csv cannot be read"),
    ("ab", "ab", {"test": "nowhere.csv"}, "task.test: nowhere.csv cannot be read"),
])
def test_a_config_that_cannot_work_is_one_line_with_the_field(tmp_path, tokenizer, labels, dev, fields, hint):
    files = {"train": table(tmp_path, labels), "dev": table(tmp_path, dev, "dev.tsv")}
    with pytest.raises(UserError) as error:
        from_config(config(**files | fields), tokenizer, 16, 0)
    assert hint in one_line(error)


# --- The task -----------------------------------------------------------------------------------


def pair_task(tokenizer, seq_len=16, rows=None, **options):
    rows = {"train": [Row(("good", "bad film"), 1, 0), Row(("film", ""), 0, 1)]} if rows is None else rows
    return TextTask("pairs", tokenizer, seq_len, ("a", "b"), options.pop("labels", ("no", "yes")),
                    options.pop("metrics", ("accuracy",)), rows, **options)


def test_pairs_are_joined_and_swap_doubles_train_with_the_texts_exchanged(tokenizer):
    features = pair_task(tokenizer, swap=True).features("train")
    assert [f.input_ids.tolist() for f in features] == [
        [CLS, GOOD, SEP, BAD, FILM, SEP], [CLS, FILM, SEP], [CLS, BAD, FILM, SEP, GOOD, SEP], [CLS, SEP, FILM, SEP]]
    assert features[0].token_type_ids.tolist() == [0, 0, 0, 1, 1, 1]
    assert [f.targets["label"] for f in features] == [1, 0, 1, 0]
    assert features[0].input_ids.dtype == features[0].token_type_ids.dtype == np.int32
    assert len(pair_task(tokenizer).features("train")) == 2


def test_only_train_is_doubled(tokenizer):
    rows = [Row(("good", "bad"), 1, 0)]
    task = pair_task(tokenizer, swap=True, rows={"train": rows, "dev": rows})
    assert [len(task.features(split)) for split in task.splits()] == [2, 1]


def test_features_are_cut_to_seq_len_and_too_short_a_one_is_refused(tokenizer):
    rows = {"train": [Row(("good " * 50, "bad " * 50), 0, 0)]}
    assert pair_task(tokenizer, 5, rows).features("train")[0].input_ids.tolist() == [CLS, GOOD, SEP, BAD, SEP]
    with pytest.raises(UserError) as error:
        pair_task(tokenizer, 4, rows)
    assert "data.seq_len=4" in one_line(error) and "at least 5" in str(error.value)


def test_an_empty_split_is_refused(tokenizer):
    with pytest.raises(UserError) as error:
        pair_task(tokenizer, rows={"train": [Row(("a", "b"), 0, 0)], "dev": []})
    assert "task.dev has no rows" in one_line(error)


def test_outputs_that_do_not_match_the_features_are_refused(tokenizer, tmp_path):
    task = pair_task(tokenizer)
    for use in (lambda: task.score("train", logits(0)), lambda: task.write_predictions("train", logits(0), tmp_path)):
        with pytest.raises(ValueError, match=r"1 outputs|shorter"):
            use()


def test_predictions_of_labelled_splits_show_the_label_without_quotes_and_with_spaces_for_tabs(tokenizer, tmp_path):
    task = pair_task(tokenizer, labels=('"no"', "y\te\r\ns"))
    task.write_predictions("train", logits(0, 0), tmp_path / "new")
    assert (tmp_path / "new" / "pairs-train.tsv").read_bytes() == \
        b'index\tprediction\tlabel\n0\t"no"\ty e  s\n1\t"no"\t"no"\n'


def test_scores_in_a_file_are_those_that_were_scored_and_only_submissions_are_clipped(tokenizer, tmp_path):
    rows = [Row(("good", "film"), label, i) for i, label in enumerate((4.0, 5.0, 1.0))]
    task = pair_task(tokenizer, labels=(), metrics=("spearman", "pearson"), low=0.0, high=5.0, clip=True, rows={
        "dev": rows, "test": [row._replace(label=None) for row in rows]})
    outputs = [{"score": x} for x in (1.01, np.float32(1.5), -0.3)]
    task.write_predictions("dev", outputs, tmp_path)
    written = [line.split("\t") for line in (tmp_path / "pairs-dev.tsv").read_text().splitlines()[1:]]
    assert [line[1:] for line in written] == [["5.05", "4"], ["7.5", "5"], ["-1.5", "1"]]
    labels, predicted = [row.label for row in rows], [float(line[1]) for line in written]
    assert task.score("dev", outputs) == {name: pytest.approx(scores.METRICS[name](labels, predicted))
                                          for name in ("spearman", "pearson")}
    task.write_predictions("test", outputs, tmp_path)
    assert (tmp_path / "pairs-test.tsv").read_text() == "index\tprediction\n0\t5\n1\t5\n2\t0\n"


def test_a_task_comes_back_from_its_spec_as_json_and_answers_the_same(tokenizer):
    record = {"a": "good", "b": "bad film", "more": 1}
    task = pair_task(tokenizer, swap=True)
    again = restore(json.loads(json.dumps(task.spec())), tokenizer)
    assert again.spec() == task.spec() and again.splits() == () and again.metric == task.metric
    assert again.columns() == ("a", "b")
    assert (again.head, again.labels, again.seq_len, again.name) == ("classification", ("no", "yes"), 16, "pairs")
    [feature] = again.encode(record)
    assert feature.input_ids.tolist() == task.features("train")[0].input_ids.tolist() and feature.targets == {}
    answer = again.answer(record, [{"logits": np.array([0, np.log(3)], np.float32)}])
    assert answer == {"label": "yes", "probabilities": pytest.approx({"no": 0.25, "yes": 0.75})}
    json.dumps(answer)

    score = pair_task(tokenizer, labels=(), metrics=("spearman",), low=1.0, high=5.0, clip=True)
    again = restore(json.loads(json.dumps(score.spec())), tokenizer)
    assert again.head == "regression" and again.answer(record, [{"score": np.float32(0.5)}]) == {"score": 3}
    assert [again.answer(record, [{"score": x}])["score"] for x in (-1.0, 2.0)] == [1, 5]
    json.dumps(again.answer(record, [{"score": np.float32(0.5)}]))


def test_probabilities_of_large_logits_are_finite(tokenizer):
    answer = pair_task(tokenizer).answer({"a": "", "b": ""}, [{"logits": np.array([1e4, -1e4], np.float32)}])
    assert answer["probabilities"] == {"no": 1, "yes": 0}


@pytest.mark.parametrize(("record", "hint"), [
    ({"a": "good"}, "field 'b' is missing"), ({"a": "good", "b": None}, "field 'b' is not a string"),
    ({}, "the record has nothing"),
])
def test_a_record_without_its_texts_is_one_line(tokenizer, record, hint):
    with pytest.raises(UserError) as error:
        pair_task(tokenizer).encode(record)
    assert hint in one_line(error) and "reads a, b" in str(error.value)


def test_long_splits_are_encoded_in_batches_in_order_and_once(tokenizer, monkeypatch):
    monkeypatch.setattr(text, "_ENCODED_AT_ONCE", 7)
    sizes, encode_batch = [], tokenizer.encode_batch
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: sizes.append(len(texts)) or encode_batch(texts))
    rows = [Row((LETTERS[i % 26],), i % 2, i) for i in range(30)]
    task = TextTask("x", tokenizer, 16, ("a",), ("0", "1"), ("accuracy",), {"train": rows})
    assert [f.input_ids[1] for f in task.features("train")] == [5 + i % 26 for i in range(30)]
    assert sizes == [7, 7, 7, 7, 2] and task.features("train") is task.features("train") and len(sizes) == 5
