"""Compile the kernels of a recurrence for any target, with no device."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from attncompiler.codegen.cross_compile import CompiledKernel, compiled_kernel
from attncompiler.codegen.emit_state import StateEmission, emit_state
from attncompiler.codegen.kernel_module import load_module
from attncompiler.codegen.recurrence import Recurrence
from attncompiler.codegen.state_layout import StateLayout
from attncompiler.errors import OptionError
from attncompiler.ir.program import Dtype
from attncompiler.tuning.state_schedule import StateSchedule
from attncompiler.tuning.target import Target

_ELEMENT = {Dtype.F32: "fp32", Dtype.BF16: "bf16", Dtype.F16: "fp16"}
_OPERANDS = frozenset({"Q", "K", "V", "O", "DO", "DQ", "DK", "DV"})


def cross_compile_state(
    recurrence: Recurrence, schedule: StateSchedule, layout: StateLayout, target: Target, names: Iterable[str] | None = None
) -> list[CompiledKernel]:
    """The kernels of a recurrence, for operands whose channels lie dense: all, or those of these names. Raises: UnsupportedProgram;
    OptionError under TRITON_INTERPRET=1."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise OptionError("kernels can't be compiled while TRITON_INTERPRET=1", do="unset it")
    from triton.compiler import ASTSource

    module = load_module(emit_state(recurrence, schedule, layout))
    emission = StateEmission(recurrence, schedule, layout)
    element = _ELEMENT[recurrence.program.decls[recurrence.query.tensor].dtype]
    found = []
    kernels = {**emission.forward, **emission.backward}
    for name in kernels if names is None else names:
        function: Any = getattr(module, name)
        kernel = emission.schedule_of(name)
        tiles = {"BLOCK_N": kernel.block_n, "BLOCK_Z": emission.block_z(emission.sliced(kernels[name][0]), kernel)}
        constants: dict[str, Any] = {n: tiles[n] for n in function.arg_names if n in tiles}
        constants |= {n: 1 for n in function.arg_names if n.endswith("_channel")}
        types = {n: _type(n, element) for n in function.arg_names} | dict.fromkeys(constants, "constexpr")
        aligned = (n for n in function.arg_names if types[n].startswith("*") or n.startswith("stride_"))
        divisible = {(function.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned if types[n] != "constexpr"}
        source = ASTSource(function, types, {(function.arg_names.index(n),): v for n, v in constants.items()}, attrs=divisible)
        stages = kernel.num_stages if target.backend == "cuda" else 1
        found.append(compiled_kernel(name, source, {"num_warps": kernel.num_warps, "num_stages": stages}, target))
    return found


def _type(name: str, element: str) -> str:
    if name in _OPERANDS:
        return f"*{element}"
    if name[0].isupper() and not name.isupper():
        return "*fp64" if name == "Totals" else "*fp32"
    return "i32"
