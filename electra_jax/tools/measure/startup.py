"""Times what a user waits for: from the command to the first step, and imports, each in a process of its own."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from electra_jax import cli
from electra_jax.config import UserError
from electra_jax.tools.measure import report

# What the training prints, in the order of a start; the name is of the time until that line.
_MARKS = (("store_s", re.compile(r"token store ")), ("built_s", re.compile(r"model .* parameters")),
          ("compiled_s", re.compile(r"compiled in ")), ("first_step_s", re.compile(r"step +\d+/")))


def time_startup(arguments: list[str], config, workdir: Path, steps: int) -> Iterator[dict]:
    """Times `python -m electra_jax.train` with the command line `arguments` until its first step is logged.

    Each of the `steps` rounds starts with an empty compilation cache ("cold") and again with what that left ("warm").
    Yields {cache, first_step_s, and on the way store_s, built_s, compiled_s}, seconds since the command, and one
    result of `imports`. The token store exists: that of `data.path` or of the workdir, else one that is made before
    (`prepare_s`). Workdirs are temporary. Raises UserError when the training ends before its first step.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        folder, tokens, prepare_s = Path(folder), Path(config.data.path or workdir / "tokens"), None
        own = [*arguments, "--config.run.log_every_steps=1"]
        if not (tokens / "manifest.json").exists():
            tokens, start = folder / "tokens", time.perf_counter()
            command = [sys.executable, "-m", "electra_jax.data.prepare", *own, f"--config.data.path={tokens}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"electra_jax.data.prepare failed: {_last_line(done.stderr)}")
            prepare_s = round(time.perf_counter() - start, 2)
        results = {"cold": [], "warm": []}
        for i in range(steps):
            for cache, found in results.items():
                found.append(_start([*own, f"--config.data.path={tokens}", f"--workdir={folder / f'{cache}-{i}'}",
                                     f"--config.run.compilation_cache={folder / f'cache-{i}'}"]))
                shutil.rmtree(folder / f"{cache}-{i}")
    about = report.about("startup", "jax", "flax", "orbax-checkpoint")
    for cache, found in results.items():
        fields = {}
        for name, _ in _MARKS:
            fields |= report.spread(name, [times[name] for times in found])
        yield {**about, "cache": cache, **fields, "prepare_s": prepare_s, "rounds": steps}
    yield {**report.about("imports", "jax", "flax", "orbax-checkpoint"), "rounds": steps, **imports(steps)}


def imports(rounds: int) -> dict[str, float]:
    """Returns the seconds that a process takes to import the training script, then all that a run imports, and exit.

    `bare_s` is an empty process, for comparison.
    """
    fields = {}
    for name, code in (("bare_s", "pass"), ("train_s", "import electra_jax.train"),
                       ("run_s", "import electra_jax.train, electra_jax.data.prepare, electra_jax.loop")):
        seconds = []
        for _ in range(rounds + 1):    # once for the page cache and compiled modules
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            seconds.append(time.perf_counter() - start)
        fields |= report.spread(name, seconds[1:])
    return fields


def _start(arguments: list[str]) -> dict[str, float]:
    """Starts a training, kills it after its first step and returns the seconds until each mark."""
    start, times = time.perf_counter(), {}
    command = [sys.executable, "-u", "-m", "electra_jax.train", *arguments]
    typed = {name: value for name, value in os.environ.items() if (name, value) not in cli.HUGE_PAGES.items()}
    with (tempfile.TemporaryFile("w+") as errors,    # it finds its huge pages itself, as after a user's command
          subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=typed) as process):
        for line in process.stdout:
            for name, pattern in _MARKS:
                if name not in times and pattern.match(line):
                    times[name] = time.perf_counter() - start
            if "first_step_s" in times:
                break
        process.kill()
        if len(times) < len(_MARKS):
            errors.seek(0)
            raise UserError(f"electra_jax.train ended before its first step: {_last_line(errors.read())}")
    return times


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
