"""Selecting, sampling and the losses, against the float64 oracle fed with the same noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import scipy.stats
import tiny

from electra_jax import config, objectives

pytestmark = pytest.mark.usefixtures("quick_compile")

VOCAB = 300   # does not divide by the sampler's chunk of 128
SPECIALS = frozenset(tiny.SPECIAL_IDS.values())
MODES = pytest.mark.parametrize("distinct", [True, False], ids=["distinct", "with_replacement"])
SAMPLERS = pytest.mark.parametrize("sampler", ["two_level", "gumbel"])
select_positions = jax.jit(objectives.select_positions, static_argnames=(
    "mask_id", "num_masked", "mask_prob", "mask_token_prob", "distinct"))
sample_replacements = jax.jit(objectives.sample_replacements, static_argnames=(
    "sampler", "temperature", "disallow_correct"))
LENGTHS = pytest.mark.parametrize("mask_prob, seq_len", [(0.15, 16), (0.25, 37), (0.15, 64), (0.25, 128), (0.15, 128)])


def uniforms(rng, shape):
    """Multiples of 2^-23, as jax.random.uniform gives them."""
    return (rng.integers(0, 2**23, shape) / 2**23).astype(np.float32)


def draw_case(seed, mask_prob, seq_len, distinct, size=16):
    """A batch, noise and both selections, the package's and the oracle's."""
    rng = np.random.default_rng(seed)
    batch = tiny.batch(seed, size, seq_len, VOCAB)
    num_slots = oracle.slots(mask_prob, seq_len)
    noise = {"select": uniforms(rng, (size, seq_len if distinct else num_slots)),
             "show": uniforms(rng, (size, num_slots))}
    options = dict(mask_id=tiny.MASK, mask_prob=mask_prob, distinct=distinct)
    candidates = (batch["piece_ids"] > 0) & ~np.isin(batch["input_ids"], list(SPECIALS))
    ours = select_positions(batch["input_ids"], candidates, batch["piece_ids"], noise,
                            num_masked=num_slots, mask_token_prob=0.85, **options)
    theirs = oracle.select(batch, SPECIALS, noise, num_slots=num_slots, shown_prob=0.85, **options)
    return batch, ours, theirs


@MODES
@LENGTHS
def test_selection_is_the_oracles(mask_prob, seq_len, distinct):
    for seed in range(3):
        _, ours, theirs = draw_case(seed, mask_prob, seq_len, distinct)
        for name, a, b in zip(ours._fields, ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)


@MODES
@LENGTHS
def test_replaced_ids_and_labels_are_the_oracles(mask_prob, seq_len, distinct):
    collisions = 0
    for seed in range(3):
        batch, ours, (positions, weights, targets, _, _) = draw_case(seed, mask_prob, seq_len, distinct)
        rng = np.random.default_rng(seed)
        sampled = np.where(rng.random(targets.shape) < 0.3, targets, rng.integers(0, VOCAB, targets.shape))
        ids, labels = objectives.replace(jnp.asarray(batch["input_ids"]), ours, jnp.asarray(sampled, jnp.int32),
                                         distinct=distinct)
        expected = oracle.replace(batch["input_ids"], sampled, positions, weights)
        np.testing.assert_array_equal(ids, expected[0])
        np.testing.assert_array_equal(labels, expected[1])
        assert labels.sum() > 0 and not labels[:, 0].any()
        collisions += sum(int(w.sum()) - len(set(p[w > 0])) for p, w in zip(positions, weights, strict=True))
    assert (collisions == 0) == distinct   # the averaging of colliding ids has been tried


def test_sampled_ids_that_collide_give_the_floor_of_their_mean():
    out = objectives.insert(jnp.array([[2, 10, 11, 12]]), jnp.array([[20, 25, 7, 9]]), jnp.array([[2, 2, 0, 3]]),
                            distinct=False)
    np.testing.assert_array_equal(out, [[2, 10, 22, 9]])


def test_slots_are_the_published_numbers():
    for mask_prob, seq_len, slots in ((0.15, 128, 19), (0.15, 512, 79), (0.25, 128, 32), (0.25, 512, 130)):
        c = config.get_config()
        c.objective.mask_prob, c.data.seq_len = mask_prob, seq_len
        assert config.num_masked(c) == slots == oracle.slots(mask_prob, seq_len)


@MODES
def test_quota_rounds_halves_to_even_and_lies_between_one_and_the_slots(distinct):
    # 0.25 * 10 = 2.5 -> 2, 0.25 * 14 = 3.5 -> 4, 0.25 * 2 = 0.5 -> 0 -> 1; 128 tokens would give 32, slots are 31.
    for num_tokens, mask_prob, num_slots, expected in (
            (10, 0.25, 31, 2), (14, 0.25, 31, 4), (3, 0.15, 31, 1), (128, 0.25, 31, 31), (128, 0.15, 31, 19),
            (10, 0.15, 31, 2), (30, 0.15, 31, 4)):
        batch = tiny.row(np.random.default_rng(0), 128, [num_tokens], VOCAB)
        noise = {"select": np.full((1, 128 if distinct else num_slots), 0.5, np.float32),
                 "show": np.zeros((1, num_slots), np.float32)}
        candidates = (batch["piece_ids"] > 0) & (batch["input_ids"] != tiny.SEP) & (batch["input_ids"] != tiny.CLS)
        selection = select_positions(
            batch["input_ids"][None], candidates[None], batch["piece_ids"][None], noise, mask_id=tiny.MASK,
            num_masked=num_slots, mask_prob=mask_prob, mask_token_prob=0.85, distinct=distinct)
        assert selection.weights_BM.sum() == expected == oracle.quota(num_tokens, mask_prob, num_slots)


@MODES
def test_special_tokens_are_never_selected_and_unknown_ones_can_be(distinct):
    selected = set()
    for seed in range(8):
        batch, ours, _ = draw_case(seed, 0.25, 64, distinct, size=8)
        batch["input_ids"][batch["input_ids"] == 7] = tiny.UNK
        at = np.take_along_axis(batch["input_ids"], np.asarray(ours.positions_BM), 1)
        selected |= set(at[np.asarray(ours.weights_BM) > 0])
    assert not selected & SPECIALS and tiny.UNK in selected


@MODES
def test_a_row_without_candidates_stays_as_it_is(distinct):
    batch, ours, _ = draw_case(0, 0.25, 64, distinct)
    assert list(batch["piece_ids"][6]).count(1) == 2   # [CLS] [SEP]
    assert not ours.weights_BM[6].any() and not ours.shown_BM[6].any() and not ours.targets_BM[6].any()
    np.testing.assert_array_equal(ours.masked_ids_BL[6], batch["input_ids"][6])


def full_rows(num_rows, mask_prob, distinct, seq_len=128):
    """Selections over full rows with the package's own noise."""
    row = tiny.row(np.random.default_rng(0), seq_len, [seq_len], VOCAB)
    num_slots = oracle.slots(mask_prob, seq_len)
    ids, pieces = (jnp.broadcast_to(row[name], (num_rows, seq_len)) for name in ("input_ids", "piece_ids"))
    noise = objectives.draw_noise(jax.random.split(jax.random.key(1), num_rows), seq_len=seq_len,
                                  num_masked=num_slots, distinct=distinct)
    candidates = ~np.isin(ids, list(SPECIALS))
    return candidates[0], select_positions(
        ids, candidates, pieces, noise, mask_id=tiny.MASK, num_masked=num_slots, mask_prob=mask_prob,
        mask_token_prob=0.85, distinct=distinct)


