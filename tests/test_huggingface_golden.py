"""Both networks against numbers that torch and transformers gave (tests/data/huggingface), without either installed."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers_oracle as oracle

from electra_jax import model
from electra_jax.interop import names

pytestmark = pytest.mark.usefixtures("quick_compile")
DATA = Path(__file__).parent / "data/huggingface"


def load(name, network):
    """A case's architecture, its tensors by transformers' names, its batch, and transformers' numbers."""
    config, length = oracle.CASES[name]
    golden = dict(np.load(DATA / f"{name}_{network}.npz"))
    shapes = {key: tuple(shape) for key, shape in json.loads(str(golden["shapes"])).items()}
    return oracle.architecture(config), oracle.weights(shapes), oracle.batch(config, length), golden


@pytest.mark.parametrize("network", oracle.NETWORKS)
@pytest.mark.parametrize("name", oracle.GOLDEN)
def test_loss_logits_states_and_gradients_are_those_of_transformers(name, network):
    arch, tensors, data, golden = load(name, network)
    rows = oracle.rows(network, arch)
    out = oracle.ours(network, arch, names.from_huggingface(rows, tensors, name), data)
    real = data["attention_mask"] == 1
    assert out["loss"] == pytest.approx(float(golden["loss"]), abs=1e-5)
    np.testing.assert_allclose(oracle.sample(out["logits"][real], 400)[:-1], golden["logits"][:-1], atol=1e-4, rtol=0)
    assert len(out["states"]) == len(golden["states"]) == 1 + arch.num_layers
    for layer, (state, expected) in enumerate(zip(out["states"], golden["states"], strict=True)):
        np.testing.assert_allclose(oracle.sample(state[real], 200)[:-1], expected[:-1], atol=1e-4, rtol=0,
                                   err_msg=f"layer {layer}")
    gradients = names.to_huggingface(rows, jax.device_get(out["gradients"]))
    assert set(gradients) == set(tensors)
    whole = np.linalg.norm(golden["gradients"][:, -1])
    for key, expected in zip(tensors, golden["gradients"], strict=True):
        # The 16 values, and the norm of all; a key's bias has no gradient, what is there is rounding.
        *values, norm = expected
        *found, norm_found = oracle.sample(gradients[key], 16)
        scale = max(norm, 1e-4 * whole)
        assert ("key.bias" in key) == (norm < 1e-4 * whole), key
        assert abs(norm - norm_found) < 1e-3 * scale, key
        assert np.abs(np.subtract(values, found)).max() < 1e-3 * scale, key


@pytest.mark.parametrize("network", oracle.NETWORKS)
def test_scanned_layers_give_the_logits_of_transformers(network):
    config, _ = oracle.CASES["one_head"]
    arch, tensors, data, golden = load("one_head", network)
    params = names.from_huggingface(oracle.rows(network, arch), tensors, "golden")
    arch = oracle.architecture(config, scan_layers=True)
    out = oracle.ours(network, arch, model.stack_layers(params), data, gradients=False)
    logits = oracle.sample(out["logits"][data["attention_mask"] == 1], 400)
    np.testing.assert_allclose(logits[:-1], golden["logits"][:-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("sharing", ["embeddings", "none", "all"])
@pytest.mark.parametrize("network", oracle.NETWORKS)
def test_names_lead_there_and_back_without_a_changed_bit(network, sharing):
    arch, tensors, _, _ = load("three_segments_large_epsilon", network)
    rows = oracle.rows(network, arch, sharing)
    params = names.from_huggingface(rows, tensors, "golden")
    back = names.to_huggingface(rows, params)
    assert set(back) == set(tensors)
    for key in back:
        np.testing.assert_array_equal(back[key], tensors[key], strict=True, err_msg=key)
    jax.tree.map(np.testing.assert_array_equal, names.from_huggingface(rows, back, "back"), params)
