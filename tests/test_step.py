"""The joint loss and its gradient against the float64 oracle, and the metrics made of its sums."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import tiny

from electra_jax import config, model, objectives, sharding, step
from electra_jax.chunks import sum_over_chunks

pytestmark = pytest.mark.usefixtures("quick_compile")

CASES = {
    "default": {},
    "reference": dict(objective__distinct_positions=False, objective__sampler="gumbel", objective__mask_prob=0.25),
    "own_embeddings": dict(model__sharing="none", objective__temperature=0.7, model__vocab_size=200),
    "all_shared": dict(model__sharing="all", model__generator_size=1.0, objective__disallow_correct=True),
    "pre_norm_rotary": dict(model__norm="pre", model__positions="rotary", data__seq_len=29, objective__mlm_weight=2.0),
    "equal_widths": dict(model__embedding_size=16, objective__rtd_weight=20.0, objective__mask_token_prob=1.0),
    "uniform_generator": dict(objective__uniform_generator=True),
    "mlm": dict(objective__name="mlm"),
}


class Case:
    """A config with parameters and a batch, run by the package and by the oracle from the same key."""

    def __init__(self, **fields):
        self.config = c = tiny.config(**fields)
        self.objective = step.Objective(c, tiny.SPECIAL_IDS)
        self.params = tiny.params(lambda: model.init_params(
            self.objective.module, jax.random.key(0), self.objective.init_method))
        self.batch = tiny.batch(3, c.data.batch_size, c.data.seq_len, c.model.vocab_size)
        self.key = jax.random.key(11)
        row_keys, _ = self.objective._keys(self.key, self.batch)
        shape = dict(num_masked=oracle.slots(c.objective.mask_prob, c.data.seq_len))
        noise = objectives.draw_noise(row_keys, seq_len=c.data.seq_len, distinct=c.objective.distinct_positions,
                                      **shape)
        self.selection = oracle.select(
            self.batch, set(tiny.SPECIAL_IDS.values()), jax.tree.map(np.asarray, noise), mask_id=tiny.MASK,
            num_slots=shape["num_masked"], mask_prob=c.objective.mask_prob, shown_prob=c.objective.mask_token_prob,
            distinct=c.objective.distinct_positions)
        self.sampler_noise = objectives.draw_sampler_noise(
            row_keys, vocab_size=c.model.vocab_size, sampler=c.objective.sampler, **shape)

    def gradients(self):
        return jax.jit(functools.partial(self.objective.gradients, microbatches=1))(self.params, self.batch, self.key)

    def oracle(self, params=None, **options):
        return oracle.forward(tiny.float64(self.params) if params is None else params, self.config, self.batch,
                              self.selection, self.sampler_noise, **options)


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_joint_loss_and_its_sums_are_the_oracles(fields):
    case = Case(**fields)
    sums = jax.jit(case.objective.evaluate)(case.params, case.batch, case.key)
    expected = case.oracle()
    for part in ("mlm", "rtd"):
        if expected[part]:
            assert expected[part][1] > 5
            np.testing.assert_allclose((sums[f"{part}_loss"], sums[f"{part}_weight"]), expected[part], rtol=1e-5)
        else:
            assert f"{part}_loss" not in sums
    for name in ("mlm_correct", "mlm_shown", "replaced", "rtd_correct"):
        if name in expected:
            assert sums[name] == expected[name], name
    if expected["mlm"]:
        assert sums["mlm_shown_loss"] == pytest.approx(expected["mlm_shown_loss"], rel=1e-5)
    if expected["rtd"]:
        assert expected["margin"][case.selection[1] > 0].min() > 1e-5   # no draw that rounding could tip
        assert expected["replaced"] > 5
        real = np.isin(case.batch["input_ids"], (tiny.CLS, tiny.SEP, tiny.PAD), invert=True)
        assert sums["auc_histograms"].sum() == real.sum()
        assert sums["auc_histograms"][1].sum() == expected["replaced"]
    assert step.summarize(sums, case.config)["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("fields", [
    dict(data__batch_size=4, data__seq_len=18),
    dict(data__batch_size=4, data__seq_len=18, model__norm="pre", model__positions="rotary", model__sharing="none",
         objective__distinct_positions=False),
    dict(data__batch_size=4, data__seq_len=18, model__sharing="all", model__generator_size=1.0),
    dict(data__batch_size=4, data__seq_len=18, objective__name="mlm"),
], ids=["default", "pre_norm_rotary_own_embeddings", "all_shared", "mlm"])
def test_gradient_is_the_slope_of_the_oracles_loss(fields):
    """Central differences with the replacements held fixed: three entries of every parameter tensor."""
    case = Case(**fields)
    grads, sums = case.gradients()
    assert step.summarize(sums, case.config)["loss"] == pytest.approx(case.oracle()["loss"], rel=1e-5)
    sampled = case.oracle().get("sampled")
    exact, rng, width = tiny.float64(case.params), np.random.default_rng(0), 1e-5
    values = tiny.flat(exact)   # views into `exact`: a change here is seen by the oracle
    for name, grad in tiny.flat(grads).items():
        scale = max(float(np.abs(grad).max()), 1e-2)
        for flat_index in {int(np.abs(grad).argmax()), *rng.integers(0, grad.size, 2).tolist()}:
            index = np.unravel_index(flat_index, grad.shape)
            ends = []
            for sign in (1, -1):
                values[name][index] += sign * width
                ends.append(case.oracle(exact, sampled=sampled)["loss"])
                values[name][index] -= sign * width
            slope = (ends[0] - ends[1]) / (2 * width)
            assert grad[index] == pytest.approx(slope, abs=2e-5 * scale), (name, index)


def test_the_discriminators_loss_reaches_the_generator_through_the_shared_tables_only():
    grads, _ = Case(objective__mlm_weight=0.0, model__num_layers=1).gradients()
    largest = {name: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(part)) for name, part in grads.items()}
    assert largest["generator"] == 0 and largest["embeddings"] > 0 and largest["discriminator"] > 0


def test_bfloat16_gradients_add_up_over_thousands_of_tokens_as_float32_ones_do():
    def gradients(dtype):
        case = Case(objective__uniform_generator=True, model__dtype=dtype, data__batch_size=512)
        # At the start the terms have one sign: all tokens ask for fewer "was replaced".
        case.params = model.init_params(case.objective.module, jax.random.key(0), case.objective.init_method)
        return case.gradients()[0]

    expected, found = gradients("float32"), gradients("bfloat16")
    size = optax.tree.norm(expected)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True):
        error = jnp.linalg.norm(x - y) / (jnp.linalg.norm(x) + 1e-4 * size)   # the key's bias has no gradient
        assert error < 0.05, f"{jax.tree_util.keystr(path)}: {error:.3f}"


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_under_bfloat16_no_product_of_the_step_multiplies_float32_but_the_last_of_the_discriminator(dropout):
    """A float32 operand halves the speed of a matrix unit and doubles the traffic."""
    config = tiny.config(model__dtype="bfloat16", model__hidden_dropout=dropout, model__attention_dropout=dropout)
    program = step.build(config, sharding.make_mesh(config.mesh, jax.devices()[:1]), tiny.SPECIAL_IDS)
    rows = jax.ShapeDtypeStruct((config.data.batch_size, config.data.seq_len), jnp.int32)
    batch = dict.fromkeys(("input_ids", "token_type_ids", "piece_ids", "position_ids"), rows)
    text = program.train_step.lower(program.abstract_state, batch).as_text()
    products = re.findall(r"dot_general .* : \(tensor<(\S+)>, tensor<(\S+)>\)", text)
    tokens, width = math.prod(rows.shape), config.model.hidden_size
    assert len(products) > 40
    shapes = {pair for pair in products if any(operand.endswith("f32") for operand in pair)}
    assert shapes == {(f"{tokens}x{width}xf32", f"{width}x1xf32"), (f"{tokens}x1xf32", f"{tokens}x{width}xf32"),
                      (f"{tokens}x1xf32", f"{width}x1xf32")}


def test_accuracy_counts_masked_tokens_only():
    case = Case(objective__name="mlm", objective__mask_token_prob=0.5)
    case.params["generator"]["head"]["bias"][9] = 100   # always guessed, and often right
    often = (case.batch["input_ids"] > tiny.MASK) & (np.arange(24) % 2 == 0)
    case.batch["input_ids"] = np.where(often, 9, case.batch["input_ids"]).astype(np.int32)
    sums = jax.jit(case.objective.evaluate)(case.params, case.batch, case.key)
    selection = jax.jit(case.objective.select)(case.batch, case.objective._keys(case.key, case.batch)[0])
    right, shown = np.asarray(selection.targets_BM) == 9, np.asarray(selection.shown_BM)
    assert (right & ~shown & (selection.weights_BM > 0)).any()
    assert sums["mlm_correct"] == (right & shown).sum() > 0 and sums["mlm_shown"] == shown.sum()


def test_every_row_of_a_batch_draws_for_itself():
    case = Case()
    batch = {name: np.stack([x[0]] * 16) for name, x in case.batch.items()}
    row_keys, _ = case.objective._keys(case.key, batch)
    selection = jax.jit(case.objective.select)(batch, row_keys)
    assert len({tuple(row) for row in np.asarray(selection.positions_BM)}) == 16


def test_a_vocabulary_padded_beyond_the_tokenizer_changes_nothing():
    case = Case()
    size, extra = case.config.model.vocab_size, 70   # into the next chunk of the sampler
    padded = step.Objective(tiny.config(model__vocab_size=size + extra), tiny.SPECIAL_IDS, num_tokens=size)
    params = jax.tree.map(lambda x: x, case.params)
    rows = jax.random.normal(jax.random.key(5), (extra, case.config.model.embedding_size))
    table = params["embeddings"]["word_embeddings"]
    table["embedding"] = jnp.concatenate([table["embedding"], rows])
    head = params["generator"]["head"]
    head["bias"] = jnp.concatenate([head["bias"], jnp.full(extra, 9.0)])   # would be the most likely tokens
    ours, theirs = (jax.jit(objective.evaluate)(p, case.batch, case.key)
                    for objective, p in ((padded, params), (case.objective, case.params)))
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-6, err_msg=name)
    assert jax.jit(padded.inspect)(params, case.batch, case.key)["input_ids"].max() < size


# --- Chunks of slots ----------------------------------------------------------------------------

CHUNKED = {
    "mlm": CASES["mlm"], "own_embeddings": CASES["own_embeddings"],
    "reference,microbatches": CASES["reference"] | dict(optimizer__accumulation_steps=2),
}


def same_to_rounding(ours, theirs, rtol=1e-6):
    """Each tensor within rounding of the other, by its largest entry."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=rtol, atol=rtol * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_of_slots_give_the_loss_gradient_and_samples_of_all_at_once(name):
    case = Case(**CHUNKED[name])
    size, count = case.config.model.vocab_size, case.config.optimizer.accumulation_steps
    case.batch["input_ids"] = np.minimum(case.batch["input_ids"], size - 4)
    results = []
    for chunks in (1, 2):   # 3 or 6 slots: one number that does not divide, one that does
        objective = step.Objective(tiny.config(**CHUNKED[name] | {"objective__mlm_chunks": chunks}), tiny.SPECIAL_IDS,
                                   num_tokens=size - 3)   # three rows only round the table up

        @jax.jit
        def both(params, batch, key, objective=objective):
            seen = None if objective.is_mlm else objective.inspect(params, batch, key)["input_ids"]
            return *objective.gradients(params, batch, key, count), objective.evaluate(params, batch, key), seen

        results.append(both(case.params, case.batch, case.key))
    (grads, sums, evaluated, seen), (their_grads, their_sums, their_evaluated, their_seen) = reversed(results)
    same_to_rounding(tiny.flat(grads), tiny.flat(their_grads), rtol=3e-6)
    same_to_rounding(sums, their_sums)
    same_to_rounding(evaluated, their_evaluated)
    assert their_sums["mlm_shown"] > 5
    assert np.abs(their_grads["generator"]["head"]["dense"]["kernel"]).max() > 1e-4
    if name != "mlm":
        np.testing.assert_array_equal(seen, their_seen)
        assert (seen != case.batch["input_ids"]).sum() > 5


