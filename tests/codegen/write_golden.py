"""The reviewed kernels of one program, and how they are written anew: `python -m tests.codegen.write_golden`."""

from __future__ import annotations

from pathlib import Path

from attncompiler.codegen.emission import Layout
from attncompiler.codegen.emit import emit
from attncompiler.ir import Attention, parse, verify
from attncompiler.tuning.schedule import choose_schedule
from attncompiler.tuning.target import TARGETS


def program(dtype: str = "bf16", d: int = 64, keep: str = "kv_idx <= q_idx else nan") -> Attention:
    text = f"""attention  # model.py:41
      axes b=2, h=4, q_idx=256, kv_idx=256
      read q: {dtype}[2, 4, 256, {d}], k: {dtype}[2, 2, 256, {d}], v: {dtype}[2, 2, 256, {d}]
      score dot(q[b, h, q_idx], k[b, h // 2, kv_idx]) * 0.125
      keep {keep}
      weigh softmax
      sum v[b, h // 2, kv_idx]
    """
    return verify(parse(text))


def golden_path(target: str) -> Path:
    return Path(__file__).parent / "golden" / f"causal_bf16_{target}.py.txt"


def golden_source(target: str) -> str:
    """Causal grouped-query attention in bfloat16 with 64 channels."""
    p = program()
    chosen = TARGETS[target]
    return emit(p, choose_schedule(p, chosen, chosen.descriptors), Layout.of((1, 2, 2), frozenset("qkv")))


if __name__ == "__main__":
    for name in ("sm_80", "sm_90"):
        golden_path(name).parent.mkdir(exist_ok=True)
        golden_path(name).write_text(golden_source(name))
        print(f"wrote {golden_path(name)}")
