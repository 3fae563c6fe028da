"""What both networks are made of: sizes, dense layers, GELU, LayerNorm, dropout. Letters as in model.py."""

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes and choices of one network; model.py derives those of both from the config."""

    vocab_size: int
    embedding_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int = 512
    type_vocab_size: int = 2
    positions: str = "absolute"
    rotary_theta: float = 10_000.0
    norm: str = "post"
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    attention: str = "xla"
    packed: bool = True   # rows may hold several pieces; False: one each, padded on the right
    scan_layers: bool = False
    scan_unroll: int = 1
    remat: str = "none"
    dtype: str = "float32"

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads


class Dense(nn.Module):
    """x @ kernel + bias over the last axis.

    Written as one product of matrices: with more than two axes XLA's CPU backend transposes copies of the
    activations for the kernel's gradient, which took 40 % of a feed-forward layer's time (nn.Dense does that).
    """

    features: int
    dtype: str
    kernel_init: Callable

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return add_bias(matmul(x.astype(self.dtype), kernel.astype(self.dtype)), bias)


def matmul(x: Array, kernel: Array) -> Array:
    """Multiplies the last axis of `x` with the first of `kernel`, as one product of matrices."""
    return jnp.tensordot(x.reshape(-1, x.shape[-1]), kernel, 1).reshape(*x.shape[:-1], *kernel.shape[1:])


@jax.custom_vjp
def float32_product(x: Array, table: Array) -> Array:
    """x [N, E] times a table [V, E] of the same dtype, summed up and returned in float32: [N, V].

    The gradient goes back in the inputs' dtype: as differentiated by JAX, the products with it would be float32 ones,
    of the largest array of a step.
    """
    return jax.lax.dot_general(x, table, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _float32_product_backward(kept, g):
    x, table = kept
    g = g.astype(x.dtype)
    return g @ table, g.T @ x


float32_product.defvjp(lambda x, table: (float32_product(x, table), (x, table)), _float32_product_backward)


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """Adds a float32 bias in the dtype of `x`, as part of the product before it where a library can.

    The bias's gradient is a sum over all tokens, in float32; in bfloat16, whose sums stand still once they are 256
    times the next term, it came out 35 to 60 % wrong over 4,096 tokens.
    """
    return x + bias.astype(x.dtype)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), bias),
                lambda bias, g: (g, jnp.sum(g.astype(jnp.float32), tuple(range(g.ndim - bias.ndim)))))


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """Exact GELU, x * Phi(x) (Hendrycks and Gimpel 2016), with its derivative in closed form.

    jax.nn.gelu goes through erfc and differentiates its branches: twice the time on CPU.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_backward(x: Array, g: Array) -> tuple[Array]:
    density = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return (g * (0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5))) + x * density),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


@jax.custom_vjp
def made_once(x: Array) -> Array:
    """Returns `x`; a barrier keeps the compiler from making its gradient anew in each of the kernels that read it."""
    return x


made_once.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.optimization_barrier(g),))


def dense(arch: Architecture, features: int, name: str | None = None, kernel_init=None) -> Dense:
    """Returns the Dense of a network, with its initial values unless others are given."""
    return Dense(features, arch.dtype, kernel_init or normal(arch), name=name)


def normal(arch: Architecture):
    """Returns the initialiser of kernels and tables."""
    # Cut at two standard deviations and not rescaled, as TensorFlow's truncated_normal; jax's own takes the
    # standard deviation before the cut as well.
    return nn.initializers.truncated_normal(arch.initializer_range)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """Layer normalisation over the last axis (Ba et al. 2016), in float32, with its derivative in closed form.

    Differentiated step by step, XLA's CPU backend keeps a broadcast scale in memory and takes twice the time.
    """
    return _normalize(x, scale, bias, epsilon)[0]


def _normalize(x: Array, scale: Array, bias: Array, epsilon: float):
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, -1, keepdims=True)
    # In two passes: an epsilon of 1e-12 forgives no cancellation.
    inverse_std = jax.lax.rsqrt(jnp.mean(jnp.square(x32 - mean), -1, keepdims=True) + epsilon)
    return (x32 - mean) * inverse_std * scale + bias, (x, scale, mean, inverse_std)


def _normalize_backward(epsilon: float, kept, g: Array):
    x, scale, mean, inverse_std = kept
    # Kept, two numbers a token: left alone, a GPU's compiler makes them anew and then cannot sum up the scale's
    # gradient in the same pass, but writes its terms in float32.
    mean, inverse_std = jax.lax.optimization_barrier((mean, inverse_std))
    normal, rows = (x.astype(jnp.float32) - mean) * inverse_std, tuple(range(x.ndim - 1))
    h = g * scale
    h_x = h - jnp.mean(h, -1, keepdims=True) - normal * jnp.mean(h * normal, -1, keepdims=True)
    return (h_x * inverse_std).astype(x.dtype), jnp.sum(g * normal, rows), jnp.sum(g, rows)


normalize.defvjp(_normalize, _normalize_backward)


class LayerNorm(nn.Module):
    """Layer normalisation of the last axis with a learned scale and bias."""

    epsilon: float
    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return normalize(x, scale, bias, self.epsilon).astype(self.dtype)


def layer_norm(arch: Architecture, name: str | None = None) -> LayerNorm:
    """Returns the LayerNorm of a network."""
    return LayerNorm(arch.layer_norm_eps, arch.dtype, name=name)


class Dropout(nn.Module):
    """Zeroes each element with probability `rate` and scales the rest to keep the mean.

    One random byte decides about an element, so the rate is rounded to 1/256 (0.1 -> 0.1016, scaled
    accordingly): a quarter of the random words that a float an element would need.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        return drop(x, *self.draw(x.shape, deterministic))

    def threshold(self, deterministic: bool) -> int:
        """Returns how many of 256 are dropped."""
        return 0 if deterministic else round(self.rate * 256)

    def seeds(self, deterministic: bool) -> tuple[Array, int]:
        """Returns seeds, uint32 [2], for a kernel that draws by itself, and `threshold`."""
        threshold = self.threshold(deterministic)
        words = jax.random.bits(self.make_rng("dropout"), (2,), jnp.uint32) if threshold else jnp.zeros(2, jnp.uint32)
        return words, threshold

    def draw(self, shape: tuple[int, ...], deterministic: bool) -> tuple[Array | None, float]:
        """Returns which elements stay (bool, None: all of them), and the factor that scales those."""
        threshold = self.threshold(deterministic)
        if not threshold:
            return None, 1.0
        *lead, last = shape
        words = jax.random.bits(self.make_rng("dropout"), (*lead, -(-last // 4)), jnp.uint32)
        octets = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*lead, -1)[..., :last]
        return octets >= threshold, 256 / (256 - threshold)


def drop(x: Array, keep: Array | None, scale: float) -> Array:
    """Applies what `Dropout.draw` returned."""
    return x if keep is None else jnp.where(keep, x * scale, jnp.zeros_like(x))