def largest_array(objective, case) -> int:
    """Elements of the largest float32 array that the compiled gradient holds."""
    compiled = jax.jit(functools.partial(objective.gradients, microbatches=1)).lower(
        case.params, case.batch, case.key).compile()
    shapes = re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_with_chunks_the_logits_of_all_slots_never_exist():
    fields = dict(model__vocab_size=2000, objective__mask_prob=0.25)
    case = Case(**fields)
    all_slots = case.config.data.batch_size * case.objective.num_masked * 2000
    assert largest_array(case.objective, case) >= all_slots
    chunked = step.Objective(tiny.config(objective__mlm_chunks=3, **fields), tiny.SPECIAL_IDS)
    assert largest_array(chunked, case) <= all_slots / 3 * 2048 / 2000   # the sampler rounds the vocabulary up


# --- Dropout ------------------------------------------------------------------------------------


def training_sums(**fields):
    c = tiny.config(**dict(model__hidden_dropout=0.3, model__attention_dropout=0.3) | fields)
    objective, case = step.Objective(c, tiny.SPECIAL_IDS), Case()
    return jax.jit(functools.partial(objective.gradients, microbatches=2))(case.params, case.batch, case.key)[1]


def test_more_chunks_than_slots_are_a_chunk_a_slot():
    def function(params, x, rest):
        return jnp.sum(x * params), ({}, x)

    x = jnp.ones((2, 3, 4))
    traced = jax.make_jaxpr(lambda p, x: sum_over_chunks(function, 1000, p, x, x))(jnp.ones(4), x)
    assert "length=3" in str(traced) and "length=1000" not in str(traced)


