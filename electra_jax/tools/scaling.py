"""What a train step costs on 1 to 256 chips, with none at hand: compiled ahead of time, and by formula.

  python -m electra_jax.tools.scaling --config=configs/base.py --topology=v5e:4x4,v5e:16x16      # needs libtpu
  python -m electra_jax.tools.scaling --config=configs/base.py --topology=h100:1,h100:8    # JAX's plugin for CUDA
  python -m electra_jax.tools.scaling --config=configs/base.py --what=curves --topology=v5e,h100 --rows-per-chip=32
  python -m electra_jax.tools.scaling --config=configs/large.py --what=largest --topology=v5e:4x4,h100:8

Prints a line of JSON for each result, with --markdown a table. All figures are a chip's and a step's. `--label` is a
name that every line carries.

`--what=compile` compiles the train step of `step.build` for each topology and reads from the program: bytes of
arguments, temporaries and donated (aliased) state, the compiler's FLOPs and bytes of memory traffic, and the
collectives, those inside loops times the loop's length; of GPUs also the number of kernels that a step launches.
Without a plugin for CUDA, GPUs get the formula's result.

Formulas. n chips on a mesh of data d, fsdp f, tensor t; B rows a step of L tokens; P parameters, P' a chip's share.
  compute_s    3 x forward matmul FLOPs (model.matmul_flops) x recompute / (n x peak x attainable); remat=full: 4/3
  hbm_s        bytes of memory traffic (hlo.traffic) / bandwidth; by formula _TRAFFIC_STATE P' + tokens x layers x
               (_TRAFFIC_D x width + _TRAFFIC_S x heads x L)
  a collective with S bytes (the whole array, in a group of g chips) on a ring or torus
               S (g - 1) / g / bandwidth; twice that for an all-reduce, which is a reduce-scatter and an all-gather.
               Bandwidth: what leaves a chip over all links of the group's axes, in one direction; an axis that is
               no ring counts one link, a ring two. GPUs: NVLink within eight, then a NIC with 1/8 of the array each.
  by formula   with b bytes a number of the computation, data: all-reduce over d of the gradients, b P' bytes and 4
               more a number of the token table, which both networks look up in float32; fsdp: two all-gathers of
               b P / t bytes and a reduce-scatter of the gradients over f; both once a microbatch; tensor: 4
               all-reduces a layer of 2 x rows x L x D bytes of activations
  step_s       max(compute_s, hbm_s, hidden_s) + exposed_s: collectives that the compiler runs beside other work
               (asynchronously) are hidden; by formula none is, and `best_s` is the maximum of all, all hidden
  memory       arguments + temporaries + outputs not aliased; by formula 12 P' state, 4 P' gradients, under fsdp a
               gathered layer, and activations as in `activation_bytes`
Peak: metrics.py. `attainable` (share of the peak in matrix products) is an assumption, stated in each result.
"""

import argparse
import copy
import dataclasses
import itertools
import json
import math
import os
import re
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")   # no accelerator is used, and none of a shared machine's is taken

import jax
import numpy as np

from electra_jax import cli, model, sharding, step
from electra_jax import config as config_lib
from electra_jax.config import UserError, num_masked
from electra_jax.tools import targets
from electra_jax.tools.hlo import collectives, kernels, traffic
from electra_jax.tools.roofline import (
    CHIPS,
    GIB,
    SLICES,
    Chip,
    collective_s,
    extents,
    levels,
    parse_topology,
    peak,
    reach,
    roofline,
)

# A vocabulary as large as BERT's, for configs that take their size from a tokenizer.
VOCAB_SIZE = 30_522

# Bytes of the formulas below, for the attention of plain XLA in bfloat16 with dropout. Fitted to ten programs of small,
# base, large and two larger models compiled for v5e and v5p. Of fourteen (benchmarks/run.sh paper) they give 0.73 to
# 1.14 of the memory, without remat 0.58 to 1.24 of the traffic; a change of the step moves them. Kept for the backward
# pass: by feed-forward width and L x L probability a token and layer, and by logit. Traffic: by parameter, width, and
# probability.
_KEPT_F, _KEPT_S, _KEPT_V = 4.0, 4.1, 30.0
_TRAFFIC_STATE, _TRAFFIC_D, _TRAFFIC_S = 28.0, 82.0, 60.0
# Share of a chip's memory up to which `largest` trusts the formula.
_USABLE = 0.75

# --- Compilation ------------------------------------------------------------------------------------


