"""The house rules on imports: downwards only, and heavy frameworks nowhere."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "electra_jax"

# What each module may import of the package, besides `config`.
ALLOWED = {
    "config": set(), "objectives": set(), "optimizer": {"sharding"}, "runtime": set(), "metrics": set(), "show": set(),
    "layers": set(), "attention": {"flash", "layers", "sharding"}, "flash": {"layers"},
    "model": {"attention", "layers", "sharding"}, "chunks": set(),
    "cli": set(), "checkpoint": {"runtime"}, "sharding": set(),
    "step": {"attention", "chunks", "metrics", "model", "objectives", "optimizer", "sharding"},
    "loop": {"attention", "checkpoint", "metrics", "model", "optimizer", "runtime", "sharding", "show", "step",
             "data.loader"},
    "pretrained": {"checkpoint", "model", "data.tokenizer", "interop.huggingface"}, "__init__": {"pretrained"},
    "interop.names": {"model"}, "interop.torch_bin": set(), "interop.bundle": set(),
    "interop.weights": {"interop.torch_bin", "interop.workdir"}, "interop.tokenizers": {"data.tokenizer"},
    "interop.workdir": {"checkpoint", "cli", "model", "optimizer", "runtime", "data.tokenizer"},
    "interop.huggingface": {"checkpoint", "cli", "model", "data.tokenizer", "interop.names", "interop.tokenizers",
                            "interop.weights", "interop.workdir"},
    "interop.tf1": {"cli", "model", "data.tokenizer", "interop.bundle", "interop.names", "interop.workdir"},
    "finetune": {"cli", "runtime", "tasks.__init__", "tuning.many", "tuning.run", "tuning.serve", "tuning.config"},
    "tuning.config": set(), "tuning.heads": {"model"}, "tuning.batches": {"tasks.base"},
    "tuning.step": {"model", "sharding", "optimizer", "tuning.heads"},
    "tuning.run": {"checkpoint", "metrics", "runtime", "pretrained", "data.loader", "tasks.base", "tuning.batches",
                   "tuning.config", "tuning.heads", "tuning.step"},
    "tuning.many": {"runtime", "sharding", "pretrained", "tasks.base", "interop.workdir", "tuning.run"},
    "tuning.serve": {"checkpoint", "model", "sharding", "pretrained", "data.tokenizer", "tasks.tables",
                     "interop.huggingface", "interop.names", "interop.workdir", "tasks.base", "tuning.config",
                     "tuning.run", "tuning.step"},
    "train": {"cli", "loop", "runtime", "data.prepare", "data.tokenizer"},
    "tools.bench": {"cli", "tuning.config"}, "tools.measure.report": set(), "tools.measure.flops": {"model"},
    "tools.measure.training": {"metrics", "runtime", "sharding", "step", "tools.measure.flops", "tools.measure.report"},
    "tools.measure.parts": {"model", "objectives", "runtime", "sharding", "step", "tools.measure.report"},
    "tools.measure.data": {"loop", "data.prepare", "data.sources", "data.store", "data.tokenizer", "data.workers",
                           "tools.measure.report"},
    "tools.measure.saving": {"checkpoint", "runtime", "sharding", "step", "tools.measure.report"},
    "tools.measure.startup": {"cli", "tools.measure.report"},
    "tools.hlo": set(), "tools.roofline": {"metrics"},
    "tools.targets": {"tools.roofline"},
    "tools.scaling": {"cli", "model", "sharding", "step", "tools.hlo", "tools.roofline", "tools.targets"},
    "tools.measure.finetuning": {"metrics", "model", "runtime", "sharding", "data.loader", "tuning.batches",
                                 "tuning.run", "tools.measure.report"},
}
FORBIDDEN = {"torch", "tensorflow", "transformers", "clu", "tf_keras", "tensorboardX"}


def imports(file: Path) -> set[str]:
    """Full names of all modules that the file imports anywhere, submodules taken with `from` included."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def modules() -> dict[str, Path]:
    return {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_run_downwards_only(name):
    files = modules()
    ours = {i.removeprefix("electra_jax.") for i in imports(files[name]) if i.startswith("electra_jax.")}
    ours = {m for m in ours if m in files} - {"config"}
    if name.startswith("data."):
        assert all(m.startswith("data.") or m == "cli" for m in ours), ours
    elif name.startswith("tasks."):
        assert all(m.startswith("tasks.") or m == "data.tokenizer" for m in ours), ours
    elif not name.endswith("__init__") or name == "__init__":
        assert ours <= ALLOWED[name], f"{name} imports {ours - ALLOWED[name]}"


@pytest.mark.parametrize("name", sorted(modules()))
def test_no_module_imports_another_framework(name):
    assert not {i.split(".")[0] for i in imports(modules()[name])} & FORBIDDEN


def test_configs_import_only_the_defaults():
    for file in (PACKAGE.parent / "configs").rglob("*.py"):
        section = "electra_jax.tuning" if file.parent.name == "finetune" else "electra_jax"
        found = {i for i in imports(file) if i.startswith("electra_jax.")} - {section}
        assert found <= {f"{section}.config"}, file


def test_data_runs_without_jax():
    code = "import electra_jax.data.prepare, electra_jax.data.loader, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0
