"""Tagging: every word gets one label and one prediction, and F1 is conlleval's."""

import itertools
import json
import string
import tarfile
from pathlib import Path

import numpy as np
import pytest

from electra_jax.config import UserError
from electra_jax.data.tokenizer import load_tokenizer
from electra_jax.tasks import tagging
from electra_jax.tasks.tagging import chunk_scores, chunks, convert

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LETTERS = string.ascii_lowercase + string.digits
TRAIN = """-DOCSTART- -X- O

Ada NNP B-PER
Lovelace NNP I-PER
wrote VBD O
in IN O
London NNP B-LOC

Turing NNP B-PER
Ada NNP B-PER
\x85\u200b\x00 NNP I-PER

x\u00a0y NN O
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token a letter."""
    file = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + a for a in LETTERS)]))
    return load_tokenizer(file)


def write(folder, text, name="train"):
    path = folder / f"{name}.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def task_of(tokenizer, folder, train=TRAIN, seq_len=64, dev=None, **options):
    return tagging.from_config({"train": write(folder, train), "dev": write(folder, dev or train, "dev"), **options},
                               tokenizer, seq_len)


def saying(task, split, tags):
    """Outputs that make the network say these tags (of `train_scheme`), one list for all words of the split."""
    tags = iter(tags)
    outputs = []
    for feature in task.features(split):
        logits = np.zeros((len(feature.input_ids) + 2, len(task.labels)))    # batches are padded
        for i in np.flatnonzero(feature.targets["label"] >= 0):
            logits[i, task.labels.index(next(tags))] = 2.0
        outputs.append({"logits": logits})
    return outputs


# --- Chunks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tags", "expected"), [
    ("B-A I-A O B-A", [("A", 0, 2), ("A", 3, 4)]),
    ("O I-A I-A O", [("A", 1, 3)]),                         # I begins a chunk after O
    ("B-A I-B I-B", [("A", 0, 1), ("B", 1, 3)]),            # and after another type
    ("I-A B-A I-A", [("A", 0, 1), ("A", 1, 3)]),            # IOB1
    ("B-A E-A S-A I-A E-A", [("A", 0, 2), ("A", 2, 3), ("A", 3, 5)]),
    ("E-A E-A B-A O", [("A", 0, 1), ("A", 1, 2), ("A", 2, 3)]),
    ("B-A I-A", [("A", 0, 2)]), ("", []), ("B-X-Y I-X-Y I-X", [("X-Y", 0, 2), ("X", 2, 3)]),
])
def test_chunks_are_conllevals_also_in_malformed_sequences(tags, expected):
    assert chunks(tags.split()) == expected


def conlleval(tags):
    """The script's two tables, looked up pair by pair, S as a chunk of its own."""
    ends = {"BB", "BO", "IB", "IO", "EE", "EI", "EO", "EB", "BS", "IS", "ES", "SB", "SI", "SE", "SS", "SO"}
    begins = {"BB", "IB", "OB", "EB", "SB", "OI", "EE", "EI", "OE", "SI", "SE", "BS", "IS", "OS", "ES", "SS"}
    found, open_at = [], None
    padded = ["O", *tags, "O"]
    for i, (before, tag) in enumerate(itertools.pairwise(padded)):
        changed = before[2:] != tag[2:]
        if before != "O" and (before[0] + tag[0] in ends or changed):
            found.append((before[2:], open_at, i))
        if tag != "O" and (before[0] + tag[0] in begins or changed):
            open_at = i
    return found


def test_chunks_and_scores_equal_an_independent_reference():
    rng = np.random.default_rng(0)
    names = ["O", *(f"{mark}-{kind}" for mark in "BIES" for kind in "AB")]
    pairs = [(rng.choice(names, n).tolist(), rng.choice(names, n).tolist()) for n in rng.integers(1, 12, 400)]
    right = ours = theirs = 0
    for gold, tags in pairs:
        assert chunks(gold) == conlleval(gold), gold
        right += sum(chunk in conlleval(gold) for chunk in conlleval(tags))
        ours, theirs = ours + len(conlleval(tags)), theirs + len(conlleval(gold))
    precision, recall = right / ours, right / theirs
    assert chunk_scores(pairs) == pytest.approx({
        "precision": 100 * precision, "recall": 100 * recall, "f1": 200 * precision * recall / (precision + recall)})


