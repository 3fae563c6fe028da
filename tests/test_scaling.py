"""Promises: the roofline's arithmetic, collectives are counted in full, and the step sends no more than it must."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest
import tiny

from electra_jax import config as config_lib
from electra_jax.tools import hlo, roofline, scaling, targets
from electra_jax.tools.roofline import CHIPS, GIB

REPO = Path(__file__).parent.parent

# --- The roofline ---------------------------------------------------------------------------------


def test_a_collective_takes_its_bytes_over_the_links():
    ring = [(16, 200e9)]
    assert roofline.collective_s("all-gather", 8e9, ring) == pytest.approx(8 * 15 / 16 / 200)
    assert roofline.collective_s("reduce-scatter", 8e9, ring) == pytest.approx(8 * 15 / 16 / 200)
    assert roofline.collective_s("all-reduce", 8e9, ring) == pytest.approx(2 * 8 * 15 / 16 / 200)
    assert roofline.collective_s("collective-permute", 8e9, ring) == pytest.approx(8 / 200)
    assert roofline.collective_s("all-reduce", 8e9, [(1, 200e9)]) == 0


def test_between_nodes_of_gpus_each_sends_an_eighth():
    stages = roofline.levels(CHIPS["h100"], (32,), (32,))
    assert stages == [(8, 450e9), (4, 50e9)] == roofline.levels(CHIPS["h100"], (32,), (8, 4))
    assert roofline.collective_s("all-reduce", 1e9, stages) == pytest.approx(2 * 7 / 8 / 450 + 2 * 3 / 4 / 8 / 50)
    assert roofline.levels(CHIPS["h100"], (4,), (4,))[0] == (4, 450e9)
    # One GPU of each node: all of the array goes over its own link to the network.
    assert roofline.collective_s("all-reduce", 1e9, roofline.levels(CHIPS["h100"], (32,), (1, 4))) == pytest.approx(
        2 * 3 / 4 / 50)


def test_a_group_of_gpus_reaches_over_nodes_of_eight():
    gpus = [types.SimpleNamespace(id=i, coords=[0, 0, 0]) for i in range(32)]
    for group, expected in ((range(8), (8, 1)), (range(32), (8, 4)), (range(0, 32, 8), (1, 4)), ((6, 8), (1, 2))):
        assert roofline.reach(CHIPS["h100"], [gpus[i] for i in group]) == expected
    tpus = [types.SimpleNamespace(coords=(x, y, 0)) for x in range(4) for y in range(2)]
    assert roofline.reach(CHIPS["v5e"], tpus) == (4, 2)


@pytest.mark.parametrize("name, shape, extents, links", [
    ("v5e", (4, 4), (4, 4), 2), ("v5e", (16, 16), (16, 16), 4), ("v5e", (8, 16), (8, 16), 3),
    ("v5e", (1, 1), (1, 1), 0),
    ("v5e", (16, 16), (1, 16), 2), ("v5e", (16, 16), (1, 8), 1), ("v5p", (2, 2, 1), (2, 2, 1), 2),
    ("v5p", (4, 4, 4), (4, 4, 4), 6), ("v5p", (2, 4, 4), (2, 4, 4), 3), ("v5p", (4, 4, 8), (1, 4, 8), 4)])
def test_an_axis_that_wraps_around_has_two_links(name, shape, extents, links):
    assert roofline.links(CHIPS[name], shape, extents) == links


def test_the_step_takes_the_longest_of_what_overlaps_and_all_that_does_not():
    v5e = CHIPS["v5e"]     # 197 TFLOP/s, 819 GB/s
    times = roofline.roofline(v5e, 19.7e12, 0.819e9, hidden_s=0.1, exposed_s=0.03, attainable=0.5)
    assert times["compute_s"] == pytest.approx(0.2) and times["hbm_s"] == pytest.approx(1e-3)
    assert times["step_s"] == pytest.approx(0.23)
    assert roofline.roofline(v5e, 0, 819e9, 0.1, 0, 0.5)["step_s"] == pytest.approx(1)
    assert roofline.roofline(v5e, 0, 0, 0.1, 0, 0.5)["step_s"] == pytest.approx(0.1)


@pytest.mark.parametrize("name", CHIPS)
def test_every_chip_has_a_peak(name):
    assert roofline.peak(CHIPS[name]) > 1e14


@pytest.mark.parametrize("dtype, itemsize", [("float32", 4), ("bfloat16", 2)])
def test_by_formula_data_parallelism_reduces_the_gradients_and_nothing_else(dtype, itemsize):
    config = tiny.config(data__batch_size=64, model__dtype=dtype)
    shapes = scaling.parameter_shapes(config)
    params = itemsize * sum(math.prod(shape) for shape in shapes.values())
    gradients = params + 4 * math.prod(shapes["embeddings/word_embeddings/embedding"])
    result = scaling.estimate(config, CHIPS["v5e"], (4, 4), 0.5)
    assert result["params"] * itemsize == params and result["mesh"] == {"data": 16, "fsdp": 1, "tensor": 1}
    assert result["exposed_s"] == pytest.approx(2 * 15 / 16 * gradients / (2 * 50e9))
    config.mesh.update(data=1, fsdp=16)
    sharded = scaling.estimate(config, CHIPS["v5e"], (4, 4), 0.5)
    assert sharded["exposed_s"] == pytest.approx(15 / 16 * (gradients + 2 * params) / (2 * 50e9))
    assert sharded["peak_bytes"] < result["peak_bytes"]


def test_weak_scaling_keeps_the_work_of_a_chip_and_strong_scaling_that_of_the_step():
    config = tiny.config(data__batch_size=64)
    results = list(scaling.curves(config, "v5e", 8, 0.5))
    weak, strong = ([r for r in results if r["what"] == what] for what in ("weak", "strong"))
    assert [r["chips"] for r in weak] == [1, 4, 8, 16, 32, 64, 128, 256] and len({r["compute_ms"] for r in weak}) == 1
    assert [r["chips"] for r in strong] == [1, 4, 8, 16, 32, 64]    # 64 rows do not divide over more
    assert {r["batch_size"] for r in strong} == {64} and {r["rows_per_chip"] for r in weak} == {8}
    assert config.data.batch_size == 64


def test_the_largest_model_grows_with_the_slice_and_fits(monkeypatch):
    monkeypatch.setattr(scaling, "FAMILY", ((12, 768), (24, 1024), (48, 4096), (64, 5120)))
    found = []
    for shape in ((1, 1), (16, 16)):
        config = tiny.config(data__batch_size=1024, data__seq_len=32, model__vocab_size=30_522, model__dtype="bfloat16")
        found.append(scaling.largest(config, "v5e", shape, 0.5))
        assert found[-1]["peak_gib"] < found[-1]["hbm_gib"] == CHIPS["v5e"].hbm_bytes / GIB
    assert found[0]["params"] < found[1]["params"] and found[1]["mesh"]["fsdp"] > 1


# --- Reading programs -----------------------------------------------------------------------------

PROGRAM = """
HloModule m, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }, entry_computation_layout={}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  ROOT %sum = f32[] add(%a, %a)
}

