"""Schedule and AdamW against the float64 oracle, on the model's real parameter tree."""

import functools

import jax
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


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_learning_rate_of_an_optimised_program_ends_at_its_end_value(power):
    """There 1 - t / T is one multiply-add with 1 / T rounded: -1e-8 at the end, whose root is NaN."""
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        for steps in (3, 45, 100, 766_000):
            c = tiny.config(optimizer__steps=steps, optimizer__warmup_steps=0, optimizer__decay_power=power).optimizer
            rate = jax.jit(functools.partial(optimizer.learning_rate, c))
            assert [rate(steps), rate(steps + 1)] == [0, 0] and rate(steps - 1) > 0
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


def gradients(params, steps, scale):
    rng = np.random.default_rng(1)
    return [jax.tree.map(lambda x, k=k: (scale * (1 + k % 3) * rng.normal(0, 1, x.shape)).astype(np.float32), params)
            for k in range(steps)]


def run(tx, params, grads):
    """Updates of each step, and parameters after it."""
    update = jax.jit(lambda g, s, p: (lambda u: (u[0], optax.apply_updates(p, u[0]), u[1]))(tx.update(g, s, p)))
    state = tx.init(params)
    for g in grads:
        updates, params, state = update(g, state, params)
        yield updates, params


def assert_equal_runs(ours, start, theirs, update_tolerance=1e-6):
    """Parameters are the float64 oracle's to 1e-6 of a tensor's largest, updates as told of the step's largest."""
    before = {name: np.asarray(x, float) for name, x in tiny.flat(start).items()}
    for step, ((updates, params), after) in enumerate(zip(ours, theirs, strict=True)):
        expected = {name: after[name] - before[name] for name in after}
        largest = max(np.abs(x).max() for x in expected.values())
        params = tiny.flat(params)
        for name, update in tiny.flat(updates).items():
            assert np.abs(update - expected[name]).max() <= update_tolerance * largest, f"{name}, update {step}"
            assert np.abs(params[name] - after[name]).max() <= 1e-6 * np.abs(after[name]).max(), f"{name}, step {step}"
        before = after


# Gradients' norms: about 60 to 180 times the scale.
@pytest.mark.parametrize("scale, clip_norm, bias_correction", [
    (1.0, 1.0, False), (1e-4, 1.0, False), (1 / 120, 1.0, False), (1.0, 0.0, False), (1 / 120, 1.0, True)],
    ids=["always_clipped", "never_clipped", "sometimes_clipped", "clipping_off", "sometimes_clipped_corrected"])
def test_fifty_steps_are_the_published_adamw_and_the_corrected(scale, clip_norm, bias_correction):
    c = tiny.config(optimizer__steps=45, optimizer__warmup_steps=8, optimizer__weight_decay=0.1,
                    optimizer__clip_norm=clip_norm, optimizer__end_learning_rate=1e-4, optimizer__decay_power=1.5,
                    optimizer__bias_correction=bias_correction).optimizer
    params = parameters(model__num_layers=1)
    grads = gradients(params, 50, scale)
    norms = [sum(float((x.astype(float) ** 2).sum()) for x in jax.tree.leaves(g)) ** 0.5 for g in grads]
    assert {"1.0": min(norms) > 1, "0.0001": max(norms) < 1}.get(str(scale), min(norms) < 1 < max(norms))
    rates = [oracle.learning_rate(t, peak=1e-3, steps=45, warmup=8, end=1e-4, power=1.5) for t in range(50)]
    adamw = oracle.adamw if not bias_correction else corrected_adamw
    expected = adamw(tiny.flat(params), [tiny.flat(g) for g in grads], rates, should_decay, beta1=0.9,
                     beta2=0.999, eps=1e-6, weight_decay=0.1, clip_norm=clip_norm)
    # float32 knows 1 - beta2 ** t to 3e-5 at first, and the update goes with its root.
    assert_equal_runs(run(optimizer.build(c), params, grads), params, expected, 2e-5 if bias_correction else 1e-6)


def clipped(grads, clip_norm):
    """Gradients of one step {name: array} in float64, scaled down to a global norm of at most `clip_norm`."""
    norm = sum(float((np.asarray(g, float) ** 2).sum()) for g in grads.values()) ** 0.5
    return {name: np.asarray(g, float) * min(1.0, (clip_norm or norm) / norm) for name, g in grads.items()}


def corrected_adamw(params, grads_of_steps, rates, decayed, *, beta1, beta2, eps, weight_decay, clip_norm):
    """Yields parameters by Adam as Kingma and Ba give it (algorithm 1), decay decoupled, moments as sums over steps."""
    params = {name: np.asarray(x, float) for name, x in params.items()}
    history = []
    for t, (grads, rate) in enumerate(zip(grads_of_steps, rates, strict=True), 1):
        history.append(clipped(grads, clip_norm))
        fade1, fade2 = ((1 - beta) * beta ** np.arange(t - 1.0, -1, -1) / (1 - beta**t) for beta in (beta1, beta2))
        after = {}
        for name, p in params.items():
            past = np.stack([g[name] for g in history])
            m, v = np.tensordot(fade1, past, 1), np.tensordot(fade2, past**2, 1)
            after[name] = p - rate * (m / (np.sqrt(v) + eps) + weight_decay * decayed(name) * p)
        yield after
        params = after


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
    params = parameters(model__num_layers=1)
    decayed = jax.tree_util.tree_map_with_path(lambda path, _: should_decay(path[-1].key), params)
    schedule = functools.partial(optimizer.learning_rate, c)
    theirs = optax.chain(optax.clip_by_global_norm(1.0),
                         optax.adamw(schedule, 0.9, 0.999, 1e-6, weight_decay=0.01, mask=decayed))
    grads = gradients(params, 50, 1 / 120)
    for (_, a), (_, b) in zip(run(optimizer.build(c), params, grads), run(theirs, params, grads), strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6 * np.abs(y).max(), rtol=0), a, b)


def test_with_bias_correction_it_is_torchs_adamw():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    c = tiny.config(optimizer__bias_correction=True, optimizer__steps=60, optimizer__weight_decay=0.1).optimizer
    params = parameters(model__num_layers=1)
    grads = gradients(params, 50, 1 / 120)

    def theirs():
        tensors = {name: torch.from_numpy(x.astype(float)) for name, x in tiny.flat(params).items()}
        groups = [{"params": [x for name, x in tensors.items() if should_decay(name) == decayed],
                   "weight_decay": 0.1 * decayed} for decayed in (True, False)]
        adamw = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-6)
        for step, g in enumerate(grads):
            for name, x in clipped(tiny.flat(g), 1.0).items():
                tensors[name].grad = torch.from_numpy(x)
            for group in adamw.param_groups:
                group["lr"] = oracle.learning_rate(step, peak=1e-3, steps=60, warmup=2)
            adamw.step()
            yield {name: x.numpy().copy() for name, x in tensors.items()}

    assert_equal_runs(run(optimizer.build(c), params, grads), params, theirs(), 2e-5)
