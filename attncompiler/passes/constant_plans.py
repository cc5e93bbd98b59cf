"""Plans made of tensors that nobody writes to: made once for each set of such tensors."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

Plan = TypeVar("Plan")

_MOST = 64  # plans; each holds the memory of its tensors


@dataclass(frozen=True)
class _Made(Generic[Plan]):
    """A plan, and the memory of what it was made of: as long as that is held, nothing else lies at its address."""

    plan: Plan
    storages: tuple[torch.UntypedStorage, ...]


class ConstantPlans(Generic[Plan]):
    """The plans that were asked for last."""

    def __init__(self) -> None:
        self._made: OrderedDict[Hashable, _Made[Plan]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, what: Hashable, read: Sequence[Tensor], make: Callable[[], Plan]) -> Plan:
        """What `make` gave for these tensors when it was asked first. `what`: all else that the plan depends on."""
        key = what, *((tensor.data_ptr(), tensor.stride()) for tensor in read)
        with self._lock:
            if key not in self._made:
                while len(self._made) >= _MOST:
                    self._made.popitem(last=False)
                self._made[key] = _Made(make(), tuple(tensor.untyped_storage() for tensor in read))
            self._made.move_to_end(key)
            return self._made[key].plan
