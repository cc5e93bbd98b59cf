"""One kernel, ready to launch: descriptors, arguments, and the short way past Triton's own look at them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.experimental.gluon.nvidia import hopper as gluon_hopper
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from attncompiler.codegen.emission import Emission
from attncompiler.codegen.hopper import REGISTERS, shared_layout
from attncompiler.errors import UnsupportedProgram
from attncompiler.tuning.schedule import KernelSchedule, triton_is_checked

Constants = Mapping[str, Any]
_NO_PLAN: Constants = {}


def describable(tensor: Tensor) -> bool:
    """True where a TMA descriptor can show a tensor: aligned, dense channels, no broadcast."""
    step = tensor.element_size()
    sides = zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    return (
        tensor.stride(3) == 1
        and tensor.data_ptr() % 16 == 0
        and all(size == 1 or (stride > 0 and stride * step % 16 == 0) for size, stride in sides)
        and min(tensor.shape) > 0
    )


def in_grid(shape: Sequence[int], strides: Sequence[int], lengths: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """The shape and strides of [b, h, tokens, channels] with its tokens in a grid of two or three axes. TMA knows five dimensions:
    beside three axes, batch and head are one. Raises: UnsupportedProgram where they can't be."""
    if not lengths:
        return list(shape), list(strides)
    (b, h, _, d), (of_b, of_h, of_token, of_d) = shape, strides
    outer = [(b, of_b), (h, of_h)]
    if len(lengths) == 3:
        if b > 1 and h > 1 and of_b != h * of_h:
            raise UnsupportedProgram("batches and heads of a tensor don't lie as one axis")
        outer = [(b * h, of_h if h > 1 else of_b)]
    inner = [of_token * math.prod(lengths[place + 1 :]) for place in range(len(lengths))]
    sizes = [*(size for size, _ in outer), *lengths, d]
    return sizes, [*(stride for _, stride in outer), *inner, of_d]


def _descriptor(tensor: Tensor, shape: list[int], strides: list[int], block: tuple[int, ...], gluon: bool) -> TensorDescriptor:
    step = 16 // tensor.element_size()
    strides = [stride if size > 1 else max(stride, step) // step * step for size, stride in zip(shape, strides, strict=True)]
    strides[-1] = 1
    if gluon:
        return gluon_hopper.TensorDescriptor(tensor, shape, strides, list(block), shared_layout(block, tensor.dtype))
    return TensorDescriptor(tensor, shape, strides, list(block))


class Launch:
    """One kernel with everything filled in but its pointers."""

    def __init__(
        self, kernel: Any, name: str, grid: tuple[int, ...], constants: Constants, tensors: Mapping[str, Tensor],
        schedule: KernelSchedule, emission: Emission | None, shown: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """`shown`: the vectors of the operands as [b, h, tokens, channels], by the names that kernels give them; what is not in it
        lies so itself."""
        values = {**constants, "BLOCK_M": schedule.block_m, "BLOCK_N": schedule.block_n}
        self._kernel = kernel[grid]
        self._grid = (*grid, *(1,) * (3 - len(grid)))
        self._compiled: Any = None
        self._addresses: list[Any] | None = None
        self._arguments = [values.get(name) for name in kernel.arg_names]
        self._pointers: list[tuple[int, str]] = []
        self._descriptors: list[tuple[int, str, dict[str, Any]]] = []
        gluon = emission is not None and emission.has_warp_roles(name)
        self._options = {
            "num_warps": schedule.num_warps,
            **({"maxnreg": REGISTERS} if gluon else {"num_stages": schedule.num_stages}),
        }
        self._descriptor_type = gluon_hopper.TensorDescriptor if gluon else TensorDescriptor
        for place, parameter in enumerate(kernel.arg_names):
            if parameter in values:
                continue
            block = emission.descriptor_block(name, parameter) if emission is not None else None
            if block is None:
                self._pointers.append((place, parameter))
            else:
                view = shown.get(parameter, tensors[parameter])
                shape, strides = in_grid(view.shape, view.stride(), tuple(axis.length for axis in schedule.tiles.axes))
                made = _descriptor(tensors[parameter], shape, strides, block, gluon)
                self._descriptors.append((place, parameter, dict(vars(made))))

    def __call__(self, tensors: Mapping[str, Tensor], plan: Constants = _NO_PLAN) -> None:
        """Launch with the tensors of a call; those of `plan` come first."""
        if self._addresses is None or not self._relaunched(self._addresses.copy(), tensors, plan):
            arguments = self._filled(tensors, plan)
            compiled = self._kernel(*arguments, **self._options)
            if self._compiled is None:
                self._remember(compiled, arguments)

    def frozen(self, tensors: Mapping[str, Tensor]) -> Callable[[], object]:
        """Triton's own launch of these very tensors: what host time is compared with."""
        return functools.partial(self._kernel, *self._filled(tensors, _NO_PLAN), **self._options)

    def _filled(self, tensors: Mapping[str, Tensor], plan: Constants) -> list[Any]:
        arguments = self._arguments.copy()
        for place, name in self._pointers:
            arguments[place] = plan[name] if name in plan else tensors[name]
        self._describe(arguments, tensors)
        return arguments

    def _describe(self, arguments: list[Any], tensors: Mapping[str, Tensor]) -> None:
        for place, name, fields in self._descriptors:
            descriptor = object.__new__(self._descriptor_type)  # its checks were made for the first of these
            descriptor.__dict__.update(fields, base=tensors[name])
            arguments[place] = descriptor

    def _remember(self, compiled: Any, arguments: Sequence[Any]) -> None:
        """Triton looks at the type, value and alignment of every argument, which takes longer than all else here. All but the
        addresses are those of the first call, so if these are aligned, the kernel that it found then serves."""
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        self._compiled, self._device = compiled, tensors[0].device
        if self._device.type == "cuda" and not torch.version.hip and triton_is_checked() and not _misaligned(tensors):
            self._addresses = [x.data_ptr() if isinstance(x, Tensor) else x for x in self._arguments]

    def _relaunched(self, arguments: list[Any], tensors: Mapping[str, Tensor], plan: Constants) -> bool:
        """Launch what was compiled before. False, and nothing is done, for other alignments, or where someone watches launches."""
        bits = 0
        for place, name in self._pointers:
            address = (plan[name] if name in plan else tensors[name]).data_ptr()
            bits |= address
            arguments[place] = address
        if bits & 15 or knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls:
            return False
        self._describe(arguments, tensors)
        kernel, stream = self._compiled, driver.active.get_current_stream(self._device.index)
        kernel.run(*self._grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *arguments)
        return True


def _misaligned(tensors: Sequence[Tensor]) -> bool:
    return any(tensor.data_ptr() & 15 for tensor in tensors)
