"""A loss summed over chunks of its inputs, so that what lies between inputs and loss exists for one chunk at a time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sum_over_chunks(function: Callable, chunks: int, params: Tree, x: jax.Array, rest: Tree):
    """Calls `function` on `chunks` parts of axis 1 of `x` and of the arrays in `rest`, one after the other.

    `function(params, x, rest)` returns (total, (sums, out)). Returns the same: total and the tree `sums` added up, the
    array `out` joined along axis 1. What does not divide is filled with zeros, which must add nothing to the sums.
    Differentiable in `params` and `x`, through `total` alone. As `total` is one number, each chunk's gradient is taken
    with its value and only scaled in the backward pass: nothing is computed twice, as jax.checkpoint would.
    """
    def body(carry, chunk):
        total, (sums, out) = function(params, *chunk)
        return jax.tree.map(jnp.add, carry, (total, sums)), out

    chunked = _split(chunks, (x, rest))
    (total, sums), outs = jax.lax.scan(body, _zeros(lambda: _sums(function, params, chunked)), chunked)
    return total, (sums, _join(outs, x.shape[1]))


def _forward(function, chunks, params, x, rest):
    both = jax.value_and_grad(function, argnums=(0, 1), has_aux=True)

    def body(carry, chunk):
        (total, (sums, out)), (grad_params, grad_x) = both(params, *chunk)
        return jax.tree.map(jnp.add, carry, (total, sums, grad_params)), (out, grad_x)

    chunked = _split(chunks, (x, rest))
    zeros = (*_zeros(lambda: _sums(function, params, chunked)), jax.tree.map(jnp.zeros_like, params))
    (total, sums, grad_params), (outs, grads_x) = jax.lax.scan(body, zeros, chunked)
    return (total, (sums, _join(outs, x.shape[1]))), (grad_params, _join(grads_x, x.shape[1]))


def _backward(function, chunks, gradients, cotangents):
    scale = cotangents[0]
    return *jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradients), None


sum_over_chunks.defvjp(_forward, _backward)


def _sums(function, params, chunked):
    """What `function` adds up, for the first chunk."""
    total, (sums, _) = function(params, *jax.tree.map(lambda t: t[0], chunked))
    return total, sums


def _zeros(function):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function))


def _split(chunks: int, tree: Tree) -> Tree:
    """[B, M, ...] -> [chunks, B, M / chunks, ...]; axis 0 stays whole, for it is what a mesh cuts."""
    def split(t):
        count = min(chunks, t.shape[1])
        size = -(-t.shape[1] // count)
        t = jnp.pad(t, ((0, 0), (0, size * count - t.shape[1]), *[(0, 0)] * (t.ndim - 2)))
        return jnp.moveaxis(t.reshape(t.shape[0], count, size, *t.shape[2:]), 1, 0)

    return jax.tree.map(split, tree)


def _join(t: jax.Array, length: int) -> jax.Array:
    t = jnp.moveaxis(t, 0, 1)
    return t.reshape(t.shape[0], -1, *t.shape[3:])[:, :length]
