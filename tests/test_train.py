"""The command a user types: it learns, it resumes bit for bit after any kill, and it says what is wrong in a line."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import electra_jax
from electra_jax import checkpoint, cli, train
from electra_jax.config import UserError
from electra_jax.data import prepare

REPO = Path(__file__).parent.parent
STEPS = 24
CONFIG = """
from electra_jax import config as defaults
def get_config(variant=""):
    c = defaults.get_config()
    c.model.update({"embedding_size": 16, "hidden_size": 32, "num_layers": 1, "num_heads": 4, "intermediate_size": 64,
                    "generator_size": 0.5, "positions": "rotary", "norm": "pre"})
    c.data.update({"source": "text:CORPUS", "vocab_size": 80, "seq_len": 16, "batch_size": 8, "eval_fraction": 0.1})
    c.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 4, "steps": STEPS, "end_learning_rate": 1e-3})
    c.run.update({"log_every_steps": 4, "eval_every_steps": 8, "eval_batches": 2, "checkpoint_every_steps": 4,
                  "compilation_cache": "CACHE"})
    return defaults.apply_variants(c, variant)
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    """A tiny experiment on a corpus of its own; returns the config's path."""
    folder = tmp_path_factory.mktemp("train")
    rng = random.Random(0)
    words = "the cat sat on a mat and saw two dogs run over an old hill near the sea today".split()
    documents = ["\n".join(" ".join(rng.choices(words, k=12)) for _ in range(rng.randint(1, 6))) for _ in range(150)]
    (folder / "corpus.txt").write_text("\n\n".join(documents))
    text = CONFIG.replace("CORPUS", str(folder / "corpus.txt")).replace("CACHE", str(folder / "xla"))
    (folder / "tiny.py").write_text(text.replace("STEPS", str(STEPS)))
    return str(folder / "tiny.py")


def start(config: str, workdir: Path, *flags: str, devices: int = 1, **environment: str) -> subprocess.Popen:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(REPO)}
    env |= environment
    return subprocess.Popen([sys.executable, "-m", "electra_jax.train", f"--config={config}", f"--workdir={workdir}",
                             *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=REPO)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == code, output
    return output


def crcs(workdir: Path, step: int = STEPS) -> dict[str, int]:
    """CRC of every parameter and moment of a checkpoint; reading it also verifies the parameters."""
    checkpoint.load_params(workdir / "checkpoints" / str(step), ("embeddings", "generator", "discriminator"))
    index = json.loads((workdir / "checkpoints" / str(step) / "index" / "metadata").read_text())
    return {path: leaf["crc32"] for path, leaf in index["leaves"].items()}


def logged(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def start_hosts(config: str, workdir: Path, *flags: str) -> list[subprocess.Popen]:
    """Two processes with two devices each, as on two hosts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    return [start(config, workdir, *flags, devices=2, JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2",
                  JAX_PROCESS_ID=str(i)) for i in range(2)]


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory) -> Path:
    """The workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("straight")
    (workdir / "output.txt").write_text(finish(start(config, workdir)))
    return workdir


def wait_for_step(workdir: Path, step: int, process: subprocess.Popen) -> None:
    for _ in range(2400):
        if (workdir / "checkpoints" / str(step)).is_dir() or process.poll() is not None:
            return
        time.sleep(0.05)


def test_a_run_logs_evaluates_and_shows_what_it_learned(straight):
    lines = logged(straight)
    train_lines = [line for line in lines if "loss" in line]
    assert [line["step"] for line in train_lines] == list(range(4, STEPS + 1, 4))
    fields = ("mlm_loss rtd_loss mlm_accuracy rtd_accuracy rtd_auc replaced_fraction learning_rate grad_norm step_s "
              "tokens_per_s mfu").split()
    assert all(line[field] is not None for line in train_lines for field in fields)
    eval_lines = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in eval_lines] == [8, 16, 24]
    assert all(f"eval_{field}" in eval_lines[0] for field in fields[:6])
    output = (straight / "output.txt").read_text()
    for text in ("unigram entropy", "a constant guess", "→", "metrics.jsonl", "tensorboard", "checkpoints/24"):
        assert text in output
    assert json.loads((straight / "config.json").read_text())["optimizer"]["steps"] == STEPS
    assert list((straight / "tensorboard").glob("events.out.tfevents.*"))


def test_kill_9_and_the_same_command_give_bit_for_bit_the_uninterrupted_run(config, straight, tmp_path):
    rng, killed = random.Random(0), 0
    for _ in range(3):
        process = start(config, tmp_path)
        wait_for_step(tmp_path, (checkpoint_steps(tmp_path) or [0])[-1] + 4, process)
        time.sleep(rng.uniform(0, 0.15))
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert killed, "the run ended before it could be killed"
    finish(start(config, tmp_path))
    assert crcs(tmp_path) == crcs(straight)
    steps = [line["step"] for line in logged(tmp_path) if "loss" in line]
    assert steps == list(range(4, STEPS + 1, 4))


def checkpoint_steps(workdir: Path) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())


