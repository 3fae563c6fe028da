"""Fine-tunes an encoder on tasks, and serves and exports what was tuned.

  python -m electra_jax.finetune --config=configs/finetune/glue.py:sst2 --config.init_from=X [--workdir=DIR]
  python -m electra_jax.finetune predict --checkpoint=RUN --input=FILE [--output=FILE]
  python -m electra_jax.finetune export --checkpoint=RUN --output=DIR

X is a workdir of pretraining, an exported or a Hugging Face folder; RUN is a run's folder, runs/glue-sst2/sst2/seed-0.
"""

import argparse
import os
import sys
from pathlib import Path

from electra_jax import cli
from electra_jax.config import UserError
from electra_jax.tuning import config as config_lib


def main(config, workdir: str) -> int:
    """Runs every task with every seed that `config` asks for in `workdir`; raises UserError for what can be mended."""
    if "://" in workdir:
        raise UserError(f"--workdir={workdir}: runs are written to a file system only: mount the bucket, give its "
                        "folder.")
    workdir = Path(workdir).absolute()
    import electra_jax
    from electra_jax import runtime, tasks
    from electra_jax.tuning import many
    from electra_jax.tuning.run import Diverged, Stopped

    runtime.quiet_logging()
    runtime.check_writable(workdir)
    pretrained = electra_jax.load_discriminator(config.init_from)
    runtime.enable_compilation_cache(config.run.compilation_cache)
    makers = tasks.makers(config, pretrained.tokenizer)
    checksums = tasks.checksums(config)
    print(f"fine-tuning {config.init_from}{' (random parameters)' if config.init_random else ''}: "
          f"{', '.join(makers)}, {config.run.seeds} seed{'s' * (config.run.seeds > 1)} each, in {workdir}", flush=True)
    try:
        many.run_all(config, workdir, pretrained, makers, checksums)
        many.report(config, workdir, tuple(makers))
    except Diverged:    # no other command with these settings would get to the table
        if many.finished(workdir):
            many.report(config, workdir, tuple(makers))
        raise
    except Stopped:
        print("stopped; finished runs are kept, the same command does the others", flush=True)
    return 0


def serve(arguments: list[str]) -> None:
    """The commands `predict` and `export`; raises UserError for arguments that are wrong as well."""
    parser = cli.ArgumentParser("python -m electra_jax.finetune", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    predict = commands.add_parser("predict", help="answers for new text, one JSON object a line")
    predict.add_argument("--checkpoint", required=True, help="folder of a run, with checkpoints/ in it")
    predict.add_argument("--input", required=True, help=".tsv, .csv, .jsonl (or with .gz behind) or plain text, a text "
                                                        "a line; - reads lines or JSON objects from standard input")
    predict.add_argument("--output", default="-", help="file to write; - prints")
    predict.add_argument("--batch_size", type=int, default=64, help="records read ahead and predicted together")
    export = commands.add_parser("export", help="the tuned network as a Hugging Face folder")
    export.add_argument("--checkpoint", required=True, help="folder of a run, with checkpoints/ in it")
    export.add_argument("--output", required=True, help="new folder")
    flags = parser.parse_args(arguments)
    from electra_jax import runtime
    from electra_jax.tuning import serve as serving
    runtime.quiet_logging()
    if flags.command == "predict":
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")    # whatever the terminal's
        try:
            serving.predict_file(flags.checkpoint, flags.input, flags.output, flags.batch_size)
        except BrokenPipeError:    # `| head` has read enough; Python would complain again when it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:
        serving.export(flags.checkpoint, flags.output)


if __name__ == "__main__":
    if sys.argv[1:] in (["--help"], ["-h"]):
        print(__doc__)
        sys.exit()
    if sys.argv[1:2] and sys.argv[1] in ("predict", "export"):
        cli.use_huge_pages()
        sys.exit(cli.exit_code(lambda: serve(sys.argv[1:])))
    sys.exit(cli.run_main(main, config_lib.validate))
