"""Self-attention among the tokens of one piece, and its implementations. Letters as in model.py.

An implementation takes query, key and value [B, L, H, K] and `piece_ids` [B, L]: a token sees
those with its own number, padding (number 0) sees padding.
"""

import functools
from collections.abc import Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from electra_jax.config import UserError
from electra_jax.layers import Architecture, Array, Dropout, add_bias, dense, made_once, matmul, normal
from electra_jax.sharding import BATCH_AXES, context_mesh

# What runs where; "xla" runs everywhere.
PLATFORMS = {"cudnn": ("gpu", "cuda"), "flash": ("gpu", "cuda"), "splash": ("tpu",)}

# The kernels' unit of length: one vector row of a TPU, the least tile of a GPU's matrix units.
_BLOCK = {"splash": 128, "flash": 16}
# Tests set it, to run the kernels on a CPU.
INTERPRET = False


def check(name: str, seq_len: int, mesh: Mesh, head_sizes: Iterable[int] = ()) -> None:
    """Raises UserError when the implementation does not run on the mesh's devices, with the length or the heads."""
    platform = mesh.devices.flat[0].platform
    if name in PLATFORMS and platform not in PLATFORMS[name] and not INTERPRET:
        raise UserError(f"model.attention={name} runs on {PLATFORMS[name][0].upper()}s, but the devices are "
                        f"{platform.upper()}s: set model.attention=xla.")
    if seq_len % _BLOCK.get(name, 1):
        raise UserError(f"data.seq_len={seq_len} is no multiple of {_BLOCK[name]}, which model.attention={name} "
                        "needs: change one of them.")
    for size in head_sizes:
        if name == "flash" and (size < 16 or size & (size - 1)):
            raise UserError(f"model.attention=flash needs heads of a power of two, 16 at least, but model.num_heads or "
                            f"model.generator_heads makes heads of {size}: change them, or set model.attention=xla.")


def rotate(x_BLHK: Array, position_ids_BL: Array, theta: float) -> Array:
    """Rotary position embedding (Su et al. 2021, eq. 34), the two halves of a head as the pairs."""
    half = x_BLHK.shape[-1] // 2
    inverse_wavelength = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BLK = position_ids_BL[..., None].astype(jnp.float32) * inverse_wavelength
    sin, cos = jnp.sin(angle_BLK)[:, :, None], jnp.cos(angle_BLK)[:, :, None]
    x, y = x_BLHK[..., :half].astype(jnp.float32), x_BLHK[..., half:].astype(jnp.float32)
    return jnp.concatenate([x * cos - y * sin, x * sin + y * cos], -1).astype(x_BLHK.dtype)