def compile_step(config, devices: list, dump: str = "") -> dict:
    """Compiles the train step for a mesh of `devices` and returns what the program says of one chip.

    `dump` is a file for the text of the compiled program.
    """
    config.model.vocab_size = config.model.vocab_size or VOCAB_SIZE
    mesh = sharding.make_mesh(config.mesh, devices)
    program = step.build(config, mesh, {"pad": 0, "cls": 1, "sep": 2, "mask": 3})
    rows = jax.ShapeDtypeStruct((config.data.batch_size, config.data.seq_len), np.int32,
                                sharding=sharding.batch_sharding(mesh))
    batch = dict.fromkeys(("input_ids", "token_type_ids", "piece_ids", "position_ids"), rows)
    lowered = program.train_step.lower(program.abstract_state, batch)
    start = time.perf_counter()
    compiled = lowered.compile(targets.compiler_options(devices))
    compile_s = time.perf_counter() - start
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    costs = compiled.cost_analysis() or {}      # none from the GPU's compiler
    if dump:
        Path(dump).write_text(hlo, encoding="utf-8")
    leaves = jax.tree.leaves(program.abstract_state)
    return {
        "mesh": dict(mesh.shape), "compile_s": round(compile_s, 1),
        "argument_bytes": memory.argument_size_in_bytes, "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "peak_bytes": (memory.argument_size_in_bytes + memory.temp_size_in_bytes
                       + memory.output_size_in_bytes - memory.alias_size_in_bytes),
        "state_bytes": sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves),
        "state_aliased": hlo.splitlines()[0].count("-alias)") == len(leaves),
        "model_flops": program.flops_per_step / mesh.size, "compiler_flops": costs.get("flops"),
        "compiler_traffic": costs.get("bytes accessed"), "hbm_traffic": traffic(hlo), "kernels": kernels(hlo),
        "collectives": collectives(hlo, mesh.size), "devices": list(mesh.devices.flat)}


# --- By formula -----------------------------------------------------------------------------------


