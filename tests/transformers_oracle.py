"""ELECTRA by torch and transformers, and the same numbers by this package: what live and golden tests compare.

A case is a transformers configuration (a dict) and the length of its rows. Weights come from their names by formula,
so that golden files need not hold them, and all are noise, so that biases and LayerNorms take part.
"""

import functools
import math
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from electra_jax import model
from electra_jax.interop import names


def case(vocab, embedding, hidden, heads, layers=2, length=13, ffn=None, segments=2, eps=1e-12, positions=40):
    return {"vocab_size": vocab, "embedding_size": embedding, "hidden_size": hidden, "num_attention_heads": heads,
            "num_hidden_layers": layers, "intermediate_size": ffn or 2 * hidden, "type_vocab_size": segments,
            "layer_norm_eps": eps, "max_position_embeddings": positions}, length


# Named by what is special; heads of 16 to 64, lengths and vocabularies that nothing divides.
CASES = {
    "one_head": case(61, 8, 16, 1, length=7),
    "one_wide_head": case(67, 24, 64, 1, layers=1, length=13),
    "two_heads_equal_widths": case(71, 32, 32, 2, layers=1, length=11),
    "two_wide_heads": case(73, 64, 128, 2, layers=1, length=9),
    "three_heads": case(79, 16, 48, 3, length=31, ffn=80),
    "three_heads_loose_epsilon": case(83, 16, 72, 3, layers=1, length=5, eps=1e-5),
    "four_heads_three_layers": case(89, 16, 64, 4, layers=3, length=13),
    "four_heads_equal_widths": case(97, 80, 80, 4, layers=1, length=17, ffn=48),
    "six_heads": case(101, 40, 96, 6, layers=1, length=31, eps=1e-6),
    "eight_heads_narrow_below": case(103, 160, 128, 8, layers=1, length=7),
    "twelve_heads_equal_widths": case(107, 192, 192, 12, layers=1, length=13, ffn=100),
    "one_segment": case(62, 8, 32, 2, layers=1, length=31, segments=1, positions=31),
    "three_segments_large_epsilon": case(59, 8, 32, 1, layers=1, length=8, segments=3, eps=1e-3),
}
GOLDEN = ("one_head", "two_heads_equal_widths", "three_segments_large_epsilon")
NETWORKS = {"discriminator": "ElectraForPreTraining", "generator": "ElectraForMaskedLM"}


def weights(shapes):
    """Tensors by transformers' names; RandomState, whose numbers NumPy promises never to change."""
    def draw(name, shape):
        deviation = 0.1 if "_embeddings." in name else 1.2 * shape[1] ** -0.5 if len(shape) == 2 else 0.2
        noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        return (noise * deviation + name.endswith("LayerNorm.weight")).astype(np.float32)

    return {name: draw(name, shape) for name, shape in shapes.items()}


