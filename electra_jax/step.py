"""Joins model, objective, optimizer and mesh into the programs that a run consists of.

`build` returns a `Program`: initialise, train, evaluate, inspect, each one `jax.jit` over the mesh. The state is
`{"step", "params", "opt_state"}`; all randomness is derived from (seed, step), so nothing random is stored.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from electra_jax import metrics, model, objectives, optimizer, sharding
from electra_jax.config import num_masked

Array = jax.Array
Batch = dict[str, Array]   # input_ids, token_type_ids, piece_ids, position_ids: int32 [B, L]
State = dict[str, Any]

_INPUTS = ("input_ids", "token_type_ids", "piece_ids", "position_ids")
# Streams of the seed, so that no two uses share random numbers.
_INIT, _TRAIN, _EVAL = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled parts of a run on one mesh."""

    mesh: Mesh
    module: model.Electra
    init_state: Callable[[], State]
    train_step: Callable[[State, Batch], tuple[State, dict[str, Array]]]
    eval_step: Callable[[Any, Batch, Array], dict[str, Array]]
    inspect_step: Callable[[Any, Batch, Array], dict[str, Array]]
    abstract_state: State               # shapes and shardings, for a restore
    flops_per_step: float               # forward and backward matmuls, 3 x forward


def build(config, mesh: Mesh, special_ids: dict[str, int], num_tokens: int | None = None) -> Program:
    """Builds the programs for a config with `model.vocab_size` set.

    `special_ids` maps "pad", "cls", "sep" and "mask" to their ids; `num_tokens` is the tokenizer's size where the
    model's vocabulary is padded beyond it. Raises UserError when sizes do not divide over the mesh. `train_step`
    donates its state.
    """
    sharding.check_divides(config, mesh)
    objective = Objective(config, special_ids, num_tokens)
    tx = optimizer.build(config.optimizer)
    root = jax.random.key(config.run.seed)

    def init_state() -> State:
        params = model.init_params(objective.module, jax.random.fold_in(root, _INIT), objective.init_method)
        return {"step": jnp.zeros([], jnp.int32), "params": params, "opt_state": tx.init(params)}

    def train_step(state: State, batch: Batch):
        key = jax.random.fold_in(jax.random.fold_in(root, _TRAIN), state["step"])
        grads, sums = objective.gradients(state["params"], batch, key, config.optimizer.accumulation_steps)
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        sums["grad_norm"] = optax.tree.norm(grads)
        sums["learning_rate"] = optimizer.learning_rate(config.optimizer, state["step"])
        params = optax.apply_updates(state["params"], updates)
        return {"step": state["step"] + 1, "params": params, "opt_state": opt_state}, sums

    def on_held_out(method):
        def program(params, batch: Batch, index: Array):
            return method(params, batch, jax.random.fold_in(jax.random.fold_in(root, _EVAL), index))
        return jax.jit(program, in_shardings=(shardings["params"], batch_in, whole), out_shardings=whole)

    abstract = jax.eval_shape(init_state)
    shardings = sharding.state_shardings(abstract, mesh)
    rows, whole = sharding.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    batch_in = dict.fromkeys(_INPUTS, rows)
    return Program(
        mesh=mesh,
        module=objective.module,
        init_state=jax.jit(init_state, out_shardings=shardings),
        train_step=jax.jit(train_step, in_shardings=(shardings, batch_in), out_shardings=(shardings, whole),
                           donate_argnums=0),
        eval_step=on_held_out(objective.evaluate),
        inspect_step=on_held_out(objective.inspect),
        abstract_state=jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                                    abstract, shardings),
        flops_per_step=3 * config.data.batch_size * model.matmul_flops(
            config.model, config.data.seq_len, num_masked(config), config.objective.name),
    )


