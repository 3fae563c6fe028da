"""Joins model, objective, optimizer and mesh into the programs that a run consists of.

`build` returns a `Program`: initialise, train, evaluate, inspect, each one `jax.jit` over the mesh. The state is
`{"step", "params", "opt_state"}`; all randomness is derived from (seed, step), so nothing random is stored.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from electra_jax import attention, chunks, metrics, model, objectives, optimizer, sharding
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
    train_steps: Callable[[State, Batch, Array], tuple[State, dict[str, Array]]]
    eval_step: Callable[[Any, Batch, Array], dict[str, Array]]
    inspect_step: Callable[[Any, Batch, Array], dict[str, Array]]
    abstract_state: State               # shapes and shardings, for a restore
    flops_per_step: float               # forward and backward matmuls, 3 x forward


def build(config, mesh: Mesh, special_ids: dict[str, int], num_tokens: int | None = None) -> Program:
    """Builds the programs for a config with `model.vocab_size` set.

    `special_ids` maps "pad", "cls", "sep" and "mask" to their ids; `num_tokens` is the tokenizer's size where the
    model's vocabulary is padded beyond it. Raises UserError when sizes do not divide over the mesh, or the kind of
    attention does not run on it. `train_step` and `train_steps` donate their state.
    """
    sharding.check_divides(config, mesh)
    attention.check(config.model.attention, config.data.seq_len, mesh, model.head_sizes(config.model))
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

    def train_steps(state: State, batches: Batch, count: Array):
        """The first `count` of the batches, which have the steps in front; the sums of steps not taken are 0."""
        def body(i, carry):
            state, all_sums = carry
            state, sums = train_step(state, jax.tree.map(lambda x: x[i], batches))
            return state, jax.tree.map(lambda x, new: x.at[i].set(new), all_sums, sums)

        size = len(batches["input_ids"])
        shapes = jax.eval_shape(train_step, state, jax.tree.map(lambda x: x[0], batches))[1]
        zeros = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), shapes)
        # Not a scan beside a single step: two programs would round differently, and a resume would show it.
        return jax.lax.fori_loop(0, count, body, (state, zeros))

    def jit(function, *in_shardings, **options):
        @functools.wraps(function)
        def on_mesh(*args):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):   # for kernels that are split by hand
                return function(*args)
        return jax.jit(on_mesh, in_shardings=in_shardings, **options)

    def on_held_out(method):
        def program(params, batch: Batch, index: Array):
            return method(params, batch, jax.random.fold_in(jax.random.fold_in(root, _EVAL), index))
        program.__name__ = method.__name__
        return jit(program, shardings["params"], batch_in, whole, out_shardings=whole)

    abstract = jax.eval_shape(init_state)
    shardings = sharding.state_shardings(abstract, mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    batch_in, batches_in = (dict.fromkeys(_INPUTS, sharding.batch_sharding(mesh, stacked)) for stacked in (False, True))
    updates = {"out_shardings": (shardings, whole), "donate_argnums": 0}
    return Program(
        mesh=mesh,
        module=objective.module,
        init_state=jax.jit(init_state, out_shardings=shardings),
        train_step=jit(train_step, shardings, batch_in, **updates),
        train_steps=jit(train_steps, shardings, batches_in, whole, **updates),
        eval_step=on_held_out(objective.evaluate),
        inspect_step=on_held_out(objective.inspect),
        abstract_state=jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                                    abstract, shardings),
        flops_per_step=3 * config.data.batch_size * model.matmul_flops(
            config.model, config.data.seq_len, num_masked(config),
            "rtd" if config.objective.uniform_generator else config.objective.name),
    )


class Objective:
    """ELECTRA's joint loss, or plain MLM of the full-size network, over a batch."""

    def __init__(self, config, special_ids: dict[str, int], num_tokens: int | None = None):
        self.config = config.objective
        self.dropout_rng = config.run.dropout_rng
        self.special_ids = special_ids
        self.vocab_size = config.model.vocab_size
        self.num_tokens = num_tokens or self.vocab_size
        self.num_masked = num_masked(config)
        self.seq_len = config.data.seq_len
        self.is_mlm = self.config.name == "mlm"
        self.module = model.build(config.model, full_size_mlm=self.is_mlm, packed=config.data.pack)
        self._logits = functools.partial(self.module.apply, method="mlm_logits")
        self._head_params = functools.partial(model.mlm_head_params, sharing=self.module.sharing)
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

    def generate(self, params, batch: Batch, selection, row_keys, dropout_key=None):
        """Runs the generator and draws replacements: (loss, (other sums, sampled ids [B, M])).

        The slots are taken in `objective.mlm_chunks` parts, so that only one part's logits exist at a time.
        """
        o = self.config
        slots = {"targets": selection.targets_BM, "weights": selection.weights_BM, "shown": selection.shown_BM,
                 "noise": objectives.draw_sampler_noise(row_keys, num_masked=self.num_masked,
                                                        vocab_size=self.vocab_size, sampler=o.sampler)}
        if o.uniform_generator:
            logits_BMV = jnp.zeros((*selection.positions_BM.shape, self.vocab_size), jnp.float32)
            return jnp.zeros([], jnp.float32), ({}, self._sample(self._real(logits_BMV), slots))
        inputs = (selection.masked_ids_BL, *self._others(batch), selection.positions_BM)
        states_BMD = self._apply(params, "generator_states", inputs, dropout_key if o.generator_dropout else None)
        if o.mlm_chunks == 1:
            return self._predict(self._head_params(params), states_BMD, slots)
        return chunks.sum_over_chunks(self._predict, o.mlm_chunks, self._head_params(params), states_BMD, slots)

    def _predict(self, head_params, states_BMD: Array, slots: dict[str, Array]):
        """The loss over slots, (sums for the metrics, sampled ids [B, M])."""
        logits_BMV = self._real(self._logits({"params": head_params}, states_BMD))
        mesh = sharding.context_mesh()
        loss = functools.partial(objectives.mlm_loss, by_chunks=mesh is None or mesh.shape["tensor"] == 1)
        total, weight, correct_BM = loss(logits_BMV, slots["targets"], slots["weights"])
        # What a selected but visible token adds is copying, no test of the network: apart, for the metrics.
        shown_BM = slots["shown"].astype(jnp.float32)
        shown_total, shown, _ = loss(logits_BMV, slots["targets"], shown_BM)
        sums = {"mlm_weight": weight, "mlm_correct": jnp.sum(correct_BM * shown_BM),
                "mlm_shown_loss": shown_total, "mlm_shown": shown}
        return total, (sums, slots["targets"] if self.is_mlm else self._sample(logits_BMV, slots))

    def _real(self, logits_BMV: Array) -> Array:
        """Rows that only round the table up are never predicted or drawn."""
        if self.num_tokens == self.vocab_size:
            return logits_BMV
        return jnp.where(jnp.arange(self.vocab_size) < self.num_tokens, logits_BMV, -1e9)

    def _sample(self, logits_BMV: Array, slots: dict[str, Array]) -> Array:
        o = self.config
        return objectives.sample_replacements(logits_BMV, slots["targets"], slots["noise"], sampler=o.sampler,
                                              temperature=o.temperature, disallow_correct=o.disallow_correct)

    def replace(self, batch: Batch, selection, sampled_BM: Array) -> tuple[Array, Array]:
        """Returns the corrupted ids and the labels [B, L]."""
        return objectives.replace(batch["input_ids"], selection, sampled_BM, distinct=self.config.distinct_positions)

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
        total, (sums, sampled_BM) = self.generate(params, batch, selection, row_keys, dropout_key)
        if not self.config.uniform_generator:
            sums = sums | {"mlm_loss": total}
        if self.is_mlm:
            return sums
        replaced_ids_BL, labels_BL = self.replace(batch, selection, sampled_BM)
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
        selection = self.select(batch, row_keys)
        _, (_, sampled_BM) = self.generate(params, batch, selection, row_keys)
        replaced_ids_BL, labels_BL = self.replace(batch, selection, sampled_BM)
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
        if self.dropout_rng != "threefry":   # selection and samples keep their stream
            dropout_key = jax.random.wrap_key_data(jax.random.bits(dropout_key, (4,), jnp.uint32),
                                                   impl=self.dropout_rng)
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
