"""GLUE's official files, and TensorFlow Datasets, become tasks with GLUE's labels, metrics and submission files."""

import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from electra_jax.config import UserError
from electra_jax.data.tokenizer import load_tokenizer
from electra_jax.tasks import glue
from electra_jax.tasks.text import restore

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
WORDS = ["one", "two", "three", "four", "five", "six"]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, '"']
BINARY = {"0": 0, "1": 1}
SENTENCES = ["sentence1", "sentence2"]

# Header of train, of test, the columns of texts and label, and the labels with their numbers. CoLA has none in train.
LAYOUTS = {
    "cola": ("source label mark sentence", "index sentence", ["sentence"], "label", BINARY),
    "sst2": ("sentence label", "index sentence", ["sentence"], "label", BINARY),
    "mrpc": ("Quality,#1 ID,#2 ID,#1 String,#2 String", "index,#1 ID,#2 ID,#1 String,#2 String",
             ["#1 String", "#2 String"], "Quality", BINARY),
    "stsb": ("index genre filename year old_index source1 source2 sentence1 sentence2 score",
             "index genre filename year old_index source1 source2 sentence1 sentence2", SENTENCES, "score",
             {"0.000": 0.0, "2.500": 0.5, "5.000": 1.0}),
    "qqp": ("id qid1 qid2 question1 question2 is_duplicate", "id question1 question2", ["question1", "question2"],
            "is_duplicate", BINARY),
    "mnli": ("index promptID pairID genre p1 p2 p3 p4 sentence1 sentence2 label1 gold_label",
             "index promptID pairID genre p1 p2 p3 p4 sentence1 sentence2", SENTENCES, "gold_label",
             {"contradiction": 0, "entailment": 1, "neutral": 2}),
    "qnli": ("index question sentence label", "index question sentence", ["question", "sentence"], "label",
             {"entailment": 0, "not_entailment": 1}),
    "rte": ("index sentence1 sentence2 label", "index sentence1 sentence2", SENTENCES, "label",
            {"entailment": 0, "not_entailment": 1}),
    "wnli": ("index sentence1 sentence2 label", "index sentence1 sentence2", SENTENCES, "label", BINARY),
}
PAIRS = set(LAYOUTS) - {"cola", "sst2"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    file = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    file.write_text("\n".join(PIECES))
    return load_tokenizer(file)


def split_header(header):
    return header.split("," if "," in header else " ")


def write_split(path, name, is_test, labels):
    """One row a label; its texts are 'one "two' and 'three', the first with one word more in every row."""
    train, test, text_columns, label_column, _ = LAYOUTS[name]
    header = split_header(test if is_test else train)
    lines = [] if name == "cola" and not is_test else ["\t".join(header)]
    for i, label in enumerate(labels):
        texts = dict(zip(text_columns, ['one "two' + " four" * i, "three"], strict=False))
        lines.append("\t".join((texts | {label_column: label}).get(column, f"x{column}") for column in header))
    path.write_text("\n".join(lines) + "\n")


def write_task(folder, name, with_test=True):
    folder.mkdir(parents=True, exist_ok=True)
    labels = list(LAYOUTS[name][-1])
    write_split(folder / "train.tsv", name, False, labels)
    ends = ("_matched", "_mismatched") if name == "mnli" else ("",)
    for number, end in enumerate(ends):
        write_split(folder / f"dev{end}.tsv", name, False, labels[::-1] + labels[:1] * number)
        if with_test:
            write_split(folder / f"test{end}.tsv", name, True, ["?"] * (3 + number))


def first(task, split):
    return [task.tokenizer.decode(f.input_ids) for f in task.features(split)]


def outputs(task, answers):
    if task.head == "regression":
        return [{"score": np.float32(answer)} for answer in answers]
    return [{"logits": np.eye(len(task.labels), dtype=np.float32)[answer]} for answer in answers]


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_official_layout_gives_texts_and_labels(tmp_path, tokenizer, name, inside):
    folder = tmp_path / glue.TASKS[name].folder
    write_task(folder, name)
    task = glue.load(name, tokenizer, 32, str(folder if inside else tmp_path), double_unordered=False)
    more = " [SEP] three [SEP]" if name in PAIRS else " [SEP]"
    numbers = list(LAYOUTS[name][-1].values())
    assert first(task, "train") == [f'[CLS] one " two{" four" * i}{more}' for i in range(len(numbers))]
    assert [f.targets["label"] for f in task.features("train")] == numbers
    assert [f.targets["label"] for f in task.features("dev")] == numbers[::-1]
    assert first(task, "test")[2] == f'[CLS] one " two four four{more}' and len(task.features("test")) == 3
    assert all(f.targets == {} for f in task.features("test"))
    if name == "mnli":
        assert task.splits() == ("train", "dev", "dev_mismatched", "test", "test_mismatched")
        assert (len(task.features("dev_mismatched")), len(task.features("test_mismatched"))) == (4, 4)
    else:
        assert task.splits() == ("train", "dev", "test")


def test_test_files_are_not_needed(tmp_path, tokenizer):
    for name, splits in (("sst2", ("train", "dev")), ("mnli", ("train", "dev", "dev_mismatched"))):
        write_task(tmp_path / glue.TASKS[name].folder, name, with_test=False)
        assert glue.load(name, tokenizer, 32, tmp_path).splits() == splits


def test_a_test_file_may_have_placeholders_for_labels(tmp_path, tokenizer):
    write_task(tmp_path, "rte")
    (tmp_path / "test.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\t-1\n")
    assert glue.load("rte", tokenizer, 32, tmp_path).features("test")[0].targets == {}


def test_present_finds_the_tasks_whose_files_are_there(tmp_path, prepared):
    for name in ("wnli", "cola"):
        write_task(tmp_path / glue.TASKS[name].folder, name)
    (tmp_path / "RTE").mkdir()
    (tmp_path / "MRPC").mkdir()
    (tmp_path / "MRPC" / "msr_paraphrase_train.txt").touch()
    assert glue.present(str(tmp_path)) == ["cola", "mrpc", "wnli"]
    assert glue.present(f"tfds:{prepared}") == ["cola", "stsb", "mnli"]
    for data_dir in (tmp_path / "RTE", f"tfds:{tmp_path}"):
        with pytest.raises(UserError) as error:
            glue.present(data_dir)
        assert f"task.data_dir={data_dir}: " in one_line(error)


@pytest.mark.parametrize(("name", "metrics"), [
    ("cola", ["matthews", "accuracy"]), ("sst2", ["accuracy"]), ("mrpc", ["accuracy", "f1"]),
    ("stsb", ["spearman", "pearson"]), ("qqp", ["accuracy", "f1"]), ("mnli", ["accuracy"]), ("qnli", ["accuracy"]),
    ("rte", ["accuracy"]), ("wnli", ["accuracy"]),
])
def test_metrics_are_the_official_ones_main_first(tmp_path, tokenizer, name, metrics):
    write_task(tmp_path / glue.TASKS[name].folder, name)
    task = glue.load(name, tokenizer, 32, tmp_path)
    right = [f.targets["label"] for f in task.features("dev")]
    found = task.score("dev", outputs(task, right))
    assert list(found) == metrics and task.metric == metrics[0]
    assert list(found.values()) == pytest.approx([100] * len(metrics))
    assert task.score("dev", outputs(task, right[::-1]))[task.metric] < 50
    if name == "mnli":
        assert task.score("dev_mismatched", outputs(task, [2, 1, 0, 1])) == {"accuracy": 75}


def test_only_mrpc_and_stsb_are_doubled_and_only_in_train(tmp_path, tokenizer):
    for name in LAYOUTS:
        write_task(tmp_path / glue.TASKS[name].folder, name)
        once = glue.load(name, tokenizer, 32, tmp_path, double_unordered=False)
        task = glue.load(name, tokenizer, 32, tmp_path)
        count = len(once.features("train"))
        if name in ("mrpc", "stsb"):
            assert first(task, "train")[:count] == first(once, "train")
            assert first(task, "train")[count + 1] == '[CLS] three [SEP] one " two four [SEP]'
            assert [f.targets for f in task.features("train")] == 2 * [f.targets for f in once.features("train")]
        else:
            assert first(task, "train") == first(once, "train")
        assert first(task, "dev") == first(once, "dev") and first(task, "test") == first(once, "test")


@pytest.mark.parametrize(("name", "file", "answers", "lines"), [
    ("cola", "CoLA.tsv", [0, 1, 0], ["0", "1", "0"]), ("sst2", "SST-2.tsv", [1, 1, 0], ["1", "1", "0"]),
    ("mrpc", "MRPC.tsv", [1, 0, 0], ["1", "0", "0"]), ("qqp", "QQP.tsv", [1, 0, 0], ["1", "0", "0"]),
    ("stsb", "STS-B.tsv", [0.5, 1.25, -0.5], ["2.5", "5", "0"]),
    ("mnli", "MNLI-m.tsv", [0, 1, 2], ["contradiction", "entailment", "neutral"]),
    ("qnli", "QNLI.tsv", [0, 1, 0], ["entailment", "not_entailment", "entailment"]),
    ("rte", "RTE.tsv", [0, 1, 0], ["entailment", "not_entailment", "entailment"]),
    ("wnli", "WNLI.tsv", [0, 1, 0], ["0", "1", "0"]),
])
def test_predictions_of_test_are_a_submission_and_those_of_dev_show_the_label(tmp_path, tokenizer, name, file, answers,
                                                                             lines):
    write_task(tmp_path / glue.TASKS[name].folder, name)
    task, out = glue.load(name, tokenizer, 32, tmp_path), tmp_path / "out"
    task.write_predictions("test", outputs(task, answers), out)
    assert (out / file).read_text() == "index\tprediction\n" + "".join(f"{i}\t{x}\n" for i, x in enumerate(lines))
    gold = list(LAYOUTS[name][-1])[::-1]
    task.write_predictions("dev", outputs(task, answers[:len(gold)]), out)
    table = [line.split("\t") for line in (out / file.replace(".tsv", "-dev.tsv")).read_text().splitlines()]
    scored = ["2.5", "6.25", "-2.5"] if name == "stsb" else lines    # only a submission is clipped
    assert table[0] == ["index", "prediction", "label"] and [row[1] for row in table[1:]] == scored[:len(gold)]
    assert [row[2] for row in table[1:]] == (["5", "2.5", "0"] if name == "stsb" else gold)
    if name == "mnli":
        task.write_predictions("test_mismatched", outputs(task, [0] * 4), out)
        task.write_predictions("dev_mismatched", outputs(task, [0] * 4), out)
        assert {f.name for f in out.iterdir()} == {"MNLI-m.tsv", "MNLI-m-dev.tsv", "MNLI-mm.tsv", "MNLI-mm-dev.tsv"}


def test_qqp_leaves_malformed_rows_of_train_out_and_counts_them(tmp_path, tokenizer, capsys):
    write_task(tmp_path, "qqp")
    with open(tmp_path / "train.tsv", "a") as file:
        file.write("7\t8\t9\tone\n7\t8\t9\tone\ttwo\t1\n7\t8\n")
    task = glue.load("qqp", tokenizer, 32, tmp_path)
    assert len(task.features("train")) == 3 and first(task, "train")[2] == "[CLS] one [SEP] two [SEP]"
    assert f"{tmp_path}/train.tsv: 2 malformed rows left out, the first is line 4." in capsys.readouterr().out
    with open(tmp_path / "test.tsv", "a") as file:
        file.write("7\tone\n")
    with pytest.raises(UserError) as error:    # of test every row wants a prediction
        glue.load("qqp", tokenizer, 32, tmp_path)
    assert f"{tmp_path}/test.tsv:5 has 2 columns" in one_line(error)


def test_malformed_rows_of_the_others_are_errors(tmp_path, tokenizer):
    write_task(tmp_path, "rte")
    with open(tmp_path / "train.tsv", "a") as file:
        file.write("7\tone\n")
    with pytest.raises(UserError) as error:
        glue.load("rte", tokenizer, 32, tmp_path)
    assert f"task.data_dir: {tmp_path}/train.tsv:4 has 2 columns" in one_line(error)


def test_mrpc_as_microsoft_publishes_it_is_divided_by_glues_list(tmp_path, tokenizer):
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    (tmp_path / "msr_paraphrase_train.txt").write_text(
        header + '1\t11\t12\tone "two\tthree\r\n0\t13\t14\tfour\tfive\r\n1\t12\t11\ttwo\tsix\r\n', newline="")
    (tmp_path / "msr_paraphrase_test.txt").write_text(header + "1\t15\t16\tsix\tone\r\n", newline="")
    for use in (lambda: glue.load("mrpc", tokenizer, 32, tmp_path), lambda: glue.files("mrpc", tmp_path)):
        with pytest.raises(UserError) as error:
            use()
        assert "dev_ids.tsv" in one_line(error)
    (tmp_path / "dev_ids.tsv").write_text("13\t14\n11\t13\n")
    assert [*glue.files("mrpc", tmp_path)] == ["msr_paraphrase_train.txt", "dev_ids.tsv", "msr_paraphrase_test.txt"]
    task = glue.load("mrpc", tokenizer, 32, tmp_path, double_unordered=False)
    assert first(task, "train") == ['[CLS] one " two [SEP] three [SEP]', "[CLS] two [SEP] six [SEP]"]
    assert first(task, "dev") == ["[CLS] four [SEP] five [SEP]"]
    assert first(task, "test") == ["[CLS] six [SEP] one [SEP]"]
    assert task.features("dev")[0].targets == {"label": 0}


@pytest.mark.parametrize(("name", "change", "hint"), [
    ("glue", None, "task.name='glue' is no task of GLUE: choose from cola, "),
    ("rte", "rte-none", "task.data_dir=rte-none: neither RTE/train.tsv nor train.tsv"),
    ("rte", "", "task.data_dir is empty"),
    ("rte", ("dev.tsv", None), "dev.tsv cannot be read (No such file"),
    ("rte", ("dev.tsv", "index\tsentence1\tsentence2\tlabel\n"), "dev.tsv has no rows"),
    ("rte", ("dev.tsv", "index\tsentence1\tlabel\n0\ta\tb\n"), "no such column: name one of index, sentence1, label"),
    ("rte", ("dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tneutral\n"), "dev.tsv:2: label 'neutral' is"),
    ("rte", ("train.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t\n"), "train.tsv:2 has an empty label"),
    ("rte", ("train.tsv", b"index\tsentence1\tsentence2\tlabel\n0\ta\t\xff\t1\n"), "train.tsv:2 is not UTF-8"),
    ("stsb", ("dev.tsv", "sentence1\tsentence2\tscore\na\tb\t5.5\n"), "dev.tsv:2: label '5.5' is not between 0 and 5"),
    ("stsb", ("dev.tsv", "sentence1\tsentence2\tscore\na\tb\thigh\n"), "dev.tsv:2: label 'high' is not a number"),
])
def test_files_that_cannot_work_are_one_line(tmp_path, tokenizer, name, change, hint):
    if name in LAYOUTS:
        write_task(tmp_path, name)
    if isinstance(change, tuple):
        (tmp_path / change[0]).unlink()
        if change[1] is not None:
            (tmp_path / change[0]).write_bytes(change[1] if isinstance(change[1], bytes) else change[1].encode())
    with pytest.raises(UserError) as error:
        glue.load(name, tokenizer, 32, change if isinstance(change, str) else tmp_path)
    assert hint in one_line(error) and "task." in str(error.value)


def test_a_task_comes_back_from_its_spec_and_reads_records_by_glues_columns(tmp_path, tokenizer):
    texts = {"cola": ["sentence"], "sst2": ["sentence"], "qqp": ["question1", "question2"],
             "qnli": ["question", "sentence"]}
    for name in LAYOUTS:
        write_task(tmp_path / glue.TASKS[name].folder, name)
        task = glue.load(name, tokenizer, 32, tmp_path)
        again = restore(json.loads(json.dumps(task.spec())), tokenizer)
        assert (again.name, again.labels, again.head) == (name, task.labels, task.head)
        columns = texts.get(name, ["sentence1", "sentence2"])
        record = dict(zip(columns, ["three", "five"], strict=False))
        wanted = "[CLS] three [SEP] five [SEP]" if name in PAIRS else "[CLS] three [SEP]"
        assert tokenizer.decode(again.encode(record)[0].input_ids) == wanted
        answer = again.answer(record, outputs(again, [1]))
        assert answer == {"score": 5} if name == "stsb" else answer["label"] == task.labels[1]


# --- TensorFlow Datasets ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Tiny `glue/...` that TensorFlow Datasets itself writes, with examples of ours in place of the download."""
    glue_of_tfds = pytest.importorskip("tensorflow_datasets.text.glue").Glue
    folder = tmp_path_factory.mktemp("tfds")
    labels = {"mnli": (2, 0, 1), "stsb": (0.0, 2.5, 5.0), "cola": (1, 0, 1)}

    def examples(self, split):
        for i in range(12):
            texts = dict(zip(self.builder_config.text_features, ['one "two' + " four" * i, "three"], strict=False))
            yield i, texts | {"idx": i, "label": -1 if "test" in split else labels[self.builder_config.name][i % 3]}

    def splits(self, dl_manager):
        ends = ("_matched", "_mismatched") if self.builder_config.name == "mnli" else ("",)
        names = ["train", *(f"{split}{end}" for split in ("validation", "test") for end in ends)]
        return {name: self._generate_examples(name) for name in names}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glue_of_tfds, "_generate_examples", examples)
        patch.setattr(glue_of_tfds, "_split_generators", splits)
        for name in labels:
            glue_of_tfds(data_dir=folder, config=name, file_format="array_record").download_and_prepare()
    return folder


