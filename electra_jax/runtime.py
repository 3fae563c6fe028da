"""What surrounds a run: signals, the watchdog, the compilation cache, several hosts, quiet logs, safe small files."""

import contextlib
import faulthandler
import json
import logging
import math
import os
import signal
import socket
import statistics
import sys
import threading
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import jax
import numpy as np

from electra_jax.config import UserError


class StopSignal:
    """Turns SIGINT and SIGTERM into a flag that the training loop polls: `with StopSignal() as stop`.

    The first signal sets `requested` and prints a line; a second SIGINT raises KeyboardInterrupt. Python runs a
    handler only between two of its own instructions, so a signal during a compilation shows after it. The handlers
    must be set by the main thread, and after `initialize_distributed`, which sets one for SIGTERM.
    """

    def __init__(self, consequence: str = "saving a checkpoint"):
        """`consequence` is what the printed line says will happen."""
        self.requested, self._consequence = False, consequence
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *unused: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                raise KeyboardInterrupt
            return   # a scheduler may repeat its SIGTERM
        self.requested = True
        text = f"{signal.Signals(number).name}: stopping after this step, {self._consequence} (Ctrl-C again: at once)"
        # not print: the signal may have come inside a print, whose buffer must not be entered twice
        os.write(2, f"\n{text}\n".encode())


class Watchdog:
    """Ends a process that hangs: without a `beat` for max(10 x the median interval, `min_timeout_s`) seconds, unless
    `paused`.

    A stuck host hangs all others without a message, and SIGTERM is swallowed after jax.distributed.initialize. All
    stacks go to stderr, then the process exits with code 124, and the scheduler can restart it.
    """

    def __init__(self, min_timeout_s: float = 600.0, clock: Callable[[], float] = time.monotonic,
                 exit: Callable[[int], Any] = os._exit, poll_s: float = 5.0):
        self._min_timeout_s, self._clock, self._exit, self._poll_s = min_timeout_s, clock, exit, poll_s
        self._intervals_s: deque[float] = deque(maxlen=101)
        self._last_s, self._is_paused = clock(), False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._last_s = self._clock()
        self._thread.start()
        return self

    def __exit__(self, *unused: Any) -> None:
        self._stop.set()
        self._thread.join()

    def beat(self) -> None:
        """Says that a step (or a batch of an evaluation, or a save) was finished."""
        now_s = self._clock()
        self._intervals_s.append(now_s - self._last_s)
        self._last_s = now_s

    @contextlib.contextmanager
    def paused(self):
        """Does not watch while the body runs: a compilation takes as long as it takes."""
        self._is_paused = True
        try:
            yield
        finally:
            self._last_s, self._is_paused = self._clock(), False

    def timeout_s(self) -> float:
        """Returns the seconds without a beat that are too many."""
        usual_s = statistics.median(list(self._intervals_s)) if self._intervals_s else 0.0
        return max(10 * usual_s, self._min_timeout_s)

    def check(self) -> bool:
        """Ends the process if the last beat is too long ago; returns whether it was."""
        silent_s, limit_s = self._clock() - self._last_s, self.timeout_s()
        if self._is_paused or silent_s <= limit_s:
            return False
        os.write(2, f"watchdog: no step finished for {silent_s:.0f} s (limit {limit_s:.0f} s) on "
                    f"{socket.gethostname()}; stacks of all threads:\n".encode())
        faulthandler.dump_traceback(file=2, all_threads=True)
        self._exit(124)
        return True

    def _watch(self) -> None:
        before_s = self._clock()
        while not self._stop.wait(self._poll_s):
            now_s = self._clock()
            # A process that was suspended (Ctrl-Z, a laptop's lid) slept as this thread did, and does not hang.
            asleep_s = now_s - before_s - self._poll_s
            if asleep_s > 10 * self._poll_s and self._last_s < before_s:
                self._last_s += asleep_s
            before_s = now_s
            if self.check():
                return


# --- Before the first step ----------------------------------------------------------------------

def enable_compilation_cache(folder: str) -> str | None:
    """Keeps compiled programs in `folder` ("": ~/.cache/electra_jax/xla, "off": nowhere) and returns the folder used.

    A folder that cannot be written gives a note and None: the cache only saves time.
    """
    if folder == "off":
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    path = _path(folder or "~/.cache/electra_jax/xla").expanduser()
    try:
        _try_writing(path)
    except OSError as error:
        print(f"note: no compilation cache, run.compilation_cache={path!s} cannot be written "
              f"({error.strerror or error})", file=sys.stderr, flush=True)
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    return str(path)


def check_writable(workdir: str | os.PathLike) -> None:
    """Creates the run's folder and writes to it; raises UserError if that fails, also if it is a file."""
    path = _path(workdir)
    try:
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(0, "it is a file")
        _try_writing(path)
    except OSError as error:
        raise UserError(f"--workdir={os.fspath(workdir)} cannot be written ({error.strerror or error}): "
                        "give a folder that you may write to and whose disk has room.") from error


def _path(path: str | os.PathLike):
    # Here, because the benchmark of the step runs where JAX, Flax and Optax are all there is.
    from etils import epath

    return epath.Path(path)


def _try_writing(folder) -> None:
    # Permission bits do not tell: root passes them, read-only mounts and full disks do not show in them.
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".write-test-{uuid.uuid4().hex}"
    try:
        probe.write_text("x")
    finally:
        if probe.exists():
            probe.unlink()


