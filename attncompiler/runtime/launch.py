"""One kernel, ready to launch: descriptors, arguments, and the short way past Triton's own look at them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.experimental.gluon.nvidia import hopper as gluon_hopper
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from attncompiler.codegen.emission import Emission
from attncompiler.codegen.emit_hopper import REGISTERS, shared_layout
from attncompiler.tuning.schedule import KernelSchedule, triton_is_checked

Constants = Mapping[str, Any]


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


def _descriptor(tensor: Tensor, block: tuple[int, ...], gluon: bool) -> TensorDescriptor:
    step = 16 // tensor.element_size()
    strides = [
        stride if size > 1 else max(stride, step) // step * step for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    strides[3] = 1
    if gluon:
        return gluon_hopper.TensorDescriptor(tensor, list(tensor.shape), strides, list(block), shared_layout(block, tensor.dtype))
    return TensorDescriptor(tensor, list(tensor.shape), strides, list(block))


class Launch:
    """One kernel with everything filled in but its pointers."""

    def __init__(
        self, kernel: Any, name: str, grid: tuple[int, int], constants: Constants, tensors: Mapping[str, Tensor],
        schedule: KernelSchedule, emission: Emission | None,
    ) -> None:  # fmt: skip
        values = {**constants, "BLOCK_M": schedule.block_m, "BLOCK_N": schedule.block_n}
        self._kernel = kernel[grid]
        self._grid = (*grid, 1)
        self._compiled: Any = None
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
                self._descriptors.append((place, parameter, dict(vars(_descriptor(tensors[parameter], block, gluon)))))

    def __call__(self, tensors: Mapping[str, Tensor], plan: Constants | None = None) -> None:
        """Launch. After the first time without Triton's own look at every argument, which takes longer than all else here."""
        arguments = self._filled(tensors, plan)
        if self._compiled is None:
            self._compiled = _Compiled.of(self._kernel(*arguments, **self._options), arguments)
        elif not self._compiled(self._grid, arguments):
            self._kernel(*arguments, **self._options)

    def frozen(self, tensors: Mapping[str, Tensor]) -> Callable[[], object]:
        """The launch of these very tensors and nothing else: what host time is compared with."""
        return functools.partial(self._kernel, *self._filled(tensors, None), **self._options)

    def _filled(self, tensors: Mapping[str, Tensor], plan: Constants | None) -> list[Any]:
        arguments = self._arguments.copy()
        for place, name in self._pointers:
            arguments[place] = tensors[name] if plan is None or name not in plan else plan[name]
        for place, name, fields in self._descriptors:
            descriptor = object.__new__(self._descriptor_type)  # its checks were made for the first of these
            descriptor.__dict__.update(fields, base=tensors[name])
            arguments[place] = descriptor
        return arguments


class _Compiled:
    """A kernel as Triton compiled it for arguments of these types, all aligned."""

    def __init__(self, kernel: Any, device: int) -> None:
        self._kernel, self._device = kernel, device
        self._hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook

    @classmethod
    def of(cls, kernel: Any, arguments: Sequence[Any]) -> Callable[[tuple[int, ...], list[Any]], bool]:
        """Raises nothing: where the launch can't be shortened, the result declines every call."""
        device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
        if device.type != "cuda" or torch.version.hip or not triton_is_checked() or _raw(arguments) is None:
            return lambda grid, arguments: False
        return cls(kernel, device.index)

    def __call__(self, grid: tuple[int, ...], arguments: list[Any]) -> bool:
        """Launch. False, and nothing is done, for arguments that it was not compiled for, or where someone watches launches."""
        raw = _raw(arguments)
        if raw is None or any(hook.calls for hook in self._hooks):
            return False
        kernel = self._kernel
        stream = driver.active.get_current_stream(self._device)
        kernel.run(*grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *raw)
        return True


def _raw(arguments: Sequence[Any]) -> list[Any] | None:
    """The arguments with addresses for tensors; None if one is not aligned."""
    raw = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    aligned = all(not address & 15 for address, argument in zip(raw, arguments, strict=True) if isinstance(argument, Tensor))
    return raw if aligned else None
