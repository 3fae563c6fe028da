"""What tuning leaves, as Hugging Face folders, without torch: tensors, labels, and what is refused in one line."""

import json
import math

import jax
import numpy as np
import pytest
import tiny
import tuned
from safetensors.numpy import load_file

from electra_jax import checkpoint, cli, finetune, model
from electra_jax.interop import names
from electra_jax.tuning import heads, serve

pytestmark = pytest.mark.usefixtures("quick_compile")
D = 16    # width of the tiny networks
SEQUENCES = {"classifier.dense.weight": (D, D), "classifier.dense.bias": (D,)}


def sequence_head(classes):
    return SEQUENCES | {"classifier.out_proj.weight": (classes, D), "classifier.out_proj.bias": (classes,)}


HEADS = {
    "two classes": ("ElectraForSequenceClassification", sequence_head(2)),
    "three classes of pairs": ("ElectraForSequenceClassification", sequence_head(3)),
    "scores of pairs": ("ElectraForSequenceClassification", sequence_head(1)),
    "classes by hugging face's head": ("ElectraForSequenceClassification", sequence_head(9)),
    "scores by hugging face's head": ("ElectraForSequenceClassification", sequence_head(1)),
    "tags": ("ElectraForTokenClassification", {"classifier.weight": (9, D), "classifier.bias": (9,)}),
    "tags in segment 0": ("ElectraForTokenClassification", {"classifier.weight": (5, D), "classifier.bias": (5,)}),
    "answers": ("ElectraForQuestionAnswering", {"qa_outputs.weight": (2, D), "qa_outputs.bias": (2,)}),
}


def export(run, output) -> int:
    """The exit code of the command."""
    return cli.exit_code(lambda: finetune.serve(["export", f"--checkpoint={run}", f"--output={output}"]))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return tuned.pretrained(tmp_path_factory.mktemp("pretrained"))


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def sequence_logits(tensors, x):
    """Hugging Face's head for sequences, in float64: [N, D] -> [N, C]."""
    t = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    x = gelu(x @ t["classifier.dense.weight"].T + t["classifier.dense.bias"])
    return x @ t["classifier.out_proj.weight"].T + t["classifier.out_proj.bias"]


@pytest.mark.parametrize("classes", [1, 2, D // 2])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (5.0, -2.0)])
def test_one_dense_layer_passes_through_a_gelu_unchanged(classes, scale, shift):
    rng = np.random.default_rng(classes)
    params = {"logits": {"kernel": rng.normal(size=(D, classes)).astype(np.float32),
                         "bias": rng.normal(size=classes).astype(np.float32)}}
    tensors = serve._head_tensors(heads.Head("classification", classes), params, D, scale, shift)
    x = rng.normal(size=(50, D)) * np.logspace(-3, 2, 50)[:, None]
    expected = scale * (x @ params["logits"]["kernel"].astype(np.float64) + params["logits"]["bias"]) + shift
    np.testing.assert_allclose(sequence_logits(tensors, x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", HEADS)
def test_the_folder_has_the_tuned_encoder_bit_for_bit_and_the_head_of_its_class(name, pretrained, tmp_path):
    run = tuned.write(tmp_path / "run", pretrained, **tuned.RUNS[name])
    assert export(run, tmp_path / "hf") == 0
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]
    tensors = load_file(tmp_path / "hf/model.safetensors")
    fields = json.loads((tmp_path / "hf/config.json").read_text())
    architecture, head = HEADS[name]
    assert fields["architectures"] == [architecture]
    assert {key: x.shape for key, x in tensors.items() if not key.startswith("electra.")} == head
    params, meta, _ = checkpoint.load_params(run, None)
    arch = model.discriminator_architecture(tiny.config(model__vocab_size=len(tuned.PIECES)).model)
    rows = names.discriminator_rows(arch, head=False)
    assert len(tensors) == len(head) + sum(len(row.huggingface) for row in rows)
    back = tiny.flat(names.from_huggingface(rows, tensors, "hf"))
    ours = tiny.flat({key: x for key, x in params.items() if key != "head"})
    assert back.keys() == ours.keys()
    for path, x in ours.items():
        if path == "embeddings/token_type_embeddings/embedding" and name == "tags":
            x = np.stack([x[1], x[1]])    # tuned with segment 1, used with segment 0
        np.testing.assert_array_equal(back[path], x, strict=True, err_msg=path)
    labels = meta["task"].get("labels") or (["score"] if "scores" in name else [])
    assert list(fields.get("id2label", {}).values()) == labels
    assert fields.get("label2id", {}) == {label: i for i, label in enumerate(labels)}
    assert fields.get("problem_type") == ("regression" if "scores" in name else "single_label_classification"
                                          if "classes" in name else None)
    # What more tuning there would drop is what was dropped here, not in pretraining.
    assert (fields["hidden_dropout_prob"], fields["attention_probs_dropout_prob"], fields["classifier_dropout"]) == (
        0.1, 0.1, 0.1)


def test_a_scanned_encoder_exports_as_an_unrolled_one(pretrained, tmp_path):
    for folder, scan in (("unrolled", False), ("scanned", True)):
        run = tuned.write(tmp_path / folder, pretrained, model__scan_layers=scan, **tuned.RUNS["answers"])
        if scan:    # the same numbers in the other form
            params = model.stack_layers(checkpoint.load_params(tmp_path / "unrolled", None)[0])
            _, meta, files = checkpoint.load_params(run, None)
            saver = checkpoint.Checkpointer(run / "checkpoints", keep=1, every_steps=0, every_minutes=0)
            saver.save({"step": np.int32(2), "params": jax.tree.map(np.asarray, params)}, meta, files, force=True)
            assert saver.close()
        assert export(run, tmp_path / f"{folder}-hf") == 0
    a, b = (load_file(tmp_path / f"{folder}-hf/model.safetensors") for folder in ("unrolled", "scanned"))
    assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


REFUSED = {
    "joint head": ("joint answers", {}, "model.qa_head=joint"),
    "pre-norm": ("two classes", {"norm": "pre"}, "model.norm=pre"),
    "rotary positions": ("two classes", {"positions": "rotary"}, "model.positions=rotary"),
    "many classes": ("nine", {}, "9 classes do not fit"),
    "not tuned": (None, {}, "not fine-tuned"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_hugging_face_cannot_express_is_refused_in_one_line_and_leaves_nothing(name, tmp_path, capsys):
    run, fields, message = REFUSED[name]
    path = tuned.pretrained(tmp_path, **fields)
    if run is not None:
        path = tuned.write(tmp_path / "run", path, **tuned.RUNS.get(run, {"task__label": run}))
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert export(path, tmp_path / "hf") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and message in error
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_that_diverged_and_a_folder_in_use_are_refused(pretrained, tmp_path, capsys):
    run = tuned.write(tmp_path / "run", pretrained, **tuned.RUNS["two classes"])
    assert export(run, run) == 2 and "is not empty" in capsys.readouterr().err
    params, meta, files = checkpoint.load_params(run, None)
    params["head"]["logits"]["bias"] = np.full(2, np.nan, np.float32)
    saver = checkpoint.Checkpointer(run / "checkpoints", keep=1, every_steps=0, every_minutes=0)
    saver.save({"step": np.int32(2), "params": params}, meta, files, force=True)
    assert saver.close()
    assert export(run, tmp_path / "hf") == 2 and "not finite" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
