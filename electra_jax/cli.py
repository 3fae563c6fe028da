"""Flags `--config` and `--workdir`, and errors of the user in one line: shared by train, finetune and prepare."""

import argparse
import difflib
import itertools
import os
import re
import sys
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from electra_jax import config as config_lib
from electra_jax.config import UserError

_USAGE = "usage: python -m {} --config=FILE[:VARIANT] [--workdir=DIR] [--config.SECTION.FIELD=VALUE ...]"
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}    # since glibc 2.35, others pass over it


def run_main(main, validate=config_lib.validate, argv: list[str] | None = None) -> int:
    """Calls `main(config, workdir)` with what the command line says and returns the exit code: 0, 2 or main's own.

    A UserError becomes one line on standard error and code 2, Ctrl-C code 130; any other exception is a defect of
    ours and keeps its traceback. `validate(config)` runs first; None leaves it out.
    """
    argv = sys.argv if argv is None else argv
    if {"--help", "-h", "-help"} & set(argv[1:]):
        print(_USAGE.format(_module_name()))
        return 0
    use_huge_pages()

    def start() -> int | None:
        config, workdir = parse(argv, (validate or config_lib.validate).__module__)
        if validate is not None:
            validate(config)
        return main(config, workdir)

    return exit_code(start)


def exit_code(main) -> int:
    """Calls `main()` and returns the exit code: 0 or its own, 2 for a UserError (one line), 130 for Ctrl-C."""
    try:
        return main() or 0
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:    # `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())    # or Python complains as it ends
        return 141


def use_huge_pages(setting: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled")) -> None:
    """Starts our command anew with huge pages for large allocations, where the kernel leaves those to programs.

    XLA's CPU backend allocates a step's temporaries in every step. In pages of 4 KiB handing them out took the kernel a
    third of a small model's CPU time. glibc reads its setting only when a process begins; one that the user made,
    GLIBC_TUNABLES= included, is left alone, and so are kernels that always or never give huge pages.
    """
    ours = _module_name(default="").startswith("electra_jax.")    # not somebody's program that calls us
    try:
        if ours and "GLIBC_TUNABLES" not in os.environ and "[madvise]" in setting.read_text():
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | HUGE_PAGES)
    except OSError:
        pass    # no Linux, or nobody may start programs here: slower, but no reason to fail


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, but a mistake raises UserError, one line, instead of printing the usage."""

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help).")


def parse(argv: list[str], fields_in: str = "electra_jax.config") -> tuple[ml_collections.ConfigDict, str]:
    """Returns (config, workdir) of a command line; workdir is "runs/NAME-VARIANT" when not given.

    `fields_in` is the module that lists the fields, for messages.

    Raises UserError for a missing or broken config file, an unknown field and a value of the wrong type.
    """
    at = [i for i, (before, arg) in enumerate(itertools.pairwise(argv), 1)
          if re.match(r"--?config(=|$)", arg) or before in ("--config", "-config")]
    own, rest = [argv[i] for i in at], [arg for i, arg in enumerate(argv) if i not in at]
    if not own:
        raise UserError("--config is missing. " + _USAGE.format(_module_name()))
    config = _parse(rest[:1] + own, " ".join(own)).config    # alone first: errors below are then about overrides
    for arg in rest[1:]:
        if match := re.match(r"--?(?:no)?config\.([^=]*)", arg):
            _check_field(config, match.group(1), f"{fields_in.replace('.', '/')}.py")
    # Overrides may stand before --config, which config_flags wants first.
    values = _parse(rest[:1] + own + rest[1:], " ".join(own))
    flags.FLAGS.mark_as_parsed()    # libraries (grain, tfds) read absl's global flags
    return values.config, values.workdir or _default_workdir(own[-1])


def _default_workdir(config_arg: str) -> str:
    file, _, variant = config_arg.split("=", 1)[-1].partition(":")
    return "/".join(("runs", "-".join(filter(None, [Path(file).stem, *variant.split(",")]))))


def _parse(argv: list[str], config_arg: str) -> flags.FlagValues:
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "the experiment", flag_values=values, lock_config=True)
    flags.DEFINE_string("workdir", "", "folder of checkpoints, metrics and, by default, the token store",
                        flag_values=values)
    saved = sys.argv
    try:
        sys.argv = argv    # config_flags looks for overrides there, not in what it is given
        stray = values(argv)[1:]
        if type(values.config).__name__ == "_ErrorConfig":    # a missing file: config_flags puts the error off
            raise UserError(f"{config_arg}: no such file, give the path of a config, e.g. configs/small.py.")
        if not isinstance(values.config, ml_collections.ConfigDict):
            raise UserError(f"{config_arg}: its get_config() does not return a ConfigDict.")
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"--{error.flagname} is not a flag. " + _USAGE.format(_module_name())) from error
    except flags.IllegalFlagValueError as error:
        raise UserError(_explain(str(error))) from error
    except flags.Error as error:
        raise UserError(f"{error}.") from error
    except (UserError, KeyboardInterrupt):
        raise
    except FileNotFoundError as error:
        raise UserError(f"{config_arg}: file {error.filename} does not exist.") from error
    except Exception as error:
        raise UserError(f"{config_arg} cannot be loaded ({type(error).__name__}: {error}): repair the file, or the "
                        "name of the variant after the colon.") from error
    finally:
        sys.argv = saved
    if stray:
        raise UserError(f"argument {stray[0]!r} was not understood: flags begin with --, values follow =.")
    return values


def _check_field(config: ml_collections.ConfigDict, field: str, file: str) -> None:
    """Raises UserError that names the nearest field when `field` does not exist."""
    known = list(_fields(config))
    if field not in known:
        near = difflib.get_close_matches(field, known, n=1, cutoff=0.5)
        hint = f"did you mean config.{near[0]}?" if near else f"the fields are listed in {file}."
        raise UserError(f"config.{field} is not a field: {hint}")


def _fields(config: ml_collections.ConfigDict, prefix: str = ""):
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _explain(message: str) -> str:
    """Rewrites absl's "flag --config.data.seq_len=1e3: invalid literal for int() ..."."""
    match = re.match(r"flag --([^=]+)=(.*?): (.*)", message, re.DOTALL)
    if not match:
        return message
    field, value, reason = match.groups()
    if "int()" in reason:
        remedy = "a whole number in digits, such as 1000 (1e3 is not accepted)"
    elif "boolean" in reason:
        remedy = "True or False"
    elif "float" in reason:
        remedy = "a number"
    else:
        return f"{field}={value}: {reason}"
    return f"{field}={value} has the wrong type: give {remedy}."


def _module_name(default: str = "electra_jax.train") -> str:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec.name if spec and spec.name != "__main__" else default
