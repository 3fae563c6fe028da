"""SQuAD: windows lose no token, the best spans are found, and scores are those of the official scripts."""

import itertools
import json
import string
import tarfile
from pathlib import Path

import numpy as np
import pytest

from electra_jax.config import UserError
from electra_jax.data.tokenizer import load_tokenizer, train_sentencepiece
from electra_jax.tasks import squad
from electra_jax.tasks.scores import against_gold, answer_f1, best_threshold, normalise_answer

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LETTERS = string.ascii_lowercase + string.digits
CONTEXT = "Ada Lovelace wrote notes in 1843. The café of Zoë opened in 1901."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token a letter, so that any answer has one."""
    file = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + a for a in LETTERS), *".,?'-", "in"]
    file.write_text("\n".join(pieces))
    return load_tokenizer(file)


def qa(name, answers=(), question="who", **more):
    found = [{"text": a, "answer_start": CONTEXT.index(a)} for a in answers]
    return {"id": name, "question": question, "answers": found, **more}


def file_of(folder, qas, name="dev", context=CONTEXT):
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"version": "x", "data": [{"title": "t", "paragraphs": [
        {"context": context, "qas": qas}]}]}), encoding="utf-8")
    return path


def task_of(tokenizer, folder, qas, seq_len=128, test=None, **options):
    path = file_of(folder, qas)
    config = {"train": path, "dev": path, **options}
    if test is not None:
        config["test"] = file_of(folder, test, "test")
    return squad.from_config(config, tokenizer, seq_len)


def outputs_of(task, split, spans, odds=None, joint=False):
    """Outputs that answer question i with characters spans[i] (start, end), and no answer with odds[i]."""
    outputs = []
    for i, question in enumerate(task._questions[split]):
        first, last = squad._tokens_of(question.context, *spans[i])
        for window, feature in zip(task._windows(question), task._features(question), strict=True):
            start = np.full(len(feature.input_ids), -9.0)
            end = start.copy()
            start[first - window.start + window.offset] = end[last - window.start + window.offset] = -1.0
            impossible = odds[i] if odds else 0.0
            start[0] = impossible - 2.0      # minus the best span's -2, with end[0] = 0, gives `odds`
            end[0] = 0.0
            out = {"start": start, "end": end, "impossible": np.float32(impossible)}
            if joint:
                out = {"start_positions": np.array([start[1:].argmax() + 1]), "start_log_probs": np.array([-1.0]),
                       "end_positions": np.array([[end[1:].argmax() + 1]]), "end_log_probs": np.array([[-1.0]]),
                       "impossible": np.float32(impossible)}
            outputs.append(out)
    return outputs


# --- Metrics --------------------------------------------------------------------------------------------


def test_normalisation_f1_and_exact_match_are_the_official_ones(tokenizer, tmp_path):
    assert normalise_answer("The  Cat's, an\tA-b!") == "cats ab"
    assert normalise_answer("a.an.the") == "aanthe" and normalise_answer("theatre A") == "theatre"
    assert answer_f1("the cat sat", "cat sat down") == pytest.approx(0.8)     # 2/2 precise, 2/3 recalled
    assert answer_f1("cat cat", "cat") == pytest.approx(2 / 3)
    assert answer_f1("dog", "cat") == 0 and answer_f1("", "the") == 1 and answer_f1("dog", "") == 0
    answers = ["notes in 1843", "The café of Zoë"]
    for version, text, expected in [("v1.1", "café of Zoë.", (1, 1)), ("v1.1", "notes", (0, 0.5)),
                                    ("v1.1", "in 1843. The café", (0, 2 / 3)), ("v1.1", "", (0, 0))]:
        task = task_of(tokenizer, tmp_path, [qa("1", answers)], version=version)
        got = against_gold(text, task._questions["dev"][0].answers, task._v2)
        assert got == pytest.approx(expected), text
    # In v2.0 a gold answer of articles only does not count; without another there is no answer.
    task = task_of(tokenizer, tmp_path, [qa("1", ["The", "1843"]), qa("2", ["The"])], version="v2.0")
    first, second = task._questions["dev"]
    assert against_gold("", first.answers, True) == (0, 0) and against_gold("", second.answers, True) == (1, 1)
    task = task_of(tokenizer, tmp_path, [qa("2", ["The"])], version="v1.1")
    assert against_gold("The", task._questions["dev"][0].answers, False) == (1, 0)    # evaluate-v1.1.py's


def test_scores_are_means_over_all_questions_with_the_best_gold_answer_in_percent(tokenizer, tmp_path):
    task = task_of(tokenizer, tmp_path, [qa("1", ["1901", "1843"]), qa("2", ["notes in 1843"]), qa("3", ["Zoë"])])
    spans = [(CONTEXT.index(a), CONTEXT.index(a) + len(a)) for a in ("1843", "notes in", "1901")]
    assert task.metric == "f1"
    assert task.score("dev", outputs_of(task, "dev", spans)) == pytest.approx({"em": 100 / 3, "f1": 180 / 3})


def test_the_best_threshold_is_the_best_of_all(tokenizer, tmp_path):
    # 0.1: answered right; 0.2: has none; 0.3: answered half right; 0.4: has none.
    answered, empty = np.array([1, 0, 0.5, 0]), np.array([0, 1, 0, 1.0])
    assert best_threshold(answered, empty, np.array([0.1, 0.2, 0.3, 0.4])) == (0.75, 0.1)
    assert best_threshold(answered, empty, np.array([4.0, 2, 3, 1])) == (0.5, 0.0)    # all empty: below the lowest
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = rng.integers(1, 9)
        odds = rng.integers(0, 4, n).astype(float)      # many are equal
        answered, empty = rng.random(n), rng.integers(0, 2, n).astype(float)
        best, threshold = best_threshold(answered, empty, odds)
        by_hand = {t: np.where(odds > t, empty, answered).mean() for t in (-1.0, 0.0, 1.0, 2.0, 3.0)}
        assert best == pytest.approx(max(by_hand.values()))
        assert np.where(odds > threshold, empty, answered).mean() == pytest.approx(best)


@pytest.mark.parametrize("joint", [False, True])
def test_unanswerable_questions_are_scored_at_a_threshold_chosen_on_dev_and_kept_for_test(tokenizer, tmp_path, joint):
    qas = [qa("right", ["1843"]), qa("none", is_impossible=True), qa("half", ["notes in 1843"]),
           qa("sure", is_impossible=True)]
    task = task_of(tokenizer, tmp_path, qas, version="v2.0", test=[qa("t1"), qa("t2")], joint_head=joint)
    assert task.metric == "best_f1" and task.joint_head == joint
    year = (CONTEXT.index("1843"), CONTEXT.index("1843") + 4)
    outputs = outputs_of(task, "dev", [year] * 4, [-3.0, 1.0, 2.0, 3.0], joint)
    scores = task.score("dev", outputs)
    # F1 of "1843" against "notes in 1843" is 0.5. Threshold -3 answers the first only: (1 + 1 + 0 + 1) / 4.
    assert scores == pytest.approx({
        "em": 75, "f1": 75, "HasAns_em": 50, "HasAns_f1": 50, "NoAns_em": 100, "NoAns_f1": 100, "best_em": 75,
        "best_f1": 75, "threshold": -3})
    tests = outputs_of(task, "test", [year] * 2, [-3.5, -2.5], joint)
    task.threshold = 9.0     # another run's: the files of dev go by their own outputs
    for split, out in (("dev", outputs), ("test", tests)):
        task.write_predictions(split, out, tmp_path / "out")
    read = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in (
        "predictions-dev", "predictions-test", "null_odds-dev", "nbest-dev")}
    assert read["predictions-dev"] == {"right": "1843", "none": "", "half": "", "sure": ""}
    assert read["predictions-test"] == {"t1": "1843", "t2": ""}
    assert read["null_odds-dev"] == pytest.approx({"right": -3, "none": 1, "half": 2, "sure": 3})
    assert read["nbest-dev"]["none"][0]["text"] == "1843"
    with pytest.raises(UserError, match=r"task.test has no answers"):
        task.score("test", tests)
    given = task_of(tokenizer, tmp_path, qas, version="v2.0", null_threshold=5.0)
    scores = given.score("dev", outputs)
    assert scores["threshold"] == 5 and scores["f1"] == pytest.approx(37.5) and scores["best_f1"] == pytest.approx(75)
    given.write_predictions("dev", outputs, tmp_path)
    assert set(json.loads((tmp_path / "predictions-dev.json").read_text()).values()) == {"1843"}
    assert scores["NoAns_f1"] == 0 and scores["HasAns_f1"] == pytest.approx(75)


# --- Features -------------------------------------------------------------------------------------------


def test_a_feature_is_cls_question_sep_window_sep_with_its_answer(tokenizer, tmp_path):
    feature, impossible = task_of(tokenizer, tmp_path, [qa("1", ["1843"], "Who?"), qa("2", is_impossible=True)],
                                  version="v2.0").features("train")
    tokens = [tokenizer.token(i) for i in feature.input_ids]
    assert tokens[:8] == ["[CLS]", "w", "##h", "##o", "?", "[SEP]", "a", "##d"] and tokens[-2:] == [".", "[SEP]"]
    assert feature.token_type_ids.tolist() == [0] * 6 + [1] * (len(tokens) - 6)
    assert feature.allowed.tolist() == [True] + [False] * 5 + [True] * (len(tokens) - 6)
    assert tokens[feature.targets["start"]:feature.targets["end"] + 1] == ["1", "##8", "##4", "##3"]
    assert feature.targets["impossible"] == 0 and feature.input_ids.dtype == np.int32
    assert impossible.targets == {"start": 0, "end": 0, "impossible": 1}


def test_an_answer_outside_a_window_points_at_cls_and_is_not_impossible(tokenizer, tmp_path):
    task = task_of(tokenizer, tmp_path, [qa("1", ["1843"])], seq_len=25, doc_stride=9)
    features = task.features("dev")
    assert len(features) > 3
    inside = 0
    for feature in features:
        tokens = [tokenizer.token(i).removeprefix("##") for i in feature.input_ids]
        targets = feature.targets
        assert targets["impossible"] == 0 and len(tokens) <= 25
        if "1843" in "".join(tokens):
            inside += 1
            assert "".join(tokens[targets["start"]:targets["end"] + 1]) == "1843"
        else:
            assert (targets["start"], targets["end"]) == (0, 0)
    assert 0 < inside < len(features)


def test_windows_hold_every_token_of_a_context_and_each_is_scored_where_it_has_most_context(tokenizer, tmp_path):
    rng = np.random.default_rng(0)
    sizes = [[int(rng.integers(*span)) for span in ((0, 90), (7, 40), (1, 50))] for _ in range(150)]
    sizes += [[301, 306, 150]]    # 300 tokens and 151: such a difference outweighs one more of context, as in BERT
    for length, seq_len, stride in sizes:
        task = squad.SquadTask(tokenizer, seq_len, {"doc_stride": stride})
        letters = "".join(rng.choice(list(LETTERS), length))
        text = " ".join(letters[i:i + 99] for i in range(0, length, 99))     # a longer word is one [UNK]
        question = task._asked({"question": "who", "context": text})
        windows, features = task._windows(question), task._features(question)
        room = seq_len - 6
        rebuilt, owners = {}, [[] for _ in range(length)]
        for number, (window, feature) in enumerate(zip(windows, features, strict=True)):
            assert len(feature.input_ids) <= seq_len and len(window) == min(room, length - window.start)
            for i in range(len(window)):
                rebuilt[window.start + i] = feature.input_ids[window.offset + i]
                owners[window.start + i] += [number] * bool(window.owned[i])
        assert [rebuilt[i] for i in range(length)] == question.context.ids.tolist()
        starts = [w.start for w in windows]
        assert np.diff(starts).tolist() == [min(stride, room)] * (len(starts) - 1)
        assert starts[-1] + room >= length and (len(starts) == 1 or starts[-2] + room < length)
        for i in range(length):
            sides = {n: min(i - w.start, w.start + len(w) - 1 - i) + 0.01 * len(w) for n, w in enumerate(windows)
                     if w.start <= i < w.start + len(w)}
            assert owners[i] == [max(sides, key=lambda n: (sides[n], -n))]


def test_answers_are_found_by_characters_and_those_inside_a_word_are_counted(tokenizer, tmp_path, capsys):
    for answer in ("Ada Lovelace", "café", "Zoë", "1901.", "e"):
        task = task_of(tokenizer, tmp_path, [qa("1", [answer])])
        question = task._questions["dev"][0]
        assert squad._text(question.context, *question.span) == answer and task.inexact["dev"] == 0
    task = task_of(tokenizer, tmp_path, [qa("1", ["n"])])    # the first n stands in no "in": "n" of "notes" is a token
    assert task.inexact["dev"] == 0
    inside = {"id": "1", "question": "who", "answers": [{"text": "n 1843", "answer_start": CONTEXT.index("n 1843")}]}
    task = task_of(tokenizer, tmp_path, [inside])
    question = task._questions["dev"][0]
    assert squad._text(question.context, *question.span) == "in 1843" and task.inexact == {"train": 1, "dev": 1}
    assert f"{tmp_path}/dev.json: 1 of 1 answers begin or end inside a token" in capsys.readouterr().out


def test_answers_at_wrong_offsets_are_told_and_many_are_refused(tokenizer, tmp_path, capsys):
    good = [qa(str(i), ["1843"]) for i in range(120)]
    bad = [{"id": f"x{i}", "question": "who", "answers": [{"text": "1843", "answer_start": 3}]} for i in range(2)]
    task_of(tokenizer, tmp_path, good[:2])
    assert capsys.readouterr().out == ""
    task_of(tokenizer, tmp_path, [*good, bad[0]])
    told = f"task.dev: {tmp_path}/dev.json: 1 of 121 answers are not at their answer_start, the first is of question x0"
    assert f"warning: {told}; they" in capsys.readouterr().out
    with pytest.raises(UserError) as error:
        task_of(tokenizer, tmp_path, [*good, *bad])
    assert "2 of 122 answers are not at their answer_start, the first is of question x0: count characters" in str(
        error.value) and "\n" not in str(error.value)


# --- Predictions ----------------------------------------------------------------------------------------


def by_brute_force(task, question, outputs):
    """All (score, start, end) in characters, best first, found with plain loops."""
    found = []
    for window, out in zip(task._windows(question), outputs, strict=True):
        if "start_positions" in out:
            size = range(len(out["start_positions"]))
            pairs = [(out["start_positions"][i], out["end_positions"][i, j],
                      out["start_log_probs"][i] + out["end_log_probs"][i, j]) for i in size for j in size]
        else:
            size = range(len(out["start"]))
            pairs = [(i, j, out["start"][i] + out["end"][j]) for i in size for j in size]
        for i, j, score in pairs:
            a, b = i - window.offset, j - window.offset
            if 0 <= a <= b < len(window) and b - a < task.options["max_answer"] and window.owned[a]:
                spans = question.context.spans[window.start:]
                found.append((score, int(spans[a, 0]), int(spans[b, 1])))
    return sorted(found, key=lambda row: -row[0])[:task.options["n_best"]]


@pytest.mark.parametrize("joint", [False, True])
def test_the_n_best_spans_are_those_of_a_search_over_all_spans_of_all_windows(tokenizer, joint):
    rng = np.random.default_rng(int(joint))
    several = 0
    for _ in range(60):
        options = {"doc_stride": int(rng.integers(3, 12)), "max_answer": int(rng.integers(1, 9)),
                   "n_best": int(rng.integers(1, 12))}
        task = squad.SquadTask(tokenizer, int(rng.integers(12, 30)), options)
        record = {"question": "who", "context": "".join(rng.choice(list(LETTERS + "   .,"), rng.integers(1, 60)))}
        question, outputs = task._asked(record), []
        for feature in task.encode(record):
            length = len(feature.input_ids) + int(rng.integers(0, 4))       # batches are padded
            if joint:
                k = min(4, length)
                outputs.append({"start_positions": rng.permutation(length)[:k], "impossible": rng.normal(),
                                "start_log_probs": rng.normal(size=k), "end_log_probs": rng.normal(size=(k, k)),
                                "end_positions": np.stack([rng.permutation(length)[:k] for _ in range(k)])})
            else:
                outputs.append({"start": rng.normal(size=length), "end": rng.normal(size=length), "impossible": 0.0})
        several += len(outputs) > 1
        prediction = task._predict(question, outputs)
        expected = by_brute_force(task, question, outputs)
        assert [(e["start"], e["end"]) for e in prediction.n_best] == [row[1:] for row in expected]
        assert [e["score"] for e in prediction.n_best] == pytest.approx([row[0] for row in expected])
        assert all(e["text"] == record["context"][e["start"]:e["end"]] != "" for e in prediction.n_best)
        if expected:
            weights = np.exp([row[0] for row in expected])
            assert [e["probability"] for e in prediction.n_best] == pytest.approx(list(weights / weights.sum()))
        if joint:
            assert prediction.null_odds == pytest.approx(min(out["impossible"] for out in outputs))
        elif expected:
            null = min(out["start"][0] + out["end"][0] for out in outputs)
            assert prediction.null_odds == pytest.approx(null - expected[0][0])
    assert several > 20


def test_a_test_file_with_answers_is_scored_at_the_threshold_of_dev(tokenizer, tmp_path):
    qas = [qa("1", ["1843"]), qa("2", is_impossible=True)]
    task = task_of(tokenizer, tmp_path, qas, version="v2.0", test=qas)
    year = (CONTEXT.index("1843"), CONTEXT.index("1843") + 4)
    assert task.score("dev", outputs_of(task, "dev", [year] * 2, [1.0, 2.0]))["threshold"] == 1
    scores = task.score("test", outputs_of(task, "test", [year] * 2, [3.0, 4.0]))
    assert scores["threshold"] == task.threshold == 1
    assert scores["f1"] == 50 and scores["best_f1"] == 100


def test_tokens_without_text_neither_begin_nor_end_an_answer():
    tokenizer = train_sentencepiece(["abc cab bca " * 9], 12)     # "▁" alone is a token before 漢
    task = squad.SquadTask(tokenizer, 64, {"n_best": 1000})
    record = {"question": "abc", "context": "漢 abc 漢  cab"}
    feature, = task.encode(record)
    assert any(tokenizer.token(i) == "▁" for i in feature.input_ids)
    size = len(feature.input_ids)
    told = task.answer(record, [{"start": np.zeros(size), "end": np.zeros(size), "impossible": 0.0}])
    spans = [(entry["start"], entry["end"]) for entry in told["n_best"]]
    assert len(set(spans)) == len(spans) and all(a < b for a, b in spans) and (0, 1) in spans


def test_a_context_without_tokens_has_an_empty_answer(tokenizer):
    task = squad.SquadTask(tokenizer, 16, {"version": "v2.0"})
    record = {"question": "who", "context": " \u0301"}
    feature, = task.encode(record)
    assert len(feature.input_ids) == 6
    told = task.answer(record, [{"start": np.zeros(6), "end": np.zeros(6), "impossible": 0.0}])
    assert told["answer"] == "" and told["n_best"] == [] and told["impossible"] == 1
    joint = {"start_positions": np.arange(3), "start_log_probs": np.zeros(3), "end_positions": np.ones((3, 3), int),
             "end_log_probs": np.zeros((3, 3)), "impossible": -1.0}
    assert task.answer(record, [joint])["answer"] == ""


def test_a_restored_task_reads_and_answers_new_text_as_the_trained_one(tokenizer, tmp_path):
    task = task_of(tokenizer, tmp_path, [qa("1", ["1843"]), qa("2", is_impossible=True)], seq_len=30, version="v2.0",
                   doc_stride=7, max_query=5, n_best=3)
    task.score("dev", [{"start": np.arange(30.0), "end": np.arange(30.0), "impossible": 0.0}
                       for _ in task.features("dev")])
    assert task.threshold != 0
    restored = squad.restore(json.loads(json.dumps(task.spec())), tokenizer)
    assert restored.name == task.name == "squad-v2.0" and restored.columns() == ("question", "context")
    assert restored.spec() == task.spec() and restored.splits() == () and restored.threshold == task.threshold
    record = {"question": "When was it?", "context": CONTEXT}
    features = restored.encode(record)
    assert len(features) > 1 and all(feature.targets == {} for feature in features)
    for ours, theirs in zip(features, task.encode(record), strict=True):
        assert ours.input_ids.tolist() == theirs.input_ids.tolist()
    rng = np.random.default_rng(0)
    outputs = [{"start": rng.normal(size=30), "end": rng.normal(size=30), "impossible": 0.0} for _ in features]
    restored.threshold = 1e9
    told = restored.answer(record, outputs)
    assert told["answer"] == CONTEXT[told["start"]:told["end"]] == told["n_best"][0]["text"]
    assert told["probability"] == told["n_best"][0]["probability"] and len(told["n_best"]) == 3
    assert 0 < told["impossible"] < 1 and json.loads(json.dumps(told)) == told
    restored.threshold = -1e9
    none = restored.answer(record, outputs)
    assert (none["answer"], none["start"], none["end"]) == ("", None, None)
    assert none["probability"] == none["impossible"] == told["impossible"]
    assert "impossible" not in squad.SquadTask(tokenizer, 30, {"doc_stride": 7, "max_query": 5}).answer(record, outputs)


def test_a_long_question_is_cut_and_lone_surrogates_do_no_harm(tokenizer):
    task = squad.SquadTask(tokenizer, 40, {"max_query": 3})
    feature, = task.encode({"question": "whatever", "context": "a\ud800b"})
    assert feature.input_ids[4] == tokenizer.sep_id
    assert [tokenizer.token(i) for i in feature.input_ids[5:-1]] == ["a", "?", "b"]


# --- What users get wrong -------------------------------------------------------------------------------


def changed(**fields):
    return {**qa("q7", ["1843"]), **fields}


@pytest.mark.parametrize(("qas", "hints"), [
    ([], ["dev.json", "no questions"]),
    ([changed(answers=[{"text": "x", "answer_start": 900}])], ["q7", "answer_start 900"]),
    ([changed(answers=[{"text": "", "answer_start": 0}])], ["q7"]),
    ([changed(answers=[])], ["q7", "has no answers"]),
    ([changed(is_impossible=True)], ["task.version=v1.1", "q7", "v2.0"]),
    ([{"id": "q7", "answers": qa("", ["1843"])["answers"]}], ["layout", "question"]),
    ([changed(), changed()], ["q7", "more than once"]),
    (["x"], ["layout"]),
    ([changed(answers=[{"text": "x", "answer_start": "x"}])], ["layout"]),
    ([changed(answers=[{"text": "x", "answer_start": float("inf")}])], ["layout"]),    # 1e400
    ([changed(is_impossible="false")], ["q7", '"is_impossible": "false"', "without quotes"]),
])
def test_a_wrong_question_is_named_in_one_line(tokenizer, tmp_path, qas, hints):
    good = file_of(tmp_path, [qa("1", ["1843"])], "good")
    with pytest.raises(UserError) as error:
        squad.from_config({"train": good, "dev": file_of(tmp_path, qas)}, tokenizer, 64)
    assert all(hint in str(error.value) for hint in hints) and "\n" not in str(error.value)
    assert "dev" in str(error.value)


@pytest.mark.parametrize(("data", "hint"), [
    (None, "cannot be read"), (b'{"data": [\n"\xe9"]}', r":2 is not UTF-8"), (b"{", "is not JSON"),
    (b"[]", "layout"), (b'{"data": 3}', "layout"), (b"[" * 100_000, "is not JSON")])
def test_a_wrong_file_is_named_in_one_line(tokenizer, tmp_path, data, hint):
    if data is not None:
        (tmp_path / "bad.json").write_bytes(data)
    with pytest.raises(UserError) as error:
        squad.from_config({"train": tmp_path / "bad.json", "dev": tmp_path / "bad.json"}, tokenizer, 64)
    text = str(error.value)
    assert hint in text and "task.train" in text and "bad.json" in text and "\n" not in text


def test_wrong_fields_are_named(tokenizer, tmp_path):
    path = file_of(tmp_path, [qa("1", ["1843"], "who was it")])
    for config, seq_len, hint in [
            ({}, 64, "task.train is empty"), ({"train": path}, 64, "task.dev is empty"),
            ({"train": path, "dev": path, "version": "3"}, 64, "task.version=3"),
            ({"train": path, "dev": path, "doc_stride": 0}, 64, "task.doc_stride=0"),
            ({"train": path, "dev": path}, 11, "data.seq_len=11 .*at least 12"),
            ({"data_dir": tmp_path}, 64, "task.data_dir.*train-v1.1.json")]:
        with pytest.raises(UserError, match=hint):
            squad.from_config(config, tokenizer, seq_len)
    assert len(squad.from_config({"train": path, "dev": path}, tokenizer, 12).features("dev")) > 9
    task = squad.SquadTask(tokenizer, 64, {})
    for record, hint in [({"text": "x"}, "'question' is missing.*has text"),
                         ({"question": "x", "context": 3}, "'context' is not a string")]:
        with pytest.raises(UserError, match=hint):
            task.encode(record)


def test_a_folder_gives_its_splits_by_version(tokenizer, tmp_path):
    for split, version in itertools.product(("train", "dev", "test"), ("v1.1", "v2.0")):
        if (split, version) != ("test", "v1.1"):
            file_of(tmp_path, [qa(f"{split} {version}", ["1843"])], f"{split}-{version}")
    for version, splits in (("v1.1", ("train", "dev")), ("v2.0", ("train", "dev", "test"))):
        task = squad.from_config({"data_dir": tmp_path, "version": version}, tokenizer, 64)
        assert task.splits() == splits
        assert [task._questions[s][0].id for s in splits] == [f"{s} {version}" for s in splits]


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize(("version", "counts", "windows"), [
    ("v1.1", (8102, 2468), (8331, 2502)), ("v2.0", (10204, 1669), (10563, 1669))])
def test_gold_spans_of_the_real_data_give_the_gold_text(tmp_path, version, counts, windows):
    with tarfile.open(DATA / "tasks.tar.xz") as archive:
        for split in ("train", "dev"):
            archive.extract(f"tasks/SQuAD/{split}-{version}.json", tmp_path, filter="data")
    tokenizer = load_tokenizer(DATA / "vocab_uncased.txt")
    task = squad.from_config({"data_dir": tmp_path / "tasks/SQuAD", "version": version}, tokenizer, 384)
    for split, count, features in zip(("train", "dev"), counts, windows, strict=True):
        assert len(task._questions[split]) == count and len(task.features(split)) == features
        assert task.inexact[split] < 0.01 * count    # "Israel" in "Israelis", by the data's own answer_start
    outputs = []
    for feature in task.features("dev"):
        start, end = np.full((2, len(feature.input_ids)), -9.0)
        start[feature.targets["start"]] = end[feature.targets["end"]] = 0
        outputs.append({"start": start, "end": end})
    scores = task.score("dev", outputs)
    assert scores["em"] > 99 and scores["f1"] > 99.5
