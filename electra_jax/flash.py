"""Flash attention with dropout (Dao et al. 2022) for GPUs: two Pallas kernels, compiled by Triton.

Nothing of size L x L reaches memory: the backward pass makes scores and dropout's mask anew, the mask by a hash of the
place (`words`), so that it depends on neither tiles nor mesh. Letters as in model.py; Q and C are a tile's queries and
keys (columns of the scores).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from electra_jax.layers import Array

# Queries and keys of a tile, at most, and warps: of the forward pass, and of the backward pass.
TILES, WARPS, STAGES = ((128, 64), (128, 32)), (8, 8), 2
# One random word decides about four keys, this far apart.
_APART = 128
_LOG2_E = math.log2(math.e)


# --- Dropout ----------------------------------------------------------------------------------------


def _mixed(x: Array, key: Array | None = None) -> Array:
    """A permutation of uint32 with lowbias32's shifts and factors (Wellons 2018); `key` is added half way."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x = (x if key is None else x + key) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def query_keys(number: Array, rows_Q: Array, seeds: tuple[Array, Array]) -> list[Array]:
    """64 random bits, two uint32 [Q], of each query `rows_Q` of the head `number` (counted over the whole batch)."""
    query_Q = number.astype(jnp.uint32) * np.uint32(0x9E3779B1) + rows_Q.astype(jnp.uint32)
    return [_mixed(_mixed(query_Q + seed), seed) for seed in seeds]


def words(keys: list[Array], columns_C: Array, queries: int = 0) -> Array:
    """Random words uint32 [Q, C] of queries' keys and columns; [C, Q] with `queries` 1, the queries' axis."""
    first, second = (jnp.expand_dims(key, 1 - queries) for key in keys)
    column = jnp.expand_dims(columns_C.astype(jnp.uint32) * np.uint32(0x85EBCA77), queries)
    return _mixed(first ^ column, second)


def kept(words: Array, octet: Any, threshold: int) -> Array:
    """Whether byte `octet` (0 to 3) of each word is at least `threshold`."""
    # The byte comes to the top, where those below it do not change the answer.
    shift = np.uint32(24) - np.uint32(8) * jnp.asarray(octet).astype(jnp.uint32)
    return (words << shift) >= np.uint32(threshold << 24)


