"""What the commands do before their work: huge pages for the allocator."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from electra_jax import cli

REPO = Path(__file__).parent.parent
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ASKED = "glibc.malloc.hugetlb=1"
SPY = """
import os
print("process", os.getpid(), os.environ.get("GLIBC_TUNABLES"), flush=True)
"""


@pytest.fixture
def replaced(monkeypatch) -> list:
    """What the process would have been replaced with, while it acts as `python -m electra_jax.train --a=b c`."""
    calls = []
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "utf8", "-m", "electra_jax.train", "--a=b", "c"])
    monkeypatch.setattr(os, "execve", lambda *call: calls.append(call))
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", type("Spec", (), {"name": "electra_jax.train"}))
    return calls


def kernel(folder: Path, text: str) -> Path:
    (folder / "enabled").write_text(text)
    return folder / "enabled"


def test_starts_anew_with_the_same_arguments_and_environment(replaced, tmp_path, monkeypatch):
    monkeypatch.setenv("KEPT", "yes")
    cli.use_huge_pages(kernel(tmp_path, "always [madvise] never\n"))
    (program, arguments, environment), = replaced
    assert program == sys.executable
    assert arguments == [sys.executable, "-X", "utf8", "-m", "electra_jax.train", "--a=b", "c"]
    assert environment == dict(os.environ) | {"GLIBC_TUNABLES": ASKED} and environment["KEPT"] == "yes"


@pytest.mark.parametrize("text", ["[always] madvise never\n", "always madvise [never]\n"])
def test_leaves_kernels_alone_that_decide_themselves(replaced, tmp_path, text):
    cli.use_huge_pages(kernel(tmp_path, text))
    assert not replaced


@pytest.mark.parametrize("own", ["", "glibc.malloc.arena_max=1", ASKED])
def test_leaves_the_users_setting_alone(replaced, tmp_path, monkeypatch, own):
    monkeypatch.setenv("GLIBC_TUNABLES", own)
    cli.use_huge_pages(kernel(tmp_path, "always [madvise] never\n"))
    assert not replaced and os.environ["GLIBC_TUNABLES"] == own


def test_leaves_other_programs_alone(replaced, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", type("Spec", (), {"name": "pytest.__main__"}))
    cli.use_huge_pages(kernel(tmp_path, "always [madvise] never\n"))
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)    # a script, a notebook
    cli.use_huge_pages(kernel(tmp_path, "always [madvise] never\n"))
    assert not replaced


def test_goes_on_without_where_it_cannot(replaced, tmp_path, monkeypatch):
    cli.use_huge_pages(tmp_path / "no such file")

    def refuse(*call):
        raise PermissionError(13, "not allowed")

    monkeypatch.setattr(os, "execve", refuse)
    cli.use_huge_pages(kernel(tmp_path, "always [madvise] never\n"))
    assert not replaced and "GLIBC_TUNABLES" not in os.environ


@pytest.mark.parametrize("command", [["train", "--config=no.py"], ["finetune", "--config=no.py"],
                                     ["finetune", "predict", "--checkpoint=no", "--input=no"],
                                     ["data.prepare", "--config=no.py"], ["tools.bench", "--config=no.py"]])
def test_commands_begin_anew_once_as_the_same_process(tmp_path, command):
    if not KERNEL.exists() or "[madvise]" not in KERNEL.read_text():
        pytest.skip("this kernel decides about huge pages itself")
    (tmp_path / "sitecustomize.py").write_text(SPY)    # run by every interpreter that starts
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    process = subprocess.Popen([sys.executable, "-m", f"electra_jax.{command[0]}", *command[1:]], text=True, cwd=REPO,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=environment | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPO}"})
    output, errors = process.communicate(timeout=60)
    assert output.splitlines() == [f"process {process.pid} {setting}" for setting in (None, ASKED)]
    assert process.returncode == 2 and errors.startswith("error: ") and errors.count("\n") == 1


def test_a_reader_that_leaves_ends_a_command_without_a_traceback(tmp_path):
    code = ("import sys\nfrom electra_jax import cli\n"
            "def main():\n    while True:\n        print('a line', flush=True)\n"
            "sys.exit(cli.exit_code(main))")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)}) as process:
        assert process.stdout.readline() == "a line\n"
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(60) == 141
