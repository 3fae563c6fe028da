"""Promises: nothing is lost, damage is found, another run's checkpoint is refused, parameters load anywhere."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from electra_jax import checkpoint, runtime
from electra_jax.checkpoint import Checkpointer, load_params
from electra_jax.config import UserError

META = {"manifest_hash": "m1", "tokenizer": "t1", "config": {"model": {"hidden_size": 64}}}
FILES = {"vocab.txt": b"[PAD]\n\xff\x00\n"}
SHAPES = {"embeddings": (64, 8), "generator": (32, 32), "discriminator": (128, 64)}


def make_state(step, mesh_shape=(1, 1), shapes=None):
    """A state with every dtype we save, a function of the step alone."""
    rng = np.random.default_rng(step)
    devices = np.array(jax.devices()[:int(np.prod(mesh_shape))]).reshape(mesh_shape)
    mesh = Mesh(devices, ("data", "fsdp"))
    params = {part: {"dense": {"kernel": rng.standard_normal(shape, dtype=np.float32),
                               "bias": rng.standard_normal(shape[1], dtype=np.float32)}}
              for part, shape in (shapes or SHAPES).items()}
    opt_state = {"count": np.int32(step), "mu": jax.tree.map(lambda x: x * 3, params),
                 "half": rng.standard_normal((8, 4)).astype(jnp.bfloat16), "empty": {},
                 "bits": rng.integers(2**32, size=16, dtype=np.uint32)}
    state = {"step": np.int32(step), "params": params, "opt_state": opt_state}
    return jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, P("fsdp") if np.ndim(x) == 2 else P())), state)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for path, leaf in jax.tree_util.tree_leaves_with_path(want):
        other = got
        for key in path:
            other = other[key.key]
        assert other.dtype == leaf.dtype and other.shape == leaf.shape, path
        assert np.asarray(other).tobytes() == np.asarray(leaf).tobytes(), path


def opened(folder, **changes):
    return Checkpointer(folder, **({"keep": 3, "every_steps": 10, "every_minutes": 0} | changes))


def saved(folder, steps=(10, 20), **kwargs):
    """Saves these steps and returns the last state."""
    checkpointer = opened(folder)
    for step in steps:
        state = make_state(step, **kwargs)
        assert checkpointer.save(state, META, FILES)
    assert checkpointer.close()
    return state


def files_of(folder, pattern="**/*"):
    return sorted(p for p in pathlib.Path(folder).glob(pattern) if p.is_file())


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {"flip": flip, "truncate": lambda p: p.write_bytes(p.read_bytes()[:len(p.read_bytes()) // 2]),
          "empty": lambda p: p.write_bytes(b""), "delete": lambda p: p.unlink()}


def damage_arrays(step_folder):
    """Flips a byte in each file that holds arrays."""
    for path in files_of(step_folder, "state/**/d/*"):
        flip(path)


def run_child(code, *args, **kwargs):
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True,
                          timeout=120, check=False, **kwargs)


# --- Round trips --------------------------------------------------------------------------------

@pytest.mark.parametrize("saved_on", [(2, 2), (1, 1)])
@pytest.mark.parametrize("restored_on", [(1, 1), (1, 4), (4, 1), (2, 2)])
def test_state_comes_back_bit_for_bit_on_any_mesh(tmp_path, saved_on, restored_on):
    state = saved(tmp_path, [10], mesh_shape=saved_on)
    target = abstract(make_state(0, restored_on))
    restored, _ = opened(tmp_path).restore(target)
    assert_same(restored, state)
    kernel = restored["params"]["discriminator"]["dense"]["kernel"]
    assert kernel.sharding == target["params"]["discriminator"]["dense"]["kernel"].sharding


def test_meta_comes_back_with_versions(tmp_path):
    state = saved(tmp_path, [10])
    _, meta = opened(tmp_path).restore(abstract(state))
    assert meta.items() >= META.items()
    assert meta["versions"]["jax"] == jax.__version__ and meta["versions"]["orbax-checkpoint"]


def test_nothing_there_is_none_and_a_relative_folder_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpointer = opened("here")
    assert checkpointer.restore(abstract(make_state(0))) is None and checkpointer.latest_step() is None
    assert checkpointer.save(make_state(10), META) and checkpointer.wait()
    monkeypatch.chdir("/")
    assert checkpointer.latest_step() == 10 and (tmp_path / "here" / "10").is_dir()


def test_donating_right_after_save_is_safe(tmp_path):
    state = make_state(10, shapes={"embeddings": (2000, 1000), "discriminator": (2000, 1000)})
    state = jax.jit(lambda s: jax.tree.map(jnp.copy, s))(state)   # what came from numpy cannot be donated
    want = jax.tree.map(np.array, state)
    target, checkpointer = abstract(state), opened(tmp_path)
    checkpointer.save(state, META)
    after = jax.jit(lambda s: jax.tree.map(lambda x: x + x, s), donate_argnums=0)(state)
    jax.block_until_ready(after)
    restored, _ = checkpointer.restore(target)
    assert_same(restored, want)


def test_the_newest_are_kept(tmp_path):
    saved(tmp_path, [10, 20, 30, 40, 50])
    assert checkpoint._steps(checkpoint._absolute(tmp_path)) == [30, 40, 50]


def test_a_step_is_not_written_twice_unless_forced(tmp_path):
    saved(tmp_path, [10])
    checkpointer = opened(tmp_path)
    other = make_state(10) | {"params": make_state(11)["params"]}
    assert not checkpointer.save(other, META)
    assert_same(checkpointer.restore(abstract(other))[0], make_state(10))
    assert checkpointer.save(other, META, force=True)
    assert_same(checkpointer.restore(abstract(other))[0], other)


def test_a_kill_while_a_step_is_replaced_loses_nothing(tmp_path):
    saved(tmp_path, [10])
    (tmp_path / "10").rename(tmp_path / "replaced-10")   # what a kill before the commit leaves
    checkpointer = opened(tmp_path)
    assert checkpointer.latest_step() == 10 and checkpointer._manager.all_steps() == [10]
    assert_same(checkpointer.restore(abstract(make_state(0)))[0], make_state(10))
    other = make_state(10) | {"params": make_state(11)["params"]}
    checkpointer.save(other, META, force=True)
    assert (tmp_path / "replaced-10").is_dir() or (tmp_path / "10").is_dir()
    assert checkpointer.wait() and [p.name for p in tmp_path.iterdir()] == ["10"]
    shutil.copytree(tmp_path / "10", tmp_path / "replaced-10")   # a kill after the commit
    assert_same(opened(tmp_path).restore(abstract(make_state(0)))[0], other)
    assert [p.name for p in tmp_path.iterdir()] == ["10"]


# --- When to save -------------------------------------------------------------------------------

def test_saves_are_due_by_steps_and_by_minutes_since_the_last(tmp_path):
    now = 1000.0
    checkpointer = opened(tmp_path, every_steps=10, every_minutes=2, clock=lambda: now)
    assert [s for s in range(1, 31) if checkpointer.is_due(s)] == [10, 20, 30]
    now += 119
    assert not checkpointer.is_overdue()
    now += 1
    assert checkpointer.is_overdue()
    checkpointer.save(make_state(31), META)
    assert not checkpointer.is_overdue()
    now += 120
    assert checkpointer.is_overdue()


def test_zero_switches_a_policy_off(tmp_path):
    now = 0.0
    by_steps = opened(tmp_path, every_steps=10, every_minutes=0, clock=lambda: now)
    by_time = opened(tmp_path, every_steps=0, every_minutes=1, clock=lambda: now)
    assert by_steps.is_due(10) and not by_time.is_due(10)
    now = 1e6
    assert not by_steps.is_overdue() and by_time.is_overdue()


# --- Damage -------------------------------------------------------------------------------------

def test_any_damage_to_any_file_leads_to_a_good_state_and_the_next_save_works(tmp_path, capfd):
    saved(tmp_path / "good")
    kinds = {}   # one file of each folder and name, the largest where the name is random
    for path in sorted(files_of(tmp_path / "good" / "20"), key=lambda p: p.stat().st_size):
        name = path.relative_to(tmp_path / "good")
        kinds[name.parent if name.parent.name == "d" else name] = name
    names = list(kinds.values())
    assert len(names) > 12
    fell_back = set()
    for name in names:
        for kind, damage in DAMAGE.items():
            folder = tmp_path / "case"
            shutil.copytree(tmp_path / "good", folder)
            damage(folder / name)
            checkpointer = opened(folder)
            state, _ = checkpointer.restore(abstract(make_state(0)), META)
            step = int(state["step"])
            assert_same(state, make_state(step))
            assert step in (10, 20), (name, kind)
            if step == 10:
                fell_back.add((name.parts[1], kind))
                assert not (folder / "20").exists()
                assert checkpointer.save(make_state(20), META) and checkpointer.wait(), (name, kind)
                assert checkpointer.latest_step() == 20 and 20 in checkpointer._manager.all_steps()
            checkpointer.close()
            shutil.rmtree(folder)
    assert fell_back >= {(item, kind) for item in ("state", "index", "meta", "tokenizer") for kind in DAMAGE}
    told = capfd.readouterr().err.splitlines()
    assert told and all(line.startswith("warning: checkpoint ") for line in told)


def test_a_flipped_byte_in_an_array_is_noticed_and_the_step_renamed(tmp_path, capfd):
    saved(tmp_path)
    damage_arrays(tmp_path / "20")
    state, _ = opened(tmp_path).restore(abstract(make_state(0)))
    assert_same(state, make_state(10))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "damaged-20"]
    (line,) = capfd.readouterr().err.splitlines()
    assert "20 is damaged" in line and "damaged-20" in line


def test_a_second_damaged_step_of_the_same_number_does_not_stop_the_run(tmp_path):
    for _ in range(2):
        saved(tmp_path, [20])
        damage_arrays(tmp_path / "20")
        assert opened(tmp_path).restore(abstract(make_state(0))) is None
    assert len(list(tmp_path.glob("damaged-20*"))) == 2


def test_trouble_of_the_machine_costs_no_checkpoint(tmp_path):
    for error in (PermissionError(13, "no"), MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: out of memory")):
        assert not checkpoint._is_damage(error)
    assert checkpoint._is_damage(ValueError("OUT_OF_RANGE: Error reading")) and checkpoint._is_damage(OSError(5, "x"))


_KILLED = """
import sys, jax
sys.path.insert(0, sys.argv[2])
from tests.test_checkpoint import *
shapes = {"embeddings": (1000, 500), "discriminator": (2000, 500)}
checkpointer = opened(sys.argv[1], keep=2)
found = checkpointer.restore(abstract(make_state(0, shapes=shapes)), META)
step = 0
if found:
    step = int(found[0]["step"])
    assert_same(found[0], make_state(step, shapes=shapes))
