"""What the emitted source holds, and which programs have none."""

import re
from dataclasses import replace

import pytest

from attncompiler.codegen.cross_compile import cross_compile
from attncompiler.codegen.emission import ByList, Layout, backward_kernels
from attncompiler.codegen.emit import emit
from attncompiler.codegen.plan_kernel import emit_plan
from attncompiler.errors import UnsupportedProgram
from attncompiler.ir import Attention, parse, verify
from attncompiler.ir.text import to_text
from attncompiler.passes.compact_rows import compact_rows
from attncompiler.tuning.schedule import Schedule, choose_schedule, for_mask
from attncompiler.tuning.target import TARGETS, Target
from tests.codegen.write_golden import golden_path, golden_source, program
from tests.runtime.test_routed import routed_program


def source(p: Attention, wanted: str = "qkv") -> str:
    return emit(p, choose_schedule(p, TARGETS["sm_80"]), Layout((1, 2, 2), frozenset(wanted)))


def test_no_register_tile_is_transposed_into_a_product() -> None:
    """Triton 3.4 to 3.7.0 miscompiles that on Hopper: wrong dK and dV without an error."""
    text = source(program())
    assert "tl.dot(tl.trans(" not in text
    assert "tl.trans(p" not in text and "tl.trans(ds" not in text


def test_gradients_are_deterministic() -> None:
    assert "atomic" not in source(program())


def test_header_names_the_line_and_the_program() -> None:
    assert source(program()).startswith("# Attention for model.py:41. Visits the tiles that hold a pair with: kv_idx <= q_idx.")


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_the_generated_file_is_the_reviewed_one(target: str) -> None:
    """Kernels are read by people: look at what changed, then `python -m tests.codegen.write_golden`."""
    assert golden_source(target) == golden_path(target).read_text()


def test_no_backward_where_none_is_wanted() -> None:
    assert "backward" not in source(program(), "")


def test_delta_has_a_kernel_of_its_own_where_that_for_queries_can_not_make_it() -> None:
    hopper, program_ = TARGETS["sm_90"], program()
    with_roles = choose_schedule(program_, hopper, True)
    few = choose_schedule(program_, hopper, True, few_queries=True)
    assert backward_kernels(program_, with_roles, frozenset("qkv")) == ["attention_backward_queries", "attention_backward_keys"]
    assert backward_kernels(program_, with_roles, frozenset("kv")) == ["attention_delta", "attention_backward_keys"]
    assert backward_kernels(program_, few, frozenset("qkv"))[0] == "attention_delta"
    assert backward_kernels(program_, with_roles, frozenset()) == []


def test_only_the_key_side_is_made_for_frozen_queries() -> None:
    text = source(program(), "kv")
    assert "attention_backward_keys" in text and "attention_backward_queries" not in text


@pytest.mark.parametrize(("dtype", "d"), [("f64", 64), ("bf16", 513)])
def test_unsupported_programs_say_why(dtype: str, d: int) -> None:
    with pytest.raises(UnsupportedProgram):
        source(program(dtype, d))


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_kernels_compile_and_fit_every_target(target: Target, dtype: str) -> None:
    for d in (64, 128):
        p = program(dtype, d)
        kernels = cross_compile(p, choose_schedule(p, target, target.descriptors), Layout.of((1, 2, 2), frozenset("qkv")), target)
        hopper = target.name == "sm_90" and dtype == "bf16"  # there the kernel for queries makes delta
        delta = set() if hopper else {"attention_delta"}
        assert {k.name for k in kernels} == {"attention_forward", "attention_backward_queries", "attention_backward_keys"} | delta
        for kernel in kernels:
            assert kernel.assembly and kernel.fits, f"{kernel.name} needs {kernel.shared} bytes of shared memory on {target.name}"
            assert kernel.spills <= 512, f"{kernel.name} at {dtype} D{d} spills {kernel.spills} bytes on {target.name}"


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("name", ["window", "documents"])
def test_kernels_of_rows_by_list_compile_and_fit(name: str, d: int) -> None:
    """Also where few bytes of shared memory are left: what the groups are handed lies there too."""
    p = compact_rows(routed_program(name, "gated", 600, 700, d, d, "bf16"), True).program
    layout = Layout(
        (1, 2, 2), frozenset(("q_rows", "k", "v")), described=frozenset(("q_rows", "k", "v")), by_list=ByList(True, True)
    )
    kernels = cross_compile(p, choose_schedule(p, TARGETS["sm_90"], True), layout, TARGETS["sm_90"])
    forward = next(kernel for kernel in kernels if kernel.name == "attention_forward")
    assert "cp.async.cg.shared.global" in forward.assembly and "cp.async.bulk" in forward.assembly
    for kernel in kernels:
        assert kernel.fits, f"{kernel.name} needs {kernel.shared} bytes of shared memory"
        assert kernel.spills <= 512, f"{kernel.name} spills {kernel.spills} bytes"


@pytest.mark.parametrize("keep", ["kv_idx <= q_idx", "doc[q_idx] == doc[kv_idx]"])
@pytest.mark.parametrize("side", ["keys", "queries"])
def test_each_slot_of_a_ring_is_arrived_at_as_often(keep: str, side: str) -> None:
    """Q, dO and O come through the ring of tiles: without the arrivals of what is copied beside tiles, groups would wait for ever."""
    text = to_text(program()).replace("kv_idx <= q_idx", keep)
    p = verify(parse(re.sub(r"(\n *read [^\n]*)", r"\1, doc: i32[256]", text, count=1) if "doc" in keep else text))
    emitted = emit(p, choose_schedule(p, TARGETS["sm_90"], True), Layout((1, 2, 2), frozenset("qkv"), True, frozenset("qkv")))
    begin, end = emitted.index(f"def _load_{side}("), emitted.index(f"def _rows_{side}(")
    loads, kernel = emitted[begin:end], emitted[emitted.index(f"def attention_backward_{side}(") :]
    tiles = loads.count("mbarrier.expect(ready.index(slot)")
    assert tiles == (4 if side == "queries" else 1) == loads.count("mbarrier.arrive(ready.index(slot))")
    copied = side == "keys" or "doc" in keep
    assert loads.count("mbarrier_arrive(ready.index(slot)") == tiles * copied
    assert f"mbarrier.init(ready.index(i), count={34 if copied else 2})" in kernel