def test_f1_precision_and_recall_are_over_all_chunks_in_percent():
    # 3 gold chunks, 2 found, 1 right (the other has one word too many).
    pairs = [("B-A I-A O B-B".split(), "B-A I-A B-B I-B".split()), (["B-A"], ["O"])]
    assert chunk_scores(pairs) == pytest.approx({"precision": 50, "recall": 100 / 3, "f1": 40})
    assert chunk_scores([(["O"], ["O"])]) == {"precision": 0, "recall": 0, "f1": 0}


def test_tags_go_from_scheme_to_scheme_and_back():
    bio = "B-A I-A I-A B-A O B-B B-A I-A B-A".split()
    assert convert(bio, "bio", "bioes") == "B-A I-A E-A S-A O S-B B-A E-A S-A".split()
    assert convert(bio, "bio", "iob1") == "I-A I-A I-A B-A O I-B I-A I-A B-A".split()
    rng = np.random.default_rng(0)
    for _ in range(200):
        tags = convert(rng.choice(["O", "B-A", "I-A", "B-B", "I-B"], rng.integers(1, 10)).tolist(), "", "bio")
        for scheme in ("bioes", "iob1", "bio"):
            there = convert(tags, "bio", scheme)
            assert convert(there, scheme, "bio") == tags and chunks(there) == chunks(tags)
    malformed = "I-A O I-A".split()
    assert convert(malformed, "bio", "bio") == malformed


@pytest.mark.parametrize(("tags", "scheme"), [
    ("B-A I-A O", "bio"), ("I-A O I-A B-A", "iob1"), ("O I-A I-A", "iob1"), ("B-A E-A O S-A", "bioes"),
    ("B-A O I-A", "bio"), ("NN VB -LRB-", "plain"), ("O O", "bio"), ("B-A O", "bio")])
def test_the_scheme_is_found_from_the_tags(tokenizer, tmp_path, tags, scheme):
    task = task_of(tokenizer, tmp_path, "".join(f"w {tag}\n" for tag in tags.split()))
    assert task.scheme == task.train_scheme == scheme
    assert task.metric == ("accuracy" if scheme == "plain" else "f1")


def test_what_was_found_is_told(tokenizer, tmp_path, capsys):
    task_of(tokenizer, tmp_path, train_scheme="bioes")
    told = capsys.readouterr().out
    assert told == "task.train: 4 tags (B-LOC, B-PER, I-PER, O) in the scheme bio, learnt as bioes; the metric is f1\n"


@pytest.mark.parametrize(("train", "line", "tag"), [
    ("# my corpus\n\n" + TRAIN, 1, "corpus"), (TRAIN + "y NN B\n", 14, "B"),
    ("a B-A\nb I-A\nc U-A\nd L-A\ne X\n", 5, "X"),
])
def test_a_stray_tag_between_marked_ones_is_refused_and_named(tokenizer, tmp_path, train, line, tag):
    with pytest.raises(UserError) as error:
        task_of(tokenizer, tmp_path, train)
    assert f'train.txt:{line}: the tag "{tag}" has no span\'s mark' in str(error.value) and "\n" not in str(error.value)
    assert "task.scheme=plain" in str(error.value)
    assert task_of(tokenizer, tmp_path, train, scheme="plain").metric == "accuracy"


# --- Features and scores --------------------------------------------------------------------------------


def test_the_first_token_of_a_word_carries_its_label(tokenizer, tmp_path):
    task = task_of(tokenizer, tmp_path)
    assert task.labels == ("O", "B-LOC", "B-PER", "I-LOC", "I-PER") and task.splits() == ("train", "dev")
    first, second, third = task.features("train")
    assert [tokenizer.token(i) for i in first.input_ids[:5]] == ["[CLS]", "a", "##d", "##a", "l"]
    assert first.targets["label"][:12].tolist() == [-1, 2, -1, -1, 4, *[-1] * 7]
    assert first.input_ids[-1] == tokenizer.sep_id and first.targets["label"][-1] == -1
    assert set(first.token_type_ids) == {1} and first.input_ids.dtype == np.int32
    assert set(task_of(tokenizer, tmp_path, segment_ones=False).features("dev")[0].token_type_ids) == {0}
    # A word without any token is [UNK]; a no-break space does not end a word.
    assert second.input_ids[-2] == tokenizer.unk_id and second.targets["label"][-2] == 4
    assert (third.targets["label"] >= 0).sum() == 1


