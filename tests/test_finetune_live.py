"""Exported tuned networks in torch and transformers, where they are installed: our logits, labels and answers."""

import functools

import jax
import numpy as np
import pytest
import tuned

from electra_jax.tasks.tagging import convert
from electra_jax.tuning import serve
from electra_jax.tuning.batches import collate
from electra_jax.tuning.heads import Tuned

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.usefixtures("quick_compile")
AUTO = {"classification": "AutoModelForSequenceClassification", "regression": "AutoModelForSequenceClassification",
        "tagging": "AutoModelForTokenClassification", "qa": "AutoModelForQuestionAnswering"}
CLASSES = {"classification": "ElectraForSequenceClassification", "regression": "ElectraForSequenceClassification",
           "tagging": "ElectraForTokenClassification", "qa": "ElectraForQuestionAnswering"}
NAMES = [name for name in tuned.RUNS if name != "joint answers"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """By name: what answers here, the exported folder, and new records to answer."""
    folder = tmp_path_factory.mktemp("exported")
    pretrained = tuned.pretrained(folder)

    @functools.cache
    def make(name):
        place = folder / name.replace(" ", "-")
        serve.export(tuned.write(place, pretrained, **tuned.RUNS[name]), place / "hf")
        kind = tuned.RUNS[name].get("task__kind", "text")
        return serve.Predictor(place), place / "hf", tuned.records(kind, 20, seed=1)

    return make


def inputs(record: dict, predictor) -> tuple[str, ...]:
    """The texts of a record, those that its task reads."""
    return tuple(record[column] for column in predictor.task.columns())


def in_torch(module, batch) -> dict[str, np.ndarray]:
    with torch.no_grad():
        out = module(**{name: torch.from_numpy(np.asarray(batch[name], np.int64)) for name in (
            "input_ids", "attention_mask", "token_type_ids")})
    return {name: x.numpy() for name, x in out.items()}


@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_it_whole_and_gives_our_logits(name, exported, record_property):
    predictor, folder, records = exported(name)
    head, task = predictor.program.head, predictor.task
    module, info = getattr(transformers, AUTO[head.kind]).from_pretrained(folder, output_loading_info=True)
    module.eval()
    assert type(module).__name__ == CLASSES[head.kind]
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    features = [feature for record in records for feature in task.encode(record)]
    batch = collate(features, len(features) + 1, 32, 32, predictor.tokenizer.pad_id)
    ours = jax.device_get(jax.jit(Tuned(predictor.program.arch, head).apply)({"params": predictor.params}, batch))
    theirs = in_torch(module, batch)
    real = np.asarray(batch["attention_mask"] > 0)
    assert real.sum(1).min() < real.sum(1).max() < 32    # rows are padded
    assert {"tags": {1}, "tags in segment 0": {0}, "two classes": {0}, "scores by hugging face's head": {0}}.get(
        name, {0, 1}) == set(batch["token_type_ids"][:-1][real[:-1]].tolist())
    if head.kind == "qa":    # elsewhere nothing may begin here
        pairs = [(ours[end][batch["allowed"]], theirs[f"{end}_logits"][batch["allowed"]]) for end in ("start", "end")]
    elif head.kind == "tagging":
        pairs = [(ours["logits"][:-1][real[:-1]], theirs["logits"][:-1][real[:-1]])]
        if task.segment_ones:
            for segment in (0, 1):
                again = in_torch(module, batch | {"token_type_ids": np.full_like(batch["input_ids"], segment)})
                pairs.append((pairs[0][0], again["logits"][:-1][real[:-1]]))
    elif head.kind == "regression":    # on the scale of the data there
        low, high = (predictor.meta["task"][name] for name in ("low", "high"))
        assert 2 <= low < 3 and 6 < high <= 7
        pairs = [(ours["score"][:-1] * (high - low) + low, theirs["logits"][:-1, 0])]
    else:
        pairs = [(ours["logits"][:-1], theirs["logits"][:-1])]
    for a, b in pairs:
        assert a.shape == b.shape and b.std(0).min() > 0.05
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=0)
    record_property("worst", max(float(np.abs(a - b).max()) for a, b in pairs))