def test_two_hosts_train_as_one_device_does_and_a_signal_to_one_stops_both(config, straight, tmp_path):
    """With an axis across the hosts: each must be given all rows, not a half of its own."""
    hosts = start_hosts(config, tmp_path, "--config.mesh.tensor=4", f"--config.data.path={straight}/tokens",
                        "--config.optimizer.steps=100000", "--config.run.checkpoint_every_steps=0",
                        "--config.run.eval_every_steps=0")
    for line in hosts[0].stdout:
        if (match := re.match(r"step +(\d+)/", line)) and int(match.group(1)) >= STEPS:
            break
    hosts[1].send_signal(signal.SIGINT)    # SIGTERM: the next test
    output, other = (finish(host) for host in hosts)
    ours, theirs = ({line["step"]: line["loss"] for line in logged(w) if "loss" in line and line["step"] <= STEPS}
                    for w in (tmp_path, straight))
    assert ours == pytest.approx(theirs, rel=1e-4)
    step, = checkpoint_steps(tmp_path)
    assert STEPS < step < 100_000 and f"saved step {step}" in output and "saved step" not in other
    assert crcs(tmp_path, step)


def test_a_stop_signal_saves_exits_with_0_and_loses_nothing(config, straight, tmp_path):
    process = start(config, tmp_path, "--config.run.checkpoint_every_steps=0", "--config.optimizer.steps=5000",
                    "--config.run.eval_every_steps=0")
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    step = checkpoint_steps(tmp_path)[-1]
    assert f"saved step {step}" in output and step < 5000
    # Past its warm-up the rate is constant, so a run of so many steps takes the same ones.
    reference = tmp_path / "reference"
    finish(start(config, reference, f"--config.optimizer.steps={step}", f"--config.data.path={tmp_path / 'tokens'}"))
    assert crcs(tmp_path, step) == crcs(reference, step)


def test_resume_on_another_mesh_goes_on_with_the_same_losses(config, straight, tmp_path):
    process = start(config, tmp_path)
    wait_for_step(tmp_path, 8, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    resumed_at = checkpoint_steps(tmp_path)[-1]
    output = finish(start(config, tmp_path, "--config.mesh.fsdp=2", "--config.mesh.tensor=2", devices=4))
    assert f"resuming after step {resumed_at}" in output and "'fsdp': 2" in output
    ours, theirs = ({line["step"]: line["loss"] for line in logged(w) if "loss" in line} for w in (tmp_path, straight))
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose([ours[s] for s in sorted(ours)], [theirs[s] for s in sorted(theirs)], rtol=1e-4)


def test_a_finished_run_started_again_changes_nothing(config, straight):
    before, lines = crcs(straight), logged(straight)
    output = finish(start(config, straight))
    assert "finished already" in output and "unigram entropy" in output
    assert crcs(straight) == before and logged(straight) == lines


def test_a_finished_run_goes_on_with_more_steps(config, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    output = finish(start(config, tmp_path / "run", "--config.optimizer.steps=28"))
    assert f"resuming after step {STEPS}" in output and "finished already" not in output
    assert logged(tmp_path / "run")[-1]["step"] == 28 and "eval_loss" in logged(tmp_path / "run")[-1]


def test_a_full_disk_ends_with_exit_code_2_and_the_remedy(config, straight, tmp_path):
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000)); import signal; "
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from electra_jax import cli, train; "
            "sys.exit(cli.run_main(train.main))")
    result = subprocess.run(
        [sys.executable, "-c", code, f"--config={config}", f"--workdir={tmp_path / 'run'}",
         "--config.optimizer.steps=4", f"--config.data.path={straight / 'tokens'}",
         "--config.run.compilation_cache=off"],
        capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPO)})
    assert result.returncode == 2, result.stdout + result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "--workdir=" in errors[0] and "make room" in errors[0]


