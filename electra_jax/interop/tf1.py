"""Checkpoints of the original (TensorFlow 1), and of NVIDIA's TensorFlow 2 port, to a workdir; no TensorFlow needed.

  python -m electra_jax.interop.tf1 import --checkpoint=PREFIX_OR_FOLDER --output=WORKDIR [--vocab=vocab.txt]

Both networks, Adam's moments and the step count are taken, as far as the checkpoint has them. Sizes follow from the
variables' shapes, except the number of heads, which is the original's: one for each 64 of the width.
"""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from electra_jax import cli
from electra_jax.config import UserError
from electra_jax.data.tokenizer import load_tokenizer
from electra_jax.interop import bundle, names, workdir
from electra_jax.model import Architecture

_HEAD_SIZE = 64
_MAX_PADDING = 128    # rows; ports round the vocabulary up to a multiple of 8, 64 or 128
_MOMENTS = ("/adam_m", "/adam_v")
# Variables that are left out without a word: counters, heads of tuned models, the object graph's description, and
# one of the released checkpoints that the released code does not read.
_BOOKKEEPING = re.compile("global_step|task_specific/.*|generator_predictions/temperature|"
                          "_CHECKPOINTABLE_OBJECT_GRAPH|optimizer/.*|save_counter|phase2")
# Our parameters with a row for each piece of the vocabulary.
_BY_PIECE = ("embeddings/word_embeddings/embedding", "generator/embeddings/word_embeddings/embedding",
             "generator/head/bias")

# NVIDIA's names are paths of attributes: https://github.com/NVIDIA/DeepLearningExamples, TensorFlow2/LanguageModeling/
# ELECTRA/modeling.py and modeling_utils.py. The rules apply in this order.
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
_NVIDIA = [(re.compile(pattern), name) for pattern, name in (
    (r"^step$", "global_step"),
    (r"/\.OPTIMIZER_SLOT/.*/([mv])$", r"/adam_\1"),    # .../optimizer/m, with float16 .../optimizer/base_optimizer/m
    (r"^model/generator/generator_lm_head/bias\b", "generator_predictions/output_bias"),
    (r"^model/generator/generator_predictions/", "generator_predictions/"),
    (r"^model/generator/electra/", "generator/"),
    (r"^model/discriminator/electra/", "electra/"),
    (r"^model/discriminator/", ""),
    (r"/embeddings/weight\b", "/embeddings/word_embeddings"),
    (r"(/(?:position|token_type)_embeddings)/embeddings\b", r"\1"),
    (r"/encoder/layer/(\d+)/", r"/encoder/layer_\1/"),
    (r"/attention/self_attention/", "/attention/self/"),
    (r"/attention/dense_output/", "/attention/output/"),
    (r"/bert_output/", "/output/"),
    (r"^discriminator_predictions/dense_prediction/", "discriminator_predictions/dense_1/"),
)]


@dataclasses.dataclass(frozen=True)
class Imported:
    """What a checkpoint holds, under our names."""

    model: dict[str, Any]              # fields of the config's `model` section
    params: dict[str, Any]             # nested, float32
    moments: tuple[dict, dict] | None  # Adam's first and second, nested like `params`
    step: int | None
    notes: tuple[str, ...]             # a line for each thing that it lacks, or that was left out


def read_checkpoint(path: str | os.PathLike, vocab_size: int | None = None, num_heads: int | None = None,
                    generator_heads: int | None = None, ignore_unknown: bool = False) -> Imported:
    """Reads the checkpoint `path`: a prefix, one of its files, or a folder (the newest one in it).

    A token table padded beyond `vocab_size` pieces is cut to it. Raises UserError for a damaged checkpoint, for
    variables that are missing, of unfitting shape or (without `ignore_unknown`) unknown, for widths without whole
    heads of 64 unless the heads are given, and for a table that does not fit `vocab_size`.
    """
    prefix = bundle.find_prefix(path)
    variables = _Variables(prefix)
    disc = _architecture(variables, "electra", "electra/embeddings", num_heads)
    sharing, gen = _generator(variables, disc, generator_heads)
    has_head = variables.have("discriminator_predictions/")
    rows = names.discriminator_rows(disc, head=has_head) + (names.generator_rows(gen, sharing) if gen else [])
    rows = list({row.path: row for row in rows}.values())    # what both networks share comes twice
    if not ignore_unknown:
        variables.check_known({name for row in rows for name in row.tf1})
    cut = vocab_size is not None and vocab_size != disc.vocab_size
    if cut:
        _check_padding(prefix, disc.vocab_size, vocab_size)
    notes = []
    if not gen:
        notes.append("no generator")
    if not has_head:
        notes.append("no discriminator head: the encoder alone")

    params = variables.params(rows)
    moments = None
    lacking = [variables.lacking(rows, suffix) for suffix in _MOMENTS]
    if not any(lacking):
        # One after the other: a read tensor is freed before those of the next kind come.
        moments = variables.params(rows, _MOMENTS[0]), variables.params(rows, _MOMENTS[1])
    elif all(len(some) == sum(len(row.tf1) for row in rows) for some in lacking):
        notes.append("no moments of Adam")
    else:
        notes.append(f"Adam's moments are left out: some are missing, such as {(lacking[0] + lacking[1])[0]}")
    step = variables.step()
    if step is None:
        notes.append("no step count")
    if cut:
        notes.append(f"the token table's {disc.vocab_size} rows were cut to the vocabulary's {vocab_size} pieces")
        disc = dataclasses.replace(disc, vocab_size=vocab_size)
        for tree in (params, *(moments or ())):
            _cut(tree, vocab_size)
    return Imported(_model_section(disc, gen, sharing), params, moments, step, tuple(notes))