print("restored", step, flush=True)
while True:
    step += 1
    print("save", step, flush=True)
    checkpointer.save(make_state(step, shapes=shapes), META, FILES)
"""


def test_kill_9_at_any_moment_leaves_a_loadable_newest_step(tmp_path):
    root, rng = pathlib.Path(__file__).parents[1], random.Random(0)
    restored = []
    for trial in range(5):
        child = subprocess.Popen([sys.executable, "-c", _KILLED, str(tmp_path / "c"), str(root)], text=True, cwd=root,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        lines = [child.stdout.readline()]
        assert lines[0].startswith("restored"), child.stderr.read()
        restored.append(int(lines[0].split()[1]))
        while not lines[-1].startswith("save"):
            lines.append(child.stdout.readline())
        time.sleep(rng.uniform(0.02, 0.8) + 0.2 * (trial == 0))
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert "damaged" not in child.stderr.read()
        child.stdout.close()
        child.stderr.close()
    assert restored[-1] > 0 and restored == sorted(restored)
    leftovers = [p.name for p in (tmp_path / "c").iterdir() if "tmp" in p.name]
    checkpointer = opened(tmp_path / "c")
    assert checkpointer.save(make_state(10_000), META) and checkpointer.wait()
    assert not [p for p in (tmp_path / "c").iterdir() if "tmp" in p.name], leftovers


_DISK_FULL = """
import sys, resource, signal
sys.path.insert(0, sys.argv[2])
from tests.test_checkpoint import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpointer = opened(sys.argv[1])
shapes = {"embeddings": (500, 200)}
make = lambda step: make_state(step, shapes=shapes)
assert checkpointer.save(make(10), META) and checkpointer.wait()
for step in (20, 10):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    checkpointer.save(make(step), META, force=True)
    assert not checkpointer.wait()
    assert checkpointer.latest_step() == 10
    assert_same(checkpointer.restore(abstract(make(0)), META)[0], make(10))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert checkpointer.save(make(40), META) and checkpointer.wait() and checkpointer.latest_step() == 40
