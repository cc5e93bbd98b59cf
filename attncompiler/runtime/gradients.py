"""Where kernels put gradients, and how those become gradients of whole operands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attncompiler.codegen.emission import backward_kernels, element_gradients, shared_heads, side_of
from attncompiler.codegen.vectors import Lines, add_elements, vector_gradient, view_vectors
from attncompiler.ir.derivative import derivative
from attncompiler.ir.evaluate import Block
from attncompiler.ir.expr import Q_IDX, Const, Read, reads_of
from attncompiler.runtime.launch import describable
from attncompiler.runtime.prepared import Prepared, Vectors
from attncompiler.runtime.scheduling import row_axis


def room(device: torch.device) -> float:
    """Bytes that can still be allocated on a device, as far as is known."""
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else math.inf


def pair_bytes(call: Prepared) -> int:
    """The size of a buffer with one float32 for each (b, h, q_idx, kv_idx)."""
    return 4 * math.prod(call.extents.values())


@dataclass(frozen=True)
class _Place:
    """The gradient of a vector operand that the kernel's [b, h / group, row, channel] is a view of: nothing is added up."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    vectors: Vectors


class _Places:
    """Where one program's kernels put the gradients of `wanted`, for operands of one layout."""

    def __init__(self, call: Prepared, operands: Mapping[str, Tensor], wanted: frozenset[str]) -> None:
        program, extents = call.program, call.extents
        b, h, m, n = (extents[axis] for axis in ("b", "h", "q_idx", "kv_idx"))
        group = shared_heads(program, call.groups)
        self.direct: list[_Place] = []
        self.scattered: list[tuple[Read, tuple[int, ...]]] = []
        self.strides: dict[str, int] = {}
        self.described: frozenset[str] = frozenset()  # operands whose gradients descriptors can show
        for read, view in call.views(operands).items():
            if read.tensor not in wanted:
                continue
            heads = h if row_axis(program, read) == Q_IDX else h // group
            shape = (b, heads, call.length(read))
            operand = operands[read.tensor]
            if not view.gathered and tuple(view.tensor.shape[:3]) == shape and view.tensor.numel() == operand.numel():
                whole = torch.empty(operand.shape, dtype=operand.dtype, device=operand.device)
                shown = view_vectors(read, whole, row_axis(program, read), call.block(operands))
                self.direct.append(_Place(read.tensor, tuple(operand.shape), operand.dtype, Vectors.of(shown, whole)))
                stride = shown.tensor.stride()
                self.described |= {read.tensor} if describable(shown.tensor) else set()
            else:
                self.scattered.append((read, (*shape, view.tensor.shape[3])))
                stride = torch.empty(self.scattered[-1][1], device="meta").stride()
            names = [f"stride_grad_{read.tensor}_{a}" for a in ("b", "h", "row", "channel")]
            self.strides |= dict(zip(names, stride, strict=True))
        self.elements: list[tuple[Read, str, tuple[int, ...]]] = []
        counts: dict[str, int] = {}
        for read in element_gradients(program, wanted):
            counts[read.tensor] = counts.get(read.tensor, 0) + 1
            tag = read.tensor if counts[read.tensor] == 1 else f"{read.tensor}_{counts[read.tensor]}"
            pairs = {"pair": (b, h, m, n), "q": (b, h, m, 1), "kv": (b, h, 1, n)}[side_of(read)]
            self.elements.append((read, f"Grad_{tag}", pairs))
        self.large = frozenset(read.tensor for read, _, _ in self.elements if side_of(read) == "pair")
        self.kernels = backward_kernels(program, call.schedule, wanted)


def places_of(call: Prepared, operands: Mapping[str, Tensor], wanted: frozenset[str]) -> _Places:
    """Found once for operands of the same layout."""
    found = call.gradient_places.get(wanted)
    if found is None:
        found = call.gradient_places[wanted] = _Places(call, operands, wanted)
    assert isinstance(found, _Places)
    return found


class Gradients:
    """The buffers of one backward. `tensors` go to the kernels under the names that these have."""

    def __init__(self, call: Prepared, operands: Mapping[str, Tensor], wanted: frozenset[str], places: _Places) -> None:
        self.call, self.program, self.operands, self.wanted = call, call.program, operands, wanted
        self.tensors: dict[str, Tensor] = {}
        self._direct: dict[str, Tensor] = {}
        for place in places.direct:
            whole = torch.empty(place.shape, dtype=place.dtype, device=call.device)
            self._direct[place.name] = whole
            self.tensors[f"Grad_{place.name}"] = place.vectors.show(whole, always=True)
        self._scattered = [(read, torch.empty(shape, dtype=torch.float32, device=call.device)) for read, shape in places.scattered]
        self.tensors |= {f"Grad_{read.tensor}": buffer for read, buffer in self._scattered}
        self._elements: list[tuple[Read, Tensor]] = []
        for read, name, shape in places.elements:
            self.tensors[name] = torch.zeros(shape, dtype=torch.float32, device=call.device)
            self._elements.append((read, self.tensors[name]))

    def finish(self, lse: Tensor, rcp: Tensor, delta: Tensor) -> dict[str, Tensor]:
        """The gradient of every wanted operand."""
        if len(self._direct) == len(self.wanted):
            return self._direct
        block, views = self.call.block(self.operands), self.call.views(self.operands)
        totals = {
            name: torch.zeros(self.operands[name].shape, dtype=torch.float32, device=lse.device)
            for name in self.wanted
            if name not in self._direct
        }
        b, h = self.call.extents["b"], self.call.extents["h"]
        for read, buffer in self._scattered:
            axis = row_axis(self.program, read)
            target = vector_gradient(read, views[read], totals[read.tensor], axis, block)
            if views[read].tensor.shape[2] == 1:
                buffer = buffer.sum(2, keepdim=True)
            shared = views[read].tensor.shape[1] == 1 and buffer.shape[1] > 1
            target.add(buffer.sum(1, keepdim=True) if shared else buffer, (0, b), (0, h), (Lines(0, buffer.shape[2]),))
            target.scatter(block)
        for read, gradient in self._elements:
            add_elements(read, gradient, totals[read.tensor], block)
        self._extra_scores(totals, block, lse, rcp, delta)
        found = {name: total.to(self.operands[name].dtype) for name, total in totals.items()}
        return {**self._direct, **found}

    def _extra_scores(self, totals: Mapping[str, Tensor], block: Block, lse: Tensor, rcp: Tensor, delta: Tensor) -> None:
        """d loss / d extra = -weight(extra) * delta for each row."""
        program = self.program
        for extra in program.weigh.extra:
            for read in dict.fromkeys(r for r in reads_of(extra) if r.tensor in totals):
                weight = torch.exp(block.tensor(extra) - lse.unsqueeze(3))
                weight = weight * rcp.unsqueeze(3) if program.has_rcp else weight
                slope = derivative(extra, read)
                factor = float(slope.value) if isinstance(slope, Const) else block.tensor(slope)
                add_elements(read, -weight * delta.unsqueeze(3) * factor, totals[read.tensor], block)