def mesh_sizes(mesh, chips: int) -> dict[str, int]:
    """The config's mesh on `chips` chips, as `sharding.make_mesh` would build it; raises UserError."""
    sizes = {axis: mesh[axis] for axis in sharding.AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: chips // fixed if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != chips:
        raise UserError(f"mesh.data={mesh.data}, mesh.fsdp={mesh.fsdp}, mesh.tensor={mesh.tensor} does not make "
                        f"{chips} chips: change one of them, or set mesh.data=-1.")
    return sizes


def parameter_shapes(config) -> dict[str, tuple[int, ...]]:
    """Path and shape of every parameter of both networks, layers stacked (N, ...)."""
    module = model.build(config.model, full_size_mlm=config.objective.name == "mlm")
    # One layer is traced for all: 64 take half a minute.
    one = module.clone(**{name: dataclasses.replace(getattr(module, name), num_layers=1, scan_layers=True)
                          for name in ("disc", "gen")})
    method = "generator_logits" if config.objective.name == "mlm" else "both"
    tree = jax.eval_shape(lambda: model.init_params(one, jax.random.key(0), method))
    shapes = {sharding.path_name(path): x.shape for path, x in jax.tree.leaves_with_path(tree)}
    layers = {"generator": module.gen.num_layers, "discriminator": module.disc.num_layers}
    return {path: (layers[path.partition("/")[0]], *shape[1:]) if "/layers/" in path else shape
            for path, shape in shapes.items()}


def activation_bytes(config, rows: float, tensor: int) -> float:
    """Bytes that the forward pass of `rows` rows keeps for the backward pass, and the vocabulary's logits."""
    c, seq_len = config.model, config.data.seq_len
    total = 0.0
    for a in (model.discriminator_architecture(c), model.generator_architecture(c)):
        token = {"none": _KEPT_F * a.intermediate_size + _KEPT_S * a.num_heads * seq_len,
                 "dots": 12 * a.hidden_size + 2 * a.intermediate_size, "full": 2 * a.hidden_size}
        one_layer = token["none"] if a.remat != "none" else 0      # recomputed, one at a time
        total += seq_len * (a.num_layers * token[a.remat] + one_layer) / tensor
    return rows * (total + _KEPT_V * num_masked(config) * c.vocab_size)


def estimate(config, chip: Chip, shape: tuple[int, ...], attainable: float, shapes: dict | None = None) -> dict:
    """The figures of one chip by formula. `shapes`: the result of `parameter_shapes`, where it is at hand."""
    chips = math.prod(shape)
    sizes = mesh_sizes(config.mesh, chips)
    mesh = types.SimpleNamespace(shape=sizes)
    sharding.check_divides(config, mesh)
    shapes = shapes or parameter_shapes(config)
    params = sum(map(math.prod, shapes.values()))
    own = sum(math.prod(s) / math.prod(sizes[axis] for axis in sharding.spec(path, s, mesh) if axis)
              for path, s in shapes.items())
    rows = config.data.batch_size / (sizes["data"] * sizes["fsdp"])
    tokens = rows * config.data.seq_len
    accumulation = config.optimizer.accumulation_steps
    memory = (16 + 4 * (accumulation > 1)) * own + activation_bytes(config, rows / accumulation, sizes["tensor"])
    if sizes["fsdp"] > 1:    # a layer and its gradient, gathered
        memory += 8 * sum(math.prod(s[1:]) for path, s in shapes.items() if "discriminator/encoder/layers/" in path)
    flops = 3 * config.data.batch_size / chips * model.matmul_flops(
        config.model, config.data.seq_len, num_masked(config), config.objective.name)
    networks = [model.discriminator_architecture(config.model), model.generator_architecture(config.model)]
    traffic = _TRAFFIC_STATE * own + tokens / sizes["tensor"] * sum(
        a.num_layers * (_TRAFFIC_D * a.hidden_size + _TRAFFIC_S * a.num_heads * config.data.seq_len) for a in networks)

    def seconds(kind: str, payload: float, axis: str) -> float:
        return collective_s(kind, payload, levels(chip, shape, extents(shape, sizes[axis])))

    itemsize = np.dtype(config.model.dtype).itemsize
    table = max(math.prod(s) for path, s in shapes.items() if path.endswith("word_embeddings/embedding"))
    sent, gradients = (n / sizes["tensor"] for n in (itemsize * params, itemsize * params + 4 * table))
    exposed_s = seconds("all-reduce", gradients / sizes["fsdp"], "data")
    exposed_s += seconds("reduce-scatter", gradients, "fsdp") + 2 * seconds("all-gather", sent, "fsdp")
    exposed_s *= accumulation    # the compiled loop reduces, and gathers, in each of its turns
    exposed_s += sum(4 * a.num_layers * seconds("all-reduce", 2 * tokens * a.hidden_size, "tensor") for a in networks)
    times = roofline(chip, flops * (4 / 3 if config.model.remat == "full" else 1), traffic, 0.0, exposed_s, attainable)
    times["best_s"] = max(times["compute_s"], times["hbm_s"], exposed_s)
    return {"params": params, "mesh": sizes, "peak_bytes": memory, "model_flops": flops, "hbm_traffic": traffic} | times


def curves(config, name: str, rows_per_chip: int, attainable: float) -> Iterator[dict]:
    """Weak scaling (`rows_per_chip` rows a chip) and strong scaling (the config's batch) on 1 to 256 chips."""
    chip, batch_size, shapes = CHIPS[name], config.data.batch_size, parameter_shapes(config)
    for scaling in ("weak", "strong"):
        for chips, shape in SLICES.get(chip.dimensions, {2**i: (2**i,) for i in range(9)}).items():
            config.data.batch_size = rows_per_chip * chips if scaling == "weak" else batch_size
            if config.data.batch_size % chips == 0:
                result = estimate(config, chip, shape, attainable, shapes)
                yield {"what": scaling} | describe(config, name, shape, chip, result, attainable)


# Depth and width of ELECTRA's published sizes, and on in the same proportions (heads of 64, generator a quarter).
FAMILY = ((12, 256), (12, 768), (24, 1024), (24, 1536), (24, 2048), (36, 2048), (48, 2048), (36, 3072), (48, 4096),
          (64, 5120))


def largest(config, name: str, shape: tuple[int, ...], attainable: float) -> dict:
    """The largest of FAMILY that fits the slice by formula at the config's batch, in its fastest mesh that fits."""
    chip, chips, best = CHIPS[name], math.prod(shape), None
    for layers, width in FAMILY:
        config.model.update(num_layers=layers, hidden_size=width, num_heads=width // 64, intermediate_size=4 * width,
                            embedding_size=128 if width == 256 else width, generator_size=0.25, scan_layers=True)
        shapes, found = parameter_shapes(config), []
        for fsdp, remat, log_steps in itertools.product(
                {1, min(chips, 8), chips}, ("none", "dots", "full"), range(12)):
            steps = 2**log_steps
            if config.data.batch_size % (chips * steps) or width // 4 % fsdp:
                continue
            config.mesh.update(data=chips // fsdp, fsdp=fsdp, tensor=1)
            config.model.remat, config.optimizer.accumulation_steps = remat, steps
            result = estimate(config, chip, shape, attainable, shapes)
            if result["peak_bytes"] < _USABLE * chip.hbm_bytes:
                found.append((result["step_s"], steps, remat, fsdp, result))
        if not found:
            break
        *_, steps, remat, fsdp, result = min(found, key=lambda item: item[:2])
        best = {"what": "largest", "remat": remat, "accumulation": steps} | describe(config, name, shape, chip, result,
                                                                                     attainable)
    if best is None:
        raise UserError(f"data.batch_size={config.data.batch_size} fits no model on {name}: give a multiple of "
                        f"{chips}.")
    return best


# --- Results ----------------------------------------------------------------------------------------


def describe(config, name: str, shape: tuple[int, ...], chip: Chip, result: dict, attainable: float) -> dict:
    """A result as it is printed: GiB, milliseconds, tokens a second, and the utilisation that follows."""
    chips = math.prod(shape)
    out = {"topology": f"{name}:{'x'.join(map(str, shape))}", "chips": chips,
           "mesh": {axis: size for axis, size in result["mesh"].items() if size > 1},
           "layers": config.model.num_layers, "hidden_size": config.model.hidden_size,
           "batch_size": config.data.batch_size, "rows_per_chip": config.data.batch_size / chips,
           "seq_len": config.data.seq_len, "attainable": attainable}
    out |= {"params": result["params"]} if "params" in result else {}
    out |= {key.replace("_bytes", "_gib"): round(value / GIB, 3) for key, value in result.items()
            if key.endswith("_bytes")}
    out |= {"hbm_gib": chip.hbm_bytes / GIB}
    out |= {key.removesuffix("_s") + "_ms": round(1e3 * result[key], 3) for key in
            ("compute_s", "hbm_s", "hidden_s", "exposed_s", "step_s", "best_s") if key in result}
    out |= {"tokens_per_s_chip": round(config.data.batch_size * config.data.seq_len / chips / result["step_s"]),
            "mfu": round(result["model_flops"] / result["step_s"] / peak(chip), 4)}
    return out


def compile_report(config, topology: str, attainable: float, dump: str = "") -> dict:
    """Compiles for one topology and returns the printed result; what does not fit is a result with `fits` False.

    For GPUs, where no plugin for CUDA is installed, the formula's result.
    """
    name, shape = parse_topology(topology)
    chip, devices = CHIPS[name], targets.devices(topology)
    if devices is None:
        return {"what": "formula"} | describe(config, name, shape, chip, estimate(config, chip, shape, attainable),
                                              attainable)
    try:
        result = compile_step(config, devices, dump and f"{dump}/{topology.replace(':', '_')}.hlo")
    except RuntimeError as error:    # JAX's own are of a subclass
        if "cuDNN not found" in str(error):
            raise UserError(f"model.attention={config.model.attention}: compiling for {topology} needs cuDNN, which is "
                            "not installed: pip install nvidia-cudnn-cu12, or -cu13 for that plugin.") from error
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"[^.:]*\([\d.]+\w\) exceeds available HBM \([\d.]+\w\)", str(error))
        return {"what": "compile", "topology": topology, "layers": config.model.num_layers,
                "hidden_size": config.model.hidden_size, "batch_size": config.data.batch_size, "fits": False,
                "reason": used[0].strip() if used else str(error).splitlines()[0][:300]}
    found, devices = result.pop("collectives"), result.pop("devices")
    times, kinds = {True: 0.0, False: 0.0}, {}
    for c in found:
        extents = reach(chip, [devices[i] for i in c.group])
        seconds = c.times * collective_s(c.kind, c.payload, levels(chip, shape, extents))
        times[c.hidden] += seconds
        entry = kinds.setdefault(c.kind, {"count": 0, "mib": 0.0, "hidden_mib": 0.0, "ms": 0.0})
        entry["count"] += c.times
        entry["mib"] += c.times * c.payload / 2**20
        entry["hidden_mib"] += c.times * c.payload / 2**20 * c.hidden
        entry["ms"] += 1e3 * seconds
    flops = result["model_flops"] * (4 / 3 if config.model.remat == "full" else 1)
    result |= roofline(chip, flops, result["hbm_traffic"], times[True], times[False], attainable)
    top = sorted(found, key=lambda c: -c.times * c.payload)[:4]
    # A program may compile whose arguments and temporaries do not fit together.
    fits = result["peak_bytes"] <= chip.hbm_bytes
    return {"what": "compile", "fits": fits} | describe(config, name, shape, chip, result, attainable) | {
        **({} if chip.dimensions else {"kernels": result["kernels"]}),
        "attention": config.model.attention, "attention_dropout": config.model.attention_dropout,
        "scan_unroll": config.model.scan_unroll if config.model.scan_layers else None,     # None: no loop over layers
        "remat": config.model.remat, "accumulation": config.optimizer.accumulation_steps,
        "state_aliased": result["state_aliased"], "compile_s": result["compile_s"],
        "model_gflops": round(result["model_flops"] / 1e9, 1),
        **({"compiler_gflops": round((result["compiler_flops"] or 0) / 1e9, 1),     # a loop's body counted once
            "compiler_traffic_gib": round((result["compiler_traffic"] or 0) / GIB, 2)} if chip.dimensions else {}),
        "hbm_traffic_gib": round(result["hbm_traffic"] / GIB, 2),
        "collectives": {kind: {key: round(value, 3) for key, value in entry.items()} for kind, entry in kinds.items()},
        "largest_collectives": [f"{c.times} x {c.kind} {c.dtype} {c.payload / 2**20:.2f} MiB: {c.source[-80:]}"
                                for c in top], "jax": jax.__version__}


_COLUMNS = {
    "compile": ("what", "topology", "mesh", "rows_per_chip", "peak_gib", "hbm_gib", "state_aliased", "collectives",
                "kernels", "compute_ms", "hbm_ms", "hidden_ms", "exposed_ms", "step_ms", "tokens_per_s_chip", "mfu",
                "compile_s"),
    "curves": ("what", "topology", "mesh", "rows_per_chip", "peak_gib", "hbm_gib", "compute_ms", "hbm_ms", "exposed_ms",
               "step_ms", "best_ms", "tokens_per_s_chip", "mfu"),
    "largest": ("topology", "layers", "hidden_size", "params", "mesh", "remat", "accumulation", "peak_gib", "hbm_gib",
                "step_ms", "mfu"),
}


def show(results: Iterator[dict], what: str, markdown: bool, label: str = "") -> None:
    """Prints each result as it comes: a line of JSON under `label`, or a row of a Markdown table."""
    if markdown:
        print("| " + " | ".join(_COLUMNS[what]) + " |\n|" + "---|" * len(_COLUMNS[what]), flush=True)
    named = {"label": label} if label else {}
    for result in results:
        cells = [_cell(result.get(column, "")) for column in _COLUMNS[what]]
        print("| " + " | ".join(cells) + " |" if markdown else json.dumps(named | result), flush=True)


def _cell(value: Any) -> str:
    if isinstance(value, dict):     # a mesh, or collectives
        return ", ".join(f"{k} {v['count']} x, {v['mib']:.0f} MiB" if isinstance(v, dict) else f"{k} {v}"
                         for k, v in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def run(config, options) -> Iterator[dict]:
    """Yields the results that the command line asks for."""
    config.model.vocab_size = config.model.vocab_size or VOCAB_SIZE
    for topology in options.topology.split(","):
        if options.what == "curves":
            if topology.partition(":")[0] not in CHIPS:
                parse_topology(topology)
            yield from curves(copy.deepcopy(config), topology.partition(":")[0],
                              options.rows_per_chip or 32, options.attainable)
            continue
        (name, shape), c = parse_topology(topology), copy.deepcopy(config)
        if options.rows_per_chip:
            c.data.batch_size = options.rows_per_chip * math.prod(shape)
        if options.what == "largest":
            yield largest(c, name, shape, options.attainable)
        else:
            yield compile_report(c, topology, options.attainable, options.dump)


def main() -> int:
    """Reads this tool's own flags, leaves the rest to the config's, and prints the results."""
    parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=tuple(_COLUMNS), default="compile")
    parser.add_argument("--topology", required=True,
                        help="slices, such as v5e:4x4,v5p:2x2x4,h100:8 (curves: chips, v5e,h100)")
    parser.add_argument("--rows-per-chip", type=int, default=0, help="sets data.batch_size by the number of chips")
    parser.add_argument("--attainable", type=float, default=0.5, help="share of the peak that matrix products reach")
    parser.add_argument("--dump", default="", help="folder for the text of the compiled programs")
    parser.add_argument("--markdown", action="store_true", help="print a table instead of JSON")
    parser.add_argument("--label", default="", help="a name for the results")
    own = []    # the options, and what is left

    def read() -> None:
        own.extend(parser.parse_known_args())

    return cli.exit_code(read) or cli.run_main(
        lambda config, workdir: show(run(config, own[0]), own[0].what, own[0].markdown, own[0].label),
        config_lib.validate, argv=[sys.argv[0], *own[1]])


if __name__ == "__main__":
    sys.exit(main())