def test_tfds_gives_the_same_as_the_files_in_glues_order_without_tensorflow(prepared, tokenizer):
    pair, single = '[CLS] one " two four [SEP] three [SEP]', '[CLS] one " two four [SEP]'
    wanted = {"mnli": ([0, 1, 2], pair), "stsb": ([0, 0.5, 1], pair), "cola": ([1, 0, 1], single)}
    for name, (labels, second) in wanted.items():
        task = glue.load(name, tokenizer, 32, f"tfds:{prepared}", double_unordered=False)
        assert task.splits() == (("train", "dev", "dev_mismatched", "test", "test_mismatched") if name == "mnli" else
                                 ("train", "dev", "test"))
        assert [f.targets["label"] for f in task.features("dev")] == labels * 4
        for split in task.splits():
            assert first(task, split)[1] == second
            lengths = [len(f.input_ids) for f in task.features(split)]
            assert lengths == sorted(lengths) and len(lengths) == 12
        assert all(f.targets == {} for f in task.features("test"))
        files = glue.files(name, f"tfds:{prepared}")
        assert sum("array_record" in file for file in files) == len(task.splits())
    assert "tensorflow" not in sys.modules


def test_tfds_that_cannot_be_opened_is_one_line(prepared, tokenizer):
    for use in (lambda where: glue.load("rte", tokenizer, 32, where), lambda where: glue.files("rte", where)):
        with pytest.raises(UserError) as error:
            use(f"tfds:{prepared}")
        assert f"task.data_dir=tfds:{prepared}: tfds cannot open glue/rte" in one_line(error)