class _Variables:
    """A bundle's variables under the original's names."""

    def __init__(self, prefix: str):
        self.prefix = prefix
        self._index = bundle.read_index(prefix)
        is_nvidia = any(name.endswith(_VALUE) for name in self._index)
        self._stored = {_original(name) if is_nvidia else name: name for name in self._index}

    def have(self, scope: str) -> bool:
        return any(name.startswith(scope) for name in self._stored)

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        if name not in self._stored:
            raise UserError(f"{self.prefix} has no variable {name}: it is no whole ELECTRA pretraining checkpoint.")
        shape = self._index[self._stored[name]].shape
        if len(shape) != rank or 0 in shape:
            raise UserError(f"{self.prefix}: {name} has shape {shape}, where ELECTRA has {rank} dimensions.")
        return shape

    def num_layers(self, scope: str) -> int:
        found = {int(match[1]) for name in self._stored if (match := re.match(rf"{scope}/encoder/layer_(\d+)/", name))}
        if found != set(range(len(found))):
            raise UserError(f"{self.prefix} has {scope}/encoder/layer_{max(found)} but not all layers before it: it is "
                            "no whole ELECTRA pretraining checkpoint.")
        return len(found)

    def check_known(self, known: set[str]) -> None:
        """Raises UserError for variables that are neither `known`, nor a moment, nor bookkeeping."""
        unknown = sorted(name for name in self._stored.keys() - known
                         if not name.endswith(_MOMENTS) and not _BOOKKEEPING.fullmatch(name))
        if unknown:
            raise UserError(f"{self.prefix} has {len(unknown)} variables that ELECTRA does not have, such as "
                            f"{', '.join(unknown[:3])}: give --ignore_unknown to leave them out.")

    def lacking(self, rows: Iterable[names.Row], suffix: str) -> list[str]:
        return [name + suffix for row in rows for name in row.tf1 if name + suffix not in self._stored]

    def params(self, rows: list[names.Row], suffix: str = "") -> dict[str, Any]:
        wanted = [name + suffix for row in rows for name in row.tf1 if name + suffix in self._stored]
        stored = bundle.read_bundle(self.prefix, [self._stored[name] for name in wanted])
        tensors = {name: stored[self._stored[name]] for name in wanted}
        workdir.check_finite(tensors, self.prefix)
        return names.from_tf1(rows, tensors, self.prefix, suffix)

    def step(self) -> int | None:
        name = self._stored.get("global_step")
        return None if name is None else int(bundle.read_bundle(self.prefix, [name])[name])


def _original(name: str) -> str:
    """The original's name of one of NVIDIA's variables, or what is left of another name without its ending."""
    name = name.removesuffix(_VALUE)
    for pattern, replacement in _NVIDIA:
        name = pattern.sub(replacement, name)
    return name


