"""Keys times values, read by queries: linear attention over all keys that is linear as written. It is left, and said why.

    o = phi(q) @ (phi(k).mT @ v)

Two products of cuBLAS or MKL are this already, with the same work as a state of all keys and no more memory.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from attncompiler.errors import Unrecognised
from attncompiler.passes.contraction import Contraction, contraction_of
from attncompiler.passes.elementwise import base_name
from attncompiler.passes.nodes import CASTS, SAME_ELEMENT, is_tensor
from attncompiler.passes.reader import Reader
from attncompiler.passes.sizes import same
from attncompiler.passes.state_site import NothingToSay, StateContext, StateSite


def keys_times_values(context: StateContext, node: Node) -> StateSite:
    """Raises: Unrecognised where `node` is a product of keys and values over many tokens, and as many queries read it;
    NothingToSay elsewhere."""
    inner = contraction_of(node)
    if inner is None or len(inner.summed) != 1 or inner.bias is not None:
        raise NothingToSay
    tokens = Reader.extent_of(inner, inner.summed)
    batch = [c for c in inner.out_letters if c in inner.left_letters and c in inner.right_letters]
    features = [Reader.extent_of(inner, c) for c in inner.out_letters if c not in batch]
    if (
        not batch
        or len(features) != 2
        or any(not isinstance(f, int) or not isinstance(tokens, int) or tokens <= f for f in features)
    ):
        raise NothingToSay
    for outer, read in _readers(node):
        queries = [c for c in outer.out_letters if c not in getattr(outer, f"{read}_letters")]
        if len(outer.summed) == 1 and len(queries) == 1 and same(Reader.extent_of(outer, queries[0]), tokens):
            raise Unrecognised(
                "a linear attention over all keys, whose keys and values are multiplied first",
                why="as written it takes time and memory linear in the tokens; a state would be the same two products",
            )
    raise NothingToSay


def _readers(node: Node) -> Iterator[tuple[Contraction, str]]:
    """Products that read what `node` gives, but for numbers that it is multiplied by, and the side."""
    waiting = [node]
    while waiting:
        current = waiting.pop()
        for user in current.users:
            outer = contraction_of(user)
            if outer is not None:
                yield outer, "left" if outer.left is current else "right"
            elif base_name(user.target) in CASTS | SAME_ELEMENT or _scales(user):
                waiting.append(user)


def _scales(node: Node) -> bool:
    return (
        base_name(node.target) in ("mul", "div")
        and len(node.args) == 2
        and not (is_tensor(node.args[0]) and is_tensor(node.args[1]))
    )
