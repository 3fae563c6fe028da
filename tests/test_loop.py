"""The loop around the compiled steps: what it compiles, what it moves, and when it does what."""

import json
import logging
import re

import jax
import numpy as np
import pytest
import tiny

from electra_jax import config, loop, metrics
from electra_jax.data.prepare import prepare
from electra_jax.data.tokenizer import tokenizer_from_files

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A token store of a few hundred words, and its tokenizer."""
    folder = tmp_path_factory.mktemp("loop")
    words = "the cat sat on a mat and saw two dogs run over old hills".split()
    words = np.random.default_rng(0).choice(words, (200, 30))
    (folder / "corpus.txt").write_text("\n\n".join(" ".join(row) for row in words))
    c = config.get_config()
    c.data.update(source=f"text:{folder}/corpus.txt", vocab_size=80, num_workers=1, eval_fraction=0.2)
    made = prepare(c, folder / "tokens")
    return made, tokenizer_from_files(made.tokenizer_files())


def run(store, workdir, **fields) -> loop.Run:
    """A run of one layer and 12 steps on the four devices."""
    c = tiny.config(**dict(model__num_layers=1, model__hidden_dropout=0.1, data__seq_len=16, data__batch_size=8,
                           optimizer__steps=12, run__log_every_steps=4, run__eval_every_steps=4, run__eval_batches=2,
                           run__checkpoint_every_steps=6, run__compilation_cache="off", run__show_examples=1,
                           run__tensorboard=False) | fields)
    c.model.vocab_size = store[1].vocab_size
    return loop.Run(c, workdir, *store)


def crcs(workdir, number) -> dict[str, int]:
    index = json.loads((workdir / "checkpoints" / str(number) / "index" / "metadata").read_text())
    return {path: leaf["crc32"] for path, leaf in index["leaves"].items()}


def test_a_whole_run_compiles_train_and_evaluation_once_and_moves_nothing_behind_the_scenes(store, tmp_path):
    """Training, evaluations, saves, examples, then resume and all again."""
    for steps in (12, 18):
        lines, handler = [], logging.Handler()
        handler.emit = lambda record, lines=lines: lines.append(record.getMessage())
        logging.getLogger("jax").addHandler(handler)
        with jax.log_compiles():
            one = run(store, tmp_path, optimizer__steps=steps)
            with jax.transfer_guard("disallow"):
                one.go()
        logging.getLogger("jax").removeHandler(handler)
        compiled = re.findall(r"Finished XLA compilation of jit\((\w+)\)", "\n".join(lines))
        assert compiled.count("train_step") == compiled.count("evaluate") == compiled.count("inspect") == 1, compiled
        assert compiled.count("train_steps") == 0
    assert one.start_step == 12


def logged(workdir) -> list[dict]:
    return [{name: value for name, value in json.loads(line).items()
             if name not in ("time", "tokens_per_s", "step_s", "data_wait", "mfu")}
            for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_several_steps_a_command_keep_numbers_logs_and_saves_and_resume_between_groups_bit_for_bit(store, tmp_path):
    run(store, tmp_path / "one").go()
    group = dict(run__steps_per_dispatch=3)   # divides neither the 4 steps of a log nor those of an evaluation
    run(store, tmp_path / "several", **group).go()
    one, several = (logged(tmp_path / name) for name in ("one", "several"))
    assert [line.keys() for line in one] == [line.keys() for line in several] and len(one) == 6
    for a, b in zip(one, several, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    saved = [sorted(p.name for p in (tmp_path / name / "checkpoints").glob("*")) for name in ("one", "several")]
    assert saved[0] == saved[1] == ["12", "6"]

    stopped = run(store, tmp_path / "stopped", **group)
    advance = metrics.Progress.advance

    def stop_at_4(progress, now):
        advance(progress, now)
        stopped.stop.requested |= now == 4

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics.Progress, "advance", stop_at_4)
        stopped.go()
    resumed = run(store, tmp_path / "stopped", **group)
    assert resumed.start_step == 4
    resumed.go()
    assert crcs(tmp_path / "stopped", 12) == crcs(tmp_path / "several", 12)


def test_groups_of_steps_end_where_something_is_due():
    rng = np.random.default_rng(0)
    for _ in range(300):
        size, steps, start = rng.integers(1, 9), rng.integers(1, 60), rng.integers(0, 20)
        every = {f"run__{name}_every_steps": int(rng.integers(1, 12)) for name in ("log", "eval", "checkpoint")}
        c = tiny.config(run__steps_per_dispatch=int(size), optimizer__steps=int(steps), **every)
        now, used = int(start), set()
        while now < steps:
            count = loop.steps_at_once(c, now)
            assert not [n for n in range(now + 1, now + count) for e in every.values() if n % e == 0]
            now += count
            used.add(count)
        assert now == max(steps, start) and used <= {1, size}
    c = tiny.config(run__steps_per_dispatch=4, run__log_every_steps=8, optimizer__steps=10)
    assert [loop.steps_at_once(c, now) for now in (0, 1, 4, 8)] == [4, 1, 4, 1]


def test_a_gradient_that_is_no_number_in_the_last_step_is_not_saved_as_a_finished_run(store, tmp_path, monkeypatch):
    read = loop.Interval.read

    def broken(interval):
        values, seconds = read(interval)
        return values | {"grad_norm": float("nan")}, seconds

    monkeypatch.setattr(loop.Interval, "read", broken)
    one = run(store, tmp_path, optimizer__steps=4)
    with pytest.raises(config.UserError, match=r"gradient's norm is nan at step 4: lower optimizer\.learning_rate"):
        one.go()
    assert not list((tmp_path / "checkpoints").iterdir())


def test_parameters_of_a_network_with_other_heads_are_refused(store, tmp_path):
    """Shapes do not show the number of heads."""
    run(store, tmp_path / "one", optimizer__steps=2).go()
    heads = config.get(run(store, tmp_path / "one", optimizer__steps=2).config, "model.num_heads")
    for fields in ({}, dict(run__init_optimizer=True)):
        remedy = rf"model.num_heads=2 would .* give --config.model.num_heads={heads}"
        with pytest.raises(config.UserError, match=remedy):
            run(store, tmp_path / "two", run__init_from=str(tmp_path / "one"), model__num_heads=2, **fields)
    with pytest.raises(config.UserError, match=r"optimizer.steps=1, but run.init_from=.* has 2: .*run.init_optimizer"):
        run(store, tmp_path / "two", run__init_from=str(tmp_path / "one"), run__init_optimizer=True, optimizer__steps=1)
