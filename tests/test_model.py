"""Both networks against the float64 oracle; sizes, initialisation, dropout, and forms that must not matter."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny

from electra_jax import config, layers, model

pytestmark = pytest.mark.usefixtures("quick_compile")

ARCHITECTURES = {
    "default": {},
    "published": dict(model__hidden_size=256, model__num_heads=4, model__embedding_size=128,
                      model__intermediate_size=1024, model__generator_size=0.25, model__num_layers=1),
    "equal_widths": dict(model__embedding_size=16, model__generator_size=1.0),
    "own_embeddings": dict(model__sharing="none"),
    "all_shared": dict(model__sharing="all", model__generator_size=1.0),
    "pre_norm_rotary": dict(model__norm="pre", model__positions="rotary", model__rotary_theta=100.0),
    "shallow_generator_odd_length": dict(model__generator_layers=0.5, data__seq_len=29, model__vocab_size=131),
    "pre_norm_absolute": dict(model__norm="pre", model__layer_norm_eps=1e-12, data__seq_len=17),
    "one_segment": dict(model__type_vocab_size=1, data__segment_pairs=False),
}


INPUTS = ("input_ids", "token_type_ids", "piece_ids", "position_ids")


def build(**fields):
    """A config, its module, parameters and a batch."""
    c = tiny.config(**fields)
    module = model.build(c.model)
    batch = tiny.batch(0, 8, c.data.seq_len, c.model.vocab_size)
    if c.model.type_vocab_size == 1:
        batch["token_type_ids"][:] = 0
    return c, module, tiny.params(lambda: model.init_params(module, jax.random.key(0))), batch


@functools.partial(jax.jit, static_argnums=0)
def run(module, params, batch, positions):
    """The generator's logits at all positions and at some, the discriminator's, and its hidden states."""
    inputs = [batch[name] for name in INPUTS]
    apply = functools.partial(module.apply, {"params": params}, *inputs)
    return (apply(None, method="generator_logits"), apply(positions, method="generator_logits"),
            apply(method="discriminator_logits"), apply(all_layers=True, method="hidden_states"))


def logits(module, params, batch):
    """Generator's logits at all positions, and the discriminator's."""
    at_all, _, rtd, _ = run(module, params, batch, np.zeros((8, 4), int))
    return at_all, rtd


@pytest.mark.parametrize("fields", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_logits_and_hidden_states_are_the_oracles(fields):
    c, module, params, batch = build(**fields)
    positions = np.random.default_rng(1).integers(0, c.data.seq_len, (8, 4))
    everywhere = np.broadcast_to(np.arange(c.data.seq_len), batch["input_ids"].shape)
    exact = tiny.float64(params)
    generator = oracle.generator_logits(exact, c.model, batch["input_ids"], batch, everywhere)
    discriminator = oracle.discriminator_logits(exact, c.model, batch["input_ids"], batch)
    hidden = oracle.discriminator_hidden(exact, c.model, batch["input_ids"], batch)
    at_some = np.take_along_axis(generator, positions[..., None], 1)
    *ours, (last, states) = run(module, params, batch, positions)
    for a, b in zip((*ours, last), (generator, at_some, discriminator, hidden), strict=True):
        assert b.std() > 0.1
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0)
    assert len(states) == 1 + c.model.num_layers
    if c.model.norm == "post":
        np.testing.assert_array_equal(states[-1], last)


@pytest.mark.parametrize("name", ["default", "pre_norm_rotary"])
def test_a_packed_piece_gets_the_logits_it_gets_alone(name):
    _, module, params, batch = build(**ARCHITECTURES[name])
    second = batch["piece_ids"][2] == 2
    length = second.sum()
    assert 0 < length < len(second)
    alone = {name: x.copy() for name, x in batch.items()}
    for x in alone.values():
        x[2] = np.pad(x[2][second], (0, len(second) - length))
    for packed, single in zip(logits(module, params, batch), logits(module, params, alone), strict=True):
        np.testing.assert_allclose(packed[2][second], single[2][:length], atol=2e-5)


@pytest.mark.parametrize("fields", [ARCHITECTURES["default"], ARCHITECTURES["pre_norm_rotary"],
                                    ARCHITECTURES["all_shared"]], ids=["default", "pre_norm_rotary", "all_shared"])
def test_scanned_layers_compute_what_unrolled_ones_do(fields):
    c, module, params, batch = build(**fields)
    stacked = model.stack_layers(params)
    jax.tree.map(np.testing.assert_array_equal, model.unstack_layers(stacked), params)
    positions = np.zeros((8, 4), int)
    for turn in (1, 3):      # layers a turn, in networks of two or more
        scanned = model.build(dict(c.model) | {"scan_layers": True, "scan_unroll": turn})
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5),
                     run(module, params, batch, positions), run(scanned, stacked, batch, positions))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_loop_of_one_turn_is_no_loop(remat):
    c, _, params, batch = build(model__remat=remat)
    loops = {}
    for turn in (1, c.model.num_layers):
        module = model.build(dict(c.model) | {"scan_layers": True, "scan_unroll": turn})

        def loss(params, module=module):
            return sum(jnp.sum(x) for x in module.apply({"params": params}, *batch.values(), method="both"))

        text = jax.jit(jax.grad(loss)).lower(model.stack_layers(params)).as_text()
        loops[turn] = text.count("stablehlo.while")
    assert loops[1] == 4 and loops[c.model.num_layers] == 0     # two networks, forward and backward


def test_scanned_and_unrolled_models_start_from_the_same_numbers():
    c = tiny.config(model__generator_layers=0.5)

    @jax.jit
    def both():
        return [model.init_params(model.build(dict(c.model) | {"scan_layers": scan}), jax.random.key(0))
                for scan in (False, True)]

    unrolled, scanned = both()
    assert "layers" in scanned["generator"]["encoder"]
    # To the last digit or two: each program rounds its normal numbers in its own way.
    close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-8)
    jax.tree.map(close, model.stack_layers(unrolled), scanned)


def test_bfloat16_stays_near_float32_and_keeps_its_logits_in_float32():
    c, module, params, batch = build()
    c.model.dtype = "bfloat16"
    for a, b in zip(logits(module, params, batch), logits(model.build(c.model), params, batch), strict=True):
        assert b.dtype == jnp.float32
        assert np.abs(a - b).max() < 0.05 * np.abs(a).max()


def test_a_generator_without_whole_heads_is_refused_with_its_field():
    c = tiny.config(model__hidden_size=192, model__num_heads=12, model__generator_size=0.3)   # 58 wide, 3 heads
    with pytest.raises(config.UserError, match=r"model\.generator_size"):
        model.build(c.model)


@pytest.mark.parametrize("name, own, shared", [
    ("default", {"encoder", "head"}, {"word_embeddings", "token_type_embeddings", "position_embeddings", "norm"}),
    ("own_embeddings", {"encoder", "head", "embeddings"},
     {"word_embeddings", "token_type_embeddings", "position_embeddings", "norm"}),
    ("all_shared", {"head"}, {"word_embeddings", "token_type_embeddings", "position_embeddings", "norm"}),
    ("pre_norm_rotary", {"encoder", "head"}, {"word_embeddings", "token_type_embeddings", "norm"})])
def test_sharing_decides_which_parameters_the_generator_owns(name, own, shared):
    params = build(**ARCHITECTURES[name])[2]
    assert params.keys() == {"embeddings", "generator", "discriminator"}
    assert params["generator"].keys() == own and params["discriminator"].keys() == {"encoder", "head"}
    assert params["embeddings"].keys() == shared


# --- Sizes --------------------------------------------------------------------------------------


_SIZES = {
    "small": {},
    "base": dict(embedding_size=768, hidden_size=768, num_layers=12, num_heads=12, intermediate_size=3072,
                 generator_size=1 / 3),
    "large": dict(embedding_size=1024, hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096,
                  generator_size=0.25),
}


def published(size, generator_size=None):
    m = config.get_config().model
    m.update(vocab_size=30522, **_SIZES[size])
    if generator_size:
        m.generator_size = generator_size
    return m


@pytest.mark.parametrize("size, generator_size, count", [
    ("small", None, 14_196_219), ("base", None, 119_386_427), ("large", None, 354_655_291), ("small", 1.0, 23_122_875)])
def test_published_sizes_have_the_published_parameter_counts(size, generator_size, count):
    module = model.build(published(size, generator_size))
    shapes = jax.eval_shape(lambda: model.init_params(module, jax.random.key(0)))
    assert model.count_params(shapes) == count
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


# FLOPs of a training step a sequence, by the original's script in its "3 x forward, sparse lookup" form.
@pytest.mark.parametrize("size, generator_size, seq_len, flops", [
    ("small", None, 128, 9.16e9), ("small", None, 512, 4.64e10), ("small", 1.0, 512, 8.14e10),
    ("base", None, 128, 7.89e10), ("base", None, 512, 3.474e11), ("large", None, 512, 1.111e12)])
def test_matmul_flops_are_within_four_percent_of_the_published_count(size, generator_size, seq_len, flops):
    mask_prob = 0.25 if size == "large" else 0.15
    num_masked = oracle.slots(mask_prob, seq_len)
    forward = model.matmul_flops(published(size, generator_size), seq_len, num_masked)
    assert 3 * forward == pytest.approx(flops, rel=0.04)


def test_initial_values_are_the_originals():
    module = model.build(dict(published("small")) | {"num_layers": 1})
    params = tiny.flat(jax.jit(lambda: model.init_params(module, jax.random.key(0)))())
    for name, x in params.items():
        if name.endswith("scale"):
            assert np.all(x == 1), name
        elif name.endswith("bias"):
            assert np.all(x == 0), name
        elif "embeddings_project" in name or name.endswith("logit/kernel"):   # Glorot-uniform
            limit = (6 / sum(x.shape)) ** 0.5
            assert 0.9 * limit < np.abs(x).max() <= limit and x.std() == pytest.approx(limit / 3**0.5, rel=0.1), name
        else:   # normal with deviation 0.02, cut at two deviations: 0.8796 of it is left
            assert 0.035 < np.abs(x).max() <= 0.04 and x.std() == pytest.approx(0.01759, rel=0.05), name


# --- Dropout ------------------------------------------------------------------------------------


def drop(rate, shape, seed=0, deterministic=False, x=None):
    x = jnp.ones(shape) if x is None else x
    return model.Dropout(rate).apply({}, x, deterministic, rngs={"dropout": jax.random.key(seed)})


@pytest.mark.parametrize("shape", [(400, 1001), (7, 20, 3000)])
def test_dropout_drops_its_share_and_keeps_the_mean(shape):
    out = np.asarray(drop(0.1, shape))
    share = 26 / 256   # 0.1 in whole bytes
    assert (out == 0).mean() == pytest.approx(share, abs=4 * (share * (1 - share) / out.size) ** 0.5)
    np.testing.assert_allclose(out[out != 0], 256 / 230, rtol=1e-6)
    assert out.mean() == pytest.approx(1, abs=0.003)
    # No column (or byte of a word) is favoured, and neighbours fall independently.
    columns = (out == 0).reshape(-1, shape[-1])
    assert columns.mean(0).std() == pytest.approx((share * (1 - share) / len(columns)) ** 0.5, rel=0.15)
    assert (columns[:, 1:] & columns[:, :-1]).mean() == pytest.approx(share**2, rel=0.1)


def test_dropout_is_off_when_deterministic_or_of_rate_zero():
    x = jnp.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(drop(0.5, None, deterministic=True, x=x), x)
    np.testing.assert_array_equal(drop(0.0, None, x=x), x)
    assert drop(0.5, None, x=x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_dropout_differs_by_key():
    assert (drop(0.5, (50, 50), 0) != drop(0.5, (50, 50), 1)).mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_each_use_of_dropout_in_each_layer_has_a_mask_of_its_own(scan):
    """Layers whose blocks give 1 everywhere, in a pre-norm model with rate 1/2: the sum counts kept entries.

    2 layers x 2 uses give 0, 2, 4, 6, 8 with binomial shares; equal masks would leave the even ones out.
    """
    arch = model.Architecture(9, 64, 64, 2, 4, 16, norm="pre", hidden_dropout=0.5, attention_dropout=0.0,
                              scan_layers=scan)
    ids = jnp.ones((8, 32), jnp.int32)

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            return model.Encoder(arch, name="encoder")(x, ids, ids, False, all_layers=True)[1][-1]

    x = jnp.zeros((8, 32, 64))
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    shapes = jax.eval_shape(lambda: Stack().init(rngs, x)["params"])
    params = jax.tree_util.tree_map_with_path(
        lambda path, p: np.full(p.shape, [k.key for k in path[-2:]] == ["out", "bias"], np.float32), shapes)
    out = np.asarray(jax.jit(Stack().apply)({"params": params}, x, rngs={"dropout": jax.random.key(1)}))
    shares = [(out == value).mean() for value in (0, 2, 4, 6, 8)]
    np.testing.assert_allclose(shares, np.array([1, 4, 6, 4, 1]) / 16, atol=0.02)


def test_layer_norm_and_gelu_have_the_values_and_derivatives_of_float64():
    rng = np.random.default_rng(0)
    x, direction = rng.normal(3, 2, (5, 3, 16)), rng.normal(size=(5, 3, 16))
    scale, bias = rng.normal(1, 0.3, (2, 16))
    norm = {"scale": scale, "bias": bias}
    for ours, exact, inputs in (
            (lambda x, s, b: layers.normalize(x, s, b, 1e-12),
             lambda x, s, b: oracle.layer_norm(x, {"scale": s, "bias": b}), (x, *norm.values())),
            (layers.gelu, oracle.gelu, (x - 3,))):
        y, vjp = jax.vjp(ours, *(jnp.asarray(v, jnp.float32) for v in inputs))
        np.testing.assert_allclose(y, exact(*inputs), rtol=1e-5, atol=1e-6)
        for i, gradient in enumerate(vjp(jnp.asarray(direction, jnp.float32))):
            for index in [(0,) * (inputs[i].ndim - 1) + (j,) for j in range(16)]:    # central differences
                step = np.zeros_like(inputs[i])
                step[index] = 1e-5
                ends = [np.sum(direction * exact(*(v + sign * step if k == i else v for k, v in enumerate(inputs))))
                        for sign in (1, -1)]
                np.testing.assert_allclose(gradient[index], (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=2e-5)