# Shares for 128 tokens, from 5,000 simulated sequences of the original's algorithm.
@pytest.mark.parametrize("mask_prob, distinct_share, twice_share, masked_share",
                         [(0.15, 0.138, 0.0745, 0.1195), (0.25, 0.221, 0.1215, 0.1915)])
def test_with_replacement_the_originals_shares_come_out(mask_prob, distinct_share, twice_share, masked_share):
    _, selection = full_rows(5000, mask_prob, distinct=False)
    counts = np.zeros((5000, 128), int)
    np.add.at(counts, (np.arange(5000)[:, None], selection.positions_BM), np.asarray(selection.weights_BM, int))
    assert (counts > 0).mean() == pytest.approx(distinct_share, abs=0.001)
    assert (counts > 1).sum() / (counts > 0).sum() == pytest.approx(twice_share, abs=0.005)
    assert (selection.masked_ids_BL == tiny.MASK).mean() == pytest.approx(masked_share, abs=0.0015)


@MODES
def test_selected_positions_are_uniform_over_the_candidates(distinct):
    candidates, selection = full_rows(4000, 0.15, distinct)
    used = np.asarray(selection.weights_BM) > 0
    counts = np.bincount(np.asarray(selection.positions_BM)[used], minlength=128)
    assert not counts[~candidates].any()
    # Without replacement the counts vary less than a chi-square test expects: by the share that is left.
    spread = 1 - (19 - 1) / (candidates.sum() - 1) if distinct else 1
    statistic = scipy.stats.chisquare(counts[candidates]).statistic / spread
    assert 1e-3 < scipy.stats.chi2.sf(statistic, candidates.sum() - 1) < 1 - 1e-3
    if distinct:
        assert all(len(set(row)) == 19 for row in np.asarray(selection.positions_BM))
    assert np.asarray(selection.shown_BM)[used].mean() == pytest.approx(0.85, abs=0.005)


