"""One table of names: each parameter here, in Hugging Face's state dicts and in the original's checkpoints.

A kernel is [in, out] here and in TensorFlow, [out, in] in torch. Query, key and value are one parameter here,
`qkv_kernel` [D, 3, D] and `qkv_bias` [3, D], and three there.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from electra_jax.config import UserError
from electra_jax.model import Architecture


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter: its path here, its shape here, and its one or three (query, key, value) names elsewhere."""

    path: str
    shape: tuple[int, ...]
    huggingface: tuple[str, ...]
    tf1: tuple[str, ...]


def discriminator_rows(arch: Architecture, head: bool = True) -> list[Row]:
    """The discriminator's parameters; without `head` those of the encoder and the embeddings alone."""
    D = arch.hidden_size
    rows = _embedding_rows(arch, "embeddings", "electra/embeddings")
    rows += _encoder_rows(arch, "discriminator/encoder", "electra")
    if head:
        rows += _dense_rows("discriminator/head/dense", D, D, "discriminator_predictions.dense",
                            "discriminator_predictions/dense")
        rows += _dense_rows("discriminator/head/logit", D, 1, "discriminator_predictions.dense_prediction",
                            "discriminator_predictions/dense_1")
    return rows


def generator_rows(arch: Architecture, sharing: str = "embeddings") -> list[Row]:
    """The generator's parameters, its embeddings included, which lie elsewhere under each kind of `sharing`.

    The output table is the token table again, so it has no row of its own.
    """
    V, D, E = arch.vocab_size, arch.hidden_size, arch.embedding_size
    own = sharing == "none"
    rows = _embedding_rows(arch, "generator/embeddings" if own else "embeddings",
                           "generator/embeddings" if own else "electra/embeddings")
    rows += _encoder_rows(arch, "discriminator/encoder" if sharing == "all" else "generator/encoder",
                          "electra" if sharing == "all" else "generator")
    rows += _dense_rows("generator/head/dense", D, E, "generator_predictions.dense", "generator_predictions/dense")
    rows += _norm_rows("generator/head/norm", E, "generator_predictions.LayerNorm", "generator_predictions/LayerNorm")
    rows.append(Row("generator/head/bias", (V,), ("generator_lm_head.bias",), ("generator_predictions/output_bias",)))
    return rows


def _embedding_rows(arch: Architecture, ours: str, tf1: str) -> list[Row]:
    sizes = {"word": arch.vocab_size, "position": arch.max_positions, "token_type": arch.type_vocab_size}
    rows = [Row(f"{ours}/{kind}_embeddings/embedding", (size, arch.embedding_size),
                (f"electra.embeddings.{kind}_embeddings.weight",), (f"{tf1}/{kind}_embeddings",))
            for kind, size in sizes.items()]
    return rows + _norm_rows(f"{ours}/norm", arch.embedding_size, "electra.embeddings.LayerNorm", f"{tf1}/LayerNorm")


def _encoder_rows(arch: Architecture, ours: str, tf1: str) -> list[Row]:
    D, F = arch.hidden_size, arch.intermediate_size
    rows = []
    if arch.embedding_size != D:
        rows += _dense_rows(f"{ours}/embeddings_project", arch.embedding_size, D, "electra.embeddings_project",
                            f"{tf1}/embeddings_project")
    for i in range(arch.num_layers):
        o, h, t = f"{ours}/layer_{i}", f"electra.encoder.layer.{i}", f"{tf1}/encoder/layer_{i}"
        for ours_name, shape, theirs, theirs_tf1 in (("qkv_kernel", (D, 3, D), "weight", "kernel"),
                                                     ("qkv_bias", (3, D), "bias", "bias")):
            rows.append(Row(f"{o}/attention/{ours_name}", shape,
                            tuple(f"{h}.attention.self.{part}.{theirs}" for part in ("query", "key", "value")),
                            tuple(f"{t}/attention/self/{part}/{theirs_tf1}" for part in ("query", "key", "value"))))
        rows += _dense_rows(f"{o}/attention/out", D, D, f"{h}.attention.output.dense", f"{t}/attention/output/dense")
        rows += _norm_rows(f"{o}/attention_norm", D, f"{h}.attention.output.LayerNorm",
                           f"{t}/attention/output/LayerNorm")
        rows += _dense_rows(f"{o}/ffn/in", D, F, f"{h}.intermediate.dense", f"{t}/intermediate/dense")
        rows += _dense_rows(f"{o}/ffn/out", F, D, f"{h}.output.dense", f"{t}/output/dense")
        rows += _norm_rows(f"{o}/ffn_norm", D, f"{h}.output.LayerNorm", f"{t}/output/LayerNorm")
    return rows