def _architecture(variables: _Variables, scope: str, tables: str, num_heads: int | None) -> Architecture:
    """The sizes of the network in `scope`, whose heads are `num_heads` or those of 64 each."""
    vocab_size, embedding_size = variables.shape(f"{tables}/word_embeddings", 2)
    layer = f"{scope}/encoder/layer_0"
    hidden_size = variables.shape(f"{layer}/attention/self/query/kernel", 2)[0]
    flag = "num_heads" if scope == "electra" else "generator_heads"
    # The original builds any generator width: max(1, width // 64) heads.
    if num_heads is None and scope == "electra" and hidden_size % _HEAD_SIZE:
        raise UserError(f"{variables.prefix}: the number of heads is not in a checkpoint, and a width of {hidden_size} "
                        f"has no whole heads of {_HEAD_SIZE}: give --{flag}=N.")
    heads = max(1, hidden_size // _HEAD_SIZE) if num_heads is None else num_heads
    if heads < 1 or hidden_size % heads:
        raise UserError(f"{variables.prefix}: a width of {hidden_size} does not divide by {heads} heads: "
                        f"give another --{flag}=N.")
    return Architecture(
        vocab_size=vocab_size, embedding_size=embedding_size, hidden_size=hidden_size,
        num_layers=variables.num_layers(scope), num_heads=heads,
        intermediate_size=variables.shape(f"{layer}/intermediate/dense/kernel", 2)[1],
        max_positions=variables.shape(f"{tables}/position_embeddings", 2)[0],
        type_vocab_size=variables.shape(f"{tables}/token_type_embeddings", 2)[0])


def _generator(variables: _Variables, disc: Architecture, num_heads: int | None) -> tuple[str, Architecture | None]:
    """What the networks share, and the generator's sizes, None where there is no generator."""
    if variables.have("generator/embeddings/"):
        return "none", _architecture(variables, "generator", "generator/embeddings", num_heads)
    if variables.have("generator/"):
        return "embeddings", _architecture(variables, "generator", "electra/embeddings", num_heads)
    if variables.have("generator_predictions/"):
        return "all", disc
    return "embeddings", None


def _model_section(disc: Architecture, gen: Architecture | None, sharing: str) -> dict[str, Any]:
    fields = ("vocab_size", "embedding_size", "hidden_size", "num_layers", "num_heads", "intermediate_size",
              "max_positions", "type_vocab_size")
    none = {"sharing": sharing, "generator_heads": 0, "generator_intermediate_size": 0, "generator_embedding_size": 0}
    return {name: getattr(disc, name) for name in fields} | (
        workdir.generator_fields(disc, gen, sharing) if gen else none)


def _check_padding(prefix: str, rows: int, vocab_size: int) -> None:
    if not 0 < rows - vocab_size < _MAX_PADDING:
        raise UserError(f"{prefix} has {rows} rows in its token table, but the vocabulary has {vocab_size} pieces: "
                        "give the --vocab that it was trained with.")


def _cut(params: Mapping[str, Any], vocab_size: int) -> None:
    for path in _BY_PIECE:
        *folders, last = path.split("/")
        node = params
        for folder in folders:
            node = node.get(folder, {})
        if last in node:
            node[last] = np.ascontiguousarray(node[last][:vocab_size])


def main(arguments: list[str]) -> None:
    """The command line above; raises UserError for what the user can mend."""
    parser = cli.ArgumentParser("python -m electra_jax.interop.tf1", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    into = parser.add_subparsers(dest="command", required=True).add_parser("import", help="a checkpoint to a workdir")
    into.add_argument("--checkpoint", required=True, help="PREFIX of PREFIX.index, or a folder: its newest checkpoint")
    into.add_argument("--output", required=True, help="new workdir")
    into.add_argument("--vocab", help="vocab.txt (or another tokenizer); default: vocab.txt beside the checkpoint")
    into.add_argument("--lowercase", action="store_true", default=True, help="vocab.txt is lower-cased (default)")
    into.add_argument("--nolowercase", dest="lowercase", action="store_false", help="vocab.txt is cased")
    into.add_argument("--strip_accents", choices=("auto", "yes", "no"), default="auto",
                      help="auto: with --lowercase, as BERT")
    into.add_argument("--num_heads", type=int, help="heads of the discriminator; default: width / 64")
    into.add_argument("--generator_heads", type=int, help="heads of the generator; default: width / 64, at least 1")
    workdir.add_generator_flags(into)
    into.add_argument("--ignore_unknown", action="store_true", help="leave unknown variables out")
    flags = parser.parse_args(arguments)

    prefix = bundle.find_prefix(flags.checkpoint)
    vocab = Path(flags.vocab) if flags.vocab else Path(prefix).parent / "vocab.txt"
    if not vocab.exists():
        raise UserError(f"--vocab={vocab} does not exist: give the vocabulary that the checkpoint was trained with.")
    tokenizer = load_tokenizer(vocab, flags.lowercase, flags.strip_accents)
    found = read_checkpoint(prefix, tokenizer.vocab_size, flags.num_heads, flags.generator_heads, flags.ignore_unknown)
    m = found.model
    print(f"{prefix}: {m['num_layers']} layers, {m['hidden_size']} wide, {m['num_heads']} heads"
          + (f", after {found.step:,} steps" if found.step is not None else ""))
    for note in found.notes:
        print(f"note: {note}")
    moments, has_head = found.moments, "head" in found.params["discriminator"]
    is_mlm = not has_head and "generator" in found.params
    if has_head and "generator" not in found.params:
        m |= {"generator_size": flags.generator_size, "generator_layers": flags.generator_layers}
        found.params["generator"] = workdir.fresh_generator(m, flags.seed)
        moments = None    # a fresh generator has none
    workdir.write(flags.output, m, found.params, tokenizer, moments, found.step, source=f"tensorflow {prefix}",
                  objective="mlm" if is_mlm else "electra")


if __name__ == "__main__":
    sys.exit(workdir.run(main))