class Objective:
    """ELECTRA's joint loss, or plain MLM of the full-size network, over a batch."""

    def __init__(self, config, special_ids: dict[str, int], num_tokens: int | None = None):
        self.config = config.objective
        self.special_ids = special_ids
        self.vocab_size = config.model.vocab_size
        self.num_tokens = num_tokens or self.vocab_size
        self.num_masked = num_masked(config)
        self.seq_len = config.data.seq_len
        self.is_mlm = self.config.name == "mlm"
        self.module = model.build(config.model, full_size_mlm=self.is_mlm)
        self.init_method = ("generator_logits" if self.is_mlm else
                            "discriminator_logits" if self.config.uniform_generator else "both")

    def select(self, batch: Batch, row_keys: Array) -> objectives.Selection:
        """Selects this step's positions in every row."""
        o, ids = self.config, batch["input_ids"]
        candidates = batch["piece_ids"] > 0
        for special in self.special_ids.values():
            candidates &= ids != special
        noise = objectives.draw_noise(row_keys, seq_len=self.seq_len, num_masked=self.num_masked,
                                      distinct=o.distinct_positions)
        return objectives.select_positions(
            ids, candidates, batch["piece_ids"], noise, mask_id=self.special_ids["mask"],
            num_masked=self.num_masked, mask_prob=o.mask_prob, mask_token_prob=o.mask_token_prob,
            distinct=o.distinct_positions)

    def sample(self, logits_BMV: Array, selection: objectives.Selection, row_keys: Array) -> Array:
        """Draws the generator's replacements, int32 [B, M]."""
        o = self.config
        noise = objectives.draw_sampler_noise(row_keys, num_masked=self.num_masked, vocab_size=self.vocab_size,
                                              sampler=o.sampler)
        return objectives.sample_replacements(logits_BMV, selection.targets_BM, noise, sampler=o.sampler,
                                              temperature=o.temperature, disallow_correct=o.disallow_correct)

    def generate(self, params, batch: Batch, selection, row_keys, dropout_key=None):
        """Runs the generator and replaces: vocabulary logits [B, M, V], the corrupted ids and the labels [B, L]."""
        if self.config.uniform_generator:
            logits_BMV = jnp.zeros((*selection.positions_BM.shape, self.vocab_size), jnp.float32)
        else:
            inputs = (selection.masked_ids_BL, *self._others(batch), selection.positions_BM)
            logits_BMV = self._apply(params, "generator_logits", inputs, dropout_key)
        if self.num_tokens < self.vocab_size:   # rows that only round the table up are never predicted or drawn
            logits_BMV = jnp.where(jnp.arange(self.vocab_size) < self.num_tokens, logits_BMV, -1e9)
        if self.is_mlm:
            return logits_BMV, None, None
        sampled_BM = self.sample(logits_BMV, selection, row_keys)
        replaced_ids_BL, labels_BL = objectives.replace(batch["input_ids"], selection, sampled_BM,
                                                        distinct=self.config.distinct_positions)
        return logits_BMV, replaced_ids_BL, labels_BL

    def discriminate(self, params, batch: Batch, replaced_ids_BL: Array, dropout_key=None) -> Array:
        """Returns the discriminator's logits [B, L] for the corrupted ids."""
        inputs = (replaced_ids_BL, *self._others(batch))
        if dropout_key is not None:   # else both networks would drop the same entries of the shared embeddings
            dropout_key = jax.random.fold_in(dropout_key, 1)
        return self._apply(params, "discriminator_logits", inputs, dropout_key)

    def forward(self, params, batch: Batch, selection, row_keys, dropout_key=None) -> dict[str, Array]:
        """Runs both networks and returns sums over the rows: losses, weights and what the metrics need.

        Without a dropout key the networks are deterministic.
        """
        logits_BMV, replaced_ids_BL, labels_BL = self.generate(params, batch, selection, row_keys, dropout_key)
        sums = {}
        if not self.config.uniform_generator:
            total, weight, correct_BM = objectives.mlm_loss(logits_BMV, selection.targets_BM, selection.weights_BM)
            # What a selected but visible token adds is copying, no test of the network: apart, for the metrics.
            shown_BM = selection.shown_BM.astype(jnp.float32)
            shown_total, shown, _ = objectives.mlm_loss(logits_BMV, selection.targets_BM, shown_BM)
            sums |= {"mlm_loss": total, "mlm_weight": weight, "mlm_correct": jnp.sum(correct_BM * shown_BM),
                     "mlm_shown_loss": shown_total, "mlm_shown": shown}
        if self.is_mlm:
            return sums
        logits_BL = self.discriminate(params, batch, replaced_ids_BL, dropout_key)
        weights_BL = (batch["piece_ids"] > 0).astype(jnp.float32)
        total, weight = objectives.rtd_loss(logits_BL, labels_BL, weights_BL)
        # [CLS] and [SEP] are never replaced; leaving them in would flatter the ranking.
        ordinary_BL = weights_BL * (batch["input_ids"] != self.special_ids["cls"])
        ordinary_BL *= batch["input_ids"] != self.special_ids["sep"]
        return sums | {
            "rtd_loss": total, "rtd_weight": weight,
            "rtd_correct": jnp.sum(((logits_BL > 0) == (labels_BL > 0)) * weights_BL),
            "replaced": jnp.sum(labels_BL * weights_BL),
            "auc_histograms": metrics.auc_histograms(jax.lax.stop_gradient(logits_BL), labels_BL, ordinary_BL)}

    def gradients(self, params, batch: Batch, key: Array, microbatches: int):
        """Gradient of the joint loss over the whole batch, and the sums of `forward`.

        Both losses are divided by the batch's own weights, which the selection fixes before any network
        runs, so that microbatches add up exactly; averages of microbatch averages would not.
        """
        row_keys, dropout_key = self._keys(key, batch)
        selection = self.select(batch, row_keys)
        mlm_weight = jnp.sum(selection.weights_BM)
        rtd_weight = jnp.sum(batch["piece_ids"] > 0).astype(jnp.float32)

        def loss(params, rows, dropout_key):
            sums = self.forward(params, *rows, dropout_key)
            return self.joint_loss(sums, mlm_weight, rtd_weight), sums

        rows = (batch, selection, row_keys)
        if microbatches == 1:
            return jax.grad(loss, has_aux=True)(params, rows, dropout_key)
        # Rows i, i + n, ... go together: a split that leaves every row on its device.
        stacked = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), rows)

        def add(carry, indexed):
            index, rows = indexed
            result = jax.grad(loss, has_aux=True)(params, rows, jax.random.fold_in(dropout_key, index))
            return jax.tree.map(jnp.add, carry, result), None

        shapes = jax.eval_shape(lambda: jax.grad(loss, has_aux=True)(
            params, jax.tree.map(lambda x: x[0], stacked), dropout_key))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (grads, sums), _ = jax.lax.scan(add, zeros, (jnp.arange(microbatches), stacked))
        return grads, sums

    def evaluate(self, params, batch: Batch, key: Array) -> dict[str, Array]:
        """The sums of `forward` without dropout."""
        row_keys, _ = self._keys(key, batch)
        return self.forward(params, batch, self.select(batch, row_keys), row_keys)

    def inspect(self, params, batch: Batch, key: Array) -> dict[str, Array]:
        """What the discriminator saw and said, without dropout: corrupted ids, labels, probabilities [B, L]."""
        row_keys, _ = self._keys(key, batch)
        _, replaced_ids_BL, labels_BL = self.generate(params, batch, self.select(batch, row_keys), row_keys)
        logits_BL = self.discriminate(params, batch, replaced_ids_BL)
        return {"input_ids": replaced_ids_BL, "labels": labels_BL, "probabilities": jax.nn.sigmoid(logits_BL)}

    def joint_loss(self, sums, mlm_weight, rtd_weight) -> Array:
        """mlm_weight * MLM + rtd_weight * RTD of the config, from sums (facts b.6)."""
        loss = jnp.zeros([], jnp.float32)
        if "mlm_loss" in sums:
            loss += self.config.mlm_weight * objectives.mean(sums["mlm_loss"], mlm_weight)
        if "rtd_loss" in sums:
            loss += self.config.rtd_weight * objectives.mean(sums["rtd_loss"], rtd_weight)
        return loss

    def _apply(self, params, method: str, inputs, dropout_key) -> Array:
        rngs = {} if dropout_key is None else {"dropout": dropout_key}
        return self.module.apply({"params": params}, *inputs, method=method, rngs=rngs,
                                 deterministic=dropout_key is None)

    @staticmethod
    def _others(batch: Batch) -> tuple[Array, ...]:
        return tuple(batch[name] for name in _INPUTS[1:])

    def _keys(self, key: Array, batch: Batch) -> tuple[Array, Array]:
        rows_key, dropout_key = jax.random.split(key)
        rows = jnp.arange(len(batch["input_ids"]))
        return jax.vmap(lambda row: jax.random.fold_in(rows_key, row))(rows), dropout_key


