"""A compiled graph that stands on what some of its inputs hold, and what runs where they hold something else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from attncompiler.passes.constants import Recipe, is_plain

_MOST_LOOKS = 64  # at whole masks, in the life of a graph: one that changes with every call is better read


class Explains(Protocol):
    """What stands for a tensor."""

    def still_holds(self, tensor: Tensor) -> bool:
        """Whether it would, were the tensor this."""


class Rule(Protocol):
    """A constant that something stands for in a compiled graph, and how it is made."""

    @property
    def recipe(self) -> Recipe: ...

    @property
    def recovery(self) -> Explains: ...


def checked(lifted: Callable[..., Any], rules: Sequence[Rule], read: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """`lifted` while the rules explain the inputs that they stand for, else what `read` makes, once it is needed.

    A call costs a look at the identity and the number of writes of each such input. Only one that is new or was written is looked
    at as a whole: so a module that was moved, loaded or changed, and another module that shares the code, get what is theirs."""
    assumptions = [_Assumption(rule.recipe, rule.recovery) for rule in rules]
    reading: Callable[..., Any] | None = None

    def run(*args: Any) -> Any:
        nonlocal reading
        if all(assumption.holds(args) for assumption in assumptions):
            return lifted(*args)
        if reading is None:
            reading = read()
        return reading(*args)

    return run


@dataclass(frozen=True)
class _Seen:
    """A tensor as it was when it was looked at. Its storage is held, so that no other can lie at its address."""

    storage: torch.UntypedStorage
    address: int
    writes: int
    explained: bool


@dataclass
class _Assumption:
    """That a rule explains what is made of an input of the graph."""

    recipe: Recipe
    recovery: Explains
    seen: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)  # of _Seen
    looks: int = 0

    def holds(self, args: Sequence[Any]) -> bool:
        assert self.recipe.source is not None
        tensor = args[self.recipe.source]
        if not is_plain(tensor):
            return False
        seen: _Seen | None = self.seen.get(tensor)
        if seen is None or (seen.address, seen.writes) != (tensor.data_ptr(), tensor._version):
            if self.looks == _MOST_LOOKS:
                return False
            self.looks += 1
            seen = _Seen(tensor.untyped_storage(), tensor.data_ptr(), tensor._version, self._explains(tensor))
            self.seen[tensor] = seen
        return seen.explained

    def _explains(self, tensor: Tensor) -> bool:
        try:
            return self.recovery.still_holds(self.recipe.run(tensor))
        except (RuntimeError, TypeError):
            return False  # of another type than when it was traced
