"""Tables of the user's: .tsv, .csv and .jsonl files as records, every mistake with its line."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from electra_jax.config import UserError
from electra_jax.tasks.base import read_text

_FORMATS = (".tsv", ".csv", ".jsonl")


class Record(NamedTuple):
    """One example as its file spells it."""
    texts: tuple[str, ...]
    label: str | None
    line: int                  # where it starts in the file, from 1


def read_table(path, field: str, columns: Mapping[str, str], header: bool = True, need_label: bool = True,
               form: str = "", malformed: list[int] | None = None) -> list[Record]:
    """Returns the records of a .tsv, .csv or .jsonl file, also with .gz behind.

    `columns` gives, by name of a config field, the columns of the texts in order and last, under a field that ends in
    "label", that of the label; they are names in the header or keys of the JSON objects, or without `header` numbers
    from 0. Blank rows are passed over. `form` (".tsv") overrules the name of the file. TSV has no quoting, as in
    GLUE's files; CSV has it. Numbers of lines with too many or too few columns go to `malformed` if that is given.
    Raises UserError, with `field`, file and line, for a file that cannot be read, is not UTF-8 or has no rows; for a
    missing column, a wrong number of columns, a text that is none and, with `need_label`, an empty label.
    """
    where = f"{field}: {path}"
    form = form or suffix(path)
    if form not in _FORMATS:
        raise UserError(f"{where}: the name must end in {', '.join(_FORMATS)} (or one of these and .gz).")
    # Not `splitlines`: it takes more than line feeds for the end of a line.
    lines = io.StringIO(read_text(field, path), newline="" if form == ".csv" else "\n")
    found = json_rows(lines, where) if form == ".jsonl" else table_rows(lines, form, where)
    records, first = [], None
    for line, cells in found:
        if form != ".jsonl":
            if first is None:
                first = [cell.strip() for cell in cells] if header else [str(i) for i in range(len(cells))]
                _check_columns(columns, first, where, need_label)
                if header:
                    continue
            if len(cells) != len(first):
                if malformed is None:
                    raise UserError(f"{where}:{line} has {len(cells)} columns, the first line has {len(first)}: "
                                    "correct the row, or remove it.")
                malformed.append(line)
                continue
            cells = dict(zip(first, cells, strict=True))
        else:
            _check_columns(columns, list(cells), f"{where}:{line}", need_label)
        *texts, label = [cells.get(column) for column in columns.values()]
        for (name, column), value in zip(columns.items(), texts, strict=False):
            if not isinstance(value, str):
                raise UserError(f"{where}:{line}: {name}={column} holds no string but {json.dumps(value)[:40]}: "
                                "correct the row, or remove it.")
        if isinstance(label, float) and label.is_integer() and abs(label) < 2**53:
            label = int(label)    # 1.0 is the class 1, written by another program
        label = label if isinstance(label, str) else "" if label is None else json.dumps(label)
        if need_label and not label.strip():
            raise UserError(f"{where}:{line} has an empty label: fill it in, or remove the row.")
        records.append(Record(tuple(map(clean, texts)), clean(label.strip()) or None, line))
    if not records:
        raise UserError(f"{where} has no rows: give a file with examples.")
    return records


def suffix(path) -> str:
    """Returns the ending of a file's name in small letters, without .gz: ".tsv" of A.TSV.gz."""
    return PurePath(str(path).lower().removesuffix(".gz")).suffix


def table_rows(lines: Iterable[str], form: str, where: str) -> Iterator[tuple[int, list[str]]]:
    """Yields line number and cells of the rows of a .tsv or .csv file that are not blank; UserError for bad quotes."""
    if form == ".tsv":    # not csv, which takes a carriage return inside a line for its end
        rows = ((i, line.removesuffix("\n").removesuffix("\r").split("\t")) for i, line in enumerate(lines, 1))
    else:
        rows = _csv(lines, where)
    return ((line, cells) for line, cells in rows if any(cell.strip() for cell in cells))


def _csv(lines: Iterable[str], where: str):
    limit = csv.field_size_limit(2**31 - 1)    # 131,072 characters otherwise
    reader, line = csv.reader(lines, strict=True), 0
    try:
        for cells in reader:
            yield line + 1, cells
            line = reader.line_num
    except csv.Error as error:
        raise UserError(f"{where}:{line + 1} is not CSV ({error}): correct its quotes.") from error
    finally:
        csv.field_size_limit(limit)


def json_rows(lines: Iterable[str], where: str, first: int = 1) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields number (the first line has `first`) and object of the lines that are not blank; UserError for others."""
    for number_, line in enumerate(lines, first):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}:{number_} is not JSON ({error}): correct the line, or remove it.") from error
            if not isinstance(value, dict):
                raise UserError(f"{where}:{number_} is not a JSON object: write {{\"column\": value, ...}}.")
            yield number_, value


def _check_columns(columns: Mapping[str, str], found: Sequence[str], where: str, need_label: bool) -> None:
    for field, column in columns.items():
        if list(found).count(column) > 1:
            raise UserError(f"{field}={column}: {where} has {found.count(column)} columns of that name: rename all but "
                            "one.")
        if column not in found and (need_label or not field.endswith("label")):
            raise UserError(f"{field}={column}: {where} has no such column: name one of {', '.join(found[:20])}.")


def clean(text: str) -> str:
    """A lone surrogate is legal JSON and no legal text."""
    return text.encode(errors="replace").decode()
