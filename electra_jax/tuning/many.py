"""Many runs as one command: every task with every seed, finished ones kept, and the table of what they scored."""

import contextlib
import csv
import io
import math
import statistics
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table

from electra_jax import runtime, sharding
from electra_jax.config import UserError
from electra_jax.interop.workdir import read_json
from electra_jax.pretrained import Pretrained
from electra_jax.tasks.base import Task
from electra_jax.tuning import run as run_lib

# What may change between two commands on one workdir: how many runs, and what does not touch their numbers.
_FREE = ("run.tasks", "run.seeds", "run.log_every_steps", "run.tensorboard", "run.compilation_cache", "run.save",
         "task.name", "init_from")


def run_all(config, workdir: Path, pretrained: Pretrained, tasks: dict[str, Callable[[], Task]],
            checksums: dict[str, dict[str, int]]) -> None:
    """Fine-tunes each task with each seed; those that `workdir` has the result of are left as they are.

    `tasks` makes a task by its name when its turn comes, `checksums` has those of its files (see `tasks.checksums`).
    Raises UserError when `workdir` holds runs of other settings or data and when a batch does not divide over the mesh,
    run_lib.Stopped after a signal.
    """
    mesh = sharding.make_mesh(config.mesh)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.data.batch_size % shards:
        raise UserError(f"data.batch_size={config.data.batch_size} does not divide by mesh.data x mesh.fsdp = "
                        f"{shards}: change data.batch_size to a multiple of {shards}.")
    _check_same_settings(config, workdir, pretrained, checksums)
    with _writing(workdir):
        for name in tasks:
            (workdir / name).mkdir(exist_ok=True)
    with runtime.StopSignal("finished runs are kept") as stop, runtime.Watchdog() as watchdog:
        for name, make_task in tasks.items():
            folders = {seed: workdir / name / f"seed-{seed}" for seed in
                       range(config.run.seed, config.run.seed + config.run.seeds)}
            done = {seed for seed, folder in folders.items() if (folder / "result.json").exists()}
            task = None if len(done) == len(folders) else make_task()
            for seed, folder in folders.items():
                if seed not in done:
                    with _writing(workdir):
                        folder.mkdir(exist_ok=True)
                    program = run_lib.make_program(pretrained, task, config, mesh)
                    run = run_lib.Run(config, pretrained, task, program, seed, folder, f"{name} seed {seed}")
                    run.go(stop, watchdog)
                if stop.requested:
                    raise run_lib.Stopped
            if done:
                print(f"{name}: {len(done)} of {len(folders)} runs were finished already", flush=True)
                lacking = [folders[seed] for seed in sorted(done) if not (folders[seed] / "checkpoints").exists()]
                if config.run.save and lacking:
                    print(f"{name}: {len(lacking)} of them with run.save=False, without a checkpoint: to get one, "
                          f"remove {lacking[0]}/result.json and give the same command again", flush=True)


