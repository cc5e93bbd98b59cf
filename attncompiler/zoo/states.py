"""The states that a form of a linear attention ends in, found without running it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from attncompiler.backend import compile_or_leave
from attncompiler.explanation import Missed
from attncompiler.state_region import StateUse, declared_uses, use_of_site
from attncompiler.zoo.system import Example, Form, bound


@dataclass(frozen=True)
class States:
    """What the compiler finds in a form: recognised and declared states, and what it leaves."""

    uses: tuple[StateUse, ...]
    missed: tuple[Missed, ...]


def states_of(form: Form, example: Example) -> States:
    """Nothing runs, whatever the size: results are zeros without memory."""
    uses: list[StateUse] = []
    missed: list[Missed] = []

    def record(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = compile_or_leave(module, inputs)
        uses.extend([*map(use_of_site, compiled.states), *declared_uses(module)])
        missed.extend(compiled.missed)
        results = next(node for node in module.graph.nodes if node.op == "output").args[0]
        shapes = [node.meta["example_value"] for node in results]
        return lambda *_: [torch.zeros((), dtype=made.dtype).expand(made.shape) for made in shapes]

    inputs = [tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor for tensor in example.outlined()]
    torch.compiler.reset()
    torch.compile(bound(form, example.numbers), backend=record, dynamic=False)(*inputs)
    return States(tuple(uses), tuple(missed))