%row (rows: f32[6,8]) -> f32[8] {
  %rows = f32[6,8]{1,0} parameter(0)
  ROOT %row = f32[8]{0} dynamic-slice(%rows), dynamic_slice_sizes={1,8}
}

%body (p: (s32[], f32[6,8])) -> (s32[], f32[6,8]) {
  %p = (s32[]{:T(128)}, f32[6,8]{1,0}) parameter(0)
  %stack = f32[6,8]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %slice = f32[8]{0:T(128)} fusion(%stack), kind=kLoop, calls=%row
  %fast = f32[8]{0:T(128)S(1)} negate(%slice)
  %reduced = (bf16[3,4]{1,0}, f32[2]{0}) all-reduce(%slice, %slice), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  ROOT %t = (s32[], f32[6,8]) tuple(%p, %stack)
}

%condition (p: (s32[], f32[6,8])) -> pred[] {
  %p = (s32[], f32[6,8]) parameter(0)
  %limit = s32[]{:T(128)} constant(6)
  ROOT %less = pred[] compare(%limit, %limit), direction=LT
}

ENTRY %main (x: f32[100]) -> f32[100] {
  %x = f32[100]{0:T(256)} parameter(0)
  %loop = (s32[], f32[6,8]) while(%x), condition=%condition, body=%body
  %start = (f32[10]{0}, f32[80]{0}) all-gather-start(%x), replica_groups={}, dimensions={0}
  %done = f32[80]{0} all-gather-done(%start)
  %scatter = f32[25]{0} reduce-scatter(%x), replica_groups={{0,2,4,6},{1,3,5,7}}, metadata={op_name="step/loss"}
  ROOT %moved = f32[100]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
}
"""


def test_collectives_in_a_loop_count_as_often_as_it_turns():
    found = {c.kind: c for c in hlo.collectives(PROGRAM, 8)}
    reduced = found["all-reduce"]
    assert (reduced.times, reduced.payload, reduced.dtype, reduced.group) == (6, 32, "bf16", (0, 2, 4, 6))
    known = PROGRAM.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"12"}}')
    assert {c.times for c in hlo.collectives(known, 8)} == {1, 12}


def test_a_loop_that_counts_by_two_turns_half_as_often():
    by_two = PROGRAM.replace("%p = (s32[]{:T(128)}, f32[6,8]{1,0}) parameter(0)", """%p = (s32[], f32[6,8]) parameter(0)
  %two = s32[] constant(2)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %next = s32[]{:T(128)} add(%i, %two)""").replace("tuple(%p, %stack)", "tuple(%next, %stack)").replace(
        "%limit = s32[]{:T(128)} constant(6)",
        "%i = s32[] get-tuple-element(%p), index=0\n  %limit = s32[] constant(6)")
    assert {c.times for c in hlo.collectives(by_two, 8)} == {1, 3}


def test_pieces_of_a_collective_run_beside_other_work_are_one():
    piece = "%{} = f32[64]{{0}} all-gather(%x), channel_id={}, replica_groups={{}}, frontend_attributes={{{}}}\n"
    chain, plain = 'chain_id="0"', ""
    for attribute, count in ((chain, 1), (plain, 2)):
        program = PROGRAM.replace("  %fast", "  " + piece.format("a", 7, attribute) + "  %fast").replace(
            "  %start", "  " + piece.format("b", 7, attribute) + "  %start")
        found = [c for c in hlo.collectives(program, 8) if c.payload == 256]
        assert len(found) == count and min(c.times for c in found) == 1
        assert all(c.hidden == (attribute == chain) for c in found)


def test_a_collective_counts_the_whole_array_in_its_group():
    found = {c.kind: c for c in hlo.collectives(PROGRAM, 8)}
    assert found["reduce-scatter"].payload == 400 and found["reduce-scatter"].group == (0, 2, 4, 6)
    assert found["reduce-scatter"].source == "step/loss"
    assert found["collective-permute"].payload == 400 and found["collective-permute"].group == (0, 1)
    gather = found["all-gather"]
    assert (gather.payload, gather.group, gather.hidden) == (320, tuple(range(8)), True)
    assert not any(c.hidden for c in found.values() if c is not gather)


def test_traffic_counts_slices_of_what_a_loop_steps_through_and_leaves_vector_memory_out():
    loop = (32 + 32) + 32 + (24 + 8 + 2 * 32)      # slice, what is negated into vector memory, all-reduce
    entry = (40 + 320) + (100 + 400) + (400 + 400)
    assert hlo.traffic(PROGRAM) == 6 * loop + entry


def test_a_loop_in_a_loop_steps_through_its_own_arrays():
    outer = """%microbatches (q: (s32[], f32[100])) -> (s32[], f32[100]) {
  %q = (s32[], f32[100]) parameter(0)
  %inner = (s32[], f32[6,8]) while(%q), condition=%condition, body=%body
  ROOT %out = (s32[], f32[100]) tuple(%inner)
}

