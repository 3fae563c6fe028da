"""The fine-tuning command a user types: it learns, many runs survive a kill, what was tuned answers."""

import csv
import functools
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from electra_jax import checkpoint, cli, finetune, model, sharding, tasks
from electra_jax.data.tokenizer import load_tokenizer
from electra_jax.interop import huggingface
from electra_jax.tasks.text import TextTask
from electra_jax.tuning import run as run_lib
from electra_jax.tuning import serve, step
from electra_jax.tuning.config import get_config, validate

REPO = Path(__file__).parent.parent
LETTERS = "abcdefghijklmnopqrstuvwxyz"
FILLER = "film play story very the it was and".split()
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{x}" for x in LETTERS), "good", "bad", *FILLER]
# One shape for all, so that most tests share their programs.
FLAGS = ["--config.data.seq_len=16", "--config.data.bucket=16", "--config.data.batch_size=16",
         "--config.data.eval_batch_size=16", "--config.optimizer.learning_rate=3e-3", "--config.optimizer.epochs=4"]

pytestmark = pytest.mark.usefixtures("quick_compile", "one_device")


# --- A world with networks and tasks ---------------------------------------------------------------

@pytest.fixture(scope="module")
def one_device():
    """Compiles in half the time that four devices take; that a mesh changes nothing is in test_tuning."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
        yield


def sentences(count: int, seed: int) -> list[tuple[str, int]]:
    """Invented sentences with "good" (1) or "bad" (0) in them, in turn."""
    rng = random.Random(seed)
    out = []
    for i in range(count):
        words = rng.choices(FILLER, k=rng.randint(2, 8))
        words.insert(rng.randrange(len(words)), ("bad", "good")[i % 2])
        out.append((" ".join(words), i % 2))
    return out


def pretrain(folder: Path, vocabulary: list[str], seed: int = 0) -> None:
    """Writes a workdir of pretraining whose parameters are noise."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = load_tokenizer(folder / "vocab.txt")
    c = tiny.config(model__vocab_size=len(vocabulary), model__embedding_size=32, model__hidden_size=32,
                    model__num_layers=1, model__intermediate_size=64, model__max_positions=64)
    module = model.build(c.model)
    params = tiny.params(lambda: model.init_params(module, jax.random.key(0), "both"), seed)
    saver = checkpoint.Checkpointer(folder / "checkpoints", keep=1, every_steps=0, every_minutes=0)
    saver.save({"step": np.int32(1), "params": params}, {"config": c.to_dict(), "tokenizer": tokenizer.fingerprint},
               tokenizer.files())
    assert saver.close()