assert checkpointer.save(make(30), META) and checkpointer.wait()
assert_same(checkpointer.restore(abstract(make(0)), META)[0], make(40))
assert checkpointer.close()
"""


def test_a_full_disk_is_a_warning_and_the_next_save_works(tmp_path):
    root = pathlib.Path(__file__).parents[1]
    child = run_child(_DISK_FULL, tmp_path / "c", root, cwd=root)
    assert child.returncode == 0, child.stderr
    lines = child.stderr.splitlines()
    assert len(lines) == 2 and all("was not written" in line for line in lines), child.stderr
    assert "2 in a row" in lines[1]


def test_a_step_that_vanishes_before_it_is_committed_can_be_saved_again(tmp_path, capfd):
    checkpointer = opened(tmp_path)
    assert checkpointer.save(make_state(10), META)
    checkpointer._manager.wait_until_finished()
    shutil.rmtree(tmp_path / "10")
    assert not checkpointer.wait() and "10 was not written" in capfd.readouterr().err
    assert checkpointer.save(make_state(10), META) and checkpointer.wait()


def test_only_known_noise_of_orbax_is_hidden(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    runtime.quiet_orbax()
    for text in ("Event loop is closed", "real trouble"):
        sys.unraisablehook(types.SimpleNamespace(object=None, exc_value=RuntimeError(text)))
    assert [str(u.exc_value) for u in seen] == ["real trouble"]


# --- Refusals -----------------------------------------------------------------------------------

def change(leaf, **new):
    return jax.ShapeDtypeStruct(new.get("shape", leaf.shape), new.get("dtype", leaf.dtype), sharding=leaf.sharding)


def other_shape(target):
    kernel = target["params"]["embeddings"]["dense"]
    kernel["kernel"] = change(kernel["kernel"], shape=(32, 8))


def other_dtype(target):
    kernel = target["params"]["embeddings"]["dense"]
    kernel["kernel"] = change(kernel["kernel"], dtype=jnp.bfloat16)


def missing_leaf(target):
    target["params"]["embeddings"]["new"] = target["step"]


def extra_leaf(target):
    del target["opt_state"]["bits"]


@pytest.mark.parametrize(("field", "values"), [("tokenizer", ("t2", "t1")), ("manifest_hash", ("m2", "m1"))])
def test_another_tokenizer_or_manifest_is_refused_in_one_line(tmp_path, field, values):
    state = saved(tmp_path)
    with pytest.raises(UserError) as refused:
        opened(tmp_path).restore(abstract(state), META | {field: values[0]})
    text = str(refused.value)
    assert "\n" not in text and field in text and all(v in text for v in (*values, "--workdir", "run.init_from"))
    assert opened(tmp_path).restore(abstract(state), META) and not list(tmp_path.glob("damaged*"))


@pytest.mark.parametrize(("edit", "words"), [
    (other_shape, ("shape of params/embeddings/dense/kernel", "[32, 8]", "[64, 8]", "model.hidden_size=32, was 64")),
    (other_dtype, ("dtype of params/embeddings/dense/kernel", "bfloat16", "float32")),
    (missing_leaf, ("params/embeddings/new", "missing")), (extra_leaf, ("opt_state/bits", "unknown"))])
def test_another_model_is_refused_in_one_line(tmp_path, edit, words):
    target = abstract(saved(tmp_path))
    edit(target)
    with pytest.raises(UserError) as refused:
        opened(tmp_path).restore(target, META | {"config": {"model": {"hidden_size": 32}}})
    text = str(refused.value)
    assert "\n" not in text and all(word in text for word in (*words, "--workdir"))
    assert not list(tmp_path.glob("damaged*"))


# --- Parameters only ----------------------------------------------------------------------------

def as_numpy(tree):
    return jax.tree.map(np.asarray, tree)


@pytest.mark.parametrize("where", [".", "checkpoints", "checkpoints/20"])
def test_parameters_load_from_a_run_its_checkpoints_or_a_step(tmp_path, where):
    params = as_numpy(saved(tmp_path / "checkpoints")["params"])
    got, meta, files = load_params(tmp_path / where)
    assert_same(got, {part: params[part] for part in ("embeddings", "discriminator")})
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(got))
    assert files == FILES and meta["tokenizer"] == "t1"
    assert_same(load_params(tmp_path / where, ["generator"])[0], {"generator": params["generator"]})


def test_parameters_load_without_reading_the_optimizer(tmp_path, capfd):
    # only the moments are large, so the middle of a large file is theirs
    state = make_state(10)
    state["opt_state"]["mu"] = make_state(11, shapes={"discriminator": (2000, 1000)})["params"]
    checkpointer = opened(tmp_path)
    assert checkpointer.save(state, META) and checkpointer.close()
    large = [p for p in files_of(tmp_path / "10" / "state") if p.stat().st_size > 1e6]
    for path in large:
        flip(path)
    assert large
    assert_same(load_params(tmp_path, ["embeddings"])[0]["embeddings"], as_numpy(state["params"]["embeddings"]))
    assert opened(tmp_path).restore(abstract(state)) is None


def test_parameters_fall_back_to_an_older_step_and_nothing_is_renamed(tmp_path, capfd):
    checkpointer, params = opened(tmp_path), {}
    for step in (10, 20):   # hardly anything but the embeddings, so the middle of the largest file is theirs
        state = make_state(step, shapes={"embeddings": (1000, 200)})
        params[step] = as_numpy(state["params"])
        assert checkpointer.save(state | {"opt_state": {}}, META)
    checkpointer.close()
    flip(max(files_of(tmp_path / "20" / "state"), key=lambda p: p.stat().st_size))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert_same(load_params(tmp_path, ["embeddings"])[0], params[10])
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    (line,) = capfd.readouterr().err.splitlines()
    assert "20 is damaged" in line and "CRC of params/embeddings/dense/kernel" in line
    with pytest.raises(UserError, match="damaged"):
        load_params(tmp_path / "20", ["embeddings"])


def test_missing_checkpoints_and_parts_are_told_in_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"no checkpoint found in .*--workdir"):
            load_params(path)
    assert not (tmp_path / "nowhere").exists()
    saved(tmp_path, [10])
    with pytest.raises(UserError, match=r"'decoder'.*discriminator, embeddings, generator"):
        load_params(tmp_path, ["decoder"])


_ONE_DEVICE = """
import sys
from electra_jax.checkpoint import load_params
params, meta, files = load_params(sys.argv[1])
import jax, zlib, json
assert jax.device_count() == 1
assert not {"tensorflow", "torch", "electra_jax.model"} & set(sys.modules)
print(json.dumps([zlib.crc32(leaf.tobytes()) for leaf in jax.tree.leaves(params)]))
"""


def test_parameters_saved_on_four_devices_load_in_a_process_with_one(tmp_path):
    import zlib
    params = as_numpy(saved(tmp_path, [10], mesh_shape=(1, 4))["params"])
    root = pathlib.Path(__file__).parents[1]
    child = run_child(_ONE_DEVICE, tmp_path, cwd=root, env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "",
                                                            "JAX_NUM_CPU_DEVICES": "1"})
    assert child.returncode == 0, child.stderr
    wanted = {part: params[part] for part in ("discriminator", "embeddings")}
    assert json.loads(child.stdout) == [zlib.crc32(leaf.tobytes()) for leaf in jax.tree.leaves(wanted)]
    assert child.stderr == ""   # nothing alarming for a newcomer


def test_saving_and_restoring_say_nothing(tmp_path, capfd):
    state = saved(tmp_path)
    opened(tmp_path).restore(abstract(state))
    load_params(tmp_path)
    assert capfd.readouterr() == ("", "")