# --- The real thing -----------------------------------------------------------------------------


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
def test_the_real_files_have_their_published_sizes_and_baselines(tmp_path):
    tokenizer = load_tokenizer(DATA / "vocab_uncased.txt")
    with tarfile.open(DATA / "tasks.tar.xz") as archive:
        archive.extractall(tmp_path, [m for m in archive if m.name.endswith(".tsv")], filter="data")
    sizes = {"cola": (8551, 1043), "sst2": (67349, 872), "mrpc": (3668, 408), "stsb": (5749, 1500), "rte": (2490, 277),
             "qnli": (4224, 1239)}
    constant = {"cola": (1, {"matthews": 0, "accuracy": 69.1}), "mrpc": (1, {"accuracy": 68.4, "f1": 81.2}),
                "rte": (0, {"accuracy": 52.7}), "stsb": (0.5, {"spearman": 0, "pearson": 0}),
                "sst2": (1, {"accuracy": 50.9}), "qnli": (1, {"accuracy": 50.6})}
    for name, (train, dev) in sizes.items():
        task = glue.load(name, tokenizer, 128, tmp_path / "tasks", double_unordered=False)
        assert (len(task._rows["train"]), len(task.features("dev"))) == (train, dev)
        assert max(len(f.input_ids) for f in task.features("dev")) <= 128
        answer, expected = constant[name]
        assert task.score("dev", outputs(task, [answer] * dev)) == pytest.approx(expected, abs=0.05)