ENTRY"""
    nested = PROGRAM.replace("ENTRY", outer).replace(
        "%loop = (s32[], f32[6,8]) while(%x), condition=%condition, body=%body",
        '%loop = (s32[], f32[100]) while(%x), body=%microbatches, backend_config={"known_trip_count":{"n":"4"}}')
    entry = (40 + 320) + (100 + 400) + (400 + 400)
    assert hlo.traffic(nested) - entry == 4 * (hlo.traffic(PROGRAM) - entry)
    assert {c.times for c in hlo.collectives(nested, 8)} == {1, 24}


def fused(body, operands, result, more=""):
    """A program of one fusion and the instructions `more`."""
    return f"""
%fused (a: f32[]) -> f32[] {{
{body}
}}

ENTRY %main (table: f32[1000,8]) -> f32[] {{
  %table = f32[1000,8]{{1,0}} parameter(0)
  %rows = f32[5,8]{{1,0}} parameter(1)
  %ids = s32[5]{{0}} parameter(2)
  %flat = f32[8000]{{0}} bitcast(%table)
  ROOT %out = {result} fusion({operands}), kind=kLoop, calls=%fused
{more}}}
"""


TABLE, ROWS, IDS = 32_000, 160, 20
PARAMETERS = """  %t = f32[1000,8]{1,0} parameter(0)
  %view = f32[1000,1,8]{2,1,0} bitcast(%t)
  %r = f32[5,8]{1,0} parameter(1)
  %i = s32[5]{0} parameter(2)
