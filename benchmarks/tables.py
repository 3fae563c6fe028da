"""Prints the results of run.sh as Markdown tables: `python benchmarks/tables.py results.jsonl`.

Medians, ranges in brackets. With `--run WORKDIR --seconds S` it prints a line of JSON about a finished training
instead: the seconds from command to end, and the share of the time that the device waited for data.
"""

import argparse
import json
import re
import sys
from pathlib import Path

# Columns by what was measured: (heading, field, format); a format of "range" shows FIELD (FIELD_min to FIELD_max).
_SIZES = [("batch", "batch_size", "d"), ("length", "seq_len", "d")]
_COLUMNS = {
    "step": [*_SIZES, ("dtype", "dtype", ""), ("attention", "attention", ""), ("tokens/s", "tokens_per_s", ",.0f"),
             ("step, ms", "step_ms", "range"), ("MFU", "mfu", ".1%"), ("of peak", "peak_is", ""),
             ("peak, GiB", "peak_gib", ".2f"), ("compile, s", "compile_s", ".1f")],
    "peer": [("peer", "who", ""), ("batch", "batch", "d"), ("tokens/s", "tokens_per_s", ",.0f"),
             ("step, ms", "step_ms", ",.2f"), ("peak, GiB", "peak_gib", ".2f")],
    "ratio": [("of", "of", ""), ("unit", "unit", ""), ("ours", "ours", "rounds"), ("peer", "theirs", "rounds"),
              ("ratio", "ratio", ".2f"), ("rounds", "rounds", "list"), ("against", "against", "")],
    "loader": [*_SIZES, ("sequences/s", "examples_per_s", ",.0f"), ("batch, ms", "batch_ms", "range"),
               ("padding", "padding", ".2%")],
    "prepare": [("library", "library", ""), ("text, MB", "text_mb", ",.1f"), ("MB/s", "mb_per_s", ",.1f"),
                ("library alone, MB/s", "library_mb_per_s", ",.1f"), ("ratio", "ratio_to_library", ".2f"),
                ("seconds", "prepare_s", "range"), ("a worker, GiB", "worker_peak_gib", ".2f")],
    "checkpoint": [("state, MB", "state_mb", ",.1f"), ("arrays", "arrays", "d"), ("blocks, s", "block_s", "range"),
                   ("committed, s", "commit_s", "range"), ("restored, s", "restore_s", "range"),
                   ("on disk, MB", "disk_mb", ",.1f")],
    "startup": [("compilation cache", "cache", ""), ("store open, s", "store_s", "range"),
                ("program built, s", "built_s", "range"), ("compiled, s", "compiled_s", "range"),
                ("first step, s", "first_step_s", "range")],
    "imports": [("empty process, s", "bare_s", "range"), ("electra_jax.train, s", "train_s", "range"),
                ("all of a run, s", "run_s", "range")],
    "selection": [*_SIZES, ("distinct", "distinct", ""), ("ms", "ms", "range")],
    "sampler": [*_SIZES, ("positions", "num_masked", "d"), ("vocabulary", "vocab_size", "d"),
                ("sampler", "sampler", ""), ("ms", "ms", "range")],
    "attention": [*_SIZES, ("implementation", "implementation", ""), ("dtype", "dtype", ""),
                  ("dropout", "attention_dropout", ""), ("forward, ms", "forward_ms", "range"),
                  ("and backward, ms", "forward_backward_ms", "range"), ("difference", "difference", ".1e"),
                  ("of the gradient", "grad_difference", ".1e"), ("skipped", "skipped", "")],
    "finetune": [("batch", "batch_size", "d"), ("examples/s", "examples_per_s", ",.1f"),
                 ("tokens/s", "tokens_per_s", ",.0f"), ("padding", "padding", ".1%"),
                 ("compile, s", "compile_s", ".1f")],
    "run": [("steps", "steps", "d"), ("command to end, s", "seconds", ",.1f"),
            ("waited for data", "data_wait", ".1%")],
}
_MODEL = [("chips", "topology", ""), ("layers", "layers", "d"), ("width", "hidden_size", "d"),
          ("rows a chip", "rows_per_chip", ",g"), ("length", "seq_len", "d"), ("mesh", "mesh", "dict")]
_TIMES = [("products, ms", "compute_ms", ",.1f"), ("traffic, ms", "hbm_ms", ",.1f"),
          ("hidden, ms", "hidden_ms", ",.1f"), ("exposed, ms", "exposed_ms", ",.1f"),
          ("step, ms", "step_ms", ",.1f"), ("tokens/s a chip", "tokens_per_s_chip", ",d"), ("MFU", "mfu", ".1%")]
