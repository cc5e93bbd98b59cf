"""The invariants of an attention, a sentence and a check each, and `verify`, which runs between every two passes.

The invariants of tables, states and programs of several phases are in verify_phases.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from attncompiler.errors import InvalidProgram
from attncompiler.ir.expr import AXES, Dot, Expr, Kind, Read, Uniform, axes_of, dots_of, reads_of, walk
from attncompiler.ir.program import Attention, Origin, kind_of


class Node(Protocol):
    """What can be verified: a program or a phase of one, with the user's line."""

    @property
    def origin(self) -> Origin: ...


Check = TypeVar("Check", bound=Callable[[Any], bool])
Verified = TypeVar("Verified", bound=Node)
INVARIANTS: dict[type, list[tuple[str, Callable[[Any], bool]]]] = {}


def invariant(node: type, sentence: str) -> Callable[[Check], Check]:
    """Register a check under the sentence that it decides, which holds for every valid `node`."""

    def register(check: Check) -> Check:
        INVARIANTS.setdefault(node, []).append((sentence, check))
        return check

    return register


def verify(program: Verified) -> Verified:
    """`program` itself. Raises: InvalidProgram naming the first invariant that it breaks."""
    for sentence, holds in INVARIANTS[type(program)]:
        if not holds(program):
            raise InvalidProgram(f"this program breaks an invariant: {sentence}", where=program.origin.line)
    return program


def _roots(program: Attention) -> tuple[Expr, ...]:
    return program.expressions


@invariant(Attention, "tensor names are distinct and are not names of axes or sizes")
def distinct_names(program: Attention) -> bool:
    names = [decl.name for decl in program.tensors]
    return len(set(names)) == len(names) and not set(names) & ({axis.name for axis in AXES} | set(program.sizes))


@invariant(Attention, "only integers ascend")
def ascending_integers(program: Attention) -> bool:
    return all(decl.dtype.kind is Kind.INT and decl.shape for decl in program.tensors if decl.ascending)


@invariant(Attention, "every tensor that is read is declared, and every declared tensor is read")
def declared(program: Attention) -> bool:
    used = {read.tensor for root in _roots(program) for read in reads_of(root)}
    return used == {decl.name for decl in program.tensors}


@invariant(Attention, "an index has one entry for each dimension, one fewer where a vector is read")
def ranks(program: Attention) -> bool:
    decls = program.decls
    vectors = {program.sum}
    for root in _roots(program):
        for dot in dots_of(root):
            vectors |= {dot.left, dot.right}
    return all(
        len(read.index) == len(decls[read.tensor].shape) - (read in vectors) for root in _roots(program) for read in reads_of(root)
    )


@invariant(Attention, "a dot product has a left side over b, h, q_idx, a right side over b, h, kv_idx, and one size of vector")
def dot_sides(program: Attention) -> bool:
    decls = program.decls
    return all(
        "kv_idx" not in axes_of(dot.left)
        and "q_idx" not in axes_of(dot.right)
        and decls[dot.left.tensor].shape[-1] == decls[dot.right.tensor].shape[-1]
        for root in _roots(program)
        for dot in dots_of(root)
    )


@invariant(Attention, "the value is a vector read over b, h, kv_idx")
def value_axes(program: Attention) -> bool:
    return "q_idx" not in axes_of(program.sum)


@invariant(Attention, "keep is a predicate that reads no score")
def keep_is_a_predicate(program: Attention) -> bool:
    predicate = program.keep.predicate
    scores = (n for n in walk(predicate) if isinstance(n, Dot) or (isinstance(n, Uniform) and not n.at))
    return kind_of(predicate, program.decls) is Kind.BOOL and not any(scores)


@invariant(Attention, "a uniform number has a row that varies with q_idx and a column that varies with kv_idx, or none of these")
def places_of_uniforms(program: Attention) -> bool:
    return all(
        len(node.at) in (0, 2)
        and all(kind_of(place, program.decls) is Kind.INT for place in node.at)
        and all(axis in axes_of(place) for axis, place in zip(("q_idx", "kv_idx"), node.at, strict=False))
        for root in _roots(program)
        for node in walk(root)
        if isinstance(node, Uniform)
    )


@invariant(Attention, "extra scores vary over b, h and q_idx only")
def extra_axes(program: Attention) -> bool:
    return all("kv_idx" not in axes_of(extra) for extra in program.weigh.extra)


@invariant(Attention, "score, extra scores and adjust are numbers")
def numbers(program: Attention) -> bool:
    kinds = [kind_of(expr, program.decls) for expr in (program.score, program.adjust, *program.weigh.extra)]
    return Kind.BOOL not in kinds


@invariant(Attention, "indices are integers")
def integer_indices(program: Attention) -> bool:
    return all(
        kind_of(entry, program.decls) is Kind.INT
        for root in _roots(program)
        for read in walk(root)
        if isinstance(read, Read)
        for entry in read.index
    )


@invariant(Attention, "route is a predicate and a number over b, h and q_idx, and reads no score")
def route_axes(program: Attention) -> bool:
    route = program.route
    scores = (n for expr in (route.active, route.gain) for n in walk(expr) if isinstance(n, Dot | Uniform))
    return (
        kind_of(route.active, program.decls) is Kind.BOOL
        and kind_of(route.gain, program.decls) is not Kind.BOOL
        and "kv_idx" not in axes_of(route.active) | axes_of(route.gain)
        and not any(scores)
    )
