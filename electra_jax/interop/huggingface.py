"""Both networks to and from Hugging Face's ELECTRA folders; no torch needed.

  python -m electra_jax.interop.huggingface export --checkpoint=WORKDIR --output=DIR
  python -m electra_jax.interop.huggingface import --discriminator=DIR [--generator=DIR] --output=WORKDIR

`export` writes DIR/discriminator (ElectraForPreTraining) and DIR/generator (ElectraForMaskedLM), each with its own
sizes and the tokenizer. `import` writes a workdir that `--config.run.init_from` takes.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from electra_jax import checkpoint, cli, config, model
from electra_jax.config import UserError
from electra_jax.data.tokenizer import Tokenizer, tokenizer_from_files
from electra_jax.interop import names, tokenizers, weights, workdir

# Our fields of `model` and theirs of config.json.
_FIELDS = {
    "vocab_size": "vocab_size", "embedding_size": "embedding_size", "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings", "type_vocab_size": "type_vocab_size",
    "layer_norm_eps": "layer_norm_eps", "initializer_range": "initializer_range",
    "hidden_dropout": "hidden_dropout_prob", "attention_dropout": "attention_probs_dropout_prob",
}
# Tensors that no network of ours has: position tables of old files, heads of tuned models, the tied output table.
_LEFT_OUT = ("electra.embeddings.position_ids", "electra.embeddings.token_type_ids", "classifier.", "qa_outputs.",
             "sequence_summary.", "generator_lm_head.weight")
_KINDS = {"discriminator": "ElectraForPreTraining", "generator": "ElectraForMaskedLM", "encoder": "ElectraModel"}


@dataclasses.dataclass(frozen=True)
class Network:
    """One Hugging Face folder, read: its sizes under our names, and its tensors under theirs."""

    folder: Path
    kind: str                          # "discriminator", "generator" or "encoder" (no pretraining head)
    sizes: dict[str, Any]              # the fields of `model` that it determines
    tensors: dict[str, np.ndarray]     # names with the prefix "electra.", whatever the class that wrote them

    @property
    def arch(self) -> model.Architecture:
        return model.Architecture(**self.sizes)

    def params(self, rows: list[names.Row]) -> dict[str, Any]:
        """Returns our parameters; raises UserError for missing or unknown tensors and other shapes."""
        params = names.from_huggingface(rows, self.tensors, str(self.folder))
        self.check_known({name for row in rows for name in row.huggingface})
        return params

    def check_known(self, known: set[str]) -> None:
        """Raises UserError for tensors that are neither `known` nor of a kind that is safely left out."""
        unknown = sorted(name for name in self.tensors.keys() - known if not name.startswith(_LEFT_OUT))
        if unknown:
            raise UserError(f"{self.folder} has tensors that no ELECTRA {self.kind} has: {', '.join(unknown[:3])}"
                            f"{' and more' if len(unknown) > 3 else ''}: check the sizes in its config, or take "
                            "another folder.")

    def tables(self) -> dict[str, np.ndarray]:
        """The embedding tables and their LayerNorm, which the two networks of a pair share."""
        return {name: x for name, x in self.tensors.items() if name.startswith("electra.embeddings.")}

    def encoder(self) -> dict[str, np.ndarray]:
        """The projection and the layers."""
        return {name: x for name, x in self.tensors.items() if name.startswith(("electra.encoder.",
                                                                                "electra.embeddings_project."))}


def is_folder(path: str | os.PathLike) -> bool:
    """Whether `path` is a Hugging Face folder, or an export with `discriminator` or `generator` in it."""
    path = Path(path)
    return any("model_type" in _peek(p / "config.json") for p in (path, path / "discriminator", path / "generator"))


def _peek(file: Path) -> dict:
    try:
        return workdir.read_json(file)
    except UserError:
        return {}


def read(folder: str | os.PathLike) -> Network:
    """Reads one network's folder. Raises UserError for what is missing, damaged or no ELECTRA of this kind."""
    folder = Path(folder)
    theirs = workdir.read_json(folder / "config.json")
    where = folder / "config.json"
    if theirs.get("model_type") != "electra":
        raise UserError(f"{where}: model_type is {theirs.get('model_type')!r}, not 'electra'.")
    for field, only in (("hidden_act", "gelu"), ("position_embedding_type", "absolute"), ("is_decoder", False),
                        ("tie_word_embeddings", True)):
        if theirs.get(field, only) != only:
            raise UserError(f"{where}: {field} is {theirs[field]!r}, but only {only!r} has a counterpart here.")
    defaults = config.get_config().model.to_dict() | {"vocab_size": 30522}    # transformers leaves defaults out
    sizes = {ours: theirs.get(name, defaults[ours]) for ours, name in _FIELDS.items()}
    for ours, value in sizes.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or value < 0 or (
                isinstance(defaults[ours], int) and (not isinstance(value, int) or value < 1)):
            raise UserError(f"{where}: {_FIELDS[ours]} is {value!r}, which is no size: fetch or write it anew.")
    if sizes["hidden_size"] % sizes["num_heads"]:
        raise UserError(f"{where}: hidden_size {sizes['hidden_size']} does not divide by num_attention_heads "
                        f"{sizes['num_heads']}.")
    tensors = weights.read(folder)
    if not any(name.startswith("electra.") for name in tensors):    # ElectraModel writes its own without a prefix
        tensors = {f"electra.{name}": x for name, x in tensors.items()}
    heads = {name.split(".")[0] for name in tensors}
    if "generator_lm_head.weight" in tensors and not np.array_equal(
            tensors["generator_lm_head.weight"], tensors.get("electra.embeddings.word_embeddings.weight")):
        raise UserError(f"{folder}: generator_lm_head.weight differs from the token table, but the two are one here.")
    kind = ("generator" if "generator_predictions" in heads else
            "discriminator" if "discriminator_predictions" in heads else "encoder")
    return Network(folder, kind, sizes, tensors)


