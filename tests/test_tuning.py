"""Fine-tuning: heads, losses, layer-wise rates, batches by length, and one compilation a shape."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import tiny

from electra_jax import model, sharding
from electra_jax.config import UserError
from electra_jax.tasks.base import Feature
from electra_jax.tuning import batches, heads, many, run, step
from electra_jax.tuning import config as config_lib

ARCH = dataclasses.replace(model.discriminator_architecture(tiny.config().model), num_layers=2)
SETTINGS = step.Settings(layer_decay=0.8, layer_decay_rule="original", weight_decay=0.01, beta1=0.9, beta2=0.999,
                         epsilon=1e-6, bias_correction=False, clip_norm=1.0, loss_sum=True)
HEADS = {
    "classification": heads.Head("classification", 3, "electra", 0.0),
    "huggingface": heads.Head("classification", 3, "huggingface", 0.0),
    "regression": heads.Head("regression", 1, "electra", 0.0),
    "tagging": heads.Head("tagging", 5, "electra", 0.0),
    "plain": heads.Head("qa", 1, "plain", 0.0),
    "joint": heads.Head("qa", 1, "joint", 0.0, beam=4),
}


def mesh(devices: int = 1, **sizes):
    return sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1} | sizes, jax.devices()[:devices])


def features(kind: str, count: int, seed: int = 0) -> list[Feature]:
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        n = int(rng.integers(5, 20))
        ids = rng.integers(5, 67, n).astype(np.int32)
        types = (np.arange(n) > n // 2).astype(np.int32)
        allowed, targets = None, {"label": int(rng.integers(3))}
        if kind == "regression":
            targets = {"label": float(rng.random())}
        elif kind == "tagging":
            targets = {"label": rng.integers(-1, 5, n).astype(np.int32)}
        elif kind in ("plain", "joint"):
            allowed = (types == 1) | (np.arange(n) == 0)
            start, end = sorted(rng.choice(np.flatnonzero(allowed), 2).tolist())
            targets = {"start": start, "end": end, "impossible": int(start == 0)}
        out.append(Feature(ids, types, targets, allowed))
    return out


def noise(program: step.Program, seed: int = 0):
    return program.place(tiny.params(lambda: program._fresh(jax.random.key(0))["params"], seed))


@pytest.fixture(scope="module")
def programs(quick_compile):
    return {name: step.program(ARCH, head, SETTINGS, mesh()) for name, head in HEADS.items()}


# --- Rates ---------------------------------------------------------------------------------------

@pytest.mark.parametrize(("rule", "head", "top", "bottom", "embeddings"), [
    ("original", 0, 2, 13, 14), ("paper", 0, 1, 12, 13)])
def test_layers_learn_slower_by_the_published_exponents(rule, head, top, bottom, embeddings):
    paths = {"head/logits/kernel": head, "discriminator/encoder/layer_11/ffn/in/kernel": top,
             "discriminator/encoder/layer_0/attention/qkv_bias": bottom, "embeddings/norm/scale": embeddings,
             "discriminator/encoder/embeddings_project/kernel": embeddings,
             "discriminator/encoder/final_norm/scale": top}
    for path, exponent in paths.items():
        assert step.layer_scale(path, 12, 0.8, rule) == pytest.approx(0.8**exponent), path


def test_the_rate_warms_up_and_decays_to_zero_over_the_run():
    o = config_lib.get_config().optimizer
    o.update({"learning_rate": 1e-3, "warmup": 0.1})
    rates = [run.learning_rate(o, now, 100) for now in range(100)]
    assert rates[0] == 0 and rates[5] == pytest.approx(1e-3 * 0.5 * 0.95) and rates[10] == pytest.approx(0.9e-3)
    assert rates[99] == pytest.approx(1e-5) and max(rates) == rates[10]
    o.warmup = 0.0
    assert run.learning_rate(o, 0, 100) == 1e-3


# --- Step ----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("scan", "rule"), [(False, "original"), (True, "paper")])
def test_an_update_equals_adam_with_layer_wise_rates_in_float64(scan, rule, quick_compile):
    settings = dataclasses.replace(SETTINGS, layer_decay_rule=rule)
    program = step.program(dataclasses.replace(ARCH, scan_layers=scan), HEADS["classification"], settings, mesh())
    params = noise(program)
    before = tiny.flat(model.unstack_layers(jax.device_get(params)))
    batch = batches.collate(features("classification", 4), 4, 8, 64, 0)

    def loss(p):
        return heads.losses(program.head, program.module.apply({"params": p}, batch), batch).sum()

    grads = tiny.flat(model.unstack_layers(jax.device_get(jax.jit(jax.grad(loss))(params))))
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads.values()))
    assert norm > 1    # so that clipping acts
    state = program.state(None, 0) | {"params": params}
    state, sums = program.train(state, batch, 0.01, jax.random.key(0))
    after = tiny.flat(model.unstack_layers(jax.device_get(state["params"])))
    assert float(sums["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    for path, p in before.items():
        g = grads[path].astype(np.float64) / norm
        update = 0.1 * g / (np.sqrt(0.001 * g * g) + 1e-6)
        if not ("norm/" in path or path.endswith("bias")):
            update += 0.01 * p
        expected = p - 0.01 * step.layer_scale(path, 2, 0.8, rule) * update
        if path.endswith("qkv_bias"):   # a key's bias has no gradient, only rounding, which Adam makes large
            expected, after[path] = np.delete(expected, 1, -2), np.delete(after[path], 1, -2)
        np.testing.assert_allclose(after[path], expected, atol=2e-6, err_msg=path)


@pytest.mark.parametrize("kind", ["huggingface", "regression", "tagging", "joint"])
def test_every_head_learns_its_batch_by_heart(kind, programs):
    settings = dataclasses.replace(SETTINGS, layer_decay=1.0, weight_decay=0.0)
    program = step.program(ARCH, HEADS[kind], settings, mesh())
    batch = batches.collate(features(kind, 8), 8, 8, 64, 0)
    state, first = program.state(None, 0), None
    for i in range(60):
        state, sums = program.train(state, batch, 3e-3, jax.random.key(i))
        first = float(sums["loss"]) if first is None else first
    assert float(sums["loss"]) < 0.2 * first


def test_pretrained_parameters_are_taken_and_the_head_follows_the_seed(programs):
    program = programs["classification"]
    pretrained = jax.device_get(noise(program, 3))
    a, b = (program.state(pretrained, seed)["params"] for seed in (0, 1))
    for name in ("embeddings", "discriminator"):
        for tree in (a, b):
            assert all(map(np.array_equal, tiny.flat(tree[name]).values(), tiny.flat(pretrained[name]).values()))
    assert not np.array_equal(a["head"]["logits"]["kernel"], b["head"]["logits"]["kernel"])


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"data": 2, "tensor": 2}])
def test_a_mesh_changes_nothing(sizes, programs):
    batch = batches.collate(features("joint", 8), 8, 8, 64, 0)
    results = []
    for program in (programs["joint"], step.program(ARCH, HEADS["joint"], SETTINGS, mesh(4, **({"data": 1} | sizes)))):
        state = program.state(jax.device_get(noise(programs["joint"])), 0)
        state, sums = program.train(state, batch, 1e-3, jax.random.key(0))
        results.append((float(sums["loss"]), jax.device_get(state["params"]["head"])))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for x, y in zip(*(jax.tree.leaves(r[1]) for r in results), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


# --- Heads and losses ---------------------------------------------------------------------------

def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


def test_losses_are_those_of_the_definitions():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(4, 3)), np.array([0, 2, 1, 1])
    expected = [-log_softmax(row)[label] for row, label in zip(logits, labels, strict=True)]
    got = heads.losses(HEADS["classification"], {"logits": logits}, {"label": labels})
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    got = heads.losses(HEADS["regression"], {"score": np.array([0.5, 1.0])}, {"label": np.array([0.0, 0.75])})
    np.testing.assert_allclose(got, [0.25, 0.0625])
    tags, labels = rng.normal(size=(2, 3, 5)), np.array([[1, -1, 4], [-1, -1, -1]])
    expected = [-log_softmax(tags[0, 0])[1] - log_softmax(tags[0, 2])[4], 0]
    np.testing.assert_allclose(heads.losses(HEADS["tagging"], {"logits": tags}, {"label": labels}), expected, rtol=1e-5)
    start, end, odds = rng.normal(size=(2, 6)), rng.normal(size=(2, 6)), np.array([0.3, -2.0])
    batch = {"start": np.array([1, 0]), "end": np.array([4, 0]), "impossible": np.array([0, 1])}
    plain = [-(log_softmax(start[i])[batch["start"][i]] + log_softmax(end[i])[batch["end"][i]]) / 2 for i in range(2)]
    np.testing.assert_allclose(heads.losses(HEADS["plain"], {"start": start, "end": end}, batch), plain, rtol=1e-5)
    joint = np.array(plain) + 0.5 * np.array([np.log1p(np.exp(0.3)), np.log1p(np.exp(2.0))])
    got = heads.losses(HEADS["joint"], {"start": start, "end": end, "impossible": odds}, batch)
    np.testing.assert_allclose(got, joint, rtol=1e-5)


def test_the_joint_head_scores_ends_given_starts_as_written(programs):
    """Against a plain float64 reading of facts b.14, by pairs [start; token]."""
    program = programs["joint"]
    params = noise(program)
    batch = batches.collate(features("joint", 3), 3, 8, 64, 0)
    inputs = ("input_ids", "attention_mask", "token_type_ids", "allowed")
    out = jax.device_get(program.predict(params, {name: batch[name] for name in inputs}))
    module = model.Discriminator(ARCH, ARCH)
    hidden = np.asarray(module.apply({"params": params}, batch["input_ids"], batch["attention_mask"],
                                     batch["token_type_ids"], method="encode"), np.float64)
    h = tiny.float64(jax.device_get(params["head"]))

    def dense(name, x):
        return x @ h[name]["kernel"] + h[name]["bias"]

    def gelu(x):
        from math import erf
        return 0.5 * x * (1 + np.vectorize(erf)(x / np.sqrt(2)))

    for i in range(3):
        allowed = batch["allowed"][i]
        start = np.where(allowed, dense("start", hidden[i])[:, 0], -1000)
        top = np.argsort(-start, kind="stable")[:4]
        np.testing.assert_array_equal(out["start_positions"][i], top)
        np.testing.assert_allclose(out["start_log_probs"][i], log_softmax(start)[top], atol=1e-4)
        for s, position in enumerate(top):
            pairs = np.concatenate([np.tile(hidden[i, position], (len(hidden[i]), 1)), hidden[i]], -1)
            end = log_softmax(np.where(allowed, dense("end", gelu(dense("end_hidden", pairs)))[:, 0], -1000))
            best = np.argsort(-end, kind="stable")[:4]
            np.testing.assert_array_equal(out["end_positions"][i, s], best)
            np.testing.assert_allclose(out["end_log_probs"][i, s], end[best], atol=1e-4)
        summary = np.concatenate([hidden[i, 0], np.exp(log_softmax(start)) @ hidden[i]])
        impossible = dense("impossible", gelu(dense("impossible_hidden", summary)))[0]
        assert out["impossible"][i] == pytest.approx(impossible, abs=1e-4)


# --- Batches -------------------------------------------------------------------------------------

def test_an_epoch_is_a_function_of_the_seed_and_takes_each_row_once():
    lengths = np.random.default_rng(0).integers(5, 120, 333)
    first, again, other_seed, next_epoch = (
        [b.tolist() for b in batches.epoch(lengths, 8, 5, *numbers)] for numbers in ((0, 0), (0, 0), (1, 0), (0, 1)))
    assert first == again and first != other_seed and first != next_epoch
    rows = list(itertools.chain(*first))
    assert len(rows) == 328 and len(set(rows)) == 328 and all(len(b) == 8 for b in first)
    spread = [lengths[b].max() - lengths[b].min() for b in first]
    random = [lengths[b].max() - lengths[b].min() for b in batches.epoch(lengths, 8, 1, 0, 0)]
    assert np.mean(spread) < 0.5 * np.mean(random)
    order = [lengths[b].mean() for b in first]
    assert np.corrcoef(order, np.arange(len(order)))[0, 1] < 0.5    # not from short to long


def test_few_lengths_cover_all_and_none_is_cut():
    found = [batches.padded_length(n, 8, 512) for n in range(1, 513)]
    assert sorted(set(found)) == [*range(8, 65, 8), 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512]
    assert all(padded >= n for n, padded in enumerate(found, 1))
    assert {batches.padded_length(n, 64, 512) for n in range(1, 513)} == {*range(64, 513, 64)}
    assert batches.padded_length(100, 16, 110) == 110    # never longer than the longest feature can be


def test_collate_pads_what_is_there_and_loses_nothing():
    rows = features("joint", 3)
    batch = batches.collate(rows, 4, 8, 64, pad_id=9)
    for i, f in enumerate(rows):
        n = len(f.input_ids)
        assert np.array_equal(batch["input_ids"][i, :n], f.input_ids) and (batch["input_ids"][i, n:] == 9).all()
        assert batch["attention_mask"][i].sum() == n and batch["attention_mask"][i, :n].all()
        assert np.array_equal(batch["allowed"][i, :n], f.allowed) and not batch["allowed"][i, n:].any()
        assert all(batch[name][i] == value for name, value in f.targets.items())
    tags = batches.collate(features("tagging", 2), 2, 8, 64, 0)
    assert (tags["label"][tags["attention_mask"] == 0] == -1).all()


@pytest.mark.parametrize("kind", HEADS)
def test_predictions_come_back_in_order_whatever_the_batches(kind, programs):
    program, rows = programs[kind], features(kind, 11)
    params = noise(program)
    data = config_lib.get_config().data
    data.update({"bucket": 8, "eval_batch_size": 4})
    together = run.predict(program, params, rows, data, 0)
    assert len(together) == 11
    for feature, outputs in zip(rows, together, strict=True):
        (alone,) = run.predict(program, params, [feature], data, 0)
        for name in outputs:
            if name.endswith("positions"):
                continue    # of starts that nothing tells apart, any may come
            np.testing.assert_allclose(outputs[name], alone[name], atol=2e-5, err_msg=name)
            if kind in ("tagging", "plain"):
                assert len(outputs[name]) == len(feature.input_ids)
        if kind == "plain":
            assert np.exp(outputs["start"]).sum() == pytest.approx(1, abs=1e-6)


def test_an_evaluation_batch_has_no_more_rows_than_there_are_beyond_1024(programs):
    program, rows = programs["classification"], features("classification", 3)
    data = config_lib.get_config().data
    data.update({"bucket": 8, "eval_batch_size": 10**12})
    assert len(run.predict(program, noise(program), rows, data, 0)) == 3


def test_only_glues_own_tasks_have_its_epochs():
    c = config_lib.get_config()
    assert [config_lib.epochs(c, name) for name in ("rte", "stsb", "cola")] == [10, 10, 3]
    for kind, passes in (("text", 3), ("tagging", 3), ("squad", 2)):
        c.task.kind = kind
        assert config_lib.epochs(c, "stsb") == passes


def test_seeds_and_lengths_of_runs_share_one_compilation_a_shape(quick_compile):
    head = heads.Head("classification", 2, "electra", 0.123)    # of its own, so that no other test compiled it
    program = step.program(ARCH, head, SETTINGS, mesh())
    assert step.program(ARCH, heads.Head("classification", 2, "electra", 0.123), SETTINGS, mesh()) is program
    data = config_lib.get_config().data
    data.update({"batch_size": 4, "bucket": 8, "seq_len": 24, "pool_batches": 2})
    rows = features("classification", 24)
    rows = [dataclasses.replace(f, targets={"label": f.targets["label"] % 2}) for f in rows]
    shapes = set()
    for seed, steps in ((0, 9), (1, 6)):
        made, state = batches.Batches(rows, data, seed, 0), program.state(None, seed)
        for i in range(steps):
            batch = made.batch_at(i)
            shapes.add(batch["input_ids"].shape)
            state, _ = program.train(state, batch, 1e-4 * i, jax.random.key(i))
    assert 1 < len(shapes) <= 3 and program.compilations() == (len(shapes), 0)


def test_too_few_rows_for_a_batch_are_refused():
    with pytest.raises(UserError, match=r"data.batch_size=32 .* 5 sequences"):
        batches.Batches(features("classification", 5), config_lib.get_config().data, 0, 0)


# --- The table ------------------------------------------------------------------------------------

def test_the_table_has_the_statistics_of_the_runs():
    results = [{"task": "cola", "metric": "matthews", "scores": {"accuracy": 70.0, "matthews": x}, "seconds": 5}
               for x in (10.0, 40.0, 20.0)]
    row, other = many.summarize(results)
    assert (row["metric"], row["n"], row["median"], row["best"]) == ("matthews", 3, 20.0, 40.0)
    assert row["mean"] == pytest.approx(70 / 3) and row["std"] == pytest.approx(15.2752523)
    assert other["metric"] == "accuracy" and other["std"] == 0
    assert many.summarize(results[:1])[0]["std"] != many.summarize(results[:1])[0]["std"]    # of one run: none
    assert many.markdown([row]).splitlines()[2] == "| cola | matthews | 20.00 | 23.33 | 15.28 | 40.00 | 3 | 5 |"
