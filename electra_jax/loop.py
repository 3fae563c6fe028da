"""The life of a pretraining run: restore, train, evaluate, save, report."""

import contextlib
import functools
import time
from collections import deque
from pathlib import Path

import jax
import numpy as np

import electra_jax
from electra_jax import attention, checkpoint, metrics, model, runtime, sharding, show, step
from electra_jax.config import UserError, get, restored
from electra_jax.data.loader import Loader, Prefetcher
from electra_jax.sharding import path_name


def check_mesh(config) -> None:
    """Raises UserError when the mesh does not fit the devices, or sizes and attention do not fit it or each other."""
    model.generator_architecture(config.model)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_divides(config, mesh)
    attention.check(config.model.attention, config.data.seq_len, mesh, model.head_sizes(config.model))


# With the seed they decide which tokens a step sees.
_LAYOUT = ("batch_size", "seq_len", "segment_pairs", "single_segment_prob", "short_prob", "pack")


def make_loader(config, store, tokenizer, split: str, mesh=None) -> Loader:
    """Returns the loader of this host's rows of "train" or "eval"; without a mesh, of all rows."""
    rows = None if mesh is None else sharding.local_rows(mesh, config.data.batch_size)
    return Loader(store, tokenizer, split=split, seed=config.run.seed, rows=rows,
                  **{name: config.data[name] for name in _LAYOUT})


class Interval:
    """The steps since the last logged one. Their sums stay on the device until they are read."""

    def __init__(self, config, program: step.Program):
        self._config, self._program = config, program
        self._sums: list[tuple[dict, int]] = []
        self.throughput = metrics.Throughput()

    def add(self, sums: dict, steps: int = 1) -> None:
        """Takes the sums of one command; with `run.steps_per_dispatch` those of its first `steps` steps count."""
        self._sums.append((sums, steps))
        for _ in range(steps):
            self.throughput.step(self._config.data.batch_size * self._config.data.seq_len)

    def read(self) -> tuple[dict[str, float], float]:
        """Returns the metrics over the steps added since the last read and the seconds they took; forgets them."""
        taken, self._sums = jax.device_get(self._sums), []
        if self._config.run.steps_per_dispatch > 1:
            taken = [({name: x[i] for name, x in sums.items()}, 1) for sums, steps in taken for i in range(steps)]
        each = [sums for sums, _ in taken]
        values = step.summarize({name: sum(s[name] for s in each) for name in each[0]}, self._config)
        values |= {"grad_norm": float(np.mean([s["grad_norm"] for s in each])),
                   "learning_rate": float(each[-1]["learning_rate"])}
        values |= self.throughput.read()
        devices = list(self._program.mesh.devices.flat)
        values["mfu"] = metrics.mfu(self._program.flops_per_step, values["step_s"], devices, self._config.model.dtype)
        return values, values["step_s"] * len(each)


