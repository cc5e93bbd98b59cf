"""The Hopper backward kernels of a program: the holes of the portable Triton kernels, in Gluon."""

from __future__ import annotations

from attncompiler.codegen.emission import Emission, Vector, corner, element_gradients, parameters_of, side_of, tag, vector_reads
from attncompiler.codegen.emit_backward import KEYS, gradient_text, pair_gradients, row_statistics, scaled
from attncompiler.codegen.group_bounds import group_test
from attncompiler.codegen.hopper import (
    bring,
    brought,
    element_type,
    every_tile,
    head_of,
    listed,
    of_group,
    passed_on,
    read_brought,
    row_holes,
    side_name,
    where_masked,
    with_literals,
)
from attncompiler.codegen.kept_scores import kept_scores
from attncompiler.codegen.text import fill, signature
from attncompiler.codegen.triton_expr import Names, pointer_name
from attncompiler.ir.expr import KV_IDX, Q_IDX, Dot, Expr, Read
from attncompiler.templates import hopper_backward, hopper_rows


def hopper_backward_source(e: Emission, kernel: str) -> str:
    """The kernel for the gradients of keys, or that for queries; its helpers are those of `hopper_source`."""
    return _Side(e, kernel).source()


# Bytes of parameters, which lie in shared memory too: with 128 channels the ring of what is brought then still fits.
_MOST_HANDED, _MOST_HANDED_IN_BOXES = 200, 192


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
        self.sent = [vector for vector in self.sums if vector.name in e.layout.described]  # those that go out by TMA
        of_side = "kv" if self.by_keys else "q"
        self.carries = not self.by_keys and bool(self.sums)  # a product is left to the next tile
        self.elements = [r for r in element_gradients(e.program, wanted) if side_of(r) == of_side]
        self.factors: dict[str, float] = {}
        self.label_decides = False
        assert self.by_keys or e.delta_with_queries
        assert self.held_rows == 2 * self.streamed_rows, "what stays in registers takes the places of one tile that streams"
        assert self.by_keys or self.schedule.num_stages >= 3, "Q, dO and O lie in the ring at once"
        self.brought = self._brought()
        starts = f"{self.row_tile} * {self.held_rows} + PART * 64", f"tile * {self.streamed_rows}"
        self.test = group_test(e, self.stays, self.moves, *starts, self.streamed_rows)

    def source(self) -> str:
        names = self.e.names(self.kernel, frozenset({self.stays.axis.name}))
        before = self.e.preload(names, frozenset({"b", "h", self.stays.axis.name}))
        tile = self._tile(names.loaded)
        operands = self._operands()
        rows = row_holes(self.e, self.kernel, self.row_tile, self._row_tiles(), self.members)
        holes = {**rows, **operands, **self._copies(), "find_needed": self._find_needed()}
        holes |= self._held(holes)
        holes |= self._sends(holes)
        load = fill(hopper_backward.LOAD_TILE, **holes)
        parts = [
            rows["telling_warp"],
            fill(hopper_backward.LOADS, every_tile=every_tile(load), **{**holes, "first_words": rows["first_words_of_a_warp"]}),
            fill(hopper_backward.ROWS, tile=tile, before=before, **self._ends(), **holes),
            holes["sending_warp"],
            fill(hopper_backward.KERNEL, **holes),
        ]
        stages = self.schedule.num_stages
        literals = {
            "{label_at}": "slot" if self.label_decides else f"slot + phase * {stages}",
            "{label_places}": stages if self.label_decides else 2 * stages,
            "{streamed_rows}": self.streamed_rows,
            "{stages}": stages,
            "{messages}": rows["messages"],
            "{places}": 2 if self.by_keys else 1,
            "{d}": self.q.size,
            "{dtype}": element_type(self.e),
        }
        return with_literals("\n".join(parts), literals)

    def _operands(self) -> dict[str, str]:
        """What the kernel is given, and where its tiles lie."""
        e, block = self.e, self.e.descriptor_block
        of_keys = [(pointer_name(x.name), head_of(x), x.group) for x in (self.k, self.v)]
        of_queries = [(pointer_name(self.q.name), "h", 1), ("DO", "h", 1)]
        held, streamed = (of_keys, of_queries) if self.by_keys else (of_queries, of_keys)
        held_at = self._held_at("part")
        streamed_at = self.moves.at(f"tile * {self.streamed_rows}")
        section = side_name(self.kernel)
        parameters = ["B", *(name for name in parameters_of(e, section) if not name.startswith("BLOCK_"))]
        found = {
            "kernel": self.kernel,
            "parameters": signature(parameters),
            "operands": ", ".join(name for name in passed_on(e, self.kernel) if name not in self._sent_names()),
            "row_tile": self.row_tile,
            "row_corner": self.stays.corner(self.row_tile) if self.stays.tiles else "",
            "row_positions": self._positions("(PART * 64 + gl.arange(0, 64, gl.SliceLayout(1, SCORES)))", held=True),
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

    def _copies(self) -> dict[str, str]:
        """What the loading warp copies beside a tile: the reference and delta of its queries, and what the mask reads."""
        stages, layout = self.schedule.num_stages, "gl.SwizzledSharedLayout(1, 1, 1, [0])"
        positions, copies, rings = [], [], []
        if self.by_keys:
            positions.append(hopper_backward.STATISTICS_AT)
            copies.append(self._copied_statistics())
            rings.append(f"statistics_ring = gl.allocate_shared_memory(gl.float32, [{2 * stages}, {self.streamed_rows}], {layout})")
        if self.brought is not None:
            copies.append(bring(self.e, self.brought, self.moves.axis, "slot"))
            rings.append(fill(hopper_rows.BRING_RING, places=str(stages), tokens=str(self.streamed_rows)))
        if copies:
            moving = self._positions(f"gl.arange(0, {self.streamed_rows}, SHARED)", held=False)
            positions.insert(0, fill(hopper_rows.COPIED_POSITIONS, tokens=str(self.streamed_rows), positions=moving))
            copies.append(fill(hopper_rows.COPIED, ready="ready"))
        elif self.moves.tiles:
            positions.append(self.moves.corner("tile"))
        passed = "statistics_ring" if self.by_keys else "None", "None" if self.brought is None else "brought_ring"
        return {
            "moving_positions": "\n".join(positions),
            "copies": "\n".join(copies),
            "rings": "\n".join(rings),
            "rings_passed": ", ".join(passed),
            "ready_count": "34" if copies else "2",  # the loads, the label, and the copies of each thread
        }

    def _copied_statistics(self) -> str:
        if self.moves.tiles and self.moves.tiles.inside:
            return hopper_backward.COPY_STATISTICS
        all_inside = "gl.max(q_idx, 0) < M" if self.moves.tiles else f"q_start + {self.streamed_rows} <= M"
        return fill(hopper_backward.COPY_STATISTICS_AT_EDGES, all_inside=all_inside, copy=hopper_backward.COPY_STATISTICS)

    def _sent_names(self) -> list[str]:
        return [f"Grad_{vector.name}" for vector in self.sent]

    def _sends(self, holes: dict[str, str]) -> dict[str, str]:
        """The warp that sends gradients, where they go out by TMA."""
        if not self.sent:
            return {
                "sending_warp": "", "sends": "", "row_readers": "3", "freeing": "2", "workers": "4, 1, 1", "registers": "240, 24, 24",
            }  # fmt: skip
        many = self.members > 1
        head = f"h // {self.members}" if many else "h"
        at = corner(head, self.members, self._held_at("part"))
        send = [fill(hopper_backward.SEND_TILE, name=vector.name, at=at, place=self._place_of(vector)) for vector in self.sent]
        names = ", ".join(self._sent_names())
        send_row = fill(hopper_backward.SEND_ROW, send="\n".join(piece.strip() for piece in send), **holes)
        if many:
            send_row = fill(hopper_backward.SEND_LAST, members=str(self.members), send_row=send_row)
        words = {**holes, "first_words": holes["first_words_of_a_warp"]}
        warp = fill(hopper_backward.SENDS, sent=names, send_row=send_row, **words)
        return {
            "sending_warp": warp,
            "sends": f"(_sends_{holes['side']}, ({names}, held, written, messages, H)),",
            "row_readers": "4",
            "freeing": "1",
            "workers": "4, 1, 1, 1",
            "registers": "240, 24, 24, 24",
        }

    def _held(self, holes: dict[str, str]) -> dict[str, str]:
        """Where what stays lies, and how it comes."""
        if self.by_keys:
            return {
                "outputs": "",
                "held_names": "first_held, second_held, held_ready, held_free",
                "held_passed": "first_held, second_held, held_ready, held_free",
                "held_places": fill(hopper_backward.HELD_PLACES, **holes),
                "load_held": fill(hopper_backward.LOAD_HELD, **holes),
            }
        at = {f"{half}_half_at": corner("h", 1, self._held_at(part)) for half, part in (("first", "0"), ("second", "1"))}
        copied = fill(hopper_rows.COPIED, ready="ready") if holes["copies"] else ""  # each slot of the ring is arrived at as often
        loads = [
            fill(hopper_backward.LOAD_THROUGH_RING, tensor=tensor, held_box=holes["held_box"], copied=copied, **at)
            for tensor in (holes["first_held"], holes["second_held"], "O")
        ]
        return {
            "outputs": ", O",
            "held_names": "leaving_held, held_free",
            "held_passed": f"{'leaving_held' if self.sent else 'None'}, held_free",
            "held_places": fill(hopper_backward.LEAVING, **holes) if self.sent else "",
            "load_held": "".join(loads),
        }

    def _brought(self) -> Read | None:
        """What the loading warp brings with a tile for the mask, if shared memory has room for it."""
        parameters = [name for name in parameters_of(self.e, "keys") if not name.startswith("BLOCK_")]
        handed = sum(8 if name[0].isupper() and not name.endswith("_ranges") else 4 for name in parameters)
        most = _MOST_HANDED_IN_BOXES if self.schedule.tiles else _MOST_HANDED
        fits = self.q.size <= 64 or not self.by_keys or handed <= most
        return brought(self.e, self.moves.axis) if fits else None

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
            names.lines.append(read_brought("slot"))
        masked = self._weights(names, True)
        weights = where_masked("\n".join([*names.lines[len(reads) :], masked]), kept)  # what only the mask reads, masked tiles read
        statistics = "statistics_ring.index(slot * 2{}).load(gl.SliceLayout(0, SCORES))"
        products = fill(
            hopper_backward.PRODUCTS,
            left=left,
            right=right,
            streamed_reference=f"reference = {statistics.format('')}" if self.by_keys else "",
            carried=self._carrying(hopper_backward.CARRIED),
            behind_scores="2" if self.carries else "1",
            streamed_delta=f"delta = {statistics.format(' + 1')}" if self.by_keys else "",
            weights=weights,
            along=self.along,
            values=self._values(),
            behind_slopes="1" if self._values() or self.carries else "0",
            gradients="\n".join(piece.strip("\n") for piece in gradients),
            moving_positions=self._positions("within", held=False),
            reads="\n".join(reads),
        )
        self.label_decides = weights != kept or bool(self.test.may)  # some branch needs it before the tile's place is free
        if self.test.may:
            products = fill(hopper_backward.WHERE_NEEDED, products=products, otherwise=self._carrying(hopper_backward.PASS_OVER))
        free = "" if self.carries else hopper_backward.FREE if self.sums else hopper_backward.FREE_WHEN_READ
        return fill(hopper_backward.TILE, products=products, free=free, read_label=hopper_rows.READ_LABEL)

    def _find_needed(self) -> str:
        """How the loading warp knows which group needs a tile."""
        if not self.test.may:
            return "needed = 3"
        lines = f"{self.test.row_lines}\n{self.test.lines}".replace("PART", "part")
        row_corner = self.stays.corner(self.row_tile) if self.stays.tiles else ""
        return fill(hopper_backward.FIND_NEEDED, row_corner=row_corner, bounds=lines, may=self.test.may)

    def _weights(self, names: Names, masked: bool) -> str:
        """What makes the weights of a tile from its products."""
        score, scale = self.e.score(masked, names)
        mask = kept_scores(self.e, names, self.kernel, "within") if masked else ""
        scores = "\n".join(filter(None, [f"scores = {score}", mask]))
        return fill(hopper_backward.WEIGHTS, scores=scores, scale=scale, along=self.along)

    def _carrying(self, template: str) -> str:
        """Text of a kernel that leaves the last product of each tile to the next."""
        if not self.carries:
            return ""
        add = fill(hopper_backward.ADD_CARRIED, sum=f"d{self.q.name}")
        return fill(template, sum=f"d{self.q.name}", add_carried=add, nothing_carried=hopper_backward.NOTHING_CARRIED)

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
            if self.carries:
                lines.append(f"{slopes}\nslopes_of_queries = slopes")
            else:
                lines += [
                    slopes,
                    "slopes = gl.convert_layout(slopes.to({dtype}), WEIGHTS)",
                    f"d{mine.name} = warpgroup_mma(slopes, {theirs.name}, d{mine.name}, is_async=True)",
                ]
        for read in self.elements:
            slopes, factor = self._slopes(names, read)
            lines += [slopes, f"d_{tag(self.e, read)} += tl.sum({scaled('slopes', factor)}, 1)"]
        lines += [] if self.by_keys else self._pairs(names)
        if self.carries:
            return [*lines, self._carrying(hopper_backward.CARRY)]
        sums = ", ".join(f"d{vector.name}" for vector in self.sums)
        return [*lines, f"{sums} = warpgroup_mma_wait(0, ({sums},))"] if sums else lines

    def _slopes(self, names: Names, wrt: Dot | Read) -> tuple[str, float]:
        """What makes the tile of d loss / d wrt, and the constant factor that is left to apply."""
        (text, factor), (kept, _) = (gradient_text(self.e, names, wrt, masked) for masked in (True, False))
        return where_masked(f"slopes = {text}", f"slopes = {kept}"), factor

    def _pairs(self, names: Names) -> list[str]:
        masked, kept = (pair_gradients(self.e, names, masked) for masked in (True, False))
        return [where_masked("\n".join(masked), "\n".join(kept))] if masked else []

    def _ends(self) -> dict[str, str]:
        """The begin and the end of a row."""
        sums = [f"d{vector.name}" for vector in self.sums]
        start = [f"{name} = no_sums" for name in sums]
        if self.members > 1:
            start = [f"{name} = gl.where(h % {self.members} == 0, no_sums, {name})" for name in sums]
        start += [f"d_{tag(self.e, r)} = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))" for r in self.elements]
        reference, store_delta = row_statistics(self.e)
        if not self.by_keys:
            start += [
                "rows = (b.to(tl.int64) * H + h) * M + q_idx",
                reference,
            ]
            held_box = listed(self.e.descriptor_block(self.kernel, "DO"))
            start.append(fill(hopper_backward.TAKE_FROM_RING, held_box=held_box, store_delta=store_delta))
            start.append(self._carrying(hopper_backward.NOTHING_CARRIED))
        else:
            start.append("mbarrier.wait(held_ready.index(at), place // 2 % 2)")
            start += [f"{place} = {place}_held.index(at).reshape([64, {{d}}])" for place in ("first", "second")]
        return {
            "no_sums": "\n".join(f"{name} = no_sums" for name in sums) if self.members > 1 else "",
            "start": "\n".join(piece.strip("\n") for piece in start if piece),
            "settle": self._carrying(hopper_backward.SETTLE),
            "finish": self._finish(),
        }

    def _held_at(self, part: str) -> tuple[str, ...]:
        """Where the rows that a group holds begin."""
        box = self.e.box(self.kernel, KV_IDX if self.by_keys else Q_IDX)
        return of_group(self.stays, f"{self.row_tile} * {self.held_rows}", box, part)

    def _place_of(self, vector: Vector) -> str:
        """In the place of which side a gradient goes out."""
        return "second" if vector is self.v else "first" if self.by_keys else "leaving"

    def _finish(self) -> str:
        """What a row leaves: elements of each head, then what its heads have summed."""
        e, axis, end = self.e, self.stays.axis.name, "N" if self.by_keys else "M"
        rows = f"(b.to(tl.int64) * H + h) * {end} + {axis}"
        lines = [f"tl.store(Grad_{tag(e, r)} + {rows}, d_{tag(e, r)}, mask={axis} < {end})" for r in self.elements]
        head = f"h // {self.members}" if self.members > 1 else "h"
        stored = []
        for vector in self.sums:
            value = scaled(f"d{vector.name}", self.factors.get(vector.name, 1.0))
            if vector in self.sent:
                stored.append(fill(hopper_backward.STORE_TILE, place=self._place_of(vector), value=value))
            else:
                head_text = f"({head})" if self.members > 1 else head
                stored.append(fill(hopper_backward.STORE, axis=axis, name=vector.name, head=head_text, end=end, value=value))
        if self.sent:
            stored += ["fence_async_shared()", "mbarrier.arrive(written.index(at))"]
            stored.insert(0, "" if self.by_keys else hopper_backward.LEFT)
        elif self.by_keys:
            stored.insert(0, "mbarrier.arrive(held_free.index(place % 2))")
        store = "\n".join(piece.strip("\n") for piece in stored)
        if self.members == 1:
            return "\n".join([*lines, store, "place += 1"])
        lines.append(f"last = h % {self.members} == {self.members - 1}")
        return "\n".join([*lines, fill("if last:\n    {store}", store=store), "place += last.to(gl.int32)"])
