"""One fine-tuning run: train, evaluate on dev, keep the best parameters, predict, and write it all down."""

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from electra_jax import checkpoint, metrics, runtime
from electra_jax.config import UserError
from electra_jax.data.loader import Prefetcher
from electra_jax.pretrained import Pretrained
from electra_jax.tasks.base import Feature, Task
from electra_jax.tuning import step
from electra_jax.tuning.batches import Batches, collate, in_order_of_length
from electra_jax.tuning.config import epochs
from electra_jax.tuning.heads import Head


class Diverged(UserError):
    """A loss that is no number any more."""


class Stopped(Exception):
    """A signal asked for the end; the run is not finished."""


def head_of(task: Task, config) -> Head:
    """Returns the head that the task and the config's `model` section ask for."""
    m = config.model
    style = m.qa_head if task.head == "qa" else m.head
    return Head(task.head, max(1, len(task.labels)), style, m.head_dropout, config.task.n_best)


def make_program(pretrained: Pretrained, task: Task, config, mesh) -> step.Program:
    """Returns the program for a task on a pretrained network, shared by all runs of the same shapes."""
    o = config.optimizer
    arch = pretrained.architecture(**{name: config.model[name] for name in (
        "hidden_dropout", "attention_dropout", "dtype", "attention", "scan_layers", "remat")}, packed=False)
    if arch.positions == "absolute" and task.seq_len > arch.max_positions:
        raise UserError(f"data.seq_len={task.seq_len} exceeds the {arch.max_positions} positions of init_from="
                        f"{config.init_from}: shorten it.")
    settings = step.Settings(o.layer_decay, o.layer_decay_rule, o.weight_decay, o.beta1, o.beta2, o.epsilon,
                             o.bias_correction, o.clip_norm, o.loss_sum)
    return step.program(arch, head_of(task, config), settings, mesh)


def learning_rate(optimizer, now: int, total: int) -> float:
    """The rate of step `now`, from 0: linear decay to 0 times linear warm-up, as in pretraining (facts b.10)."""
    warmup = optimizer.warmup * total
    return optimizer.learning_rate * (1 - now / total) * (min(1.0, now / warmup) if warmup else 1.0)


