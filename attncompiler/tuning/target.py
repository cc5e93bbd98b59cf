"""The GPUs that kernels are made for, and what of them a schedule depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attncompiler.errors import OptionError


@dataclass(frozen=True)
class Target:
    """A GPU that Triton compiles for.

    `backend`, `arch` and `warp_size` are Triton's own triple; `shared_memory` is that of one block, in bytes; `descriptors` tells
    whether tiles can come through TMA; `float32` is how a product of float32 keeps its precision: three products on tensor cores
    where there are such instructions, else multiply-adds. `peak_flops` (dense bf16, FLOP/s), `float32_flops` (products kept so),
    `bandwidth` (bytes/s) and `multiprocessors`: the datasheets of A100 SXM, H100 SXM, B200 and MI300X."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_memory: int
    descriptors: bool
    float32: str
    peak_flops: float
    float32_flops: float
    bandwidth: float
    multiprocessors: int

    def flops(self, element: int) -> float:
        """FLOP/s of products of numbers of `element` bytes."""
        return self.peak_flops if element == 2 else self.float32_flops


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * 1024, False, "tf32x3", 312e12, 156e12 / 3, 2.04e12, 108),
        Target("sm_90", "cuda", 90, 32, 227 * 1024, True, "tf32x3", 989e12, 494e12 / 3, 3.35e12, 132),
        Target("sm_100", "cuda", 100, 32, 227 * 1024, True, "tf32x3", 2250e12, 1125e12 / 3, 8.0e12, 148),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024, False, "ieee", 1307e12, 163e12, 5.3e12, 304),
    )
}


def target_named(name: str) -> Target:
    """Raises: OptionError for a target that is not known."""
    if name not in TARGETS:
        raise OptionError(f"unknown target {name!r}", do=f"the targets are {', '.join(TARGETS)}")
    return TARGETS[name]


def target_of_capability(major: int, hip: bool) -> Target:
    """The nearest target that runs on a device of this CUDA capability; the smallest for what is older or unknown."""
    if hip:
        return TARGETS["gfx942"]
    return TARGETS["sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"]
