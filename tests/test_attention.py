"""Each implementation of attention against the plain one: values, gradients, meshes, and what does not fit."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from electra_jax import attention, config, model, sharding, step
from electra_jax.layers import Architecture, drop

LENGTH = 256


def piece_ids(kind: str):
    """Four rows: full, padded, and, if packed, several pieces with padding behind or not."""
    ids = np.ones((4, LENGTH), np.int32)
    ids[1, 100:] = 0
    if kind == "packed":
        ids[2, 77:], ids[3, 30:] = 2, 2
        ids[3, 140:], ids[3, 200:] = 3, 0
    else:
        ids[2, 1:] = 0
    return ids


def layer(name: str, dtype="float32", packed=True, heads=2):
    """Gradients by every input and parameter of one attention, and its output, on rows of four pieces."""
    arch = Architecture(9, 64, 64, 1, heads, 16, attention_dropout=0.0, attention=name, packed=packed, dtype=dtype)
    module = attention.Attention(arch)

    def loss(params, x, ids, weights):
        out = module.apply({"params": params}, x, ids, ids, True).astype(jnp.float32)
        return jnp.sum(out * weights), out

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


def inputs(kind: str):
    rng, ids = np.random.default_rng(0), piece_ids(kind)
    params = {"qkv_kernel": rng.normal(0, 0.3, (64, 3, 64)), "qkv_bias": rng.normal(0, 0.3, (3, 64)),
              "out": {"kernel": rng.normal(0, 0.3, (64, 64)), "bias": rng.normal(0, 0.3, 64)}}
    x, weights = rng.normal(0, 1, (2, 4, LENGTH, 64))
    return jax.tree.map(lambda t: t.astype(np.float32), (params, x, ids * 1.0, weights * (ids > 0)[..., None]))


def compare(ours, theirs, ids, tolerance):
    """Outputs at tokens and all gradients; what padding makes of itself is nobody's business."""
    (grads, out), (their_grads, their_out) = ours, theirs
    real = np.asarray(ids) > 0
    pairs = [(out[real], their_out[real]), *zip(jax.tree.leaves(grads), jax.tree.leaves(their_grads), strict=True)]
    for a, b in pairs:
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


# --- Plain attention --------------------------------------------------------------------------------

KEPT = 256 / 230     # 26 of 256 dropped


def textbook(q, k, v, ids, keep, scale, g):
    """Output and gradients of dropped softmax attention in NumPy float64, the softmax's Jacobian as it stands."""
    q, k, v, g = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, k, v, g))
    ids, root = np.asarray(ids), q.shape[-1]**-0.5
    scores = np.where((ids[:, :, None] == ids[:, None, :])[:, None], q @ k.swapaxes(2, 3) * root, -np.inf)
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    factor = np.ones_like(probs) if keep is None else keep * scale
    g_probs = g @ v.swapaxes(2, 3) * factor
    jacobian = np.einsum("bhlm,mn->bhlmn", probs, np.eye(probs.shape[-1])) - np.einsum("bhlm,bhln->bhlmn", probs, probs)
    g_scores = np.einsum("bhlm,bhlmn->bhln", g_probs, jacobian) * root
    out = (probs * factor) @ v, g_scores @ k, g_scores.swapaxes(2, 3) @ q, (probs * factor).swapaxes(2, 3) @ g
    return [x.swapaxes(1, 2) for x in out]


def plain_case(length=24):
    """Query, key, value and output's gradient [B, L, H, K], numbers of two pieces and padding, what dropout keeps."""
    rng = np.random.default_rng(0)
    ids = np.ones((3, length), np.int32)
    ids[1, 9:], ids[2, 5:], ids[2, 20:] = 2, 2, 0
    q, k, v, g = rng.normal(0, 1.5, (4, 3, length, 2, 8)).astype(np.float32)
    return (q, k, v + 1, ids, rng.random((3, 2, length, length)) < 230 / 256), g


def plain_gradients(case, g, scale):
    out, vjp = jax.vjp(lambda q, k, v: attention.plain(q, k, v, *case[3:], scale), *case[:3])
    return out, *vjp(g)


@pytest.mark.parametrize("dropped", [False, True])
def test_plain_attention_has_the_values_and_gradients_of_the_textbook(dropped):
    (*arrays, keep), g = plain_case()
    case, scale = (*arrays, keep if dropped else None), KEPT if dropped else 1.0
    for ours, exact in zip(plain_gradients(case, g, scale), textbook(*case, scale, g), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


def test_plain_attention_in_bfloat16_is_nearer_to_the_textbook_than_step_by_step_differentiation():
    (q, k, v, ids, keep), g = plain_case()
    q, k, v, g = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, g))

    def step_by_step(q, k, v):
        scores = jnp.einsum("blhk,bmhk->bhlm", q * q.shape[-1]**-0.5, k, preferred_element_type=jnp.float32)
        scores = jnp.where(attention.same_piece(ids)[:, None], scores, -1e9)
        probs = jax.nn.softmax(scores, -1).astype(q.dtype)
        return jnp.einsum("bhlm,bmhk->blhk", drop(probs, keep, KEPT), v)

    out, vjp = jax.vjp(step_by_step, q, k, v)
    exact = textbook(q, k, v, ids, keep, KEPT, g)
    errors, others = ([np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y)
                       for x, y in zip(found, exact, strict=True)]
                      for found in (plain_gradients((q, k, v, ids, keep), g, KEPT), (out, *vjp(g))))
    assert all(ours < 1.1 * other for ours, other in zip(errors, others, strict=True)), (errors, others)
    assert sum(errors) < 0.75 * sum(others), (errors, others)