def keep(number_BH: Array, length: int, seeds: Array, threshold: int) -> Array:
    """The mask that the kernels apply, bool [B, H, L, L], of seeds uint32 [2] and the numbers of the heads."""
    columns = jnp.arange(length)
    of_head = jax.vmap(jax.vmap(lambda number: kept(
        words(query_keys(number, columns, (seeds[0], seeds[1])), columns // (4 * _APART) * _APART + columns % _APART),
        columns // _APART % 4, threshold)))
    return of_head(number_BH)


# --- Kernels ----------------------------------------------------------------------------------------


def _tile(length: int, at_most: int) -> int:
    return next(size for size in (128, 64, 32, 16) if size <= at_most and length % size == 0)


def _divmod(i: Any, n: int) -> tuple[Any, Any]:
    # Triton's lowering lacks what Python's operators make of negative numbers.
    return divmod(i, n) if isinstance(i, int) else (jax.lax.div(i, np.int32(n)), jax.lax.rem(i, np.int32(n)))


def _dot(a: Array, b: Array) -> Array:
    return jax.lax.dot(a, b, preferred_element_type=jnp.float32)


def _over_keys(length: int, tile: int, threshold: int, keys: list[Array],
               visit: Callable[[Any, Callable, Any], Any], carry: Any) -> Any:
    """Folds `visit(first key, drop, carry)` over the tiles of keys; `drop(x)` zeroes what dropout takes of [Q, C]."""
    if not threshold:
        return jax.lax.fori_loop(0, length // tile, lambda i, carry: visit(i * tile, lambda x: x, carry), carry)
    apart = _APART // tile    # tiles from one byte of a word to the next

    def turn(i: Any, octets: int, carry: Any) -> Any:    # the tiles of one tile of words
        drawn, (four, one) = words(keys, i * tile + jnp.arange(tile)), _divmod(i, apart)
        for octet in range(octets):
            stays = kept(drawn, octet, threshold)
            first = ((4 * four + octet) * apart + one) * tile
            carry = visit(first, lambda x, stays=stays: jnp.where(stays, x, 0.0), carry)
        return carry

    whole, rest = divmod(length // tile, 4 * apart)
    carry = jax.lax.fori_loop(0, whole * apart, lambda i, carry: turn(i, 4, carry), carry)
    for i in range(min(rest, apart)):
        carry = turn(whole * apart + i, len(range(i, rest, apart)), carry)
    return carry


def _scores(q, k, ids_q, ids_k):
    """Scores of [Q, K] and [C, K] as powers of two, -1e9 between pieces."""
    scores = _dot(q, k.T) * (q.shape[-1]**-0.5 * _LOG2_E)
    return jnp.where(ids_q[:, None] == ids_k[None, :], scores, -1e9)


def _forward_kernel(seeds, number, ids, q_ref, k_ref, v_ref, out_ref, lse_ref, *, tiles, threshold, scale):
    rows, columns = tiles
    here = pl.program_id(0) * rows + jnp.arange(rows)
    q, ids_q = q_ref[...], ids[pl.ds(pl.program_id(0) * rows, rows)]
    keys = query_keys(number[...], here, (seeds[0], seeds[1]))

    def visit(first, drop, carry):
        sums, largest, total = carry
        there = pl.ds(first, columns)
        scores = _scores(q, k_ref[there, :], ids_q, ids[there])
        new = jnp.maximum(largest, jnp.max(scores, -1))
        probs, shrink = jnp.exp2(scores - new[:, None]), jnp.exp2(largest - new)
        sums = sums * shrink[:, None] + _dot(drop(probs).astype(q.dtype), v_ref[there, :])
        return sums, new, total * shrink + jnp.sum(probs, -1)

    start = jnp.zeros(q.shape, jnp.float32), jnp.full(rows, -jnp.inf), jnp.zeros(rows, jnp.float32)
    sums, largest, total = _over_keys(ids.shape[0], columns, threshold, keys, visit, start)
    out_ref[...] = (sums * (scale / total)[:, None]).astype(out_ref.dtype)
    lse_ref[...] = largest + jnp.log2(total)


def _backward_kernel(seeds, number, ids, q_ref, k_ref, v_ref, g_ref, lse_ref, sums_ref, out_ref, *, tiles, threshold,
                     scale):
    """Gradients of one tile of tokens: as keys and values, over all queries; then as queries, over all keys."""
    (tile, other), length, seeds = tiles, ids.shape[0], (seeds[0], seeds[1])
    first = pl.program_id(0) * tile
    mine, here, ids_mine = pl.ds(first, tile), first + jnp.arange(tile), ids[pl.ds(first, tile)]
    zeros = jnp.zeros((tile, q_ref.shape[-1]), jnp.float32)

    k, v = k_ref[mine, :], v_ref[mine, :]
    unit, column = _divmod(here, _APART)
    four, octet = _divmod(unit, 4)

    def over_queries(i, carry):    # scores here are [C, Q]
        g_k, g_v = carry
        there = pl.ds(i * other, other)
        q, g = q_ref[there, :], g_ref[there, :]
        probs = jnp.exp2(_scores(k, q, ids_mine, ids[there]) - lse_ref[there][None, :])
        g_probs, dropped = _dot(v, g.T) * scale, probs * scale
        if threshold:
            keys = query_keys(number[...], i * other + jnp.arange(other), seeds)
            stays = kept(words(keys, four * _APART + column, queries=1), octet[:, None], threshold)
            g_probs, dropped = jnp.where(stays, g_probs, 0.0), jnp.where(stays, dropped, 0.0)
        g_scores = probs * (g_probs - sums_ref[there][None, :])
        return g_k + _dot(g_scores.astype(q.dtype), q), g_v + _dot(dropped.astype(q.dtype), g)

    g_k, g_v = jax.lax.fori_loop(0, length // other, over_queries, (zeros, zeros))

    q, g, lse, sums = q_ref[mine, :], g_ref[mine, :], lse_ref[mine], sums_ref[mine]

    def over_keys(first, drop, g_q):
        there = pl.ds(first, other)
        k = k_ref[there, :]
        probs = jnp.exp2(_scores(q, k, ids_mine, ids[there]) - lse[:, None])
        g_scores = probs * (drop(_dot(g, v_ref[there, :].T) * scale) - sums[:, None])
        return g_q + _dot(g_scores.astype(q.dtype), k)

    g_q = _over_keys(length, other, threshold, query_keys(number[...], here, seeds), over_keys, zeros)
    root = q.shape[-1]**-0.5
    for i, gradient in enumerate((g_q * root, g_k * root, g_v)):
        out_ref[:, i, :] = gradient.astype(out_ref.dtype)


# --- Calls ------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def flash(qkv_BLTHK: Array, ids_BL: Array, number_BH: Array, seeds: Array, threshold: int, interpret: bool) -> Array:
    """Attention [B, L, H, K] of query, key and value [B, L, 3, H, K] among equal `ids`.

    Of 256 probabilities `threshold` are dropped, by `seeds` uint32 [2] and the head's number in the whole batch,
    uint32 [B, H]. L is a multiple of 16, K a power of two of 16 and more. `interpret` runs the kernels on any device.
    """
    return _forward(qkv_BLTHK, ids_BL, number_BH, seeds, threshold, interpret)[0]


def _call(kernel, which: int, tile: int, arrays: list, results: list, interpret: bool) -> list[Array]:
    """Runs a kernel for each tile of tokens, head and row. Arrays and results: (array or its shape, its block)."""
    options = {}
    if not interpret:
        from jax.experimental.pallas import triton  # not there on every platform
        options["compiler_params"] = triton.CompilerParams(num_warps=WARPS[which], num_stages=STAGES)
    B, L, _, H, _ = arrays[3][0].shape
    return pl.pallas_call(
        kernel, grid=(L // tile, H, B), in_specs=[spec for _, spec in arrays],
        out_shape=[shape for shape, _ in results], out_specs=[spec for _, spec in results], interpret=interpret,
        name=("flash_forward", "flash_backward")[which], **options)(*(array for array, _ in arrays))


def _inputs(qkv_BLTHK, ids_BL, number_BH, seeds, tile: int | None = None) -> list:
    """Both kernels' first inputs with their blocks; a `tile` of the queries, or all of them."""
    _, L, _, _, K = qkv_BLTHK.shape
    blocks = [pl.BlockSpec((None, L, None, None, K), lambda i, h, b, t=t: (b, 0, t, h, 0)) for t in range(3)]
    if tile:
        blocks[0] = pl.BlockSpec((None, tile, None, None, K), lambda i, h, b: (b, i, 0, h, 0))
    return [(seeds, pl.BlockSpec((2,), lambda i, h, b: (0,))),
            (number_BH, pl.BlockSpec((None, None), lambda i, h, b: (b, h))),
            (ids_BL, pl.BlockSpec((None, L), lambda i, h, b: (b, 0))), *((qkv_BLTHK, block) for block in blocks)]


def _forward(qkv_BLTHK, ids_BL, number_BH, seeds, threshold, interpret):
    B, L, _, H, K = qkv_BLTHK.shape
    tiles = tuple(_tile(L, size) for size in TILES[0])
    kernel = functools.partial(_forward_kernel, tiles=tiles, threshold=threshold, scale=256 / (256 - threshold))
    results = [(jax.ShapeDtypeStruct((B, L, H, K), qkv_BLTHK.dtype),
                pl.BlockSpec((None, tiles[0], None, K), lambda i, h, b: (b, i, h, 0))),
               (jax.ShapeDtypeStruct((B, H, L), jnp.float32),
                pl.BlockSpec((None, None, tiles[0]), lambda i, h, b: (b, h, i)))]
    out_BLHK, lse_BHL = _call(kernel, 0, tiles[0], _inputs(qkv_BLTHK, ids_BL, number_BH, seeds, tiles[0]), results,
                              interpret)
    return out_BLHK, (qkv_BLTHK, ids_BL, number_BH, seeds, out_BLHK, lse_BHL)


def _backward(threshold, interpret, kept, g_BLHK):
    *inputs, out_BLHK, lse_BHL = kept
    _, L, _, _, K = inputs[0].shape
    tiles = tuple(_tile(L, size) for size in TILES[1])
    sums_BHL = jnp.einsum("blhk,blhk->bhl", g_BLHK, out_BLHK, preferred_element_type=jnp.float32)
    kernel = functools.partial(_backward_kernel, tiles=tiles, threshold=threshold, scale=256 / (256 - threshold))
    by_head = pl.BlockSpec((None, None, L), lambda i, h, b: (b, h, 0))
    more = [(g_BLHK, pl.BlockSpec((None, L, None, K), lambda i, h, b: (b, 0, h, 0))), (lse_BHL, by_head),
            (sums_BHL, by_head)]
    results = [(jax.ShapeDtypeStruct(inputs[0].shape, inputs[0].dtype),
                pl.BlockSpec((None, tiles[0], 3, None, K), lambda i, h, b: (b, i, 0, h, 0)))]
    return *_call(kernel, 1, tiles[0], _inputs(*inputs) + more, results, interpret), None, None, None


flash.defvjp(_forward, _backward)