def documents(keep: str, reads: str, score: str) -> Attention:
    return verify(
        parse(f"""attention
      axes b=2, h=8, q_idx=1024, kv_idx=1024
      read q: bf16[2, 8, 1024, 128], k: bf16[2, 2, 1024, 128], v: bf16[2, 2, 1024, 128], {reads}
      score dot(q[b, h, q_idx], k[b, h // 4, kv_idx]){score}
      keep {keep} else zero
      weigh softmax
      sum v[b, h // 4, kv_idx]""")
    )


@pytest.mark.parametrize("described", ["qk", "qkv"])
@pytest.mark.parametrize("bias", ["", "bias[kv_idx]", "bias[b, h, kv_idx]"])
@pytest.mark.parametrize("in_grid", [False, True])
def test_what_is_brought_leaves_the_kernel_for_keys_its_shared_memory(in_grid: bool, bias: str, described: str) -> None:
    """What a mask reads of tokens comes beside tiles only where its ring, and all that the groups are handed, fits."""
    y = "(kv_idx // 32 >= q_idx // 32 - 3) & (kv_idx // 32 <= q_idx // 32 + 3)"
    x = "(kv_idx % 32 >= q_idx % 32 - 5) & (kv_idx % 32 <= q_idx % 32 + 5)"
    keep, target = f"{y} & {x}" if in_grid else "(kv_idx <= q_idx)", TARGETS["sm_90"]
    sizes = ", ".join(str({"b": 2, "h": 8}.get(axis, 1024)) for axis in bias[5:-1].split(", "))
    for ids, reads in (("ids[{}]", "ids: i32[1024]"), ("ids[b, {}]", "ids: i32[2, 1024]")):
        same = f"{ids.format('kv_idx')} == {ids.format('q_idx')}"
        added = (f"{reads}, bias: f32[{sizes}]", f" + {bias}") if bias else (reads, "")
        p = documents(f"{keep} & ({same})", *added)
        layout = Layout((1, 4, 4), frozenset(("q", "k", "v", "bias") if bias else "qkv"), True, frozenset(described))
        schedule = for_mask(choose_schedule(p, target, True), p, {})
        (kernel,) = cross_compile(p, schedule, layout, target, ["attention_backward_keys"])
        assert kernel.fits, f"{kernel.name} needs {kernel.shared} bytes of shared memory"


def test_tensors_may_be_called_as_what_kernels_have() -> None:
    """Kernels have parameters of their own, and the user's name of a tensor is kept."""
    names = ["work", "queue", "queue_ids", "index", "place", "count", "gain", "summed", "order", "full_ids", "windows", "lse"]
    added = ", ".join(f"{name}: i32[256]" for name in names)
    kept = " & ".join(f"({name}[q_idx] <= kv_idx)" for name in names)
    text = to_text(program()).replace("kv_idx <= q_idx else nan", f"{kept} else zero")
    p = verify(parse("\n".join(line + (f", {added}" if line.strip().startswith("read") else "") for line in text.splitlines())))
    layout = Layout.of((1, 2, 2), frozenset("qkv"))
    assert len(cross_compile(p, choose_schedule(p, TARGETS["sm_90"], True), layout, TARGETS["sm_90"])) == 3
    compile(emit_plan(p, "q_idx", {"q_idx": 128, "kv_idx": 128}, is_long=False).source, "plan", "exec")


def longest_chain(ptx: str) -> int:
    """The most multiply-adds of which each adds to the last."""
    length: dict[str, int] = {}
    for result, added in re.findall(r"fma\.rn\.f32\s+(%\w+), \S+ \S+ (\S+);", ptx):
        length[result] = length.get(added, 0) + 1
    return max(length.values())


def few_queries(p: Attention, target: Target) -> Schedule:
    return choose_schedule(p, target, target.descriptors, few_queries=True)


@pytest.mark.parametrize(("dtype", "d"), [("bf16", 128), ("f32", 80), ("f32", 256)])
@pytest.mark.parametrize("target", [TARGETS["sm_80"], TARGETS["sm_90"], TARGETS["gfx942"]], ids=lambda target: target.name)
def test_few_queries_sum_in_short_chains_without_spills(target: Target, dtype: str, d: int) -> None:
    """In the machine's own code, since Triton makes one chain of a product and what it is added to."""
    p = program(dtype, d)
    for kernel in cross_compile(p, few_queries(p, target), Layout((1, 2, 2), frozenset("qkv")), target):
        assert kernel.fits
        assert kernel.spills <= 64, f"{kernel.name} spills {kernel.spills} bytes"
        if dtype == "f32" and target.backend == "cuda":
            assert longest_chain(kernel.assembly) <= 33  # 32, and the rescaled accumulator


@pytest.mark.parametrize(("field", "value"), [("float32", "ieee"), ("delta_over_keys", False)])
def test_schedule_fields_change_the_kernels(field: str, value: object) -> None:
    p = program("f32")
    schedule = few_queries(p, TARGETS["sm_90"])
    layout = Layout((1, 2, 2), frozenset("qkv"))
    assert emit(p, replace(schedule, **{field: value}), layout) != emit(p, schedule, layout)  # type: ignore[arg-type]