def test_a_long_sentence_is_cut_between_words_and_every_word_is_predicted(tokenizer, tmp_path):
    rng = np.random.default_rng(0)
    for seq_len in (3, 4, 7, 12):
        words = ["".join(rng.choice(list(LETTERS), n)) for n in rng.integers(1, 9, 30)]
        tags = rng.choice(["B-A", "I-A", "O"], 30).tolist()
        text = "".join(f"{w} {t}\n" for w, t in zip(words, tags, strict=True))
        task = task_of(tokenizer, tmp_path, text, seq_len=seq_len, scheme="bio")
        features = task.features("dev")
        assert all(len(f.input_ids) <= seq_len for f in features)
        labels = np.concatenate([f.targets["label"] for f in features])
        assert [task.labels[i] for i in labels[labels >= 0]] == tags
        if seq_len == 12:
            pieces = [tokenizer.token(i).removeprefix("##") for f in features for i in f.input_ids[1:-1]]
            assert "".join(pieces) == "".join(words)
        assert task.score("dev", saying(task, "dev", tags))["f1"] == 100


def test_scores_and_files_are_in_the_scheme_of_the_data(tokenizer, tmp_path):
    task = task_of(tokenizer, tmp_path, train_scheme="bioes")
    assert task.scheme == "bio" and task.labels[:5] == ("O", "B-LOC", "B-PER", "E-LOC", "E-PER")
    said = "B-PER E-PER O O S-PER B-PER E-PER S-PER O".split()
    outputs = saying(task, "dev", said)
    # Gold: PER 0-2, LOC 4-5; PER 0-1, PER 1-3. Said: PER 0-2, PER 4-5; PER 0-2, PER 2-3. One right of four and four.
    assert task.score("dev", outputs) == pytest.approx({"f1": 25, "precision": 25, "recall": 25,
                                                        "accuracy": 100 * 6 / 9})
    task.write_predictions("dev", outputs, tmp_path / "out")
    lines = (tmp_path / "out" / "tagging-dev.txt").read_text(encoding="utf-8").split("\n")
    assert lines[:6] == ["Ada B-PER B-PER", "Lovelace I-PER I-PER", "wrote O O", "in O O", "London B-LOC B-PER", ""]
    assert lines[6:8] == ["Turing B-PER B-PER", "Ada B-PER I-PER"] and lines[-3:] == ["x\u00a0y O O", "", ""]


def test_plain_tags_are_scored_by_accuracy(tokenizer, tmp_path):
    task = task_of(tokenizer, tmp_path, "a DT\nb NN\n\nc NN\nd VB\n", train_scheme="bioes", scheme="auto")
    assert task.train_scheme == task.scheme == "plain" and task.labels == ("DT", "NN", "VB")
    assert task.score("dev", saying(task, "dev", ["DT", "NN", "VB", "VB"])) == {"accuracy": 75}


def test_without_dev_a_fixed_share_of_train_is_held_out(tokenizer, tmp_path, capsys):
    path = write(tmp_path, "".join(f"w{i} O\n\n" for i in range(40)))
    task = tagging.from_config({"train": path}, tokenizer, 64)
    assert "4 of the 40" in capsys.readouterr().out
    words = {split: [s.words[0] for s in task._sentences[split]] for split in task.splits()}
    assert len(words["train"]) == 36 and sorted(words["train"] + words["dev"]) == sorted(f"w{i}" for i in range(40))
    again = tagging.from_config({"train": path}, tokenizer, 64)
    assert [s.words[0] for s in again._sentences["dev"]] == words["dev"]


