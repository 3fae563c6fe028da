"""The encoder with a task's head (facts b.14), and the loss of each head.

Dimension letters as in model.py; C classes or tags, S starts considered by the joint question-answering head.
Parameters: `embeddings` and `discriminator/encoder` as pretraining left them, `head` fresh.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from electra_jax.model import Architecture, Array, Dense, DiscriminatorNetwork, Dropout, Embeddings, gelu

_ANSWER_WIDTH = 512    # of the original's hidden layers for the end and for answerability
_IMPOSSIBLE_WEIGHT = 0.5


@dataclasses.dataclass(frozen=True)
class Head:
    """What sits on the encoder: `kind` as in tasks.Task.head."""

    kind: str                  # "classification", "regression", "tagging" or "qa"
    num_labels: int = 1
    style: str = "electra"     # classification, regression: "electra" or "huggingface"; qa: "joint" or "plain"
    dropout: float = 0.1
    beam: int = 20             # starts, and ends for each, that the joint head returns


def _dense(features: int, name: str | None = None) -> Dense:
    # float32: a few columns cost nothing, and their rounding is what a score would see.
    return Dense(features, "float32", nn.initializers.glorot_uniform(), name=name)


class SequenceHead(nn.Module):
    """Class logits or a score from the [CLS] state: [B, L, D] -> [B, C]."""

    head: Head

    @nn.compact
    def __call__(self, hidden_BLD, deterministic):
        drop = Dropout(self.head.dropout)
        x_BD = drop(hidden_BLD[:, 0], deterministic)
        if self.head.style == "huggingface":
            x_BD = drop(gelu(_dense(x_BD.shape[-1], "dense")(x_BD)), deterministic)
        return _dense(self.head.num_labels, "logits")(x_BD)


class TagHead(nn.Module):
    """Tag logits of every token: [B, L, D] -> [B, L, C]."""

    head: Head

    @nn.compact
    def __call__(self, hidden_BLD, deterministic):
        return _dense(self.head.num_labels, "logits")(Dropout(self.head.dropout)(hidden_BLD, deterministic))


class PairDense(nn.Module):
    """Dense over [a; b] for every pair of rows, [B, S, D] and [B, L, D] -> [B, S, L, F], without making the pairs."""

    features: int

    @nn.compact
    def __call__(self, a_BSD, b_BLD):
        D = a_BSD.shape[-1]
        kernel = self.param("kernel", nn.initializers.glorot_uniform(), (2 * D, self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        a_BSF, b_BLF = a_BSD.astype(jnp.float32) @ kernel[:D], b_BLD.astype(jnp.float32) @ kernel[D:]
        return a_BSF[:, :, None] + b_BLF[:, None] + bias


class AnswerHead(nn.Module):
    """Start and end of an answer.

    Plain: one logit each a token. Joint (the original's): the end is scored given a start, by a hidden layer over
    [state of the start; state of the token]; whether there is an answer by one over [CLS state; mean state by start
    probability].
    """

    head: Head

    def setup(self):
        if self.head.style == "plain":
            self.span = _dense(2)
        else:
            self.start = _dense(1)
            self.end_hidden, self.end = PairDense(_ANSWER_WIDTH), _dense(1)
            self.impossible_hidden, self.impossible = _dense(_ANSWER_WIDTH), _dense(1)

    def __call__(self, hidden_BLD, allowed_BL, starts_B=None):
        """Returns logits: "start" and "end" [B, L]; joint with `starts_B` (training) the end given that start, without
        "start_positions" and "end_positions" of the beam, and log probabilities; "impossible" [B]."""
        if self.head.style == "plain":
            start_BL, end_BL = jnp.moveaxis(self.span(hidden_BLD), -1, 0)
            start_BL, end_BL = (jnp.where(allowed_BL, x, -1000.0) for x in (start_BL, end_BL))
            return {"start": start_BL, "end": end_BL}
        start_BL = jnp.where(allowed_BL, self.start(hidden_BLD)[..., 0], -1000.0)
        summary_BD = jnp.einsum("bl,bld->bd", jax.nn.softmax(start_BL), hidden_BLD.astype(jnp.float32))
        both_B2D = jnp.concatenate([hidden_BLD[:, 0].astype(jnp.float32), summary_BD], -1)
        out = {"impossible": self.impossible(gelu(self.impossible_hidden(both_B2D)))[..., 0]}
        if starts_B is not None:
            return out | {"start": start_BL, "end": self._ends(hidden_BLD, allowed_BL, starts_B[:, None])[:, 0]}
        width = min(self.head.beam, start_BL.shape[1])
        start_log_probs_BS, starts_BS = jax.lax.top_k(jax.nn.log_softmax(start_BL), width)
        end_log_probs_BSL = jax.nn.log_softmax(self._ends(hidden_BLD, allowed_BL, starts_BS))
        end_log_probs_BSS, ends_BSS = jax.lax.top_k(end_log_probs_BSL, width)
        return out | {"start_positions": starts_BS, "start_log_probs": start_log_probs_BS,
                      "end_positions": ends_BSS, "end_log_probs": end_log_probs_BSS}

    def _ends(self, hidden_BLD, allowed_BL, starts_BS):
        """Logits of the end at each token for each start: [B, S, L]."""
        starts_BSD = jnp.take_along_axis(hidden_BLD, starts_BS[..., None], 1)
        logits_BSL = self.end(gelu(self.end_hidden(starts_BSD, hidden_BLD)))[..., 0]
        return jnp.where(allowed_BL[:, None], logits_BSL, -1000.0)


class Tuned(nn.Module):
    """An encoder and a head, whatever the task.

    `batch`: int32 [B, L] `input_ids`, `attention_mask`, `token_type_ids`; qa also bool `allowed`, and in training
    int32 [B] `start`. Returns the outputs of tasks.Task.head, with logits for qa's plain log probabilities.
    """

    arch: Architecture
    head_config: Head

    def setup(self):
        self.embeddings = Embeddings(self.arch)
        self.discriminator = DiscriminatorNetwork(self.arch)
        kinds = {"classification": SequenceHead, "regression": SequenceHead, "tagging": TagHead, "qa": AnswerHead}
        self.head = kinds[self.head_config.kind](self.head_config)

    def __call__(self, batch, deterministic=True):
        ids_BL, piece_ids_BL = batch["input_ids"], batch["attention_mask"]
        positions_BL = jnp.zeros_like(ids_BL) + jnp.arange(ids_BL.shape[1], dtype=ids_BL.dtype)
        x_BLE = self.embeddings(ids_BL, batch["token_type_ids"], positions_BL, deterministic)
        hidden_BLD = self.discriminator.encoder(x_BLE, piece_ids_BL, positions_BL, deterministic)
        kind = self.head_config.kind
        if kind == "qa":
            return self.head(hidden_BLD, batch["allowed"] & (piece_ids_BL > 0),
                             None if deterministic else batch["start"])
        logits = self.head(hidden_BLD, deterministic)
        return {"score": logits[..., 0]} if kind == "regression" else {"logits": logits}


def losses(head: Head, outputs: dict[str, Array], batch: dict[str, Array]) -> Array:
    """Loss of each row, float32 [B], in nats (squared error for regression)."""
    if head.kind == "regression":
        return jnp.square(outputs["score"] - batch["label"])
    if head.kind == "qa":
        total = sum(_cross_entropy(outputs[name], batch[name]) for name in ("start", "end")) / 2
        if "impossible" in outputs:
            x, y = outputs["impossible"], batch["impossible"].astype(jnp.float32)
            total += _IMPOSSIBLE_WEIGHT * (jnp.maximum(x, 0) - x * y + jnp.log1p(jnp.exp(-jnp.abs(x))))
        return total
    if head.kind == "tagging":    # summed over the words of a row
        scored_BL = batch["label"] >= 0
        return jnp.sum(_cross_entropy(outputs["logits"], jnp.maximum(batch["label"], 0)) * scored_BL, -1)
    return _cross_entropy(outputs["logits"], batch["label"])


def _cross_entropy(logits: Array, labels: Array) -> Array:
    picked = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return jax.nn.logsumexp(logits, -1) - picked
