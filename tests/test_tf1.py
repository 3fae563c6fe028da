"""The original's checkpoints, and NVIDIA's, become our parameters: names, transposes, moments, sizes and logits."""

import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import oracle
import pytest
import tf_bundles
import tiny
from test_bundle import refusal

import electra_jax
from electra_jax import checkpoint, config, model, optimizer
from electra_jax.config import UserError
from electra_jax.interop import tf1

pytestmark = pytest.mark.usefixtures("quick_compile")

ELECTRA = dict(vocab_size=37, embedding_size=24, hidden_size=128, num_layers=2, num_heads=2, intermediate_size=96,
               max_positions=16, type_vocab_size=2, sharing="embeddings", generator_size=0.25, generator_layers=0.5,
               generator_heads=0, generator_intermediate_size=0, generator_embedding_size=0)
NVIDIA = ELECTRA | dict(embedding_size=64, hidden_size=64, num_layers=1, num_heads=1, generator_size=0.5,
                        generator_layers=1.0, generator_intermediate_size=128)
TINY = ELECTRA | dict(vocab_size=11, embedding_size=6, hidden_size=8, num_layers=1, intermediate_size=12,
                      generator_size=0.5, generator_layers=1.0, max_positions=9)
# What the fixtures' variables hold, in our tree. Written out by hand: the table of names is what is tested.


def expected(m, suffix="", draw=tf_bundles.values):
    """Our tree of `m`'s networks, each value as the original's variable of that name holds it."""
    def get(name, *shape):
        return draw(name + suffix, shape)

    def dense(name, a, b):
        return {"kernel": get(f"{name}/kernel", a, b), "bias": get(f"{name}/bias", b)}

    def norm(name, size):
        return {"scale": get(f"{name}/gamma", size), "bias": get(f"{name}/beta", size)}

    def tables(scope, E):
        sizes = {"word": m["vocab_size"], "position": m["max_positions"], "token_type": m["type_vocab_size"]}
        return {f"{kind}_embeddings": {"embedding": get(f"{scope}/embeddings/{kind}_embeddings", size, E)}
                for kind, size in sizes.items()} | {"norm": norm(f"{scope}/embeddings/LayerNorm", E)}

    def encoder(scope, E, D, F, layers):
        out = {"embeddings_project": dense(f"{scope}/embeddings_project", E, D)} if E != D else {}
        for i in range(layers):
            name = f"{scope}/encoder/layer_{i}"
            qkv = [dense(f"{name}/attention/self/{part}", D, D) for part in ("query", "key", "value")]
            kernel, bias = np.zeros((D, 3, D), np.float32), np.zeros((3, D), np.float32)
            for j, part in enumerate(qkv):
                kernel[:, j], bias[j] = part["kernel"], part["bias"]
            out[f"layer_{i}"] = {
                "attention": {"qkv_kernel": kernel, "qkv_bias": bias,
                              "out": dense(f"{name}/attention/output/dense", D, D)},
                "attention_norm": norm(f"{name}/attention/output/LayerNorm", D),
                "ffn": {"in": dense(f"{name}/intermediate/dense", D, F), "out": dense(f"{name}/output/dense", F, D)},
                "ffn_norm": norm(f"{name}/output/LayerNorm", D)}
        return out

    E, D, F, N = (m[name] for name in ("embedding_size", "hidden_size", "intermediate_size", "num_layers"))
    d = round(D * m["generator_size"])
    f = m["generator_intermediate_size"] or F * d // D
    e = E if m["sharing"] != "none" else m["generator_embedding_size"] or d
    generator = {"head": {"dense": dense("generator_predictions/dense", D if m["sharing"] == "all" else d, e),
                          "norm": norm("generator_predictions/LayerNorm", e),
                          "bias": get("generator_predictions/output_bias", m["vocab_size"])}}
    if m["sharing"] != "all":
        generator["encoder"] = encoder("generator", e, d, f, round(N * m["generator_layers"]))
    if m["sharing"] == "none":
        generator["embeddings"] = tables("generator", e)
    return {"embeddings": tables("electra", E), "generator": generator,
            "discriminator": {"encoder": encoder("electra", E, D, F, N),
                              "head": {"dense": dense("discriminator_predictions/dense", D, D),
                                       "logit": dense("discriminator_predictions/dense_1", D, 1)}}}


def variables(m, suffixes=("",)):
    """The original's variables of `m`'s networks by name."""
    out = {}

    def draw(name, shape):
        out[name] = tf_bundles.values(name, shape)
        return out[name]

    for suffix in suffixes:
        expected(m, suffix, draw)
    return out