def load(path: str | os.PathLike, wanted: str) -> tuple[dict[str, Any], dict[str, Any], Tokenizer]:
    """Returns (fields of `model`, params, tokenizer) of the `wanted` network ("discriminator" or "generator").

    `path` is one network's folder or an export with both. As "discriminator" a folder without its head, or a
    generator's, gives the encoder alone. Raises UserError as `read` does, and for a generator that is none.
    """
    path = Path(path)
    if "model_type" not in _peek(path / "config.json"):
        # The MLM baseline exports as a generator alone.
        path = path / (wanted if (path / wanted).is_dir() else "generator")
    network = read(path)
    if wanted == "generator":
        if network.kind != "generator":
            raise UserError(f"{path} is no generator ({_KINDS[network.kind]}): give the folder of one.")
        params = network.params(names.generator_rows(network.arch))
    else:
        rows = names.discriminator_rows(network.arch, head=network.kind == "discriminator")
        if network.kind == "generator":
            network.check_known({name for row in names.generator_rows(network.arch) for name in row.huggingface})
            params = names.from_huggingface(rows, network.tensors, str(path))
        else:
            params = network.params(rows)
    # A generator on its own is "as large as its discriminator".
    return network.sizes | {"generator_size": 1.0}, params, tokenizers.from_huggingface(path)


# --- Export -------------------------------------------------------------------------------------

def export(checkpoint_path: str | os.PathLike, output: str | os.PathLike, keep_padding: bool = False) -> None:
    """Writes `output`/discriminator and `output`/generator, or nothing.

    A token table that is padded beyond the vocabulary is cut to it, for nothing keeps Hugging Face's generator from
    predicting those rows; `keep_padding` leaves it. A run of the MLM baseline gives `generator` alone, its
    full-size network. Raises UserError for a model that Hugging Face's ELECTRA cannot express.
    """
    params, meta, files = checkpoint.load_params(checkpoint_path, None)
    ours, tokenizer = config.restored(meta["config"]), tokenizer_from_files(files)
    m, params = ours.model, model.unstack_layers(params)
    check_expressible(m, str(checkpoint_path))
    networks = {}
    if "head" in params.get("discriminator", {}):
        arch = model.discriminator_architecture(m)
        networks["discriminator"] = arch, names.discriminator_rows(arch)
    if "generator" in params:
        is_mlm = ours.objective.name == "mlm"
        arch = model.discriminator_architecture(m) if is_mlm else model.generator_architecture(m)
        networks["generator"] = arch, names.generator_rows(arch, "all" if is_mlm else m.sharing)
    with workdir.new_folder(Path(output)) as temporary:
        for kind, (arch, rows) in networks.items():
            tensors = names.to_huggingface(rows, params)
            workdir.check_finite(tensors, str(checkpoint_path))
            if not keep_padding:
                arch = dataclasses.replace(arch, vocab_size=tokenizer.vocab_size)
                for name in {"electra.embeddings.word_embeddings.weight", "generator_lm_head.bias"} & tensors.keys():
                    tensors[name] = np.ascontiguousarray(tensors[name][:arch.vocab_size])
            write_folder(temporary / kind, {"architectures": [_KINDS[kind]]}, arch, tensors, tokenizer)
    for kind, (_, rows) in networks.items():
        print(f"wrote {output}/{kind}: {_KINDS[kind]}, {sum(np.prod(row.shape) for row in rows):,} parameters")


def check_expressible(m, where: str) -> None:
    """Raises UserError for a `model` section that Hugging Face's ELECTRA has no counterpart of."""
    for field, only in (("positions", "absolute"), ("norm", "post")):
        if m[field] != only:
            raise UserError(f"model.{field}={m[field]} of {where} has no counterpart in Hugging Face's ELECTRA, which "
                            f"knows {only!r} only: pretrain with model.{field}={only} to export.")


