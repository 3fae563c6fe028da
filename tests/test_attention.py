"""Each implementation of attention against the plain one: values, gradients, meshes, and what does not fit."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from electra_jax import attention, config, flash, loop, model, sharding, step
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


def layer(name: str, dtype="float32", packed=True, heads=2, dropout=0.0, **fields):
    """Gradients by every input and parameter of one attention, and its output, on rows of four pieces."""
    arch = Architecture(9, 64, 64, 1, heads, 16, attention_dropout=dropout, attention=name, packed=packed, dtype=dtype,
                        **fields)
    module = attention.Attention(arch)

    def loss(params, x, ids, weights):
        rngs = {"dropout": jax.random.key(5)} if dropout else None
        out = module.apply({"params": params}, x, ids, ids, not dropout, rngs=rngs).astype(jnp.float32)
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
@pytest.mark.parametrize("positions", ["absolute", "rotary"])
@pytest.mark.parametrize("name", ["splash", "flash"])
def test_kernels_give_the_values_and_gradients_of_plain_attention_on_packed_rows(interpreted, name, positions, dtype,
                                                                                 tolerance):
    params, x, ids, weights = inputs("packed")
    ids = ids.astype(np.int32)
    ours, theirs = (layer(name, dtype, positions=positions)(params, x, ids, weights) for name in (name, "xla"))
    compare(ours, theirs, ids, tolerance)


@pytest.mark.parametrize("heads", [2, 1], ids=["heads_split", "heads_do_not_divide"])
@pytest.mark.parametrize("name, other, dropout", [("splash", "xla", 0.0), ("flash", "xla", 0.0),
                                                  ("flash", "flash", 0.1)])
def test_kernels_are_split_over_the_mesh_and_drop_what_one_device_would(interpreted, name, other, dropout, heads):
    params, x, ids, weights = inputs("packed")
    ids = ids.astype(np.int32)
    mesh = sharding.make_mesh(dict(data=2, fsdp=1, tensor=2))
    with jax.set_mesh(mesh):
        ours = layer(name, heads=heads, dropout=dropout)(
            params, *sharding.global_batch(dict(a=x, b=ids, c=weights), mesh).values())
    compare(ours, layer(other, heads=heads, dropout=dropout)(params, x, ids, weights), ids, 2e-5)


def test_a_train_step_with_a_kernel_gives_the_numbers_of_plain_attention(interpreted):
    sums = {}
    for name in ("xla", "splash", "flash"):
        c = tiny.config(model__attention=name, model__max_positions=128, data__seq_len=128, data__batch_size=4,
                        model__num_layers=1, model__hidden_size=32, model__num_heads=2, model__generator_size=1.0)
        program = step.build(c, sharding.make_mesh(dict(data=2, fsdp=1, tensor=2)), tiny.SPECIAL_IDS)
        batch = sharding.global_batch(tiny.batch(0, 4, 128, 67), program.mesh)
        sums[name] = jax.device_get(program.train_step(program.init_state(), batch)[1])
    for name in ("splash", "flash"):
        for field in ("mlm_loss", "rtd_loss", "grad_norm", "replaced"):
            np.testing.assert_allclose(sums[name][field], sums["xla"][field], rtol=1e-5, err_msg=name)


# --- Flash attention with dropout -------------------------------------------------------------------


def flash_case(length, head_size=16):
    """Query, key and value [B, L, 3, H, K], piece numbers, heads' numbers, seeds, and the output's gradient."""
    rng = np.random.default_rng(length)
    ids = np.ones((2, length), np.int32)
    ids[1, length // 3:], ids[1, -5:] = 2, 0
    qkv = rng.normal(0, 1.5, (2, length, 3, 2, head_size)).astype(np.float32)
    numbers, seeds = np.arange(7, 11, dtype=np.uint32).reshape(2, 2), np.array([3, 2**32 - 4], np.uint32)
    return (qkv, ids, numbers, seeds), rng.normal(0, 1, (2, length, 2, head_size)).astype(np.float32)


def flash_gradients(case, g, threshold):
    qkv, *others = map(jnp.asarray, case)
    out, vjp = jax.vjp(lambda qkv: flash.flash(qkv, *others, threshold, True), qkv)
    (gradient,) = vjp(jnp.asarray(g, out.dtype))
    return out, *(gradient[:, :, i] for i in range(3))


@pytest.mark.parametrize("threshold", [0, 26, 200])
def test_flash_attention_with_dropout_has_the_values_and_gradients_of_the_textbook(threshold):
    case, g = flash_case(48)
    mask = flash.keep(jnp.asarray(case[2]), 48, jnp.asarray(case[3]), threshold)
    exact = textbook(*(case[0][:, :, i] for i in range(3)), case[1], mask, 256 / (256 - threshold), g)
    for ours, theirs in zip(flash_gradients(case, g, threshold), exact, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("length", [16, 64, 192, 640])
def test_flash_attention_drops_what_its_mask_says_in_rows_of_any_length(length):
    """Tiles of all sizes, and rows that end within the keys that share words."""
    case, g = flash_case(length)
    mask = flash.keep(jnp.asarray(case[2]), length, jnp.asarray(case[3]), 26)
    plain = plain_gradients((*(case[0][:, :, i] for i in range(3)), case[1], mask), g, KEPT)
    for ours, theirs in zip(flash_gradients(case, g, 26), plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_flash_attention_in_bfloat16_is_as_near_to_the_textbook_as_plain_attention():
    case, g = flash_case(48)
    case = (jnp.asarray(case[0], jnp.bfloat16), *case[1:])
    mask = flash.keep(jnp.asarray(case[2]), 48, jnp.asarray(case[3]), 26)
    parts = [case[0][:, :, i] for i in range(3)]
    plain = plain_gradients((*parts, case[1], mask), jnp.asarray(g, jnp.bfloat16), KEPT)
    exact = textbook(*parts, case[1], mask, KEPT, jnp.asarray(g, jnp.bfloat16))
    ours, theirs = ([np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y)
                     for x, y in zip(found, exact, strict=True)] for found in (flash_gradients(case, g, 26), plain))
    assert all(mine < 1.2 * other < 0.01 for mine, other in zip(ours, theirs, strict=True)), (ours, theirs)


def test_flash_attention_keeps_nothing_of_all_pairs_of_tokens():
    (qkv, *others), _ = flash_case(192)
    kept = jax.eval_shape(lambda qkv: jax.vjp(lambda qkv: flash.flash(qkv, *others, 26, True), qkv)[1], qkv)
    assert sum(x.size for x in jax.tree.leaves(kept)) < 2 * qkv.size


def test_flash_attentions_dropout_is_as_good_as_independent_draws():
    """Shares, and products of neighbours in every direction, over 4.2 million places; of 64 numbers none is beyond 4.5
    standard deviations (by chance: once in 2,300 seeds)."""
    numbers, p = jnp.arange(16, dtype=jnp.uint32).reshape(1, 16), 230 / 256
    masks = [np.asarray(flash.keep(numbers, 512, jnp.array(seeds, jnp.uint32), 26))[0] for seeds in
             ((0, 0), (1, 0), (2**31, 0), (12345, 67890))]
    unit = [((mask - p) / np.sqrt(p * (1 - p))).astype(np.float32) for mask in masks]
    found: list[float] = []
    for i, x in enumerate(unit):
        pairs = [x, x[1:] * x[:-1], x[8:] * x[:-8], x[:, 1:] * x[:, :-1], x[:, 64:] * x[:, :-64],
                 x[..., 1:] * x[..., :-1], x[..., 128:] * x[..., :-128], x[..., 256:] * x[..., :-256],
                 x[:, 1:, 1:] * x[:, :-1, :-1], *(x * y for y in unit[i + 1:])]
        found += [pair.mean(dtype=np.float64) * np.sqrt(pair.size) for pair in pairs]
        # How many are dropped in a query's and in a key's row: spread as independent draws.
        for counts in (x.sum(-1), x.sum(-2)):
            found.append((counts.var(dtype=np.float64) / 512 - 1) * np.sqrt(counts.size / 2))
    assert np.abs(found).max() < 4.5, found
    # 64 bits a query: two whose first word is the same still differ.
    alike = [flash.words([jnp.uint32([5]), jnp.uint32([second])], jnp.arange(128)) for second in (1, 2)]
    assert (alike[0] != alike[1]).all()


def test_flash_attentions_dropout_takes_its_seeds_from_the_step_and_leaves_evaluation_alone(interpreted):
    params, x, ids, _ = inputs("packed")
    module = attention.Attention(Architecture(9, 64, 64, 1, 2, 16, attention_dropout=0.1, attention="flash"))
    plain = attention.Attention(Architecture(9, 64, 64, 1, 2, 16, attention_dropout=0.1))
    arguments = {"params": params}, x, ids.astype(np.int32), None
    first, again, other = (module.apply(*arguments, False, rngs={"dropout": jax.random.key(key)}) for key in (1, 1, 2))
    assert (first == again).all() and not (first == other).all()
    np.testing.assert_allclose(module.apply(*arguments, True), plain.apply(*arguments, True), atol=1e-4)
    same = jnp.ones((2, 64, 64)), jnp.ones((2, 64), jnp.int32)    # alike but for what is dropped
    params = {"qkv_kernel": jnp.zeros((64, 3, 64)), "qkv_bias": jnp.ones((3, 64)), "out": {
        "kernel": jnp.eye(64), "bias": jnp.zeros(64)}}
    out = module.apply({"params": params}, *same, None, False, rngs={"dropout": jax.random.key(1)})
    assert len(np.unique(np.asarray(out)[..., ::32].swapaxes(1, 2).reshape(4, 64), axis=0)) == 4


# --- Lengths, fields and devices --------------------------------------------------------------------


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
    (dict(model__attention="flash3"), "model.attention='flash3'"),
])
def test_attention_that_does_not_fit_the_other_fields_is_refused_with_them(fields, named):
    with pytest.raises(config.UserError) as error:
        tiny.config(**fields)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_attention_that_does_not_fit_the_machine_or_the_length_is_refused_with_its_field(monkeypatch):
    mesh = sharding.make_mesh(dict(data=4, fsdp=1, tensor=1))
    for name, devices in (("splash", "TPU"), ("cudnn", "GPU"), ("flash", "GPU")):
        with pytest.raises(config.UserError, match=f"model.attention={name} runs on {devices}s.*CPU"):
            attention.check(name, 128, mesh)
    monkeypatch.setattr(attention, "INTERPRET", True)
    attention.check("splash", 384, mesh)
    with pytest.raises(config.UserError, match=r"data\.seq_len=200"):
        attention.check("splash", 200, mesh)
    attention.check("flash", 208, mesh, [64, 16])
    with pytest.raises(config.UserError, match=r"data\.seq_len=200 is no multiple of 16"):
        attention.check("flash", 200, mesh)
    for size in (8, 48):
        with pytest.raises(config.UserError, match=f"heads of {size}:.*model.attention=xla"):
            attention.check("flash", 208, mesh, [64, size])
    attention.check("xla", 200, mesh, [8])
    c = tiny.config(model__attention="splash")
    with pytest.raises(config.UserError, match=r"data\.seq_len=24"):
        step.build(c, mesh, tiny.SPECIAL_IDS)
    for sizes, heads in ((dict(model__num_heads=4), 4), (dict(model__num_heads=1, model__generator_size=0.5), 8)):
        flashing = tiny.config(model__attention="flash", data__seq_len=32, mesh__data=4, **sizes)
        for refusing in (lambda c: step.build(c, mesh, tiny.SPECIAL_IDS), loop.check_mesh):
            with pytest.raises(config.UserError, match=f"heads of {heads}:"):
                refusing(flashing)
    assert model.build(c.model).disc.attention == "splash"
