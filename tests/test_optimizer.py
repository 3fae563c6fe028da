"""Schedule and AdamW against the float64 oracle, on the model's real parameter tree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import tiny

from electra_jax import model, optimizer

pytestmark = pytest.mark.usefixtures("quick_compile")


def parameters(**fields):
    module = model.build(tiny.config(**fields).model)
    return tiny.params(lambda: model.init_params(module, jax.random.key(0)))


def should_decay(name):
    """Tables and kernels are decayed, biases and LayerNorm are not: told by the kind of the leaf alone."""
    kinds = {"embedding": True, "kernel": True, "qkv_kernel": True, "bias": False, "qkv_bias": False, "scale": False}
    return kinds[name.split("/")[-1]]


TREES = {"post": {}, "pre_scanned": dict(model__norm="pre", model__scan_layers=True),
         "own_embeddings": dict(model__sharing="none")}


@pytest.mark.parametrize("fields", TREES.values(), ids=TREES)
def test_weight_decay_leaves_out_biases_and_norms_of_the_model_and_nothing_else(fields):
    names = list(tiny.flat(parameters(**fields)))
    for name in names:
        assert optimizer.is_decayed(name) == should_decay(name), name
        assert not should_decay(name) or "norm/" not in name
    some = ["embeddings/norm/scale", "embeddings/word_embeddings/embedding", "generator/head/bias",
            "generator/head/norm/bias", "discriminator/head/logit/bias", "embeddings/position_embeddings/embedding"]
    assert set(some) <= set(names)
    for part in ("attention_norm/", "ffn_norm/", "qkv_bias", *(["final_norm/"] if "model__norm" in fields else [])):
        assert any(part in name for name in names)


@pytest.mark.parametrize("fields", [
    {}, dict(warmup_steps=0), dict(end_learning_rate=1e-5), dict(decay_power=2.0, end_learning_rate=2e-5),
    dict(warmup_steps=100)], ids=["published", "no_warmup", "end", "power", "warmup_as_long_as_the_run"])
def test_learning_rate_is_the_decay_over_all_steps_times_the_warmup(fields):
    c = tiny.config(optimizer__steps=100, optimizer__warmup_steps=10, optimizer__learning_rate=5e-4).optimizer
    c.update(fields)
    steps = np.arange(131)
    ours = jax.vmap(functools.partial(optimizer.learning_rate, c))(steps)
    theirs = [oracle.learning_rate(t, peak=5e-4, steps=100, warmup=c.warmup_steps, end=c.end_learning_rate,
                                   power=c.decay_power) for t in steps]
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-10)
    assert (ours[0] == 0) == (c.warmup_steps > 0) and ours[100] == pytest.approx(c.end_learning_rate, abs=1e-12)
    if not fields:   # the peak is below the nominal rate: the warm-up multiplies what has already decayed
        assert ours[10] == ours.max() == pytest.approx(5e-4 * 0.9)


def gradients(params, steps, scale):
    rng = np.random.default_rng(1)
    return [jax.tree.map(lambda x, k=k: (scale * (1 + k % 3) * rng.normal(0, 1, x.shape)).astype(np.float32), params)
            for k in range(steps)]


def run(tx, params, grads):
    """Parameters after each step."""
    update = jax.jit(lambda g, s, p: (lambda u: (optax.apply_updates(p, u[0]), u[1]))(tx.update(g, s, p)))
    state = tx.init(params)
    for g in grads:
        params, state = update(g, state, params)
        yield params


# Gradients' norms: about 60 to 180 times the scale.
@pytest.mark.parametrize("scale, clip_norm", [(1.0, 1.0), (1e-4, 1.0), (1 / 120, 1.0), (1.0, 0.0)],
                         ids=["always_clipped", "never_clipped", "sometimes_clipped", "clipping_off"])
def test_fifty_steps_are_the_published_adamw(scale, clip_norm):
    c = tiny.config(optimizer__steps=60, optimizer__warmup_steps=8, optimizer__weight_decay=0.1,
                    optimizer__clip_norm=clip_norm).optimizer
    params = parameters()
    grads = gradients(params, 50, scale)
    norms = [sum(float((x.astype(float) ** 2).sum()) for x in jax.tree.leaves(g)) ** 0.5 for g in grads]
    assert {"1.0": min(norms) > 1, "0.0001": max(norms) < 1}.get(str(scale), min(norms) < 1 < max(norms))
    rates = [oracle.learning_rate(t, peak=1e-3, steps=60, warmup=8) for t in range(50)]
    expected = oracle.adamw(tiny.flat(params), [tiny.flat(g) for g in grads], rates, should_decay, beta1=0.9,
                            beta2=0.999, eps=1e-6, weight_decay=0.1, clip_norm=clip_norm)
    for step, (ours, theirs) in enumerate(zip(run(optimizer.build(c), params, grads), expected, strict=True)):
        for name, x in tiny.flat(ours).items():
            np.testing.assert_allclose(x, theirs[name], atol=1e-6, rtol=0, err_msg=f"{step}: {name}")


def test_the_first_step_has_rate_zero_but_moves_the_moments():
    c = tiny.config().optimizer
    params = parameters()
    tx = optimizer.build(c)
    updates, state = jax.jit(tx.update)(gradients(params, 1, 1e-4)[0], tx.init(params), params)
    assert not any(np.any(x) for x in jax.tree.leaves(updates))
    moments = next(s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    assert all(np.any(x) for x in jax.tree.leaves((moments.mu, moments.nu)))


def test_with_bias_correction_it_is_optax_adamw():
    c = tiny.config(optimizer__bias_correction=True, optimizer__steps=60).optimizer
    params = parameters()
    decayed = jax.tree_util.tree_map_with_path(lambda path, _: should_decay(path[-1].key), params)
    schedule = functools.partial(optimizer.learning_rate, c)
    theirs = optax.chain(optax.clip_by_global_norm(1.0),
                         optax.adamw(schedule, 0.9, 0.999, 1e-6, weight_decay=0.01, mask=decayed))
    grads = gradients(params, 10, 1.0)
    for a, b in zip(run(optimizer.build(c), params, grads), run(theirs, params, grads), strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-7), a, b)
    published = optimizer.build(tiny.config(optimizer__steps=60).optimizer)
    last = list(run(published, params, grads))[-1]
    assert jnp.abs(last["embeddings"]["norm"]["scale"] - a["embeddings"]["norm"]["scale"]).max() > 1e-4
