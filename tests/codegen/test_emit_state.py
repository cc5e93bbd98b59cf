"""The kernels of states: what their source says, and that they compile for a GPU that is not there."""

from __future__ import annotations

import os

import pytest

from attncompiler.codegen.cross_compile_state import cross_compile_state
from attncompiler.codegen.emit_state import StateEmission, emit_state, state_source
from attncompiler.codegen.recurrence import recurrence_of
from attncompiler.codegen.state_layout import KEYS, StateLayout
from attncompiler.ir import parse_program
from attncompiler.ir.state import State
from attncompiler.tuning.state_schedule import choose_state_schedule, segment_length
from attncompiler.tuning.target import TARGETS
from tests.states import recurrence

SM_90 = TARGETS["sm_90"]


def test_the_header_is_the_program() -> None:
    parts = recurrence("a decay a head", 300, 64, 64, "bf16")
    source = state_source(parts, SM_90)
    header = "\n".join(line.removeprefix("#").strip() for line in source.splitlines() if line.startswith("#"))
    text = header[header.index("state\n") : header.index("\n\nS[j]")] + "\n"
    program = parse_program(text).phases[0].work
    assert isinstance(program, State) and recurrence_of(program).program == parts.program


def test_a_source_holds_what_its_problem_needs() -> None:
    """No decay leaves no exponential, whole channels leave no mask of them, a sequence that is not cut no scan."""
    schedule = choose_state_schedule(64, 2, SM_90)
    plain = emit_state(recurrence("plain", 300, 64, 64, "bf16"), schedule, StateLayout((1, 2, 2), False))
    assert "exp2" not in plain and "channels[None, :] <" not in plain and "scan" not in plain
    assert "(h // 2) * stride_k_h" in plain and "h * stride_q_h" in plain
    cut = emit_state(recurrence("before the own key", 300, 40, 24, "bf16"), schedule, StateLayout((1, 2, 2), True, True))
    assert "steps[:, None] - steps[None, :] >= 1" in cut and "(channels[None, :] < 24)" in cut and "state_scan" in cut
    assert "tl.trans" not in plain + cut  # miscompiled on Hopper where a tile lies in registers


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles")
def test_kernels_for_hopper_keep_their_state_in_registers() -> None:
    parts = recurrence("a decay a head", 4096, 128, 128, "bf16")
    for kernel in cross_compile_state(parts, choose_state_schedule(128, 2, SM_90), StateLayout((1, 2, 2), True), SM_90):
        results = 3 if kernel.name == "state_backward" else 1  # walks in one kernel
        assert kernel.fits and kernel.spills <= 32 * results, (kernel.name, kernel.registers, kernel.spills)


def test_a_backward_is_three_launches() -> None:
    parts = recurrence("a decay a token", 4096, 64, 40, "bf16")
    schedule = choose_state_schedule(64, 2, SM_90)
    whole = StateEmission(parts, schedule, StateLayout((1, 2, 2), True, of_decay=True))
    assert list(whole.forward) == ["state_segments", "state_scan", "state_outputs"]
    assert list(whole.backward) == ["state_backward_segments", "state_backward_scan", "state_backward"]
    keys = StateEmission(parts, schedule, StateLayout((1, 2, 2), True, roles=(KEYS,)))
    assert keys.backward["state_backward_segments"] == ("gradient_of_segments",)  # keys need no state of the forward
    assert "Totals + bh" in "".join(source for source in keys.sources() if "def gradient_of_segments" in source)
    assert not StateEmission(parts, schedule, StateLayout((1, 2, 2), True, roles=())).backward


def test_a_logarithm_is_read_where_it_lies() -> None:
    """A number times one read is loaded by kernels; the number is in the source."""
    source = state_source(recurrence("a decay a head", 300, 64, 64, "bf16"), SM_90)
    assert "tl.load(LogDecay + b * stride_log_b + h * stride_log_h).to(tl.float32) * -1.0, -120.0" in source
    source = state_source(recurrence("a decay a token, laid out by tokens", 300, 64, 64, "bf16"), SM_90)
    assert "stride_log_row, mask=inside, other=0.0).to(tl.float32) * 0.5" in source


@pytest.mark.parametrize(("n", "heads"), [(1, 1), (512, 16), (2048, 128), (16384, 16), (1 << 20, 16), (5000, 1)])
def test_segments_fill_the_device(n: int, heads: int) -> None:
    steps = segment_length(n, heads, 2, SM_90)
    programs = 2 * heads * -(-n // steps)
    assert steps % 128 == 0 and (n > 512 or steps >= n)
    assert programs <= max(2 * SM_90.multiprocessors, 2 * heads) and (n < 4096 or programs >= min(200, n // 64))