"""


@pytest.mark.parametrize("body, result, expected", [
    ("  ROOT %out = f32[5,8]{1,0} gather(%view, %i), slice_sizes={1,8}", "f32[5,8]{1,0}", ROWS + IDS + ROWS),
    # Looked up and read: all of it.
    ("""  %look = f32[5,8]{1,0} gather(%view, %i), slice_sizes={1,8}
  %sum = f32[8]{0} reduce(%t), to_apply=%add
  ROOT %out = (f32[5,8]{1,0}, f32[8]{0}) tuple(%look, %sum)""", "(f32[5,8]{1,0}, f32[8]{0})",
     TABLE + IDS + ROWS + 32),
    # Cut, converted and padded first: the padded numbers are half as wide.
    ("""  %cut = f32[990,8]{1,0} slice(%t), slice={[0:990], [0:8]}
  %half = bf16[990,8]{1,0} convert(%cut)
  %zero = bf16[] constant(0)
  %more = bf16[1024,8]{1,0} pad(%half, %zero), padding=0_34x0_0
  ROOT %out = bf16[5,8]{1,0} gather(%more, %i), slice_sizes={1,8}""", "bf16[5,8]{1,0}", ROWS + IDS + ROWS / 2),
    # In two pieces.
    ("""  %one = f32[3,8]{1,0} slice(%t), slice={[0:3], [0:8]}
  %two = f32[2,8]{1,0} slice(%t), slice={[3:5], [0:8]}
  ROOT %out = f32[5,8]{1,0} concatenate(%one, %two), dimensions={0}""", "f32[5,8]{1,0}", ROWS + ROWS),
    # Updated in place: written, and by a scatter read before.
    ("""  %new = f32[1000,1,8]{2,1,0} dynamic-update-slice(%view, %r, %i)
  ROOT %out = f32[1000,8]{1,0} bitcast(%new)""", "f32[1000,8]{1,0}", ROWS + IDS + ROWS),
    ("  ROOT %out = f32[1000,8]{1,0} scatter(%t, %i, %r), to_apply=%add", "f32[1000,8]{1,0}",
     ROWS + IDS + ROWS + ROWS),
    # A copy, updated.
    ("""  %new = f32[1000,8]{1,0} dynamic-update-slice(%t, %r, %i)
  ROOT %out = f32[1000,8]{1,0} negate(%new)""", "f32[1000,8]{1,0}", TABLE + ROWS + IDS + TABLE),
    # What is written was made in vector memory; a TPU's copy of an array onto itself is no use of it.
    ("""  %fast = f32[5,8]{1,0:T(8,128)S(1)} negate(%r)
  %same = f32[1000,8]{1,0} fusion(%t), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%copy
  ROOT %out = f32[1000,8]{1,0} dynamic-update-slice(%same, %fast, %i)""", "f32[1000,8]{1,0}", ROWS + IDS + ROWS),
    # One result of two.
    ("""  %new = f32[1000,8]{1,0} dynamic-update-slice(%t, %r, %i)
  ROOT %out = (s32[5]{0}, f32[1000,8]{1,0}) tuple(%i, %new)""", "(s32[5]{0}, f32[1000,8]{1,0})",
     ROWS + IDS + IDS + ROWS)])
def test_of_a_table_that_is_looked_up_in_or_updated_in_place_only_those_rows_count(body, result, expected):
    assert hlo.traffic(fused(PARAMETERS + body, "%flat, %rows, %ids", result)) == expected


def test_outside_of_fusions_too_only_the_rows_count():
    alone = """  %row = f32[5,8]{1,0} dynamic-slice(%table, %ids), dynamic_slice_sizes={5,8}
  %seen = f32[5,8]{1,0:S(1)} gather(%table, %ids), slice_sizes={1,8}
  %new = f32[1000,8]{1,0} dynamic-update-slice(%table, %rows, %ids)
"""
    rest = hlo.traffic(fused(PARAMETERS + "  ROOT %out = f32[8]{0} reduce(%t)", "%table", "f32[8]{0}"))
    program = fused(PARAMETERS + "  ROOT %out = f32[8]{0} reduce(%t)", "%table", "f32[8]{0}", alone)
    assert rest == TABLE + 32 and hlo.traffic(program) - rest == (2 * ROWS + IDS) + (ROWS + IDS) + (2 * ROWS + IDS)


@pytest.mark.parametrize("copy, expected", [
    ("(f32[5,8]{1,0:T(8,128)S(1)}, f32[5,8]{1,0}, u32[]) copy-start(%rows)", ROWS),
    ("(f32[5,8]{1,0}, f32[5,8]{1,0}, u32[]) copy-start(%rows)", 2 * ROWS)])
def test_a_copy_into_vector_memory_reads_and_one_within_main_memory_writes_too(copy, expected):
    idle = PARAMETERS + "  ROOT %out = f32[8]{0} slice(%t)"
    without = hlo.traffic(fused(idle, "%table", "f32[8]{0}"))
    assert hlo.traffic(fused(idle, "%table", "f32[8]{0}", f"  %c = {copy}\n")) - without == expected


def test_branches_of_a_conditional_scatters_of_two_arrays_and_started_exchanges_are_counted():
    idle = PARAMETERS + "  ROOT %out = f32[8]{0} slice(%t)"
    branch = """
}

