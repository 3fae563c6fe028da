"""Both networks against torch and transformers where they are installed: every layer, and every gradient."""

import jax
import numpy as np
import pytest
import tiny
import transformers_oracle as oracle

import electra_jax
from electra_jax import model
from electra_jax.data.tokenizer import load_tokenizer
from electra_jax.interop import huggingface, names, weights, workdir

torch = pytest.importorskip("torch", reason="torch is not installed: the golden files stand in for it")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.usefixtures("quick_compile")
BOTH = pytest.mark.parametrize("network", oracle.NETWORKS)


def build(name, network, own_initialisation=False):
    """A case's configuration, batch and torch module, with the weights of the golden files or torch's own."""
    config, length = oracle.CASES[name]
    module = oracle.build(network, config)
    if not own_initialisation:
        with torch.no_grad():
            weights = oracle.weights({key: tuple(x.shape) for key, x in module.named_parameters()})
            for key, x in module.named_parameters():
                x.copy_(torch.from_numpy(weights[key]))
    return config, oracle.batch(config, length), module


@BOTH
@pytest.mark.parametrize("name", oracle.CASES)
def test_loss_logits_states_and_gradients_are_those_of_transformers(name, network, record_property):
    config, data, module = build(name, network)
    arch = oracle.architecture(config)
    rows = oracle.rows(network, arch)
    ours = oracle.ours(network, arch, names.from_huggingface(rows, oracle.state(module), name), data)
    theirs = oracle.theirs(network, module, data)
    real = data["attention_mask"] == 1
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert len(ours["states"]) == len(theirs["states"]) == 1 + arch.num_layers
    for a, b in zip((ours["logits"], *ours["states"]), (theirs["logits"], *theirs["states"]), strict=True):
        assert b[real].std() > 0.05
        np.testing.assert_allclose(a[real], b[real], atol=1e-4, rtol=0)
    gradients = names.to_huggingface(rows, jax.device_get(ours["gradients"]))
    assert set(gradients) == set(theirs["gradients"])
    whole = np.sqrt(sum((x.astype(float) ** 2).sum() for x in theirs["gradients"].values()))
    for key, expected in theirs["gradients"].items():
        # Adding to all keys changes no attention: the gradient of their bias is rounding on both sides.
        is_zero = "key.bias" in key
        assert (np.linalg.norm(expected) < 1e-5 * whole) == is_zero, key
        assert oracle.distance(gradients[key], expected, scale=whole if is_zero else 0.0) < 1e-3, key
    worst = {"logits": np.abs(ours["logits"] - theirs["logits"])[real].max(),
             "states": max(np.abs(a - b)[real].max() for a, b in zip(ours["states"], theirs["states"], strict=True)),
             "gradients": max(oracle.distance(gradients[k], x) for k, x in theirs["gradients"].items()
                              if "key.bias" not in k)}
    for what, value in worst.items():
        record_property(what, float(value))


@BOTH
def test_scanned_layers_give_the_numbers_of_transformers(network):
    config, data, module = build("four_heads_three_layers", network)
    rows = oracle.rows(network, oracle.architecture(config))
    params = names.from_huggingface(rows, oracle.state(module), "live")
    ours = oracle.ours(network, oracle.architecture(config, scan_layers=True), model.stack_layers(params), data)
    theirs = oracle.theirs(network, module, data)
    real = data["attention_mask"] == 1
    for a, b in zip((ours["logits"], *ours["states"]), (theirs["logits"], *theirs["states"]), strict=True):
        np.testing.assert_allclose(a[real], b[real], atol=1e-4, rtol=0)
    gradients = names.to_huggingface(rows, model.unstack_layers(ours["gradients"]))
    for key, expected in theirs["gradients"].items():
        assert "key.bias" in key or oracle.distance(gradients[key], expected) < 1e-3, key


@BOTH
def test_a_network_as_transformers_initialises_it_gives_the_same_logits(network):
    config, data, module = build("six_heads", network, own_initialisation=True)
    arch = oracle.architecture(config)
    params = names.from_huggingface(oracle.rows(network, arch), oracle.state(module), "live")
    ours = oracle.ours(network, arch, params, data, gradients=False)["logits"]
    real = data["attention_mask"] == 1
    np.testing.assert_allclose(ours[real], oracle.theirs(network, module, data)["logits"][real], atol=1e-4, rtol=0)


@BOTH
@pytest.mark.parametrize("name", oracle.CASES)
def test_tensors_survive_the_way_there_and_back_bit_for_bit(name, network):
    config, _, module = build(name, network)
    rows = oracle.rows(network, oracle.architecture(config))
    before = oracle.state(module)
    params = names.from_huggingface(rows, before, "live")
    back = names.to_huggingface(rows, params)
    assert set(back) == set(before)
    for key, x in before.items():
        np.testing.assert_array_equal(back[key], x, strict=True, err_msg=key)
    module.load_state_dict({key: torch.from_numpy(x) for key, x in back.items()}, strict=False)
    jax.tree.map(np.testing.assert_array_equal, names.from_huggingface(rows, oracle.state(module), "live"), params)


# --- Whole folders ------------------------------------------------------------------------------

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(97 + i) for i in range(26)),
         *(f"##{chr(97 + i)}" for i in range(26))]
