"""The nine tasks of GLUE, from the official files or from TensorFlow Datasets: a table of what differs, and readers.

Metrics are GLUE's (Wang et al. 2019, table 1); the one named first chooses checkpoints and is what ELECTRA's paper
reports (section 3.1): Spearman for STS-B, Matthews for CoLA, accuracy for all others, MRPC and QQP among them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from electra_jax.config import UserError
from electra_jax.data.tokenizer import Tokenizer
from electra_jax.tasks.tables import Record, read_table
from electra_jax.tasks.text import TextTask, make_rows, to_class, to_score

_FIELD = "task.data_dir"
_TRAIN = ("train.tsv", "msr_paraphrase_train.txt")    # one of them is in a task's folder
_BINARY, _ENTAILED = ("0", "1"), ("entailment", "not_entailment")


class Spec(NamedTuple):
    """What sets a task apart. Predictions files are called like its folder and spell `labels` as here."""
    folder: str
    columns: tuple[str, ...]         # texts, by the names of new records; those in the files unless `header` is given
    label: str                       # column of the label in the files
    labels: tuple[str, ...]          # none: scores from 0 to 5
    metrics: tuple[str, ...]
    header: tuple[str, ...] = ()     # columns of the texts in the files
    features: tuple[str, ...] = ()   # and in TensorFlow Datasets, if they differ from `columns`
    unordered: bool = False          # the two texts play the same part


_SENTENCES = ("sentence1", "sentence2")
TASKS = {
    "cola": Spec("CoLA", ("sentence",), "label", _BINARY, ("matthews", "accuracy")),
    "sst2": Spec("SST-2", ("sentence",), "label", _BINARY, ("accuracy",)),
    "mrpc": Spec("MRPC", _SENTENCES, "Quality", _BINARY, ("accuracy", "f1"), header=("#1 String", "#2 String"),
                 unordered=True),
    "stsb": Spec("STS-B", _SENTENCES, "score", (), ("spearman", "pearson"), unordered=True),
    "qqp": Spec("QQP", ("question1", "question2"), "is_duplicate", _BINARY, ("accuracy", "f1")),
    "mnli": Spec("MNLI", _SENTENCES, "gold_label", ("contradiction", "entailment", "neutral"), ("accuracy",),
                 features=("premise", "hypothesis")),
    "qnli": Spec("QNLI", ("question", "sentence"), "label", _ENTAILED, ("accuracy",)),
    "rte": Spec("RTE", _SENTENCES, "label", _ENTAILED, ("accuracy",)),
    "wnli": Spec("WNLI", _SENTENCES, "label", _BINARY, ("accuracy",)),
}
# Our splits: the official file's name and that of TensorFlow Datasets. The first two must be there.
_SPLITS = {"train": ("train", "train"), "dev": ("dev", "validation"), "test": ("test", "test")}
_MNLI_SPLITS = {
    "train": ("train", "train"), "dev": ("dev_matched", "validation_matched"),
    "dev_mismatched": ("dev_mismatched", "validation_mismatched"), "test": ("test_matched", "test_matched"),
    "test_mismatched": ("test_mismatched", "test_mismatched"),
}


def load(name: str, tokenizer: Tokenizer, seq_len: int, data_dir: str, double_unordered: bool = True) -> TextTask:
    """Returns a task by its short name; splits are train, dev and, where there, test.

    `data_dir` is the task's folder or the one that holds CoLA/, SST-2/, ..., or "tfds" or "tfds:DIR" for what
    TensorFlow Datasets has prepared. MNLI's dev and test are the matched ones, beside dev_mismatched and
    test_mismatched. With `double_unordered` the training sets of MRPC and STS-B are doubled by exchanging the two
    sentences, as ELECTRA's code does. Prints how many malformed rows of QQP were left out; other malformed rows
    raise UserError, and so do an unknown name and files that are missing.
    """
    if name not in TASKS:
        raise UserError(f"task.name={name!r} is no task of GLUE: choose from {', '.join(TASKS)}.")
    spec, splits = TASKS[name], _MNLI_SPLITS if name == "mnli" else _SPLITS
    scheme, _, where = str(data_dir).partition(":")
    if scheme == "tfds":
        records = _from_tfds(name, spec, splits, where)
    else:
        records = _from_files(name, spec, splits, _folder(spec, data_dir))
    to_label = to_class(spec.labels) if spec.labels else _score
    rows = {split: make_rows(found, to_label, source, not split.startswith("test"))
            for split, (found, source) in records.items()}
    return TextTask(name, tokenizer, seq_len, spec.columns, spec.labels, spec.metrics, rows, low=0.0,
                    high=1.0 if spec.labels else 5.0, clip=not spec.labels, swap=double_unordered and spec.unordered,
                    files={split: _predictions_file(name, spec, split) for split in rows})


def files(name: str, data_dir: str) -> dict[str, Path]:
    """Returns the files that `load` reads, by name: those that have to be there, and what else is."""
    spec, (scheme, _, where) = TASKS[name], str(data_dir).partition(":")
    if scheme == "tfds":
        root = Path(_builder(name, where).data_path)
        return {path.name: path for path in sorted(root.iterdir()) if path.is_file()}
    folder = _folder(spec, data_dir)
    if name == "mrpc" and not (folder / "train.tsv").exists():
        needed, others = ("msr_paraphrase_train.txt", _dev_ids(folder).name), ("msr_paraphrase_test.txt",)
    else:
        names = {split: f"{file}.tsv" for split, (file, _) in (_MNLI_SPLITS if name == "mnli" else _SPLITS).items()}
        needed = names["train"], names["dev"]
        others = tuple(file for file in names.values() if file not in needed)
    return {file: folder / file for file in (*needed, *others) if file in needed or (folder / file).exists()}


def present(data_dir: str) -> list[str]:
    """Returns the short names of the tasks whose folders `data_dir` (see `load`) holds; UserError if there are none."""
    scheme, _, folder = str(data_dir).partition(":")
    if scheme == "tfds":
        from tensorflow_datasets.core import constants
        root = Path(folder or constants.DATA_DIR).expanduser() / "glue"
        found = [name for name in TASKS if (root / name).is_dir()]
    else:
        root = Path(data_dir).expanduser()
        found = [name for name, spec in TASKS.items() if any((root / spec.folder / file).exists() for file in _TRAIN)]
    if not found:
        raise UserError(f"{_FIELD}={data_dir}: {root} holds no task of GLUE: give the folder that holds CoLA/, SST-2/, "
                        "..., or one that TensorFlow Datasets has prepared.")
    return found


def _score(label: str) -> float:
    value = to_score(label)
    if not 0 <= value <= 5:
        raise ValueError("is not between 0 and 5")
    return value


def _predictions_file(name: str, spec: Spec, split: str) -> str:
    """GLUE's name for test sets; with the split in it for all others."""
    stem = spec.folder + ("-mm" if split.endswith("_mismatched") else "-m") * (name == "mnli")
    split = split.removesuffix("_mismatched")
    return f"{stem}.tsv" if split == "test" else f"{stem}-{split}.tsv"