class Run:
    """One run in one workdir; `go` does it all."""

    def __init__(self, config, workdir: Path, store, tokenizer):
        """`config.model.vocab_size` is set; `store` is the token store that `tokenizer` made.

        Raises UserError when the newest checkpoint belongs to another run.
        """
        self.config, self.workdir, self.store, self.tokenizer = config, workdir, store, tokenizer
        self.mesh = sharding.make_mesh(config.mesh)
        special_ids = {name: getattr(tokenizer, f"{name}_id") for name in ("pad", "cls", "sep", "mask")}
        self.program = step.build(config, self.mesh, special_ids, tokenizer.vocab_size)
        self.train_loader = make_loader(config, store, tokenizer, "train", self.mesh)
        held_out = store.split("eval").num_tokens
        self.eval_loader = make_loader(config, store, tokenizer, "eval", self.mesh) if held_out else None
        self.checkpointer = checkpoint.Checkpointer(
            workdir / "checkpoints", config.run.keep_checkpoints,
            config.run.checkpoint_every_steps, config.run.checkpoint_every_minutes)
        self.identity = {"tokenizer": tokenizer.fingerprint, "manifest_hash": store.manifest_hash}
        found = self.checkpointer.restore(self.program.abstract_state, self.identity | {"config": config.to_dict()},
                                          functools.partial(_check_resumes, config))
        self.state, self.meta = found or (initial_state(config, self.program, tokenizer.fingerprint),
                                          {"tokens": 0, "train_s": 0.0, "data_wait_s": 0.0, "evaluated": False})
        self.start_step, self.steps = int(self.state["step"]), config.optimizer.steps
        if self.start_step > self.steps:
            where, other = ((f"the newest checkpoint in {workdir}", "give another --workdir") if found else
                            (f"run.init_from={config.run.init_from}", "set run.init_optimizer=False"))
            raise UserError(f"optimizer.steps={self.steps}, but {where} has {self.start_step}: raise optimizer.steps "
                            f"or {other}.")
        self.meta["evaluated"] &= self.start_step == self.steps   # a finished run may go on with more steps

    def go(self) -> None:
        """Trains to the last step, evaluates, saves and reports; returns early after a stop signal, saved.

        Raises UserError when the loss is no longer finite, or the last checkpoint could not be written.
        """
        self._describe()
        with (metrics.Progress(self.steps, self.start_step) as self.progress,
              metrics.MetricWriter(self.workdir, self.config.run.tensorboard, self.start_step) as self.writer,
              runtime.StopSignal() as self.stop,
              runtime.Watchdog() as self.watchdog):
            self._stopping = False    # all hosts have heard of a signal to one of them
            finished = self._train() and self._finish()
            written = self.checkpointer.close()
        if finished:
            self._report()
        if not written:
            raise UserError(f"--workdir={self.workdir}: the last checkpoint could not be written: make room there, and "
                            "give the same command again.")
        if not finished and jax.process_index() == 0:
            print(f"saved step {int(self.state['step'])} in {self.checkpointer.directory}; "
                  "the same command goes on from there", flush=True)

    def _train(self) -> bool:
        """Takes all steps that are left; returns False if it was stopped (and has saved)."""
        run, interval, train = self.config.run, Interval(self.config, self.program), None
        agreement = runtime.Agreement()
        in_flight, now = deque(), self.start_step
        with contextlib.closing(Prefetcher(self.train_loader, self.start_step, self.config.data.prefetch)) as batches:
            while now < self.steps:
                count = steps_at_once(self.config, now)
                with interval.throughput.waiting():
                    inputs = self._inputs(batches, count)
                if train is None:
                    with interval.throughput.paused():
                        train = self._compile(inputs)
                self.state, sums = train(self.state, *inputs)
                now += count
                interval.add(sums, count)
                self.meta["tokens"] += count * self.config.data.batch_size * self.config.data.seq_len
                # The device works on two commands at most: enough to stay busy, and a signal is answered soon.
                in_flight.append(sums["grad_norm"])
                if len(in_flight) > 2:
                    in_flight.popleft().block_until_ready()
                self.progress.advance(now)
                self.watchdog.beat()
                if now % run.log_every_steps == 0 or now == self.steps:
                    self._log(now, interval)
                if now == self.steps:
                    break
                self._stopping, overdue = agreement.ask(now, self.stop.requested, self.checkpointer.is_overdue())
                with interval.throughput.paused():
                    if run.eval_every_steps and now % run.eval_every_steps == 0 and not self._stopping:
                        self._evaluate(now)
                    if self._stopping or overdue or self.checkpointer.is_due(now):
                        self._check_finite("the gradient's norm", jax.device_get(sums["grad_norm"]).max(), now)
                        self._save()
                if self._stopping:
                    return False
        return True

    def _inputs(self, batches: Prefetcher, count: int) -> tuple:
        """What the train step needs beside the state: a batch, or the next `count` batches and their number."""
        size = self.config.run.steps_per_dispatch
        if size == 1:
            return (sharding.global_batch(batches.next(), self.mesh),)
        rows = [batches.next() for _ in range(count)]
        rows += rows[-1:] * (size - count)   # one shape, hence one program
        stacked = {name: np.stack([r[name] for r in rows]) for name in rows[0]}
        return sharding.global_batch(stacked, self.mesh, True), sharding.everywhere(np.int32(count), self.mesh)

    def _finish(self) -> bool:
        """Evaluates the trained network and saves it; returns False if it was stopped meanwhile (and has saved)."""
        if not self.meta["evaluated"]:
            self.results = self._evaluate(self.steps)
            self.meta["evaluated"] = not self._stopping
            self._save()
        else:
            self.progress.note(f"the run was finished already: {self.steps} steps in {self.workdir}")
            self.results = self._held_out()
        return not self._stopping

    def _log(self, now: int, interval: Interval) -> None:
        values, elapsed_s = interval.read()
        self.meta["train_s"] += elapsed_s
        self.meta["data_wait_s"] += values["data_wait"] * elapsed_s
        self._check_finite("the loss", values["loss"], now)
        self._check_finite("the gradient's norm", values["grad_norm"], now)
        self.writer.write(now, values)
        self.progress.update(now, values)

    def _check_finite(self, what: str, value, now: int) -> None:
        # Before a save, so that the newest checkpoint is always one to go on from.
        if not np.isfinite(value):
            raise UserError(f"{what} is {float(value)} at step {now}: lower optimizer.learning_rate="
                            f"{self.config.optimizer.learning_rate} or raise optimizer.warmup_steps, and start in "
                            "another --workdir.")

    def _held_out(self) -> dict[str, float] | None:
        """Returns the metrics on held-out documents; None without any, or after a stop signal."""
        if self.eval_loader is None:
            return None
        total, batches = None, max(1, self.eval_loader.sequences_per_epoch // self.config.data.batch_size)
        for i in range(min(self.config.run.eval_batches, batches)):
            self._stopping = self._stopping or runtime.any_host(self.stop.requested)
            if self._stopping:
                return None
            batch = sharding.global_batch(self.eval_loader.batch_at(i), self.mesh)
            index = sharding.everywhere(np.int32(i), self.mesh)
            with self.watchdog.paused() if i == 0 else contextlib.nullcontext():    # compiles
                sums = jax.device_get(self.program.eval_step(self.state["params"], batch, index))
            total = sums if total is None else jax.tree.map(np.add, total, sums)
            self.watchdog.beat()
        return step.summarize(total, self.config)

    def _evaluate(self, now: int) -> dict[str, float] | None:
        results = self._held_out()
        if results:
            self.writer.write(now, {f"eval_{name}": value for name, value in results.items()})
            self.progress.eval(now, results)
        return results

    def _save(self) -> None:
        self.checkpointer.save(self.state, self.meta | self.identity | {"config": self.config.to_dict()},
                               self.tokenizer.files(), force=True)
        self.watchdog.beat()

    def _compile(self, inputs: tuple):
        """Compiles the train step for the shapes of its inputs and says what it took."""
        start_s = time.perf_counter()
        train = self.program.train_step if self.config.run.steps_per_dispatch == 1 else self.program.train_steps
        with self.watchdog.paused():
            compiled = train.lower(self.state, *inputs).compile()
        memory = compiled.memory_analysis()
        needs = f", needs {(memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20:,.0f} MiB a device" \
            if memory else ""
        self.progress.note(f"compiled in {time.perf_counter() - start_s:.1f} s{needs}")
        return compiled

    def _describe(self) -> None:
        if jax.process_index():
            return
        config, params = self.config, self.state["params"]
        counts = ", ".join(f"{name} {model.count_params(tree):,}" for name, tree in params.items())
        where = f"resuming after step {self.start_step}" if self.start_step else "starting"
        print(f"electra_jax {electra_jax.__version__}, jax {jax.__version__}, {self.mesh.size} x "
              f"{self.mesh.devices.flat[0].device_kind}, mesh {dict(self.mesh.shape)}\n"
              f"model {model.count_params(params):,} parameters ({counts})\n"
              f"data  {self.train_loader.sequences_per_epoch:,} sequences of {config.data.seq_len} tokens a pass, "
              f"{self.steps * config.data.batch_size / self.train_loader.sequences_per_epoch:.2f} passes, "
              f"padding {self.train_loader.padding:.1%}\n"
              f"{where} in {self.workdir}", flush=True)

    def _report(self) -> None:
        """Prints what was learned, sentences with their probabilities, and where everything lies."""
        examples = self._examples()
        if jax.process_index():
            return
        done = f"{self.steps} steps, {self.meta['tokens'] / 1e6:.1f} M tokens"
        if self.meta["train_s"]:
            done += (f", {metrics.format_duration(self.meta['train_s'])} of training, of which the device waited "
                     f"{self.meta['data_wait_s'] / self.meta['train_s']:.1%} for data")
        print(f"\n{done}")
        if self.results:
            entropy, r = self.store.unigram_entropy, self.results
            print("on held-out documents:")
            if "mlm_loss" in r:
                gain = entropy - r["mlm_masked_loss"]
                print(f"  generator      MLM loss at [MASK] {r['mlm_masked_loss']:.3f} nats, {abs(gain):.2f} "
                      f"{'under' if gain > 0 else 'over'} the unigram entropy of {entropy:.3f}; "
                      f"accuracy {r['mlm_accuracy']:.1%}\n"
                      f"                 {r['mlm_loss']:.3f} at all selected positions, visible ones included")
            if "rtd_loss" in r:
                print(f"  discriminator  RTD loss {r['rtd_loss']:.4f} nats, a constant guess would have "
                      f"{r['rtd_floor']:.4f}; AUC {r['rtd_auc']:.3f}; {r['replaced_fraction']:.1%} replaced")
        if examples:
            print("\nheld-out text as the discriminator saw it: original→replacement, and behind each token the\n"
                  "probability in percent that it was replaced\n")
            show.print_examples(examples)
        print(f"checkpoint   {self.checkpointer.directory / str(int(self.state['step']))}\n"
              f"metrics      {self.workdir / 'metrics.jsonl'}")
        if self.config.run.tensorboard:
            print(f"tensorboard  tensorboard --logdir {self.workdir / 'tensorboard'}")

    def _examples(self) -> list:
        """Returns what the discriminator saw and said of this host's first held-out rows; all hosts call it."""
        if not (self.results and "rtd_loss" in self.results and self.config.run.show_examples):
            return []
        batch, index = self.eval_loader.batch_at(0), sharding.everywhere(np.int32(0), self.mesh)
        seen = jax.device_get(self.program.inspect_step(
            self.state["params"], sharding.global_batch(batch, self.mesh), index))
        rows = sharding.local_rows(self.mesh, self.config.data.batch_size)
        return show.examples(batch, jax.tree.map(lambda x: x[rows], seen), self.tokenizer.token,
                             self.config.run.show_examples)


def steps_at_once(config, now: int) -> int:
    """Returns how many steps the device is given after step `now`: `run.steps_per_dispatch` of them, or one.

    Groups begin at multiples of their size and end, at the latest, at a step after which something is due.
    """
    run, size = config.run, config.run.steps_per_dispatch
    if now % size or now + size > config.optimizer.steps:
        return 1
    due = filter(None, (run.log_every_steps, run.eval_every_steps, run.checkpoint_every_steps))
    return 1 if any((now + size - 1) // every > now // every for every in due) else size


def _check_resumes(config, meta: dict, where: str) -> None:
    """Raises UserError when the run that was saved saw other rows in a step, or was another function of its
    parameters; shapes show neither."""
    theirs = restored(meta["config"])
    fields = [f"data.{name}" for name in _LAYOUT] + ["run.seed"]
    values = {field: (get(config, field), get(theirs, field)) for field in fields}
    values |= {f"model.{name}": both for name, both in model.differences(config.model, theirs.model).items()}
    for field, (mine, other) in values.items():
        if mine != other:
            raise UserError(f"{field}={mine} in this run but {other} in {where}: set it back, or give another "
                            "--workdir.")


def initial_state(config, program: step.Program, fingerprint: str) -> step.State:
    """Returns fresh parameters, or those of `run.init_from` with a fresh optimizer and step 0.

    With `run.init_optimizer` its moments and step count as well. Raises UserError when the checkpoint is of another
    tokenizer, or its parameters have other names or shapes.
    """
    source = config.run.init_from
    if not source:
        return program.init_state()
    if config.run.init_optimizer:
        state, meta = checkpoint.load_state(source, program.abstract_state)
        _check_tokenizer(source, meta, fingerprint)
        _check_function(config, meta)
        return state
    state = program.init_state()
    params, meta, _ = checkpoint.load_params(source, tuple(state["params"]))
    _check_tokenizer(source, meta, fingerprint)
    params = model.unstack_layers(params)
    if config.model.scan_layers:
        params = model.stack_layers(params)
    ours, theirs = ({path_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)}
                    for tree in (state["params"], params))
    for path in sorted(ours.keys() | theirs.keys()):
        if ours.get(path) != theirs.get(path):
            stored = restored(meta["config"]).model
            other = " ".join(f"--config.model.{name}={value}" for name, value in stored.items()
                             if value != config.model[name])
            raise UserError(f"run.init_from={source}: {path} has shape {theirs.get(path, 'none')} there and "
                            f"{ours.get(path, 'none')} in this model: give the fields of that run, {other}.")
    _check_function(config, meta)
    state["params"] = jax.tree.map(lambda x, old: jax.device_put(x, old.sharding), params, state["params"])
    return state


def _check_function(config, meta: dict) -> None:
    for name, (mine, other) in model.differences(config.model, restored(meta["config"]).model).items():
        raise UserError(f"model.{name}={mine} would read the parameters of run.init_from={config.run.init_from} as "
                        f"another network, they were trained with {other}: give --config.model.{name}={other}.")


def _check_tokenizer(source: str, meta: dict, fingerprint: str) -> None:
    if meta["tokenizer"] != fingerprint:
        raise UserError(f"run.init_from={source} was trained with another tokenizer than that of the token store: "
                        "prepare the data with data.tokenizer set to that run's tokenizer.")