def test_a_generator_without_dropout_trains_and_samples_as_in_evaluation():
    case = Case()
    exact = jax.jit(case.objective.evaluate)(case.params, case.batch, case.key)
    sums, dropped = training_sums(objective__generator_dropout=False), training_sums()
    for name in ("mlm_loss", "mlm_shown_loss", "mlm_correct", "replaced"):
        np.testing.assert_allclose(sums[name], exact[name], rtol=1e-5)
    assert abs(dropped["mlm_loss"] - exact["mlm_loss"]) > 0.1 and abs(sums["rtd_loss"] - exact["rtd_loss"]) > 0.1


@pytest.mark.parametrize("rng", ["rbg", "unsafe_rbg"])
def test_another_generator_of_dropouts_bits_changes_nothing_but_dropout(rng):
    sums, theirs = (training_sums(run__dropout_rng=name, objective__generator_dropout=False)
                    for name in (rng, "threefry"))
    for name in ("mlm_loss", "mlm_weight", "mlm_shown", "mlm_correct", "replaced"):
        assert sums[name] == theirs[name], name
    assert sums["rtd_loss"] != theirs["rtd_loss"]
    assert training_sums(run__dropout_rng=rng)["mlm_loss"] != training_sums()["mlm_loss"]


def test_training_starts_at_the_loss_of_guessing():
    c = tiny.config(model__vocab_size=1000, model__hidden_size=64, model__embedding_size=64, model__generator_size=0.25,
                    model__num_heads=1)
    objective = step.Objective(c, tiny.SPECIAL_IDS)

    @jax.jit
    def first(key, batch):
        return objective.evaluate(model.init_params(objective.module, key), batch, key)

    sums = first(jax.random.key(0), tiny.batch(0, 8, 24, 1000))
    assert step.summarize(sums, c)["loss"] == pytest.approx(
        math.log(1000) + 50 * math.log(2), abs=0.5)


