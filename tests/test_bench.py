"""The benchmark tool: what it prints for each --what, the FLOPs it counts, its comparisons, how little it needs."""

import json
import random
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import tuned

from electra_jax import config as config_lib
from electra_jax.tools import bench
from electra_jax.tools.measure import flops

REPO = Path(__file__).parent.parent
CONFIG = """
from electra_jax import config as defaults
def get_config(variant=""):
    c = defaults.get_config()
    c.model.update({"vocab_size": 67, "embedding_size": 8, "hidden_size": 16, "num_layers": 1, "num_heads": 4,
                    "intermediate_size": 32, "generator_size": 0.5})
    c.data.update({"source": "text:CORPUS", "vocab_size": 64, "seq_len": 24, "batch_size": 8, "eval_fraction": 0.1})
    c.optimizer.update({"steps": 10, "warmup_steps": 2})
    return defaults.apply_variants(c, variant)
"""
# Ours counted by hand, matrix products of one sequence of 24 tokens, a multiply-add is 2:
# discriminator 24 * (8x16 projection + a layer of 4 16x16, 2 16x32, 2 24x16), its head 24 * (16x16 + 16);
# generator 24 * (a layer of 4 8x8, 2 8x16, 2 24x8), its head at floor(0.155 * 24) = 3 positions, 8x8 + 8x67.
FORWARD = 2 * (24 * (128 + 1024 + 1024 + 768) + 24 * 272 + 24 * (256 + 256 + 384) + 3 * (64 + 536))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with tiny.py, a config whose corpus has 60 documents, and vocab.txt."""
    folder, rng = tmp_path_factory.mktemp("bench"), random.Random(0)
    documents = ["\n".join(" ".join("".join(rng.choices(tuned.LETTERS, k=rng.randint(1, 4))) for _ in range(12))
                           for _ in range(rng.randint(1, 6))) for _ in range(60)]
    (folder / "corpus.txt").write_text("\n\n".join(documents))
    (folder / "vocab.txt").write_text("\n".join(tuned.PIECES))
    (folder / "tiny.py").write_text(CONFIG.replace("CORPUS", str(folder / "corpus.txt")))
    return folder


@pytest.fixture(autouse=True)
def environment(monkeypatch, quick_compile):
    """For the processes that the tool starts."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if jax.__version_info__ < (0, 11):    # as in conftest
        monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
    monkeypatch.setenv("PYTHONPATH", str(REPO))


def run(folder, capsys, *flags, code=0):
    """The results that the tool prints in this process, or for another exit code what it says on standard error."""
    assert bench.main([f"--config={folder / 'tiny.py'}", f"--workdir={folder / 'runs'}", *flags]) == code
    out = capsys.readouterr()
    if code:
        assert out.err.startswith("error: ") and out.err.count("\n") == 1, out.err
        return out.err
    return [json.loads(line) for line in out.out.splitlines() if line.startswith("{")]


def check(result, *fields):
    """Every result names what made it; its figures are positive."""
    assert result["versions"]["electra_jax"] and result["versions"]["python"] == sys.version.split()[0]
    assert result["machine"] and result["cores"] >= 1
    for field in fields:
        assert result[field] > 0, (field, result)
        if f"{field}_min" in result:
            assert result[f"{field}_min"] <= result[field] <= result[f"{field}_max"]


