"""Masks as an algebra: rules of positions, joined by `&`, `|` and `~`.

A mask says which keys a query sees. It is a rule, never a matrix: nothing here is as large as queries times keys. Positions are
those of FlexAttention's mods: b, h, q_idx, kv_idx. A query that sees no key gives zero, as in scaled_dot_product_attention."""

from __future__ import annotations

import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from attncompiler.dsl.pictures import picture, png, svg
from attncompiler.dsl.term import Positions, terms
from attncompiler.dsl.trace import traced
from attncompiler.errors import InvalidProgram, OptionError
from attncompiler.ir.expr import (
    AXES,
    KV_IDX,
    Q_IDX,
    Axis,
    B,
    Const,
    Expr,
    H,
    Kind,
    Read,
    add,
    apply,
    reads_of,
    settled,
    substitute,
    transform,
)
from attncompiler.ir.program import TensorDecl, kind_of
from attncompiler.ir.ranges import range_of, within
from attncompiler.ir.text import expr_text
from attncompiler.passes.grid import ROWS, GridTiles, choose_tiles
from attncompiler.passes.nodes import DTYPES
from attncompiler.passes.nothing_kept import nothing_kept
from attncompiler.passes.placed import placed
from attncompiler.passes.plan import TilePlan, count_kept, plan_boxes, plan_predicate
from attncompiler.tuning.speed_of_light import boxes_text

_MOST_PAIRS = 1 << 26

Extents = Mapping[Axis, int]
Captured = dict[str, Tensor]