def test_plain_attention_keeps_one_array_of_probabilities_in_the_inputs_dtype():
    (*arrays, keep), _ = plain_case()
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in arrays[:3])
    kept = jax.eval_shape(lambda: jax.vjp(lambda q: attention.plain(q, k, v, arrays[3], keep, KEPT), q)[1])
    squares = [x for x in jax.tree.leaves(kept) if x.shape[-2:] == keep.shape[-2:]]
    assert [x.dtype for x in squares] == [jnp.bfloat16]


# --- Kernels ----------------------------------------------------------------------------------------


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(attention, "INTERPRET", True)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-5), ("bfloat16", 2e-2)])
def test_splash_gives_the_values_and_gradients_of_plain_attention_on_packed_rows(interpreted, dtype, tolerance):
    params, x, ids, weights = inputs("packed")
    ids = ids.astype(np.int32)
    ours, theirs = (layer(name, dtype)(params, x, ids, weights) for name in ("splash", "xla"))
    compare(ours, theirs, ids, tolerance)


@pytest.mark.parametrize("heads", [2, 1], ids=["heads_split", "heads_do_not_divide"])
def test_splash_is_split_over_the_mesh(interpreted, heads):
    params, x, ids, weights = inputs("packed")
    ids = ids.astype(np.int32)
    mesh = sharding.make_mesh(dict(data=2, fsdp=1, tensor=2))
    with jax.set_mesh(mesh):
        ours = layer("splash", heads=heads)(params, *sharding.global_batch(dict(a=x, b=ids, c=weights), mesh).values())
    compare(ours, layer("xla", heads=heads)(params, x, ids, weights), ids, 2e-5)


def test_a_train_step_with_splash_gives_the_numbers_of_plain_attention(interpreted):
    sums = []
    for name in ("splash", "xla"):
        c = tiny.config(model__attention=name, model__max_positions=128, data__seq_len=128, data__batch_size=4,
                        model__num_layers=1)
        program = step.build(c, sharding.make_mesh(dict(data=2, fsdp=1, tensor=2)), tiny.SPECIAL_IDS)
        batch = sharding.global_batch(tiny.batch(0, 4, 128, 67), program.mesh)
        sums.append(jax.device_get(program.train_step(program.init_state(), batch)[1]))
    for field in ("mlm_loss", "rtd_loss", "grad_norm", "replaced"):
        np.testing.assert_allclose(sums[0][field], sums[1][field], rtol=1e-5)


def test_lengths_say_the_same_as_piece_numbers_where_a_row_holds_one_piece():
    """cuDNN's way of padding, computed by XLA. A row of padding alone counts as one token: nothing would give NaN."""
    params, x, ids, weights = inputs("padded")
    ids = ids.astype(np.int32)
    ids[3] = 0
    weights = weights * (ids > 0)[..., None]
    plain = jax.nn.dot_product_attention

    def on_cpu(q, k, v, *args, implementation, **options):
        assert implementation == "cudnn" and "mask" not in options
        return plain(q, k, v, *args, implementation="xla", **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.nn, "dot_product_attention", on_cpu)
        ours = layer("cudnn", packed=False)(params, x, ids, weights)
    compare(ours, layer("xla")(params, x, ids, weights), ids, 2e-5)
    np.testing.assert_array_equal(attention.row_lengths(ids), [256, 100, 1, 1])


@pytest.mark.parametrize("packed", [False, True], ids=["one_piece_a_row", "packed"])
def test_cudnn_gets_lengths_for_rows_of_one_piece_and_a_mask_for_packed_ones(monkeypatch, packed):
    seen = {}

    def spy(q, k, v, **options):
        seen.update(options)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    params, x, ids, weights = inputs("packed" if packed else "padded")
    layer("cudnn", packed=packed)(params, x, ids.astype(np.int32), weights)
    names = {"mask"} if packed else {"query_seq_lengths", "key_value_seq_lengths"}
    assert seen.keys() - {"scale", "implementation"} == names


@pytest.mark.parametrize("pack", [False, True])
def test_pretraining_says_whether_rows_are_packed(pack):
    module = step.Objective(tiny.config(data__pack=pack), tiny.SPECIAL_IDS).module
    assert module.disc.packed is module.gen.packed is pack


@pytest.mark.parametrize("fields, named", [
    (dict(model__attention="splash", model__attention_dropout=0.1), "model.attention_dropout=0.1"),
    (dict(model__attention="cudnn", model__attention_dropout=0.0), "model.dtype=bfloat16 (is float32)"),
    (dict(model__attention="flash"), "model.attention='flash'"),
])
def test_attention_that_does_not_fit_the_other_fields_is_refused_with_them(fields, named):
    with pytest.raises(config.UserError) as error:
        tiny.config(**fields)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_attention_that_does_not_fit_the_machine_or_the_length_is_refused_with_its_field(monkeypatch):
    mesh = sharding.make_mesh(dict(data=4, fsdp=1, tensor=1))
    for name, devices in (("splash", "TPU"), ("cudnn", "GPU")):
        with pytest.raises(config.UserError, match=f"model.attention={name} runs on {devices}s.*CPU"):
            attention.check(name, 128, mesh)
    monkeypatch.setattr(attention, "INTERPRET", True)
    attention.check("splash", 384, mesh)
    with pytest.raises(config.UserError, match=r"data\.seq_len=200"):
        attention.check("splash", 200, mesh)
    c = tiny.config(model__attention="splash")
    with pytest.raises(config.UserError, match=r"data\.seq_len=24"):
        step.build(c, mesh, tiny.SPECIAL_IDS)
    assert model.build(c.model).disc.attention == "splash"
