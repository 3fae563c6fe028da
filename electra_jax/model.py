"""ELECTRA's two networks as Flax linen modules (Clark et al. 2020, section 2; BERT's encoder).

Array names end in their dimensions: B batch, L length, D model width, H heads, K head size,
F feed-forward width, V vocabulary, E embedding width, M selected positions, N layers.

Parameter tree: `embeddings` (tables shared by both networks), `generator` and `discriminator`,
each with its own projection, layers and head.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from electra_jax.attention import Attention
from electra_jax.config import UserError
from electra_jax.layers import Architecture, Array, Dense, Dropout, dense, float32_product, gelu, layer_norm, normal
from electra_jax.sharding import by_rows

Params = dict[str, Any]


def discriminator_architecture(model) -> Architecture:
    """Returns the discriminator's Architecture from the config's `model` section (any mapping)."""
    names = {field.name for field in dataclasses.fields(Architecture)}
    return Architecture(**{name: value for name, value in dict(model).items() if name in names})


def generator_architecture(model) -> Architecture:
    """Returns the generator's Architecture: `generator_size` scales width, feed-forward and heads.

    Rounded as the original does (facts b.8): heads = max(1, width // head size), feed-forward in the
    discriminator's proportion (4 x for all published sizes); fields other than 0 set them, for weights from
    elsewhere. Raises UserError if the width has no whole heads.
    """
    disc = discriminator_architecture(model)
    hidden_size = max(1, round(disc.hidden_size * model["generator_size"]))
    num_heads = model["generator_heads"] or max(1, hidden_size // disc.head_size)
    if hidden_size % num_heads or (disc.positions == "rotary" and hidden_size // num_heads % 2):
        raise UserError(f"model.generator_size={model['generator_size']} makes a generator {hidden_size} wide, which "
                        f"does not split into {num_heads} heads: choose another size, or model.generator_heads.")
    return dataclasses.replace(
        disc,
        hidden_size=hidden_size,
        num_layers=max(1, round(disc.num_layers * model["generator_layers"])),
        num_heads=num_heads,
        intermediate_size=(model["generator_intermediate_size"]
                           or round(hidden_size * disc.intermediate_size / disc.hidden_size)),
        # With tables of its own the original makes them as wide as the generator itself.
        embedding_size=(disc.embedding_size if model["sharing"] != "none"
                        else model["generator_embedding_size"] or hidden_size),
    )


def head_sizes(model) -> list[int]:
    """Returns the head sizes of discriminator and generator."""
    return [discriminator_architecture(model).head_size, generator_architecture(model).head_size]


def differences(ours, theirs) -> dict[str, tuple[Any, Any]]:
    """Returns the fields, with both values, in which two `model` sections make different functions of parameters of
    equal shapes."""
    names = ["num_heads", "norm", "positions", "layer_norm_eps"]
    names += ["rotary_theta"] if ours["positions"] == "rotary" else []
    values = {name: (ours[name], theirs[name]) for name in names}
    values["generator_heads"] = tuple(generator_architecture(model).num_heads for model in (ours, theirs))
    return {name: (mine, other) for name, (mine, other) in values.items() if mine != other}


class Embeddings(nn.Module):
    """Sum of token, position and segment vectors, normalised: [B, L] ids -> [B, L, E]."""

    arch: Architecture

    def setup(self):
        a = self.arch
        # float32 up to the norm, so that gradients add up in it: the row of a frequent token gets thousands of terms.
        table = functools.partial(nn.Embed, features=a.embedding_size, embedding_init=normal(a), dtype="float32")
        self.word_embeddings = table(a.vocab_size)
        self.token_type_embeddings = table(a.type_vocab_size)
        if a.positions == "absolute":
            self.position_embeddings = table(a.max_positions)
        self.norm = layer_norm(a)
        self.dropout = Dropout(a.hidden_dropout)

    def __call__(self, input_ids_BL, token_type_ids_BL, position_ids_BL, deterministic):
        x_BLE = self.word_embeddings(input_ids_BL) + self.token_type_embeddings(token_type_ids_BL)
        if self.arch.positions == "absolute":
            x_BLE += self.position_embeddings(position_ids_BL)
        return self.dropout(self.norm(by_rows(x_BLE)), deterministic)

    def table_VE(self) -> Array:
        """The token table, which the masked-language-model head multiplies with."""
        return self.word_embeddings.embedding


class FeedForward(nn.Module):
    """Dense, exact GELU, dense."""

    arch: Architecture

    @nn.compact
    def __call__(self, x_BLD):
        h_BLF = gelu(dense(self.arch, self.arch.intermediate_size, "in")(x_BLD))
        return dense(self.arch, x_BLD.shape[-1], "out")(h_BLF)


class Layer(nn.Module):
    """One transformer layer, normalised after each residual sum (post) or before each block (pre)."""

    arch: Architecture
    deterministic: bool

    @nn.compact
    def __call__(self, x_BLD, piece_ids_BL, position_ids_BL):
        a = self.arch
        attention, ffn = Attention(a, name="attention"), FeedForward(a, name="ffn")
        attention_norm, ffn_norm = layer_norm(a, "attention_norm"), layer_norm(a, "ffn_norm")
        drop = functools.partial(Dropout(a.hidden_dropout), deterministic=self.deterministic)
        attend = functools.partial(attention, piece_ids_BL=piece_ids_BL, position_ids_BL=position_ids_BL,
                                   deterministic=self.deterministic)
        if a.norm == "pre":
            x_BLD = by_rows(x_BLD + drop(attend(attention_norm(x_BLD))))
            return by_rows(x_BLD + drop(ffn(ffn_norm(x_BLD))))
        x_BLD = by_rows(attention_norm(x_BLD + drop(attend(x_BLD))))
        return by_rows(ffn_norm(x_BLD + drop(ffn(x_BLD))))


_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}


class Encoder(nn.Module):
    """Projection to the model width where it differs, then the layers: [B, L, E] -> [B, L, D]."""

    arch: Architecture

    @nn.compact
    def __call__(self, x_BLE, piece_ids_BL, position_ids_BL, deterministic, all_layers=False):
        a = self.arch
        x_BLD = x_BLE
        if a.embedding_size != a.hidden_size:
            x_BLD = dense(a, a.hidden_size, "embeddings_project", nn.initializers.glorot_uniform())(x_BLE)
        # Between the turns of a loop nothing is recomputed by mistake; within one the compiler would undo it.
        loops = a.scan_layers and a.scan_unroll == 1
        layer = Layer if a.remat == "none" else nn.remat(Layer, policy=_REMAT_POLICIES[a.remat], prevent_cse=not loops)
        states = [x_BLD]
        if a.scan_layers:
            body = nn.scan(
                lambda module, x, _: (y := module(x, piece_ids_BL, position_ids_BL), y if all_layers else None),
                variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=a.num_layers,
                unroll=min(a.scan_unroll, a.num_layers))
            x_BLD, ys = body(layer(a, deterministic, name="layers"), x_BLD, None)
            states += list(ys) if all_layers else []
        else:
            for i in range(a.num_layers):
                x_BLD = layer(a, deterministic, name=f"layer_{i}")(x_BLD, piece_ids_BL, position_ids_BL)
                states.append(x_BLD)
        if a.norm == "pre":
            x_BLD = layer_norm(a, "final_norm")(x_BLD)
        return (x_BLD, states) if all_layers else x_BLD


class MlmHead(nn.Module):
    """Vocabulary logits at given positions: dense to E, GELU, LayerNorm, shared token table, bias (facts b.7)."""

    arch: Architecture

    @nn.compact
    def __call__(self, hidden_BMD, table_VE):
        a = self.arch
        x_BME = gelu(dense(a, table_VE.shape[1], "dense")(hidden_BMD))
        x_BME = layer_norm(a, "norm")(x_BME)
        bias = self.param("bias", nn.initializers.zeros, (table_VE.shape[0],), jnp.float32)
        B, M, E = x_BME.shape
        logits = float32_product(x_BME.reshape(B * M, E), table_VE.astype(a.dtype))
        return (logits + bias).reshape(B, M, -1)


class RtdHead(nn.Module):
    """One logit a token, "was replaced": dense, GELU, dense (facts b.7)."""

    arch: Architecture

    @nn.compact
    def __call__(self, hidden_BLD):
        x_BLD = gelu(dense(self.arch, hidden_BLD.shape[-1], "dense")(hidden_BLD))
        return Dense(1, "float32", nn.initializers.glorot_uniform(), name="logit")(x_BLD)[..., 0]


class GeneratorNetwork(nn.Module):
    """The generator's own parameters: encoder and head, and embeddings where they are not shared."""

    arch: Architecture
    own_embeddings: bool = False

    def setup(self):
        self.encoder = Encoder(self.arch)
        self.head = MlmHead(self.arch)
        if self.own_embeddings:
            self.embeddings = Embeddings(self.arch)


class DiscriminatorNetwork(nn.Module):
    """The discriminator's own parameters: encoder and head."""

    arch: Architecture

    def setup(self):
        self.encoder = Encoder(self.arch)
        self.head = RtdHead(self.arch)


class Electra(nn.Module):
    """Both networks over shared embeddings; parameters exist for the methods that `init` is called with.

    Inputs of each method are int32 [B, L]: ids, segment ids, `piece_ids` (attention stays within equal
    numbers, 0 marks padding) and positions within the piece.
    """

    disc: Architecture
    gen: Architecture
    sharing: str = "embeddings"

    def setup(self):
        self.embeddings = Embeddings(self.disc)
        self.generator = GeneratorNetwork(self.gen, own_embeddings=self.sharing == "none")
        self.discriminator = DiscriminatorNetwork(self.disc)

    def generator_logits(self, input_ids_BL, token_type_ids_BL, piece_ids_BL, position_ids_BL,
                         positions_BM, deterministic=True):
        """Vocabulary logits, float32 [B, M, V], at `positions_BM`; all positions when that is None."""
        return self.mlm_logits(self.generator_states(input_ids_BL, token_type_ids_BL, piece_ids_BL, position_ids_BL,
                                                     positions_BM, deterministic))

    def generator_states(self, input_ids_BL, token_type_ids_BL, piece_ids_BL, position_ids_BL,
                         positions_BM, deterministic=True):
        """The generator's last hidden states [B, M, D] at `positions_BM`; all positions when that is None."""
        encoder = self.discriminator.encoder if self.sharing == "all" else self.generator.encoder
        x_BLE = self._generator_tables()(input_ids_BL, token_type_ids_BL, position_ids_BL, deterministic)
        hidden_BLD = encoder(x_BLE, piece_ids_BL, position_ids_BL, deterministic)
        if positions_BM is None:
            return hidden_BLD
        return jnp.take_along_axis(hidden_BLD, positions_BM[..., None], axis=1)

    def mlm_logits(self, hidden_BMD):
        """Vocabulary logits, float32 [B, M, V], of the generator's states; needs `mlm_head_params` only."""
        return self.generator.head(hidden_BMD, self._generator_tables().table_VE())

    def _generator_tables(self):
        return self.generator.embeddings if self.sharing == "none" else self.embeddings

    def hidden_states(self, input_ids_BL, token_type_ids_BL, piece_ids_BL, position_ids_BL,
                      deterministic=True, all_layers=False):
        """The discriminator's last hidden states [B, L, D]; with `all_layers` also the input of each layer."""
        x_BLE = self.embeddings(input_ids_BL, token_type_ids_BL, position_ids_BL, deterministic)
        return self.discriminator.encoder(x_BLE, piece_ids_BL, position_ids_BL, deterministic, all_layers)

    def discriminator_logits(self, input_ids_BL, token_type_ids_BL, piece_ids_BL, position_ids_BL,
                             deterministic=True):
        """"Was replaced" logits, float32 [B, L]."""
        hidden_BLD = self.hidden_states(input_ids_BL, token_type_ids_BL, piece_ids_BL, position_ids_BL, deterministic)
        return self.discriminator.head(hidden_BLD)

    def both(self, *inputs):
        """Calls both networks, so that `init` creates every parameter."""
        return self.generator_logits(*inputs, inputs[0][:, :1]), self.discriminator_logits(*inputs)


def _one_piece_rows(input_ids_BL, attention_mask_BL, token_type_ids_BL):
    """The inputs of `Electra` for rows of one text each, padded on the right."""
    ids = jnp.asarray(input_ids_BL)
    zeros = jnp.zeros_like(ids)
    piece_ids = zeros + 1 if attention_mask_BL is None else jnp.asarray(attention_mask_BL, ids.dtype)
    token_type_ids = zeros if token_type_ids_BL is None else token_type_ids_BL
    return ids, token_type_ids, piece_ids, zeros + jnp.arange(ids.shape[1], dtype=ids.dtype)


class Discriminator(Electra):
    """The trained discriminator as downstream code wants it; parameters `embeddings` and `discriminator`.

    `attention_mask` is 1 on tokens, 0 on padding (default: all tokens), `token_type_ids` default to 0.
    """

    def __call__(self, input_ids, attention_mask=None, token_type_ids=None, deterministic=True):
        """"Was replaced" logits, float32 [B, L]."""
        return self.discriminator_logits(*_one_piece_rows(input_ids, attention_mask, token_type_ids), deterministic)

    def encode(self, input_ids, attention_mask=None, token_type_ids=None, deterministic=True):
        """The last hidden states [B, L, D]."""
        return self.hidden_states(*_one_piece_rows(input_ids, attention_mask, token_type_ids), deterministic)


class Generator(Electra):
    """The trained generator; parameters `embeddings` and `generator` (and `discriminator` when all is shared)."""

    def __call__(self, input_ids, attention_mask=None, token_type_ids=None, deterministic=True):
        """Vocabulary logits, float32 [B, L, V]."""
        inputs = _one_piece_rows(input_ids, attention_mask, token_type_ids)
        return self.generator_logits(*inputs, None, deterministic)


def build(model, full_size_mlm: bool = False, kind: type[Electra] = Electra, packed: bool = True) -> Electra:
    """Returns the module for the config's `model` section.

    With `full_size_mlm` (the MLM baseline) the masked-language-model head sits on the full-size encoder. Without
    `packed`, rows hold one piece each, padded on the right, which some implementations of attention make use of.
    """
    disc = dataclasses.replace(discriminator_architecture(model), packed=packed)
    if full_size_mlm:
        return kind(disc, disc, "all")
    return kind(disc, dataclasses.replace(generator_architecture(model), packed=packed), model["sharing"])


def mlm_head_params(params: Params, sharing: str) -> Params:
    """Returns the part of the parameters that `Electra.mlm_logits` needs: the head and the token table."""
    table = "word_embeddings"
    if sharing == "none":
        tables = {table: params["generator"]["embeddings"][table]}
        return {"generator": {"head": params["generator"]["head"], "embeddings": tables}}
    return {"generator": {"head": params["generator"]["head"]}, "embeddings": {table: params["embeddings"][table]}}


def init_params(module: Electra, key: Array, method: str = "both") -> Params:
    """Returns fresh parameters, the same numbers whether layers are scanned or not.

    Shapes do not depend on the batch, so one token is enough to trace.
    """
    unrolled = module.clone(disc=dataclasses.replace(module.disc, scan_layers=False, attention="xla"),
                            gen=dataclasses.replace(module.gen, scan_layers=False, attention="xla"))
    one = jnp.zeros((1, 1), jnp.int32)
    inputs = (one, one, one, one) + ((one,) if method == "generator_logits" else ())
    params = unrolled.init(key, *inputs, method=method)["params"]
    return stack_layers(params) if module.disc.scan_layers else params


def stack_layers(params: Params) -> Params:
    """Turns `layer_0` ... `layer_N` subtrees into one `layers` subtree with a leading axis N (scanned form)."""
    return _map_encoders(params, lambda layers: {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)})