RUNS = {
    "shared_tables": {},
    "equal_widths": dict(embedding_size=16, generator_size=1.0, num_layers=1),
    "own_tables_other_proportions": dict(sharing="none", generator_heads=1, generator_intermediate_size=12,
                                         layer_norm_eps=1e-6, generator_layers=0.5),
    "one_network": dict(sharing="all", generator_size=1.0, num_layers=1),
    "padded_table": dict(vocab_size=64, num_layers=1),
}


def write_run(folder, fields):
    """A workdir of ours with noise for parameters."""
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    c = tiny.config(**{f"model__{name}": value for name, value in ({"vocab_size": len(WORDS)} | fields).items()})
    params = tiny.params(lambda: model.init_params(model.build(c.model), jax.random.key(0)))
    workdir.write(folder / "run", c.model.to_dict(), params, load_tokenizer(folder / "vocab.txt"))
    return folder / "run"


def load(auto, folder):
    """A transformers model of a folder, and the names of tensors that it missed and that it did not know."""
    module, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["mismatched_keys"]
    return module.eval(), set(info["missing_keys"]), set(info["unexpected_keys"])


def texts():
    """Two rows of 13 ids within the vocabulary, the second padded, in two segments."""
    ids = np.random.RandomState(0).randint(5, len(WORDS), (2, 13))
    real = np.ones_like(ids)
    real[1, 9:] = ids[1, 9:] = 0
    return {"input_ids": ids, "attention_mask": real, "token_type_ids": (np.arange(13) > 5) * real}


def in_torch(module, data, **options):
    with torch.no_grad():
        return module(**{name: torch.from_numpy(x) for name, x in data.items()}, **options)


def assert_same_at_tokens(ours, theirs, data):
    real = data["attention_mask"] == 1
    theirs = theirs.numpy()
    assert theirs.shape == ours.shape and theirs[real].std() > 0.05
    np.testing.assert_allclose(np.asarray(ours)[real], theirs[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("fields", RUNS.values(), ids=RUNS)
def test_exported_folders_load_in_transformers_whole_and_give_our_logits(tmp_path, fields):
    run, data = write_run(tmp_path, fields), texts()
    huggingface.export(run, tmp_path / "hf")
    for network, auto, ours in (
            ("discriminator", transformers.AutoModelForPreTraining, electra_jax.load_discriminator(run)),
            ("generator", transformers.AutoModelForMaskedLM, electra_jax.load_generator(run))):
        module, missing, unexpected = load(auto, tmp_path / "hf" / network)
        assert type(module).__name__ == oracle.NETWORKS[network] and not missing and not unexpected
        logits = jax.jit(ours.module.apply)({"params": ours.params}, **data)
        if network == "generator":
            logits = logits[..., :len(WORDS)]   # rows that only pad the table are not exported
        assert_same_at_tokens(logits, in_torch(module, data).logits, data)
        encoder, missing, unexpected = load(transformers.AutoModel, tmp_path / "hf" / network)
        assert not missing and all(name.split(".")[0].endswith(("predictions", "lm_head")) for name in unexpected)
        if network == "discriminator":
            states = ours.module.apply({"params": ours.params}, **data, method="encode")
            assert_same_at_tokens(states, in_torch(encoder, data).last_hidden_state, data)


def save(network, folder, how, **config):
    """A folder as transformers writes it, with safetensors or one of torch's formats, and its tensors."""
    config = {"vocab_size": len(WORDS), "embedding_size": 8, "hidden_size": 16, "num_hidden_layers": 2,
              "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 20} | config
    module = oracle.build(network, config)
    drawn = oracle.weights({key: tuple(x.shape) for key, x in module.named_parameters()})
    with torch.no_grad():
        for key, x in module.named_parameters():
            x.copy_(torch.from_numpy(drawn[key]))
    module.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    if how != "safetensors":
        (folder / "model.safetensors").unlink()
        torch.save(module.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=how == "zip")
    return module, oracle.state(module)


@pytest.mark.parametrize("how, generator", [
    ("safetensors", dict(hidden_size=8, intermediate_size=12, num_attention_heads=1)),
    ("zip", dict(embedding_size=24, hidden_size=12, num_hidden_layers=1)),   # its tables cannot be the other's
    ("legacy", dict(hidden_size=8, num_hidden_layers=1))])
def test_folders_of_transformers_come_in_and_go_out_bit_for_bit(tmp_path, how, generator):
    data, before = texts(), {}
    for network, config in (("discriminator", {}), ("generator", generator)):
        module, before[network] = save(network, tmp_path / network, how, **config)
        ours = getattr(electra_jax, f"load_{network}")(tmp_path / network)
        logits = jax.jit(ours.module.apply)({"params": ours.params}, **data)
        assert_same_at_tokens(logits, in_torch(module, data).logits, data)
    huggingface.import_folders(tmp_path / "discriminator", tmp_path / "run", tmp_path / "generator")
    huggingface.export(tmp_path / "run", tmp_path / "hf")
    for network, tensors in before.items():
        after = weights.read(tmp_path / "hf" / network)
        assert set(after) == set(tensors)
        for key, x in tensors.items():
            np.testing.assert_array_equal(after[key], x, strict=True, err_msg=key)
        a, b = (transformers.ElectraConfig.from_pretrained(tmp_path / x / network).to_dict() for x in (".", "hf"))
        for key in a.keys() - {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}:
            assert a[key] == b.get(key), key