# --- The official files -------------------------------------------------------------------------


def _folder(spec: Spec, data_dir) -> Path:
    if not str(data_dir):
        raise UserError(f"{_FIELD} is empty: give the folder that holds {spec.folder}/, or tfds.")
    given = Path(data_dir).expanduser()
    for folder in (given / spec.folder, given):
        if any((folder / file).exists() for file in _TRAIN):
            return folder
    raise UserError(f"{_FIELD}={data_dir}: neither {spec.folder}/train.tsv nor train.tsv is there: give the folder of "
                    "GLUE's official files, or tfds.")


def _from_files(name: str, spec: Spec, splits: Mapping, folder: Path) -> dict[str, tuple[list[Record], str]]:
    if name == "mrpc" and not (folder / "train.tsv").exists():
        return _from_msr(spec, folder)
    found = {}
    for split, (file, _) in splits.items():
        path = folder / f"{file}.tsv"
        if split not in ("train", "dev") and not path.exists():
            continue
        malformed = [] if name == "qqp" and split != "test" else None    # every row of test wants a prediction
        columns, header = _columns(spec), True
        if name == "cola" and split != "test":
            columns, header = {"sentence": "3", "label": "1"}, False     # the only files without a header
        records = read_table(path, _FIELD, columns, header, need_label=split in ("train", "dev"), malformed=malformed)
        if malformed:
            print(f"{path}: {len(malformed)} malformed rows left out, the first is line {malformed[0]}.", flush=True)
        found[split] = records, f"{_FIELD}: {path}"
    return found