def summarize(sums: dict[str, np.ndarray], config) -> dict[str, float]:
    """Divides the sums of one step, or of several added up, into the metrics that a user reads.

    Losses in nats. `mlm_loss` is the trained loss over all selected positions; `mlm_masked_loss` and `mlm_accuracy`
    count those that show as [MASK] only. `rtd_floor` is the loss of always predicting the replaced fraction.
    """
    s = {name: np.asarray(value, np.float64) for name, value in sums.items()}
    out = {"loss": 0.0}
    if "mlm_loss" in s:
        out["mlm_loss"] = float(s["mlm_loss"] / max(s["mlm_weight"], 1e-6))
        for name, total in (("mlm_masked_loss", "mlm_shown_loss"), ("mlm_accuracy", "mlm_correct")):
            out[name] = float(s[total] / s["mlm_shown"]) if s["mlm_shown"] else math.nan
        out["loss"] += config.objective.mlm_weight * out["mlm_loss"]
    if "rtd_loss" in s:
        weight = max(s["rtd_weight"], 1e-6)
        out["rtd_loss"] = float(s["rtd_loss"] / weight)
        out["rtd_accuracy"] = float(s["rtd_correct"] / weight)
        out["rtd_auc"] = metrics.auc(s["auc_histograms"])
        out["replaced_fraction"] = float(s["replaced"] / weight)
        out["rtd_floor"] = metrics.entropy(out["replaced_fraction"])
        out["loss"] += config.objective.rtd_weight * out["rtd_loss"]
    return out | {name: float(s[name]) for name in ("learning_rate", "grad_norm") if name in s}