def test_a_test_file_may_lack_the_tags(tokenizer, tmp_path):
    task = task_of(tokenizer, tmp_path, test=write(tmp_path, "Ada NNP\nwrote VBD\n\nx NN\n", "test"))
    assert task.splits() == ("train", "dev", "test")
    features = task.features("test")
    assert [f.targets for f in features] == [{}, {}]
    outputs = [{"logits": np.eye(5)[np.full(len(f.input_ids), 1)]} for f in features]
    task.write_predictions("test", outputs, tmp_path)
    assert (tmp_path / "tagging-test.txt").read_text() == "Ada B-LOC\nwrote B-LOC\n\nx B-LOC\n\n"
    with pytest.raises(UserError, match=r"task.test has no tags"):
        task.score("test", outputs)
    with pytest.raises(ValueError, match="outputs for"):
        task.write_predictions("test", [*outputs, *outputs], tmp_path)


def test_a_test_file_may_have_placeholders_for_tags(tokenizer, tmp_path):
    for tag in ("?", "B-XYZ"):
        task = task_of(tokenizer, tmp_path, test=write(tmp_path, f"Ada NNP {tag}\nx NN O\n", "test"))
        assert task.features("test")[0].targets == {}


def test_columns_and_tabs(tokenizer, tmp_path):
    text = "New York\tB-LOC\tx\nis\tO\ty\n"
    task = task_of(tokenizer, tmp_path, text, tag_column=1)
    assert task._sentences["train"][0].words == ["New York", "is"]
    assert task._sentences["train"][0].tags == ["B-LOC", "O"]
    task.write_predictions("dev", saying(task, "dev", ["B-LOC", "O"]), tmp_path)
    assert (tmp_path / "tagging-dev.txt").read_text() == "New York\tB-LOC\tB-LOC\nis\tO\tO\n\n"
    task = task_of(tokenizer, tmp_path, "Paris\tnoun phrase\nis\tverb\n")
    task.write_predictions("dev", saying(task, "dev", ["noun phrase", "verb"]), tmp_path)
    assert (tmp_path / "tagging-dev.txt").read_text() == "Paris\tnoun phrase\tnoun phrase\nis\tverb\tverb\n\n"
    text = "\ufeff1 Ada B-PER\r\n2 is O\r\n \r\n1 x O"
    for column, words in ((0, [["1", "2"], ["1"]]), (1, [["Ada", "is"], ["x"]])):
        task = task_of(tokenizer, tmp_path, text, word_column=column)
        assert [s.words for s in task._sentences["train"]] == words


def test_a_restored_task_reads_and_answers_new_text_as_the_trained_one(tokenizer, tmp_path):
    task = task_of(tokenizer, tmp_path, train_scheme="bioes", seq_len=8, name="chunk")
    restored = tagging.restore(json.loads(json.dumps(task.spec())), tokenizer)
    assert restored.spec() == task.spec() and restored.labels == task.labels and restored.splits() == ()
    assert restored.metric == task.metric and restored.name == "chunk" and restored.columns() == ("text",)
    record = {"text": "Ada L of Paris"}
    features = restored.encode(record)
    assert len(features) == 2 and all(f.targets == {} for f in features)
    for ours, theirs in zip(features, task.encode({"words": record["text"].split()}), strict=True):
        assert ours.input_ids.tolist() == theirs.input_ids.tolist()
    logits = [np.zeros((8, len(task.labels))) for _ in features]
    for window, position, label in ((0, 1, "B-PER"), (0, 4, "E-PER"), (0, 5, "O"), (1, 1, "S-LOC")):
        logits[window][position, task.labels.index(label)] = np.log(8)
    told = restored.answer(record, [{"logits": part} for part in logits])
    assert told["words"] == ["Ada", "L", "of", "Paris"] and told["tags"] == ["B-PER", "I-PER", "O", "B-LOC"]
    assert told["probabilities"] == pytest.approx([0.5] * 4)        # 8 against eight others
    assert told["entities"] == [{"type": "PER", "start": 0, "end": 2, "text": "Ada L"},
                                {"type": "LOC", "start": 3, "end": 4, "text": "Paris"}]
    assert json.loads(json.dumps(told)) == told