def predict(program: step.Program, params, features: Sequence[Feature], data, pad_id: int,
            beat=lambda: None) -> list[dict[str, np.ndarray]]:
    """Returns the outputs of tasks.Task.head for each feature, in order, padding cut off."""
    lengths = np.array([len(f.input_ids) for f in features])
    shards = program.mesh.shape["data"] * program.mesh.shape["fsdp"]
    # Beyond 1,024 no more rows than there are; below, all splits share a shape.
    size = max(shards, min(data.eval_batch_size, max(1024, len(features))) // shards * shards)
    out: list[dict] = [{}] * len(features)
    in_flight: list[tuple] = []

    def collect() -> None:
        rows, values = in_flight.pop(0)
        values = jax.device_get(values)
        for i, row in enumerate(rows):
            one = {name: value[i] for name, value in values.items()}
            if program.head.kind == "tagging" or program.head.style == "plain":
                one = {name: value[:lengths[row]] for name, value in one.items()}
            out[row] = _log_probabilities(one) if program.head.style == "plain" else one
        beat()

    for rows in in_order_of_length(lengths, size):
        batch = collate([_without_targets(features[i]) for i in rows], size, data.bucket, data.seq_len, pad_id)
        in_flight.append((rows, program.predict(params, batch)))
        if len(in_flight) > 2:
            collect()
    while in_flight:
        collect()
    return out


def _without_targets(feature: Feature) -> Feature:
    return Feature(feature.input_ids, feature.token_type_ids, {}, feature.allowed)


def _log_probabilities(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Start and end logits of a plain answer head as log probabilities over the feature's own tokens."""
    out = {}
    for name, logits in outputs.items():
        x = logits.astype(np.float64) - logits.max()
        out[name] = x - np.log(np.exp(x).sum())
    return out


class Run:
    """One task with one seed in one folder; `go` does it all and returns the result."""

    def __init__(self, config, pretrained: Pretrained, task: Task, program: step.Program, seed: int, folder: Path,
                 title: str):
        """`title` names the run on the screen."""
        self.config, self.pretrained, self.task, self.program = config, pretrained, task, program
        self.seed, self.folder, self.title = seed, folder, title
        features = task.features("train")
        self.count = len(features)
        self.batches = Batches(features, config.data, seed, task.tokenizer.pad_id)
        self.steps = max(1, math.floor(self.batches.steps_per_epoch * epochs(config, task.name)))
        if config.run.max_steps:
            self.steps = min(self.steps, config.run.max_steps)
        per_epoch, evals = self.batches.steps_per_epoch, config.run.evals_per_epoch
        self.eval_steps = {max(1, i * per_epoch // evals) for i in range(1, self.steps * evals // per_epoch + 1)}
        self.eval_steps.add(self.steps)
        self.dev = [split for split in task.splits() if split not in ("train", *_tests(task))]

    def go(self, stop: runtime.StopSignal, watchdog: runtime.Watchdog) -> dict[str, Any]:
        """Trains and returns the result, also written to `result.json`; raises Stopped after a signal."""
        started_s = time.perf_counter()
        for name in ("checkpoints", "predictions", "tensorboard"):    # of a run that was killed
            shutil.rmtree(self.folder / name, ignore_errors=True)

        def alive() -> None:
            watchdog.beat()
            if stop.requested:
                raise Stopped

        best: dict[str, Any] = {}
        top, bad = -math.inf, 0
        with (metrics.Progress(self.steps) as progress,
              metrics.MetricWriter(self.folder, self.config.run.tensorboard, 0) as writer):
            progress.note(f"{self.title}: {self.count:,} sequences, {self.steps} steps")
            state = self.program.state(None if self.config.init_random else self.pretrained.params, self.seed)
            key = jax.random.key(self.seed)
            losses, throughput, train_s = [], metrics.Throughput(), 0.0
            with contextlib.closing(Prefetcher(self.batches, 0, 4)) as prefetcher:
                for now in range(1, self.steps + 1):
                    batch = prefetcher.next()
                    rate = learning_rate(self.config.optimizer, now - 1, self.steps)
                    state, sums = self.program.train(state, batch, rate, jax.random.fold_in(key, now))
                    losses.append(sums)
                    throughput.step(int(batch["attention_mask"].sum()))
                    if len(losses) > 2:
                        losses[-3]["loss"].block_until_ready()
                    progress.advance(now)
                    alive()
                    if now % self.config.run.log_every_steps == 0 or now in self.eval_steps:
                        train_s += self._log(now, losses, throughput, rate, writer, progress)
                        losses = []
                    if now in self.eval_steps and self.dev:
                        with throughput.paused():
                            scores, outputs = self._evaluate(state["params"], alive)
                        writer.write(now, {f"dev_{name}": value for name, value in scores.items()})
                        progress.note(f"{self.title} dev {now}/{self.steps}  " + "  ".join(
                            f"{name} {value:.2f}" for name, value in scores.items()))
                        score = scores[self.task.metric]
                        better = score > top
                        top, bad = max(top, score), 0 if better else bad + 1
                        if better or self.config.run.select == "last":
                            best = {"step": now, "scores": scores, "outputs": outputs,
                                    "params": jax.device_get(state["params"])}
                        if self.config.run.patience and bad >= self.config.run.patience:
                            progress.note(f"{self.title}: no better for {bad} evaluations, stopping")
                            break
        if not self.dev:
            best = {"step": self.steps, "scores": {}, "outputs": {}, "params": jax.device_get(state["params"])}
        result = {"task": self.task.name, "seed": self.seed, "metric": self.task.metric, "scores": best["scores"],
                  "step": best["step"], "steps": self.steps, "train_s": round(train_s, 1),
                  "seconds": round(time.perf_counter() - started_s, 1), "compilations": self.program.compilations()}
        self._write(best, result, watchdog)
        return result

    def _log(self, now: int, losses: list, throughput, rate: float, writer, progress) -> float:
        values = {name: float(np.mean([s[name] for s in jax.device_get(losses)])) for name in losses[0]}
        if not np.isfinite(values["loss"]):
            raise Diverged(f"the loss is {values['loss']} at step {now} of {self.title}: lower optimizer.learning_rate="
                           f"{self.config.optimizer.learning_rate}, with another --workdir if this one holds finished "
                           "runs.")
        rates = throughput.read()
        values |= {"learning_rate": rate} | rates
        writer.write(now, values)
        progress.update(now, values)
        return rates["step_s"] * len(losses)

    def _evaluate(self, params, beat: Callable[[], None]) -> tuple[dict[str, float], dict[str, list]]:
        scores, outputs = {}, {}
        for split in self.dev:
            outputs[split] = self._predict(params, split, beat)
            prefix = "" if split == self.dev[0] else f"{split.removeprefix('dev_')}_"
            scores |= {f"{prefix}{name}": value for name, value in self.task.score(split, outputs[split]).items()}
        return scores, outputs

    def _predict(self, params, split: str, beat: Callable[[], None]) -> list:
        return predict(self.program, params, self.task.features(split), self.config.data, self.task.tokenizer.pad_id,
                       beat)

    def _write(self, best: dict[str, Any], result: dict[str, Any], watchdog) -> None:
        """Writes predictions and the checkpoint, and `result.json` last: it says that the run is finished."""
        folder = self.folder / "predictions"
        folder.mkdir(exist_ok=True)
        for split, outputs in best["outputs"].items():
            self.task.write_predictions(split, outputs, folder)
        params = self.program.place(best["params"])
        for split in _tests(self.task):
            self.task.write_predictions(split, self._predict(params, split, watchdog.beat), folder)
        if self.config.run.save:
            saver = checkpoint.Checkpointer(self.folder / "checkpoints", keep=1, every_steps=0, every_minutes=0)
            meta = {"config": self.pretrained.config.to_dict(), "tokenizer": self.task.tokenizer.fingerprint,
                    "finetune": self.config.to_dict(), "task": self.task.spec(), "result": result}
            state = {"step": np.int32(best["step"]), "params": params}
            saver.save(state, meta, self.task.tokenizer.files(), force=True)
            if not saver.close():
                raise UserError(f"--workdir: the checkpoint of {self.title} could not be written to {self.folder}: "
                                "make room there, and give the same command again.")
        runtime.write_json_atomic(self.folder / "result.json", result)


def _tests(task: Task) -> list[str]:
    return [split for split in task.splits() if split.startswith("test")]
