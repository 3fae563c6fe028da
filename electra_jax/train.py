"""Pretrains ELECTRA: `python -m electra_jax.train --config=configs/quickstart.py [--workdir=DIR]`.

Prepares the data if it is not there, resumes if the workdir holds a checkpoint, exits 0 when done or when
stopped by Ctrl-C or SIGTERM (after saving). The run itself is in loop.py. JAX is imported inside `main`, so
that a mistyped flag is answered at once.
"""

import sys
from pathlib import Path

from electra_jax import cli
from electra_jax.config import UserError


def main(config, workdir: str) -> None:
    """Runs the experiment that `config` describes in `workdir`; raises UserError for what the user can mend."""
    if "://" in workdir:
        raise UserError(f"--workdir={workdir}: a run writes to a file system only: mount the bucket, give its "
                        "folder.")
    workdir = Path(workdir).absolute()
    from electra_jax import loop, runtime
    from electra_jax.data.prepare import prepare
    from electra_jax.data.tokenizer import tokenizer_from_files

    runtime.quiet_logging()
    runtime.check_writable(workdir)
    runtime.initialize_distributed()
    loop.check_mesh(config)                 # before minutes of tokenising, not after
    store = prepare(config, config.data.path or workdir / "tokens")
    tokenizer = tokenizer_from_files(store.tokenizer_files())
    resolve_vocabulary(config, tokenizer)
    runtime.enable_compilation_cache(config.run.compilation_cache)
    run = loop.Run(config, workdir, store, tokenizer)
    runtime.write_json_atomic(workdir / "config.json", config.to_dict())    # not of a run that was refused
    run.go()


def resolve_vocabulary(config, tokenizer) -> None:
    """Sets `model.vocab_size` when it is 0; raises UserError when it is smaller than the tokenizer's."""
    size = config.model.vocab_size
    if not size:
        config.model.vocab_size = tokenizer.vocab_size
    elif size < tokenizer.vocab_size:
        raise UserError(f"model.vocab_size={size} is smaller than the tokenizer's {tokenizer.vocab_size}: "
                        "set it to 0 to take the tokenizer's.")


if __name__ == "__main__":
    sys.exit(cli.run_main(main))
