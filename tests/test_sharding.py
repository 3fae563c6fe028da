"""The same numbers on any mesh, in any number of microbatches and in any form of the layers; sizes that do not fit."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType

from electra_jax import config, model, sharding, step

pytestmark = pytest.mark.usefixtures("quick_compile")

STEPS = 3
VARIANTS = {
    "data=4": dict(data=4),
    "fsdp=4": dict(fsdp=4),
    "tensor=4": dict(tensor=4),   # the generator's two heads do not divide
    "data=2,tensor=2,remat=dots": dict(data=2, tensor=2, model__remat="dots"),
    "fsdp=2,tensor=2,scanned": dict(fsdp=2, tensor=2, model__scan_layers=True),
    "data=2,accumulation=4": dict(data=2, optimizer__accumulation_steps=4),
    "scanned,remat=full": dict(model__scan_layers=True, model__remat="full"),
}


def build(data=1, fsdp=1, tensor=1, **fields):
    """A program on the first devices, whose generator is one layer of two heads of four."""
    c = tiny.config(**dict(model__generator_layers=0.5, optimizer__warmup_steps=1, data__batch_size=16) | fields)
    c.mesh.update(data=data, fsdp=fsdp, tensor=tensor)
    return step.build(c, sharding.make_mesh(c.mesh, jax.devices()[: data * fsdp * tensor]), tiny.SPECIAL_IDS)


def batch(seed, program):
    return sharding.global_batch(tiny.batch(seed, 16, 24, 67), program.mesh)


def train(program, scanned=False):
    """Sums of each step, and the parameters after the last, from one start whatever the form of the layers."""
    module = program.module.clone(disc=plain(program.module.disc), gen=plain(program.module.gen))
    params = tiny.params(lambda: model.init_params(module, jax.random.key(0)))
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), program.abstract_state)
    state["params"] = model.stack_layers(params) if scanned else params
    state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, program.abstract_state))
    sums = []
    for seed in range(STEPS):
        old, (state, one) = state, program.train_step(state, batch(seed, program))
        assert all(x.is_deleted() for x in jax.tree.leaves(old)), "the state is not donated"
        sums.append(jax.device_get(one))
    assert state["step"] == STEPS
    return sums, model.unstack_layers(jax.device_get(state["params"]))


def plain(architecture):
    return type(architecture)(**vars(architecture) | {"scan_layers": False})


@functools.cache
def on_one_device():
    """The program, what `train` gives, and JAX's log of what was compiled meanwhile."""
    log = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())
    logging.getLogger("jax").addHandler(handler)
    program = build()
    with jax.log_compiles():
        result = train(program)
    logging.getLogger("jax").removeHandler(handler)
    return program, *result, log


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_training_gives_the_numbers_of_one_device(fields):
    program = build(**fields)
    sums, params = train(program, scanned="model__scan_layers" in fields)
    _, expected_sums, expected_params, _ = on_one_device()
    for ours, theirs in zip(sums, expected_sums, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"auc_histograms"}:   # its bins are narrow: a logit may round into the next
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=name)
        assert ours["auc_histograms"].sum() == theirs["auc_histograms"].sum()
    before = tiny.flat(tiny.params(lambda: expected_params))
    after = tiny.flat(params)
    for name, theirs in tiny.flat(expected_params).items():
        np.testing.assert_allclose(after[name], theirs, atol=1e-5, rtol=0, err_msg=name)
        assert np.abs(theirs - before[name]).max() > 1e-4, name   # every tensor has moved
    cut = {axis for x in jax.tree.leaves(program.abstract_state["params"]) for axis in sharding.AXES
           if x.sharding.shard_shape(x.shape) != x.shape and axis in str(x.sharding.spec)}
    assert cut >= {axis for axis in ("fsdp", "tensor") if fields.get(axis, 1) > 1}