def write(path: Path, rows: list, delimiter: str = "\t") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(delimiter.join(map(str, row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Networks `net`, `other`, `vocabulary`, exports `exported` (of net), and three tasks in `glue`."""
    w = tmp_path_factory.mktemp("finetune")
    pretrain(w / "net", PIECES)
    pretrain(w / "other", PIECES, seed=1)
    pretrain(w / "vocabulary", [*PIECES, "not"])
    huggingface.export(w / "net", w / "exported")
    for seed, (split, count) in enumerate({"train": 160, "dev": 40, "test": 12}.items()):
        rows = sentences(count, seed)
        if split == "test":
            for name in ("SST-2", "CoLA"):
                write(w / "glue" / name / "test.tsv",
                      [("index", "sentence"), *((i, s) for i, (s, _) in enumerate(rows))])
            continue
        write(w / "glue" / "SST-2" / f"{split}.tsv", [("sentence", "label"), *rows])
        write(w / "glue" / "CoLA" / f"{split}.tsv", [("x", label, "", s) for s, label in rows])
        write(w / "glue" / "MRPC" / f"{split}.tsv", [("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"),
                                                     *((label, 1, 2, s, "the film") for s, label in rows)])
    return w


def arguments(world: Path, workdir: Path, config: str, *flags: str) -> list[str]:
    return [f"--config={REPO}/configs/finetune/{config}", f"--config.init_from={world / 'net'}",
            f"--config.task.data_dir={world / 'glue'}", f"--workdir={workdir}", *FLAGS,
            f"--config.run.compilation_cache={world / 'xla'}", *flags]


def start(*args: str, **options) -> subprocess.Popen:
    """The command in a process of its own."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(REPO),
                        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONUNBUFFERED": ""}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | options
    return subprocess.Popen([sys.executable, "-m", "electra_jax.finetune", *args], text=True, env=env, cwd=REPO,
                            **options)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def tune(world: Path, workdir: Path, *flags: str, config: str = "glue.py:sst2", code: int = 0) -> dict:
    """The command in this process; returns results.json."""
    argv = ["finetune", *arguments(world, workdir, config, "--config.run.tensorboard=False", *flags)]
    assert cli.run_main(finetune.main, validate, argv) == code
    return json.loads((workdir / "results.json").read_text()) if code == 0 else {}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(path: Path) -> list[dict]:
    return list(csv.DictReader(io.StringIO(path.read_text()), delimiter="\t"))


def same_params(a: Path, b: Path) -> bool:
    a, b = (tiny.flat(checkpoint.load_params(folder, None)[0]) for folder in (a, b))
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def tuned(world) -> tuple[Path, str]:
    """(workdir, what was printed) of SST-2 from the command line."""
    return world / "tuned", finish(start(*arguments(world, world / "tuned", "glue.py:sst2")))


# --- One run ---------------------------------------------------------------------------------------

def test_a_run_learns_and_leaves_scores_predictions_and_metrics(tuned):
    workdir, output = tuned
    folder = workdir / "sst2" / "seed-0"
    results = json.loads((workdir / "results.json").read_text())
    assert results["summary"][0]["median"] > 90 and results["summary"][0]["n"] == 1
    assert json.loads((folder / "result.json").read_text()) == results["runs"][0]
    assert results["runs"][0]["steps"] == 40
    assert (workdir / "results.csv").read_text().startswith("task,metric,median,mean,std,best,n,seconds\nsst2,acc")
    assert (workdir / "results.md").read_text().startswith("| task | metric | median |")
    assert (workdir / "results.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))

    logged = lines(folder / "metrics.jsonl")
    losses, scores = ([x[name] for x in logged if name in x] for name in ("loss", "dev_accuracy"))
    assert losses[-1] < 0.2 < losses[0] and len(scores) == 4
    assert max(scores) == results["runs"][0]["scores"]["accuracy"]

    dev = table(folder / "predictions" / "SST-2-dev.tsv")
    assert [row["label"] for row in dev] == ["0", "1"] * 20
    assert np.mean([row["label"] == row["prediction"] for row in dev]) == scores[-1] / 100
    test = table(folder / "predictions" / "SST-2.tsv")
    assert [list(row) for row in test[:1]] == [["index", "prediction"]]
    assert [row["index"] for row in test] == [str(i) for i in range(12)]
    assert np.mean([row["prediction"] == str(i % 2) for i, row in enumerate(test)]) > 0.9

    for told in ("sst2 seed 0: 160 sequences, 40 steps", "eta", "dev 40/40  accuracy", "median", "results.{json,csv,"):
        assert told in output
    assert "Traceback" not in output and "arning" not in output, output


def test_a_workdir_an_export_and_a_hugging_face_folder_give_the_same_numbers(world, tmp_path):
    seen = []
    for i, source in enumerate(("net", "exported", "exported/discriminator")):
        folder = tmp_path / str(i)
        tune(world, folder, f"--config.init_from={world / source}", "--config.run.max_steps=4",
             "--config.run.save=False", "--config.run.log_every_steps=1")
        seen.append([x["loss"] for x in lines(folder / "sst2/seed-0/metrics.jsonl") if "loss" in x])
        assert not (folder / "sst2/seed-0/checkpoints").exists()
    assert len(seen[0]) == 4 and seen[0] == seen[1] == seen[2]


def test_a_tuned_network_can_be_tuned_further(world, tuned, tmp_path):
    result = tune(world, tmp_path, f"--config.init_from={tuned[0] / 'sst2/seed-0'}", "--config.run.max_steps=10",
                  "--config.run.log_every_steps=10")
    assert result["summary"][0]["median"] > 90    # in a quarter of the steps


def test_random_parameters_are_another_start_than_the_pretrained_ones(world, tmp_path):
    losses = []
    for random_start in (False, True):
        folder = tmp_path / str(random_start)
        tune(world, folder, f"--config.init_random={random_start}", "--config.run.max_steps=1",
             "--config.run.save=False")
        losses.append(lines(folder / "sst2/seed-0/metrics.jsonl")[0]["loss"])
    assert losses[0] != losses[1] and all(np.isfinite(losses))


# --- Many runs -------------------------------------------------------------------------------------

MANY = ["--config.run.tasks=cola,mrpc", "--config.run.seeds=2", "--config.optimizer.epochs=2"]
RUNS = [f"{task}/seed-{seed}" for task in ("cola", "mrpc") for seed in (0, 1)]


@pytest.fixture(scope="module")
def straight(world) -> Path:
    """Two tasks with two seeds, not interrupted."""
    finish(start(*arguments(world, world / "straight", "glue.py:sst2", *MANY)))
    return world / "straight"


def results_of(workdir: Path) -> list:
    """What must not depend on interruptions: all of the results but seconds and compilations, and all predictions."""
    found = []
    for name in RUNS:
        result = json.loads((workdir / name / "result.json").read_text())
        found.append({key: result[key] for key in ("task", "seed", "scores", "step", "steps", "metric")})
        found += [(path.name, path.read_text()) for path in sorted((workdir / name / "predictions").iterdir())]
    return found


def stamps(workdir: Path) -> dict[Path, tuple]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in workdir.glob("*/seed-*/result.json")}


def test_tasks_and_seeds_are_one_command_one_table_and_one_compilation_a_shape(straight):
    results = json.loads((straight / "results.json").read_text())
    assert [(r["task"], r["seed"]) for r in results["runs"]] == [("cola", 0), ("cola", 1), ("mrpc", 0), ("mrpc", 1)]
    assert [r["steps"] for r in results["runs"]] == [20, 20, 40, 40]    # MRPC is doubled
    assert [r["compilations"] for r in results["runs"]] == [[1, 1]] * 4
    rows = {(row["task"], row["metric"]): row for row in results["summary"]}
    scores = [r["scores"]["f1"] for r in results["runs"] if r["task"] == "mrpc"]
    assert rows["mrpc", "f1"]["n"] == 2 and rows["mrpc", "f1"]["mean"] == pytest.approx(np.mean(scores))
    assert list(rows) == [("cola", "matthews"), ("cola", "accuracy"), ("mrpc", "accuracy"), ("mrpc", "f1")]
    assert not same_params(straight / RUNS[0], straight / RUNS[1])


def test_kill_9_and_the_same_command_give_the_uninterrupted_results_and_redo_nothing(world, straight, tmp_path):
    command = arguments(world, tmp_path, "glue.py:sst2", *MANY, "--config.run.tensorboard=False")
    process = start(*command)
    while process.poll() is None and not (tmp_path / RUNS[0] / "result.json").exists():
        time.sleep(0.005)
    process.kill()
    output, _ = process.communicate()
    finished = stamps(tmp_path)
    assert 1 <= len(finished) < 4, output
    output = finish(start(*command))
    assert {path: stamp for path, stamp in stamps(tmp_path).items() if path in finished} == finished
    assert results_of(tmp_path) == results_of(straight)
    assert all(same_params(tmp_path / name, straight / name) for name in RUNS)
    assert f"cola: {sum('cola' in str(path) for path in finished)} of 2 runs were finished" in output
    before = stamps(tmp_path)
    tune(world, tmp_path, *MANY)
    assert stamps(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_says_so_exits_with_0_and_the_rerun_goes_on(world, tmp_path, monkeypatch, capsys, number):
    evaluate = run_lib.Run._evaluate
    calls = itertools.count()

    def stopping(self, *args):
        if next(calls) == 3:    # of the second run
            os.kill(os.getpid(), number)
        return evaluate(self, *args)

    monkeypatch.setattr(run_lib.Run, "_evaluate", stopping)
    argv = ["finetune", *arguments(world, tmp_path, "glue.py:sst2", *MANY)]
    assert cli.run_main(finetune.main, validate, argv) == 0
    assert "stopped; finished runs are kept, the same command does the others" in capsys.readouterr().out
    finished = stamps(tmp_path)
    assert [path.parent.name for path in finished] == ["seed-0"] and not (tmp_path / "results.json").exists()
    if number == signal.SIGTERM:
        assert len(tune(world, tmp_path, *MANY)["runs"]) == 4
        assert stamps(tmp_path).items() >= finished.items()


def test_more_seeds_and_tasks_only_add_and_share_a_program(world, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "more")
    before = stamps(tmp_path / "more")
    flags = ["--config.run.tasks=all", "--config.run.seeds=3", "--config.optimizer.epochs=2"]
    programs = step.program.cache_info().misses
    results = tune(world, tmp_path / "more", *flags)
    assert step.program.cache_info().misses <= programs + 1    # at most one for all five runs
    names = ("cola", "sst2", "mrpc")
    assert {(r["task"], r["seed"]) for r in results["runs"]} == set(itertools.product(names, range(3)))
    after = stamps(tmp_path / "more")
    assert len(after) == 9 and after.items() >= before.items()


@pytest.mark.parametrize(("flag", "hint"), [
    ("--config.optimizer.learning_rate=1e-4", "optimizer.learning_rate is 0.0001, but 0.003 in the runs of"),
    ("--config.init_from={}/other", "other parameters"), ("--config.init_from={}/vocabulary", "another vocabulary"),
])
def test_runs_of_other_settings_are_refused_in_the_same_workdir(world, straight, capsys, flag, hint):
    before = stamps(straight), (straight / "settings.json").read_bytes()
    tune(world, straight, *MANY, flag.format(world), code=2)
    error = capsys.readouterr().err
    assert hint in error and "another --workdir" in error and error.count("\n") == 1
    assert (stamps(straight), (straight / "settings.json").read_bytes()) == before


@pytest.fixture
def finished_text(world, tmp_path) -> tuple[Path, list[str], dict[str, Path]]:
    """(workdir, flags, files by split) of a finished run on the user's own files."""
    files = {split: write(tmp_path / f"{split}.tsv", [("text", "label"), *sentences(40, seed)])
             for seed, split in enumerate(("train", "dev"))}
    flags = [f"--config.task.{split}={file}" for split, file in files.items()]
    flags += ["--config.run.max_steps=1", "--config.run.save=False"]
    tune(world, tmp_path / "run", *flags, config="text.py")
    return tmp_path / "run", flags, files


@pytest.mark.parametrize("split", ["train", "dev"])
def test_runs_of_changed_data_are_refused_in_the_same_workdir(world, finished_text, capsys, split):
    workdir, flags, files = finished_text
    content = files[split].read_bytes()
    files[split].write_bytes(content.replace(b"good", b"fine"))
    tune(world, workdir, *flags, "--config.run.seeds=2", config="text.py", code=2)
    error = capsys.readouterr().err
    assert f"text: the data ({split}) have changed" in error and "another --workdir" in error
    assert error.count("\n") == 1 and not (workdir / "text/seed-1").exists()
    files[split].write_bytes(content)
    assert len(tune(world, workdir, *flags, "--config.run.seeds=2", config="text.py")["runs"]) == 2


def test_settings_of_before_checksums_are_taken_and_other_tasks_data_are_free(world, finished_text):
    workdir, flags, files = finished_text
    settings = json.loads((workdir / "settings.json").read_text())
    assert settings["contents"]["text"].keys() == {"train", "dev"}
    (workdir / "settings.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "contents"}))
    tune(world, workdir, *flags, config="text.py")
    assert json.loads((workdir / "settings.json").read_text()) == settings
    files["train"].write_text("text\tlabel\n" + "good\t1\nbad\t0\n" * 20)
    assert len(tune(world, workdir, *flags, "--config.task.name=other", config="text.py")["runs"]) == 2


def test_fewer_seeds_and_tasks_leave_the_others_in_the_table(world, straight, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / "run")
    flags = ["--config.optimizer.epochs=2", "--config.run.tasks=mrpc", "--config.run.seeds=1"]
    results = tune(world, tmp_path / "run", *flags)
    assert [(r["task"], r["seed"]) for r in results["runs"]] == [("mrpc", 0), ("mrpc", 1), ("cola", 0), ("cola", 1)]
    assert f"3 of the 4 runs in the table were not asked for now, but finished in {tmp_path}" in capsys.readouterr().out
    assert (tmp_path / "run/results.csv").read_text().count("\n") == 5


@pytest.mark.parametrize("content", ["{}", '{"task": "sst2", "seed": 0, "metric": "accuracy", "scores": [1]}', "[]"])
def test_a_file_that_is_no_result_is_named_before_any_training(world, tmp_path, capsys, content):
    file = tmp_path / "sst2/seed-1/result.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    tune(world, tmp_path, "--config.run.seeds=2", code=2)
    error = capsys.readouterr().err
    assert str(file) in error and error.count("\n") == 1 and not (tmp_path / "sst2/seed-0").exists()


def test_a_task_without_data_is_found_before_the_first_run(world, tmp_path, capsys):
    tune(world, tmp_path, "--config.run.tasks=cola,wnli", code=2)
    error = capsys.readouterr().err
    assert "neither WNLI/train.tsv nor train.tsv" in error and error.count("\n") == 1
    assert not (tmp_path / "cola").exists()
    write(tmp_path / "glue/CoLA/train.tsv", [("x", 1, "", "good")])
    tune(world, tmp_path / "run", f"--config.task.data_dir={tmp_path}/glue", "--config.task.name=cola", code=2)
    assert "CoLA/dev.tsv cannot be read (No such file" in capsys.readouterr().err


@pytest.mark.parametrize(("what", "place"), [
    ("file", "sst2"), ("link", "sst2"), ("file", "sst2/seed-0"), ("folder", "results.json"), ("folder", "results.csv"),
    ("folder", "results.png"), ("folder", "settings.json"),
])
def test_what_is_in_the_way_of_a_run_is_named(world, tmp_path, capsys, what, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    {"file": lambda p: p.write_text(""), "folder": Path.mkdir, "link": lambda p: p.symlink_to("nowhere")}[what](
        tmp_path / place)
    tune(world, tmp_path, "--config.run.max_steps=1", "--config.run.save=False", code=2)
    error = capsys.readouterr().err
    reason = error.partition(f"--workdir={tmp_path} cannot be written (")[2]
    assert str(tmp_path / place) in reason and error.count("\n") == 1


def test_a_loss_of_nan_names_a_way_out_and_leaves_the_table_of_the_finished_runs(world, tmp_path, monkeypatch, capsys):
    flags = ["--config.run.seeds=2", "--config.run.max_steps=1", "--config.run.save=False"]
    log = run_lib.Run._log

    def diverging(self, now, losses, *args):
        return log(self, now, losses if self.seed == 0 else [{"loss": np.float32("nan")}], *args)

    monkeypatch.setattr(run_lib.Run, "_log", diverging)
    tune(world, tmp_path / "run", *flags, code=2)
    error = capsys.readouterr().err
    assert "the loss is nan at step 1 of sst2 seed 1: lower optimizer.learning_rate=0.003, with another" in error
    assert error.count("\n") == 1
    assert [r["seed"] for r in json.loads((tmp_path / "run/results.json").read_text())["runs"]] == [0]


def test_a_checkpoint_that_was_not_kept_is_not_promised(world, tmp_path, capsys):
    tune(world, tmp_path, "--config.run.max_steps=1", "--config.run.save=False")
    assert "run.save" not in capsys.readouterr().out
    tune(world, tmp_path, "--config.run.max_steps=1")
    remedy = f"remove {tmp_path}/sst2/seed-0/result.json and give the same command again"
    assert f"sst2: 1 of them with run.save=False, without a checkpoint: to get one, {remedy}" in capsys.readouterr().out
    (tmp_path / "sst2/seed-0/result.json").unlink()
    tune(world, tmp_path, "--config.run.max_steps=1")
    assert (tmp_path / "sst2/seed-0/checkpoints").exists() and "run.save" not in capsys.readouterr().out


def test_a_mistake_before_the_first_result_may_be_mended_in_the_same_workdir(world, tmp_path, capsys):
    tune(world, tmp_path, "--config.data.seq_len=128", code=2)
    assert "data.seq_len=128 exceeds the 64 positions" in capsys.readouterr().err
    tune(world, tmp_path, "--config.run.max_steps=1")


def test_what_an_unfinished_run_left_is_not_taken_for_the_next_ones(world, tmp_path):
    folder = tmp_path / "sst2/seed-0"
    for name in ("checkpoints/9", "predictions", "tensorboard"):
        (folder / name).mkdir(parents=True)
    (folder / "predictions/other.tsv").write_text("")
    (folder / "metrics.jsonl").write_text('{"step": 9}\n')
    tune(world, tmp_path, "--config.run.max_steps=1", "--config.run.save=False")
    assert not (folder / "checkpoints").exists() and not (folder / "tensorboard").exists()
    assert not (folder / "predictions/other.tsv").exists()
    assert {line["step"] for line in lines(folder / "metrics.jsonl")} == {1}


# --- Which parameters are kept ---------------------------------------------------------------------

SCRIPT = [50.0, 80.0, 60.0, 80.0]    # accuracies of the four evaluations


@pytest.mark.parametrize(("flags", "evaluations", "kept"), [
    ([], 4, 1), (["--config.run.select=last"], 4, 3), (["--config.run.patience=1"], 3, 1),
    (["--config.run.patience=2"], 4, 1), (["--config.run.select=last", "--config.run.patience=1"], 3, 2),
], ids=lambda x: " ".join(f.removeprefix("--config.run.") for f in x) or "best" if isinstance(x, list) else "")
def test_the_best_or_last_parameters_are_kept_and_patience_ends_a_run(world, tmp_path, monkeypatch, flags, evaluations,
                                                                     kept):
    seen = []

    def score(self, split, outputs):
        seen.append(outputs)
        return {"accuracy": SCRIPT[len(seen) - 1]}

    monkeypatch.setattr(TextTask, "score", score)
    result = tune(world, tmp_path, *flags)["runs"][0]
    assert len(seen) == evaluations
    assert (result["step"], result["scores"]) == (10 * (kept + 1), {"accuracy": SCRIPT[kept]})
    predictor = serve.Predictor(tmp_path / "sst2/seed-0")
    records = [{"sentence": sentence} for sentence, _ in sentences(40, 1)]
    shares = [answer["probabilities"] for answer in predictor.answer(records)]
    ours = np.array([np.log(share["1"] / share["0"]) for share in shares])
    theirs = [[out["logits"][1] - out["logits"][0] for out in outputs] for outputs in seen]
    distances = [np.abs(ours - other).max() for other in theirs]
    assert distances[kept] < 1e-4 and all(d > 5e-3 for i, d in enumerate(distances) if i != kept), distances
    predicted = [row["prediction"] for row in table(tmp_path / "sst2/seed-0/predictions/SST-2-dev.tsv")]
    assert predicted == [str(int(odds > 0)) for odds in theirs[kept]]


@pytest.mark.parametrize(("fields", "steps", "evaluated"), [
    ({"optimizer.epochs": 0.5}, 5, [5]), ({"optimizer.epochs": 1.25}, 12, [10, 12]),
    ({"optimizer.epochs": 2.0, "run.max_steps": 13}, 13, [10, 13]), ({"optimizer.epochs": 0.01}, 1, [1]),
    ({"optimizer.epochs": 2.0, "run.evals_per_epoch": 3}, 20, [3, 6, 10, 13, 16, 20]),
    ({"optimizer.epochs": 0.3, "run.evals_per_epoch": 100}, 3, [1, 2, 3]), ({}, 30, [10, 20, 30]),
])
def test_steps_and_evaluations_follow_epochs(world, tmp_path, fields, steps, evaluated):
    c = get_config()
    c.update({"init_from": str(world / "net")})
    c.task.data_dir, c.data.batch_size = str(world / "glue"), 16
    c.update_from_flattened_dict(fields)
    tokenizer = load_tokenizer(world / "net/vocab.txt")
    task = tasks.makers(c, tokenizer)["sst2"]()
    run = run_lib.Run(c, None, task, None, 0, tmp_path, "")
    assert (run.steps, sorted(run.eval_steps)) == (steps, evaluated)


def test_padding_does_not_change_what_is_predicted(world, tmp_path):
    answers = []
    for bucket in (1, 16):
        tune(world, tmp_path / str(bucket), "--config.run.max_steps=1", f"--config.data.bucket={bucket}",
             "--config.data.pool_batches=1")    # the rate of the first step is 0
        predictor = serve.Predictor(tmp_path / f"{bucket}/sst2/seed-0")
        assert predictor.finetune.data.bucket == bucket
        records = [{"sentence": sentence} for sentence, _ in sentences(40, 1)]
        # Four at a time: short texts are then in batches of 8 tokens or of 16.
        answers.append([list(answer["probabilities"].values()) for answer in predictor.answer(records, 4)])
    assert np.abs(np.subtract(*answers)).max() < 1e-5
    assert np.ptp(answers[0], axis=0).max() > 1e-3


# --- The other tasks -------------------------------------------------------------------------------

def test_a_csv_with_classes_of_its_own_and_no_dev_learns(world, tmp_path, capsys):
    rows = [(text, ("no", "yes")[label]) for text, label in sentences(180, 5)]
    write(tmp_path / "train.csv", [("review", "verdict"), *rows], ",")
    write(tmp_path / "new.csv", [("review",), ("a good film",), ("a bad film",)], ",")
    results = tune(world, tmp_path / "run", f"--config.task.train={tmp_path / 'train.csv'}",
                   f"--config.task.test={tmp_path / 'new.csv'}", "--config.task.text=review",
                   "--config.task.label=verdict", "--config.task.name=reviews", config="text.py")
    assert "task.dev is empty" in capsys.readouterr().out
    assert results["summary"][0]["task"] == "reviews" and results["summary"][0]["median"] > 90
    predicted = table(tmp_path / "run/reviews/seed-0/predictions/reviews-test.tsv")
    assert [row["prediction"] for row in predicted] == ["yes", "no"]


def test_pairs_in_jsonl_with_scores_learn(world, tmp_path):
    for split, seed in (("train", 5), ("dev", 6)):
        text = "".join(json.dumps({"a": "the film", "b": s, "similarity": 1.5 + 2 * y + i % 5 / 10}) + "\n"
                       for i, (s, y) in enumerate(sentences(160, seed)))
        (tmp_path / f"{split}.jsonl").write_text(text)
    results = tune(world, tmp_path / "run", f"--config.task.train={tmp_path / 'train.jsonl'}", "--config.task.text=a",
                   f"--config.task.dev={tmp_path / 'dev.jsonl'}", "--config.task.text_pair=b",
                   "--config.task.label=similarity", config="text.py")
    assert results["summary"][0]["metric"] == "spearman" and results["summary"][0]["median"] > 60
    answer, = serve.Predictor(tmp_path / "run/text/seed-0").answer([{"a": "the film", "b": "it was good"}])
    assert 2.5 < answer["score"] < 5


def test_tagging_learns_chunks_and_answers_with_entities(world, tmp_path):
    tags = {"film": "B-NP", "play": "B-NP", "story": "I-NP", "bad": "B-ADJ", "good": "B-ADJ"}
    blocks = []
    for sentence, _ in sentences(120, 5):
        before, rows = "O", []
        for word in sentence.split():
            tag = tags.get(word, "O")
            tag = "O" if tag == "I-NP" and before not in ("B-NP", "I-NP") else tag
            rows.append(f"{word} x {tag}\n")
            before = tag
        blocks.append("".join(rows))
    (tmp_path / "train.txt").write_text("\n".join(blocks))
    results = tune(world, tmp_path / "run", f"--config.task.train={tmp_path / 'train.txt'}",
                   f"--config.task.dev={tmp_path / 'train.txt'}", "--config.optimizer.epochs=12", config="tagging.py")
    assert results["summary"][0]["metric"] == "f1" and results["summary"][0]["median"] > 80
    losses = [x["loss"] for x in lines(tmp_path / "run/chunk/seed-0/metrics.jsonl") if "loss" in x]
    assert losses[-1] < losses[0] / 4
    answer, = serve.Predictor(tmp_path / "run/chunk/seed-0").answer([{"text": "the film was good"}])
    assert [(e["type"], e["text"]) for e in answer["entities"]] == [("NP", "film"), ("ADJ", "good")]


def squad(path: Path, version: str) -> Path:
    """Questions that can be learnt by heart: the words "good" or "bad" answer, and in v2.0 some have no answer."""
    qas = []
    for i, (sentence, label) in enumerate(sentences(48, 7)):
        word = ("bad", "good")[label]
        impossible = version == "v2.0" and i % 4 == 3
        context = sentence.replace(word, "very") if impossible else sentence
        qas.append({"context": f"{context} {'story ' * 30 * (i == 0)}",    # the first in several windows
                    "qas": [{"id": f"q{i}", "question": "film", "is_impossible": impossible, "answers": [] if impossible
                             else [{"text": word, "answer_start": context.index(word)}]}]})
    path.mkdir()
    for split in ("train", "dev"):
        (path / f"{split}-{version}.json").write_text(json.dumps({"data": [{"title": "t", "paragraphs": qas}]}))
    return path


@pytest.mark.parametrize("head", ["joint", "plain"])
@pytest.mark.parametrize("version", ["v1.1", "v2.0"])
def test_squad_is_learnt_by_heart_with_both_heads(world, tmp_path, version, head):
    results = tune(world, tmp_path / "run", f"--config.task.data_dir={squad(tmp_path / 'data', version)}",
                   "--config.task.doc_stride=8", "--config.optimizer.epochs=30", f"--config.model.qa_head={head}",
                   "--config.data.seq_len=32", "--config.data.bucket=32", "--config.run.log_every_steps=10",
                   "--config.task.n_best=5", config=f"squad.py:{version}")
    folder = tmp_path / f"run/squad-{version}/seed-0"
    assert results["runs"][0]["scores"]["f1"] > 85
    losses = [x["loss"] for x in lines(folder / "metrics.jsonl") if "loss" in x]
    assert losses[-1] < losses[0] / 3
    predictions = json.loads((folder / "predictions/predictions-dev.json").read_text())
    assert len(predictions) == 48 and predictions["q1"] == "good"
    records = [{"question": "film", "context": "it was good"}]
    answer, = serve.Predictor(folder).answer(records)
    assert answer["answer"] == "good" and "it was good"[answer["start"]:answer["end"]] == "good"


# --- Answers for new text --------------------------------------------------------------------------

TEXTS, ANSWERS = zip(*((text, str(label)) for text, label in sentences(4, 1)), strict=True)    # of dev


@pytest.fixture(scope="module")
def checkpoint_folder(tuned) -> Path:
    return tuned[0] / "sst2" / "seed-0"


def predict(checkpoint_folder: Path, source: Path, output: Path, batch_size: int = 3) -> list[dict]:
    serve.predict_file(str(checkpoint_folder), str(source), str(output), batch_size)
    return lines(output)


@pytest.mark.parametrize(("name", "content"), [
    ("x.tsv", "id\tsentence\n" + "".join(f'"\t{t}\n' for t in TEXTS)),
    ("x.tsv", "\ufeffsentence \tid\r\n" + "".join(f"{t}\t\r\n" for t in TEXTS)),
    ("x.csv", "\ufeffid,sentence\n" + "".join(f'"a,\n""b","{t}"\n\n' for t in TEXTS)),
    ("x.jsonl", "\n".join(json.dumps({"id": 1, "sentence": t}) for t in TEXTS)),
    ("x.txt", "\ufeff" + "\n\n".join(TEXTS)),
    ("x.txt", "\r\n".join(TEXTS) + "\r\n"),
    ("lines", "\n".join(json.dumps({"sentence": t}) for t in TEXTS)),
    ("X.CSV", "sentence,id\n" + "".join(f'"{t}",1\n' for t in TEXTS)),
    ("X.TSV", "sentence\tid\n" + "".join(f"{t}\t1\n" for t in TEXTS)),
], ids=["tsv", "tsv-bom-crlf", "csv-bom-quotes", "jsonl", "plain-bom", "plain-crlf", "json-lines", "csv-capitals",
        "tsv-capitals"])
def test_every_form_of_input_is_answered_in_order(checkpoint_folder, tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    answers = predict(checkpoint_folder, tmp_path / name, tmp_path / "out.jsonl")
    assert [(answer["sentence"], answer["label"]) for answer in answers] == list(zip(TEXTS, ANSWERS, strict=True))
    for answer in answers:
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        assert answer["probabilities"][answer["label"]] == max(answer["probabilities"].values())


def test_labels_are_those_of_the_predictions_files_and_the_true_one_is_kept(world, checkpoint_folder, tmp_path):
    answers = predict(checkpoint_folder, world / "glue/SST-2/dev.tsv", tmp_path / "out.jsonl", 7)
    dev = table(checkpoint_folder / "predictions/SST-2-dev.tsv")
    assert [answer["label"] for answer in answers] == [row["prediction"] for row in dev]
    assert [answer["input_label"] for answer in answers] == [row["label"] for row in dev]
    whole = predict(checkpoint_folder, world / "glue/SST-2/dev.tsv", tmp_path / "whole.jsonl", 64)
    a, b = ([answer["probabilities"]["1"] for answer in x] for x in (answers, whole))
    assert np.allclose(a, b, atol=1e-6)


def test_every_field_of_a_record_comes_back_and_a_text_may_begin_with_a_brace(checkpoint_folder, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"input_label": 2, "sentence": "good", "label": 1, "input_input_label": 3}\n')
    answer, = predict(checkpoint_folder, tmp_path / "x.jsonl", tmp_path / "out.jsonl")
    assert (answer["input_label"], answer["input_input_label"], answer["input_input_input_label"]) == (2, 3, 1)
    assert answer["label"] == "1" and answer["sentence"] == "good"
    (tmp_path / "x.txt").write_text('{name} was good\n{"sentence": "bad"}\n{bad\n')
    answers = predict(checkpoint_folder, tmp_path / "x.txt", tmp_path / "out.jsonl")
    assert [(a["sentence"], a["label"]) for a in answers] == [("{name} was good", "1"), ("bad", "0"), ("{bad", "0")]


def test_a_pipe_is_an_input_and_a_full_disk_or_closed_input_one_line(checkpoint_folder, tmp_path, capsys, monkeypatch):
    read, write_end = os.pipe()
    os.write(write_end, b"good\n")
    os.close(write_end)
    assert predict(checkpoint_folder, f"/dev/fd/{read}", tmp_path / "out.jsonl")[0]["label"] == "1"
    os.close(read)
    (tmp_path / "x.txt").write_text("good\n")
    args = ["predict", f"--checkpoint={checkpoint_folder}"]
    assert cli.exit_code(lambda: finetune.serve([*args, f"--input={tmp_path / 'x.txt'}", "--output=/dev/full"])) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --output=/dev/full cannot be written (No space left") and error.count("\n") == 1
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.exit_code(lambda: finetune.serve([*args, "--input=-"])) == 2
    assert capsys.readouterr().err == "error: --input=-: standard input is closed: give a file, or pipe the texts in.\n"


def test_a_table_is_read_without_header_where_the_task_names_columns_by_number(world, tmp_path):
    data = write(tmp_path / "train.tsv", [(label, sentence) for sentence, label in sentences(160, 0)])
    tune(world, tmp_path / "run", f"--config.task.train={data}", f"--config.task.dev={data}", "--config.task.text=1",
         "--config.task.label=0", config="text.py")
    answers = predict(tmp_path / "run/text/seed-0", data, tmp_path / "out.jsonl", 64)
    assert len(answers) == 160 and answers[0]["1"] == sentences(1, 0)[0][0]
    assert np.mean([answer["0"] == answer["label"] for answer in answers]) > 0.9


def test_an_empty_input_has_no_answers(checkpoint_folder, tmp_path):
    for name in ("x.tsv", "x.csv", "x.jsonl", "x.txt"):
        (tmp_path / name).write_bytes(b"")
        assert predict(checkpoint_folder, tmp_path / name, tmp_path / "out.jsonl") == []


def test_a_cell_beyond_the_csv_modules_limit_and_a_lone_surrogate_are_only_text(checkpoint_folder, tmp_path):
    (tmp_path / "x.csv").write_text("sentence\n" + "good " * 40_000 + "\n")
    assert predict(checkpoint_folder, tmp_path / "x.csv", tmp_path / "out.jsonl")[0]["label"] == "1"
    (tmp_path / "x.jsonl").write_text('{"sentence": "good \\ud800"}\n')
    assert predict(checkpoint_folder, tmp_path / "x.jsonl", tmp_path / "out.jsonl")[0]["sentence"] == "good \ud800"


@pytest.mark.parametrize(("name", "content", "hint"), [
    ("x.tsv", "text\n", "--input=IN: column 'sentence' is missing: this task reads sentence, and the file has text"),
    ("x.tsv", "sentence\tid\na\t1\nb\n", "--input=IN:3 has 1 columns, the first line has 2"),
    ("x.csv", 'sentence\n"a\n', "--input=IN:2 is not CSV"),
    ("x.jsonl", '{"sentence": "a"}\n{"sentence": \n', "--input=IN:2 is not JSON"),
    ("x.jsonl", '{"sentence": "a"}\n["a"]\n', "--input=IN:2 is not a JSON object"),
    ("x.jsonl", '{"sentence": "a"}\n{"text": "a"}\n', "--input=IN:2: field 'sentence' is missing"),
    ("x.jsonl", '{"sentence": 1}\n', "--input=IN:1: field 'sentence' is not a string"),
    ("x.txt", 'a\n{"b\n', "--input=IN:2 is not JSON"),
    ("x.csv", "sentence,sentence\na,b\n", "--input=IN has 2 columns of the name 'sentence'"),
    ("x.txt", "good\n".encode("utf-16"), "--input=IN:1 is not UTF-8 text: convert it, e.g. iconv -f UTF-16 -t UTF-8"),
    ("x.txt", b"a\n\xe4\n", "--input=IN:2 is not UTF-8"),
    ("x.tsv.gz", "sentence\n", "--input=IN cannot be read"),
])
def test_input_that_cannot_be_answered_is_one_line_with_its_place(checkpoint_folder, tmp_path, capsys, name, content,
                                                                 hint):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    args = ["predict", f"--checkpoint={checkpoint_folder}", f"--input={path}"]
    assert cli.exit_code(lambda: finetune.serve(args)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: " + hint.replace("IN", str(path))) and error.count("\n") == 1, error


@pytest.mark.parametrize(("args", "hint"), [
    (["--checkpoint={world}/net", "--input={texts}"], "was pretrained, not fine-tuned"),
    (["--checkpoint={world}/nothing", "--input={texts}"], "nothing"),
    (["--checkpoint={world}/exported/discriminator", "--input={texts}"], "discriminator is a Hugging Face folder"),
    (["--checkpoint={run}", "--input=nothing.txt"], "--input=nothing.txt does not exist"),
    (["--checkpoint={run}", "--input={world}"], "is a folder"),
    (["--checkpoint={run}", "--input={texts}", "--output={texts}"], "is the input"),
    (["--checkpoint={run}", "--input={texts}", "--output=/nowhere/x"], "--output=/nowhere/x cannot be written"),
    (["--checkpoint={run}", "--input={texts}", "--batch_size=0"], "--batch_size=0"),
    (["--checkpoint={run}"], "--input"), (["--checkpoint={run}", "--inptu=x"], "--input"),
])
def test_a_wrong_predict_command_is_one_line(world, checkpoint_folder, tmp_path, capsys, args, hint):
    write(tmp_path / "texts.txt", [["good"]])
    places = {"world": world, "run": checkpoint_folder, "texts": tmp_path / "texts.txt"}
    args = ["predict", *(arg.format(**places) for arg in args)]
    assert cli.exit_code(lambda: finetune.serve(args)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and hint in error and error.count("\n") == 1, error
    assert (tmp_path / "texts.txt").read_text() == "good\n"


def test_standard_input_is_answered_while_it_comes_and_a_closed_pipe_is_no_error(checkpoint_folder):
    process = start("predict", f"--checkpoint={checkpoint_folder}", "--input=-", "--batch_size=2",
                    stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = threading.Timer(120, process.kill)    # else answers that do not come would be waited for
    deadline.start()
    process.stdin.write("the film was good\n\n" + json.dumps({"sentence": "bad ä"}) + "\n")
    process.stdin.flush()    # and left open
    answers = [json.loads(process.stdout.readline()) for _ in range(2)]
    assert [(answer["sentence"], answer["label"]) for answer in answers] == [("the film was good", "1"), ("bad ä", "0")]
    process.stdout.close()    # as `| head` does
    process.stdin.write("good\nbad\n" * 3)
    process.stdin.close()
    error = process.stderr.read()
    assert process.wait(60) == 0 and error == ""
    deadline.cancel()


# --- What a user can mend --------------------------------------------------------------------------

def broken(tmp_path: Path) -> dict[str, Path]:
    rows = sentences(40, 0)
    good = write(tmp_path / "good.tsv", [("text", "label"), *rows])
    return {
        "good": good, "empty": write(tmp_path / "empty.tsv", [("text", "label")]),
        "unseen": write(tmp_path / "unseen.tsv", [("text", "label"), ("a", 0), ("b", 7)]),
        "latin": Path(tmp_path / "latin.tsv"), "few": write(tmp_path / "few.tsv", [("text", "label"), *rows[:9]]),
    }


BAD = [
    ("glue.py:sst2", ["--config.task.data_dir=/no/data"], "task.data_dir=/no/data"),
    ("glue.py:sst2", ["--config.task.data_dir="], "task.data_dir is empty"),
    ("glue.py", ["--config.run.tasks=all", "--config.task.data_dir=/no/data"], "task.data_dir=/no/data"),
    ("glue.py", ["--config.run.tasks=cola,snli"], "'snli'"),
    ("glue.py", ["--config.run.tasks=cola,all"], "run.tasks=cola,all: all stands alone"),
    ("glue.py", ["--config.task.name=snli"], "'snli'"),
    ("glue.py:snli", [], "snli"),
    ("text.py", ["--config.run.tasks=cola", "--config.task.train={good}"], "run.tasks='cola'"),
    ("text.py", ["--config.task.name=a/b", "--config.task.train={good}"], "task.name='a/b'"),
    ("text.py", [f"--config.task.name={'a' * 300}", "--config.task.train={good}"], "200 bytes at most"),
    ("text.py", [], "task.train is empty"),
    ("text.py", ["--config.task.train={good}", "--config.task.text=review"], "task.text=review"),
    ("text.py", ["--config.task.train={good}", "--config.task.label=stars"], "task.label=stars"),
    ("text.py", ["--config.task.train={good}", "--config.task.dev={unseen}"], "unseen.tsv:3: label '7'"),
    ("text.py", ["--config.task.train={good}", "--config.task.dev={empty}"], "empty.tsv has no rows"),
    ("text.py", ["--config.task.train={latin}"], "latin.tsv:2 is not UTF-8"),
    ("text.py", ["--config.task.train={few}"], "data.batch_size=16 is more than the 8 sequences"),
    ("glue.py:sst2", ["--config.data.seq_len=65"], "data.seq_len=65 exceeds the 64 positions"),
    ("glue.py:sst2", ["--config.init_from="], "init_from is empty"),
    ("glue.py:sst2", ["--config.init_from=/no/run"], "/no/run"),
    ("glue.py:sst2", ["--config.mesh.data=3"], "mesh.data=3"),
    ("glue.py:sst2", ["--config.mesh.tensor=3"], "mesh.tensor=3"),
    ("squad.py:v2.0", ["--config.task.data_dir={glue}"], "train-v2.0.json"),
    ("squad.py:v1.1", ["--config.task.data_dir={squad}", "--config.data.seq_len=8", "--config.task.max_query=60"],
     "data.seq_len=8"),
    ("tagging.py", ["--config.task.train={good}", "--config.task.tag_column=7"], "task.tag_column=7"),
    ("glue.py:sst2", ["--config.optimizer.learning_rate=1e30"], "optimizer.learning_rate"),
]


@pytest.mark.parametrize(("config", "flags", "hint"), BAD,
                         ids=[" ".join([c, *f]).replace("--config.", "") for c, f, _ in BAD])
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(world, tmp_path, capsys, config, flags, hint):
    places = broken(tmp_path) | {"glue": world / "glue"}
    places["latin"].write_bytes("text\tlabel\nä\t1\n".encode("latin-1"))
    if "{squad}" in "".join(flags):
        places["squad"] = squad(tmp_path / "squad", "v1.1")
        text = (places["squad"] / "train-v1.1.json").read_text().replace('"film"', '"film film film film film"')
        (places["squad"] / "train-v1.1.json").write_text(text)
    tune(world, tmp_path / "run", *(flag.format(**places) for flag in flags), config=config, code=2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert hint in error
    assert not list(tmp_path.glob("run/**/result.json"))


def test_a_batch_that_does_not_divide_over_the_mesh_is_refused(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sharding, "make_mesh", sharding.make_mesh.func)
    tune(world, tmp_path, "--config.data.batch_size=6", code=2)
    assert "data.batch_size=6 does not divide by mesh.data x mesh.fsdp = 4" in capsys.readouterr().err


def test_an_unwritable_workdir_and_a_bucket_are_named(world, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for workdir in (str(tmp_path / "file"), "gs://bucket/run"):
        argv = ["finetune", *arguments(world, workdir, "glue.py:sst2")]
        assert cli.run_main(finetune.main, validate, argv) == 2
        error = capsys.readouterr().err
        assert f"--workdir={workdir}" in error and error.count("\n") == 1