%branch (b: f32[5,8]) -> f32[5,8] {
  %b = f32[5,8]{1,0} parameter(0)
  ROOT %n = f32[5,8]{1,0} negate(%b)"""
    program = fused(idle, "%table", "f32[8]{0}", "  %c = f32[5,8]{1,0} conditional(%ids, %rows), "
                    "branch_computations={%branch}\n").replace("\n}\n\nENTRY", branch + "\n}\n\nENTRY", 1)
    without = hlo.traffic(fused(idle, "%table", "f32[8]{0}"))
    assert hlo.traffic(program) - without == 2 * ROWS
    both = "  %s = (f32[1000,8]{1,0}, f32[1000,8]{1,0}) scatter(%table, %table, %ids, %rows, %rows), to_apply=%add\n"
    assert hlo.traffic(fused(idle, "%table", "f32[8]{0}", both)) - without == IDS + 6 * ROWS
    exchange = "  %s = (f32[5,8]{1,0}, f32[5,8]{1,0}) all-to-all-start(%rows), replica_groups={}\n"
    assert hlo.traffic(fused(idle, "%table", "f32[8]{0}", exchange)) - without == 2 * ROWS


def test_devices_that_send_to_themselves_or_to_none_move_nothing():
    for pairs in ("{{0,0},{1,1}}", "{}, metadata={op_name={{x}}}"):
        line = PROGRAM.replace("source_target_pairs={{0,1},{1,0}}", f"source_target_pairs={pairs}")
        assert "collective-permute" not in {c.kind for c in hlo.collectives(line, 8)}


def test_what_is_called_runs_once():
    called = PROGRAM.replace("while(%x), condition=%condition, body=%body", "call(%x), to_apply=%body")
    assert hlo.kernels(called) == 3 + 3 and {c.times for c in hlo.collectives(called, 8)} == {1}


def test_a_library_call_reads_and_writes_but_its_scratch_does_not_count():
    call = '  %call = (f32[5,8]{1,0}, s8[4096]{0}) custom-call(%rows, %ids), custom_call_target="__cublas$lt$matmul"\n'
    idle = PARAMETERS + "  ROOT %out = f32[8]{0} slice(%t)"
    without = hlo.traffic(fused(idle, "%table", "f32[8]{0}"))
    assert hlo.traffic(fused(idle, "%table", "f32[8]{0}", call)) - without == ROWS + IDS + ROWS
    twice = call.replace("(%rows, %ids)", "(%rows, %ids, %rows)")    # one array under two names
    assert hlo.traffic(fused(idle, "%table", "f32[8]{0}", twice)) - without == ROWS + IDS + ROWS
    marked = call.replace("__cublas$lt$matmul", "AllocateBuffer")
    assert hlo.traffic(fused(idle, "%table", "f32[8]{0}", marked)) == without
    assert [hlo.kernels(fused(idle, "%table", "f32[8]{0}", more)) for more in ("", call, marked)] == [1, 2, 1]


def test_kernels_in_a_loop_count_as_often_as_it_turns():
    # slice, negate, all-reduce; all-gather, reduce-scatter, permute; the loop's condition unless its length is known.
    assert hlo.kernels(PROGRAM) == 6 * (3 + 1) + 3
    known = PROGRAM.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"12"}}')
    assert hlo.kernels(known) == 12 * 3 + 3


@pytest.mark.parametrize("groups, first", [
    ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_0'}", (0, 2, 4, 6)),
    ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_2'}", (0, 1)),
    ("mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}", (0, 2)),
    ("mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'b'}", (0, 1, 4, 5)),
    ("mesh['a'=2,'b'=4], device_ids=(7,6,5,4,3,2,1,0) {'a'}", (7, 3)),
    ("mesh['a'=8] {'a':(1)2}", (0, 4)), ("mesh['a'=8] {'a':(2)4}", (0, 1, 2, 3)),
    ("mesh['a'=2,'b'=4] {'a','b'}", tuple(range(8)))])
def test_groups_are_read_from_names_of_a_mesh(groups, first):
    program = PROGRAM.replace("replica_groups={}", f"replica_groups={groups}")
    assert {c.kind: c.group for c in hlo.collectives(program, 8)}["all-gather"] == first


def test_a_collective_that_starts_and_waits_is_not_hidden_and_one_with_itself_is_none():
    waits = PROGRAM.replace("replica_groups={}", 'replica_groups={}, backend_config={"is_sync":true}')
    assert not any(c.hidden for c in hlo.collectives(waits, 8))
    itself = PROGRAM.replace("{{0,1},{1,0}}", "{{0,0},{3,5}}")
    assert {c.kind: c.group for c in hlo.collectives(itself, 8)}["collective-permute"] == (3, 5)
    none = PROGRAM.replace("{{0,1},{1,0}}", "{{0,0},{1,1}}")
    assert "collective-permute" not in {c.kind for c in hlo.collectives(none, 8)}
    start = PROGRAM.replace("%scatter = f32[25]{0} reduce-scatter(%x)",
                            "%scatter = ((f32[100]{0}), f32[25]{0}) reduce-scatter-start(%x)")
    assert {c.kind: c.payload for c in hlo.collectives(start, 8)}["reduce-scatter"] == 400


@pytest.fixture(scope="module")
def compiled(quick_compile):
    """By mesh: what the program of a one-layer model says, compiled for four fake CPU devices."""
    results = {}
    for axis in ("data", "fsdp", "tensor"):
        config = tiny.config(data__batch_size=BATCH, model__num_layers=1, model__generator_size=1.0)
        config.mesh.update({"data": 1, "fsdp": 1, "tensor": 1} | {axis: 4})
        results[axis] = scaling.compile_step(config, jax.devices()[:4])
    return {path: 4 * math.prod(shape) for path, shape in scaling.parameter_shapes(config).items()}, results


BATCH = 64
# What a layer hands on: rows x length x width in float32.
ACTIVATIONS = BATCH * 24 * 16 * 4


def moved(result, *kinds):
    """Bytes of the collectives of these kinds in a step."""
    return sum(c.times * c.payload for c in result["collectives"] if c.kind in kinds)


def test_data_parallelism_reduces_each_gradient_and_the_sums_and_moves_no_activations(compiled):
    size, results = compiled
    reduced = moved(results["data"], "all-reduce")
    sums = 4 * 2 * 2048        # the histograms of the AUC; besides, a few scalars
    # Both networks use the embeddings, and the head the token table again: a compiler may add up their parts after
    # each was reduced.
    again = sum(n for path, n in size.items() if path.startswith("embeddings/")) + size[
        "embeddings/word_embeddings/embedding"]
    assert sum(size.values()) <= reduced - sums <= sum(size.values()) + again + 100
    assert moved(results["data"], "all-gather", "all-to-all", "collective-permute", "reduce-scatter") < ACTIVATIONS


def test_fsdp_moves_parameters_and_gradients_and_of_the_activations_only_what_was_looked_up(compiled):
    size, results = compiled
    cut = sum(n for path, n in size.items() if path.endswith(("kernel", "word_embeddings/embedding")))
    gathered = moved(results["fsdp"], "all-gather")
    assert sum(n for path, n in size.items() if "ffn" in path and "kernel" in path) < gathered < 2 * cut + ACTIVATIONS
    # Each network looks up tokens in a table cut by width, half as wide as a layer: forward and backward.
    assert moved(results["fsdp"], "all-to-all") <= 4 * ACTIVATIONS / 2 + 100
    assert moved(results["fsdp"], "all-reduce", "reduce-scatter") < 2 * sum(size.values()) + 4 * 2 * 2048
    assert moved(results["fsdp"], "collective-permute") == 0
    assert results["fsdp"]["state_bytes"] < 0.5 * results["data"]["state_bytes"]


def test_tensor_parallelism_reduces_activations_after_attention_and_feed_forward_and_moves_no_others(compiled):
    size, results = compiled
    reduced = moved(results["tensor"], "all-reduce")
    layers = 2 * 2 * 2 * ACTIVATIONS      # both networks, forward and backward, two products each
    lookups = 2 * 2 * ACTIVATIONS / 2 * 2
    assert layers <= reduced <= layers + lookups + 2 * sum(size.values()) + 4 * 2 * 2048
    assert moved(results["tensor"], "all-to-all") == 0
    assert moved(results["tensor"], "all-gather", "collective-permute", "reduce-scatter") < ACTIVATIONS


def test_under_tensor_parallelism_the_vocabularys_scores_are_gathered_for_the_sampler_alone(quick_compile):
    # 30,522 entries are 238.5 of the sampler's chunks, which no cut over two devices fits.
    config = tiny.config(data__batch_size=4, model__num_layers=1, model__vocab_size=30_522)
    config.mesh.update(data=1, fsdp=1, tensor=2)
    result = scaling.compile_step(config, jax.devices()[:2])
    scores = 4 * 4 * config_lib.num_masked(config) * config.model.vocab_size
    gathered = [c.payload for c in result["collectives"] if c.kind == "all-gather" and c.payload > 0.9 * scores]
    assert len(gathered) <= 1, gathered


def test_the_donated_state_is_aliased_on_every_mesh(compiled):
    for result in compiled[1].values():
        assert result["state_aliased"] and result["alias_bytes"] >= result["state_bytes"]


# --- The command line -----------------------------------------------------------------------------


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["scaling", "--config=configs/small.py", *arguments])
    code = scaling.main()
    return code, *capsys.readouterr()


def test_without_libtpu_one_line_says_how_to_get_it(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    code, out, error = command(monkeypatch, capsys, "--topology=v5e:4x4")
    assert code == 2 and not out and error.count("\n") == 1 and "pip install libtpu" in error


@pytest.mark.parametrize("topology", ["v9:4x4", "v5e", "v5e:4x4x4", "h100:2x4", "v5e:4y4"])
def test_a_topology_that_is_none_is_refused_in_one_line(monkeypatch, capsys, topology):
    code, out, error = command(monkeypatch, capsys, f"--topology={topology}")
    assert code == 2 and not out and error.count("\n") == 1 and f"--topology={topology}" in error


@pytest.fixture
def without_cuda(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, package=None: None if name.startswith("jax_plugins") else find(name, package))


def test_results_are_lines_of_json_or_a_table(monkeypatch, capsys, without_cuda):
    code, out, _ = command(monkeypatch, capsys, "--topology=h100:8,h100:16", "--rows-per-chip=64")
    first, second = map(json.loads, out.splitlines())
    assert code == 0 and (first["chips"], second["chips"]) == (8, 16) and first["batch_size"] == 512
    assert first["what"] == "formula" and "kernels" not in first
    assert first["params"] == 14_196_219 and first["compute_ms"] == second["compute_ms"]
    assert first["exposed_ms"] < second["exposed_ms"]      # over the network
    code, out, _ = command(monkeypatch, capsys, "--topology=h100:8", "--rows-per-chip=64", "--label=named so")
    named = json.loads(out)
    assert named.pop("label") == "named so" and named == first
    code, out, _ = command(monkeypatch, capsys, "--topology=h100:8", "--rows-per-chip=64", "--markdown")
    head, rule, row = out.splitlines()
    assert head.count("|") == rule.count("|") == row.count("|") and "| h100:8 |" in row


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_step_compiles_for_a_tpu_slice():
    config = tiny.config(model__num_layers=1, model__dtype="bfloat16")
    result = scaling.compile_report(config, "v5e:2x2", 0.5)
    assert result["fits"] and result["state_aliased"] and result["chips"] == 4
    assert result["peak_gib"] < result["hbm_gib"] and result["collectives"]["all-reduce"]["count"] > 0


def test_the_compilers_options_leave_the_users_flags_alone(monkeypatch):
    gpu, cpu = types.SimpleNamespace(platform="gpu"), types.SimpleNamespace(platform="cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    assert targets.compiler_options([gpu]) == {"xla_gpu_autotune_level": 0} and targets.compiler_options([cpu]) == {}
    monkeypatch.delenv("XLA_FLAGS")
    assert targets.compiler_options([gpu])["xla_gpu_enable_triton_gemm"] is False


def test_without_cudnn_one_line_says_how_to_get_it(monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("cuDNN not found.")

    monkeypatch.setattr(targets, "devices", lambda topology: [])
    monkeypatch.setattr(scaling, "compile_step", fail)
    code, out, error = command(monkeypatch, capsys, "--topology=h100:1", "--config.model.attention=cudnn",
                               "--config.model.attention_dropout=0", "--config.model.dtype=bfloat16")
    assert code == 2 and not out and error.count("\n") == 1
    assert "model.attention=cudnn" in error and "pip install nvidia-cudnn-cu12" in error


CUDA = targets.has_cuda()


@pytest.mark.skipif(not CUDA, reason="JAX's plugin for CUDA is not installed")
def test_the_step_compiles_for_gpus():
    config = tiny.config(model__num_layers=1, model__dtype="bfloat16", data__batch_size=16)
    one, two = (scaling.compile_report(config, f"h100:{chips}", 0.5) for chips in (1, 2))
    assert one["what"] == two["what"] == "compile" and one["fits"] and one["state_aliased"]
    assert one["hbm_traffic_gib"] > one["state_gib"] and 100 < one["kernels"] < 1000
    assert not one["collectives"] and two["collectives"]["all-reduce"]["mib"] > 0 and two["mesh"] == {"data": 2}


@pytest.mark.skipif(not CUDA, reason="JAX's plugin for CUDA is not installed")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_flash_attention_compiles_for_gpus_and_keeps_the_probabilities_out_of_memory(tmp_path, dtype):
    found = {}
    for name in ("xla", "flash"):
        config = tiny.config(model__num_layers=2, model__dtype=dtype, model__attention=name, data__seq_len=256,
                             model__max_positions=256, model__attention_dropout=0.1, data__batch_size=16,
                             model__hidden_size=32, model__num_heads=2, model__generator_size=0.5)
        found[name] = scaling.compile_report(config, "h100:2", 0.5, str(tmp_path))
        text = (tmp_path / "h100_2.hlo").read_text()
        kernels = {kernel: text.count(f'name = "{kernel}"') for kernel in ("flash_forward", "flash_backward")}
        assert all(bool(count) == (name == "flash") for count in kernels.values()), kernels
        assert (",256,256]" in text) == (name == "xla")
    assert found["flash"]["hbm_traffic_gib"] < found["xla"]["hbm_traffic_gib"]


def test_gpus_that_fill_no_nodes_are_refused_in_one_line(monkeypatch, capsys):
    code, out, error = command(monkeypatch, capsys, "--topology=h100:12")
    assert code == 2 and not out and error.count("\n") == 1 and "--topology=h100:12" in error and "eight" in error


# --- benchmarks/run.sh paper ----------------------------------------------------------------------


def paper(folder, *sections, **variables):
    environment = os.environ | {"RESULTS": str(folder / "results.jsonl"), "WORK": str(folder / "work")} | variables
    return subprocess.run(["bash", "benchmarks/run.sh", "paper", *sections], cwd=REPO, env=environment, text=True,
                          capture_output=True)


def test_the_programs_on_paper_are_configs_that_fit_their_slices(monkeypatch, tmp_path):
    stub = tmp_path / "python"     # in place of all compilations: writes down what it is told
    stub.write_text(f"#!/bin/bash\n[[ $1 != -m ]] || (IFS=$'\\t'; echo \"$*\" >> {tmp_path}/calls)\n")
    stub.chmod(0o755)
    done = paper(tmp_path, PYTHON=str(stub), EXTRA="--config.model.num_layers=2 --config.model.vocab_size=99")
    assert done.returncode == 0, done.stderr
    seen = []

    def run(config, options):
        if options.what == "compile":
            for name, shape in map(roofline.parse_topology, options.topology.split(",")):
                mesh = types.SimpleNamespace(shape=scaling.mesh_sizes(config.mesh, math.prod(shape)))
                seen.append((options.label, name, config.model.attention, mesh.shape["fsdp"]))
                config.data.batch_size = options.rows_per_chip * math.prod(shape) or config.data.batch_size
                scaling.sharding.check_divides(config, mesh)
        assert config.model.num_layers == 2 and config.model.dtype == "bfloat16"
        return iter([])

    monkeypatch.setattr(scaling, "run", run)
    monkeypatch.chdir(REPO)
    labels = set()
    for line in (tmp_path / "calls").read_text().splitlines():
        monkeypatch.setattr(sys, "argv", line.split("\t")[1:])
        labels.add(sys.argv[1])
        assert scaling.main() == 0, line
    assert labels == {f"--label=paper {section}" for section in ("v5e", "programs", "largest", "curves", "h100")}
    assert [label for label, *_ in seen] == 5 * ["paper v5e"] + 7 * ["paper programs"] + 4 * ["paper largest"] + (
        18 * ["paper h100"])
    assert {name for label, name, *_ in seen if label == "paper h100"} == {"h100"}
    assert sum(attention == "cudnn" for *_, attention, _ in seen) == 5 and ("paper programs", "v5e", "xla", 16) in seen


def test_a_section_without_its_compiler_fails_and_says_so(tmp_path):
    (tmp_path / "jax_plugins").mkdir()      # hides an installed plugin for CUDA
    (tmp_path / "jax_plugins/__init__.py").touch()
    done = paper(tmp_path, "h100", "curves", PYTHON=sys.executable, PYTHONPATH=f"{tmp_path}:{REPO}")
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert done.returncode == 1 and "paper h100: skipped, JAX's plugin for CUDA is not installed" in done.stderr
    assert {line["label"] for line in lines} == {"paper curves"} and "## paper curves" in done.stdout
    assert {line["what"] for line in lines} == {"weak", "strong"} and "| v5e:16x16 | 12 | 768 |" in done.stdout
    failed = paper(tmp_path, "v5e", PYTHON="false")
    assert failed.returncode == 1 and "paper v5e: failed" in failed.stderr
