"""Compile emitted kernels for any target, with no device: machine code, registers, spills, shared memory, and whether they fit."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from attncompiler.codegen.emission import Emission, Layout, backward_kernels
from attncompiler.codegen.emit import emit
from attncompiler.codegen.hopper import REGISTERS, shared_layout
from attncompiler.codegen.triton_expr import TABLES, pointer_name, stride_name
from attncompiler.errors import OptionError
from attncompiler.ir.program import Attention, Dtype
from attncompiler.tuning.schedule import KernelSchedule, Schedule
from attncompiler.tuning.target import Target


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel for one target. `registers` and `spills` (bytes) are 0 where the target's assembler does not tell."""

    name: str
    target: Target
    assembly: str  # PTX or AMDGCN
    machine_code: bytes
    registers: int
    spills: int
    shared: int

    @property
    def fits(self) -> bool:
        return self.shared <= self.target.shared_memory

    def sass(self, encodings: bool = False) -> str:
        """Disassembly of the machine code ("" for AMD: the assembly is that already), with the bits of instructions if `encodings`."""
        arguments = ("-c", "-hex") if encodings else ("-c",)
        return _tool("nvdisasm", self.machine_code, arguments) if self.target.backend == "cuda" else ""


def kernels_of(program: Attention, schedule: Schedule, layout: Layout) -> dict[str, KernelSchedule]:
    """The kernels of a program, by name."""
    found = {"attention_forward": schedule.forward}
    for name in backward_kernels(program, schedule, layout.wanted):
        found[name] = schedule.of(name)
    return found


def cross_compile(
    program: Attention, schedule: Schedule, layout: Layout, target: Target, names: Iterable[str] | None = None
) -> list[CompiledKernel]:
    """The kernels of a program for a target: all, or those of these names. Raises: UnsupportedProgram; OptionError under
    TRITON_INTERPRET=1."""
    from attncompiler.codegen.kernel_module import load_module

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise OptionError("kernels can't be compiled while TRITON_INTERPRET=1", do="unset it")
    module = load_module(emit(program, schedule, layout))
    emission = Emission(program, schedule, layout)
    kernels = kernels_of(program, schedule, layout)
    return [_compile(module, name, kernels[name], emission, target) for name in (kernels if names is None else names)]


_TYPES = {
    Dtype.F64: "fp64", Dtype.F32: "fp32", Dtype.BF16: "bf16", Dtype.F16: "fp16", Dtype.BOOL: "u8", Dtype.U8: "u8", Dtype.I8: "i8",
    Dtype.I16: "i16", Dtype.I32: "i32", Dtype.I64: "i64",
}  # fmt: skip


_TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _signature(kernel: str, names: list[str], emission: Emission) -> dict[str, str]:
    """Triton's type of every parameter, by its name."""
    program = emission.program
    pointers = {pointer_name(d.name): f"*{_TYPES[d.dtype]}" for d in program.tensors}
    value = _TYPES[program.value.dtype]
    pointers |= dict.fromkeys(("O", "DO", "Summed", "Gain"), f"*{value}")
    pointers |= dict.fromkeys(("Lse", "Rcp", "Reference", "Delta", "DLse"), "*fp32")
    pointers |= {f"Grad_{v.name}": f"*{_TYPES[program.decls[v.name].dtype]}" for v in emission.vectors.values()}
    found = {}
    for name in names:
        table = name in TABLES | {"Windows", "Index", "Count"} and not name.endswith("_ranges")
        if name.startswith("BLOCK_"):
            found[name] = "constexpr"
        elif block := emission.descriptor_block(kernel, name):
            element = pointers[name].removeprefix("*")
            layout = f",{shared_layout(block, _TORCH[element])!r}" if emission.has_warp_roles(kernel) else ""
            found[name] = f"tensordesc<{element}[{', '.join(map(str, block))}]{layout}>"
        else:
            found[name] = pointers.get(name, "*i32" if table else "*fp32" if name.startswith("Grad_") else "i32")
    return found


def _compile(module: ModuleType, name: str, schedule: KernelSchedule, emission: Emission, target: Target) -> CompiledKernel:
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    function: Any = getattr(module, name)
    signature = _signature(name, function.arg_names, emission)
    last = {stride_name(d.name, len(d.shape) - 1) for d in emission.program.tensors}
    unit = [n for n in function.arg_names if n.endswith("_channel") or n in last]  # contiguous, as nearly always
    constants: dict[str, Any] = dict.fromkeys(unit, 1) | {
        n: v for n, v in (("BLOCK_M", schedule.block_m), ("BLOCK_N", schedule.block_n)) if n in signature
    }
    signature |= dict.fromkeys(constants, "constexpr")
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(function.arg_names)
        if signature[n].startswith("*") or (n.startswith("stride_") and signature[n] == "i32")
    }
    constexprs = {(function.arg_names.index(n),): v for n, v in constants.items()}
    if emission.has_warp_roles(name):
        source = GluonASTSource(function, signature, constexprs, attrs=divisible)
        options = {"num_warps": schedule.num_warps, "maxnreg": REGISTERS}
    else:
        source = ASTSource(function, signature, constexprs, attrs=divisible)
        options = {"num_warps": schedule.num_warps, "num_stages": schedule.num_stages if target.backend == "cuda" else 1}
    return compiled_kernel(name, source, options, target)


def compiled_kernel(name: str, source: Any, options: Mapping[str, Any], target: Target) -> CompiledKernel:
    """A kernel, as Triton's ASTSource, for a target."""
    import triton
    from triton.backends.compiler import GPUTarget

    compiled = triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp_size), options=dict(options))
    binary = compiled.asm["cubin" if target.backend == "cuda" else "hsaco"]
    assembly = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    registers, spills = _resources(binary, assembly, target)
    return CompiledKernel(name, target, assembly, binary, registers, spills, int(compiled.metadata.shared))


def _resources(binary: bytes, assembly: str, target: Target) -> tuple[int, int]:
    if target.backend == "cuda":
        usage = _tool("cuobjdump", binary, ("-res-usage",))
        registers = re.search(r"REG:(\d+)", usage)
        stack = re.search(r"STACK:(\d+)", usage)
        local = re.search(r"LOCAL:(\d+)", usage)
        spills = max(int(m.group(1)) if m else 0 for m in (stack, local))
        return int(registers.group(1)) if registers else 0, spills
    vgprs = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    return int(vgprs.group(1)) if vgprs else 0, int(scratch.group(1)) if scratch else 0


def _tool(name: str, binary: bytes, arguments: tuple[str, ...]) -> str:
    """Run one of the CUDA tools that Triton's wheel carries."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        done = subprocess.run([str(path), *arguments, file.name], capture_output=True, text=True, check=False)
    return done.stdout