def test_dropout_differs_from_step_to_step_and_from_microbatch_to_microbatch():
    """Rows of one candidate always select it, so that only dropout varies between keys.

    Eight microbatches of such a row vary eight times as much as one; with one mask for all, 64 times.
    """
    c = tiny.config(objective__name="mlm", objective__mask_token_prob=1.0, model__hidden_dropout=0.3,
                    model__num_layers=1)
    objective = step.Objective(c, tiny.SPECIAL_IDS)
    params = tiny.params(lambda: model.init_params(objective.module, jax.random.key(0), objective.init_method))
    row = tiny.row(np.random.default_rng(0), 24, [3], c.model.vocab_size)

    def variance(rows):
        batch = {name: jnp.asarray(np.stack([x] * rows)) for name, x in row.items()}
        losses = jax.jit(jax.vmap(lambda key: objective.gradients(params, batch, key, rows)[1]["mlm_loss"]))(
            jax.random.split(jax.random.key(0), 400))
        return np.var(losses)

    assert variance(1) > 1e-3
    assert 5 < variance(8) / variance(1) < 12


def test_both_networks_drop_different_entries_of_the_shared_embeddings():
    c = tiny.config(model__sharing="all", model__generator_size=1.0, model__hidden_dropout=0.3, model__num_layers=1)
    objective = step.Objective(c, tiny.SPECIAL_IDS)
    params = tiny.params(lambda: model.init_params(objective.module, jax.random.key(0)))
    batch = jax.tree.map(jnp.asarray, tiny.batch(0, 8, 24, c.model.vocab_size))
    apply, keys = objective.module.apply, []

    class Spy:
        """Notes the dropout key that each network gets."""

        def apply(self, *args, rngs, **options):
            keys.append(jax.random.key_data(rngs["dropout"]))
            return apply(*args, rngs=rngs, **options)

    @jax.jit
    def dropout_keys(key):
        objective.module = Spy()
        row_keys, dropout_key = objective._keys(key, batch)
        objective.forward(params, batch, objective.select(batch, row_keys), row_keys, dropout_key)
        return keys

    first, second = dropout_keys(jax.random.key(0))
    assert (first != second).any()