@pytest.mark.parametrize("mesh", [dict(fsdp=4), dict(tensor=4), dict(fsdp=2, tensor=2)], ids=str)
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_each_device_holds_a_quarter_of_the_layers_kernels_and_their_moments(mesh, scan):
    state = build(**mesh, model__scan_layers=scan).abstract_state
    found = 0
    for path, x in jax.tree.leaves_with_path(state):
        name = "/".join(str(getattr(key, "key", key)) for key in path)
        if "discriminator/encoder/layer" in name and name.endswith("kernel"):
            assert np.prod(x.sharding.shard_shape(x.shape)) == x.size / 4, name
            found += 1
    assert found == 3 * 4 * (1 if scan else 2)   # parameters and two moments


def test_start_and_evaluation_are_the_same_on_every_mesh():
    results = []
    for program in (on_one_device()[0], build(fsdp=2, tensor=2)):
        state = program.init_state()
        assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, state, program.abstract_state))
        results.append(jax.device_get((state, program.eval_step(state["params"], batch(0, program), 7))))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *results)


def test_the_step_is_compiled_once():
    log = on_one_device()[-1]
    assert sum("XLA compilation of jit(train_step)" in line for line in log) == 1


@pytest.mark.parametrize("fields", [{}, dict(fsdp=2, tensor=2)], ids=["one_device", "fsdp=2,tensor=2"])
def test_every_byte_of_the_state_is_updated_in_place(fields):
    program = build(**fields)
    size = sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
               for x in jax.tree.leaves(program.abstract_state))
    rows, several = (dict.fromkeys(step._INPUTS, jax.ShapeDtypeStruct(shape, np.int32))
                     for shape in ((16, 24), (3, 16, 24)))
    count = jax.ShapeDtypeStruct((), np.int32)
    for train, inputs in ((program.train_step, (rows,)), (program.train_steps, (several, count))):
        compiled = train.lower(program.abstract_state, *inputs).compile()
        assert compiled.memory_analysis().alias_size_in_bytes == size


def test_several_steps_at_one_command_are_bit_for_bit_the_same_steps_at_two_and_the_single_steps_to_rounding():
    program = build(fsdp=2, tensor=2, model__hidden_dropout=0.1)
    rows = [tiny.batch(seed, 16, 24, 67) for seed in range(STEPS)]

    def take(state, batches):
        filled = batches + batches[-1:] * (STEPS - len(batches))
        stacked = {name: np.stack([batch[name] for batch in filled]) for name in rows[0]}
        state, sums = program.train_steps(state, sharding.global_batch(stacked, program.mesh, True),
                                          sharding.everywhere(np.int32(len(batches)), program.mesh))
        return state, jax.tree.map(lambda x: np.asarray(x)[:len(batches)], sums)

    at_once, sums = take(program.init_state(), rows)
    state, first = take(program.init_state(), rows[:1])
    state, rest = take(state, rows[1:])
    jax.tree.map(np.testing.assert_array_equal, at_once, state)
    jax.tree.map(lambda x, *parts: np.testing.assert_array_equal(x, np.concatenate(parts)), sums, first, rest)
    single, losses = program.init_state(), []
    for batch_ in rows:
        single, one = program.train_step(single, sharding.global_batch(batch_, program.mesh))
        losses.append(float(one["mlm_loss"]))
    np.testing.assert_allclose(sums["mlm_loss"], losses, rtol=1e-5)
    assert len(set(losses)) == STEPS == single["step"] == at_once["step"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), at_once["params"], single["params"])


def test_each_step_draws_anew():
    program = on_one_device()[0]
    state, first = program.train_step(program.init_state(), batch(0, program))   # rate 0: parameters stay
    _, second = program.train_step(state, batch(0, program))
    assert first["learning_rate"] == 0 and first["mlm_loss"] != second["mlm_loss"]


