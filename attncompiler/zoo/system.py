"""What the zoo knows of a published system: its two forms, and what they are called with."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attncompiler.masks import Mask

Form = Callable[..., Any]


class Size(enum.Enum):
    """How large an example is: SMALL runs in a moment anywhere, REALISTIC is what the system was published for."""

    SMALL = "small"
    REALISTIC = "realistic"


@dataclass(frozen=True)
class Example:
    """What a system is called with. `inputs`, in order: a shape stands for a floating tensor of random numbers, which takes a
    gradient; a tensor for itself. `numbers`: its settings, by name."""

    inputs: Sequence[tuple[int, ...] | Tensor]
    numbers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def indices(self) -> tuple[Tensor, ...]:
        """The inputs that are given as tensors: labels, lengths, block lists."""
        return tuple(given for given in self.inputs if isinstance(given, Tensor))

    def drawn(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
        """The inputs on a device; the same numbers for every dtype and device, but for rounding."""
        generator = torch.Generator().manual_seed(seed)
        made = []
        for given in self.inputs:
            if isinstance(given, Tensor):
                made.append(given.to(device))
            else:
                made.append(torch.randn(given, generator=generator).to(device, dtype).requires_grad_())
        return tuple(made)

    def outlined(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """The inputs with all floating tensors as one zero each, seen as a tensor of their shape: nothing that takes memory."""
        zero = torch.zeros((), dtype=dtype)
        return tuple(given if isinstance(given, Tensor) else zero.expand(given) for given in self.inputs)


@dataclass(frozen=True)
class System:
    """A published system as its users write it, and as it is declared.

    `plain` holds nothing of attncompiler. A form is a function of the example's inputs and numbers, or an nn.Module class, made
    with the numbers and called with the inputs. `mask` is what the declared form keeps, as a function of the inputs that are
    tensors and the numbers, for systems that keep some pairs only. `note`: what a reader should know beside the paper. `selects`: which
    keys are kept depends on the floating inputs, so plans are of random ones."""

    name: str
    title: str
    source: str
    plain: Form
    declared: Form
    example: Callable[[Size], Example]
    mask: Callable[..., Mask] | None = None
    note: str = ""
    selects: bool = False


def bound(form: Form, numbers: Mapping[str, Any], device: torch.device | None = None) -> Callable[..., Any]:
    """A form as a function of the inputs alone."""
    if isinstance(form, type) and issubclass(form, nn.Module):
        return form(**numbers).to(device or "cpu")
    return partial(form, **numbers)