def padded_table(name, shape):
    """Tensors by piece as they are in `nvidia`, padded to 40 rows, and then cut."""
    rows = (40, *shape[1:]) if name.split("/adam")[0].endswith(("word_embeddings", "output_bias")) else shape
    return tf_bundles.values(name, rows)[: shape[0] if shape else None]


def assert_equal(found, tree):
    jax.tree.map(np.testing.assert_array_equal, found, tree)    # also that both have the same leaves
    assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype("float32")}


def assert_logits_are_the_oracles(fields, params, tree):
    """Runs both networks of the section `fields` on `params`; the oracle runs on `tree`."""
    c = config.get_config()
    c.model.update(fields)
    batch = tiny.batch(0, 8, min(16, c.model.max_positions), c.model.vocab_size)
    everywhere = np.broadcast_to(np.arange(batch["input_ids"].shape[1]), batch["input_ids"].shape)
    exact = tiny.float64(tree)
    inputs = [batch[name] for name in ("input_ids", "token_type_ids", "piece_ids", "position_ids")]
    for ours, theirs in ((lambda m: m.generator_logits(*inputs, None),
                          oracle.generator_logits(exact, c.model, batch["input_ids"], batch, everywhere)),
                         (lambda m: m.discriminator_logits(*inputs),
                          oracle.discriminator_logits(exact, c.model, batch["input_ids"], batch))):
        found = jax.jit(lambda p, ours=ours: model.build(c.model).apply({"params": p}, method=ours))(params)
        assert theirs.std() > 0.05
        np.testing.assert_allclose(found, theirs, atol=2e-5 * np.abs(theirs).max(), rtol=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tf1")
    return {name: tf_bundles.unpack(name, root) for name in ("electra", "nvidia")}


@pytest.fixture(scope="module")
def electra(folders):
    return tf1.read_checkpoint(folders["electra"])


# --- The original's -----------------------------------------------------------------------------


def test_parameters_moments_and_step_are_the_originals_variables(electra):
    assert electra.model == ELECTRA and electra.step == 123 and electra.notes == ()
    assert_equal(electra.params, expected(ELECTRA))
    for moment, suffix in zip(electra.moments, ("/adam_m", "/adam_v"), strict=True):
        assert_equal(moment, expected(ELECTRA, suffix))


def test_the_model_built_from_the_fields_has_exactly_these_parameters(electra):
    c = config.get_config()
    c.model.update(electra.model)
    shapes = jax.eval_shape(lambda: model.init_params(model.build(c.model), jax.random.key(0)))
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), shapes, electra.params)


def test_both_networks_compute_what_the_oracle_computes_from_the_variables(electra):
    assert_logits_are_the_oracles(electra.model, electra.params, expected(ELECTRA))


@pytest.mark.parametrize("changes", [
    dict(sharing="none"), dict(sharing="none", embedding_size=8, generator_embedding_size=8),
    dict(sharing="all", generator_size=1.0), dict(embedding_size=8), dict(generator_intermediate_size=10),
    dict(generator_size=1.0, generator_heads=1)], ids=str)