def test_the_step_reports_rates_flops_memory_and_what_it_is_compared_with(folder, capsys, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    r, = run(folder, capsys, "--steps=3", "--warmup=1", "--label=a name")
    assert r["flags"]["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=0" and "LIBTPU_INIT_ARGS" not in r["flags"]
    check(r, "step_ms", "tokens_per_s", "examples_per_s", "mfu", "peak_gib", "program_gib", "compile_s", "loss")
    assert (r["label"], r["what"], r["batch_size"], r["seq_len"], r["dtype"]) == ("a name", "step", 8, 24, "float32")
    assert r["device"] == "cpu" and r["devices"] == 4 and r["versions"]["jax"] == jax.__version__
    assert r["model_gflops_per_step"] * 1e9 == pytest.approx(3 * 8 * FORWARD)
    assert r["paper_gflops_per_step"] > 0
    step_s = r["step_ms"] / 1e3
    assert r["tokens_per_s"] == pytest.approx(8 * 24 / step_s, rel=1e-2)
    assert r["mfu"] == pytest.approx(3 * 8 * FORWARD / step_s / r["peak_gflops_per_s"] / 1e9, rel=1e-2)
    assert r["peak_is"] == "float32, measured"


@pytest.mark.parametrize(("file", "fields", "total"), [
    ("small.py", {}, 1.294e18), ("base.py", {}, 6.425e19), ("large.py", {}, 7.118e20),
    ("large.py", {"steps": 1_750_000}, 3.114e21)])
def test_the_papers_convention_gives_the_papers_totals(file, fields, total):
    scope = {}
    exec((REPO / "configs" / file).read_text(), scope)
    c = scope["get_config"]()
    c.model.vocab_size = 30_522
    c.optimizer.update(fields)
    assert c.optimizer.steps * c.data.batch_size * flops.paper_flops(c) == pytest.approx(total, rel=1e-3)


def test_every_sampler_and_the_selection_are_timed_at_the_configs_sizes(folder, capsys):
    results = run(folder, capsys, "--what=sampler", "--steps=2", "--warmup=1")
    for r in results:
        check(r, "ms")
        assert [r[k] for k in ("batch_size", "seq_len", "num_masked", "vocab_size")] == [8, 24, 3, 67]
    assert [r["distinct"] for r in results if r["what"] == "selection"] == [False, True]
    assert {r["sampler"] for r in results if r["what"] == "sampler"} == {"two_level", "gumbel"}


def test_every_attention_is_timed_or_says_why_not(folder, capsys):
    results = run(folder, capsys, "--what=attention", "--steps=2", "--warmup=1")
    assert [r["implementation"] for r in results] == list(config_lib._CHOICES["model.attention"])
    for r in results:
        check(r, *() if "skipped" in r else ("forward_ms", "forward_backward_ms"))
        assert r["attention_dropout"] == 0.1
    by_name = {r["implementation"]: r for r in results}
    assert "model.attention_dropout=0 (is 0.1)" in by_name["cudnn"]["skipped"]
    assert by_name["xla"]["difference"] < 1e-6 and by_name["xla"]["grad_difference"] < 1e-6
    plain, = (r for r in run(folder, capsys, "--what=attention", "--steps=1", "--config.model.dtype=bfloat16",
                             "--config.model.attention_dropout=0") if r["implementation"] == "xla")
    assert 1e-5 < plain["difference"] < 0.05 and 1e-5 < plain["grad_difference"] < 0.05


def test_prepare_is_timed_beside_the_library_on_the_same_lines(folder, capsys):
    text = (folder / "corpus.txt").read_text()
    for vocabulary, library in ((folder / "vocab.txt", "tokenizers"), ("train", "sentencepiece")):
        r, = run(folder, capsys, "--what=prepare", "--steps=1", f"--config.data.tokenizer={vocabulary}")
        check(r, "mb_per_s", "library_mb_per_s", "read_mb_per_s", "prepare_s", "library_s", "worker_peak_gib")
        assert r["library"] == library and r["documents"] == 60 and library in r["versions"]
        assert r["text_mb"] == pytest.approx((len(text) - 59) / 1e6, rel=0.02)
        assert r["tokens"] == r["library_tokens"] > 1000
        assert r["mb_per_s"] == pytest.approx(r["text_mb"] / r["prepare_s"], rel=1e-2)
        assert r["ratio_to_library"] == pytest.approx(r["mb_per_s"] / r["library_mb_per_s"], rel=1e-2, abs=1e-3)
        assert r["first_trained_vocabulary"] == (vocabulary == "train")


@pytest.fixture(scope="module")
def store(folder):
    """Prepares the config's corpus; the folder."""
    from electra_jax.data.prepare import prepare
    scope = {}
    exec((folder / "tiny.py").read_text(), scope)
    prepare(scope["get_config"](), folder / "tokens", progress=False)
    return folder / "tokens"


def test_the_loader_is_timed_on_the_store(folder, store, capsys):
    r, = run(folder, capsys, "--what=loader", "--steps=20", "--warmup=2", f"--config.data.path={store}")
    check(r, "examples_per_s", "tokens_per_s", "batch_ms")
    assert r["tokens_per_s"] == pytest.approx(r["examples_per_s"] * 24 * (1 - r["padding"]), rel=1e-3)
    assert "no finished token store" in run(folder, capsys, "--what=loader", code=2)


def test_a_checkpoint_is_timed_to_its_restore(folder, capsys):
    r, = run(folder, capsys, "--what=checkpoint", "--steps=2", "--warmup=0")
    check(r, "block_s", "commit_s", "restore_s", "arrays", "state_mb", "disk_mb")
    assert r["block_s"] <= r["commit_s"] and not list((folder / "runs").glob("bench-*"))


def test_finetuning_and_evaluation_are_timed(folder, tmp_path, capsys):
    init_from = tuned.pretrained(tmp_path)
    tuned.write_data(tmp_path / "train.jsonl", "text")
    assert bench.main([
        "--what=finetune", "--steps=2", "--warmup=1", f"--config={REPO}/configs/finetune/text.py",
        f"--config.init_from={init_from}", f"--config.task.train={tmp_path}/train.jsonl", "--config.task.label=two",
        "--config.data.seq_len=32", "--config.data.bucket=32", "--config.data.batch_size=8"]) == 0
    train, evaluate = map(json.loads, capsys.readouterr().out.splitlines()[-2:])
    for r in train, evaluate:
        check(r, "examples_per_s", "tokens_per_s", "mfu", "peak_gib", "shapes")
    assert (train["what"], evaluate["what"], train["steps"]) == ("finetune", "evaluate", 2)
    assert 0 <= train["padding"] < 1


def test_a_start_is_timed_cold_and_warm_and_imports_apart(folder, store, capsys):
    *starts, imports = run(folder, capsys, "--what=startup", "--steps=1", f"--config.data.path={store}",
                           "--config.model.vocab_size=0")
    assert [r["cache"] for r in starts] == ["cold", "warm"]
    for r in starts:
        check(r, "store_s", "built_s", "compiled_s", "first_step_s")
        assert r["store_s"] <= r["built_s"] <= r["compiled_s"] <= r["first_step_s"] and r["prepare_s"] is None
    check(imports, "bare_s", "train_s", "run_s")
    error = run(folder, capsys, "--what=startup", "--steps=1", f"--config.data.path={store}",
                "--config.model.vocab_size=9", code=2)
    assert "ended before its first step: error: model.vocab_size=9 is" in error


def peer(folder, *rates, **more):
    """A program that prints `rates` one after the other, one a call."""
    code = f"""
import json, pathlib
rates, count = {rates}, pathlib.Path({str(folder / "count")!r})
calls = int(count.read_text()) if count.exists() else 0
count.write_text(str(calls + 1))
print("not JSON")
print(json.dumps({more} | {{"tokens_per_s": rates[calls]}}))
"""
    (folder / "peer.py").write_text(code)
    return shlex.join([sys.executable, str(folder / "peer.py")])


def test_a_peer_runs_in_turn_and_the_ratio_is_of_medians(folder, store, tmp_path, capsys):
    own = ["--what=loader", "--steps=5", "--warmup=0", f"--config.data.path={store}"]
    first = peer(tmp_path, 1e4, 5e4, 2e4)
    (tmp_path / "second.py").write_text("""print('{"what": "loader", "examples_per_s": 7}')""")
    second = shlex.join([sys.executable, str(tmp_path / "second.py")])
    results = run(folder, capsys, *own, f"--against={first}", f"--against={second}", "--rounds=3")
    ours = [r for r in results if r.get("who") == "ours"]
    assert [r.get("who") for r in results] == ["ours", first, second] * 3 + [None] * 2
    ratio, other = results[-2:]
    assert ratio["against"] == first and ratio["unit"] == "tokens_per_s" and ratio["of"] == "loader"
    assert ratio["ours_rounds"] == [r["tokens_per_s"] for r in ours] and ratio["theirs_rounds"] == [1e4, 5e4, 2e4]
    assert ratio["ours"] == statistics.median(ratio["ours_rounds"]) and ratio["theirs"] == 2e4
    assert ratio["ratio"] == round(ratio["ours"] / 2e4, 3)
    assert ratio["rounds"] == [round(a / b, 3) for a, b in zip(ratio["ours_rounds"], [1e4, 5e4, 2e4], strict=True)]
    assert other["unit"] == "examples_per_s" and other["theirs"] == 7
    assert other["ratio"] == round(statistics.median(r["examples_per_s"] for r in ours) / 7, 3)


def test_results_are_matched_by_what_or_from_the_last():
    ours = [{"what": "finetune", "examples_per_s": 4, "tokens_per_s": 40}, {"what": "evaluate", "examples_per_s": 9}]
    theirs = [{"what": "evaluate", "examples_per_s": 3}, {"what": "finetune", "tokens_per_s": 20}]
    assert list(bench.pairs(ours, theirs)) == [(ours[0], theirs[1], "tokens_per_s"),
                                               (ours[1], theirs[0], "examples_per_s")]
    unnamed = [{"examples_per_s": 1}, {"examples_per_s": 2}, {"examples_per_s": 3}, {"loss": 1.0}]
    assert [other for _, other, _ in bench.pairs(ours, unnamed)] == unnamed[1:3]
    assert [other for _, other, _ in bench.pairs(ours, unnamed[:1])] == unnamed[:1]


def test_batches_grow_until_memory_ends_and_the_fastest_is_repeated(folder, tmp_path, capsys):
    (tmp_path / "peer.py").write_text("""
import json, sys
batch = int(sys.argv[1])
if batch > 20: sys.exit("torch.OutOfMemoryError: CUDA out of memory.")
print(json.dumps({"tokens_per_s": {8: 500, 16: 300}[batch]}))
""")
    command = shlex.join([sys.executable, str(tmp_path / "peer.py")])
    results = run(folder, capsys, "--steps=1", "--warmup=0", "--batches=1099511627776,8", "--rounds=1",
                  "--config.run.steps_per_dispatch=2", f"--against={command} {{batch}}")
    ours = [r for r in results if r.get("who") == "ours"]
    assert [(r["what"], r["batch_size"]) for r in ours] == [
        ("sweep", 8), ("sweep", 2**40), ("best", 8), ("step", 8)]
    assert "out of memory" in ours[1]["out_of_memory"] and ours[2]["tokens_per_s"] == ours[0]["tokens_per_s"]
    best, = (r for r in results if r["what"] == "best" and r["who"] != "ours")
    assert best["batch_size"] == 8 and best["tokens_per_s"] == 500
    assert results[-1]["what"] == "ratio" and results[-1]["against"] == f"{command} 8"
    assert ours[-1]["steps_per_dispatch"] == 2 and ours[-1]["tokens_per_s"] == pytest.approx(
        8 * 24 / ours[-1]["step_ms"] * 1e3, rel=1e-2)

    seen = []
    found = bench.sweep("peer", lambda b: [sys.executable, str(tmp_path / "peer.py"), str(b)], [32, 16, 8], seen.append)
    assert found["batch_size"] == 8 and [r["batch_size"] for r in seen] == [8, 16, 32, 8]
    assert "CUDA out of memory" in seen[2]["out_of_memory"]
    with pytest.raises(config_lib.UserError, match="none fits"):
        bench.sweep("peer", lambda b: [sys.executable, str(tmp_path / "peer.py"), str(b)], [32], seen.append)


@pytest.mark.parametrize(("flags", "says"), [
    (["--what=stepp"], "stepp"), (["--steps=many"], "many"), (["--stepz=3"], "--stepz is not a flag"),
    (["--rounds=0", "--against=true"], "--rounds=0"), (["--against="], "--against='' is empty"),
    (["--what=startup", "--against=true"], "--against does not go with --what=startup"),
    (["--what=loader", "--batches=8"], "--batches=8 is for --what=step"), (["--batches=8,x"], "--batches=8,x: give"),
    (["--against=no-such-program --x"], "no-such-program is not a program"),
    (["--config.data.batch_size=7"], "data.batch_size=7 does not divide")])
def test_a_mistake_is_one_line_and_code_2(folder, capsys, flags, says):
    assert says in run(folder, capsys, *flags, code=2)


def test_a_peer_that_fails_or_prints_nothing_is_one_line_and_code_2(folder, store, tmp_path, capsys):
    own = ["--what=loader", "--steps=2", "--warmup=0", f"--config.data.path={store}"]
    (tmp_path / "fails.py").write_text("raise SystemExit('it has no GPU')")
    fails, silent = shlex.join([sys.executable, str(tmp_path / "fails.py")]), shlex.join([sys.executable, "-c", "pass"])
    assert "exit code 1 (it has no GPU)" in run(folder, capsys, *own, f"--against={fails}", code=2)
    assert "printed no line of JSON with" in run(folder, capsys, *own, f"--against={silent}", code=2)


BARE = """
import builtins, importlib.abc, sys
ALLOWED = {"jax", "jaxlib", "flax", "optax", "numpy", "ml_collections", "absl", "electra_jax", *sys.stdlib_module_names}
import jax, jax.numpy, flax.linen, optax, numpy, ml_collections, ml_collections.config_flags
REQUIRED = {name.split(".")[0] for name in sys.modules}    # what these import themselves

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in ALLOWED | REQUIRED:
            raise ModuleNotFoundError(f"No module named {name!r} on a bare image")

real = builtins.__import__
def checked(name, globals=None, locals=None, fromlist=(), level=0):
    if level == 0 and (globals or {}).get("__name__", "").startswith("electra_jax"):
        if name.split(".")[0] not in ALLOWED:
            raise ModuleNotFoundError(f"No module named {name!r} on a bare image")
    return real(name, globals, locals, fromlist, level)

sys.meta_path.insert(0, Missing())
builtins.__import__ = checked
from electra_jax.tools import bench
for what in ("step", "sampler", "attention"):
    if code := bench.main([f"--what={what}", "--steps=1", "--warmup=1", *sys.argv[1:]]):
        sys.exit(code)
"""


def test_step_sampler_and_attention_need_jax_flax_optax_numpy_and_ml_collections_alone(folder):
    done = subprocess.run([sys.executable, "-c", BARE, f"--config={folder / 'tiny.py'}"], cwd=REPO, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    found = {json.loads(line)["what"] for line in done.stdout.splitlines()}
    assert found == {"step", "selection", "sampler", "attention"}


def test_the_script_lists_its_sections_and_its_tables_show_the_results(tmp_path):
    script = subprocess.run(["bash", str(REPO / "benchmarks/run.sh"), "tpu"], capture_output=True, text=True)
    assert script.returncode == 2 and "usage: " in script.stderr
    assert "large512" in script.stderr and "v5e programs largest curves h100" in script.stderr
    lines = [{"label": "cpu step", "what": "step", "step_ms": 2.0, "step_ms_min": 1.5, "step_ms_max": 3.0,
              "tokens_per_s": 12345, "mfu": 0.5},
             {"label": "cpu step", "what": "ratio", "of": "step", "unit": "tokens_per_s", "ours": 3.0, "theirs": 2.0,
              "ratio": 1.5, "rounds": [1.5], "ours_rounds": [3.0], "theirs_rounds": [2.0], "against": "peer | x"},
             {"label": "gpu", "what": "best", "who": "peer", "batch_size": 8, "tokens_per_s": 500, "step_ms": 7.0},
             {"label": "gpu", "what": "sweep", "who": "ours", "batch_size": 16, "out_of_memory": "16 GiB"},
             {"label": "paper", "what": "compile", "topology": "v5e:4x4", "rows_per_chip": 16.0, "mesh": {"data": 16},
              "fits": True, "collectives": {"all-reduce": {"count": 1052, "mib": 318.27, "ms": 6.3}}, "step_ms": 65.94},
             {"label": "paper", "what": "compile", "topology": "v5e:1x1", "fits": False, "reason": "17G > 16G"}]
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = subprocess.run([sys.executable, str(REPO / "benchmarks/tables.py"), str(tmp_path / "results.jsonl")],
                         capture_output=True, text=True, check=True).stdout
    assert "## cpu step" in out and "| tokens/s | step, ms | MFU |" in out
    assert "| 12,345 | 2 (1.5 to 3) | 50.0% |" in out and "| 1.50 | 1.5 | peer / x |" in out
    assert "| 8 | peer | 500 | 7 |" in out and "| ours | 16 | 16 GiB |" in out
    assert "| v5e:4x4 | 16 | data 16 | True | all-reduce 1,052 x, 318 MiB | 65.9 |  |" in out
    assert "| v5e:1x1 |  |  | False |  |  | 17G > 16G |" in out