def write_json_atomic(path: str | os.PathLike, obj: Any) -> None:
    """Writes `obj` as JSON so that a reader, or a kill, meets either the old file or the new one; NaN is an error."""
    path = _path(path)
    text = json.dumps(obj, indent=2, sort_keys=True, allow_nan=False) + "\n"
    if "://" in os.fspath(path):   # objects appear complete or not at all
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())   # else a power cut can leave the new name with no contents
        partial.replace(path)
    finally:
        if partial.exists():
            partial.unlink()


def quiet_logging() -> None:
    """Keeps what libraries tell their developers off the terminal; warnings of Python code and all errors stay."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    for name in ("jax", "orbax", "flax", "etils", "grain"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)   # "TPU not found" on each other machine
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")                  # XLA's C++ lines; before the backend starts
    warnings.filterwarnings("ignore", message="Sharding info not provided when restoring")
    warnings.filterwarnings("ignore", message="Some donated buffers were not usable")


def quiet_orbax() -> None:
    """Hides what Orbax tells about a failure besides raising it: checkpoint.py tells each in one line.

    That is log records with tracebacks, "Event loop is closed" from writes that outlive their event loop, and
    coroutines that are dropped half way. Verbose logging (absl at INFO) shows the records.
    """
    logging.getLogger("absl").addFilter(_is_not_orbax)   # adding it twice adds it once
    logging.getLogger("asyncio").addFilter(_is_retrieved)
    warnings.filterwarnings("ignore", message="coroutine '_read_array_index_and_device_put' was never awaited")
    previous = sys.unraisablehook
    if getattr(previous, "hides_orbax", False):
        return

    def hook(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        of_orbax = code is not None and _is_orbax_file(code.co_filename)
        if not of_orbax and str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    hook.hides_orbax = True
    sys.unraisablehook = hook


def _is_orbax_file(path: str) -> bool:
    return f"{os.sep}orbax{os.sep}" in path


def _is_not_orbax(record: logging.LogRecord) -> bool:
    return not _is_orbax_file(record.pathname) or logging.getLogger("absl").getEffectiveLevel() <= logging.INFO


def _is_retrieved(record: logging.LogRecord) -> bool:
    # Of the arrays of a failed save the first error is raised; asyncio traces the others.
    return "exception was never retrieved" not in record.getMessage()


# --- Several hosts ------------------------------------------------------------------------------

def _several_hosts(environment: dict[str, str]) -> bool:
    """Says whether the environment shows a job of several processes that should find each other."""
    if environment.get("JAX_COORDINATOR_ADDRESS"):
        return True
    if _number("SLURM_STEP_NUM_TASKS", environment) > 1:   # not SLURM_NTASKS: a shell of `salloc` has it too
        return True
    return len([h for h in (environment.get("TPU_WORKER_HOSTNAMES") or "").split(",") if h]) > 1


def _number(name: str, environment: Mapping[str, str] = os.environ) -> int:
    value = environment.get(name) or "1"
    if not value.isdecimal():
        raise UserError(f"{name}={value} in the environment is not a whole number: set it to one, or unset it.")
    return int(value)


def initialize_distributed(initialization_timeout_s: float = 300.0) -> bool:
    """Joins the other hosts if the environment shows any, and returns whether it did; nothing on a plain machine.

    Call it before anything else of JAX. Looks for JAX_COORDINATOR_ADDRESS (with JAX_NUM_PROCESSES and JAX_PROCESS_ID),
    a SLURM step of several tasks, and the worker list of a TPU pod. Raises UserError if the others do not come.
    """
    if not _several_hosts(dict(os.environ)):
        return False
    wanted = {}
    if "JAX_COORDINATOR_ADDRESS" in os.environ:   # which JAX reads itself, but not the other two
        names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
        wanted = {key: _number(name) for key, name in names.items() if os.environ.get(name)}
    try:
        jax.distributed.initialize(**wanted, initialization_timeout=math.ceil(initialization_timeout_s))
    except Exception as error:
        why = (str(error).splitlines() or [""])[0]
        raise UserError(f"joining the other hosts failed ({why}): start the same command on every host within "
                        f"{initialization_timeout_s:.0f} s.") from error
    return True


def any_host(flag: bool) -> bool:
    """Says whether the flag is set on any host; all must ask at the same point, and each waits for its devices."""
    return flag if jax.process_count() == 1 else bool(_of_all_hosts(flag).any())


def _of_all_hosts(values) -> np.ndarray:
    """Each host's values, [hosts, ...]."""
    from jax.experimental import multihost_utils  # slow to import, for several hosts only

    return np.asarray(multihost_utils.process_allgather(np.asarray(values)))


class Agreement:
    """Flags on which all hosts act alike at the same step, though signals and clocks reach each at its own time.

    Hosts that decide for themselves take different numbers of steps, and then wait for each other for ever.
    """

    def __init__(self, every_s: float = 5.0, clock: Callable[[], float] = time.monotonic):
        """`every_s`: seconds between two exchanges, for each makes the host wait for all steps under way."""
        self._every_s, self._clock = every_s, clock
        self._next_step, self._last = 0, None

    def ask(self, step: int, *flags: bool) -> list[bool]:
        """Returns which flags are set on any host, all False where no exchange is due; all hosts ask at each step."""
        if jax.process_count() == 1:
            return list(flags)
        if step < self._next_step:
            return [False] * len(flags)
        now_s, ahead = self._clock(), 1
        if self._last is not None:
            last_step, last_s = self._last
            step_s = max(1e-6, now_s - last_s) / (step - last_step)
            ahead = min(10_000, max(1, int(self._every_s / step_s)))
        self._last = step, now_s
        said = _of_all_hosts([*flags, ahead])
        self._next_step = step + int(said[0, -1])    # the first host's, for their clocks differ
        return [bool(flag) for flag in said[:, :-1].any(0)]
