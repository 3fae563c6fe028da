"""Promises: signals become a flag, a hang ends with stacks, folders are checked before the work starts."""

import copy
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from electra_jax import runtime
from electra_jax.config import UserError
from electra_jax.runtime import StopSignal, Watchdog

ROOT = pathlib.Path(__file__).parents[1]


def start_child(code, *args, **env):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], text=True, cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | env)


# --- Signals ------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_flag_and_a_line(number, capfd):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGTERM)   # repeated by schedulers
    assert signal.getsignal(number) is before
    told = capfd.readouterr().err.strip().splitlines()
    assert len(told) == 1 and number.name in told[0] and "saving" in told[0]


def test_a_second_ctrl_c_stops_at_once():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        assert stop.requested


_COMPILING = """
import jax, jax.numpy as jnp, time
from electra_jax.runtime import StopSignal
def slow(x):
    for i in range(100):
        x = jnp.sin(x @ x) + i
    return x
with StopSignal() as stop:
    lowered = jax.jit(slow).lower(jnp.ones((8, 8)))
    print("compiling", flush=True)
    start = time.time()
    while time.time() < start + 1.0:
        compiled = lowered.compile()
    compiled(jnp.ones((8, 8))).block_until_ready()
    assert stop.requested
print("saved", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_compilation_is_kept_for_the_loop(number):
    child = start_child(_COMPILING)
    assert child.stdout.readline() == "compiling\n"
    time.sleep(0.3)
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (0, "saved\n"), err


# --- Watchdog -----------------------------------------------------------------------------------

def test_the_watchdog_waits_ten_medians_but_at_least_its_minimum(capfd):
    now, exits = 0.0, []
    watchdog = Watchdog(min_timeout_s=60, clock=lambda: now, exit=exits.append)
    now = 60.0
    assert not watchdog.check()
    now = 60.1
    assert watchdog.check() and exits == [124]
    for interval in (20.0, 20.0, 20.0, 20.0, 500.0):
        now += interval
        watchdog.beat()
    assert watchdog.timeout_s() == 200.0
    now += 199
    assert not watchdog.check()
    now += 2
    assert watchdog.check() and exits == [124, 124]
    err = capfd.readouterr().err
    assert "no step finished for 201 s" in err and "test_the_watchdog_waits" in err


def test_the_watchdog_thread_ends_a_hanging_process_with_124():
    code = ("import threading\nfrom electra_jax.runtime import Watchdog\n"
            "def the_place_that_hangs():\n    threading.Event().wait()\n"
            "with Watchdog(min_timeout_s=0.3, poll_s=0.05):\n    the_place_that_hangs()")
    child = start_child(code)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 124 and "the_place_that_hangs" in err


def test_the_watchdog_does_not_take_a_suspended_process_for_a_hanging_one():
    code = ("import time\nfrom electra_jax.runtime import Watchdog\n"
            "with Watchdog(min_timeout_s=1.0, poll_s=0.05):\n    print('started', flush=True)\n    time.sleep(0.6)")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"started\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        process.send_signal(signal.SIGCONT)
        assert process.wait(30) == 0, process.stderr.read()


def test_the_watchdog_leaves_a_living_process_alone_and_stops_with_it():
    exits = []
    with Watchdog(min_timeout_s=0.5, poll_s=0.02, exit=exits.append) as watchdog:
        for _ in range(40):
            time.sleep(0.02)
            watchdog.beat()
    assert not exits and not [t for t in threading.enumerate() if t.name == "watchdog"]


def test_the_watchdog_does_not_count_the_time_of_a_pause():
    now, exits = 0.0, []
    watchdog = Watchdog(min_timeout_s=60, clock=lambda: now, exit=exits.append)
    with watchdog.paused():
        now = 1000.0
        assert not watchdog.check()
    now += 60
    assert not watchdog.check()
    now += 1
    assert watchdog.check() and exits == [124]


# --- Folders and files --------------------------------------------------------------------------

def test_a_workdir_is_made_and_left_clean(tmp_path):
    runtime.check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize(("where", "why"), [("file", "it is a file"), ("file/below", "Not a directory"),
                                            ("/proc/nowhere", "No such file")])
def test_an_impossible_workdir_is_told_in_one_line(tmp_path, where, why):
    (tmp_path / "file").write_text("x")
    path = tmp_path / where
    with pytest.raises(UserError) as refused:
        runtime.check_writable(path)
    text = str(refused.value)
    assert "\n" not in text and f"--workdir={path} " in text and why in text and "give a folder" in text
    assert (tmp_path / "file").read_text() == "x"


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "x.json"
    runtime.write_json_atomic(path, {"a": 1})
    for bad in ({"a": object()}, {"a": float("nan")}):
        with pytest.raises((TypeError, ValueError)):
            runtime.write_json_atomic(path, bad)
    assert json.loads(path.read_text()) == {"a": 1}
    runtime.write_json_atomic(path, {"a": 2})
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        runtime.write_json_atomic(tmp_path / "folder", {})
    assert not list(tmp_path.glob("*tmp*"))
    assert json.loads(path.read_text()) == {"a": 2} and [p.name for p in path.parent.iterdir()] == ["x.json"]


# --- Compilation cache --------------------------------------------------------------------------

@pytest.fixture
def cache_config():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_the_compilation_cache_goes_home_by_default_and_can_be_off(tmp_path, monkeypatch, cache_config, capfd):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = str(tmp_path / ".cache" / "electra_jax" / "xla")
    assert runtime.enable_compilation_cache("") == folder == jax.config.jax_compilation_cache_dir
    assert os.path.isdir(folder)
    assert runtime.enable_compilation_cache("off") is None and jax.config.jax_compilation_cache_dir is None
    assert runtime.enable_compilation_cache(str(tmp_path / "own")) == str(tmp_path / "own")
    assert capfd.readouterr() == ("", "")


def test_an_unwritable_compilation_cache_is_only_a_note(tmp_path, cache_config, capfd):
    (tmp_path / "file").write_text("x")
    assert runtime.enable_compilation_cache(str(tmp_path / "file")) is None
    assert jax.config.jax_compilation_cache_dir is None
    (line,) = capfd.readouterr().err.splitlines()
    assert "run.compilation_cache" in line and str(tmp_path / "file") in line


_CACHED = """
import sys, jax, jax.numpy as jnp
from electra_jax.runtime import enable_compilation_cache
enable_compilation_cache(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
hits = []
jax.monitoring.register_event_listener(lambda name, **kw: hits.append(name) if name.endswith("/cache_hits") else None)
jax.jit(lambda x: jnp.sin(x @ x) * 3)(jnp.ones((64, 64))).block_until_ready()
print(len(hits) > 0)
"""


def test_the_second_process_finds_compiled_programs(tmp_path):
    results = []
    for _ in range(2):
        out, err = start_child(_CACHED, tmp_path).communicate(timeout=60)
        results.append(out.strip())
        assert out, err
    assert results == ["False", "True"]


# --- Several hosts ------------------------------------------------------------------------------

def test_a_plain_machine_is_not_asked_for_other_hosts(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "SLURM_NTASKS", "SLURM_PROCID", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    assert runtime.initialize_distributed() is False and not jax.distributed.is_initialized()


@pytest.mark.parametrize(("environment", "wanted"), [
    ({}, False), ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True), ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, True), ({"SLURM_NTASKS": "8"}, False),
    ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, False),
    ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}, True)])
def test_only_an_evident_job_of_several_processes_counts(environment, wanted):
    assert runtime._several_hosts(environment) is wanted


_JOINING = """
from electra_jax.runtime import initialize_distributed
from electra_jax.config import UserError
try:
    joined = initialize_distributed(initialization_timeout_s=20)
except UserError as error:
    raise SystemExit(f"refused: {error}")
import jax
print(joined, jax.process_index(), jax.process_count())
"""


def test_two_processes_find_each_other():
    import socket
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    children = [start_child(_JOINING, JAX_PROCESS_ID=str(i), **env) for i in range(2)]
    results = [child.communicate(timeout=60) for child in children]
    assert [out for out, _ in results] == ["True 0 2\n", "True 1 2\n"], results


def test_a_number_of_processes_that_is_none_is_refused():
    child = start_child(_JOINING, JAX_COORDINATOR_ADDRESS="127.0.0.1:1", JAX_NUM_PROCESSES="two")
    _, err = child.communicate(timeout=60)
    assert err == ("refused: JAX_NUM_PROCESSES=two in the environment is not a whole number: set it to one, or unset "
                   "it.\n")


def test_hosts_exchange_flags_every_few_seconds_at_the_same_steps(monkeypatch):
    """Two hosts whose clocks differ, step by step; the first takes 2 s a step."""
    clocks, asked = [0.0, 0.0], []
    hosts = [runtime.Agreement(every_s=10, clock=lambda i=i: clocks[i]) for i in range(2)]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    answers = [[], []]
    for step in range(1, 30):
        clocks[0], clocks[1] = clocks[0] + 2.0, clocks[1] + 3.0
        # What each would send is collected first: the exchange needs all of them.
        sent = []
        monkeypatch.setattr(multihost_utils, "process_allgather", lambda x, sent=sent: sent.append(x) or [x])
        copies = [copy.copy(host) for host in hosts]
        for i, host in enumerate(copies):
            host.ask(step, i == 1 and step >= 9, False)
        monkeypatch.setattr(multihost_utils, "process_allgather", lambda x, sent=sent: np.stack(sent))
        asked += [step] if sent else []
        assert len(sent) in (0, 2)
        for i, host in enumerate(hosts):
            answers[i].append(host.ask(step, i == 1 and step >= 9, False))
    assert asked == [1, 2, 7, 12, 17, 22, 27]
    assert answers[0] == answers[1]
    assert [step for step, (stop, due) in enumerate(answers[0], 1) if stop] == [12, 17, 22, 27]
    assert not any(due for _, due in answers[0])


def test_a_single_host_agrees_with_itself_at_every_step():
    agreement = runtime.Agreement(every_s=1000)
    assert [agreement.ask(step, step == 2, True) for step in (1, 2, 3)] == [[False, True], [True, True], [False, True]]
    assert runtime.any_host(True) and not runtime.any_host(False)


# --- Logs ---------------------------------------------------------------------------------------

def test_library_chatter_is_silent_and_errors_are_not():
    code = ("from electra_jax.runtime import quiet_logging; quiet_logging()\n"
            "import logging, absl.logging, jax\n"
            "absl.logging.info('chatter'); absl.logging.warning('chatter')\n"
            "logging.getLogger('jax').info('chatter'); jax.devices()\n"
            "absl.logging.error('real trouble'); logging.getLogger('jax').error('more trouble')")
    out, err = start_child(code).communicate(timeout=60)
    assert out == "" and "chatter" not in err and "real trouble" in err and "more trouble" in err
    assert logging.getLogger().level <= logging.WARNING   # nothing of the user's own