def test_the_readme_example_loads_a_checkpoint_in_a_fresh_process(straight):
    readme = (REPO / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 5
    code = code.replace("runs/quickstart", str(straight)) + "\nimport sys\nprint(states.shape, 'optax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=straight,
                            env=os.environ | {"PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"})
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"\(2, \d+, 32\) False\n", result.stdout), result.stdout


def test_a_loaded_generator_and_discriminator_know_padding_and_segments(straight):
    d, g = electra_jax.load_discriminator(straight), electra_jax.load_generator(straight)
    ids = np.array([[d.tokenizer.cls_id, *d.tokenizer.encode("the cat sat on a mat"), d.tokenizer.sep_id]])
    padded, mask = np.pad(ids, ((0, 0), (0, 3))), np.pad(np.ones_like(ids), ((0, 0), (0, 3)))
    for m, shape in ((d, ids.shape), (g, (*ids.shape, d.config.model.vocab_size))):
        plain = m.module.apply({"params": m.params}, ids)
        assert plain.shape == shape
        masked = m.module.apply({"params": m.params}, padded, mask)
        np.testing.assert_allclose(plain, masked[:, :ids.shape[1]], atol=1e-5)
        other = m.module.apply({"params": m.params}, ids, None, np.ones_like(ids))
        assert np.abs(other - plain).max() > 1e-6


def test_init_from_takes_the_parameters_and_starts_at_step_0(config, straight, tmp_path):
    finish(start(config, tmp_path, f"--config.run.init_from={straight}", "--config.optimizer.steps=1",
                 "--config.optimizer.warmup_steps=1", f"--config.data.path={straight / 'tokens'}"))
    ours, theirs = crcs(tmp_path, 1), crcs(straight)
    # The first step has learning rate 0, so the parameters are still those of the other run.
    params = [path for path in ours if path.startswith("params/")]
    assert params and all(ours[path] == theirs[path] for path in params)
    assert any(ours[path] != theirs[path] for path in ours if path.startswith("opt_state/"))


def test_init_from_refuses_parameters_of_another_tokenizer(config, straight, tmp_path, capfd):
    code = cli.run_main(train.main, argv=["train", f"--config={config}", f"--workdir={tmp_path}",
                                          f"--config.run.init_from={straight}", "--config.data.lowercase=False"])
    assert code == 2 and "another tokenizer" in capfd.readouterr().err


def test_the_mlm_baseline_trains_and_loads(config, straight, tmp_path):
    output = finish(start(config, tmp_path, "--config.objective.name=mlm", "--config.optimizer.steps=4",
                          f"--config.data.path={straight / 'tokens'}"))
    assert "MLM loss" in output and "RTD" not in output
    m = electra_jax.load_discriminator(tmp_path)
    assert m.module.apply({"params": m.params}, np.array([[2, 6, 7, 3]]), method="encode").shape == (1, 4, 32)
    g = electra_jax.load_generator(tmp_path)
    assert g.module.apply({"params": g.params}, np.array([[2, 6, 7, 3]])).shape == (1, 4, g.config.model.vocab_size)


def vocabulary(path: Path, leave_out: str = "") -> Path:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat"]
    path.write_text("\n".join(t for t in tokens if t != leave_out))
    return path


BAD = [
    (["--config.data.source=text:/no/such/*.txt"], "/no/such"),
    (["--config.data.source=text:EMPTY"], "data.source"),
    (["--config.data.tokenizer=VOCAB"], "[MASK]"),
    (["--config.data.tokenizer=/no/vocab.txt"], "/no/vocab.txt"),
    (["--config.model.positions=absolute", "--config.data.seq_len=513"], "model.max_positions=512"),
    (["--config.data.batch_size=6"], "data.batch_size=6"),
    (["--config.mesh.data=3"], "mesh.data=3"),
    (["--config.mesh.data=1", "--config.mesh.tensor=4", "--config.model.num_heads=2"], "model.num_heads=2"),
    (["--config.model.hidden_size=30"], "model.hidden_size=30"),
    (["--config.model.generator_size=0.55"], "model.generator_size=0.55"),
    (["--config.model.hiden_size=30"], "did you mean config.model.hidden_size"),
    (["--config.model.norm=both"], "model.norm='both'"),
    (["--config.model.rotary_theta=nan"], "model.rotary_theta=nan"),
    (["--config.optimizer.learning_rate=inf"], "optimizer.learning_rate=inf"),
    (["--config.objective.name=mlm", "--config.objective.uniform_generator=True"], "objective.uniform_generator=True"),
    (["--config.data.source=text:~nobody-has-this-name/a.txt"], "~nobody-has-this-name"),
    (["--config.data.tokenizer=~nobody-has-this-name/vocab.txt"], "~nobody-has-this-name"),
    (["--config.objective.mask_prob=nan"], "objective.mask_prob=nan"),
    (["--config.run.init_from=/no/run"], "/no/run"),
    (["--config.model.vocab_size=20"], "model.vocab_size=20"),
]


