"""ATen around two contractions with no softmax between -> a state, or a reason.

For each product of scores and values the element of the scores is read back to one dot product and what it is multiplied by
(`reader.py`). Where that factor hides the keys after the query (`causal.py`) and is a product over steps (`separable.py`), the keys
can go by one after another: a recurrence over N steps in place of N x N scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, GraphModule, Node

from attncompiler.errors import AttnCompilerError, Unrecognised
from attncompiler.ir.expr import (
    KV_IDX,
    ONE,
    Q_IDX,
    ZERO,
    Apply,
    Axis,
    B,
    Const,
    Dot,
    Expr,
    H,
    Read,
    apply,
    axes_of,
    dots_of,
    floordiv,
    mod,
    mul,
    reads_of,
    sub,
    substitute,
    transform,
    walk,
)
from attncompiler.ir.program import Origin
from attncompiler.ir.state import ROW, C, D, Moment, Query, State, StateAxes
from attncompiler.ir.text import expr_text
from attncompiler.passes.causal import Place, at
from attncompiler.passes.constant_masks import ConstantMasks, Recovery, view_of
from attncompiler.passes.contraction import Contraction, contraction_of
from attncompiler.passes.elementwise import base_name
from attncompiler.passes.lift_decay import decay_matrix
from attncompiler.passes.memory import writes
from attncompiler.passes.nodes import CASTS, CHANNEL, KV, Operand, RowReduce, Weights, dtype_of, shape_of
from attncompiler.passes.normalise import source_line
from attncompiler.passes.reader import Reader
from attncompiler.passes.recognise import BARRIERS, obstacle, roles_of
from attncompiler.passes.separable import Facts, Separated, separate
from attncompiler.passes.signs import Sign, sign_of
from attncompiler.passes.site import Recovered, Refusal, common_divisor
from attncompiler.passes.sizes import Extent, IndexSpace, size_expr
from attncompiler.passes.state_site import Draft, RecoveredDecay, StateSite, every_clause, finish, proof_of, table_dtype

Lowerable = Callable[[State], str]  # why no lowering computes a state; "" where one does


@dataclass(frozen=True)
class _Context:
    """What every look at one graph needs."""

    module: GraphModule
    trained: frozenset[Node]
    masks: ConstantMasks
    equal: Mapping[Node, Node]
    lowerable: Lowerable


def recognise_states(
    module: GraphModule, trained: frozenset[Node], masks: ConstantMasks, taken: frozenset[Node], lowerable: Lowerable
) -> tuple[list[StateSite], list[Refusal]]:
    """Needs: a captured graph, and the products that are attentions already. Ensures: every causal product of scores without a softmax
    is in one of the two lists. Changes nothing."""
    context = _Context(module, trained, masks, _equal_nodes(module.graph), lowerable)
    sites: list[StateSite] = []
    refusals: list[Refusal] = []
    for node in module.graph.nodes:
        product = None if node in taken else contraction_of(node)
        for weights, value in (("left", "right"), ("right", "left")) if product is not None else ():
            assert product is not None
            scores: Node = getattr(product, weights)
            behind = products_behind(scores)
            if not behind:
                continue
            try:
                site = _oriented(context, node, product, weights, value)
            except _NothingToSay:
                continue
            except AttnCompilerError as error:
                refusals.append(Refusal(node, error, frozenset(behind)))
                break
            sites.append(site)
            break
    return sites, refusals


class _NothingToSay(Exception):
    """A product that no one would call linear attention."""


def products_behind(node: Node) -> set[Node]:
    """Products that reach `node` through elementwise operators and views alone."""
    found: set[Node] = set()
    seen: set[Node] = set()
    stack = [node]
    while stack and len(seen) < 400:
        current = stack.pop()
        if current in seen or current.op != "call_function":
            continue
        seen.add(current)
        if contraction_of(current) is not None:
            found.add(current)
        elif base_name(current.target) not in BARRIERS:
            stack.extend(current.all_input_nodes)
    return found


def _equal_nodes(graph: Graph) -> Mapping[Node, Node]:
    """For each node the first one that computes the same of the same."""
    first: dict[str, Node] = {}
    equal: dict[Node, Node] = {}
    for node in graph.nodes:
        equal[node] = node
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or writes(node):
            continue
        if torch.Tag.nondeterministic_seeded not in node.target.tags:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: equal[n])
            equal[node] = first.setdefault(f"{node.target} {args} {kwargs}", node)
    return equal


# -------------------------------------------------------------------------------------------- scores times values


def _oriented(context: _Context, node: Node, product: Contraction, weights_side: str, value_side: str) -> StateSite:
    scores: Node = getattr(product, weights_side)
    letters: str = getattr(product, f"{weights_side}_letters")
    try:
        roles = roles_of(product, letters, getattr(product, f"{value_side}_letters"))
    except Unrecognised:
        raise _NothingToSay from None
    if not roles.query or product.bias is not None:
        raise _NothingToSay
    space = IndexSpace()
    reader = Reader(context.module, space, context.trained, context.masks)
    extent = {c: Reader.extent_of(product, c) for c in dict.fromkeys(product.left_letters + product.right_letters)}
    place: dict[str, Expr] = {c: space.axis(f"batch{i}", extent[c]) for i, c in enumerate(roles.batch)}
    space.extents[KV], space.extents[Q_IDX] = extent[roles.key], extent[roles.query]
    place |= {roles.key: KV, roles.channel: CHANNEL, roles.query: Q_IDX}
    element = reader.element(scores, reader.broadcast_letters(scores, letters, place))
    if any(isinstance(n, Weights) for n in walk(element)):
        raise _NothingToSay
    found = _Weighed(context, reader, element, value_side, product, place)
    batch = [(place[c], extent[c]) for c in roles.batch]
    division = _division(reader, node, product, place)
    site = found.site(node, batch, extent[roles.key], extent[roles.query], extent[roles.channel], division)
    order = roles.batch + roles.query + roles.channel
    return replace(
        site,
        split=tuple(extent[c] for c in order),
        permutation=tuple(order.index(c) for c in product.out_letters),
        softmax_nodes=frozenset({scores, *products_behind(scores)}),
    )


def _division(reader: Reader, node: Node, product: Contraction, place: Mapping[str, Expr]) -> tuple[Node, Expr] | None:
    """The quotient of the product by the sum of its scores over a row, where it is made after the product, and what is divided by."""
    users = list(node.users)
    if len(users) != 1 or base_name(users[0].target) not in ("div", "true_divide", "divide") or users[0].kwargs:
        return None
    numerator, divisor = users[0].args
    if numerator is not node or not isinstance(divisor, Node) or users[0].meta["val"].dtype != node.meta["val"].dtype:
        return None
    index = tuple(place[c] for c in product.out_letters)
    expr = reader.element(divisor, reader.broadcast(divisor, shape_of(node), index))
    return (users[0], expr) if any(isinstance(n, RowReduce) for n in walk(expr)) else None


@dataclass
class _Weighed:
    """One element of the scores, and the values that they weigh."""

    context: _Context
    reader: Reader
    element: Expr
    value_side: str
    product: Contraction
    place: Mapping[str, Expr]

    def __post_init__(self) -> None:
        self.recovered: list[Recovered | RecoveredDecay] = []

    def site(
        self,
        node: Node,
        batch: Sequence[tuple[Expr, Extent]],
        keys: Extent,
        queries: Extent,
        channels: Extent,
        division: tuple[Node, Expr] | None,
    ) -> StateSite:
        dots = [dot for dot in dots_of(self.element) if {"q_idx", "kv_idx"} <= axes_of(dot)]
        if not dots:
            self._refuse_hidden()
            raise _NothingToSay
        element = self._equal(self._lifted(self.element))
        past, own, future = (at(place, element) for place in Place)
        everything = not _weighs_pairs(element)
        if everything:
            self._worthwhile(dots[0], keys, queries, channels)
        elif future not in (ZERO, Const(0.0)):
            if not _hides_some(past, own, future):
                raise Unrecognised(
                    "the keys after a query weigh too",
                    why=f"the factor there is {_factor_text(future)}; one state, which keys enter in order, can't give both sides",
                    do="split the factor into a causal half and its mirror image, two linear attentions whose results are added",
                )
            raise Unrecognised("the mask between scores and values is not causal", why="it keeps keys after their query")
        dot, factor, divisor = _parts(past)
        own_factor = own if own in (ZERO, Const(0.0)) else _parts(own)[1]
        facts = Facts(self._sign, self._summand)
        found = separate(factor, own_factor, facts)
        weigh, output = ONE if divisor is None else divisor, node
        if division is not None:
            weigh, output = (division[1] if weigh == ONE else mul(weigh, division[1])), division[0]
        return self._made(node, output, dot, factor, found, weigh, batch, (keys, queries, channels), everything)

    def _made(
        self,
        node: Node,
        output: Node,
        dot: Dot,
        factor: Expr,
        found: Separated,
        weigh: Expr,
        batch: Sequence[tuple[Expr, Extent]],
        extents: tuple[Extent, Extent, Extent],
        everything: bool,
    ) -> StateSite:
        keys, queries, channels = extents
        value_node: Node = getattr(self.product, self.value_side)
        value, value_scale = self.reader.vector(
            value_node, getattr(self.product, f"{self.value_side}_letters"), self.place, "value", self.product.dtype, widen=False
        )
        scale = found.scale
        if weigh != ONE:
            weigh = self._divisor(weigh, dot, found)
            weigh = weigh if value_scale * self.product.alpha == 1.0 else apply("div", weigh, Const(value_scale * self.product.alpha))
        else:
            scale *= value_scale * self.product.alpha
        features = shape_of(self.reader.leaves[dot.left.tensor].node)
        c_place = self.reader.leaves[dot.left.tensor].channel_place
        c = features[-1 if c_place is None else c_place]
        query = _with_channel(dot.left, C)
        all_keys = sub(size_expr(keys), ONE)
        moment = Moment.BEFORE if found.own_excluded and not everything else Moment.AFTER
        state = State(
            axes=StateAxes(ONE, ONE, size_expr(queries), size_expr(keys), size_expr(c), size_expr(channels)),
            tensors=(),
            key=_with_channel(dot.right, C),
            value=_with_channel(value, D),
            query=Query(query if scale == 1.0 else mul(query, Const(scale)), moment, all_keys if everything else Q_IDX),
            final=all_keys,
            decay=ONE if found.step == ZERO else apply("exp", found.step),
            weigh=weigh,
            origin=Origin(source_line(node)),
        )
        change, b, h = _batch_axes(state.expressions, batch)
        state = every_clause(state, lambda expr: substitute(expr, change))
        state = replace(state, axes=replace(state.axes, b=b, h=h))
        proof = () if everything else (proof_of(substitute(factor, change), found, substitute(found.step, change)),)
        draft = Draft(state, (dot.left.tensor, dot.right.tensor, value.tensor), proof)
        program, operands, sizes, proof = finish(self.reader, node, draft)
        reason = self.context.lowerable(program)
        if reason:
            raise Unrecognised("a linear attention that no lowering computes", where=program.origin.line, why=reason)
        return StateSite(
            output, program, operands, sizes, (), (), frozenset(), frozenset({node}), _saves(program), proof, tuple(self.recovered)
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------ reading scores

    def _refuse_hidden(self) -> None:
        """Scores that an operator hides: worth a word where what is hidden is a mask, a decay or dropout."""
        for read in reads_of(self.element):
            node = self.reader.leaves[read.tensor].node
            if {"q_idx", "kv_idx"} <= axes_of(read) and "dropout" in base_name(node.target) and products_behind(node):
                raise Unrecognised(
                    "the scores are not a product of queries and keys that can be followed",
                    why=f"between the product and the values stands {obstacle(self.reader, self.element)}",
                    do="drop elements of the values or of the output: a dropped score can't be left out of a state",
                )

    def _lifted(self, element: Expr) -> Expr:
        """The element with rules for its constants: rates for a matrix of decays, a predicate for a mask."""
        instead: dict[Expr, Expr] = {}
        of_dots = {read for dot in dots_of(element) for read in reads_of(dot)}
        for read in reads_of(element):
            if read in of_dots or not {"q_idx", "kv_idx"} <= axes_of(read) or read.tensor not in self.reader.leaves:
                continue
            node = self.reader.leaves[read.tensor].node
            view, constant = view_of(read.index, shape_of(node)), self.context.masks.constants.of(node)
            if view is None or constant is None:
                continue
            found = decay_matrix(constant.value, view)
            if found is not None:
                values: Node = getattr(self.product, self.value_side)
                name = f"{node.name}.rates"
                self.reader.leaves[name] = Operand(values, table=found.rates.to(table_dtype(dtype_of(values))))
                instead[read] = found.element(read, name)
                self.recovered.append(RecoveredDecay(node, constant.recipe, found))
                continue
            lifted = self.context.masks.of(node, view)
            if lifted is not None and not lifted.rule.tables:
                recovery = Recovery(node.name, view, lifted)
                instead[read] = recovery.element(read)
                self.recovered.append(Recovered(node, constant.recipe, recovery))
        return substitute(element, instead)

    def _equal(self, element: Expr) -> Expr:
        """The element with one name for reads of nodes that compute the same."""

        def visit(expr: Expr) -> Expr | None:
            if isinstance(expr, Dot):
                return expr
            if isinstance(expr, Read) and self.reader.leaves[expr.tensor].is_plain:
                first = self.context.equal[self.reader.leaves[expr.tensor].node]
                return self.reader.leaf(first, tuple(transform(entry, visit) for entry in expr.index))
            return None

        return transform(element, visit)

    def _sign(self, read: Read) -> Sign:
        operand = self.reader.leaves[read.tensor]
        if operand.table is not None:
            return Sign.NOT_NEGATIVE  # rates that `decay_matrix` found
        return sign_of(operand.node, self.context.masks.constants)

    def _summand(self, read: Read) -> Expr | None:
        """What a running sum over the positions sums."""
        node, index = self.reader.leaves[read.tensor].node, read.index
        return self._summed(node, index)

    def _summed(self, node: Node, index: tuple[Expr, ...]) -> Expr | None:
        name = base_name(node.target)
        if name == "cumsum":
            source, dim = node.args[:2]
            assert isinstance(source, Node) and isinstance(dim, int)
            dim %= len(index)
            if index[dim] != KV_IDX or any("kv_idx" in axes_of(i) for place, i in enumerate(index) if place != dim):
                return None
            return self.reader.leaf(source, index)
        if not node.args or not isinstance(node.args[0], Node):
            return None
        if name in ("mul", "div") and isinstance(node.args[1], int | float) and "rounding_mode" not in node.kwargs:
            inner = self._summed(node.args[0], index)
            return None if inner is None else apply(name, inner, Const(float(node.args[1])))
        if name == "neg" or name in CASTS:
            inner = self._summed(node.args[0], index)
            return inner if inner is None or name != "neg" else apply("neg", inner)
        return None

    def _divisor(self, weigh: Expr, dot: Dot, found: Separated) -> Expr:
        """What O is divided by, in terms of the row that goes through the same steps."""

        def visit(expr: Expr) -> Expr | None:
            if not isinstance(expr, RowReduce):
                return None
            body = self._equal(self._lifted(self.reader.element(expr.node, expr.index)))
            past, own, future = (at(place, body) for place in Place)
            other, factor, divided = _parts(past)
            facts = Facts(self._sign, self._summand)
            mine = separate(factor, own if own in (ZERO, Const(0.0)) else _parts(own)[1], facts)
            agrees = (mine.step, mine.own_excluded) == (found.step, found.own_excluded) and divided is None
            if expr.op != "sum" or other != dot or not agrees:
                raise Unrecognised(
                    "what the output is divided by is not the sum of its own scores",
                    why="the normaliser of a state takes the same steps as the state",
                    do="compute it apart, as the same product with values that are 1",
                )
            return ROW if mine.scale == found.scale else mul(ROW, Const(mine.scale / found.scale))

        return transform(weigh, visit)

    def _worthwhile(self, dot: Dot, keys: Extent, queries: Extent, channels: Extent) -> None:
        """Scores without a mask: three matrices, of which the last two are better multiplied first where there are many keys."""
        features = shape_of(self.reader.leaves[dot.left.tensor].node)
        place = self.reader.leaves[dot.left.tensor].channel_place
        c = features[-1 if place is None else place]
        batched = {axis for axis in axes_of(dot.right) if axis.startswith("batch")}
        sizes = (keys, queries, channels, c)
        if not batched or not all(isinstance(size, int) for size in sizes):
            raise _NothingToSay
        n, m, d, c = (int(size) for size in sizes)
        if n != m or n * m * (c + d) <= 4 * (n + m) * c * d:
            raise _NothingToSay


def _with_channel(read: Read, channel: Axis) -> Read:
    return Read(read.tensor, (*read.index, channel))


def _weighs_pairs(element: Expr) -> bool:
    """True where something beside the dot product depends on query and key together."""
    return any(
        {"q_idx", "kv_idx"} <= axes_of(node) and not dots_of(node)
        for node in _outside_dots(element)
    )  # fmt: skip


def _outside_dots(expr: Expr) -> Iterator[Expr]:
    stack = [expr]
    while stack:
        node = stack.pop()
        if not isinstance(node, Dot):
            yield node
            stack.extend(node.children)


def _hides_some(*elements: Expr) -> bool:
    return any(element in (ZERO, Const(0.0)) for element in elements)


def _factor_text(element: Expr) -> str:
    try:
        return expr_text(_parts(element)[1])
    except Unrecognised:
        return "made of the scores"


def _parts(element: Expr) -> tuple[Dot, Expr, Expr | None]:
    """dot * factor / divisor: the divisor is what holds sums over a row. Raises: Unrecognised, naming the operator in between."""
    if isinstance(element, Dot):
        return element, ONE, None
    if isinstance(element, Apply) and element.op in ("to_float", "round_f16", "round_bf16"):
        return _parts(element.args[0])
    if isinstance(element, Apply) and element.op == "neg":
        raise Unrecognised("the scores are subtracted", why="they are negated before they are summed", do="negate the output")
    if isinstance(element, Apply) and element.op in ("mul", "div"):
        left, right = element.args
        if dots_of(left) and not dots_of(right):
            dot, factor, divisor = _parts(left)
            if any(isinstance(n, RowReduce) for n in walk(right)):
                right = right if element.op == "div" else apply("div", Const(1.0), right)
                return dot, factor, right if divisor is None else mul(divisor, right)
            return dot, _times(factor, right) if element.op == "mul" else apply("div", factor, right), divisor
        if element.op == "mul" and dots_of(right) and not dots_of(left):
            return _parts(apply("mul", right, left))
    what = element.op if isinstance(element, Apply) else "nothing that is a product of queries and keys"
    raise Unrecognised(
        "the scores are not a product of queries and keys times a factor",
        why=f"between the product and the values stands {what}",
    )


def _times(left: Expr, right: Expr) -> Expr:
    return right if left == ONE else mul(left, right)


def _batch_axes(roots: Iterable[Expr], batch: Sequence[tuple[Expr, Extent]]) -> tuple[Mapping[Expr, Expr], Expr, Expr]:
    """What the batch axes of the product are in terms of b and h, and the sizes of these: the last is h; a lone one is split if all
    its uses do."""
    live = [(axis, extent) for axis, extent in batch if isinstance(axis, Axis)]
    if not live:
        return {}, ONE, ONE
    if len(live) == 1:
        axis, extent = live[0]
        divisor = common_divisor(roots, axis)
        if divisor is None:
            return {axis: H}, ONE, size_expr(extent)
        return {floordiv(axis, divisor): B, mod(axis, divisor): H}, floordiv(size_expr(extent), divisor), divisor
    if len(live) == 2:
        return {live[0][0]: B, live[1][0]: H}, size_expr(live[0][1]), size_expr(live[1][1])
    raise Unrecognised(
        f"scores with {len(live)} batch axes", why="a state has a batch and heads", do="flatten the axes of batch, and those of heads"
    )


def _saves(program: State) -> str:
    """What a recurrence is instead of, in words."""
    axes = program.axes
    pairs = f"{expr_text(axes.q_idx)} x {expr_text(axes.kv_idx)}"
    return f"O(N) instead of N x N: a state of {expr_text(axes.c)} x {expr_text(axes.d)} a head in place of scores of {pairs}"