def _dense_rows(ours: str, inputs: int, outputs: int, huggingface: str, tf1: str) -> list[Row]:
    return [Row(f"{ours}/kernel", (inputs, outputs), (f"{huggingface}.weight",), (f"{tf1}/kernel",)),
            Row(f"{ours}/bias", (outputs,), (f"{huggingface}.bias",), (f"{tf1}/bias",))]


def _norm_rows(ours: str, size: int, huggingface: str, tf1: str) -> list[Row]:
    return [Row(f"{ours}/scale", (size,), (f"{huggingface}.weight",), (f"{tf1}/gamma",)),
            Row(f"{ours}/bias", (size,), (f"{huggingface}.bias",), (f"{tf1}/beta",))]


def from_huggingface(rows: Iterable[Row], tensors: Mapping[str, np.ndarray], where: str) -> dict[str, Any]:
    """Returns our nested parameters, float32. Raises UserError for a missing tensor or another shape."""
    return _gather(rows, tensors, where, lambda row: row.huggingface, torch_layout=True)


def from_tf1(rows: Iterable[Row], tensors: Mapping[str, np.ndarray], where: str, suffix: str = "") -> dict[str, Any]:
    """As `from_huggingface`, from the original's variables; `suffix` "/adam_m" or "/adam_v" takes the moments."""
    return _gather(rows, tensors, where, lambda row: tuple(name + suffix for name in row.tf1), torch_layout=False)


def to_huggingface(rows: Iterable[Row], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns tensors by Hugging Face's names, float32, from our nested parameters (layers unrolled)."""
    out = {}
    for row in rows:
        array = np.asarray(_at(params, row.path), np.float32)
        parts = [array] if len(row.huggingface) == 1 else list(np.moveaxis(array, -2, 0))
        for name, part in zip(row.huggingface, parts, strict=True):
            out[name] = np.ascontiguousarray(part.T if _is_kernel(row) else part)
    return out


def _gather(rows: Iterable[Row], tensors: Mapping[str, np.ndarray], where: str,
            names: Callable[[Row], tuple[str, ...]], torch_layout: bool) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for row in rows:
        # Query, key and value each have the shape without the axis that counts them.
        shape = row.shape if len(names(row)) == 1 else (*row.shape[:-2], row.shape[-1])
        expected = shape[::-1] if torch_layout and _is_kernel(row) else shape
        parts = []
        for name in names(row):
            if name not in tensors:
                raise UserError(f"{where} has no tensor {name}: it is not a whole checkpoint of this network.")
            array = tensors[name]
            if array.shape != expected:
                raise UserError(f"{where}: {name} has shape {array.shape}, the network's sizes ask for {expected}: "
                                "they belong to different networks (generator and discriminator?).")
            parts.append((array.T if torch_layout and _is_kernel(row) else array).astype(np.float32))
        *folders, last = row.path.split("/")
        node = params
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = np.ascontiguousarray(parts[0] if len(parts) == 1 else np.stack(parts, -2))
    return params


def _is_kernel(row: Row) -> bool:
    return row.path.endswith("kernel")


def _at(params: Mapping[str, Any], path: str) -> Any:
    for name in path.split("/"):
        params = params[name]
    return params