def test_bfloat16_loss_is_near_float32():
    exact, _, params, _ = on_one_device()
    losses = []
    for program in (exact, build(model__dtype="bfloat16")):
        sums = program.eval_step(params, batch(5, program), 0)
        assert sums["rtd_loss"].dtype == sums["mlm_loss"].dtype == np.float32
        losses.append((sums["mlm_loss"] / sums["mlm_weight"], sums["rtd_loss"] / sums["rtd_weight"]))
    np.testing.assert_allclose(*losses, rtol=0.02)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("fields, named", [
    (dict(data=4, data__batch_size=6), "data.batch_size=6"),
    (dict(data=2, fsdp=2, data__batch_size=8, optimizer__accumulation_steps=4), "data.batch_size=8"),
    (dict(tensor=4, model__num_heads=2), "model.num_heads=2"),
    (dict(tensor=4, model__intermediate_size=30), "model.intermediate_size=30"),
    (dict(fsdp=4, model__hidden_size=18, model__num_heads=2, model__generator_size=1.0), "model.hidden_size=18"),
], ids=["batch", "microbatch", "heads", "feed_forward", "width"])
def test_sizes_that_do_not_divide_are_refused_with_their_field(fields, named):
    with pytest.raises(config.UserError) as error:
        build(**fields)
    assert named in str(error.value)


def test_activations_are_split_by_rows_on_our_mesh_and_left_alone_elsewhere():
    x = jnp.ones((4, 3))
    ours = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 1})
    assert sharding.by_rows(x) is x
    with jax.set_mesh(ours):
        assert sharding.by_rows(x) is x
        assert jax.jit(sharding.by_rows)(x).sharding.shard_shape(x.shape) == (1, 3)
        assert jax.jit(sharding.by_rows)(x[:3]).sharding.is_fully_replicated     # rows that do not divide
    for names, kind in ((("data",), AxisType.Auto), (sharding.AXES, AxisType.Explicit)):
        theirs = jax.make_mesh((4, 1, 1)[:len(names)], names, axis_types=(kind,) * len(names))
        with jax.set_mesh(theirs):
            assert jax.jit(sharding.by_rows)(x).sharding.is_fully_replicated


@pytest.mark.parametrize("sizes, devices, rows", [
    ((4, 1, 1), (1, 3), [4, 5, 6, 7, 12, 13, 14, 15]),     # apart, as the order of a pod's devices may have it
    ((1, 2, 2), (0, 2), range(16)), ((1, 2, 2), (2,), range(8, 16)), ((1, 1, 4), (3,), range(16)),
])
def test_a_host_gives_the_rows_of_its_devices(monkeypatch, sizes, devices, rows):
    """As if this host had some of the mesh's devices only."""
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
    assert sharding.local_rows(mesh, 16).tolist() == list(range(16))
    held = [mesh.devices.flat[i] for i in devices]
    monkeypatch.setattr(jax.sharding.NamedSharding, "addressable_devices_indices_map",
                        lambda self, shape: {d: self.devices_indices_map(shape)[d] for d in held})
    sharding.local_rows.cache_clear()
    x, given = np.arange(16 * 3, dtype=np.int32).reshape(16, 3), []
    monkeypatch.setattr(jax, "make_array_from_single_device_arrays",
                        lambda shape, placed, parts: given.extend((part, placed, shape) for part in parts))
    sharding.global_batch({"x": x[list(rows)]}, mesh)
    assert sharding.local_rows(mesh, 16).tolist() == list(rows)
    sharding.local_rows.cache_clear()
    assert [part.device for part, _, _ in given] == held
    for part, placed, shape in given:
        np.testing.assert_array_equal(part, x[placed.devices_indices_map(shape)[part.device]])


@pytest.mark.parametrize("sizes, mesh", [((-1, 1, 1), (4, 1, 1)), ((1, -1, 2), (1, 2, 2)), ((-1, 2, 2), (1, 2, 2))])
def test_minus_one_takes_the_devices_left(sizes, mesh):
    made = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
    assert tuple(made.shape.values()) == mesh and tuple(made.shape) == sharding.AXES


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (-1, 3, 1), (8, 1, 1), (-1, 8, 1)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused_with_its_fields(sizes):
    with pytest.raises(config.UserError, match=r"mesh\.data="):
        sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
