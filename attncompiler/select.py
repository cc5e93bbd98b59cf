"""Selections: `from attncompiler import select`; `attention(q, k, v, select=select.top_k(rank, 1024))`."""

from attncompiler.dsl.selection import TopKeys, top_k

__all__ = ["TopKeys", "top_k"]
