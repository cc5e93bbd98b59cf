"""What all kernels of a program share: the names of its operands, its loads, scores and parameters."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from attncompiler.codegen.positions import TilePositions
from attncompiler.codegen.text import fill
from attncompiler.codegen.triton_expr import Names, pointer_name, size_names, triton
from attncompiler.errors import UnsupportedProgram
from attncompiler.ir.expr import (
    KV_IDX,
    Q_IDX,
    Apply,
    Axis,
    Const,
    Dot,
    Expr,
    Read,
    axes_of,
    dots_of,
    reads_of,
)
from attncompiler.ir.program import Attention, Dtype
from attncompiler.passes.grid import split_axis
from attncompiler.passes.plan import score_where_kept
from attncompiler.tuning.schedule import Schedule, heads_cached

PANEL = 64  # channels that lie beside each other in the shared memory of kernels with warp roles: 128 bytes

LOG2E = math.log2(math.e)
MAX_HEAD_SIZE = 512
_IN_TURN = 8  # heads whose rows are taken by turns, at most (docs/performance.md: "Who takes which row")


@dataclass(frozen=True)
class Vector:
    """One vector operand as a kernel sees it: [b, h // group, row, channel]."""

    name: str  # q, k, v, q2, ...
    read: Read
    group: int
    size: int

    @property
    def block(self) -> int:
        return max(16, 1 << (self.size - 1).bit_length())


@dataclass(frozen=True)
class ByList:
    """Rows of queries by list (runtime/rows.py). `gains`: what each gives is multiplied by a gain. `sums`: what it was before is kept,
    in the order of the list."""

    gains: bool
    sums: bool


@dataclass(frozen=True)
class Layout:
    """What the operands look like at run time, as far as the source depends on it.

    `groups` holds the heads that share a vector, for each vector operand in order of first use; `wanted` names the operands whose
    gradients are asked for, `described` those of them whose gradients lie so that tensor descriptors can show them. `by_list`: the
    forward kernel takes the vectors of queries, and puts what they give, as lists name them."""

    groups: tuple[int, ...]
    wanted: frozenset[str]
    has_grad_lse: bool = False
    described: frozenset[str] = frozenset()
    by_list: ByList | None = None

    @staticmethod
    def of(groups: tuple[int, ...], wanted: frozenset[str]) -> Layout:
        """That of operands which lie dense in memory."""
        return Layout(groups, wanted, described=wanted)


class Emission:
    """The names and pieces that the kernels of one program share."""

    def __init__(self, program: Attention, schedule: Schedule, layout: Layout) -> None:
        self.program, self.schedule, self.layout = program, schedule, layout
        self.dots = program_dots(program)
        self.dot_names = {dot: "qk" if i == 0 else f"qk{i + 1}" for i, dot in enumerate(self.dots)}
        reads = vector_reads(program)
        sizes = [_literal(program, read) for read in reads]
        groups = dict(zip(reads, layout.groups, strict=True))
        self.vectors = {read: Vector(read.tensor, read, groups[read], size) for read, size in zip(reads, sizes, strict=True)}
        self.value = self.vectors[program.sum]
        self.group = shared_heads(program, layout.groups)
        self.helpers: set[str] = set()
        self.float32 = schedule.float32 if self._is(Dtype.F32) else ""  # "": no product needs more than the hardware's own way
        self.in_parts = self.float32 == "parts"
        self.kept_score = score_where_kept(program)

    def _is(self, dtype: Dtype) -> bool:
        return any(self.program.decls[v.name].dtype is dtype for v in self.vectors.values())

    # ------------------------------------------------------------------------------------------------------ loads

    def load(self, vector: Vector, row: str, rows: str, at: tuple[str, ...], masked: bool, whole: bool = True) -> str:
        """Lines that load a tile of vectors [rows, channels] into the variable named as the operand; `at` is where a descriptor
        loads from. Where products come in parts, only the addresses, unless the tile is needed `whole`."""
        name, big = vector.name, pointer_name(vector.name)
        head = "h" if vector.group == 1 else f"(h // {vector.group})"
        if self.schedule.descriptors:
            return f"{name} = {big}.load([{corner(head, vector.group, at)}, 0]).reshape({rows}, {vector.block})"
        tests = ([f"({row}[:, None] < {'M' if row == 'q_idx' else 'N'})"] if masked else []) + (
            [f"({name}_channels[None, :] < {vector.size})"] if vector.block != vector.size else []
        )
        guard = f", mask={' & '.join(tests)}, other=0.0" if tests else ""
        addresses = (
            f"{name}_rows = {big} + b.to(tl.int64) * stride_{name}_b + {head}.to(tl.int64) * stride_{name}_h"
            f" + {row}.to(tl.int64)[:, None] * stride_{name}_row"
        )
        if self.in_parts and not whole:
            return addresses
        lines = [f"{name}_channels = tl.arange(0, {vector.block})", addresses]
        lines.append(f"{name} = tl.load({name}_rows + {name}_channels[None, :] * stride_{name}_channel{guard})")
        return "\n".join(lines)

    def has_warp_roles(self, kernel: str) -> bool:
        return self.schedule.warp_roles and kernel != "attention_delta"

    def whole_key_tiles(self, kernel: str) -> bool:
        """True where no key tile of a kernel with warp roles is cut short, as far as is known."""
        n, schedule = self.program.axes.kv_idx, self.schedule.of(kernel)
        if schedule.tiles:
            return schedule.tiles.rows_inside if kernel == "attention_backward_keys" else schedule.tiles.inside
        return self.has_warp_roles(kernel) and isinstance(n, Const) and int(n.value) % schedule.block_n == 0

    @property
    def delta_with_queries(self) -> bool:
        """True where the backward kernel for queries also makes delta."""
        kernels = backward_kernels(self.program, self.schedule, self.layout.wanted)
        return "attention_backward_queries" in kernels and "attention_delta" not in kernels

    def takes_tickets(self, kernel: str) -> bool:
        """True where programs ask for their next row: rows differ in length. The counter is zero before: the kernel that plans sets it so,
        or it comes with the memory of delta."""
        if kernel != "attention_forward":
            return self.has_warp_roles(kernel)
        return self.has_queue(kernel)

    def has_queue(self, kernel: str) -> bool:
        """True where only the device knows how long rows are, and so in which order they are taken (runtime/queue.py)."""
        return self.has_warp_roles(kernel) and not self.schedule.of(kernel).tiles and bool(reads_of(self.program.keep.predicate))

    def heads_in_turn(self, kernel: str) -> int:
        """Heads whose rows of tiles are taken by turns. Rows of a grid each have keys of their own, so no more than the cache has; other
        rows that run together mostly read the same tiles."""
        tiles = self.schedule.of(kernel).tiles
        if not tiles:
            return _IN_TURN
        tokens = math.prod(axis.length for axis in tiles.axes)
        sharing = self.group if kernel == "attention_backward_keys" else 1 / self.group
        return min(_IN_TURN, heads_cached(self.program, tokens * sharing))

    def descriptor_block(self, kernel: str, name: str) -> tuple[int, ...] | None:
        """The tile that a tensor descriptor parameter loads; None for a parameter that is none."""
        if not self.schedule.descriptors or not self.schedule.follows_plan(kernel):
            return None
        lefts = {"O", "Summed", "DO", *(pointer_name(v.name) for v in self.lefts())}
        sizes = {pointer_name(v.name): v.block for v in self.vectors.values()} | {"DO": self.value.block}
        if self.has_warp_roles(kernel):
            sizes |= {"O": self.value.block, "Summed": self.value.block}
            sizes |= {f"Grad_{v.name}": v.block for v in self.vectors.values() if v.name in self.layout.described}
            lefts |= {f"Grad_{v.name}" for v in self.lefts()}
        by_list = kernel == "attention_forward" and self.layout.by_list is not None
        if name not in sizes or (by_list and name in ("O", pointer_name(self.lefts()[0].name))):
            return None
        schedule = self.schedule.of(kernel)
        queries, keys = (self.box(kernel, axis) for axis in (Q_IDX, KV_IDX))
        box = queries if name in lefts else keys
        if self.has_warp_roles(kernel) and (name in lefts) != (kernel == "attention_backward_keys"):
            box = halved(box)  # each of the two groups has its own rows
        channels = sizes[name]
        if schedule.pairs and name not in lefts:  # half of a tile in shared memory is a run of each of its panels
            channels = min(channels, PANEL)
        return ((1, 1) if len(box) < 3 else (1,)) + (*box, channels)

    def box(self, kernel: str, axis: Axis) -> tuple[int, ...]:
        """The shape of a tile along the axes of tokens."""
        schedule = self.schedule.of(kernel)
        by_keys, tiles = kernel == "attention_backward_keys", schedule.tiles
        if not tiles:
            return (schedule.block_m if axis == Q_IDX else schedule.block_n,)
        return tiles.rows if (axis == KV_IDX) == by_keys else tiles.columns

    def load_all(
        self, vectors: Iterable[Vector], row: str, rows: str, at: tuple[str, ...], masked: bool, whole: Collection[Vector] = ()
    ) -> str:
        """Lines that load the vectors of products of queries and keys; `whole` are those that other products take as well."""
        return "\n".join(self.load(v, row, rows, at, masked, v in whole) for v in dict.fromkeys(vectors))

    def positions(self, kernel: str) -> tuple[TilePositions, TilePositions]:
        """How a kernel finds the positions of its queries, and of its keys."""
        tiles = self.schedule.of(kernel).tiles
        by_keys = kernel == "attention_backward_keys"
        return TilePositions(Q_IDX, tiles, by_keys), TilePositions(KV_IDX, tiles, not by_keys)

    def lefts(self) -> list[Vector]:
        return [self.vectors[dot.left] for dot in self.dots]

    def rights(self) -> list[Vector]:
        return [self.vectors[dot.right] for dot in self.dots]

    def products(self, transposed: bool) -> str:
        lines = []
        for dot, name in self.dot_names.items():
            left, right = self.vectors[dot.left], self.vectors[dot.right]
            if len({self.program.decls[vector.name].dtype for vector in (left, right)}) > 1 and not self.in_parts:
                sides = (f"{left.name}.to(tl.float32)", f"{right.name}.to(tl.float32)")  # a product takes two of a kind
            else:
                sides = left.name, right.name
            lines.append(f"{name} = {self.inner_products(*sides, left.size, transposed)}")
        return "\n".join(lines)

    def inner_products(self, query: str, key: str, size: int, transposed: bool) -> str:
        """Of each vector of the query side with each of the key side, over `size` channels; `transposed` puts keys on rows."""
        if self.in_parts:
            self.helpers |= {"add_apart", "dot_in_parts"}
            query = f"{query}_rows, q_idx[:, None] < M, {'stride_do_d' if query == 'do' else f'stride_{query}_channel'}"
            key = f"{key}_rows, kv_idx[:, None] < N, stride_{key}_channel"
        first, second = (key, query) if transposed else (query, key)
        return f"dot_in_parts({first}, {second}, {size})" if self.in_parts else self.dot(first, f"tl.trans({second})")

    def dot(self, left: str, right: str, onto: str = "") -> str:
        """A product of two tiles, added `onto` an accumulator if there is one."""
        if self.in_parts and onto:
            self.helpers.add("add_apart")
            return f'add_apart({onto}, tl.dot({left}, {right}, input_precision="ieee"))'
        precision = f'input_precision="{self.float32}"' if self.float32 else ""
        return f"tl.dot({', '.join(filter(None, [left, right, onto, precision]))})"

    # ----------------------------------------------------------------------------------------------------- scores

    def names(self, kernel: str, bounds: frozenset[str]) -> Names:
        coordinates = {spelling: name for side in self.positions(kernel) for spelling, name in side.names.items()}
        transposed = kernel == "attention_backward_keys"
        return Names(self.program, self.dot_names, transposed, bounds, helpers=self.helpers, coordinates=coordinates)

    def score(self, masked: bool, names: Names) -> tuple[str, str]:
        """(score, what multiplies it into base-2 units): the product joins the subtraction of the maximum in one instruction."""
        expr = self.program.score if masked else self.kept_score
        if self.program.absorbs:
            return self.base2(triton(expr, names)), ""
        expr, factor = without_factor(expr)
        return triton(expr, names), f" * {factor * LOG2E!r}"

    def base2(self, text: str) -> str:
        """A score in base-2 units; a finite mask must not overflow on the way."""
        if self.program.absorbs:
            self.helpers.add("to_base2")
            return f"to_base2({text})"
        return f"({text}) * {LOG2E!r}"

    def natural(self, text: str) -> str:
        """Back from base-2 units."""
        if self.program.absorbs:
            self.helpers.add("to_natural")
            return f"to_natural({text})"
        return f"({text}) * {math.log(2)!r}"

    def element_reads(self, extra: bool) -> list[Read]:
        """Single elements that scores, predicate and factors read; those of extra scores too if `extra`."""
        exprs: tuple[Expr, ...] = (self.program.score, self.program.keep.predicate, self.program.adjust)
        exprs += self.program.weigh.extra if extra else ()
        return [r for r in dict.fromkeys(r for e in exprs for r in reads_of(e)) if r.tensor not in self.program.vectors]

    def preload(self, names: Names, axes: frozenset[str], extra: bool = False) -> str:
        """Load what varies with no other axes than `axes`: before a loop, not in it."""
        before = len(names.lines)
        for read in self.element_reads(extra):
            if axes_of(read) <= axes:
                triton(read, names)
        lines = names.lines[before:]
        del names.lines[before:]
        return "\n".join(lines)

    def plan_row(self, tile: str, tiles: str) -> str:
        """Where the plan of a row of tiles lies; rows come in the order of launch."""
        axes = axes_of(self.program.keep.predicate)
        if "b" in axes:
            batch = "b * H + h" if "h" in axes else "b"
            return f"({batch}) * {tiles} + {tile}"
        return f"h * {tiles} + {tile}" if "h" in axes else tile


def corner(head: str, group: int, at: tuple[str, ...]) -> str:
    """Where a descriptor loads from: batch, head and tokens; with three axes of tokens batch and head are one."""
    heads = "H" if group == 1 else f"(H // {group})"
    return ", ".join((f"b * {heads} + {head}", *at) if len(at) == 3 else ("b", head, *at))


def halved(box: tuple[int, ...]) -> tuple[int, ...]:
    """The first half of the tokens of a box, in their order."""
    place = split_axis(box)
    return (*box[:place], box[place] // 2, *box[place + 1 :])


def without_factor(expr: Expr) -> tuple[Expr, float]:
    """`expr` as a rest times a positive constant: the row maximum may be taken before scaling."""
    factor = 1.0
    while isinstance(expr, Apply) and expr.op in ("mul", "div") and isinstance(expr.args[1], Const) and axes_of(expr):
        value = float(expr.args[1].value)
        if not 0.0 < value < math.inf:
            break
        factor = factor * value if expr.op == "mul" else factor / value
        expr = expr.args[0]
    return expr, factor


def program_dots(program: Attention) -> tuple[Dot, ...]:
    return tuple(dict.fromkeys(dot for e in (program.score, program.adjust) for dot in dots_of(e)))


def vector_reads(program: Attention) -> tuple[Read, ...]:
    """Every vector read once: the sides of the products, then the value."""
    reads = [read for dot in program_dots(program) for read in (dot.left, dot.right)]
    return tuple(dict.fromkeys([*reads, program.sum]))


def shared_heads(program: Attention, groups: tuple[int, ...]) -> int:
    """How many heads one program of the key side serves: those that share keys and values; 1 where these are shared differently."""
    of = dict(zip(vector_reads(program), groups, strict=True))
    shared = {of[dot.right] for dot in program_dots(program)} | {of[program.sum]}
    return next(iter(shared)) if len(shared) == 1 else 1


def _literal(program: Attention, read: Read) -> int:
    size = program.decls[read.tensor].shape[-1]
    if not isinstance(size, Const):
        raise UnsupportedProgram("the head size is not known when compiling", do="mark it static")
    if int(size.value) > MAX_HEAD_SIZE:
        raise UnsupportedProgram(f"a head size of {size.value} is over {MAX_HEAD_SIZE}", where=program.origin.line)
    if program.decls[read.tensor].dtype is Dtype.F64:
        raise UnsupportedProgram("float64 has no kernel", where=program.origin.line, do="use the portable lowering")
    return int(size.value)


def element_gradients(program: Attention, wanted: frozenset[str]) -> list[Read]:
    """Single elements of wanted operands that scores or factors read; those of extra scores alone are left to the caller."""
    exprs = (program.score, program.adjust)
    reads = dict.fromkeys(r for x in exprs for r in reads_of(x))
    return [r for r in reads if r.tensor in wanted and r.tensor not in program.vectors]


def side_of(read: Read) -> str:
    """Where the gradient of an element is summed: over the rows' keys ("q"), over the columns' queries ("kv"), or not ("pair")."""
    axes = axes_of(read)
    return "pair" if {"q_idx", "kv_idx"} <= axes else "kv" if "kv_idx" in axes else "q"


def tag(e: Emission, read: Read) -> str:
    """A name for the gradient of one element read."""
    reads = [r for r in element_gradients(e.program, e.layout.wanted) if r.tensor == read.tensor]
    place = reads.index(read)
    return read.tensor if place == 0 else f"{read.tensor}_{place + 1}"


def needed_kernels(program: Attention, wanted: frozenset[str]) -> frozenset[str]:
    """Which backward kernels make the gradients in `wanted`."""
    found = set()
    reads = element_gradients(program, wanted)
    if any(d.left.tensor in wanted for d in program_dots(program)) or any(side_of(r) != "kv" for r in reads):
        found.add("queries")
    if program.sum.tensor in wanted or any(d.right.tensor in wanted for d in program_dots(program)):
        found.add("keys")
    if any(side_of(r) == "kv" for r in reads):
        found.add("keys")
    return frozenset(found)


def backward_kernels(program: Attention, schedule: Schedule, wanted: frozenset[str]) -> list[str]:
    """The kernels that make the gradients in `wanted`, in the order that they run in. With warp roles the one for queries makes delta on
    its way, as long as that is rowsum(O * dO)."""
    sides = needed_kernels(program, wanted)
    alone = not schedule.warp_roles or schedule.delta_over_keys or "queries" not in sides
    of_extra = any(read.tensor in wanted for expr in program.weigh.extra for read in reads_of(expr))  # torch makes these of delta
    found = ["attention_delta"] if (sides or of_extra) and alone else []
    return found + [f"attention_backward_{side}" for side in sorted(sides, reverse=True)]


def parameters_of(e: Emission, kernel: str) -> list[str]:
    """The signature of a kernel: only what it uses."""
    wanted = e.layout.wanted
    sizes = size_names(e.program, e.program.expressions)
    rows = ["Lse", "Delta", "Reference"] + (["DLse"] if e.layout.has_grad_lse else [])  # what a delta kernel reads and makes
    if kernel == "delta" and not e.schedule.delta_over_keys:
        strides = [f"stride_{t}_{a}" for t in ("o", "do") for a in "bhm"] + ["stride_do_d"]
        return ["O", "DO", *rows, *strides, "H", "M", "BLOCK_M: tl.constexpr"]
    vectors = list(e.vectors.values())
    parameters = [pointer_name(v.name) for v in vectors]
    if not e.schedule.descriptors:
        parameters += [f"stride_{v.name}_{a}" for v in vectors for a in ("b", "h", "row", "channel")]
    tensors = dict.fromkeys(r.tensor for r in e.element_reads(extra=kernel == "forward"))
    for tensor in tensors:
        parameters.append(pointer_name(tensor))
        parameters += [f"stride_{tensor}_{place}" for place in range(len(e.program.decls[tensor].shape))]
    if kernel == "forward":
        parameters += ["O", "Lse", *(["Rcp"] if e.program.has_rcp else [])]
        if e.layout.by_list is not None:
            parameters += list_parameters(e)
        elif not e.schedule.warp_roles:
            parameters += ["stride_o_b", "stride_o_h", "stride_o_m"]
    else:
        rcp = ["Rcp"] if e.program.has_rcp else []
        parameters += ["DO", *([] if e.schedule.descriptors else [f"stride_do_{a}" for a in "bhmd"])]
        makes_delta = kernel == "delta" or (kernel == "queries" and e.delta_with_queries)
        parameters += ["O"] if kernel == "queries" and makes_delta else []
        parameters += [*rcp, *rows] if makes_delta else ["Reference", *rcp, "Delta"]
        reads = element_gradients(e.program, wanted)
        moved: list[Vector] = []
        tags: list[str] = []
        if kernel == "queries":
            moved = [e.vectors[d.left] for d in e.dots if d.left.tensor in wanted]
            tags = [tag(e, r) for r in reads if side_of(r) != "kv"]
        elif kernel == "keys":
            moved = [e.vectors[d.right] for d in e.dots if d.right.tensor in wanted]
            moved += [e.value] if e.value.name in wanted else []
            tags = [tag(e, r) for r in reads if side_of(r) == "kv"]
        for vector in dict.fromkeys(moved):
            parameters.append(f"Grad_{vector.name}")
            if not (e.schedule.warp_roles and vector.name in e.layout.described):
                parameters += [f"stride_grad_{vector.name}_{a}" for a in ("b", "h", "row", "channel")]
        parameters += [f"Grad_{tag}" for tag in tags]
    section = f"backward_{kernel}" if kernel in ("queries", "keys") else kernel
    tiles = e.schedule.of(section).tiles
    parameters += ["Origins", "Windows"] if tiles else []
    for name in ("Full", "Partial"):
        parameters += [f"{name}Count", f"{name}Begin", f"{name}End", f"{name}_ranges"]
    if e.has_warp_roles(f"attention_{section}"):
        parameters += ["NextRow"] if e.takes_tickets(f"attention_{section}") else ["Shares"]
        parameters += ["Queue"] if e.has_queue(f"attention_{section}") else []
    return [*parameters, "Order", "H", "M", "N", *sizes, "BLOCK_M: tl.constexpr", "BLOCK_N: tl.constexpr"]


def list_parameters(e: Emission) -> list[str]:
    """What a forward kernel takes besides where queries come and outputs go by list."""
    assert e.layout.by_list is not None
    strides = [f"stride_{e.lefts()[0].name}_{a}" for a in ("b", "h", "row")] + [f"stride_o_{a}" for a in "bhm"]
    gains = ["Gain", *(f"stride_gain_{a}" for a in "bhm")] if e.layout.by_list.gains else []
    return [*strides, "Index", "Count", *gains, *(["Summed"] if e.layout.by_list.sums else [])]


def visit_ranges(template: str, name: str, tile: str, plan_row: str, moving: TilePositions) -> str:
    comment = "# tiles whose every pair is kept" if name == "Full" else "# tiles at an edge of the mask or of the tensors"
    return comment + fill(template.replace("{name}", name), tile=tile, plan_row=plan_row, origins=moving.origins)
