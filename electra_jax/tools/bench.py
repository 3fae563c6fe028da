"""Times the real train step, or the loader, and prints one JSON line.

  python -m electra_jax.tools.bench --config=configs/small.py --config.data.batch_size=16
  python -m electra_jax.tools.bench --config=configs/small.py --against='python peer.py --batch 16' --rounds=5
  python -m electra_jax.tools.bench --what=loader --config=configs/small.py --config.data.path=DIR

Rows are random ids of full length: what a step costs does not depend on the text. `--against` runs another
program in turn with this one, takes `tokens_per_s` from its last line of JSON, and prints the ratio of medians.
"""

import argparse
import json
import resource
import shlex
import statistics
import subprocess
import sys
import time

from electra_jax import cli

# A vocabulary as large as BERT's, for configs that take their size from a tokenizer.
_VOCAB_SIZE = 30_522


def time_step(config, steps: int, warmup: int) -> dict:
    """Compiles and times the train step on random rows; step times in seconds, memory in GiB, one device's."""
    import jax
    import numpy as np

    from electra_jax import metrics, runtime, sharding, step

    runtime.quiet_logging()
    config.model.vocab_size = config.model.vocab_size or _VOCAB_SIZE
    batch_size, seq_len = config.data.batch_size, config.data.seq_len
    mesh = sharding.make_mesh(config.mesh)
    program = step.build(config, mesh, {"pad": 0, "cls": 1, "sep": 2, "mask": 3})
    rng, batches = np.random.default_rng(0), []
    for _ in range(4):
        ids = rng.integers(4, config.model.vocab_size, (batch_size, seq_len), dtype=np.int32)
        ids[:, 0], ids[:, -1] = 1, 2
        batches.append(sharding.global_batch({
            "input_ids": ids, "token_type_ids": np.zeros_like(ids), "piece_ids": np.ones_like(ids),
            "position_ids": np.tile(np.arange(seq_len, dtype=np.int32), (batch_size, 1))}, mesh))
    state = program.init_state()
    start = time.perf_counter()
    train_step = program.train_step.lower(state, batches[0]).compile()
    compile_s = time.perf_counter() - start
    times = []
    for i in range(warmup + steps):
        start = time.perf_counter()
        state, sums = train_step(state, batches[i % 4])
        jax.block_until_ready((state, sums))
        times.append(time.perf_counter() - start)
    times = times[warmup:]
    step_s = statistics.median(times)
    device = mesh.devices.flat[0]
    memory = train_step.memory_analysis()
    stats = device.memory_stats() or {}
    return {
        "what": "step", "device": device.device_kind, "devices": mesh.size, "jax": jax.__version__,
        "batch_size": batch_size, "seq_len": seq_len, "dtype": config.model.dtype,
        "tokens_per_s": round(batch_size * seq_len / step_s), "step_ms": round(step_s * 1e3, 2),
        "step_ms_min": round(min(times) * 1e3, 2), "step_ms_max": round(max(times) * 1e3, 2),
        "compile_s": round(compile_s, 2), "model_gflops_per_step": round(program.flops_per_step / 1e9, 2),
        "model_gflops_per_s": round(program.flops_per_step / step_s / 1e9, 1),
        "mfu": metrics.mfu(program.flops_per_step, step_s, list(mesh.devices.flat)),
        "peak_gib": round(stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
                          / 2**30, 2),
        "program_gib": round((memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30, 2),
        "loss": step.summarize(jax.device_get(sums), config)["loss"]}


def time_loader(config, steps: int, warmup: int) -> dict:
    """Times `batch_at` on the token store in `data.path`, in this thread."""
    from electra_jax import loop
    from electra_jax.data.store import TokenStore
    from electra_jax.data.tokenizer import tokenizer_from_files

    store = TokenStore(config.data.path)
    loader = loop.make_loader(config, store, tokenizer_from_files(store.tokenizer_files()), "train")
    times = []
    for i in range(warmup + steps):
        start = time.perf_counter()
        loader.batch_at(i)
        times.append(time.perf_counter() - start)
    batch_s = statistics.median(times[warmup:])
    return {"what": "loader", "batch_size": config.data.batch_size, "seq_len": config.data.seq_len,
            "sequences_per_s": round(config.data.batch_size / batch_s), "batch_ms": round(batch_s * 1e3, 3),
            "padding": round(loader.padding, 4)}


def compare(command: str, own: list[str], rounds: int) -> dict:
    """Runs this benchmark and another program in turn, each in a process of its own."""
    speeds = {"ours": [], "theirs": []}
    for _ in range(rounds):
        for name, argv in (("ours", [sys.executable, "-m", "electra_jax.tools.bench", *own]),
                           ("theirs", shlex.split(command))):
            output = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
            line = [line for line in output.splitlines() if line.startswith("{")][-1]
            print(line, flush=True)
            speeds[name].append(json.loads(line)["tokens_per_s"])
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return {"what": "ratio", **medians, "ratio": round(medians["ours"] / medians["theirs"], 3),
            "rounds": [round(a / b, 3) for a, b in zip(speeds["ours"], speeds["theirs"], strict=True)]}


def main() -> int:
    """Reads this tool's own flags, leaves the rest to the config's, and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("step", "loader"), default="step")
    parser.add_argument("--steps", type=int, default=10, help="timed repetitions")
    parser.add_argument("--warmup", type=int, default=3, help="repetitions before")
    parser.add_argument("--against", default="", help="another program to run in turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns with --against")
    options, rest = parser.parse_known_args()
    if options.against:
        own = [f"--what={options.what}", f"--steps={options.steps}", f"--warmup={options.warmup}", *rest]
        print(json.dumps(compare(options.against, own, options.rounds)))
        return 0
    measure = time_step if options.what == "step" else time_loader
    return cli.run_main(lambda config, workdir: print(json.dumps(measure(config, options.steps, options.warmup))),
                        argv=[sys.argv[0], *rest])


if __name__ == "__main__":
    sys.exit(main())