class Mask(ABC):
    """Which keys a query sees. `str` shows the rule as a formula."""

    @property
    def is_fixed(self) -> bool:
        """True where no function of the user's is part of it: what it keeps can't change by what such a function reads."""
        return True

    def to(self, device: torch.device | str) -> Mask:
        """The same mask with its tensors on `device`; what a user's function reads stays where it is."""
        found = self.moved(device)
        if not torch.compiler.is_dynamo_compiling() and "_made" in self.__dict__ and found is not self:
            made = tree_map_only((Tensor, Mask), lambda each: each.to(device), self.__dict__["_made"])
            object.__setattr__(found, "_made", made)
        return found

    def moved(self, device: torch.device | str) -> Mask:
        """The parts of `to` that differ from one kind of mask to another."""
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = self.__dict__.get("_made")
        return super().__reduce_ex__(protocol) if made is None else (_make, made)

    @abstractmethod
    def rule(self, extents: Extents) -> tuple[Expr, Captured]:
        """The predicate on axes of these sizes, and the tensors that it reads, by name.

        Raises: OptionError where the sizes don't fit."""

    def check(self, extents: Extents) -> None:  # noqa: B027  most masks fit all sizes
        """Raises: OptionError where the sizes don't fit."""

    @property
    def reads_tensors(self) -> bool:
        """True where it may read tensors by position: then no position outside its own tokens may reach it."""
        return False

    @abstractmethod
    def at(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """The rule at positions that are index tensors, whatever their number."""

    def on(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """The mask at all positions as index tensors, in plain torch: what other backends compile, and ours recognises."""
        self.check({axis: at.numel() for axis, at in zip(AXES, (b, h, q_idx, kv_idx), strict=True)})
        return self.at(b, h, q_idx, kv_idx)

    def __and__(self, other: Mask) -> Mask:
        return _Joined("and", (self, as_mask(other)))

    def __or__(self, other: Mask) -> Mask:
        return _Joined("or", (self, as_mask(other)))

    def __bool__(self) -> bool:
        raise OptionError(
            f"the mask {self} is asked whether it is true",
            why="`and`, `or` and `not` would keep one of two masks and drop the other",
            do="join masks by & and |, and turn one round by ~",
        )

    def __invert__(self) -> Mask:
        return self.complement()

    def __rand__(self, other: Callable[..., Any]) -> Mask:
        return as_mask(other) & self

    def __ror__(self, other: Callable[..., Any]) -> Mask:
        return as_mask(other) | self

    def complement(self) -> Mask:
        """`~mask` by a name that Dynamo can trace: in a function that is being compiled `~` of any object but a tensor breaks the
        graph, and is an error of Dynamo's with `fullgraph=True`."""
        return _Joined("not", (self,))

    def after(self, count: int) -> Mask:
        """The same for queries that come after `count` tokens: one query and a cache of its keys (`count` = keys - 1), or the next
        chunk of a prompt. Query 0 is then the token `count`.

        Raises: OptionError for what is no count."""
        if not isinstance(count, int) or count < 0:
            raise OptionError(f"after({count!r}) of a mask", do="give the number of tokens before the first query: 0 or more")
        return _After(self, count) if count else self

    def plan(self, b: int, h: int, m: int, n: int, block_q: int = 128, block_kv: int = 128) -> TilePlan:
        """The tiles of `block_q` queries by `block_kv` keys that it keeps something of."""
        return plan_predicate(*self._on_cpu(b, h, m, n), (b, h, m, n), block_q, block_kv)

    def tiles(self, b: int, h: int, m: int, n: int, block_q: int = 128, block_kv: int = 128) -> GridTiles:
        """How kernels cut tokens into tiles of these sizes: boxes where it is a rule of a grid, else (falsy) runs of tokens."""
        return choose_tiles(self.predicate(b, h, m, n), m, block_q, block_kv) if m == n else ROWS

    def plan_in(self, tiles: GridTiles, b: int, h: int, m: int, n: int) -> TilePlan:
        """The plan in boxes that `tiles` gave for these sizes."""
        return plan_boxes(self.predicate(b, h, m, n), m, tiles)

    def kept_pairs(self, b: int, h: int, m: int, n: int) -> int | None:
        """How many (query, key) pairs it keeps, over all batches and heads; None where that takes too long to count."""
        return count_kept(*self._on_cpu(b, h, m, n), (b, h, m, n))

    def predicate(self, b: int, h: int, m: int, n: int) -> Expr:
        """The rule as programs have it."""
        return self._on_cpu(b, h, m, n)[0]

    def _on_cpu(self, b: int, h: int, m: int, n: int) -> tuple[Expr, Captured]:
        """The rule, with its tensors where plans and counts are made."""
        extents = dict(zip(AXES, (b, h, m, n), strict=True))
        predicate, captured = self.rule(extents)
        check_reads([predicate], captured, extents)
        return predicate, {name: tensor.cpu() for name, tensor in captured.items()}

    def keeps_nothing(self, b: int, h: int, m: int, n: int) -> bool:
        """True where it is proved that no query of any batch and head keeps a key."""
        return nothing_kept(*self._on_cpu(b, h, m, n), (b, h, m, n))

    def show(self, b: int, h: int, m: int, n: int, columns: int = 64, *, batch: int | None = None, head: int | None = None) -> str:
        """A picture in text: queries downwards, keys to the right; of all batches and heads that differ, or of those given."""
        plan, boxes = self._drawn(b, h, m, n, batch, head)
        return picture(plan, columns, batch, head, boxes)

    def svg(self, b: int, h: int, m: int, n: int, *, batch: int | None = None, head: int | None = None) -> str:
        """The same picture as SVG."""
        plan, boxes = self._drawn(b, h, m, n, batch, head)
        return svg(plan, True, batch, head, boxes)

    def png(self, b: int, h: int, m: int, n: int, *, batch: int | None = None, head: int | None = None) -> bytes:
        """The same picture as PNG: what to write into a file."""
        plan, boxes = self._drawn(b, h, m, n, batch, head)
        return png(plan, batch, head, boxes)

    def _drawn(self, b: int, h: int, m: int, n: int, batch: int | None, head: int | None) -> tuple[TilePlan, str]:
        """The plan, and the shapes of its boxes."""
        for what, number, count in (("batch", batch, b), ("head", head, h)):
            if number is not None and not 0 <= number < count:
                raise OptionError(f"there is no {what} {number} to draw", do=f"give one from 0 to {count - 1}")
        tiles = self.tiles(b, h, m, n)
        if not tiles:
            return self.plan(b, h, m, n), ""
        return placed(self.plan_in(tiles, b, h, m, n), tiles), boxes_text((tiles.rows, tiles.columns))

    def same_as(self, other: Mask, b: int, h: int, m: int, n: int) -> bool | None:
        """Whether both keep the same pairs at these sizes; None where neither the rules nor a look at every pair can tell."""
        extents = dict(zip(AXES, (b, h, m, n), strict=True))
        (mine, held), (theirs, others) = self.rule(extents), as_mask(other).rule(extents)
        alike = held.keys() == others.keys() and all(torch.equal(held[name], others[name]) for name in held)
        if mine == theirs and alike:
            return True
        if b * h * m * n > _MOST_PAIRS:
            return None
        return torch.equal(*(mask.dense(b, h, m, n).expand(b, h, m, n) for mask in (self, as_mask(other))))

    def dense(self, b: int, h: int, m: int, n: int) -> Tensor:
        """The mask itself, bool [b or 1, h or 1, m, n]: for tests and pictures of small cases."""
        from attncompiler.ir.evaluate import whole

        extents = dict(zip(AXES, (b, h, m, n), strict=True))
        predicate, captured = self._on_cpu(b, h, m, n)
        block = whole(captured, {}, {axis.name: size for axis, size in extents.items()}, torch.float64, torch.device("cpu"))
        found = block.tensor(predicate).to(torch.bool)
        return found.expand(*found.shape[:2], m, n) if found.dim() == 4 else found.expand(1, 1, m, n)


_Makes = ParamSpec("_Makes")
_MAKERS: dict[str, Callable[..., Mask]] = {}


def pickled(make: Callable[_Makes, Mask]) -> Callable[_Makes, Mask]:
    """What `make` gives remembers how it was made, so that it can be pickled: what a rule is made of inside can't be."""

    @functools.wraps(make)
    def remembered(*args: _Makes.args, **kwargs: _Makes.kwargs) -> Mask:
        mask = make(*args, **kwargs)
        if not torch.compiler.is_dynamo_compiling():
            object.__setattr__(mask, "_made", (make.__name__, *_as_now((args, kwargs), mask)))
        return mask

    _MAKERS[make.__name__] = remembered
    return remembered


def _as_now(arguments: Any, mask: Mask) -> Any:
    """Arguments as they are now, whatever is written into them later; of tensors those that the mask reads itself stay what they are."""
    read = {tensor.untyped_storage().data_ptr() for tensor in _tensors_of(mask)}

    def kept(tensor: Tensor) -> Tensor:
        return tensor if tensor.untyped_storage().data_ptr() in read else tensor.clone()

    return tree_map_only(Tensor, kept, arguments)


def _tensors_of(value: Any) -> Iterator[Tensor]:
    """Those that a mask holds, and the masks that it is made of."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mask):
        yield from _tensors_of([held for name, held in vars(value).items() if name != "_made"])
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_of(each)


def _make(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mask:
    return _MAKERS[name](*args, **kwargs)


def as_mask(value: Mask | Callable[..., Any]) -> Mask:
    """A mask as it is, or a function of positions as a mask."""
    if isinstance(value, Mask):
        return value
    if callable(value):
        return where(value)
    raise OptionError(f"{value!r} is no mask", do="use attncompiler.masks, or a function (b, h, q_idx, kv_idx) -> bool")


@functools.lru_cache(maxsize=512)
def _one_form(expr: Expr, extents: tuple[tuple[Axis, int], ...]) -> Expr:
    """The one form of a predicate on axes of these sizes. Asked for again for tiles, plan and counts of a mask."""
    return settled(within(expr, dict(extents)), KV_IDX)


@dataclass(frozen=True, eq=False)
class _Rule(Mask):
    """A rule that is the same for all sizes."""

    formula: str
    kept: Callable[[Positions], Any]
    captured: Mapping[str, Tensor]

    def moved(self, device: torch.device | str) -> Mask:
        return replace(self, captured={name: tensor.to(device) for name, tensor in self.captured.items()})

    def rule(self, extents: Extents) -> tuple[Expr, Captured]:
        return _one_form(self.kept(terms(self.captured)).expr, tuple(extents.items())), dict(self.captured)

    @property
    def reads_tensors(self) -> bool:
        return bool(self.captured)

    def at(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        found: Tensor = self.kept(Positions(b, h, q_idx, kv_idx, self.captured))
        return found

    def __str__(self) -> str:
        return self.formula


@dataclass(frozen=True, eq=False)
class Sized(Mask):
    """A rule for certain numbers of batches, heads, queries or keys."""

    mask: Mask
    sizes: Mapping[Axis, int]

    def moved(self, device: torch.device | str) -> Mask:
        return replace(self, mask=self.mask.to(device))

    @property
    def reads_tensors(self) -> bool:
        return self.mask.reads_tensors

    def check(self, extents: Extents) -> None:
        for axis, size in self.sizes.items():
            if extents[axis] != size:
                what, do = _FOR[axis]
                made_for = "tokens" if axis in (Q_IDX, KV_IDX) else what
                raise OptionError(f"{self.mask} is for {size} {made_for}, not {extents[axis]} {what}", do=do)

    def rule(self, extents: Extents) -> tuple[Expr, Captured]:
        self.check(extents)
        return self.mask.rule(extents)

    def at(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.mask.at(b, h, q_idx, kv_idx)

    def __str__(self) -> str:
        return str(self.mask)


_FOR = {
    B: ("batches", "give it tensors with an entry for each batch"),
    H: ("heads", "make it for the number of query heads"),
    Q_IDX: ("queries", "make it for the number of tokens; for text or extra keys beside them there is masks.segments"),
    KV_IDX: ("keys", "make it for the number of tokens; for text or extra keys beside them there is masks.segments"),
}


@dataclass(frozen=True, eq=False)
class Counted(Sized):
    """A rule for one number of tokens, whose pairs are counted without looking at each."""

    count: Callable[[], int]

    def kept_pairs(self, b: int, h: int, m: int, n: int) -> int | None:
        self.check(dict(zip(AXES, (b, h, m, n), strict=True)))
        return b * h * self.count()


@dataclass(frozen=True, eq=False)
class _After(Mask):
    """A mask of all tokens, for those queries that come after `count` of them."""

    mask: Mask
    count: int

    @property
    def is_fixed(self) -> bool:
        return self.mask.is_fixed

    @property
    def reads_tensors(self) -> bool:
        return self.mask.reads_tensors

    def moved(self, device: torch.device | str) -> Mask:
        return replace(self, mask=self.mask.to(device))

    def check(self, extents: Extents) -> None:
        self.mask.check(self._of_all(extents))

    def rule(self, extents: Extents) -> tuple[Expr, Captured]:
        whole, captured = self.mask.rule(self._of_all(extents))
        return settled(within(substitute(whole, {Q_IDX: add(Q_IDX, Const(self.count))}), extents), KV_IDX), captured

    def _of_all(self, extents: Extents) -> Extents:
        return {**extents, Q_IDX: extents[Q_IDX] + self.count}

    def at(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.mask.at(b, h, q_idx + self.count, kv_idx)

    def __str__(self) -> str:
        text = f"({self.mask})" if isinstance(self.mask, _Joined) else str(self.mask)
        return f"{text}.after({self.count})"


@dataclass(frozen=True, eq=False)
class _Traced(Mask):
    """A user's function of positions."""

    function: Callable[..., Any]

    @property
    def is_fixed(self) -> bool:
        return False

    @property
    def reads_tensors(self) -> bool:
        return True

    def rule(self, extents: Extents) -> tuple[Expr, Captured]:
        examples = [torch.zeros((), dtype=torch.int64) for _ in AXES]
        expr, captured = traced(self.function, AXES, examples, extents)
        decls = {name: TensorDecl(name, DTYPES[tensor.dtype], ()) for name, tensor in captured.items()}
        if kind_of(expr, decls) is not Kind.BOOL:
            raise InvalidProgram(f"{self} gives numbers, not True or False", do="compare: a mask says which keys are kept")
        return settled(within(expr, extents), KV_IDX), captured

    def at(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        found: Tensor = self.function(b, h, q_idx, kv_idx)
        return found

    def __str__(self) -> str:
        return f"where({getattr(self.function, '__name__', 'a function')})"


@dataclass(frozen=True, eq=False)
class _Joined(Mask):
    operator: str
    parts: tuple[Mask, ...]

    @property
    def is_fixed(self) -> bool:
        return all(part.is_fixed for part in self.parts)

    @property
    def reads_tensors(self) -> bool:
        return any(part.reads_tensors for part in self.parts)

    def moved(self, device: torch.device | str) -> Mask:
        return replace(self, parts=tuple(part.to(device) for part in self.parts))

    def check(self, extents: Extents) -> None:
        for part in self.parts:
            part.check(extents)

    def rule(self, extents: Extents) -> tuple[Expr, Captured]:
        captured: Captured = {}
        exprs = []
        for part in self.parts:
            expr, tensors = part.rule(extents)
            exprs.append(rename(expr, adopt(captured, tensors)))
        return settled(apply(self.operator, *exprs), KV_IDX), captured

    def at(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        parts = [part.at(b, h, q_idx, kv_idx) for part in self.parts]
        return ~parts[0] if self.operator == "not" else parts[0] & parts[1] if self.operator == "and" else parts[0] | parts[1]

    def __str__(self) -> str:
        texts = [f"({part})" if isinstance(part, _Joined) else str(part) for part in self.parts]
        return f"~{texts[0]}" if self.operator == "not" else {"and": " & ", "or": " | "}[self.operator].join(texts)


def check_reads(exprs: Iterable[Expr], captured: Captured, extents: Extents) -> None:
    """Raises: OptionError where a captured tensor is too short for the positions that it is read at."""
    for read in (r for expr in exprs for r in reads_of(expr) if r.tensor in captured):
        for place, (entry, size) in enumerate(zip(read.index, captured[read.tensor].shape, strict=True)):
            last = range_of(entry, extents)[1]
            if size <= last < math.inf:
                raise OptionError(
                    f"{read.tensor} {list(captured[read.tensor].shape)} is read at {expr_text(entry)}, up to {last:.0f}",
                    why=f"its dimension {place} has {size}",
                    do=f"give a tensor of {last + 1:.0f} or more there, or mask shorter sequences",
                )


def adopt(captured: Captured, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Take `tensors` into `captured`; what each is called there. One tensor has one name, and one name one tensor."""
    names = {}
    for name, tensor in tensors.items():
        held = next((known for known, value in captured.items() if value is tensor), None)
        count = 2
        fresh = name
        while held is None and fresh in captured:
            fresh, count = f"{name}{count}", count + 1
        names[name] = held or fresh
        captured[names[name]] = tensor
    return names


def rename(expr: Expr, names: Mapping[str, str]) -> Expr:
    """`expr` with its tensors under other names."""

    def visit(node: Expr) -> Expr | None:
        if isinstance(node, Read) and names.get(node.tensor, node.tensor) != node.tensor:
            return Read(names[node.tensor], tuple(transform(entry, visit) for entry in node.index))
        return None

    return transform(expr, visit)


def make_rule(formula: str, kept: Callable[[Positions], Any], **captured: Tensor) -> Mask:
    """A mask from a rule of positions, which may read the captured tensors."""
    return _Rule(formula, kept, captured)


def per_head(masks: Sequence[Mask]) -> Mask:
    """Another mask for each head."""
    if not masks:
        raise OptionError("per_head takes one mask for each head")
    return _PerHead(tuple(as_mask(mask) for mask in masks))


@dataclass(frozen=True, eq=False)
class _PerHead(Mask):
    masks: tuple[Mask, ...]

    @property
    def is_fixed(self) -> bool:
        return all(mask.is_fixed for mask in self.masks)

    @property
    def reads_tensors(self) -> bool:
        return any(mask.reads_tensors for mask in self.masks)

    def moved(self, device: torch.device | str) -> Mask:
        return replace(self, masks=tuple(mask.to(device) for mask in self.masks))

    def check(self, extents: Extents) -> None:
        if extents[H] != len(self.masks):
            what = f"per_head has {len(self.masks)} masks for {extents[H]} heads"
            raise OptionError(what, do="give one mask for each head of the queries; the same one may come several times")
        for mask in self.masks:
            mask.check(extents)

    def rule(self, extents: Extents) -> tuple[Expr, Captured]:
        self.check(extents)
        captured: Captured = {}
        of: dict[Expr, list[int]] = {}
        for number, mask in enumerate(self.masks):
            expr, tensors = mask.rule(extents)
            of.setdefault(rename(expr, adopt(captured, tensors)), []).append(number)
        if len(of) == 1:
            return next(iter(of)), captured
        parts = []
        for expr, heads in of.items():
            which = functools.reduce(lambda a, b: apply("or", a, b), (apply("eq", H, Const(number)) for number in heads))
            parts.append(apply("and", which, expr))
        return functools.reduce(lambda a, b: apply("or", a, b), parts), captured

    def at(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        found = (h == 0) & self.masks[0].at(b, h, q_idx, kv_idx)
        for number, mask in enumerate(self.masks[1:], 1):
            found = found | (h == number) & mask.at(b, h, q_idx, kv_idx)
        return found

    def __str__(self) -> str:
        return f"per_head([{', '.join(map(str, self.masks))}])"


def where(function: Callable[..., Any]) -> Mask:
    """Keys for which `function(b, h, q_idx, kv_idx)` holds; it may read tensors by these. FlexAttention's mask_mods, unchanged."""
    if not torch.compiler.is_dynamo_compiling():  # which does not trace signatures
        _check_arguments(function)
    return _Traced(function)


def _check_arguments(function: Callable[..., Any]) -> None:
    """Raises: OptionError for a function that takes other arguments than four positions."""
    try:
        inspect.signature(function).bind(*AXES)
    except TypeError as error:
        raise OptionError(
            f"{getattr(function, '__name__', 'the function')} does not take (b, h, q_idx, kv_idx): {error}",
            why="which keys are kept is decided before any score exists",
            do="let a mask depend on positions alone; what depends on scores is written in `score`",
        ) from error
    except ValueError:
        pass  # a builtin without a signature
