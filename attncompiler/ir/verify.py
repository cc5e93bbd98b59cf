"""The invariants of the language: a sentence and a check each. `verify` runs between every two passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attncompiler.errors import InvalidProgram
from attncompiler.ir.expr import AXES, Dot, Expr, Kind, Read, Uniform, axes_of, dots_of, reads_of, walk
from attncompiler.ir.program import Attention, kind_of


@dataclass(frozen=True, slots=True)
class Invariant:
    """A sentence that holds for every valid program, and its check."""

    sentence: str
    holds: Callable[[Attention], bool]


INVARIANTS: list[Invariant] = []


def invariant(sentence: str) -> Callable[[Callable[[Attention], bool]], Callable[[Attention], bool]]:
    """Register a check under the sentence that it decides."""

    def register(check: Callable[[Attention], bool]) -> Callable[[Attention], bool]:
        INVARIANTS.append(Invariant(sentence, check))
        return check

    return register


def verify(program: Attention) -> Attention:
    """`program` itself. Raises: InvalidProgram naming the first invariant that it breaks."""
    for rule in INVARIANTS:
        if not rule.holds(program):
            raise InvalidProgram(f"this program breaks an invariant: {rule.sentence}", where=program.origin.line)
    return program


def _roots(program: Attention) -> tuple[Expr, ...]:
    return program.expressions


@invariant("tensor names are distinct and are not names of axes or sizes")
def distinct_names(program: Attention) -> bool:
    names = [decl.name for decl in program.tensors]
    return len(set(names)) == len(names) and not set(names) & ({axis.name for axis in AXES} | set(program.sizes))


@invariant("every tensor that is read is declared, and every declared tensor is read")
def declared(program: Attention) -> bool:
    used = {read.tensor for root in _roots(program) for read in reads_of(root)}
    return used == {decl.name for decl in program.tensors}


@invariant("an index has one entry for each dimension, one fewer where a vector is read")
def ranks(program: Attention) -> bool:
    decls = program.decls
    vectors = {program.sum}
    for root in _roots(program):
        for dot in dots_of(root):
            vectors |= {dot.left, dot.right}
    return all(
        len(read.index) == len(decls[read.tensor].shape) - (read in vectors) for root in _roots(program) for read in reads_of(root)
    )


@invariant("a dot product has a left side over b, h, q_idx, a right side over b, h, kv_idx, and one size of vector")
def dot_sides(program: Attention) -> bool:
    decls = program.decls
    return all(
        "kv_idx" not in axes_of(dot.left)
        and "q_idx" not in axes_of(dot.right)
        and decls[dot.left.tensor].shape[-1] == decls[dot.right.tensor].shape[-1]
        for root in _roots(program)
        for dot in dots_of(root)
    )


@invariant("the value is a vector read over b, h, kv_idx")
def value_axes(program: Attention) -> bool:
    return "q_idx" not in axes_of(program.sum)


@invariant("keep is a predicate that reads no score")
def keep_is_a_predicate(program: Attention) -> bool:
    predicate = program.keep.predicate
    scores = (n for n in walk(predicate) if isinstance(n, Dot) or (isinstance(n, Uniform) and not n.at))
    return kind_of(predicate, program.decls) is Kind.BOOL and not any(scores)


@invariant("a uniform number has a row that varies with q_idx and a column that varies with kv_idx, or none of these")
def places_of_uniforms(program: Attention) -> bool:
    return all(
        len(node.at) in (0, 2)
        and all(kind_of(place, program.decls) is Kind.INT for place in node.at)
        and all(axis in axes_of(place) for axis, place in zip(("q_idx", "kv_idx"), node.at, strict=False))
        for root in _roots(program)
        for node in walk(root)
        if isinstance(node, Uniform)
    )


@invariant("extra scores vary over b, h and q_idx only")
def extra_axes(program: Attention) -> bool:
    return all("kv_idx" not in axes_of(extra) for extra in program.weigh.extra)


@invariant("score, extra scores and adjust are numbers")
def numbers(program: Attention) -> bool:
    kinds = [kind_of(expr, program.decls) for expr in (program.score, program.adjust, *program.weigh.extra)]
    return Kind.BOOL not in kinds


@invariant("indices are integers")
def integer_indices(program: Attention) -> bool:
    return all(
        kind_of(entry, program.decls) is Kind.INT
        for root in _roots(program)
        for read in walk(root)
        if isinstance(read, Read)
        for entry in read.index
    )