def unstack_layers(params: Params) -> Params:
    """The inverse of `stack_layers`; parameters already unrolled come back as they are."""
    if not isinstance(params, dict):
        return params
    out = {}
    for name, value in params.items():
        if name == "layers":
            length = len(jax.tree.leaves(value)[0])
            out |= {f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], value) for i in range(length)}
        else:
            out[name] = unstack_layers(value)
    return out


def _map_encoders(params: Params, join) -> Params:
    if not isinstance(params, dict):
        return params
    count = sum(name.startswith("layer_") for name in params)
    out = {name: _map_encoders(value, join) for name, value in params.items() if not name.startswith("layer_")}
    return out | (join([params[f"layer_{i}"] for i in range(count)]) if count else {})


def count_params(params: Params) -> int:
    """Number of trainable values in the tree."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def matmul_flops(model, seq_len: int, num_masked: int, objective: str = "electra") -> float:
    """Forward matmul FLOPs of one sequence (2 a multiply-add): layers, projections and heads; lookups are free.

    `objective` is "electra", "mlm" or "rtd", the discriminator alone.
    """

    def encoder(a: Architecture) -> float:
        project = 2 * a.embedding_size * a.hidden_size if a.embedding_size != a.hidden_size else 0
        per_layer = 8 * a.hidden_size**2 + 4 * a.hidden_size * a.intermediate_size + 4 * seq_len * a.hidden_size
        return seq_len * (project + a.num_layers * per_layer)

    def mlm_head(a: Architecture) -> float:
        return num_masked * 2 * (a.hidden_size * a.embedding_size + a.embedding_size * a.vocab_size)

    disc, gen = discriminator_architecture(model), generator_architecture(model)
    if objective == "mlm":
        return encoder(disc) + mlm_head(disc)
    rtd = encoder(disc) + seq_len * 2 * (disc.hidden_size**2 + disc.hidden_size)
    return rtd if objective == "rtd" else rtd + encoder(gen) + mlm_head(gen)