def test_noise_of_a_row_depends_on_its_key_alone_and_no_number_serves_twice():
    keys = jax.random.split(jax.random.key(0), 6)
    draws = (functools.partial(objectives.draw_noise, seq_len=32, num_masked=5, distinct=True),
             functools.partial(objectives.draw_sampler_noise, num_masked=5, vocab_size=9, sampler="gumbel"))
    for draw in draws:
        whole, part = jax.jit(draw)(keys), jax.jit(draw)(keys[2:4])
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[2:4], b), whole, part)
        assert all(len(np.unique(x)) == x.size for x in jax.tree.leaves(whole))   # no number is used twice
    selection, sampler = (jax.tree.leaves(jax.jit(draw)(keys)) for draw in draws)
    assert not np.intersect1d(np.concatenate([x.ravel() for x in selection]), sampler[0]).size


# --- Samplers -----------------------------------------------------------------------------------

LOGITS = {
    "flat": np.zeros(VOCAB),
    "natural": np.random.default_rng(0).normal(0, 2, VOCAB),
    "peaked": np.where(np.arange(VOCAB) == 259, 7.0, np.random.default_rng(1).normal(0, 1, VOCAB)),
    "with_zeros": np.where(np.arange(VOCAB) % 3 == 1, -np.inf, np.random.default_rng(2).normal(0, 1, VOCAB)),
    "one_chunk": np.where(np.arange(VOCAB) // 128 == 1, np.linspace(-2, 2, VOCAB), -1e4),
}


@functools.cache
def sampler_noise(sampler, rows, slots):
    keys = jax.random.split(jax.random.key(3), rows)
    return objectives.draw_sampler_noise(keys, num_masked=slots, vocab_size=VOCAB, sampler=sampler)


@SAMPLERS
def test_sampled_ids_are_the_oracles(sampler):
    for seed, options in enumerate(({}, {"temperature": 0.7}, {"disallow_correct": True}, {"temperature": 3.0})):
        rng = np.random.default_rng(seed)
        logits = rng.normal(0, 3, (8, 20, VOCAB)).astype(np.float32)
        targets = np.where(rng.random((8, 20)) < 0.5, logits.argmax(-1), rng.integers(0, VOCAB, (8, 20)))
        noise = uniforms(rng, (8, 20, 2 if sampler == "two_level" else VOCAB))
        ours = sample_replacements(logits, targets, noise, sampler=sampler, **options)
        theirs, margin = oracle.sample(logits, targets, noise, sampler, **options)
        clear = margin > 1e-5   # where float32 cannot tip the decision
        assert clear.mean() > 0.95
        np.testing.assert_array_equal(np.asarray(ours)[clear], theirs[clear])


@SAMPLERS
@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"temperature": 0.5, "disallow_correct": True}],
                         ids=["plain", "warm", "cold_never_correct"])
def test_samples_follow_the_softmax(sampler, kind, options):
    target, (rows, slots) = 258, (400, 100)
    expected = oracle.token_probabilities(LOGITS[kind], target, **options) * rows * slots
    logits = jnp.broadcast_to(jnp.asarray(LOGITS[kind], jnp.float32), (rows, slots, VOCAB))
    noise = sampler_noise(sampler, rows, slots)
    drawn = np.asarray(sample_replacements(logits, np.full((rows, slots), target), noise, sampler=sampler, **options))
    counts = np.bincount(drawn.ravel(), minlength=VOCAB)
    assert len(counts) == VOCAB and not counts[expected < 1e-12].any()
    rare = expected < 5   # too few to test one by one: together
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    if expected[-1] < 1:
        assert counts[-1] < 10
        counts, expected = counts[:-1], expected[:-1]
    assert len(counts) > 1
    assert scipy.stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-4


