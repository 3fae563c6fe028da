"""What was tuned, put to use: answers for new text, and Hugging Face folders."""

import contextlib
import gzip
import itertools
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from electra_jax import checkpoint, config, model, sharding, tasks
from electra_jax.config import UserError
from electra_jax.data.tokenizer import Tokenizer, tokenizer_from_files
from electra_jax.interop import huggingface, names, workdir
from electra_jax.pretrained import Pretrained
from electra_jax.tasks.base import Feature, Task, likely_encoding
from electra_jax.tasks.tables import json_rows, suffix, table_rows
from electra_jax.tuning import run, step


class Predictor:
    """A tuned network with its task: records in, answers out."""

    def __init__(self, path: str | os.PathLike):
        """`path` is the folder of a fine-tuning run. Raises UserError when there is none."""
        if huggingface.is_folder(path):
            raise UserError(f"--checkpoint={path} is a Hugging Face folder, for transformers to serve: give the "
                            "folder of the fine-tuning run, such as runs/glue-sst2/sst2/seed-0.")
        params, meta, files = checkpoint.load_params(path, None)
        if "task" not in meta:
            raise UserError(f"--checkpoint={path} was pretrained, not fine-tuned: give the folder of a fine-tuning "
                            "run, such as runs/glue-sst2/sst2/seed-0.")
        self.tokenizer: Tokenizer = tokenizer_from_files(files)
        self.task: Task = tasks.restore(meta["task"], self.tokenizer)
        self.params, self.meta = params, meta
        self.finetune = _restored(meta["finetune"])
        self.finetune.model.update({"attention": "xla", "remat": "none"})
        self.pretrained = Pretrained(None, params, self.tokenizer, config.restored(meta["config"]))
        mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
        self.program: step.Program = run.make_program(self.pretrained, self.task, self.finetune, mesh)
        self._placed = self.program.place(params)

    def answer(self, records: Sequence[dict[str, Any]], batch_size: int = 64,
               places: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Returns one answer a record, see `answer` of its task; raises UserError for a record that lacks a column.

        `places` say in messages where the records are from.
        """
        features = [self._encode(record, place) for record, place in
                    itertools.zip_longest(records, places, fillvalue="input")]
        data = self.finetune.data
        data.eval_batch_size = batch_size
        outputs = iter(run.predict(self.program, self._placed, list(itertools.chain(*features)), data,
                                   self.tokenizer.pad_id) if any(features) else [])
        return [self.task.answer(record, list(itertools.islice(outputs, len(own))))
                for record, own in zip(records, features, strict=True)]

    def _encode(self, record: dict[str, Any], place: str) -> list[Feature]:
        try:
            return self.task.encode(record)
        except UserError as error:
            raise UserError(f"{place}: {str(error).removeprefix('input: ')}") from error


def _restored(stored: dict):
    from electra_jax.tuning.config import get_config
    c = get_config()
    for section, fields in stored.items():
        if isinstance(fields, dict) and section in c:
            c[section].update({name: value for name, value in fields.items() if name in c[section]})
    return c


def predict_file(path: str, source: str, output: str, batch_size: int) -> None:
    """Answers each record of `source` in order, one JSON object a line, as they come: after every `batch_size` records.

    A line is the record with the fields of the answer added; the record's own of the same name (the true label, say)
    becomes "input_NAME". Raises UserError for unreadable input, with file and line, and an output that cannot be
    written.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size={batch_size} is too small: give at least 1.")
    if source == "-" and sys.stdin is None:
        raise UserError("--input=-: standard input is closed: give a file, or pipe the texts in.")
    if source != "-" and (not Path(source).exists() or Path(source).is_dir()):    # a pipe, <(command), is no file
        problem = "is a folder" if Path(source).is_dir() else "does not exist"
        raise UserError(f"--input={source} {problem}: give a .tsv, .csv, .jsonl or text file, or -.")
    if source != "-" and os.path.realpath(source) == os.path.realpath(output):
        raise UserError(f"--output={output} is the input: give another name.")
    predictor = Predictor(path)
    if source == "-" and sys.stdin.isatty():
        batch_size = 1    # somebody types, and waits for the answer
    with _writing(output), contextlib.ExitStack() as files:
        # backslashreplace: a lone surrogate is legal JSON, but only when it is escaped.
        out = sys.stdout if output == "-" else files.enter_context(
            open(output, "w", encoding="utf-8", errors="backslashreplace"))
        records = _records(_lines(source, files), source, predictor)
        while chunk := list(itertools.islice(records, batch_size)):
            places, rows = zip(*chunk, strict=True)
            for record, answer in zip(rows, predictor.answer(rows, batch_size, places), strict=True):
                out.write(json.dumps(_merged(record, answer), ensure_ascii=False) + "\n")
            out.flush()


@contextlib.contextmanager
def _writing(output: str):
    try:
        yield
    except BrokenPipeError:    # `| head` has read enough
        raise
    except OSError as error:    # `_lines` has turned those of the input into UserErrors
        if output == "-":
            raise
        raise UserError(f"--output={output} cannot be written ({error.strerror}): correct the path, or make room."
                        ) from error


def _merged(record: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """The record with the answer; its own fields of the answer's names become "input_NAME", however many there are."""
    merged = {name: value for name, value in record.items() if name not in answer}
    for name, value in record.items():
        if name in answer and name != "words":
            while name in answer or name in merged:
                name = f"input_{name}"
            merged[name] = value
    return merged | answer


def _lines(source: str, files: contextlib.ExitStack) -> Iterator[str]:
    """Yields the lines of a file, also one with .gz behind, or of standard input ("-"), each as soon as it is there."""
    number = 1
    try:
        if source == "-":
            lines = sys.stdin.buffer
        else:
            opened = gzip.open if source.lower().endswith(".gz") else open
            lines = files.enter_context(opened(source, "rb"))
        for number, line in enumerate(lines, 1):
            # Spreadsheets begin their files with a byte order mark.
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--input={source}:{number} is not UTF-8 text: convert it, e.g. iconv -f "
                        f"{likely_encoding(line) if number == 1 else 'LATIN1'} -t UTF-8.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"--input={source} cannot be read ({error}): check the file.") from error


def _records(lines: Iterable[str], source: str, predictor: Predictor) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields place ("--input=FILE:LINE") and record, read by the file's ending.

    A table has a header, unless the task was trained on columns by number. Lines of other files, and of standard input,
    are texts or JSON objects; blank ones are passed over.
    """
    columns, where, form = predictor.task.columns(), f"--input={source}", suffix(source)
    if form in (".tsv", ".csv"):
        trained = predictor.finetune.task
        by_number = trained.kind == "text" and all(column.isdecimal() for column in (*columns, trained.label))
        first = None
        for line, cells in table_rows(lines, form, where):
            if first is None:
                first = [str(i) for i in range(len(cells))] if by_number else [cell.strip() for cell in cells]
                if missing := [column for column in columns if column not in first]:
                    raise UserError(f"{where}: column {missing[0]!r} is missing: this task reads {', '.join(columns)}, "
                                    f"and the file has {', '.join(first[:20])}.")
                if twice := [column for column in columns if first.count(column) > 1]:
                    raise UserError(f"{where} has {first.count(twice[0])} columns of the name {twice[0]!r}: rename all "
                                    "but one.")
                if not by_number:
                    continue
            if len(cells) != len(first):
                raise UserError(f"{where}:{line} has {len(cells)} columns, the first line has {len(first)}: correct "
                                "the row, or remove it.")
            yield f"{where}:{line}", dict(zip(first, cells, strict=True))
    elif form == ".jsonl":
        for line, record in json_rows(lines, where):
            yield f"{where}:{line}", record
    else:
        for number, line in enumerate(lines, 1):
            place = f"{where}:{number}"
            # A text may begin with {name}; a task of several columns has no such lines.
            if re.match(r'\{\s*("|\}|$)', line) or (line.startswith("{") and len(columns) > 1):
                yield from ((place, record) for _, record in json_rows([line], where, number))
            elif line.strip() and len(columns) > 1:
                raise UserError(f"{place}: this task reads {', '.join(columns)}: give JSON objects with these fields, "
                                "or a .tsv or .csv with these columns.")
            elif line.strip():
                yield place, {columns[0]: line.rstrip("\r\n")}


# --- Export -------------------------------------------------------------------------------------

_CLASSES = {"classification": "ElectraForSequenceClassification", "regression": "ElectraForSequenceClassification",
            "tagging": "ElectraForTokenClassification", "qa": "ElectraForQuestionAnswering"}
_SEGMENTS = "electra.embeddings.token_type_embeddings.weight"


def export(path: str | os.PathLike, output: str | os.PathLike) -> None:
    """Writes the tuned network as a Hugging Face folder that answers as `Predictor` does.

    Logits are the same for the inputs of the task. Scores come on the scale of the data. Where all segment ids were 1
    (task.segment_ones), the folder wants none, as pipelines give none: its rows for segments are all that of 1.
    Raises UserError for the joint question-answering head, which has no counterpart there, and as `huggingface.export`.
    """
    p = Predictor(path)
    head, task = p.program.head, p.meta["task"]
    if head.kind == "qa" and head.style == "joint":
        raise UserError(f"--checkpoint={path} has the joint answer head (model.qa_head=joint), which Hugging Face "
                        "lacks: tune with --config.model.qa_head=plain to export.")
    huggingface.check_expressible(p.pretrained.config.model, str(path))
    arch = p.program.arch
    params = model.unstack_layers(p.params)
    scale = (task["high"] - task["low"], task["low"]) if head.kind == "regression" else (1.0, 0.0)
    tensors = names.to_huggingface(names.discriminator_rows(arch, head=False), params) | _head_tensors(
        head, params["head"], arch.hidden_size, *scale)
    if task.get("segment_ones"):
        tensors[_SEGMENTS] = np.tile(tensors[_SEGMENTS][-1 if arch.type_vocab_size < 2 else 1],
                                     (arch.type_vocab_size, 1))
    workdir.check_finite(tensors, str(path))
    labels = p.task.labels or ("score",) * (head.kind == "regression")
    fields: dict[str, Any] = {"architectures": [_CLASSES[head.kind]], "classifier_dropout": head.dropout}
    if labels:
        fields |= {"id2label": {str(i): label for i, label in enumerate(labels)},
                   "label2id": {label: i for i, label in enumerate(labels)}}
    if head.kind in ("classification", "regression"):
        fields["problem_type"] = "regression" if head.kind == "regression" else "single_label_classification"
    with workdir.new_folder(Path(output)) as folder:
        huggingface.write_folder(folder, fields, arch, tensors, p.tokenizer)
    print(f"wrote {output}: {fields['architectures'][0]}")


def _head_tensors(head, params: dict[str, Any], width: int, scale: float, shift: float) -> dict[str, np.ndarray]:
    """The head's tensors under Hugging Face's names; the logits of sequences are `scale` times ours, plus `shift`."""
    if head.kind in ("tagging", "qa"):
        name = "classifier" if head.kind == "tagging" else "qa_outputs"
        dense = params["logits" if head.kind == "tagging" else "span"]
        return {f"{name}.weight": dense["kernel"].T.copy(), f"{name}.bias": dense["bias"]}
    logits = params["logits"]
    if head.style == "huggingface":
        return {"classifier.dense.weight": params["dense"]["kernel"].T.copy(),
                "classifier.dense.bias": params["dense"]["bias"],
                "classifier.out_proj.weight": np.float32(scale) * logits["kernel"].T.copy(),
                "classifier.out_proj.bias": np.float32(scale) * logits["bias"] + np.float32(shift)}
    # Hugging Face has a dense layer and a GELU before the logits, the original has not. But gelu(z) - gelu(-z) = z:
    # rows of that layer hold each logit and its negative, and the last layer takes the difference.
    C = head.num_labels
    if width < 2 * C:
        raise UserError(f"{C} classes do not fit the dense layer of Hugging Face's head, {width} wide: tune with "
                        "--config.model.head=huggingface to export.")
    dense, bias, out = (np.zeros(shape, np.float32) for shape in ((width, width), (width,), (C, width)))
    dense[:C], dense[C:2 * C] = logits["kernel"].T, -logits["kernel"].T
    bias[:C], bias[C:2 * C] = logits["bias"], -logits["bias"]
    out[:, :C], out[:, C:2 * C] = scale * np.eye(C), -scale * np.eye(C)
    return {"classifier.dense.weight": dense, "classifier.dense.bias": bias, "classifier.out_proj.weight": out,
            "classifier.out_proj.bias": np.full(C, shift, np.float32)}