def test_each_way_to_share_and_size_networks_is_recognised(tmp_path, changes):
    m = TINY | changes
    tf_bundles.write(tmp_path / "x", variables(m))
    gen_heads = m["generator_heads"] or max(1, round(8 * m["generator_size"]) // 4)
    found = tf1.read_checkpoint(tmp_path / "x", num_heads=2, generator_heads=gen_heads)
    assert found.model == m and found.moments is None and found.step is None
    assert found.notes == ("no moments of Adam", "no step count")
    assert_equal(found.params, expected(m))
    if "generator_heads" not in changes:    # the oracle derives them
        assert_logits_are_the_oracles(found.model, found.params, expected(m))


def test_what_is_missing_is_left_out_with_a_note(tmp_path):
    whole = variables(TINY, ("", "/adam_m", "/adam_v"))
    partial = {name: x for name, x in whole.items() if not name.startswith("generator")}
    del partial["electra/embeddings/word_embeddings/adam_v"]
    tf_bundles.write(tmp_path / "disc", partial | {"task_specific/sst/kernel": np.ones(3, np.float32)})
    found = tf1.read_checkpoint(tmp_path / "disc", num_heads=2)
    assert found.params.keys() == {"embeddings", "discriminator"} and found.moments is None
    assert "generator_size" not in found.model
    assert found.notes == ("no generator", "Adam's moments are left out: some are missing, such as "
                           "electra/embeddings/word_embeddings/adam_v", "no step count")
    tf_bundles.write(tmp_path / "encoder", {name: x for name, x in whole.items() if name.startswith("electra/")})
    found = tf1.read_checkpoint(tmp_path / "encoder", num_heads=2)
    assert found.params["discriminator"].keys() == {"encoder"} and found.moments is not None
    assert "no discriminator head: the encoder alone" in found.notes


def test_a_released_checkpoint_loads_without_flags(tmp_path):
    """Named after the model, without moments, with a temperature that the released code does not read."""
    m = TINY | dict(hidden_size=64, num_heads=1, generator_size=0.25, intermediate_size=8)
    (tmp_path / "electra_small").mkdir()
    extra = {"generator_predictions/temperature": np.ones((), np.float32), "global_step": np.array(4_000_000)}
    tf_bundles.write(tmp_path / "electra_small" / "electra_small", variables(m) | extra)
    found = tf1.read_checkpoint(tmp_path / "electra_small")
    assert found.model == m and found.step == 4_000_000 and found.notes == ("no moments of Adam",)
    assert_equal(found.params, expected(m))


@pytest.mark.parametrize("width, heads", [(64, 1), (192, 3), (256, 4)])
def test_heads_are_one_for_each_64_of_the_width(tmp_path, width, heads):
    m = TINY | dict(hidden_size=width, intermediate_size=8, generator_size=0.25)
    tf_bundles.write(tmp_path / "x", {name: tf_bundles.entry(x.shape, 0, b"") for name, x in variables(m).items()})
    found = tf1._Variables(str(tmp_path / "x"))
    assert tf1._architecture(found, "electra", "electra/embeddings", None).num_heads == heads
    assert tf1._architecture(found, "generator", "electra/embeddings", None).num_heads == 1


# --- NVIDIA's -----------------------------------------------------------------------------------


def test_nvidias_object_graph_gives_the_same_tree_cut_to_the_vocabulary(folders):
    found = tf1.read_checkpoint(folders["nvidia"], vocab_size=37)
    assert found.model == NVIDIA and found.step == 77
    assert found.notes == ("the token table's 40 rows were cut to the vocabulary's 37 pieces",)
    for tree, suffix in ((found.params, ""), (found.moments[0], "/adam_m"), (found.moments[1], "/adam_v")):
        assert_equal(tree, expected(NVIDIA, suffix, padded_table))
    assert_logits_are_the_oracles(found.model, found.params, expected(NVIDIA, "", padded_table))


def test_without_a_vocabulary_the_padded_rows_stay(folders):
    found = tf1.read_checkpoint(folders["nvidia"])
    assert found.model["vocab_size"] == 40 and found.notes == ()
    assert_equal(found.params, expected(NVIDIA | {"vocab_size": 40}))


@pytest.mark.parametrize("stored, original", [
    ("model/discriminator/electra/embeddings/word_embeddings", "electra/embeddings/word_embeddings"),
    ("model/generator/electra/encoder/layer/11/bert_output/dense/kernel/.OPTIMIZER_SLOT/optimizer/base_optimizer/v",
     "generator/encoder/layer_11/output/dense/kernel/adam_v"),
    ("model/generator/electra/embeddings/weight/.OPTIMIZER_SLOT/optimizer/m",
     "generator/embeddings/word_embeddings/adam_m")])
def test_nvidias_other_spellings_are_known(stored, original):
    assert tf1._original(stored + "/.ATTRIBUTES/VARIABLE_VALUE") == original


# --- What the user can mend ---------------------------------------------------------------------


def changed(tmp_path, change, **options):
    """The refusal of a tiny checkpoint whose variables `change` has altered."""
    tensors = variables(TINY)
    change(tensors)
    tf_bundles.write(tmp_path / "x", tensors)
    return refusal(lambda: tf1.read_checkpoint(tmp_path / "x", **({"num_heads": 2} | options)))


def test_unknown_variables_are_refused_by_name_unless_ignored(tmp_path):
    extra = {f"electra/extra_{i}": np.ones(2, np.float32) for i in range(4)}
    message = changed(tmp_path, lambda x: x.update(extra))
    assert "4 variables" in message and "electra/extra_0, electra/extra_1, electra/extra_2:" in message
    assert "--ignore_unknown" in message
    assert_equal(tf1.read_checkpoint(tmp_path / "x", num_heads=2, ignore_unknown=True).params, expected(TINY))


def test_heads_that_cannot_be_told_are_asked_for(tmp_path):
    assert "give --num_heads" in changed(tmp_path, lambda x: None, num_heads=None)
    assert "does not divide by 3 heads" in changed(tmp_path, lambda x: None, num_heads=3)
    assert "another --generator_heads" in changed(tmp_path, lambda x: None, generator_heads=3)


def test_missing_and_unfitting_variables_are_named(tmp_path):
    assert "no variable electra/embeddings/word_embeddings" in changed(tmp_path, dict.clear)
    lost = "electra/encoder/layer_0/output/LayerNorm/beta"
    assert lost in changed(tmp_path, lambda x: x.pop(lost))
    lost = "generator_predictions/output_bias"
    assert lost in changed(tmp_path, lambda x: x.pop(lost))
    other = "generator/encoder/layer_0/intermediate/dense/kernel"
    assert f"{other.removesuffix('kernel')}bias has shape (6,)" in changed(
        tmp_path, lambda x: x.update({other: np.ones((4, 7), np.float32)}))
    flat = {"electra/embeddings/word_embeddings": np.ones(66, np.float32)}
    assert "has shape (66,)" in changed(tmp_path, lambda x: x.update(flat))
    high = {"electra/encoder/layer_7/x": np.ones(2, np.float32)}
    assert "layer_7 but not all layers before it" in changed(tmp_path, lambda x: x.update(high))


def test_values_that_are_not_finite_are_refused(tmp_path):
    def spoil(tensors):
        tensors["generator_predictions/output_bias"][3] = np.nan

    assert "generator_predictions/output_bias" in changed(tmp_path, spoil)


@pytest.mark.parametrize("vocab_size", [38, 12])
def test_a_vocabulary_longer_than_the_table_is_refused(folders, tmp_path, vocab_size):
    path = folders["electra"] if vocab_size == 38 else tmp_path / "x"
    tf_bundles.write(tmp_path / "x", variables(TINY))
    with pytest.raises(UserError, match=rf"vocabulary has {vocab_size} pieces"):
        tf1.read_checkpoint(path, vocab_size=vocab_size, num_heads=2)


def test_a_vocabulary_far_shorter_than_the_table_is_refused(tmp_path):
    tf_bundles.write(tmp_path / "x", variables(TINY | {"vocab_size": 200}))
    with pytest.raises(UserError, match=r"200 rows in its token table, but the vocabulary has 50 pieces"):
        tf1.read_checkpoint(tmp_path / "x", vocab_size=50, num_heads=2)


# --- The command --------------------------------------------------------------------------------


def vocabulary(path):
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(32))]) + "\n")
    return path


