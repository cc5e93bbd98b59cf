"""Which lowering runs a program: the Triton kernels on a GPU that they support, the portable one everywhere else."""

from __future__ import annotations

from attncompiler.codegen.portable import backward, forward

__all__ = ["backward", "forward"]
