"""Program + schedule -> one readable Triton file: forward, delta and the two backward kernels. Fills holes, decides nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from attncompiler.codegen.text import fill, signature
from attncompiler.codegen.triton_expr import HELPERS, Names, number, pointer_name, size_names, triton
from attncompiler.errors import UnsupportedProgram
from attncompiler.ir.derivative import derivative
from attncompiler.ir.expr import ONE, TRUE, ZERO, Apply, Const, Dot, Expr, Kind, Read, axes_of, dots_of, reads_of, walk
from attncompiler.ir.program import Attention, Dtype, Empty, kind_of
from attncompiler.ir.text import expr_text, to_text
from attncompiler.passes.plan import score_where_kept
from attncompiler.templates import softmax_backward, softmax_forward
from attncompiler.tuning.schedule import KernelSchedule, Schedule

LOG2E = math.log2(math.e)
MAX_HEAD_SIZE = 512


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
class Layout:
    """What the operands look like at run time, as far as the source depends on it.

    `groups` holds the heads that share a vector, for each vector operand in order of first use; `wanted` names the operands whose
    gradients are asked for."""

    groups: tuple[int, ...]
    wanted: frozenset[str]
    has_grad_lse: bool = False


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
        self.precision = f', input_precision="{schedule.float32}"' if self._is(Dtype.F32) else ""
        self.kept_score = score_where_kept(program)
        self.bounded = not (isinstance(program.axes.kv_idx, Const))

    def _is(self, dtype: Dtype) -> bool:
        return any(self.program.decls[v.name].dtype is dtype for v in self.vectors.values())

    # ------------------------------------------------------------------------------------------------------ loads

    def load(self, vector: Vector, row: str, rows: str, start: str, masked: bool) -> str:
        """Lines that load a tile of vectors [rows, channels] into the variable named as the operand."""
        name, big = vector.name, pointer_name(vector.name)
        head = "h" if vector.group == 1 else f"h // {vector.group}"
        if self.schedule.descriptors:
            return f"{name} = {big}.load([b, {head}, {start}, 0]).reshape({rows}, {vector.block})"
        tests = ([f"({row}[:, None] < {'M' if row == 'q_idx' else 'N'})"] if masked else []) + (
            [f"({name}_channels[None, :] < {vector.size})"] if vector.block != vector.size else []
        )
        guard = f", mask={' & '.join(tests)}, other=0.0" if tests else ""
        lines = [f"{name}_channels = tl.arange(0, {vector.block})"]
        lines.append(
            f"{name}_rows = {big} + b.to(tl.int64) * stride_{name}_b + ({head}).to(tl.int64) * stride_{name}_h"
            f" + {row}.to(tl.int64)[:, None] * stride_{name}_row"
        )
        lines.append(f"{name} = tl.load({name}_rows + {name}_channels[None, :] * stride_{name}_channel{guard})")
        return "\n".join(lines)

    def descriptor_block(self, name: str, schedule: KernelSchedule) -> tuple[int, int, int, int] | None:
        """The tile that a tensor descriptor parameter loads; None for a parameter that is none."""
        lefts = {pointer_name(v.name) for v in self.lefts()}
        for vector in self.vectors.values():
            if pointer_name(vector.name) == name:
                return (1, 1, schedule.block_m if name in lefts else schedule.block_n, vector.block)
        return (1, 1, schedule.block_m, self.value.block) if name == "DO" else None

    def load_all(self, vectors: Iterable[Vector], row: str, rows: str, start: str, masked: bool) -> str:
        return "\n".join(self.load(vector, row, rows, start, masked) for vector in dict.fromkeys(vectors))

    def lefts(self) -> list[Vector]:
        return [self.vectors[dot.left] for dot in self.dots]

    def rights(self) -> list[Vector]:
        return [self.vectors[dot.right] for dot in self.dots]

    def products(self, transposed: bool) -> str:
        lines = []
        for dot, name in self.dot_names.items():
            left, right = self.vectors[dot.left].name, self.vectors[dot.right].name
            first, second = (right, left) if transposed else (left, right)
            lines.append(f"{name} = tl.dot({first}, tl.trans({second}){self.precision})")
        return "\n".join(lines)

    # ----------------------------------------------------------------------------------------------------- scores

    def names(self, transposed: bool, bounds: frozenset[str]) -> Names:
        return Names(self.program, self.dot_names, transposed, bounds, helpers=self.helpers)

    def score(self, masked: bool, names: Names) -> tuple[str, str]:
        """(score, what multiplies it into base-2 units): the product joins the subtraction of the maximum in one instruction."""
        expr = self.program.score if masked else self.kept_score
        if self.program.absorbs:
            return self.base2(triton(expr, names)), ""
        if isinstance(expr, Dot):
            return names.dots[expr], f" * {LOG2E!r}"
        if (
            isinstance(expr, Apply)
            and expr.op in ("mul", "div")
            and isinstance(expr.args[0], Dot)
            and isinstance(expr.args[1], Const)
        ):
            factor = float(expr.args[1].value) if expr.op == "mul" else 1.0 / float(expr.args[1].value)
            if factor > 0:  # the row maximum may be taken before scaling
                return names.dots[expr.args[0]], f" * {factor * LOG2E!r}"
        return triton(expr, names), f" * {LOG2E!r}"

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

    def mask_lines(self, names: Names) -> str:
        """What makes the scores of a partial tile -inf outside `keep` and outside the tensors."""
        tests = [f"({names.axis('kv_idx')} < N)"]
        keep = self.program.keep
        if keep.predicate != TRUE and keep.empty is not Empty.SCORE:
            tests.insert(0, triton(keep.predicate, names))
        return f'scores = tl.where({" & ".join(tests)}, scores, float("-inf"))'

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
        axes = axes_of(self.program.keep.predicate)
        if "b" in axes:
            batch = "b * H + h" if "h" in axes else "b"
            return f"({batch}) * {tiles} + {tile}"
        return f"h * {tiles} + {tile}" if "h" in axes else tile


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


# ----------------------------------------------------------------------------------------------------------- forward


def _forward(e: Emission) -> str:
    names = e.names(False, frozenset({"q_idx"}))
    queries = e.load_all(e.lefts(), "q_idx", "BLOCK_M", "q_tile * BLOCK_M", True)
    before = e.preload(names, frozenset({"b", "h", "q_idx"}), extra=True)
    loops = "\n".join(_forward_loop(e, names, masked) for masked in (False, True))
    extra = []
    for expr in e.program.weigh.extra:
        text = triton(expr, names).replace("[:, None]", "")
        extra += [f"extra = {e.base2(text)}", "m_new = tl.maximum(m_i, extra)",
                  'm_ref = tl.where(m_new == float("-inf"), 0.0, m_new)', "alpha = tl.exp2(m_i - m_ref)",
                  "l_i = l_i * alpha + tl.exp2(extra - m_ref)", "acc = acc * alpha[:, None]", "m_i = m_new"]  # fmt: skip
    finish = ["out = acc / l_i[:, None]"]
    if e.program.keep.empty is Empty.ZERO:
        finish = ["out = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]  # a row that keeps no key is 0"]
    finish.append(f"lse = {e.natural('m_i + tl.log2(l_i)')}")
    rcp = ""
    if e.program.has_rcp:
        rcp = (
            "# what rounding takes from lse, which may be too large to hold log(l_i), rcp gives back\n"
            f"rcp = tl.where(l_i == 0.0, 0.0, tl.exp2({e.base2('lse')} - m_i) / l_i)\n"
            "tl.store(Rcp + rows, rcp, mask=q_idx < M)"
        )
    return fill(
        softmax_forward.KERNEL,
        parameters=signature(_parameters(e, "forward")),
        load_queries="\n".join(filter(None, [queries, before])),
        loops=loops,
        extra_scores="\n".join(extra),
        finish="\n".join(finish),
        store_rcp=rcp,
    ).replace("BLOCK_DV", str(e.value.block)).replace("DV)", f"{e.value.size})")  # fmt: skip


def _forward_loop(e: Emission, outer: Names, masked: bool) -> str:
    names = e.names(False, frozenset({"q_idx", "kv_idx"}) if masked else frozenset({"q_idx"}))
    names.loaded = dict(outer.loaded)
    score, scale = e.score(masked, names)
    mask = e.mask_lines(names) if masked else ""
    adjust, weights = "", "p"
    before_adjust = len(names.lines)
    if e.program.adjust != ONE:
        factor = triton(e.program.adjust, names)
        adjust, weights = f"weights = p * {factor}", "weights"
    loads = "\n".join(names.lines[:before_adjust])
    adjust = "\n".join([*names.lines[before_adjust:], adjust]) if adjust else ""
    tile = fill(
        softmax_forward.TILE,
        load_keys=e.load_all(e.rights(), "kv_idx", "BLOCK_N", "kv_start", masked),
        score_lines="\n".join(filter(None, [e.products(False), loads])),
        score=score,
        scale=scale,
        apply_mask=mask,
        reference='m_ref = tl.where(m_new == float("-inf"), 0.0, m_new)  # no key yet: -inf minus -inf would be NaN'
        if masked
        else "m_ref = m_new",
        adjust=adjust,
        load_values=e.load_all([e.value], "kv_idx", "BLOCK_N", "kv_start", masked),
        weights=weights,
        precision=e.precision,
    ).replace("v.dtype), v,", f"{e.value.name}.dtype), {e.value.name},")
    name = "Partial" if masked else "Full"
    return _ranges(softmax_forward.LOOP_OVER_RANGES, name, tile, e.plan_row("q_tile", "tl.cdiv(M, BLOCK_M)"))


def _ranges(template: str, name: str, tile: str, plan_row: str) -> str:
    comment = "# tiles whose every pair is kept" if name == "Full" else "# tiles at an edge of the mask or of the tensors"
    return comment + fill(template.replace("{name}", name), tile=tile, plan_row=plan_row)


# ---------------------------------------------------------------------------------------------------------- backward


def _slope(expr: Expr, wrt: Dot | Read) -> Expr:
    return derivative(expr, wrt)


def _gradient_text(e: Emission, names: Names, wrt: Dot | Read, masked: bool) -> tuple[str, float]:
    """(tile of d loss / d wrt, constant factor still to be applied)."""
    score = _slope(e.program.score if masked else e.kept_score, wrt)
    adjust = _slope(e.program.adjust, wrt)
    nothing = Const(0.0)
    if adjust == nothing and isinstance(score, Const):
        return "ds", float(score.value)
    parts = [f"ds * {triton(score, names)}"] if score != nothing else []
    parts += [f"p * dp * {triton(adjust, names)}"] if adjust != nothing else []
    return " + ".join(parts) if parts else "tl.zeros_like(ds)", 1.0


def element_gradients(program: Attention, wanted: frozenset[str]) -> list[Read]:
    """Single elements of wanted operands that scores or factors read; those of extra scores alone are left to the caller."""
    exprs = (program.score, program.adjust)
    reads = dict.fromkeys(r for x in exprs for r in reads_of(x))
    return [r for r in reads if r.tensor in wanted and r.tensor not in program.vectors]


def side_of(read: Read) -> str:
    """Where the gradient of an element is summed: over the rows' keys ("q"), over the columns' queries ("kv"), or not ("pair")."""
    axes = axes_of(read)
    return "pair" if {"q_idx", "kv_idx"} <= axes else "kv" if "kv_idx" in axes else "q"


def _ds_lines(e: Emission, names: Names, transposed: bool) -> list[str]:
    row = "[None, :]" if transposed else "[:, None]"
    if e.program.adjust == ONE:
        return [f"ds = p * (dp - delta{row})"]
    before = len(names.lines)
    factor = triton(e.program.adjust, names)
    lines = names.lines[before:]
    del names.lines[before:]
    return [*lines, f"factor = {factor}", f"ds = p * (dp * factor - delta{row})"]


def _queries(e: Emission) -> str:
    wanted = e.layout.wanted
    names = e.names(False, frozenset({"q_idx"}))
    queries = e.load_all(e.lefts(), "q_idx", "BLOCK_M", "q_tile * BLOCK_M", True)
    before = e.preload(names, frozenset({"b", "h", "q_idx"}))
    lefts = [dot for dot in e.dots if dot.left.tensor in wanted]
    rows = [r for r in element_gradients(e.program, wanted) if side_of(r) == "q"]
    accumulators = [f"d{e.vectors[d.left].name} = tl.zeros([BLOCK_M, {e.vectors[d.left].block}], tl.float32)" for d in lefts]
    accumulators += [f"d_{_tag(e, r)} = tl.zeros([BLOCK_M], tl.float32)" for r in rows]
    factors: dict[str, float] = {}
    loops = "\n".join(_queries_loop(e, names, masked, lefts, rows, factors) for masked in (False, True))
    store = [_store_vector(e, e.vectors[d.left], "q_idx", "M", factors) for d in dict.fromkeys(lefts)]
    store += [f"tl.store(Grad_{_tag(e, r)} + rows, d_{_tag(e, r)}, mask=q_idx < M)" for r in rows]
    return fill(
        softmax_backward.QUERIES,
        parameters=signature(_parameters(e, "queries")),
        load_queries="\n".join(filter(None, [queries, before])),
        load_grad_o=_load_grad_o(e, "q_tile * BLOCK_M"),
        load_rcp=_load_rcp(e),
        accumulators="\n".join(dict.fromkeys(accumulators)),
        loops=loops,
        store="\n".join(store),
    ).replace("BLOCK_DV", str(e.value.block))  # fmt: skip


def _queries_loop(e: Emission, outer: Names, masked: bool, lefts: list[Dot], rows: list[Read], factors: dict[str, float]) -> str:
    names = e.names(False, frozenset({"q_idx", "kv_idx"}))
    names.loaded = dict(outer.loaded)
    score, scale = e.score(masked, names)
    mask = e.mask_lines(names) if masked else ""
    loads = list(names.lines)
    names.lines.clear()
    lines = _ds_lines(e, names, False)
    for dot in lefts:
        text, factor = _gradient_text(e, names, dot, masked)
        left, right = e.vectors[dot.left].name, e.vectors[dot.right].name
        if sum(other.left == dot.left for other in e.dots) > 1:  # each product has a factor of its own
            text, factor = _scaled(text, factor), 1.0
        factors[left] = factor
        lines.append(f"d{left} = tl.dot(({text}).to({right}.dtype), {right}, d{left}{e.precision})")
    for read in rows:
        text, factor = _gradient_text(e, names, read, masked)
        lines.append(f"d_{_tag(e, read)} += tl.sum({_scaled(text, factor)}, 1)")
    for read in element_gradients(e.program, e.layout.wanted):
        if side_of(read) == "pair":
            text, factor = _gradient_text(e, names, read, masked)
            lines.append("at = ((b.to(tl.int64) * H + h) * M + q_idx[:, None]) * N + kv_idx[None, :]")
            lines.append(
                f"tl.store(Grad_{_tag(e, read)} + at, {_scaled(text, factor)}, mask=(q_idx[:, None] < M) & (kv_idx[None, :] < N))"
            )
    lines = [*names.lines, *lines]
    tile = fill(
        softmax_backward.QUERIES_TILE,
        load_keys=e.load_all(e.rights(), "kv_idx", "BLOCK_N", "kv_start", masked),
        score_lines="\n".join(filter(None, [e.products(False), *loads])),
        score=score,
        scale=scale,
        apply_mask=mask,
        rcp=" * rcp[:, None]" if e.program.has_rcp else "",
        load_values=e.load_all([e.value], "kv_idx", "BLOCK_N", "kv_start", masked),
        gradients="\n".join(lines),
        precision=e.precision,
    ).replace("tl.trans(v)", f"tl.trans({e.value.name})")
    name = "Partial" if masked else "Full"
    return _ranges(softmax_forward.LOOP_OVER_RANGES, name, tile, e.plan_row("q_tile", "tl.cdiv(M, BLOCK_M)"))


def _keys(e: Emission) -> str:
    wanted = e.layout.wanted
    rights = [dot for dot in e.dots if dot.right.tensor in wanted]
    columns = [r for r in element_gradients(e.program, wanted) if side_of(r) == "kv"]
    value = e.value
    keys = e.load_all(e.rights(), "kv_idx", "BLOCK_N", "kv_tile * BLOCK_N", True)
    names = e.names(True, frozenset({"kv_idx", "q_idx"}))
    accumulators = [f"d{e.vectors[d.right].name} = tl.zeros([BLOCK_N, {e.vectors[d.right].block}], tl.float32)" for d in rights]
    accumulators += [f"d{value.name} = tl.zeros([BLOCK_N, {value.block}], tl.float32)"] if value.name in wanted else []
    head = [e.preload(names, frozenset({"b", "h", "kv_idx"}))]
    head += [f"d_{_tag(e, r)} = tl.zeros([BLOCK_N], tl.float32)" for r in columns]
    factors: dict[str, float] = {value.name: 1.0}
    loops = "\n".join(_keys_loop(e, names, masked, rights, columns, factors) for masked in (False, True))
    store = [_store_vector(e, e.vectors[d.right], "kv_idx", "N", factors) for d in dict.fromkeys(rights)]
    store += [_store_vector(e, value, "kv_idx", "N", factors)] if value.name in wanted else []
    per_head = [
        f"tl.store(Grad_{_tag(e, r)} + (b.to(tl.int64) * H + h) * N + kv_idx, d_{_tag(e, r)}, mask=kv_idx < N)" for r in columns
    ]
    return fill(
        softmax_backward.KEYS,
        parameters=signature(_parameters(e, "keys")),
        load_keys=keys,
        load_values=e.load_all([value], "kv_idx", "BLOCK_N", "kv_tile * BLOCK_N", True),
        accumulators="\n".join(dict.fromkeys(accumulators)),
        head_lines="\n".join(filter(None, head)),
        loops=loops,
        store_per_head="\n".join(per_head),
        store="\n".join(store),
    ).replace("BLOCK_DV", str(value.block)).replace("KV_HEADS", f"(H // {e.group})").replace("GROUP", str(e.group))  # fmt: skip


def _keys_loop(e: Emission, outer: Names, masked: bool, rights: list[Dot], columns: list[Read], factors: dict[str, float]) -> str:
    names = e.names(True, frozenset({"q_idx", "kv_idx"}))
    names.loaded = dict(outer.loaded)
    score, scale = e.score(masked, names)
    mask = e.mask_lines(names) if masked else ""
    loads = list(names.lines)
    names.lines.clear()
    value = e.value.name
    ds = _ds_lines(e, names, True)
    lines = []
    if value in e.layout.wanted:
        weights = "p" if e.program.adjust == ONE else "(p * factor)"
        lines.append(f"d{value} = tl.dot({weights}.to(do.dtype), do, d{value}{e.precision})")
    lines.append(f"dp = tl.dot({value}, tl.trans(do){e.precision})")
    if e.program.adjust != ONE:
        lines = [*ds[:-1], *lines, ds[-1]]
    else:
        lines += ds
    for dot in rights:
        text, factor = _gradient_text(e, names, dot, masked)
        left, right = e.vectors[dot.left].name, e.vectors[dot.right].name
        if sum(other.right == dot.right for other in e.dots) > 1:
            text, factor = _scaled(text, factor), 1.0
        factors[right] = factor
        lines.append(f"d{right} = tl.dot(({text}).to({left}.dtype), {left}, d{right}{e.precision})")
    for read in columns:
        text, factor = _gradient_text(e, names, read, masked)
        lines.append(f"d_{_tag(e, read)} += tl.sum({_scaled(text, factor)}, 1)")
    tile = fill(
        softmax_backward.KEYS_TILE,
        load_queries=e.load_all(e.lefts(), "q_idx", "BLOCK_M", "q_start", True),
        load_rcp=_load_rcp(e),
        score_lines="\n".join(filter(None, [e.products(True), *loads])),
        score=score,
        scale=scale,
        apply_mask=mask,
        rcp=" * rcp[None, :]" if e.program.has_rcp else "",
        load_grad_o=_load_grad_o(e, "q_start"),
        gradients="\n".join([*names.lines, *lines]),
    )
    name = "Partial" if masked else "Full"
    return _ranges(softmax_backward.LOOP_OVER_RANGES, name, tile, e.plan_row("kv_tile", "tl.cdiv(N, BLOCK_N)"))


def _tag(e: Emission, read: Read) -> str:
    """A name for the gradient of one element read."""
    reads = [r for r in element_gradients(e.program, e.layout.wanted) if r.tensor == read.tensor]
    place = reads.index(read)
    return read.tensor if place == 0 else f"{read.tensor}_{place + 1}"


def _scaled(text: str, factor: float) -> str:
    return text if factor == 1.0 else f"({text}) * {number(factor)}"


def _load_grad_o(e: Emission, start: str) -> str:
    value = e.value
    if e.schedule.descriptors:
        return f"do = DO.load([b, h, {start}, 0]).reshape(BLOCK_M, {value.block})"
    return (
        f"do_channels = tl.arange(0, {value.block})\n"
        "do_rows = DO + b.to(tl.int64) * stride_do_b + h.to(tl.int64) * stride_do_h + q_idx.to(tl.int64)[:, None] * stride_do_m\n"
        f"inside = (q_idx[:, None] < M) & (do_channels[None, :] < {value.size})\n"
        "do = tl.load(do_rows + do_channels[None, :] * stride_do_d, mask=inside, other=0.0)"
    )


def _load_rcp(e: Emission) -> str:
    return "rcp = tl.load(Rcp + rows, mask=q_idx < M, other=1.0)" if e.program.has_rcp else ""


def _store_vector(e: Emission, vector: Vector, row: str, size: str, factors: dict[str, float]) -> str:
    name = vector.name
    head = "h" if size == "M" else "kv_head"
    value = _scaled(f"d{name}", factors.get(name, 1.0))
    return (
        f"{name}_channels = tl.arange(0, {vector.block})\n"
        f"grad_rows = Grad_{name} + b.to(tl.int64) * stride_grad_{name}_b + {head} * stride_grad_{name}_h"
        f" + {row}.to(tl.int64)[:, None] * stride_grad_{name}_row\n"
        f"inside = ({row}[:, None] < {size}) & ({name}_channels[None, :] < {vector.size})\n"
        f"grad_at = grad_rows + {name}_channels[None, :] * stride_grad_{name}_channel\n"
        f"tl.store(grad_at, ({value}).to(Grad_{name}.dtype.element_ty), mask=inside)"
    )


def _delta(e: Emission) -> str:
    subtract = "delta -= tl.load(DLse + at, mask=rows < M, other=0.0)" if e.layout.has_grad_lse else ""
    empty = ""
    if e.program.keep.predicate != TRUE and e.program.keep.empty is not Empty.SCORE:
        empty = (
            'empty = lse == float("-inf")  # no key is kept: no weight, and no gradient of any score\n'
            'lse = tl.where(empty, float("inf"), lse)\n'
            "delta = tl.where(empty, 0.0, delta)"
        )
    return fill(
        softmax_backward.DELTA,
        parameters=signature(_parameters(e, "delta")),
        subtract_grad_lse=subtract,
        lse=e.base2("tl.load(Lse + at, mask=rows < M, other=0.0)"),
        guard_empty=empty,
    ).replace("BLOCK_DV", str(e.value.block)).replace("DV)", f"{e.value.size})")  # fmt: skip


# -------------------------------------------------------------------------------------------------------- parameters


def _parameters(e: Emission, kernel: str) -> list[str]:
    """The signature of a kernel: only what it uses."""
    wanted = e.layout.wanted
    sizes = size_names(e.program, e.program.expressions)
    if kernel == "delta":
        out = ["O", "DO", "Lse", "Delta", "Reference"] + (["DLse"] if e.layout.has_grad_lse else [])
        strides = [f"stride_{t}_{a}" for t in ("o", "do") for a in "bhm"] + ["stride_do_d"]
        return [*out, *strides, "H", "M", "BLOCK_M: tl.constexpr"]
    vectors = list(e.vectors.values())
    parameters = [pointer_name(v.name) for v in vectors]
    if not e.schedule.descriptors:
        parameters += [f"stride_{v.name}_{a}" for v in vectors for a in ("b", "h", "row", "channel")]
    tensors = dict.fromkeys(r.tensor for r in e.element_reads(extra=kernel == "forward"))
    for tensor in tensors:
        parameters.append(pointer_name(tensor))
        parameters += [f"stride_{tensor}_{place}" for place in range(len(e.program.decls[tensor].shape))]
    if kernel == "forward":
        parameters += ["O", "Lse", *(["Rcp"] if e.program.has_rcp else []), "stride_o_b", "stride_o_h", "stride_o_m"]
    else:
        parameters += ["DO", *([] if e.schedule.descriptors else [f"stride_do_{a}" for a in "bhmd"])]
        parameters += ["Reference", *(["Rcp"] if e.program.has_rcp else []), "Delta"]
        reads = element_gradients(e.program, wanted)
        if kernel == "queries":
            moved = [e.vectors[d.left] for d in e.dots if d.left.tensor in wanted]
            tags = [_tag(e, r) for r in reads if side_of(r) != "kv"]
        else:
            moved = [e.vectors[d.right] for d in e.dots if d.right.tensor in wanted]
            moved += [e.value] if e.value.name in wanted else []
            tags = [_tag(e, r) for r in reads if side_of(r) == "kv"]
        for vector in dict.fromkeys(moved):
            parameters.append(f"Grad_{vector.name}")
            parameters += [f"stride_grad_{vector.name}_{a}" for a in ("b", "h", "row", "channel")]
        parameters += [f"Grad_{tag}" for tag in tags]
    for name in ("Full", "Partial"):
        parameters += [f"{name}Count", f"{name}Begin", f"{name}End", f"{name}_ranges"]
    return [*parameters, "Order", "H", "M", "N", *sizes, "BLOCK_M: tl.constexpr", "BLOCK_N: tl.constexpr"]


# --------------------------------------------------------------------------------------------------------------- file


def emit(program: Attention, schedule: Schedule, layout: Layout) -> str:
    """The source of all kernels that `layout.wanted` needs. Raises: UnsupportedProgram, in the user's words."""
    _check(program)
    e = Emission(program, schedule, layout)
    kernels = [_forward(e)]
    sides = needed_kernels(program, layout.wanted)
    if sides:
        kernels.append(_delta(e))
    kernels += [_queries(e)] if "queries" in sides else []
    kernels += [_keys(e)] if "keys" in sides else []
    helpers = [HELPERS[name] for name in sorted(e.helpers)]
    return _header(program) + "\nimport triton\nimport triton.language as tl\n" + "\n".join([*helpers, *kernels])


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


def _check(program: Attention) -> None:
    for read in (r for x in program.expressions for r in reads_of(x)):
        if any(isinstance(n, Read) for entry in read.index for n in walk(entry)):
            raise UnsupportedProgram(f"{read.tensor} is read at an index that is itself read", where=program.origin.line)
    reads = vector_reads(program)
    if len({read.tensor for read in reads}) < len(reads):
        raise UnsupportedProgram("one tensor is read as two different vectors", where=program.origin.line)
    if any(kind_of(x, program.decls) is Kind.INT and x == ZERO for x in program.weigh.extra):
        raise UnsupportedProgram("an extra score is an integer", where=program.origin.line)


def _header(program: Attention) -> str:
    keep = program.keep
    what = "all pairs" if keep.predicate == TRUE else expr_text(keep.predicate)
    lines = [f"Attention for {program.origin.line or 'a declared program'}. Visits the tiles that hold a pair with: {what}."]
    lines += ["", *to_text(program).rstrip().splitlines()]
    lines += ["", "O[m] = sum_n softmax(score)[m, n] * V[n];  Lse[m] = log of the sum of exp(score), natural."]
    return "\n".join(f"# {line}".rstrip() for line in lines) + "\n"
