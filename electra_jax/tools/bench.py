"""Times the real train step, the loader, or fine-tuning with evaluation, and prints a JSON line for each.

  python -m electra_jax.tools.bench --config=configs/small.py --config.data.batch_size=16
  python -m electra_jax.tools.bench --config=configs/small.py --against='python peer.py --batch 16' --rounds=5
  python -m electra_jax.tools.bench --what=loader --config=configs/small.py --config.data.path=DIR
  python -m electra_jax.tools.bench --what=finetune --steps=200 --config=configs/finetune/glue.py:sst2 \
      --config.init_from=X --config.task.data_dir=D

Rows of a step are random ids of full length: what it costs does not depend on the text. `--against` runs another
program in turn with this one, takes `examples_per_s`, else `tokens_per_s`, from its last lines of JSON (as many as are
printed here), and prints the ratio of medians.
"""

import argparse
import contextlib
import json
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from electra_jax import cli
from electra_jax import config as config_lib
from electra_jax.tuning import config as tuning_config

# A vocabulary as large as BERT's, for configs that take their size from a tokenizer.
_VOCAB_SIZE = 30_522


def time_step(config, steps: int, warmup: int) -> Iterator[dict]:
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
    yield {
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


def time_loader(config, steps: int, warmup: int) -> Iterator[dict]:
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
    yield {"what": "loader", "batch_size": config.data.batch_size, "seq_len": config.data.seq_len,
           "sequences_per_s": round(config.data.batch_size / batch_s), "batch_ms": round(batch_s * 1e3, 3),
           "padding": round(loader.padding, 4)}


def time_finetune(config, steps: int, warmup: int) -> Iterator[dict]:
    """Times training and then evaluation on dev of the config's first task; tokens without padding.

    Every shape of the timed batches is compiled before, and `compile_s` is what that and one step of each took.
    """
    import jax

    import electra_jax
    from electra_jax import runtime, sharding, tasks
    from electra_jax.data.loader import Prefetcher
    from electra_jax.tuning import run
    from electra_jax.tuning.batches import Batches

    runtime.quiet_logging()
    pretrained, data = electra_jax.load_discriminator(config.init_from), config.data
    name, make_task = next(iter(tasks.makers(config, pretrained.tokenizer).items()))
    task = make_task()
    program = run.make_program(pretrained, task, config, sharding.make_mesh(config.mesh))
    batches = Batches(task.features("train"), data, config.run.seed, task.tokenizer.pad_id)
    state, key = program.state(pretrained.params, config.run.seed), jax.random.key(config.run.seed)
    about = {"task": name, "devices": program.mesh.size, "jax": jax.__version__, "dtype": config.model.dtype}

    ahead = [batches.batch_at(i) for i in range(warmup, warmup + steps)]
    start = time.perf_counter()
    for batch in {batch["input_ids"].shape: batch for batch in ahead}.values():
        state, sums = program.train(state, batch, 1e-4, key)
        sums["loss"].block_until_ready()
    compile_s = time.perf_counter() - start
    with contextlib.closing(Prefetcher(batches, 0, 4)) as prefetcher:
        losses = []
        for i in range(warmup + steps):    # as in tuning.run
            if i == warmup:
                jax.block_until_ready(state)
                start = time.perf_counter()
            state, sums = program.train(state, prefetcher.next(), 1e-4, jax.random.fold_in(key, i))
            losses.append(sums["loss"])
            losses[max(0, i - 2)].block_until_ready()
        jax.block_until_ready(state)
        train_s = time.perf_counter() - start
    tokens, room = (sum(batch["attention_mask"].sum() for batch in ahead),
                    sum(batch["attention_mask"].size for batch in ahead))
    yield {"what": "finetune", **about, "batch_size": data.batch_size, "steps": steps,
           "examples_per_s": round(data.batch_size * steps / train_s, 2), "tokens_per_s": round(tokens / train_s),
           "step_ms": round(1e3 * train_s / steps, 2), "padding": round(1 - tokens / room, 4),
           "compile_s": round(compile_s, 2), "shapes": program.compilations()[0], "loss": round(float(losses[-1]), 4)}

    features, seconds = task.features("dev"), []
    for _ in range(2):    # once to compile
        start = time.perf_counter()
        scores = task.score("dev", run.predict(program, state["params"], features, data, task.tokenizer.pad_id))
        seconds.append(time.perf_counter() - start)
    yield {"what": "evaluate", **about, "batch_size": data.eval_batch_size, "examples": len(features),
           "examples_per_s": round(len(features) / seconds[1], 2),
           "tokens_per_s": round(sum(len(f.input_ids) for f in features) / seconds[1]),
           "seconds": round(seconds[1], 3), "compile_s": round(seconds[0] - seconds[1], 2),
           "shapes": program.compilations()[1], task.metric: scores[task.metric]}


def compare(command: str, own: list[str], rounds: int) -> Iterator[dict]:
    """Runs this benchmark and another program in turn, each in a process of its own."""
    results = {"ours": [], "theirs": []}
    for _ in range(rounds):
        for name, argv in (("ours", [sys.executable, "-m", "electra_jax.tools.bench", *own]),
                           ("theirs", shlex.split(command))):
            output = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
            lines = [line for line in output.splitlines() if line.startswith('{"')]
            lines = lines[-len(results["ours"][0]) if results["ours"] else 0:]
            print(*lines, sep="\n", flush=True)
            results[name].append([json.loads(line) for line in lines])
    for i, first in enumerate(results["ours"][0]):
        unit = "examples_per_s" if "examples_per_s" in first else "tokens_per_s"
        ours, theirs = ([lines[i][unit] for lines in results[name]] for name in ("ours", "theirs"))
        medians = {"ours": statistics.median(ours), "theirs": statistics.median(theirs)}
        yield {"what": "ratio", "of": first["what"], **medians, "unit": unit,
               "ratio": round(medians["ours"] / medians["theirs"], 3),
               "rounds": [round(a / b, 3) for a, b in zip(ours, theirs, strict=True)]}


def main() -> int:
    """Reads this tool's own flags, leaves the rest to the config's, and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("step", "loader", "finetune"), default="step")
    parser.add_argument("--steps", type=int, default=0, help="timed repetitions; 0: 10, of fine-tuning 200")
    parser.add_argument("--warmup", type=int, default=3, help="repetitions before")
    parser.add_argument("--against", default="", help="another program to run in turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns with --against")
    options, rest = parser.parse_known_args()
    steps = options.steps or (200 if options.what == "finetune" else 10)
    if options.against:
        own = [f"--what={options.what}", f"--steps={steps}", f"--warmup={options.warmup}", *rest]
        show(compare(options.against, own, options.rounds))
        return 0
    measure = {"step": time_step, "loader": time_loader, "finetune": time_finetune}[options.what]
    validate = tuning_config.validate if options.what == "finetune" else config_lib.validate
    return cli.run_main(lambda config, workdir: show(measure(config, steps, options.warmup)), validate,
                        argv=[sys.argv[0], *rest])


def show(results: Iterator[dict]) -> None:
    """Prints each result as it comes, a line of JSON."""
    for result in results:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    sys.exit(main())