def batch(config, length):
    """Four rows, two of them padded on the right (id 0), with labels for both networks."""
    rng = np.random.RandomState(length)
    lengths = np.array([length, max(2, length - 4), length, max(2, length // 2)])
    real = np.arange(length) < lengths[:, None]
    ids = np.where(real, rng.randint(1, config["vocab_size"], real.shape), 0)
    segments = np.where(real, np.sort(rng.randint(0, config["type_vocab_size"], real.shape), 1), 0)
    selected = real & (rng.random_sample(real.shape) < 0.4)
    selected[:, 1] = True
    return {"input_ids": ids, "attention_mask": real.astype(int), "token_type_ids": segments,
            "replaced": (rng.random_sample(real.shape) < 0.3).astype(int),
            "targets": np.where(selected, rng.randint(1, config["vocab_size"], real.shape), -100)}


def build(network, config):
    """transformers' module with its own random initialisation, in evaluation mode."""
    import torch
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, NETWORKS[network])(transformers.ElectraConfig(**config)).eval()


def theirs(network, module, data):
    """The numbers of transformers: loss, logits, hidden states of all layers, gradients of the loss by name."""
    import torch

    tensors = {name: torch.from_numpy(np.asarray(x, np.int64)) for name, x in data.items()}
    labels = tensors["replaced" if network == "discriminator" else "targets"]
    inputs = {name: tensors[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    module.zero_grad()
    out = module(**inputs, labels=labels, output_hidden_states=True)
    out.loss.backward()
    return {"loss": out.loss.item(), "logits": out.logits.detach().numpy(),
            "states": [state.detach().numpy() for state in out.hidden_states],
            "gradients": {name: x.grad.numpy() for name, x in module.named_parameters()}}


def state(module):
    """The parameters of a torch module as NumPy arrays; a tied table once, under its first name."""
    return {name: x.detach().numpy().copy() for name, x in module.named_parameters()}


def architecture(config, **changes):
    """Our description of the network that the configuration of transformers describes."""
    ours = {"num_heads": "num_attention_heads", "num_layers": "num_hidden_layers",
            "max_positions": "max_position_embeddings"}
    same = ("vocab_size", "embedding_size", "hidden_size", "intermediate_size", "type_vocab_size", "layer_norm_eps")
    return model.Architecture(**{name: config[name] for name in same},
                              **{name: config[name_there] for name, name_there in ours.items()}, **changes)


def rows(network, arch, sharing="embeddings"):
    return names.discriminator_rows(arch) if network == "discriminator" else names.generator_rows(arch, sharing)


def ours(network, arch, params, data, sharing="embeddings", gradients=True):
    """The same numbers from this package's module and parameters, gradients in the parameters' own tree."""
    kind = model.Discriminator if network == "discriminator" else model.Generator
    module = kind(arch, arch, sharing)
    real = jnp.asarray(data["attention_mask"])
    positions = np.broadcast_to(np.arange(real.shape[1]), real.shape)

    def states(electra, *inputs):
        if network == "discriminator":
            return electra.hidden_states(*inputs, all_layers=True)[1]
        tables = electra.generator.embeddings if sharing == "none" else electra.embeddings
        encoder = electra.discriminator.encoder if sharing == "all" else electra.generator.encoder
        ids, segments, pieces, positions = inputs
        return encoder(tables(ids, segments, positions, True), pieces, positions, True, all_layers=True)[1]

    def loss(params):
        logits = module.apply({"params": params}, data["input_ids"], real, data["token_type_ids"])
        hidden = module.apply({"params": params}, data["input_ids"], data["token_type_ids"], real, positions,
                              method=states)
        if network == "discriminator":
            value = (nn.softplus(logits * (1 - 2 * data["replaced"])) * real).sum() / real.sum()
        else:
            used = data["targets"] >= 0
            picked = jnp.take_along_axis(nn.log_softmax(logits), np.where(used, data["targets"], 0)[..., None], -1)
            value = -(picked[..., 0] * used).sum() / used.sum()
        return value, (logits, hidden)

    # Where XLA has this option yet, it compiles five times faster for it.
    old = jax.__version_info__ < (0, 11)
    jit = functools.partial(jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": False} if old else None)
    if gradients:
        (value, (logits, hidden)), found = jit(jax.value_and_grad(loss, has_aux=True))(params)
    else:
        (value, (logits, hidden)), found = jit(loss)(params), None
    return {"loss": value, "logits": logits, "states": hidden, "gradients": found}


def sample(x, count):
    """So many of the values, spread evenly (repeated where there are fewer), and the norm of them all."""
    x = np.asarray(x, np.float64).ravel()
    places = np.linspace(0, x.size - 1, count).round().astype(int)
    return np.append(x[places], math.sqrt((x**2).sum())).astype(np.float32)


def distance(a, b, scale=0.0):
    """Norm of the difference, relative to the norm of `b`, or to `scale` where that is larger."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), scale, 1e-30))
