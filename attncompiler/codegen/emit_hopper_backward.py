"""The Hopper backward kernels of a program: the holes of the portable Triton kernels, in Gluon."""

from __future__ import annotations

from attncompiler.codegen.emission import Emission, Vector, corner, element_gradients, parameters_of, side_of, tag, vector_reads
from attncompiler.codegen.emit_backward import KEYS, gradient_text, pair_gradients, row_statistics, scaled
from attncompiler.codegen.group_bounds import group_test
from attncompiler.codegen.hopper import (
    element_type,
    every_tile,
    head_of,
    listed,
    of_group,
    passed_on,
    row_holes,
    with_literals,
)
from attncompiler.codegen.kept_scores import kept_scores
from attncompiler.codegen.text import fill, signature
from attncompiler.codegen.tile_bounds import FlatNames
from attncompiler.codegen.triton_expr import Names, pointer_name, stride_name, triton
from attncompiler.ir.expr import KV_IDX, Q_IDX, Axis, Const, Dot, Expr, Read, axes_of, reads_of
from attncompiler.ir.program import Dtype
from attncompiler.templates import hopper_backward, softmax_backward


def hopper_backward_source(e: Emission, kernel: str) -> str:
    """The kernel for the gradients of keys, or that for queries; its helpers are those of `hopper_source`."""
    return _Side(e, kernel).source()


_MOST_HANDED = (
    208  # bytes of parameters, which lie in shared memory too: with 128 channels the ring then still fits (232440 of 232448)
)


