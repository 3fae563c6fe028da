"""Worker processes that import nothing but the function they run.

`multiprocessing` with "spawn" imports the parent's main module in every worker: started from the training
script that is jax, seconds and hundreds of MB each, and a script without a main guard runs twice. "fork" is
unsafe once jax has threads. So workers are plain `python -c` processes that talk pickle over their pipes;
they end by themselves when the parent dies, because their standard input closes.
"""

import contextlib
import importlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path

from electra_jax.config import UserError


class WorkerPool:
    """Processes that apply one function to many jobs, results in the order of the jobs.

    `target` is "module:function"; each worker calls `function(setup)` once and the callable it returns for
    every job. Jobs, results and `setup` must pickle. Use as a context manager.
    """

    def __init__(self, target: str, setup, num_workers: int = 0):
        self.num_workers = num_workers or usable_cores()
        self._jobs = queue.Queue()
        env = dict(os.environ)
        package_root = str(Path(__file__).resolve().parents[2])
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, env.get("PYTHONPATH", "")]))
        # One thread a worker is the parallelism we want; the tokenizers library would start one a core.
        env.update(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
        command = [sys.executable, "-c", "from electra_jax.data.workers import serve; serve()"]
        self._processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
                           for _ in range(self.num_workers)]
        self._threads = [threading.Thread(target=self._feed, args=(process, (target, setup)), daemon=True)
                         for process in self._processes]
        for thread in self._threads:
            thread.start()

    def map(self, jobs: Iterable) -> Iterator:
        """Yields one result a job, in order, with at most two jobs a worker under way.

        Raises what the function raised, or RuntimeError when a worker died.
        """
        pending = deque()
        for job in jobs:
            pending.append(self._submit(job))
            while len(pending) > 2 * self.num_workers or (pending and pending[0].done()):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def close(self) -> None:
        """Stops the workers, also in the middle of a job."""
        for _ in self._threads:
            self._jobs.put(None)
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for thread in self._threads:
            thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _submit(self, job) -> Future:
        future = Future()
        self._jobs.put((job, future))
        return future

    def _feed(self, process, setup) -> None:
        """Runs in one thread a worker: hands it jobs and waits for its answers."""
        started = False
        # Closing the pipe flushes it, which fails when the worker is gone: that has been reported by then.
        with contextlib.suppress(BrokenPipeError), process.stdin, process.stdout:
            while (item := self._jobs.get()) is not None:
                job, future = item
                try:
                    if not started:
                        _send(process.stdin, setup)
                        started = True
                    _send(process.stdin, job)
                    error, result = pickle.load(process.stdout)
                except (OSError, EOFError, pickle.UnpicklingError):
                    code = process.wait()
                    future.set_exception(RuntimeError(f"a worker process died (exit code {code}); out of memory?"))
                    continue
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)


def usable_cores() -> int:
    """Cores this process may run on, which in a container are often fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def serve() -> None:
    """Runs in the worker process: answers jobs until standard input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C reaches the whole group; the parent decides
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)                                   # a library that prints must not break the frames
    try:
        target, setup = pickle.load(sys.stdin.buffer)
        function = _guarded(_make, (target, setup))
        while True:
            job = pickle.load(sys.stdin.buffer)
            error, made = function
            _send(replies, function if error else _guarded(made, job))
    except (EOFError, BrokenPipeError):
        return


def _make(target_and_setup):
    target, setup = target_and_setup
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)(setup)


def _guarded(function, argument) -> tuple:
    """Returns (error or None, result); a traceback goes along as text, as exceptions of libraries may not pickle."""
    try:
        return None, function(argument)
    except UserError as error:
        return error, None
    except Exception:
        return RuntimeError("in a worker process:\n" + traceback.format_exc()), None


def _send(pipe, value) -> None:
    pickle.dump(value, pipe, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.flush()
