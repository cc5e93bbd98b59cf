"""What a masked tile keeps, as bits of the columns of each thread: the emitted source against the mask, pair by pair."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from attncompiler.codegen.cross_compile import cross_compile
from attncompiler.codegen.emission import Emission, Layout
from attncompiler.codegen.emit_backward import KEYS
from attncompiler.codegen.kept_bits import Columns, are_bits, bit, bits
from attncompiler.codegen.kept_scores import kept_scores
from attncompiler.codegen.triton_expr import HELPERS
from attncompiler.ir import Attention, parse, verify
from attncompiler.ir.evaluate import whole
from attncompiler.ir.expr import KV_IDX, Q_IDX, with_axis_alone
from attncompiler.templates import hopper_forward
from attncompiler.tuning.schedule import choose_schedule, for_mask
from attncompiler.tuning.target import TARGETS

TOKENS = 640
LAST = [int(end) for end in torch.randint(-5, TOKENS + 5, (TOKENS,), generator=torch.Generator().manual_seed(0))]
LAST[:4] = [2**31 - 1, -(2**31), 2**31 - 2, 0]

KEPT = {
    "causal": "kv_idx <= q_idx",
    "window": "(kv_idx <= q_idx) & (q_idx - kv_idx < 100)",
    "a window that nothing can leave": "(kv_idx >= q_idx - 1073741823) & (kv_idx < q_idx + 3)",
    "sink": "(kv_idx <= q_idx) & ((kv_idx >= q_idx - 70) | (kv_idx < 20))",
    "all but oneself": "~(kv_idx == q_idx) & (kv_idx != 7)",
    "a length for each query": "kv_idx <= last[q_idx]",
    "blocks": "(kv_idx <= q_idx) & ((kv_idx // 128 >= q_idx // 64 - 1) | ((kv_idx // 128 + h) % 3 == 0))",
    # No words: a block of another start than a tile's, an end that 32 bits may not hold.
    "blocks counted from behind": "(kv_idx // -128 >= q_idx // -128) & (kv_idx <= q_idx)",
    "a window too wide to add": "(kv_idx <= q_idx) & ((q_idx - kv_idx < 2147483647) | (kv_idx < 4))",
}  # fmt: skip
LEFT = ["blocks counted from behind", "a window too wide to add"]


def _emission(keep: str) -> Emission:
    vectors = ", ".join(f"{name}: bf16[1, 2, {TOKENS}, 128]" for name in "qkv")
    p: Attention = verify(
        parse(f"""attention
      axes b=1, h=2, q_idx={TOKENS}, kv_idx={TOKENS}
      read {vectors}{f", last: i32[{TOKENS}]" if "last" in keep else ""}
      score dot(q[b, h, q_idx], k[b, h, kv_idx])
      keep {keep} else zero
      weigh softmax
      sum v[b, h, kv_idx]""")
    )
    schedule = for_mask(choose_schedule(p, TARGETS["sm_90"], descriptors=True), p, {})
    return Emission(p, schedule, Layout((1, 1, 1), frozenset("qkv")))


def _run(lines: str, helpers: set[str], scope: dict[str, Any]) -> dict[str, Any]:
    """The source over tensors of torch, the one instruction in it as PTX describes it."""

    def clamp(name: str) -> Any:
        return lambda *args: getattr(torch, name)(*(torch.as_tensor(arg, dtype=torch.int32) for arg in args))

    def bmsk(_: str, __: str, args: list[Tensor], **___: object) -> Tensor:
        return ((1 << args[0].clamp(0, 32).long()) - 1).to(torch.int32)

    scope |= {
        "triton": SimpleNamespace(jit=lambda function: function),
        "tl": SimpleNamespace(minimum=clamp("minimum"), maximum=clamp("maximum"), where=torch.where, constexpr=int,
                              int32=torch.int32, inline_asm_elementwise=bmsk),
        "floor_div": lambda a, b: a // b, "floor_mod": lambda a, b: a % b,
    }  # fmt: skip
    for helper in helpers - {"floor_div", "floor_mod"}:
        exec(HELPERS[helper], scope)
    exec(lines, scope)
    return scope


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", KEPT)
def test_words_say_what_the_mask_keeps(name: str, transposed: bool) -> None:
    e = _emission(KEPT[name])
    names = e.names(KEYS if transposed else "attention_forward", frozenset())
    axis, stays, width = (Q_IDX, KV_IDX, 64) if transposed else (KV_IDX, Q_IDX, 128)
    columns = Columns(axis, "start", f"within{names.along(axis.name)}", width)
    test = columns.alike(with_axis_alone(e.program.keep.predicate, axis))
    if name in LEFT or (transposed and name == "a length for each query"):  # what a column is compared with is its own
        assert not are_bits(test, axis, e)
        return
    assert are_bits(test, axis, e)
    word = bits(test, columns, names)
    loads = [line.split(" = ")[0] for line in names.lines]
    extents = {"b": 1, "h": 2, "q_idx": TOKENS, "kv_idx": TOKENS}
    block = whole({"last": torch.tensor(LAST)}, {}, extents, torch.float64, torch.device("cpu"))
    exact = block.tensor(e.program.keep.predicate).expand(1, 2, TOKENS, TOKENS)[0, 1]
    for start in range(0, TOKENS, width):
        scope: dict[str, Any] = {
            "within": torch.arange(width, dtype=torch.int32), "start": torch.tensor(start, dtype=torch.int32), "h": torch.tensor(1),
            stays.name: torch.arange(TOKENS, dtype=torch.int32),
            **{load: torch.tensor(LAST, dtype=torch.int32)[:, None] for load in loads},
        }  # fmt: skip
        made = _run(f"kept = ({word}) & {bit(columns, names)}", e.helpers, scope)["kept"] != 0
        of_tile = exact.T[:, start : start + width] if transposed else exact[:, start : start + width]
        assert torch.equal(made.expand(of_tile.shape), of_tile)


def test_the_assembler_reads_several_bits_at_once() -> None:
    e = _emission(KEPT["window"])
    (kernel,) = cross_compile(e.program, e.schedule, e.layout, TARGETS["sm_90"], ["attention_forward"])
    assert kernel.sass().count("R2P") >= 2 * 2 * 10  # groups, loops of tiles, and 64 pairs a thread by 7


def test_a_pair_without_a_second_tile_reads_the_first_ones_keys_again() -> None:
    """-1 is no tile: what a score reads of each key would lie before its tensor."""
    scope: dict[str, Any] = {"second": torch.tensor(-1), "tile": torch.tensor(3), "keys": torch.arange(128), "gl": torch}
    lines = hopper_forward.PAIR_POSITIONS.strip().splitlines()
    assert lines[0].startswith("second = ")
    exec("\n".join(lines[1:]).replace("{half}", "64"), scope)
    assert scope["kv_idx"].tolist() == [*range(192, 256)] * 2


def test_documents_are_compared_one_by_one_and_their_end_beside_them() -> None:
    """Bits would save the end no instruction where another test of each pair is left."""
    keep = "(kv_idx <= q_idx) & (last[kv_idx] == last[q_idx])"
    e = _emission(keep)
    line = kept_scores(e, e.names("attention_forward", frozenset()), "attention_forward", "keys")
    assert "bits_before" not in line and line.count("setp") == 2
    with_a_sink = _emission(keep.replace("(kv_idx <= q_idx)", KEPT["sink"]))
    line = kept_scores(with_a_sink, with_a_sink.names("attention_forward", frozenset()), "attention_forward", "keys")
    assert "bits_before" in line and "where" not in line and line.count("setp") == 2