class _Side:
    """One of the two kernels: what it holds, and what streams past that."""

    def __init__(self, e: Emission, kernel: str) -> None:
        self.e, self.kernel = e, kernel
        self.by_keys = kernel == KEYS
        self.dot: Dot = e.dots[0]
        self.q, self.k, self.v = (e.vectors[read] for read in vector_reads(e.program))
        queries, keys = e.positions(kernel)
        self.stays, self.moves = (keys, queries) if self.by_keys else (queries, keys)
        self.schedule = e.schedule.of(kernel)
        sides = self.schedule.block_n, self.schedule.block_m
        self.held_rows, self.streamed_rows = sides if self.by_keys else reversed(sides)
        self.row_tile = "kv_tile" if self.by_keys else "q_tile"
        self.members = e.group if self.by_keys else 1  # heads whose gradients one row sums
        self.along = "[None, :]" if self.by_keys else "[:, None]"  # of what there is one of for each query
        wanted = e.layout.wanted
        self.sums: list[Vector] = [x for x in ((self.v, self.k) if self.by_keys else (self.q,)) if x.name in wanted]
        of_side = "kv" if self.by_keys else "q"
        self.elements = [r for r in element_gradients(e.program, wanted) if side_of(r) == of_side]
        self.factors: dict[str, float] = {}
        self.makes_delta = not self.by_keys and e.delta_with_queries
        assert not self.makes_delta or self.held_rows == 2 * self.streamed_rows, "O takes the places of one tile that streams"
        self.brought = self._brought()
        starts = f"{self.row_tile} * {self.held_rows} + PART * 64", f"tile * {self.streamed_rows}"
        self.test = group_test(e, self.stays, self.moves, *starts, self.streamed_rows)

    def source(self) -> str:
        names = self.e.names(self.kernel, frozenset({self.stays.axis.name}))
        before = self.e.preload(names, frozenset({"b", "h", self.stays.axis.name}))
        operands = self._operands()
        all_rows = f"B * {operands['held_heads']} * {operands['row_tiles']}"
        holes = {**row_holes(self.e, self.kernel, self.row_tile, all_rows), **operands, **self._statistics()}
        holes |= self._outputs(holes)
        load = fill(hopper_backward.LOAD_TILE, **holes)
        parts = [
            fill(hopper_backward.LOADS, every_tile=every_tile(load), **holes),
            fill(hopper_backward.ROWS, every_tile=every_tile(self._tile(names.loaded)), before=before, **self._ends(), **holes),
            fill(hopper_backward.KERNEL, **holes),
        ]
        literals = {"{streamed_rows}": self.streamed_rows, "{stages}": self.schedule.num_stages}
        return with_literals("\n".join(parts), {**literals, "{d}": self.q.size, "{dtype}": element_type(self.e)})

    def _operands(self) -> dict[str, str]:
        """What the kernel is given, and where its tiles lie."""
        e, block = self.e, self.e.descriptor_block
        of_keys = [(pointer_name(x.name), head_of(x), x.group) for x in (self.k, self.v)]
        of_queries = [(pointer_name(self.q.name), "h", 1), ("DO", "h", 1)]
        held, streamed = (of_keys, of_queries) if self.by_keys else (of_queries, of_keys)
        held_box = e.box(self.kernel, KV_IDX if self.by_keys else Q_IDX)
        held_at = of_group(self.stays, f"{self.row_tile} * {self.held_rows}", held_box, "part")
        streamed_at = self.moves.at(f"tile * {self.streamed_rows}")
        section = self.kernel.removeprefix("attention_backward_")
        parameters = ["B", *(name for name in parameters_of(e, section) if not name.startswith("BLOCK_"))]
        found = {
            "kernel": self.kernel,
            "side": section,
            "parameters": signature(parameters),
            "operands": ", ".join(passed_on(e, self.kernel)),
            "row_tile": self.row_tile,
            "row_tiles": self._row_tiles(),
            "row_corner": self.stays.corner(self.row_tile) if self.stays.tiles else "",
            "row_positions": self._positions("(PART * 64 + gl.arange(0, 64, gl.SliceLayout(1, SCORES)))", held=True),
            "moving_corner": self.moves.corner("tile") if self.moves.tiles else "",
            "members": str(self.members),
            "held_heads": f"(H // {self.members})" if self.members > 1 else "H",
        }
        for what, sides, at in (("held", held, held_at), ("streamed", streamed, streamed_at)):
            found[what] = ", ".join(pointer for pointer, _, _ in sides)
            found[f"{what}_bytes"] = " + ".join(f"{pointer}.block_type.nbytes" for pointer, _, _ in sides)
            found[f"{what}_box"] = listed(block(self.kernel, sides[0][0]))
            for place, (pointer, head, group) in zip(("first", "second"), sides, strict=True):
                found |= {f"{place}_{what}": pointer, f"{place}_{what}_at": corner(head, group, at)}
        return found

    def _row_tiles(self) -> str:
        if self.stays.tiles:
            return str(self.stays.tiles.row_tiles)
        return f"gl.cdiv({'N' if self.by_keys else 'M'}, {self.held_rows})"

    def _positions(self, within: str, held: bool) -> str:
        """What computes the positions of a tile."""
        side, tile, rows = (self.stays, self.row_tile, self.held_rows) if held else (self.moves, "tile", self.streamed_rows)
        if side.tiles or held:
            return side.lines(tile, f"{tile} * {rows}", within)
        start = "q_start" if self.by_keys else "kv_start"
        return f"{start} = tile * {rows}\n{side.lines(tile, start, within)}"

    def _statistics(self) -> dict[str, str]:
        """How the groups come by reference and delta: with each tile of queries, or once for their own."""
        if not self.by_keys:
            return {
                "load_statistics": "", "store_statistics": "", "statistics_ring": "", "statistics_rings": "statistics_ring",
                "statistics_passed": "None", "statistics": "None", "ready_count": "1",
            }  # fmt: skip
        positions = self._positions(f"gl.arange(0, {self.streamed_rows}, PAIRS)", held=False)
        stages, layout = self.schedule.num_stages, "gl.SwizzledSharedLayout(1, 1, 1, [0])"
        rings = [f"statistics_ring = gl.allocate_shared_memory(gl.float32, [{2 * stages}, {self.streamed_rows}], {layout})"]
        operands, bring, store = "", "", ""
        if self.brought is not None:
            rings.append(f"brought_ring = gl.allocate_shared_memory(gl.int32, [{stages}, {self.streamed_rows}], {layout})")
            names = FlatNames(self.e.program, {}, bounds=frozenset({"q_idx"}))
            store = f"brought_ring.index(slot).store({triton(self.brought, names)})"
            bring = "\n".join(names.lines)
            strides = [stride_name(self.brought.tensor, place) for place in range(len(self.brought.index))]
            operands = ", " + ", ".join([pointer_name(self.brought.tensor), *strides])
        names_of_rings = "statistics_ring, brought_ring" if self.brought is not None else "statistics_ring"
        load = fill(hopper_backward.LOAD_STATISTICS, moving_positions=positions, brought_from=operands, bring=bring)
        return {
            "load_statistics": load,
            "store_statistics": fill(hopper_backward.STORE_STATISTICS, store_brought=store),
            "statistics_ring": "\n".join(rings),
            "statistics_rings": names_of_rings,
            "statistics_passed": names_of_rings,
            "statistics": f"(Reference, Delta{operands})",
            "ready_count": "2",
        }

    def _outputs(self, holes: dict[str, str]) -> dict[str, str]:
        """How the kernel for queries comes by O, where it makes delta."""
        if not self.makes_delta:
            return {"outputs": "", "unpack_rings": "", "load_outputs": ""}
        halves = {}
        for half, part in (("first", "0"), ("second", "1")):
            at = of_group(self.stays, f"{self.row_tile} * {self.held_rows}", self.e.box(self.kernel, Q_IDX), part)
            halves[f"{half}_half_at"] = corner("h", 1, at)
        return {
            "outputs": ", O",
            "unpack_rings": f"first_ring, second_ring, ready, free, {holes['statistics_rings']} = stream",
            "load_outputs": fill(hopper_backward.LOAD_OUTPUTS, **halves, held_box=holes["held_box"]),
        }

    def _brought(self) -> Read | None:
        """What the loading warp brings with a tile of queries, for masked tiles: the first number of each query that the mask alone
        reads, if shared memory has room for it."""
        parameters = [name for name in parameters_of(self.e, "keys") if not name.startswith("BLOCK_")]
        handed = sum(8 if name[0].isupper() and not name.endswith("_ranges") else 4 for name in parameters)
        if not self.by_keys or (self.q.size > 64 and handed > _MOST_HANDED):
            return None
        program = self.e.program
        score = {read for expr in (program.score, self.e.kept_score) for read in reads_of(expr)}
        for read in reads_of(program.keep.predicate):
            plain = all(isinstance(entry, Axis | Const) for entry in read.index)
            of_queries = "q_idx" in axes_of(read) and "kv_idx" not in axes_of(read)
            if plain and of_queries and program.decls[read.tensor].dtype is Dtype.I32 and read not in score:
                return read
        return None

    def _tile(self, loaded: dict[Expr, str]) -> str:
        names = self.e.names(self.kernel, frozenset({"q_idx"} | (set() if self.e.whole_key_tiles(self.kernel) else {"kv_idx"})))
        names.loaded = dict(loaded)
        names.tiles = {} if self.by_keys or self.schedule.tiles else {"kv_idx": ("kv_start", "within")}
        left, right = (self.q.name, "do") if self.by_keys else (self.k.name, self.v.name)
        kept = self._weights(names, False)
        gradients = self._gradients(names)
        reads = list(names.lines)
        if self.brought is not None:
            names.loaded[self.brought] = "brought"
            names.lines.append("brought = brought_ring.index(slot).load(gl.SliceLayout(0, SCORES))[None, :]")
        masked = self._weights(names, True)
        weights = _where_masked(
            "\n".join([*names.lines[len(reads) :], masked]), kept
        )  # what only the mask reads, masked tiles read
        statistics = "statistics_ring.index(slot * 2{}).load(gl.SliceLayout(0, SCORES))"
        products = fill(
            hopper_backward.PRODUCTS,
            left=left,
            right=right,
            streamed_reference=f"reference = {statistics.format('')}" if self.by_keys else "",
            streamed_delta=f"delta = {statistics.format(' + 1')}" if self.by_keys else "",
            weights=weights,
            along=self.along,
            values=self._values(),
            outstanding="1" if self._values() else "0",
            gradients="\n".join(gradients),
        )
        needed = ""
        if self.test.may:
            needed = fill(hopper_backward.NEEDED, bounds=self.test.lines, may=self.test.may)
            products = fill(hopper_backward.WHERE_NEEDED, products=products)
        positions = self._positions("within", held=False)
        return fill(hopper_backward.TILE, moving_positions=positions, reads="\n".join(reads), needed=needed, products=products)

    def _weights(self, names: Names, masked: bool) -> str:
        """What makes the weights of a tile from its products."""
        score, scale = self.e.score(masked, names)
        mask = kept_scores(self.e, names, self.kernel) if masked else ""
        scores = "\n".join(filter(None, [f"scores = {score}", mask]))
        return fill(hopper_backward.WEIGHTS, scores=scores, scale=scale, along=self.along)

    def _values(self) -> str:
        """The product that adds to the gradient of the values."""
        if not self.by_keys or self.v not in self.sums:
            return ""
        name = f"d{self.v.name}"
        return f"weights = gl.convert_layout(p.to({{dtype}}), WEIGHTS)\n{name} = warpgroup_mma(weights, do, {name}, is_async=True)"

    def _gradients(self, names: Names) -> list[str]:
        """What a tile adds to the gradients, after dS; all products are done at its end."""
        lines = []
        mine, theirs = (self.k, self.q) if self.by_keys else (self.q, self.k)
        if mine in self.sums:
            slopes, self.factors[mine.name] = self._slopes(names, self.dot)
            lines += [
                slopes,
                "slopes = gl.convert_layout(slopes.to({dtype}), WEIGHTS)",
                f"d{mine.name} = warpgroup_mma(slopes, {theirs.name}, d{mine.name}, is_async=True)",
            ]
        for read in self.elements:
            slopes, factor = self._slopes(names, read)
            lines += [slopes, f"d_{tag(self.e, read)} += tl.sum({scaled('slopes', factor)}, 1)"]
        lines += [] if self.by_keys else self._pairs(names)
        sums = ", ".join(f"d{vector.name}" for vector in self.sums)
        return [*lines, f"{sums} = warpgroup_mma_wait(0, ({sums},))"] if sums else lines

    def _slopes(self, names: Names, wrt: Dot | Read) -> tuple[str, float]:
        """What makes the tile of d loss / d wrt, and the constant factor that is left to apply."""
        (text, factor), (kept, _) = (gradient_text(self.e, names, wrt, masked) for masked in (True, False))
        return _where_masked(f"slopes = {text}", f"slopes = {kept}"), factor

    def _pairs(self, names: Names) -> list[str]:
        masked, kept = (pair_gradients(self.e, names, masked) for masked in (True, False))
        return [_where_masked("\n".join(masked), "\n".join(kept))] if masked else []

    def _ends(self) -> dict[str, str]:
        """The begin and the end of a row."""
        sums = [f"d{vector.name}" for vector in self.sums]
        start = [f"{name} = no_sums" for name in sums]
        if self.members > 1:
            start = [f"{name} = gl.where(h % {self.members} == 0, no_sums, {name})" for name in sums]
        start += [f"d_{tag(self.e, r)} = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))" for r in self.elements]
        start.append(self.test.row_lines)
        reference, store_delta = row_statistics(self.e)
        if not self.by_keys:
            start += [
                "rows = (b.to(tl.int64) * H + h) * M + q_idx",
                reference if self.makes_delta else softmax_backward.LOAD_DELTA.strip(),
            ]
        sent = self._sent()
        free_before = hopper_backward.FREE_BEFORE.strip() if sent else ""
        if free_before and self.members > 1:  # only the first of the heads finds another row's gradients on their way
            free_before = free_before.replace("pred=place > 0", f"pred=(place > 0) & (h % {self.members} == 0)")
        start += [free_before, "mbarrier.wait(held_ready.index(at), place // 2 % 2)"]
        start += [f"{place} = {place}_held.index(at).reshape([64, {{d}}])" for place in ("first", "second")]
        if self.makes_delta:
            held_box = listed(self.e.descriptor_block(self.kernel, "DO"))
            start.append(fill(hopper_backward.MAKE_DELTA, held_box=held_box, store_delta=store_delta))
        return {
            "no_sums": "\n".join(f"{name} = no_sums" for name in sums) if self.members > 1 else "",
            "start": "\n".join(filter(None, start)),
            "finish": self._finish(sent),
            "drain": "tma.store_wait(0)" if sent else "",
        }

    def _sent(self) -> list[Vector]:
        """The gradients that go out by TMA."""
        return [vector for vector in self.sums if vector.name in self.e.layout.described]

    def _finish(self, sent: list[Vector]) -> str:
        """What a row leaves: elements of each head, then what its heads have summed."""
        e, axis, end = self.e, self.stays.axis.name, "N" if self.by_keys else "M"
        rows = f"(b.to(tl.int64) * H + h) * {end} + {axis}"
        lines = [f"tl.store(Grad_{tag(e, r)} + {rows}, d_{tag(e, r)}, mask={axis} < {end})" for r in self.elements]
        head = f"h // {self.members}" if self.members > 1 else "h"
        held_box = e.box(self.kernel, KV_IDX if self.by_keys else Q_IDX)
        at = corner(head, self.members, of_group(self.stays, f"{self.row_tile} * {self.held_rows}", held_box, "PART"))
        places = {vector.name: place for vector, place in zip((self.k, self.v), ("first", "second"), strict=True)}
        stored, going = [], []
        for vector in self.sums:
            value = scaled(f"d{vector.name}", self.factors.get(vector.name, 1.0))
            place = places.get(vector.name, "first")
            if vector in sent:
                stored.append(fill(hopper_backward.STORE_TILE, place=place, value=value))
                going.append(fill(hopper_backward.SEND_TILE, name=vector.name, at=at, place=place))
            else:
                head_text = f"({head})" if self.members > 1 else head
                stored.append(fill(hopper_backward.STORE, axis=axis, name=vector.name, head=head_text, end=end, value=value))
        pieces = [*stored, *(["fence_async_shared()"] if sent else []), *going]
        store = "\n".join(piece.strip("\n") for piece in pieces)
        if sent:
            store = f"{self.stays.corner(self.row_tile)}\n{store}" if self.stays.tiles else store
        if self.members == 1:
            free = [] if sent else ["mbarrier.arrive(held_free.index(at))"]
            return "\n".join([*lines, *free, store, "place += 1"])
        lines.append(f"last = h % {self.members} == {self.members - 1}")
        lines += [] if sent else ["mbarrier.arrive(held_free.index(at), pred=last)"]
        return "\n".join([*lines, fill("if last:\n    {store}", store=store), "place += last.to(gl.int32)"])


def _where_masked(masked: str, kept: str) -> str:
    """Lines for masked tiles and lines for others."""
    return kept if masked == kept else fill(hopper_backward.WHERE_MASKED, masked=masked, kept=kept)
