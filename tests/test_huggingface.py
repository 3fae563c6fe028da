"""Hugging Face folders without torch: what is exported comes back bit for bit, what is wrong is said in a line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

import electra_jax
from electra_jax import checkpoint, cli, loop, model, sharding, step
from electra_jax import config as config_lib
from electra_jax.config import UserError
from electra_jax.data.tokenizer import load_tokenizer
from electra_jax.interop import huggingface, workdir

LETTERS = [chr(97 + i) for i in range(26)]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{x}" for x in LETTERS)]
IDS = np.array([[2, 7, 9, 40, 3]])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(PIECES))
    return load_tokenizer(path)


def make(folder: Path, tokenizer, objective: str = "electra", **fields) -> dict:
    """Writes a workdir with noise for parameters and returns them."""
    fields = {"vocab_size": len(PIECES)} | fields
    c = tiny.config(objective__name=objective, **{f"model__{name}": value for name, value in fields.items()})
    module = model.build(c.model, objective == "mlm")
    method = "generator_logits" if objective == "mlm" else "both"
    params = tiny.params(lambda: model.init_params(module, jax.random.key(0), method))
    state = {"step": np.int32(7), "params": params}
    saver = checkpoint.Checkpointer(folder / "checkpoints", keep=1, every_steps=0, every_minutes=0)
    saver.save(state, {"config": c.to_dict(), "tokenizer": tokenizer.fingerprint}, tokenizer.files())
    assert saver.close()
    return params


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """(parameters, folder with `run` of ours and `hf` exported from it)."""
    folder = tmp_path_factory.mktemp("exported")
    params = make(folder / "run", tokenizer)
    huggingface.export(folder / "run", folder / "hf")
    return params, folder


def same(a: dict, b: dict) -> bool:
    a, b = tiny.flat(a), tiny.flat(b)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def stored(folder: Path) -> tuple[dict, dict]:
    params, meta, _ = checkpoint.load_params(folder, None)
    return params, meta["config"]["model"]


SHAPES = {
    "widths": {"embedding_size": 8, "hidden_size": 16},
    "equal widths": {"embedding_size": 16, "hidden_size": 16},
    "generator's own tables": {"sharing": "none"},
    "generator's own tables, narrower": {"sharing": "none", "generator_embedding_size": 4},
    "one network": {"sharing": "all", "generator_size": 1.0},
    "other heads": {"generator_heads": 1, "generator_intermediate_size": 12},
    "third of the width": {"hidden_size": 24, "num_heads": 3, "intermediate_size": 96, "generator_size": 1 / 3},
    "fewer layers": {"num_layers": 3, "generator_layers": 0.34},
    "other epsilon and dropout": {"layer_norm_eps": 1e-5, "hidden_dropout": 0.2, "attention_dropout": 0.3},
}


@pytest.mark.parametrize("name", SHAPES)
def test_ours_to_hugging_face_and_back_is_bit_identical(name, tokenizer, tmp_path):
    params = make(tmp_path / "run", tokenizer, **SHAPES[name])
    huggingface.export(tmp_path / "run", tmp_path / "hf")
    huggingface.import_folders(tmp_path / "hf/discriminator", tmp_path / "back", tmp_path / "hf/generator")
    back, fields = stored(tmp_path / "back")
    assert same(params, back)
    _, original = stored(tmp_path / "run")
    architectures = (model.discriminator_architecture, model.generator_architecture)
    assert all(get(fields) == get(original) for get in architectures)
    huggingface.export(tmp_path / "back", tmp_path / "hf2")
    for kind in ("discriminator", "generator"):
        for file in sorted((tmp_path / "hf" / kind).iterdir()):
            again = tmp_path / "hf2" / kind / file.name
            if file.suffix == ".safetensors":    # the library writes its header in no fixed order
                assert same(load_file(file), load_file(again))
            else:
                assert file.read_bytes() == again.read_bytes(), file


def test_scanned_layers_export_as_unrolled_ones(exported, tokenizer, tmp_path):
    params, folder = exported
    c = tiny.config(model__vocab_size=len(PIECES), model__scan_layers=True)
    saver = checkpoint.Checkpointer(tmp_path / "run/checkpoints", keep=1, every_steps=0, every_minutes=0)
    saver.save({"step": np.int32(1), "params": model.stack_layers(params)}, {"config": c.to_dict()}, tokenizer.files())
    assert saver.close()
    huggingface.export(tmp_path / "run", tmp_path / "hf")
    for kind in ("discriminator", "generator"):
        ours, theirs = (load_file(f / kind / "model.safetensors") for f in (tmp_path / "hf", folder / "hf"))
        assert same(ours, theirs)


def test_the_mlm_baseline_exports_its_full_size_network_as_a_masked_language_model(tokenizer, tmp_path):
    make(tmp_path / "run", tokenizer, objective="mlm")
    huggingface.export(tmp_path / "run", tmp_path / "hf")
    assert [p.name for p in (tmp_path / "hf").iterdir()] == ["generator"]
    run, hf = (electra_jax.load_generator(tmp_path / f) for f in ("run", "hf"))
    assert np.array_equal(run.module.apply({"params": run.params}, IDS), hf.module.apply({"params": hf.params}, IDS))
    encoders = [electra_jax.load_discriminator(tmp_path / f) for f in ("run", "hf")]
    states = [m.module.apply({"params": m.params}, IDS, method="encode") for m in encoders]
    assert np.array_equal(*states)


def test_rows_that_only_pad_the_token_table_are_cut_unless_asked_for(tokenizer, tmp_path):
    make(tmp_path / "run", tokenizer, vocab_size=64)
    huggingface.export(tmp_path / "run", tmp_path / "cut")
    huggingface.export(tmp_path / "run", tmp_path / "kept", keep_padding=True)
    for folder, rows in (("cut", len(PIECES)), ("kept", 64)):
        for kind in ("discriminator", "generator"):
            tensors = load_file(tmp_path / folder / kind / "model.safetensors")
            assert len(tensors["electra.embeddings.word_embeddings.weight"]) == rows
            assert json.loads((tmp_path / folder / kind / "config.json").read_text())["vocab_size"] == rows
        assert len(tensors["generator_lm_head.bias"]) == rows
    huggingface.import_folders(tmp_path / "kept/discriminator", tmp_path / "back", tmp_path / "kept/generator")
    assert stored(tmp_path / "back")[1]["vocab_size"] == 64


def test_workdir_export_and_folder_load_alike(exported):
    _, folder = exported
    for load, kind in ((electra_jax.load_discriminator, "discriminator"), (electra_jax.load_generator, "generator")):
        logits = []
        for path in (folder / "run", folder / "hf", folder / "hf" / kind):
            m = load(path)
            assert m.tokenizer.encode("ab c") == [5, 32, 7]
            logits.append(np.asarray(m.module.apply({"params": m.params}, IDS, np.ones_like(IDS), 0 * IDS)))
        assert np.array_equal(logits[0], logits[1]) and np.array_equal(logits[0], logits[2]) and np.ptp(logits[0]) > 0


def test_an_encoder_without_head_loads_for_its_hidden_states(exported, tmp_path):
    _, folder = exported
    shutil.copytree(folder / "hf/discriminator", tmp_path / "encoder")
    tensors = load_file(tmp_path / "encoder/model.safetensors")
    bare = {name.removeprefix("electra."): x for name, x in tensors.items() if name.startswith("electra.")}
    save_file(bare | {"embeddings.position_ids": np.arange(32)}, tmp_path / "encoder/model.safetensors")
    encoder, whole = (electra_jax.load_discriminator(f) for f in (tmp_path / "encoder", folder / "hf"))
    states = [m.module.apply({"params": m.params}, IDS, method="encode") for m in (encoder, whole)]
    assert np.array_equal(*states)
    assert "head" not in encoder.params["discriminator"]


def test_without_a_generator_a_fresh_one_of_the_asked_size_is_drawn(exported, tmp_path, capsys):
    params, folder = exported
    huggingface.import_folders(folder / "hf/discriminator", tmp_path / "run", generator_size=0.25, generator_layers=0.5,
                               seed=3)
    assert "fresh one, 4 wide with 1 layers" in capsys.readouterr().out
    back, fields = stored(tmp_path / "run")
    assert same({name: params[name] for name in ("embeddings", "discriminator")},
                {name: back[name] for name in ("embeddings", "discriminator")})
    assert (fields["generator_size"], fields["generator_layers"], fields["sharing"]) == (0.25, 0.5, "embeddings")
    assert back["generator"]["head"]["dense"]["kernel"].shape == (4, 8)
    assert "layer_1" not in back["generator"]["encoder"]
    huggingface.import_folders(folder / "hf/discriminator", tmp_path / "other", generator_layers=0.5, seed=4)
    assert not same(back["generator"], stored(tmp_path / "other")[0]["generator"])


def test_a_generator_as_large_as_its_discriminator_is_taken_with_a_warning(tokenizer, tmp_path, capsys):
    params = make(tmp_path / "run", tokenizer, generator_size=1.0)
    huggingface.export(tmp_path / "run", tmp_path / "hf")
    huggingface.import_folders(tmp_path / "hf/discriminator", tmp_path / "back", tmp_path / "hf/generator")
    assert "as large as its discriminator" in capsys.readouterr().err
    assert same(params, stored(tmp_path / "back")[0])


def start_from(source: Path, tokenizer, **fields):
    """(program, state) of a training run that starts from a checkpoint."""
    _, m = stored(source)
    names = ("embedding_size", "hidden_size", "num_layers", "num_heads", "intermediate_size", "generator_size",
             "generator_layers", "vocab_size", "max_positions")
    c = tiny.config(**{f"model__{name}": m[name] for name in names}, run__init_from=str(source), **fields)
    special_ids = {name: getattr(tokenizer, f"{name}_id") for name in ("pad", "cls", "sep", "mask")}
    program = step.build(c, sharding.make_mesh(c.mesh), special_ids)
    return program, loop.initial_state(c, program, tokenizer.fingerprint)


def test_training_goes_on_from_imported_weights_with_a_fresh_optimizer_and_warm_up(exported, tokenizer, tmp_path):
    params, folder = exported
    huggingface.import_folders(folder / "hf/discriminator", tmp_path / "run", folder / "hf/generator")
    _, state = start_from(tmp_path / "run", tokenizer)
    assert int(state["step"]) == 0 and same(params, state["params"])
    adam, schedule = state["opt_state"][1], state["opt_state"][3]
    assert int(adam.count) == int(schedule.count) == 0    # the warm-up begins anew
    assert not any(np.any(x) for x in jax.tree.leaves((adam.mu, adam.nu)))


def test_scanned_training_takes_unrolled_weights(exported, tokenizer):
    params, folder = exported
    _, state = start_from(folder / "run", tokenizer, model__scan_layers=True)
    assert same(params, model.unstack_layers(jax.device_get(state["params"])))


def test_the_optimizer_goes_on_where_it_was_when_asked(tokenizer, tmp_path):
    m = tiny.config(model__vocab_size=len(PIECES)).model
    params = tiny.params(lambda: model.init_params(model.build(m), jax.random.key(0)))
    mu, nu = (jax.tree.map(lambda x, f=f: np.full_like(x, f), params) for f in (0.25, 0.5))
    workdir.write(tmp_path / "run", dict(m), params, tokenizer, (mu, nu), step=4)
    _, state = start_from(tmp_path / "run", tokenizer, run__init_optimizer=True)
    adam, schedule = state["opt_state"][1], state["opt_state"][3]
    assert int(state["step"]) == int(adam.count) == int(schedule.count) == 4
    assert all((x == 0.25).all() for x in jax.tree.leaves(adam.mu))
    assert all((x == 0.5).all() for x in jax.tree.leaves(adam.nu))


def test_init_from_another_size_names_the_flags_that_fit(exported, tokenizer):
    _, folder = exported
    with pytest.raises(UserError, match=r"shape .* --config.model.*generator_size=0.5"):
        c = tiny.config(model__vocab_size=len(PIECES), model__generator_size=0.25, run__init_from=str(folder / "run"))
        program = step.build(c, sharding.make_mesh(c.mesh), tiny.SPECIAL_IDS)
        loop.initial_state(c, program, tokenizer.fingerprint)


def test_init_from_a_hugging_face_folder_says_to_import_it(exported):
    _, folder = exported
    for path in (folder / "hf", folder / "hf/discriminator"):
        with pytest.raises(UserError, match="huggingface import"):
            checkpoint.load_params(path)


def test_a_checkpoint_of_an_older_version_gets_the_defaults_of_new_fields():
    old = tiny.config(model__hidden_size=32).to_dict()
    for name in ("generator_heads", "generator_intermediate_size", "generator_embedding_size"):
        del old["model"][name]
    del old["run"]["init_optimizer"]
    old["model"]["no_longer"] = 1
    c = config_lib.restored(old)
    assert c.model.hidden_size == 32 and c.model.generator_heads == 0 and "no_longer" not in c.model


# --- Bad input ----------------------------------------------------------------------------------

def edit_config(folder: Path, **fields) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


QUERY = "electra.encoder.layer.1.attention.self.query.weight"
BAD = {
    "truncated": (lambda d, g: truncate(d / "model.safetensors"), "truncated or damaged"),
    "a bit of the header": (lambda d, g: flip(d / "model.safetensors", 9), "truncated or damaged"),
    "a bit of a tensor": (lambda d, g: flip(d / "model.safetensors", -5), "the CRC of"),
    "no weights": (lambda d, g: (d / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "no config": (lambda d, g: (d / "config.json").unlink(), "config.json cannot be read"),
    "config is no JSON": (lambda d, g: (d / "config.json").write_text("{"), "is not JSON"),
    "another model": (lambda d, g: edit_config(d, model_type="bert"), "model_type is 'bert'"),
    "another activation": (lambda d, g: edit_config(d, hidden_act="relu"), "hidden_act is 'relu'"),
    "no size": (lambda d, g: edit_config(d, num_hidden_layers="12"), "num_hidden_layers is '12'"),
    "more layers than weights": (lambda d, g: edit_config(d, num_hidden_layers=3), "has no tensor"),
    "fewer layers than weights": (lambda d, g: edit_config(d, num_hidden_layers=1), "tensors that no ELECTRA"),
    "heads do not divide": (lambda d, g: edit_config(d, num_attention_heads=3), "does not divide"),
    "the generator's config": (lambda d, g: shutil.copy(g / "config.json", d), "generator and discriminator?"),
    "generator as discriminator": (lambda d, g: (shutil.rmtree(d), shutil.copytree(g, d)), "no discriminator head"),
    "discriminator as generator": (lambda d, g: (shutil.rmtree(g), shutil.copytree(d, g)), "no generator head"),
    "missing tensor": (lambda d, g: edit_tensors(d, lambda t: {n: x for n, x in t.items() if n != QUERY}), QUERY),
    "missing head": (lambda d, g: edit_tensors(d, lambda t: {n: x for n, x in t.items() if n.startswith("electra")}),
                     "no discriminator head"),
    "unknown tensor": (lambda d, g: edit_tensors(d, lambda t: t | {"electra.pooler.weight": np.zeros(3)}),
                       "electra.pooler.weight"),
    "wrong shape": (lambda d, g: edit_tensors(d, lambda t: t | {QUERY: np.zeros((16, 8), np.float32)}), "(16, 8)"),
    "not a number": (lambda d, g: edit_tensors(d, lambda t: t | {QUERY: np.full((16, 16), np.nan, np.float32)}),
                     "not finite"),
    "untied output": (lambda d, g: edit_tensors(g, lambda t: t | {"generator_lm_head.weight": np.ones((57, 8))}),
                      "differs from the token table"),
    "other positions": (lambda d, g: edit_config(g, max_position_embeddings=64), "in common"),
    "no tokenizer": (lambda d, g: [p.unlink() for p in d.iterdir() if p.name not in
                                   ("config.json", "model.safetensors")], "tokenizer"),
    "larger vocabulary": (lambda d, g: [(f / "vocab.txt").write_text("\n".join([*PIECES, "ab"])) and
                                        [p.unlink() for p in f.iterdir() if "token" in p.name] for f in (d, g)],
                          "58 pieces"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_refused_in_one_line_and_nothing_is_written(name, exported, tmp_path, monkeypatch, capsys):
    _, folder = exported
    shutil.copytree(folder / "hf", tmp_path / "hf")
    damage, text = BAD[name]
    damage(tmp_path / "hf/discriminator", tmp_path / "hf/generator")
    monkeypatch.setattr(sys, "argv", ["x", "import", f"--discriminator={tmp_path}/hf/discriminator",
                                      f"--generator={tmp_path}/hf/generator", f"--output={tmp_path}/out"])
    assert cli.exit_code(lambda: huggingface.main(sys.argv[1:])) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and text in error
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_models_that_hugging_face_cannot_express_are_not_exported(tokenizer, tmp_path):
    make(tmp_path / "run", tokenizer, norm="pre")
    with pytest.raises(UserError, match=r"model.norm=pre .* no counterpart"):
        huggingface.export(tmp_path / "run", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_an_output_that_is_there_is_not_touched(exported, tmp_path):
    _, folder = exported
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("x")
    for write in (lambda: huggingface.export(folder / "run", tmp_path / "mine"),
                  lambda: huggingface.import_folders(folder / "hf/discriminator", tmp_path / "mine")):
        with pytest.raises(UserError, match="not empty"):
            write()
    assert [p.name for p in tmp_path.rglob("*")] == ["mine", "file"]


def test_a_failure_half_way_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError, match="half"), workdir.new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        raise RuntimeError("half way")
    assert not list(tmp_path.iterdir())
    with workdir.new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["out", "out/file"]


def test_sharded_weights_are_read(exported, tmp_path):
    params, folder = exported
    shutil.copytree(folder / "hf/discriminator", tmp_path / "d")
    tensors = load_file(tmp_path / "d/model.safetensors")
    (tmp_path / "d/model.safetensors").unlink()
    halves = {f"model-0000{i + 1}-of-00002.safetensors": dict(list(tensors.items())[i::2]) for i in range(2)}
    for name, part in halves.items():
        save_file(part, tmp_path / "d" / name)
    (tmp_path / "d/model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {tensor: name for name, part in halves.items() for tensor in part}}))
    m = electra_jax.load_discriminator(tmp_path / "d")
    assert same(m.params, {name: params[name] for name in ("embeddings", "discriminator")})


def test_the_command_line_exports_and_imports(exported, tmp_path):
    _, folder = exported
    for args in (["export", f"--checkpoint={folder}/run", f"--output={tmp_path}/hf"],
                 ["import", f"--discriminator={tmp_path}/hf/discriminator", f"--output={tmp_path}/run"]):
        done = subprocess.run([sys.executable, "-m", "electra_jax.interop.huggingface", *args], text=True,
                              capture_output=True, cwd=Path(__file__).parent.parent, check=False)
        assert done.returncode == 0, done.stderr
    assert f"--config.run.init_from={tmp_path}/run" in done.stdout
    bad = subprocess.run([sys.executable, "-m", "electra_jax.interop.huggingface", "export", "--checkpoint=/no/run",
                          f"--output={tmp_path}/x"], text=True, capture_output=True, check=False,
                         cwd=Path(__file__).parent.parent)
    assert bad.returncode == 2 and bad.stderr == ("error: no checkpoint found in /no/run: give the folder of a run "
                                                  "(its --workdir), or one of its checkpoints/N.\n")