@pytest.mark.parametrize("name", NAMES)
def test_its_tokenizer_and_label_names_are_ours(name, exported):
    predictor, folder, records = exported(name)
    config = transformers.AutoConfig.from_pretrained(folder)
    labels = predictor.task.labels or (("score",) if "scores" in name else ())
    if labels:
        assert config.id2label == dict(enumerate(labels)) and config.num_labels == len(labels)
        assert config.label2id == {label: i for i, label in enumerate(labels)}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for record in records:
        (feature,), theirs = predictor.task.encode(record), tokenizer(*inputs(record, predictor))
        assert theirs["input_ids"] == feature.input_ids.tolist()
        if name != "tags":    # there the export makes up for it
            assert theirs["token_type_ids"] == feature.token_type_ids.tolist()


# --- Pipelines ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [name for name in NAMES if "classes" in name or "scores" in name])
def test_a_text_classification_pipeline_says_what_predict_says(name, exported):
    predictor, folder, records = exported(name)
    classify = transformers.pipeline("text-classification", model=str(folder), top_k=None)
    told = classify([dict(zip(("text", "text_pair"), inputs(record, predictor), strict=False)) for record in records])
    ours = predictor.answer(records)
    assert "scores" in name or len({answer["label"] for answer in ours}) > 1
    for answer, theirs in zip(ours, told, strict=True):
        found = {one["label"]: one["score"] for one in theirs}
        if "scores" in name:
            assert found == {"score": pytest.approx(answer["score"], abs=5e-4)}
        else:
            assert theirs[0]["label"] == answer["label"]
            assert found == pytest.approx(answer["probabilities"], abs=1e-4)


@pytest.mark.parametrize("name", ["tags", "tags in segment 0"])
def test_the_first_pieces_of_a_token_classification_pipeline_have_the_tags_of_predict(name, exported):
    predictor, folder, records = exported(name)
    tag = transformers.pipeline("token-classification", model=str(folder), ignore_labels=[])
    ours, seen = predictor.answer(records), set()
    for answer, record in zip(ours, records, strict=True):
        first = [piece for piece in tag(record["text"]) if not piece["word"].startswith("##")]
        assert [piece["word"][:1] for piece in first] == [word[:1] for word in answer["words"]]
        found = [piece["entity"] for piece in first]
        assert convert(found, predictor.task.train_scheme, predictor.task.scheme) == answer["tags"]
        assert [piece["score"] for piece in first] == pytest.approx(answer["probabilities"], abs=1e-4)
        seen.update(found)
    assert len(seen) > 2


def best_span(folder, record) -> str:
    """The answer by transformers' model and tokenizer alone: transformers 5 has no pipeline for it."""
    module = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    encoded = transformers.AutoTokenizer.from_pretrained(folder)(
        record["question"], record["context"], return_offsets_mapping=True, return_tensors="np")
    out = in_torch(module, encoded)
    spans = [(out["start_logits"][0, i] + out["end_logits"][0, j], i, j)
             for i in range(encoded["input_ids"].shape[1]) for j in range(i, encoded["input_ids"].shape[1])
             if encoded.sequence_ids(0)[i] == encoded.sequence_ids(0)[j] == 1]
    _, i, j = max(spans)
    return record["context"][encoded["offset_mapping"][0, i, 0]:encoded["offset_mapping"][0, j, 1]]


def test_the_best_span_of_transformers_is_the_answer_of_predict(exported):
    predictor, folder, records = exported("answers")
    ours = [answer["answer"] for answer in predictor.answer(records)]
    assert any(answer != record["context"] for answer, record in zip(ours, records, strict=True))
    assert [best_span(folder, record) for record in records] == ours
    if "question-answering" in transformers.pipelines.PIPELINE_REGISTRY.get_supported_tasks():
        find = transformers.pipeline("question-answering", model=str(folder), align_to_words=False, max_answer_len=30)
        assert [find(question=r["question"], context=r["context"])["answer"] for r in records] == ours
