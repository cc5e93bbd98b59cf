"""Where kernels put gradients, and how those become gradients of whole operands."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from attncompiler.codegen.emission import element_gradients, shared_heads, side_of
from attncompiler.codegen.vectors import VectorView, add_elements, vector_gradient, view_vectors
from attncompiler.ir.derivative import derivative
from attncompiler.ir.expr import Q_IDX, Const, Read, reads_of
from attncompiler.runtime.prepared import Prepared, row_axis


def room(device: torch.device) -> float:
    """Bytes that can still be allocated on a device, as far as is known."""
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else math.inf


def pair_bytes(call: Prepared) -> int:
    """The size of a buffer with one float32 for each (b, h, q_idx, kv_idx)."""
    return 4 * math.prod(call.extents.values())


class Gradients:
    """The buffers of one backward. `tensors` and `strides` go to the kernels under the names that these have."""

    def __init__(self, call: Prepared, operands: Mapping[str, Tensor], wanted: frozenset[str]) -> None:
        self.program, self.operands, self.wanted = call.program, operands, wanted
        self.block, self.extents = call.block(operands), call.extents
        self.views = call.views(operands)
        b, h, m, n = (self.extents[axis] for axis in ("b", "h", "q_idx", "kv_idx"))
        self.tensors: dict[str, Tensor] = {}
        self.strides: dict[str, int] = {}
        self._direct: dict[str, Tensor] = {}
        self._scattered: list[tuple[Read, Tensor]] = []
        self._elements: list[tuple[Read, Tensor]] = []
        group = shared_heads(self.program, call.groups)
        for read, view in self.views.items():
            if read.tensor in wanted:
                heads = h if row_axis(self.program, read) == Q_IDX else h // group
                place = self._vector(read, view, (b, heads, call.length(read)))
                self.tensors[f"Grad_{read.tensor}"] = place
                names = [f"stride_grad_{read.tensor}_{a}" for a in ("b", "h", "row", "channel")]
                self.strides |= dict(zip(names, place.stride(), strict=True))
        counts: dict[str, int] = {}
        for read in element_gradients(self.program, wanted):
            counts[read.tensor] = counts.get(read.tensor, 0) + 1
            tag = read.tensor if counts[read.tensor] == 1 else f"{read.tensor}_{counts[read.tensor]}"
            shape = {"pair": (b, h, m, n), "q": (b, h, m, 1), "kv": (b, h, 1, n)}[side_of(read)]
            self.tensors[f"Grad_{tag}"] = torch.zeros(shape, dtype=torch.float32, device=call.device)
            self._elements.append((read, self.tensors[f"Grad_{tag}"]))

    def _vector(self, read: Read, view: VectorView, shape: tuple[int, int, int]) -> Tensor:
        """The operand's own gradient where the kernel's [b, h / group, row, channel] is a view of it; else a buffer to add up."""
        operand = self.operands[read.tensor]
        if not view.gathered and tuple(view.tensor.shape[:3]) == shape and view.tensor.numel() == operand.numel():
            whole = torch.empty(operand.shape, dtype=operand.dtype, device=operand.device)
            self._direct[read.tensor] = whole
            return view_vectors(read, whole, row_axis(self.program, read), self.block).tensor
        buffer = torch.empty((*shape, view.tensor.shape[3]), dtype=torch.float32, device=operand.device)
        self._scattered.append((read, buffer))
        return buffer

    def finish(self, lse: Tensor, rcp: Tensor, delta: Tensor) -> dict[str, Tensor]:
        """The gradient of every wanted operand."""
        totals = {
            name: torch.zeros(self.operands[name].shape, dtype=torch.float32, device=lse.device)
            for name in self.wanted
            if name not in self._direct
        }
        b, h = self.extents["b"], self.extents["h"]
        for read, buffer in self._scattered:
            axis = row_axis(self.program, read)
            target = vector_gradient(read, self.views[read], totals[read.tensor], axis, self.block)
            if self.views[read].tensor.shape[2] == 1:
                buffer = buffer.sum(2, keepdim=True)
            shared = self.views[read].tensor.shape[1] == 1 and buffer.shape[1] > 1
            target.add(buffer.sum(1, keepdim=True) if shared else buffer, (0, b), (0, h), ((0, buffer.shape[2]),))
            target.scatter(self.block)
        for read, gradient in self._elements:
            add_elements(read, gradient, totals[read.tensor], self.block)
        self._extra_scores(totals, lse, rcp, delta)
        found = {name: total.to(self.operands[name].dtype) for name, total in totals.items()}
        return {**self._direct, **found}

    def _extra_scores(self, totals: Mapping[str, Tensor], lse: Tensor, rcp: Tensor, delta: Tensor) -> None:
        """d loss / d extra = -weight(extra) * delta for each row."""
        program, block = self.program, self.block
        for extra in program.weigh.extra:
            for read in dict.fromkeys(r for r in reads_of(extra) if r.tensor in totals):
                weight = torch.exp(block.tensor(extra) - lse.unsqueeze(3))
                weight = weight * rcp.unsqueeze(3) if program.has_rcp else weight
                slope = derivative(extra, read)
                factor = float(slope.value) if isinstance(slope, Const) else block.tensor(slope)
                add_elements(read, -weight * delta.unsqueeze(3) * factor, totals[read.tensor], block)