def finished(workdir: Path, first: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Returns the results of all finished runs in `workdir` by task and seed, the tasks named `first` before others."""
    order = {name: i for i, name in enumerate(first)}
    files = sorted(workdir.glob("*/seed-*/result.json"), key=lambda file: (
        order.get(file.parts[-3], len(order)), file.parts[-3], len(file.parts[-2]), file.parts[-2]))
    return [_result(file) for file in files]


@contextlib.contextmanager
def _writing(workdir: Path):
    try:
        yield
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else error
        raise UserError(f"--workdir={workdir} cannot be written ({what}): remove what is there, make room, or give "
                        "another --workdir.") from error


def _result(file: Path) -> dict[str, Any]:
    result = read_json(file)
    for name, kind in (("task", str), ("seed", int), ("metric", str), ("scores", dict), ("seconds", (int, float))):
        if not isinstance(result.get(name), kind):
            raise UserError(f"{file} is not the result of a run ({name} is {result.get(name)!r}): remove it, and the "
                            "same command does that run anew.")
    return result


def _check_same_settings(config, workdir: Path, pretrained: Pretrained, checksums: dict[str, dict[str, int]]) -> None:
    crc = 0
    for leaf in jax.tree.leaves(pretrained.params):
        crc = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8), crc)
    settings = {"tokenizer": pretrained.tokenizer.fingerprint, "parameters": crc, **_flat(config.to_dict())}
    settings = {name: value for name, value in settings.items() if name not in _FREE}
    file = workdir / "settings.json"
    contents = dict(checksums)    # of all tasks in the workdir, asked for now or not
    # Before the first result there is nothing to keep apart, and what was wrong in the command may be mended.
    if done := {result["task"] for result in finished(workdir)}:
        stored = read_json(file)
        before = {task: files for task, files in stored.pop("contents", {}).items() if task in done}
        for name in settings | stored:
            if settings.get(name) != stored.get(name):
                what = f"{name} is {settings.get(name)!r}, but {stored.get(name)!r}"
                if other := {"tokenizer": "another vocabulary", "parameters": "other parameters"}.get(name):
                    what = f"init_from={config.init_from} has {other} than used"
                raise UserError(f"{what} in the runs of {workdir}: give another --workdir.")
        for task in checksums.keys() & before.keys():
            for name, crc in before[task].items():
                if checksums[task].get(name) != crc:
                    raise UserError(f"{task}: the data ({name}) have changed since the runs of {workdir}: give another "
                                    "--workdir.")
        contents = before | contents
    with _writing(workdir):
        runtime.write_json_atomic(file, settings | {"contents": contents})


def _flat(fields: dict, prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in fields.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


# --- The table ----------------------------------------------------------------------------------

def summarize(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row a task and metric, the task's own first: n, median, mean, standard deviation (n - 1), best."""
    rows = []
    for task in dict.fromkeys(r["task"] for r in results):
        runs = [r for r in results if r["task"] == task and r["scores"]]
        if not runs:
            continue
        main = runs[0]["metric"]
        for metric in sorted(runs[0]["scores"], key=lambda m: m != main):
            values = [r["scores"][metric] for r in runs]
            rows.append({"task": task, "metric": metric, "n": len(values), "median": statistics.median(values),
                         "mean": statistics.fmean(values), "best": max(values),
                         "std": statistics.stdev(values) if len(values) > 1 else float("nan"),
                         "seconds": statistics.median(r["seconds"] for r in runs)})
    return rows


_COLUMNS = ("task", "metric", "median", "mean", "std", "best", "n", "seconds")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if math.isfinite(value) else ""
    return str(value)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [_COLUMNS, ["---"] * len(_COLUMNS), *([_cell(row[c]) for c in _COLUMNS] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def report(config, workdir: Path, names: Sequence[str]) -> None:
    """Prints the table of all finished runs in `workdir` and writes it there as results.json, .csv, .md and .png.

    `names` are the tasks asked for: other runs stay in the table, which says how many they are.
    """
    results = finished(workdir, names)
    seeds = range(config.run.seed, config.run.seed + config.run.seeds)
    if others := sum(r["task"] not in names or r["seed"] not in seeds for r in results):
        print(f"{others} of the {len(results)} runs in the table were not asked for now, but finished in {workdir} "
              "earlier", flush=True)
    rows = summarize(results)
    table = rich.table.Table(*_COLUMNS)
    for row in rows:
        table.add_row(*(_cell(row[c]) for c in _COLUMNS))
    rich.console.Console().print(table)
    # JSON has no NaN, which is the deviation of one run.
    plain = [{name: None if value != value else value for name, value in row.items()} for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain)
    with _writing(workdir):
        runtime.write_json_atomic(workdir / "results.json", {"summary": plain, "runs": results})
        (workdir / "results.csv").write_text(text.getvalue())
        (workdir / "results.md").write_text(markdown(rows))
        plot(results, workdir / "results.png")
    print(f"results      {workdir}/results.{{json,csv,md,png}}, predictions in {workdir}/TASK/seed-N/predictions")


def plot(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Draws every run's score by task, with the median as a line."""
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state
    tasks = list(dict.fromkeys(r["task"] for r in results if r["scores"]))
    figure = Figure(figsize=(1.5 + 1.1 * len(tasks), 4), layout="constrained")
    axes = figure.add_subplot()
    for i, task in enumerate(tasks):
        runs = [r for r in results if r["task"] == task and r["scores"]]
        values = [r["scores"][r["metric"]] for r in runs]
        axes.plot([i] * len(values), values, "o", alpha=0.5)
        axes.hlines(statistics.median(values), i - 0.3, i + 0.3, color="black")
    axes.set_xticks(range(len(tasks)), [f"{t}\n{next(r['metric'] for r in results if r['task'] == t)}" for t in tasks])
    axes.set_ylabel("dev score")
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(file, dpi=120)