@SAMPLERS
@pytest.mark.parametrize("vocab_size", [1, 128, 130, 300, 1000])
def test_extreme_uniforms_give_valid_ids(sampler, vocab_size):
    logits = np.random.default_rng(0).normal(0, 3, (1, 64, vocab_size)).astype(np.float32)
    logits[0, :, : vocab_size // 2] = -1e4   # probability zero in front
    targets = np.zeros((1, 64), np.int32)
    for a, b in ((0, 0), (0, 0.99999994), (0.99999994, 0), (0.99999994, 0.99999994), (1, 1)):
        noise = np.full((1, 64, 2 if sampler == "two_level" else vocab_size), a, np.float32)
        noise[..., 1::2] = b
        drawn = sample_replacements(logits, targets, noise, sampler=sampler)
        assert np.all((drawn >= vocab_size // 2) & (drawn < vocab_size)), (a, b)


def test_gumbel_noise_reaches_as_far_as_float32_does():
    """A uniform of 1 - 2^-23 is worth 15.9 nats, which a larger constant inside the logarithms would cut off."""
    logits = np.array([[[15.0, 0.0]]], np.float32)
    for uniform, drawn in ((1 - 2**-23, 1), (1 - 2**-21, 0)):
        noise = np.array([[[0.5, uniform]]], np.float32)
        assert sample_replacements(logits, np.zeros((1, 1), int), noise, sampler="gumbel") == drawn
        assert oracle.draw_gumbel(oracle.token_probabilities(logits[0, 0], 0), noise[0, 0])[0] == drawn


@pytest.mark.parametrize("order, entries", [("native", 400), ("tree", 128)])
def test_tokens_of_probability_zero_are_never_drawn_in_whatever_order_sums_are_rounded(order, entries, monkeypatch):
    """Running sums that are added up in blocks or trees may fall, or move at an entry that adds nothing.

    Such places are looked for in the sums themselves, and the uniforms around them are tried. (On a CPU, XLA adds
    up to 256 entries in order.)
    """
    if order == "tree":
        monkeypatch.setattr(jnp, "cumsum", lambda x, axis=-1: jax.lax.associative_scan(jnp.add, x, axis=axis))
    monkeypatch.setattr(objectives, "SAMPLER_CHUNK", entries)
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (500, entries)).astype(np.float32)
    empty = rng.random(logits.shape) < 0.5
    logits[empty] = -1000
    running = np.asarray(jnp.cumsum(jnp.exp(logits - logits.max(-1, keepdims=True)), -1))
    rows, places = np.nonzero((np.diff(running, axis=-1) != 0) & empty[:, 1:])
    assert len(rows) > 50
    between = (running[rows, places] + running[rows, places + 1]) / 2 / running[rows, -1]
    uniform = np.clip(np.round(between * 2**23)[:, None] + np.arange(-2, 3), 0, 2**23 - 1) / 2**23
    noise = jnp.stack([jnp.zeros_like(uniform), uniform], -1).astype(jnp.float32)
    logits = jnp.broadcast_to(logits[rows][:, None], (*uniform.shape, entries))
    sample = jax.jit(functools.partial(objectives.sample_replacements, sampler="two_level"))
    drawn = sample(logits, jnp.zeros(uniform.shape, jnp.int32), noise)
    assert not np.take_along_axis(empty[rows], np.asarray(drawn), -1).any()


# --- Losses -------------------------------------------------------------------------------------


def test_losses_are_the_oracles():
    rng = np.random.default_rng(0)
    for scale in (0.1, 5.0, 60.0):
        logits = rng.normal(0, scale, (4, 6, VOCAB)).astype(np.float32)
        targets, weights = rng.integers(0, VOCAB, (4, 6)), (rng.random((4, 6)) < 0.7).astype(np.float32)
        targets[0] = logits[0].argmax(-1)
        total, weight, correct = objectives.mlm_loss(logits, targets, weights)
        expected = oracle.mlm_loss(logits, targets, weights)
        np.testing.assert_allclose((total, weight), expected, rtol=1e-5)
        np.testing.assert_array_equal(correct, logits.argmax(-1) == targets)

        logits = rng.normal(0, scale, (4, 20)).astype(np.float32)
        labels, pieces = rng.integers(0, 2, (4, 20)), rng.integers(0, 3, (4, 20))
        rtd = objectives.rtd_loss(logits, labels, (pieces > 0).astype(np.float32))
        np.testing.assert_allclose(rtd, oracle.rtd_loss(logits, labels, pieces), rtol=1e-5)
        np.testing.assert_allclose(
            objectives.mean(total, weight) + 50 * objectives.mean(*rtd),
            oracle.joint_loss(expected, oracle.rtd_loss(logits, labels, pieces)), rtol=1e-5)


@pytest.mark.parametrize("by_chunks", [True, False])
def test_the_gradient_of_mlm_is_softmax_minus_target(by_chunks):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 5, (4, 6, VOCAB)).astype(np.float32)
    targets, weights = rng.integers(0, VOCAB, (4, 6)), (rng.random((4, 6)) < 0.7).astype(np.float32)
    gradient = jax.grad(lambda x: 3 * objectives.mlm_loss(x, targets, weights, by_chunks=by_chunks)[0])(logits)
    softmax = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    exact = softmax / softmax.sum(-1, keepdims=True) - np.eye(VOCAB)[targets]
    np.testing.assert_allclose(gradient, 3 * exact * weights[..., None], rtol=0, atol=2e-6)


def test_an_empty_batch_has_loss_zero():
    total, weight, _ = objectives.mlm_loss(jnp.zeros((1, 2, 9)), jnp.zeros((1, 2), int), jnp.zeros((1, 2)))
    assert objectives.mean(total, weight) == 0