@pytest.mark.parametrize(("flags", "hint"), BAD, ids=[b[0][-1].removeprefix("--config.") for b in BAD])
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(config, straight, tmp_path, capfd, flags, hint):
    (tmp_path / "empty.txt").write_text("\n\n  \n")
    places = {"EMPTY": str(tmp_path / "empty.txt"), "VOCAB": str(vocabulary(tmp_path / "vocab.txt", "[MASK]"))}
    for name, place in places.items():
        flags = [flag.replace(name, place) for flag in flags]
    if not any("data." in flag for flag in flags):
        flags = [*flags, f"--config.data.path={straight / 'tokens'}"]
    code = cli.run_main(train.main, argv=["train", f"--config={config}", f"--workdir={tmp_path / 'run'}", *flags])
    error = capfd.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert hint in error
    assert "data." not in hint or not (tmp_path / "run/tokens/manifest.json").exists()   # nothing a rerun would trust
    assert not checkpoint_steps(tmp_path / "run")


def test_an_unwritable_workdir_is_named(config, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    code = cli.run_main(train.main, argv=["train", f"--config={config}", f"--workdir={tmp_path / 'file'}"])
    error = capfd.readouterr().err
    assert code == 2 and "--workdir" in error and str(tmp_path / "file") in error and error.count("\n") == 1


def test_a_bucket_as_workdir_is_refused_rather_than_made_a_local_folder(config, capfd):
    assert cli.run_main(train.main, argv=["train", f"--config={config}", "--workdir=gs://bucket/run"]) == 2
    assert "--workdir=gs://bucket/run" in capfd.readouterr().err


@pytest.mark.parametrize(("flag", "hint"), [
    ("--config.model.hidden_size=64", "model.hidden_size=64, was 32"),
    ("--config.optimizer.steps=4", "optimizer.steps=4"),
    ("--config.model.num_heads=2", "model.num_heads=2 in this run but 4 in"),
    ("--config.model.rotary_theta=50", "model.rotary_theta=50.0 in this run but 10000.0 in"),
    ("--config.data.batch_size=16", "data.batch_size=16 in this run but 8 in"),
    ("--config.run.seed=1", "run.seed=1 in this run but 0 in"),
])
def test_a_workdir_of_another_run_is_refused_and_left_alone(config, straight, capfd, flag, hint):
    before, fields = checkpoint_steps(straight), (straight / "config.json").read_text()
    code = cli.run_main(train.main, argv=["train", f"--config={config}", f"--workdir={straight}", flag])
    error = capfd.readouterr().err
    assert code == 2 and hint in error and error.count("\n") == 1, error
    assert checkpoint_steps(straight) == before and crcs(straight)
    assert (straight / "config.json").read_text() == fields


def test_invalid_utf8_and_a_line_of_10_mb_are_only_text(config, tmp_path, capfd):
    (tmp_path / "odd.txt").write_bytes(b"a good line\n\nbad \xff\xfe bytes here\n\n" + b"word " * 2_000_000)
    code = cli.run_main(prepare.main, argv=[
        "prepare", f"--config={config}", f"--workdir={tmp_path / 'run'}",
        f"--config.data.source=text:{tmp_path}/odd.txt", "--config.data.vocab_size=64"])
    captured = capfd.readouterr()
    assert code == 0, captured.err
    assert "1 line" in captured.out and "UTF-8" in captured.out


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused():
    class Tokenizer:
        vocab_size = 10

    from electra_jax.config import get_config
    c = get_config()
    train.resolve_vocabulary(c, Tokenizer)
    assert c.model.vocab_size == 10
    c.model.vocab_size = 9
    with pytest.raises(UserError, match=r"model\.vocab_size=9"):
        train.resolve_vocabulary(c, Tokenizer)