# --- What users get wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "text", "hints"), [
    ("train", "", ["no sentences"]), ("dev", "\n\n-DOCSTART- O\n", ["no sentences"]),
    ("train", None, ["cannot be read"]), ("dev", b"a NN O\nb\xe9 NN O\n", [":2 is not UTF-8"]),
    ("dev", "a NN O\n\nb O\n", [":3 has 2 columns", "3"]),
    ("train", "a\n", ["task.word_column=0", "task.tag_column=-1"]),
    ("dev", "a NN O\nb NN B-XYZ\n", [":2: the tag \"B-XYZ\"", "task.train"]),
    ("dev", "a NN O\n\nb NN E-PER\n", [":3: the tag \"E-PER\"", "scheme bio"]),
    ("train", "a B-A\nb L-A\nc U-A\n", ["BILOU", "E-"]),
])
def test_a_wrong_file_is_named_with_its_line(tokenizer, tmp_path, field, text, hints):
    paths = {"train": write(tmp_path, TRAIN), "dev": write(tmp_path, TRAIN, "dev")}
    paths[field].unlink() if text is None else write(tmp_path, text, field)
    with pytest.raises(UserError) as error:
        tagging.from_config(paths, tokenizer, 64)
    message = str(error.value)
    assert all(hint in message for hint in [f"task.{field}", paths[field].name, *hints]) and "\n" not in message


def test_wrong_fields_are_named(tokenizer, tmp_path):
    path = write(tmp_path, TRAIN)
    plain = write(tmp_path, "a DT\nb NN\n", "plain")
    unseen = write(tmp_path, "a DT\nb JJ\n", "unseen")
    for config, seq_len, hint in [
            ({}, 64, "task.train is empty"), ({"train": path}, 2, "data.seq_len=2"),
            ({"train": path, "scheme": "x"}, 64, "task.scheme=x"),
            ({"train": path, "train_scheme": "x"}, 64, "task.train_scheme=x"),
            ({"train": path, "tag_column": 3}, 64, "task.tag_column=3 .*:3, which has 3 columns"),
            ({"train": path, "word_column": -4}, 64, "task.word_column=-4"),
            ({"train": plain}, 64, "task.dev is empty, and the one sentence of task.train"),
            ({"train": plain, "dev": unseen}, 64, 'task.dev.*:2: the tag "JJ" does not occur'),
            ({"train": plain, "scheme": "bio"}, 64, 'task.train.*:1: the tag "DT" is not in the scheme bio')]:
        with pytest.raises(UserError, match=hint):
            tagging.from_config(config, tokenizer, seq_len)
    task = task_of(tokenizer, tmp_path)
    for record in ({"sentence": "x"}, {"words": []}, {"words": "abc"}, {"text": "  "}, {"words": [3]}):
        with pytest.raises(UserError, match=f"'words'.*record has {next(iter(record))}"):
            task.encode(record)


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
def test_conll_2000_is_read_in_full_and_its_gold_tags_score_100(tmp_path):
    with tarfile.open(DATA / "tasks.tar.xz") as archive:
        for name in ("train", "test"):
            archive.extract(f"tasks/CoNLL-2000/{name}.txt", tmp_path, filter="data")
    folder = tmp_path / "tasks/CoNLL-2000"
    tokenizer = load_tokenizer(DATA / "vocab_uncased.txt")
    task = tagging.from_config({"train": folder / "train.txt", "dev": folder / "test.txt", "train_scheme": "bioes"},
                               tokenizer, 128)
    assert [len(task._sentences[split]) for split in task.splits()] == [8936, 2012]
    assert task.scheme == "bio" and len(task.labels) == 45
    for sentence in task._sentences["train"] + task._sentences["dev"]:
        assert convert(convert(sentence.tags, "bio", "bioes"), "bioes", "bio") == sentence.tags
    outputs = [{"logits": np.eye(45)[f.targets["label"].clip(0)]} for f in task.features("dev")]
    assert task.score("dev", outputs) == {"f1": 100, "precision": 100, "recall": 100, "accuracy": 100}