_LOOPS = [("remat", "remat", ""), ("microbatches", "accumulation", "d")]
_COLUMNS |= {
    "compile": [*_MODEL, ("attention", "attention", ""), ("dropout", "attention_dropout", ""),
                ("layers a turn", "scan_unroll", "d"), *_LOOPS, ("fits", "fits", ""), ("peak, GiB", "peak_gib", ".2f"),
                ("state, GiB", "state_gib", ".2f"), ("kernels", "kernels", ",d"),
                ("collectives", "collectives", "dict"), *_TIMES,
                ("compile, s", "compile_s", ".1f"), ("jax", "jax", ""), ("", "reason", "")],
    "largest": [*_MODEL, ("parameters", "params", ",d"), *_LOOPS, ("peak, GiB", "peak_gib", ".2f"), *_TIMES]}
_COLUMNS["weak"] = _COLUMNS["strong"] = [*_MODEL, ("peak, GiB", "peak_gib", ".2f"), *_TIMES]
_COLUMNS["best"] = [*_COLUMNS["step"][:2], ("program", "who", ""), *_COLUMNS["step"][2:]]
_COLUMNS["evaluate"] = _COLUMNS["finetune"]
_COLUMNS["sweep"] = [("program", "who", ""), *_SIZES, ("tokens/s", "tokens_per_s", ",.0f"), ("MFU", "mfu", ".1%"),
                     ("peak, GiB", "peak_gib", ".2f"), ("", "out_of_memory", "")]

_LONGEST = 120   # characters of a cell


def cell(line: dict, field: str, form: str) -> str:
    """One value as text; empty when the result lacks it."""
    value = line.get(field)
    if value is None:
        return ""
    if form == "range" and f"{field}_min" not in line:    # a peer's
        return f"{value:,.4g}"
    if form == "range":
        return f"{value:,.4g} ({line[f'{field}_min']:,.4g} to {line[f'{field}_max']:,.4g})"
    if form == "rounds":
        each = line[f"{field}_rounds"]
        return f"{value:,.5g} ({min(each):,.5g} to {max(each):,.5g})"
    if form == "dict":    # a mesh's axes, or collectives by kind
        return ", ".join(f"{k} {v['count']:,} x, {v['mib']:,.0f} MiB" if isinstance(v, dict) else f"{k} {v}"
                         for k, v in value.items())
    if form == "list":
        return ", ".join(map(str, value))
    if form:
        return format(value, form)
    text = re.sub(r"[^\s'=(]*/", "", str(value)).replace("|", "/")    # programs without their folders
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def tables(lines: list[dict]) -> str:
    """The results as Markdown: a heading a label, a table for each thing measured under it."""
    out: list[str] = []
    for label in dict.fromkeys(line.get("label", "") for line in lines):
        out.append(f"## {label or 'results'}\n")
        mine = [line for line in lines if line.get("label", "") == label]
        machines = dict.fromkeys(", ".join((line.get("device", ""), f"{line['cores']} x {line['machine']}",
                                            *(f"{k} {v}" for k, v in line["versions"].items()))).removeprefix(", ")
                                 for line in mine if "versions" in line and "machine" in line)
        out += [*machines, ""]
        for what in dict.fromkeys(line["what"] for line in mine if line.get("what") in _COLUMNS):
            rows = [line for line in mine if line["what"] == what]
            columns = [c for c in _COLUMNS[what] if any(line.get(c[1]) is not None for line in rows)]
            out += [f"{what}\n", "| " + " | ".join(c[0] for c in columns) + " |", "|" + "---|" * len(columns)]
            out += ["| " + " | ".join(cell(line, *c[1:]) for c in columns) + " |" for line in rows] + [""]
    return "\n".join(out)


def finished_run(workdir: Path, seconds: float, label: str) -> dict:
    """The result of a whole training from its metrics."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "data_wait" in line]
    time_s = sum(line["step_s"] for line in trained)    # intervals of as many steps each
    return {"label": label, "what": "run", "steps": max(line["step"] for line in lines), "seconds": seconds,
            "data_wait": sum(line["data_wait"] * line["step_s"] for line in trained) / time_s}


def main() -> int:
    """Reads the command line and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", help="file of JSON lines")
    parser.add_argument("--run", type=Path, help="workdir of a finished training")
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--label", default="")
    options = parser.parse_args()
    if options.run:
        print(json.dumps(finished_run(options.run, options.seconds, options.label)))
    else:
        with open(options.results, encoding="utf-8") as file:
            print(tables([json.loads(line) for line in file if line.startswith("{")]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
