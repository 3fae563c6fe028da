"""Replaced-token detection as pure functions of arrays: select, sample, replace, losses (paper, section 3.1).

All randomness comes in as explicit arrays of uniforms (`draw_noise`), so that an oracle fed with the
same arrays must agree exactly. Letters as in model.py; M is the number of slots for selected positions.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

# Vocabulary entries a chunk of the two-level sampler. About the root of 30,522, and one vector row of a TPU.
SAMPLER_CHUNK = 128


class Selection(NamedTuple):
    """Which positions are predicted, and what the generator sees."""

    positions_BM: Array     # int32; slots beyond the quota point at 0
    weights_BM: Array       # float32, 1 for a used slot, else 0
    targets_BM: Array       # int32, the original id; 0 in unused slots
    shown_BM: Array         # bool: the slot's position shows as [MASK]
    masked_ids_BL: Array    # int32, input of the generator


def draw_noise(row_keys: Array, *, seq_len: int, num_masked: int, distinct: bool) -> dict[str, Array]:
    """Draws the uniforms of the selection for rows with the given keys [B].

    One key a row keeps a row's draws the same on any mesh and any number of microbatches.
    """
    select_shape = (seq_len,) if distinct else (num_masked,)

    def row(key):
        select, show = jax.random.split(key)
        return {"select": jax.random.uniform(select, select_shape), "show": jax.random.uniform(show, (num_masked,))}

    return jax.vmap(row)(row_keys)


def draw_sampler_noise(row_keys: Array, *, num_masked: int, vocab_size: int, sampler: str) -> Array:
    """Draws the uniforms of the sampler: [B, M, 2] for "two_level", [B, M, V] for "gumbel"."""
    width = 2 if sampler == "two_level" else vocab_size
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 2), (num_masked, width)))(row_keys)


def select_positions(input_ids_BL: Array, candidates_BL: Array, piece_ids_BL: Array, noise: dict[str, Array], *,
                     mask_id: int, num_masked: int, mask_prob: float, mask_token_prob: float,
                     distinct: bool) -> Selection:
    """Selects about `mask_prob` of the tokens and shows most of them as [MASK] (facts b.2).

    `candidates_BL` (bool) are the maskable positions. The quota k = max(1, min(M, round(tokens * mask_prob)))
    counts all tokens, specials included, and rounds half to even. With `distinct` the k candidates with the
    largest uniforms are taken; otherwise M independent draws with replacement, as in the original.
    """
    num_tokens_B = jnp.sum(piece_ids_BL > 0, -1).astype(jnp.float32)
    quota_B = jnp.clip(jnp.round(num_tokens_B * jnp.float32(mask_prob)), 1, num_masked).astype(jnp.int32)
    num_candidates_B = jnp.sum(candidates_BL, -1, dtype=jnp.int32)
    if distinct:
        scores_BL = jnp.where(candidates_BL, noise["select"], -1.0)
        positions_BM = jax.lax.top_k(scores_BL, num_masked)[1].astype(jnp.int32)
        quota_B = jnp.minimum(quota_B, num_candidates_B)
    else:
        # The j-th draw takes candidate number floor(u * candidates), found by its rank among the candidates.
        rank_BM = jnp.floor(noise["select"] * num_candidates_B[:, None].astype(jnp.float32)).astype(jnp.int32)
        rank_BM = jnp.minimum(rank_BM, num_candidates_B[:, None] - 1)
        running_BL = jnp.cumsum(candidates_BL, -1, dtype=jnp.int32)
        positions_BM = jax.vmap(lambda running, rank: jnp.searchsorted(running, rank + 1))(running_BL, rank_BM)
        quota_B = jnp.where(num_candidates_B > 0, quota_B, 0)
    used_BM = jnp.arange(num_masked) < quota_B[:, None]
    positions_BM = jnp.where(used_BM, positions_BM, 0).astype(jnp.int32)
    targets_BM = jnp.where(used_BM, jnp.take_along_axis(input_ids_BL, positions_BM, -1), 0)
    shown_BM = used_BM & (noise["show"] < mask_token_prob)
    masked_ids_BL = insert(input_ids_BL, jnp.full_like(positions_BM, mask_id),
                           jnp.where(shown_BM, positions_BM, 0), distinct=distinct)
    return Selection(positions_BM, used_BM.astype(jnp.float32), targets_BM, shown_BM, masked_ids_BL)


def insert(ids_BL: Array, updates_BM: Array, positions_BM: Array, *, distinct: bool) -> Array:
    """Writes `updates_BM` at `positions_BM`; position 0 never changes (facts b.3).

    Without `distinct`, updates that meet at a position are averaged and rounded down, as in the original:
    two different sampled ids become an unrelated third.
    """
    rows_B1 = jnp.arange(ids_BL.shape[0])[:, None]
    if distinct:
        return ids_BL.at[rows_B1, positions_BM].set(updates_BM).at[:, 0].set(ids_BL[:, 0])
    total_BL = jnp.zeros_like(ids_BL).at[rows_B1, positions_BM].add(updates_BM)
    count_BL = jnp.zeros_like(ids_BL).at[rows_B1, positions_BM].add(1).at[:, 0].set(0)
    return jnp.where(count_BL > 0, total_BL // jnp.maximum(count_BL, 1), ids_BL)


def sample_replacements(logits_BMV: Array, targets_BM: Array, noise: Array, *, sampler: str,
                        temperature: float = 1.0, disallow_correct: bool = False) -> Array:
    """Draws one token a slot from softmax(logits / temperature), int32 [B, M]; no gradient.

    "gumbel": argmax of logits plus Gumbel noise -log(-log(u + 1e-9) + 1e-9), as the original; float32, since
    1e-9 vanishes in less. "two_level": inverse CDF, first over chunks of SAMPLER_CHUNK entries, then within
    the chunk, one uniform each: the same distribution for two uniforms instead of V.
    """
    logits_BMV = jax.lax.stop_gradient(logits_BMV.astype(jnp.float32))
    if temperature != 1.0:
        logits_BMV = logits_BMV / temperature
    vocab_size = logits_BMV.shape[-1]
    if disallow_correct:
        logits_BMV = logits_BMV - 1000.0 * (jnp.arange(vocab_size) == targets_BM[..., None])
    if sampler == "gumbel":
        gumbel_BMV = -jnp.log(-jnp.log(noise + 1e-9) + 1e-9)
        return jnp.argmax(logits_BMV + gumbel_BMV, -1).astype(jnp.int32)
    weights = _chunks(jnp.exp(logits_BMV - jnp.max(logits_BMV, -1, keepdims=True)))
    chunk_BM = _inverse_cdf(jnp.sum(weights, -1), noise[..., 0])
    inner = jnp.take_along_axis(weights, chunk_BM[..., None, None], axis=2)[:, :, 0]
    return chunk_BM * SAMPLER_CHUNK + _inverse_cdf(inner, noise[..., 1])


def _chunks(x_BMV: Array) -> Array:
    """Splits the vocabulary's axis into parts of SAMPLER_CHUNK entries, the last one filled with zeros."""
    parts = -(-x_BMV.shape[-1] // SAMPLER_CHUNK)
    x_BMV = jnp.pad(x_BMV, ((0, 0), (0, 0), (0, parts * SAMPLER_CHUNK - x_BMV.shape[-1])))
    return x_BMV.reshape(*x_BMV.shape[:-1], parts, SAMPLER_CHUNK)


def _inverse_cdf(weights: Array, uniform: Array) -> Array:
    """First index whose running sum exceeds uniform * total; an index of weight zero is never chosen."""
    # XLA sums long rows in blocks, so the running sum may fall by a rounding error (seen above 256 entries);
    # the maximum as the total, and the exclusion of zeros, hold for any order of summation.
    running = jnp.where(weights > 0, jnp.cumsum(weights, -1), -1.0)
    total = jnp.max(running, -1)
    # u * total can round up to total; stay below, so that an index exists.
    threshold = jnp.minimum(uniform * total, jnp.nextafter(total, jnp.zeros_like(total)))
    return jnp.argmax(running > threshold[..., None], -1).astype(jnp.int32)


def replace(input_ids_BL: Array, selection: Selection, sampled_BM: Array, *, distinct: bool) -> tuple[Array, Array]:
    """Returns the discriminator's input and labels [B, L]: 1 where the token differs from the original (facts b.5)."""
    replaced_ids_BL = insert(input_ids_BL, sampled_BM, selection.positions_BM, distinct=distinct)
    return replaced_ids_BL, (replaced_ids_BL != input_ids_BL).astype(jnp.int32)


def mlm_loss(logits_BMV: Array, targets_BM: Array, weights_BM: Array, *, by_chunks: bool = True
             ) -> tuple[Array, Array, Array]:
    """Cross-entropy of the selected slots in nats as (sum, weight), and bool [B, M]: the target scores highest.

    Targets lie in [0, V), in unused slots too. `by_chunks` sums over the sampler's chunks, whose sums the compiler then
    makes once for both; logits whose vocabulary is cut over devices would be gathered for that.
    """
    cross_entropy_BM, correct_BM = _cross_entropy(logits_BMV.astype(jnp.float32), targets_BM, by_chunks)
    return jnp.sum(cross_entropy_BM * weights_BM), jnp.sum(weights_BM), correct_BM


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _cross_entropy(logits_BMV: Array, targets_BM: Array, by_chunks: bool) -> tuple[Array, Array]:
    """-log softmax(logits)[target] in nats and whether the target scores highest, [B, M] each.

    The logits are the largest array of a step: they are read once for the maximum, once for the sum, and once for the
    gradient softmax(logits) - one_hot(target), which a comparison makes, not a scatter.
    """
    return _cross_entropy_forward(logits_BMV, targets_BM, by_chunks)[0]


def _cross_entropy_forward(logits_BMV, targets_BM, by_chunks):
    top_BM = jnp.max(logits_BMV, -1)
    weights = jnp.exp(logits_BMV - top_BM[..., None])
    total_BM = jnp.sum(jnp.sum(_chunks(weights), -1) if by_chunks else weights, -1)
    target_logit_BM = jnp.take_along_axis(logits_BMV, targets_BM[..., None], -1)[..., 0]
    log_total_BM = jnp.log(total_BM) + top_BM
    return (log_total_BM - target_logit_BM, target_logit_BM >= top_BM), (logits_BMV, targets_BM, log_total_BM)


def _cross_entropy_backward(by_chunks, kept, cotangents):
    del by_chunks
    logits_BMV, targets_BM, log_total_BM = kept
    at_target = jnp.arange(logits_BMV.shape[-1]) == targets_BM[..., None]
    gradient = jnp.exp(logits_BMV - log_total_BM[..., None]) - at_target
    return gradient * cotangents[0][..., None], None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def rtd_loss(logits_BL: Array, labels_BL: Array, weights_BL: Array) -> tuple[Array, Array]:
    """Binary cross-entropy over all tokens with weight, specials included, in nats, as (sum, weight)."""
    logits_BL = logits_BL.astype(jnp.float32)
    cross_entropy_BL = jax.nn.softplus(logits_BL) - logits_BL * labels_BL
    return jnp.sum(cross_entropy_BL * weights_BL), jnp.sum(weights_BL)


def mean(total: Array, weight: Array) -> Array:
    """total / weight with the original's guard of 1e-6 against an empty batch."""
    return total / (weight + 1e-6)