def test_inspection_shows_what_the_discriminator_saw():
    case = Case()
    ours = jax.jit(case.objective.inspect)(case.params, case.batch, case.key)
    sampled = case.oracle()["sampled"]
    positions, weights = case.selection[:2]
    ids, labels = oracle.replace(case.batch["input_ids"], sampled, positions, weights)
    np.testing.assert_array_equal(ours["input_ids"], ids)
    np.testing.assert_array_equal(ours["labels"], labels)
    logits = oracle.discriminator_logits(tiny.float64(case.params), case.config.model, ids, case.batch)
    np.testing.assert_allclose(ours["probabilities"], 1 / (1 + np.exp(-logits)), atol=1e-5)


def test_summary_divides_sums_once():
    c = config.get_config()
    c.objective.mlm_weight, c.objective.rtd_weight = 2.0, 50.0
    histograms = np.zeros((2, 8))
    histograms[0, 2], histograms[1, 5], histograms[1, 2] = 80, 10, 10
    sums = {"mlm_loss": 300.0, "mlm_weight": 100.0, "mlm_correct": 17.0, "mlm_shown": 85.0,
            "mlm_shown_loss": 340.0, "rtd_loss": 200.0,
            "rtd_weight": 1000.0, "rtd_correct": 950.0, "replaced": 100.0, "auc_histograms": histograms,
            "learning_rate": 1e-4, "grad_norm": 3.0}
    out = step.summarize(sums, c)
    expected = {"loss": 2 * 3.0 + 50 * 0.2, "mlm_loss": 3.0, "mlm_masked_loss": 4.0, "mlm_accuracy": 0.2,
                "rtd_loss": 0.2, "rtd_accuracy": 0.95, "rtd_auc": 0.75, "replaced_fraction": 0.1,
                "rtd_floor": -0.1 * math.log(0.1) - 0.9 * math.log(0.9), "learning_rate": 1e-4, "grad_norm": 3.0}
    assert out == pytest.approx(expected)
    twice = step.summarize({name: 2 * value for name, value in sums.items()}, c)
    assert all(twice[name] == pytest.approx(out[name]) for name in out if name not in ("learning_rate", "grad_norm"))
    nothing = step.summarize(dict.fromkeys(sums, 0.0) | {"auc_histograms": np.zeros((2, 8))}, c)
    assert nothing["loss"] == 0 and math.isnan(nothing["mlm_accuracy"]) and math.isnan(nothing["rtd_auc"])


def test_flops_of_a_step_are_three_forward_passes_of_the_batch():
    c = tiny.config()
    program = step.build(c, sharding.make_mesh(c.mesh, jax.devices()[:1]), tiny.SPECIAL_IDS)
    assert program.flops_per_step == 3 * 8 * model.matmul_flops(c.model, 24, 3)
    c.objective.uniform_generator = True    # then there is no generator to compute
    program = step.build(c, program.mesh, tiny.SPECIAL_IDS)
    d = model.discriminator_architecture(c.model)
    head = 24 * 2 * (d.hidden_size**2 + d.hidden_size)
    assert program.flops_per_step == 3 * 8 * (model.matmul_flops(c.model, 24, 0, "mlm") + head)
