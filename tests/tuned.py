"""Tiny tuned runs on invented data, for the tests of what becomes of them."""

import json

import jax
import numpy as np
import tiny

import electra_jax
from electra_jax import model, sharding, tasks
from electra_jax.data.tokenizer import load_tokenizer
from electra_jax.interop import workdir
from electra_jax.tuning import config as config_lib
from electra_jax.tuning import run

LETTERS = [chr(97 + i) for i in range(26)]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{x}" for x in LETTERS)]
ROWS = 64

# Fields of the fine-tuning config, besides the files; by what is special.
RUNS = {
    "two classes": dict(task__label="two"),
    "three classes of pairs": dict(task__label="three", task__text_pair="pair"),
    "scores of pairs": dict(task__label="score", task__text_pair="pair"),
    "classes by hugging face's head": dict(task__label="nine", task__text_pair="pair", model__head="huggingface"),
    "scores by hugging face's head": dict(task__label="score", model__head="huggingface"),
    "tags": dict(task__kind="tagging"),
    "tags in segment 0": dict(task__kind="tagging", task__train_scheme="bio", task__segment_ones=False),
    "answers": dict(task__kind="squad", model__qa_head="plain"),
    "joint answers": dict(task__kind="squad"),
}


def text(rng, words) -> str:
    """So many words of one to three letters."""
    return " ".join("".join(rng.choice(LETTERS, rng.integers(1, 4))) for _ in range(words))


def records(kind: str, count: int, seed: int = 0) -> list[dict]:
    """Invented examples of a kind of task, as its files spell them, with labels that nothing in the text tells."""
    rng, out = np.random.default_rng(seed), []
    for i in range(count):
        a, b = text(rng, rng.integers(2, 6)), text(rng, rng.integers(1, 5))
        if kind == "squad":
            answer = str(rng.choice(b.split()))
            start = f" {b} ".index(f" {answer} ")
            out.append({"question": a, "context": b, "id": str(i),
                        "answers": [{"text": answer, "answer_start": start}]})
        elif kind == "tagging":
            out.append({"text": a, "tags": [str(rng.choice(["O", "B-X", "B-Y"])) for _ in a.split()]})
        else:
            out.append({"text": a, "pair": b, "two": rng.choice(["no", "yes"]), "three": rng.choice(["a", "b", "c"]),
                        "nine": int(rng.integers(9)), "score": f"{rng.uniform(2, 7):.2f}"})
    return out


def write_data(file, kind: str) -> None:
    """Writes the examples in the format of their task; the words of a tagging task begin with a chunk of two."""
    rows = records(kind, ROWS)
    if kind == "squad":
        paragraphs = [{"context": r["context"], "qas": [{name: r[name] for name in ("question", "id", "answers")}]}
                      for r in rows]
        file.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    elif kind == "tagging":
        file.write_text("a B-X\nb I-X\n\n" + "".join(
            "".join(f"{word} {tag}\n" for word, tag in zip(r["text"].split(), r["tags"], strict=True)) + "\n"
            for r in rows))
    else:
        file.write_text("\n".join(json.dumps(r) for r in rows))


def pretrained(folder, **fields):
    """Writes a workdir with noise for parameters; `fields` are of the `model` section."""
    (folder / "vocab.txt").write_text("\n".join(PIECES))
    c = tiny.config(**{f"model__{name}": value for name, value in ({"vocab_size": len(PIECES)} | fields).items()})
    params = tiny.params(lambda: model.init_params(model.build(c.model), jax.random.key(0)))
    workdir.write(folder / "pretrained", c.model.to_dict(), params, load_tokenizer(folder / "vocab.txt"))
    return folder / "pretrained"


def write(folder, init_from, **fields):
    """Writes what a run of these `fields` leaves behind, with noise for parameters; returns the run's folder."""
    c = config_lib.get_config()
    c.init_from = str(init_from)
    c.task.update({"kind": "text", "name": "invented"})
    for name, value in fields.items():
        section, field = name.split("__")
        c[section][field] = value
    folder.mkdir()
    file = folder / {"text": "train.jsonl", "tagging": "train.txt", "squad": "train.json"}[c.task.kind]
    write_data(file, c.task.kind)
    c.task.update({"train": str(file), "dev": str(file)})
    c.data.update({"seq_len": 32, "bucket": 32})
    config_lib.validate(c)
    network = electra_jax.load_discriminator(init_from)
    (make_task,) = tasks.makers(c, network.tokenizer).values()
    task = make_task()
    program = run.make_program(network, task, c, sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1},
                                                                    jax.devices()[:1]))
    params = tiny.params(lambda: program._fresh(jax.random.key(0))["params"], 1)
    if c.task.kind == "text":    # so that answers differ, and every class comes
        outputs = run.predict(program, program.place(params), task.features("dev"), c.data, network.tokenizer.pad_id)
        logits = [out["logits"] if task.labels else out["score"] for out in outputs]
        last, mean, deviation = params["head"]["logits"], np.mean(logits, 0), np.std(logits, 0)
        last.update({"kernel": last["kernel"] / deviation, "bias": (last["bias"] - mean) / deviation})
    run.Run(c, network, task, program, 0, folder, "invented")._write(
        {"step": 1, "outputs": {}, "params": params}, {}, None)
    return folder