def write_folder(folder: Path, more: dict[str, Any], arch: model.Architecture, tensors: dict[str, np.ndarray],
                 tokenizer: Tokenizer) -> None:
    """Writes one network with `more` fields of config.json ("architectures", labels)."""
    fields = {"model_type": "electra", "hidden_act": "gelu", "dtype": "float32", "pad_token_id": tokenizer.pad_id,
              "tie_word_embeddings": True, "position_embedding_type": "absolute", "summary_type": "first",
              "summary_use_proj": True, "summary_activation": "gelu", "summary_last_dropout": 0.1,
              "classifier_dropout": None}
    fields |= {theirs: getattr(arch, ours) for ours, theirs in _FIELDS.items()} | more
    folder.mkdir(parents=True, exist_ok=True)
    weights.write(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf8")
    for name, data in tokenizers.huggingface_files(tokenizer, arch.max_positions).items():
        (folder / name).write_bytes(data)


# --- Import -------------------------------------------------------------------------------------

def import_folders(discriminator: str | os.PathLike, output: str | os.PathLike,
                   generator: str | os.PathLike | None = None, generator_size: float = 0.25,
                   generator_layers: float = 1.0, seed: int = 0) -> None:
    """Writes the workdir `output` with both networks as they are, or nothing.

    Tables that are equal in both folders are shared again. Without a generator a fresh one of `generator_size` x
    the width and `generator_layers` x the depth is drawn, on the discriminator's tables. Raises UserError for
    damaged or unfitting folders.
    """
    disc = read(discriminator)
    if disc.kind != "discriminator":
        raise UserError(f"--discriminator={discriminator} has no discriminator head ({_KINDS[disc.kind]}): give the "
                        "folder of an ElectraForPreTraining.")
    params = disc.params(names.discriminator_rows(disc.arch))
    tokenizer = tokenizers.from_huggingface(disc.folder)
    if generator is None:
        fields = disc.sizes | {"generator_size": generator_size, "generator_layers": generator_layers}
        params["generator"] = workdir.fresh_generator(fields, seed)
    else:
        gen = read(generator)
        if gen.kind != "generator":
            raise UserError(f"--generator={generator} has no generator head ({_KINDS[gen.kind]}): give the folder of "
                            "an ElectraForMaskedLM.")
        if tokenizers.from_huggingface(gen.folder).fingerprint != tokenizer.fingerprint:
            raise UserError(f"--generator={generator} and --discriminator={discriminator} have different tokenizers: "
                            "give two networks of one pretraining.")
        fields = _joint_fields(disc, gen)
        rows = names.generator_rows(gen.arch, fields["sharing"])
        params = _merge(params, gen.params(rows))
        if _cost(gen.arch) >= _cost(disc.arch):
            print("warning: the generator is as large as its discriminator, as in the released "
                  "google/electra-small-generator. So strong a generator leaves little to detect: pretraining from "
                  "scratch wants one of a quarter to a half the width (model.generator_size=0.25).", file=sys.stderr)
    workdir.write(output, fields, params, tokenizer, source=f"huggingface {discriminator} {generator or ''}".strip())


def _joint_fields(disc: Network, gen: Network) -> dict[str, Any]:
    """Returns the fields of `model` that make exactly these two networks."""
    for name in ("vocab_size", "max_positions", "type_vocab_size", "layer_norm_eps"):
        if disc.sizes[name] != gen.sizes[name]:
            raise UserError(f"{_FIELDS[name]} is {gen.sizes[name]} in {gen.folder} and {disc.sizes[name]} in "
                            f"{disc.folder}, but the two networks have it in common here.")
    a, b = disc.arch, gen.arch
    shared = _equal(disc.tables(), gen.tables())
    sharing = "none" if not shared else "all" if a == b and _equal(disc.encoder(), gen.encoder()) else "embeddings"
    return disc.sizes | workdir.generator_fields(a, b, sharing)


def _equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def _cost(arch: model.Architecture) -> int:
    return arch.num_layers * arch.hidden_size * (2 * arch.hidden_size + arch.intermediate_size)


def _merge(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    both = {name: _merge(a[name], b[name]) for name in a.keys() & b.keys() if isinstance(a[name], dict)}
    return a | b | both


def main(arguments: list[str]) -> None:
    """The command line above; raises UserError for what the user can mend."""
    parser = cli.ArgumentParser("python -m electra_jax.interop.huggingface", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="a checkpoint of ours to Hugging Face folders")
    out.add_argument("--checkpoint", required=True, help="workdir, its checkpoints folder, or one checkpoint")
    out.add_argument("--output", required=True, help="new folder")
    out.add_argument("--keep_padding", action="store_true", help="keep rows of the token table beyond the vocabulary")
    into = commands.add_parser("import", help="Hugging Face folders to a workdir of ours")
    into.add_argument("--discriminator", required=True, help="folder of an ElectraForPreTraining")
    into.add_argument("--generator", help="folder of an ElectraForMaskedLM; without it a fresh one is drawn")
    into.add_argument("--output", required=True, help="new workdir")
    workdir.add_generator_flags(into)
    flags = parser.parse_args(arguments)
    if flags.command == "export":
        export(flags.checkpoint, flags.output, flags.keep_padding)
    else:
        import_folders(flags.discriminator, flags.output, flags.generator, flags.generator_size,
                       flags.generator_layers, flags.seed)


if __name__ == "__main__":
    sys.exit(workdir.run(main))