def test_the_command_writes_a_workdir_that_downstream_code_loads(folders, tmp_path, capsys):
    vocab = vocabulary(tmp_path / "pieces.txt")
    tf1.main(["import", f"--checkpoint={folders['electra']}", f"--output={tmp_path / 'out'}", f"--vocab={vocab}"])
    assert "2 layers, 128 wide, 2 heads, after 123 steps" in capsys.readouterr().out
    tree = expected(ELECTRA)
    m = electra_jax.load_discriminator(tmp_path / "out")
    assert_equal(m.params, {name: tree[name] for name in ("embeddings", "discriminator")})
    assert m.tokenizer.token(5) == "w0" and m.config.model.hidden_size == 128
    assert_equal(electra_jax.load_generator(tmp_path / "out").params["generator"], tree["generator"])
    fresh = {"step": np.int32(0), "params": tree,
             "opt_state": optimizer.build(config.get_config().optimizer).init(tree)}
    on_host = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state, meta = checkpoint.load_state(tmp_path / "out", jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_host), fresh))
    assert state["step"] == 123 and meta["source"].startswith("tensorflow ")
    assert_equal(state["params"], tree)
    (adam,) = (part for part in state["opt_state"] if hasattr(part, "mu"))
    assert_equal(adam.mu, expected(ELECTRA, "/adam_m"))
    assert_equal(adam.nu, expected(ELECTRA, "/adam_v"))


def test_the_vocabulary_beside_the_checkpoint_is_the_default(folders, tmp_path):
    folder = shutil.copytree(folders["nvidia"], tmp_path / "copy")
    arguments = ["import", f"--checkpoint={folder}", f"--output={tmp_path / 'out'}"]
    assert "vocab.txt does not exist" in refusal(tf1.main, arguments)
    vocabulary(folder / "vocab.txt")
    tf1.main([*arguments, "--nolowercase"])
    m = electra_jax.load_discriminator(tmp_path / "out")
    assert m.config.model.vocab_size == m.tokenizer.vocab_size == 37
    assert m.tokenizer.encode("W0") == [m.tokenizer.unk_id] and m.tokenizer.encode("w0") == [5]


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    run = subprocess.run([sys.executable, "-m", "electra_jax.interop.tf1", "import", f"--checkpoint={tmp_path}",
                          f"--output={tmp_path / 'out'}"], capture_output=True, text=True, check=False,
                         cwd=Path(__file__).parent.parent)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr == (f"error: {tmp_path} has no file *.index: give a folder with a TensorFlow checkpoint, "
                          "or its PREFIX.\n")