def same_piece(piece_ids_BL: Array) -> Array:
    """Which tokens see each other, bool [B, L, L]."""
    return piece_ids_BL[:, :, None] == piece_ids_BL[:, None, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def plain(q_BLHK: Array, k_BLHK: Array, v_BLHK: Array, piece_ids_BL: Array, keep_BHLL: Array | None,
          scale: float) -> Array:
    """Softmax attention in products of XLA; `keep_BHLL` and `scale` are what `layers.Dropout.draw` returns.

    Scores and softmax are float32. The derivative is in closed form, as flash attention's (Dao et al. 2022, B.2, which
    takes the row sums of P dP from output and gradient): no product multiplies float32 where the inputs are bfloat16,
    and of [B, H, L, L] one array is kept, the scaled probabilities in the inputs' dtype, negative where dropped.
    """
    return _plain(q_BLHK, k_BLHK, v_BLHK, piece_ids_BL, keep_BHLL, scale)[0]


def _plain(q_BLHK, k_BLHK, v_BLHK, piece_ids_BL, keep_BHLL, scale):
    # Heads in front once, here and in the backward pass, not in each product.
    q_BHLK, k_BHLK, v_BHLK = (x.swapaxes(1, 2) for x in (q_BLHK, k_BLHK, v_BLHK))
    scores_BHLL = jnp.einsum("bhlk,bhmk->bhlm", q_BHLK, k_BHLK, preferred_element_type=jnp.float32)
    scores_BHLL = jnp.where(same_piece(piece_ids_BL)[:, None], scores_BHLL * q_BHLK.shape[-1]**-0.5, -1e9)
    # Scaled before they are rounded, so that products return the inputs' dtype as it is. A probability near 1 is then
    # off by up to half a unit in the last place, 0.3 % with dropout 0.1, where it would be exact.
    probs_BHLL = (jax.nn.softmax(scores_BHLL, -1) * scale).astype(q_BHLK.dtype)
    if keep_BHLL is not None:
        # The barrier makes the compiler keep this array; left alone it keeps the scores and makes it again.
        probs_BHLL = jax.lax.optimization_barrier(jnp.where(keep_BHLL, probs_BHLL, -probs_BHLL))
    out_BHLK = jnp.einsum("bhlm,bhmk->bhlk", _kept(probs_BHLL, scale), v_BHLK)
    return out_BHLK.swapaxes(1, 2), (q_BHLK, k_BHLK, v_BHLK, probs_BHLL, out_BHLK)


def _kept(probs_BHLL, scale):
    """The probabilities without the dropped ones; with a factor of 1 there are none, and nothing to do."""
    return probs_BHLL if scale == 1 else jnp.maximum(probs_BHLL, 0)


def _plain_backward(scale, kept, g_BLHK):
    q_BHLK, k_BHLK, v_BHLK, probs_BHLL, out_BHLK = kept
    g_BHLK = g_BLHK.swapaxes(1, 2)
    row_sums_BHL = jnp.einsum("bhlk,bhlk->bhl", g_BHLK, out_BHLK, preferred_element_type=jnp.float32) / scale
    g_probs_BHLL = jnp.einsum("bhlk,bhmk->bhlm", g_BHLK, v_BHLK, preferred_element_type=jnp.float32)
    if scale != 1:
        g_probs_BHLL = jnp.where(probs_BHLL > 0, g_probs_BHLL, 0.0)
    g_scores_BHLL = jnp.abs(probs_BHLL) * (g_probs_BHLL - row_sums_BHL[..., None]) * q_BHLK.shape[-1]**-0.5
    g_scores_BHLL = g_scores_BHLL.astype(probs_BHLL.dtype)
    g_q = jnp.einsum("bhlm,bhmk->bhlk", g_scores_BHLL, k_BHLK)
    g_k = jnp.einsum("bhlm,bhlk->bhmk", g_scores_BHLL, q_BHLK)
    g_v = jnp.einsum("bhlm,bhlk->bhmk", _kept(probs_BHLL, scale), g_BHLK)
    return *(g.swapaxes(1, 2) for g in (g_q, g_k, g_v)), None, None


plain.defvjp(_plain, _plain_backward)


def cudnn(q_BLHK: Array, k_BLHK: Array, v_BLHK: Array, piece_ids_BL: Array, packed: bool) -> Array:
    """NVIDIA's flash attention. Rows of one piece go by their lengths, for packed ones a mask becomes a bias in memory,
    whose gradient the kernel computes as well."""
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    if packed:
        return attend(q_BLHK, k_BLHK, v_BLHK, mask=same_piece(piece_ids_BL)[:, None])
    lengths_B = row_lengths(piece_ids_BL)
    return attend(q_BLHK, k_BLHK, v_BLHK, query_seq_lengths=lengths_B, key_value_seq_lengths=lengths_B)


def row_lengths(piece_ids_BL: Array) -> Array:
    """Tokens of rows that are padded on the right, int32 [B]; at least one, for a softmax over nothing is NaN."""
    return jnp.maximum(jnp.sum(piece_ids_BL > 0, -1, dtype=jnp.int32), 1)


def splash(q_BLHK: Array, k_BLHK: Array, v_BLHK: Array, piece_ids_BL: Array) -> Array:
    """Flash attention for TPUs as a Pallas kernel: keeps no scores in memory, takes piece numbers as they are."""
    # Slow to import, and on a TPU only.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    def attend(q_BHLK, k_BHLK, v_BHLK, piece_ids_BL):
        H, L = q_BHLK.shape[1:3]
        block = next(size for size in (512, 256, 128) if L % size == 0)
        sizes = kernels.BlockSizes(block, block, block, block, block, block, use_fused_bwd_kernel=True)
        kernel = kernels.make_splash_mha(masks.MultiHeadMask([masks.FullMask((L, L))] * H), block_sizes=sizes,
                                         head_shards=1, q_seq_shards=1, interpret=INTERPRET)
        return jax.vmap(lambda q, k, v, ids: kernel(q, k, v, kernels.SegmentIds(ids, ids)))(
            q_BHLK, k_BHLK, v_BHLK, piece_ids_BL)

    q_BLHK = q_BLHK * q_BLHK.shape[-1]**-0.5    # the kernel scales nothing
    # The compiler cannot split a kernel over the mesh, so that is said here: rows and, where they divide, heads.
    mesh = context_mesh()
    if mesh is not None:
        heads = "tensor" if q_BLHK.shape[2] % mesh.shape["tensor"] == 0 else None
        rows, ids = PartitionSpec(BATCH_AXES, heads), PartitionSpec(BATCH_AXES)
        attend = jax.shard_map(attend, mesh=mesh, in_specs=(rows, rows, rows, ids), out_specs=rows, check_vma=False)
    q_BHLK, k_BHLK, v_BHLK = (x.swapaxes(1, 2) for x in (q_BLHK, k_BLHK, v_BLHK))
    return attend(q_BHLK, k_BHLK, v_BHLK, piece_ids_BL).swapaxes(1, 2)


def flash(qkv_BLTHK: Array, piece_ids_BL: Array, seeds: Array, threshold: int) -> Array:
    """Flash attention with dropout as Pallas kernels for GPUs (flash.py); `seeds` and `threshold` as of Dropout."""
    # Pallas is slow to import.
    from electra_jax import flash as kernels

    # A head's number in the whole batch, so that a mesh drops what one device would.
    B, _, _, H, _ = qkv_BLTHK.shape
    number_BH = jnp.arange(B * H, dtype=jnp.uint32).reshape(B, H)
    attend = functools.partial(kernels.flash, threshold=threshold, interpret=INTERPRET)
    mesh = context_mesh()
    if mesh is not None:    # as in splash
        heads = "tensor" if H % mesh.shape["tensor"] == 0 else None
        of_rows = (PartitionSpec(BATCH_AXES, None, None, heads), PartitionSpec(BATCH_AXES),
                   PartitionSpec(BATCH_AXES, heads), PartitionSpec())
        attend = jax.shard_map(attend, mesh=mesh, in_specs=of_rows, out_specs=PartitionSpec(BATCH_AXES, None, heads),
                               check_vma=False)
    return attend(qkv_BLTHK, piece_ids_BL, number_BH, seeds)


class Attention(nn.Module):
    """Bidirectional multi-head self-attention among the tokens of one piece (Vaswani et al. 2017)."""

    arch: Architecture

    @nn.compact
    def __call__(self, x_BLD, piece_ids_BL, position_ids_BL, deterministic):
        a = self.arch
        B, L, D = x_BLD.shape
        # One product for query, key and value; the kernel keeps them on an axis of their own, so that
        # sharding over heads cuts all three alike.
        kernel = self.param("qkv_kernel", normal(a), (D, 3, D), jnp.float32)
        bias = self.param("qkv_bias", nn.initializers.zeros, (3, D), jnp.float32)
        mesh = context_mesh()
        if mesh is None or mesh.shape["tensor"] == 1:
            # A matrix to the compiler: of the axis between, XLA's CPU backend makes copies, 6 % of a step.
            kernel, bias = kernel.reshape(D, 3 * D), bias.reshape(3 * D)
        qkv = made_once(add_bias(matmul(x_BLD.astype(a.dtype), kernel.astype(a.dtype)), bias))
        q_BLHK, k_BLHK, v_BLHK = (t.reshape(B, L, a.num_heads, a.head_size) for t in jnp.split(qkv, 3, axis=2))
        if a.positions == "rotary":
            q_BLHK = rotate(q_BLHK, position_ids_BL, a.rotary_theta)
            k_BLHK = rotate(k_BLHK, position_ids_BL, a.rotary_theta)
        if a.attention == "cudnn":
            out = cudnn(q_BLHK, k_BLHK, v_BLHK, piece_ids_BL, a.packed)
        elif a.attention == "splash":
            out = splash(q_BLHK, k_BLHK, v_BLHK, piece_ids_BL)
        elif a.attention == "flash":
            # With learned positions query, key and value are where the product left them.
            stacked = (jnp.stack([q_BLHK, k_BLHK, v_BLHK], 2) if a.positions == "rotary"
                       else qkv.reshape(B, L, 3, a.num_heads, a.head_size))
            out = flash(stacked, piece_ids_BL, *Dropout(a.attention_dropout).seeds(deterministic))
        else:
            keep_BHLL, scale = Dropout(a.attention_dropout).draw((B, a.num_heads, L, L), deterministic)
            out = plain(q_BLHK, k_BLHK, v_BLHK, piece_ids_BL, keep_BHLL, scale)
        return dense(a, D, "out")(out.reshape(B, L, D))