def _dev_ids(folder: Path) -> Path:
    for path in (folder / "dev_ids.tsv", folder / "mrpc_dev_ids.tsv"):
        if path.exists():
            return path
    raise UserError(f"{_FIELD}={folder}: dev_ids.tsv, GLUE's list of the rows of msr_paraphrase_train.txt that are "
                    "dev, is missing: put it there, or give train.tsv and dev.tsv.")


def _columns(spec: Spec) -> dict[str, str]:
    return dict(zip(spec.columns, spec.header or spec.columns, strict=True)) | {"label": spec.label}


def _from_msr(spec: Spec, folder: Path) -> dict[str, tuple[list[Record], str]]:
    """MRPC as Microsoft publishes it; GLUE's dev set is the part of train that dev_ids.tsv lists by both ids."""
    dev = {record.texts for record in read_table(_dev_ids(folder), _FIELD, {"a": "0", "b": "1", "label": ""},
                                                 header=False, need_label=False)}
    columns = {"id1": "#1 ID", "id2": "#2 ID"} | _columns(spec)
    train, test = folder / "msr_paraphrase_train.txt", folder / "msr_paraphrase_test.txt"
    found = {"train": ([], f"{_FIELD}: {train}"), "dev": ([], f"{_FIELD}: {train}")}
    for record in read_table(train, _FIELD, columns, form=".tsv"):
        found["dev" if record.texts[:2] in dev else "train"][0].append(record._replace(texts=record.texts[2:]))
    if test.exists():
        records = read_table(test, _FIELD, columns, need_label=False, form=".tsv")
        found["test"] = [record._replace(texts=record.texts[2:]) for record in records], f"{_FIELD}: {test}"
    return found


# --- TensorFlow Datasets ------------------------------------------------------------------------


def _builder(name: str, folder: str):
    import tensorflow_datasets as tfds
    try:
        builder = tfds.builder(f"glue/{name}", data_dir=str(Path(folder).expanduser()) if folder else None)
        builder.as_data_source()    # fails where nothing is prepared, or in another format
    except Exception as error:    # tfds raises a dozen types, from unknown names to missing files
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{_FIELD}=tfds{':' * bool(folder)}{folder}: tfds cannot open glue/{name} ({first}): prepare "
                        "it with file_format=\"array_record\", and give its data_dir as tfds:DIR.") from error
    return builder


def _from_tfds(name: str, spec: Spec, splits: Mapping, folder: str) -> dict[str, tuple[list[Record], str]]:
    found, builder = {}, _builder(name, folder)
    sources = {split: builder.as_data_source(split=theirs) for split, (_, theirs) in splits.items()}
    names = getattr(builder.info.features["label"], "names", None)
    for split, source in sources.items():
        records = []
        for start in range(0, len(source), 256):    # ArrayRecord is several times faster in batches
            for value in source.__getitems__(list(range(start, min(start + 256, len(source))))):
                texts = tuple(value[feature].decode() for feature in spec.features or spec.columns)
                records.append(Record(texts, _tfds_label(spec, names, value["label"]), int(value["idx"])))
        # tfds stores examples shuffled; a predictions file wants GLUE's order.
        found[split] = sorted(records, key=lambda record: record.line), f"{_FIELD}: tfds glue/{name} {split}"
    return found


def _tfds_label(spec: Spec, names, value) -> str | None:
    if value < 0:
        return None    # the test sets'
    if not spec.labels:
        return str(float(value))
    return names[value] if names[value] in spec.labels else str(value)
