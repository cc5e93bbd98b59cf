"""Scores of queries and keys times a factor, summed over values, with no softmax -> a state, or a reason.

The element of the scores is read back to one dot product and what it is multiplied by (`reader.py`). Where that factor hides the keys
after the query (`causal.py`) and is a product over steps (`separable.py`), the keys can go by one after another: a recurrence over N
steps in place of N x N scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from attncompiler.errors import Unrecognised
from attncompiler.ir.expr import (
    ONE,
    Q_IDX,
    ZERO,
    Const,
    Dot,
    Expr,
    apply,
    axes_of,
    dots_of,
    mul,
    reads_of,
    sub,
    substitute,
    transform,
    walk,
)
from attncompiler.ir.state import ROW, Moment
from attncompiler.passes.causal import Place, at
from attncompiler.passes.constant_masks import Recovery, view_of
from attncompiler.passes.contraction import Contraction, contraction_of
from attncompiler.passes.elementwise import base_name
from attncompiler.passes.lift_decay import decay_matrix
from attncompiler.passes.nodes import CHANNEL, KV, Operand, RowReduce, Weights, dtype_of, shape_of
from attncompiler.passes.reader import Reader
from attncompiler.passes.reader_facts import ReaderFacts
from attncompiler.passes.recognise import cone, obstacle, roles_of
from attncompiler.passes.score_parts import factor_text, hides_some, parts_of, weighs_pairs
from attncompiler.passes.separable import Separated, separate
from attncompiler.passes.site import Recovered
from attncompiler.passes.sizes import Extent, IndexSpace, size_expr
from attncompiler.passes.state_site import (
    NothingToSay,
    Parts,
    RecoveredDecay,
    StateContext,
    StateSite,
    assembled,
    proof_of,
    table_dtype,
)


def scores_times_values(context: StateContext, node: Node) -> StateSite:
    """The state that a product of scores and values is. Raises: NothingToSay; Unrecognised, with the reason."""
    product = contraction_of(node)
    if product is None:
        raise NothingToSay
    for weights, value in (("left", "right"), ("right", "left")):
        if products_behind(getattr(product, weights)):
            try:
                return _oriented(context, node, product, weights, value)
            except NothingToSay:
                continue
    raise NothingToSay


def products_behind(node: Node) -> set[Node]:
    """Products that reach `node` through elementwise operators and views alone."""
    return {n for n in cone([node]) if contraction_of(n) is not None}


def _oriented(context: StateContext, node: Node, product: Contraction, weights_side: str, value_side: str) -> StateSite:
    scores: Node = getattr(product, weights_side)
    letters: str = getattr(product, f"{weights_side}_letters")
    try:
        roles = roles_of(product, letters, getattr(product, f"{value_side}_letters"))
    except Unrecognised:
        raise NothingToSay from None
    if not roles.query or product.bias is not None:
        raise NothingToSay
    space = IndexSpace()
    reader = Reader(context.module, space, context.trained, context.masks)
    extent = {c: Reader.extent_of(product, c) for c in dict.fromkeys(product.left_letters + product.right_letters)}
    place: dict[str, Expr] = {c: space.axis(f"batch{i}", extent[c]) for i, c in enumerate(roles.batch)}
    space.extents[KV], space.extents[Q_IDX] = extent[roles.key], extent[roles.query]
    place |= {roles.key: KV, roles.channel: CHANNEL, roles.query: Q_IDX}
    element = reader.element(scores, reader.broadcast_letters(scores, letters, place))
    if any(isinstance(n, Weights) for n in walk(element)):
        raise NothingToSay
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

    context: StateContext
    reader: Reader
    element: Expr
    value_side: str
    product: Contraction
    place: Mapping[str, Expr]

    def __post_init__(self) -> None:
        self.recovered: list[Recovered | RecoveredDecay] = []
        self.facts = ReaderFacts(self.context, self.reader)

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
            raise NothingToSay
        element = self.facts.equal(self._lifted(self.element))
        past, own, future = (at(place, element) for place in Place)
        everything = not weighs_pairs(element)
        if everything:
            self._worthwhile(dots[0], keys, queries, channels)
        elif future not in (ZERO, Const(0.0)):
            if not hides_some(past, own, future):
                raise Unrecognised(
                    "the keys after a query are not proved to weigh nothing",
                    why=f"the factor there is {factor_text(future)}; one state, which keys enter in order, can't give both sides",
                    do="if they weigh nothing, make the mask within the function (torch.arange, tril); if they do, split the factor into "
                    "a causal half and its mirror image, two linear attentions whose results are added",
                )
            raise Unrecognised("the mask between scores and values is not causal", why="it keeps keys after their query")
        dot, factor, divisor = parts_of(past)
        own_factor = own if own in (ZERO, Const(0.0)) else parts_of(own)[1]
        found = separate(factor, own_factor, self.facts)
        value_node: Node = getattr(self.product, self.value_side)
        value, value_scale = self.reader.vector(
            value_node, getattr(self.product, f"{self.value_side}_letters"), self.place, "value", self.product.dtype, widen=False
        )
        weigh, output, scale = ONE if divisor is None else divisor, node, value_scale * self.product.alpha
        if division is not None:
            weigh, output = (division[1] if weigh == ONE else mul(weigh, division[1])), division[0]
        if weigh != ONE:
            weigh = self._divisor(weigh, dot, found)
            weigh = weigh if scale == 1.0 else apply("div", weigh, Const(scale))
            scale = 1.0
        all_keys = sub(size_expr(keys), ONE)
        moment = Moment.BEFORE if found.own_excluded and not everything else Moment.AFTER
        parts = Parts(
            dot.left, dot.right, value, found.scale * scale, found.step, weigh, all_keys if everything else Q_IDX, moment,
            queries, keys, self._features(dot), channels,
        )  # fmt: skip
        saves = f"a state of {self._features(dot)} x {channels} a head in place of scores of {queries} x {keys}"
        site = assembled(
            self.context, self.reader, node, output, parts, batch, saves, () if everything else (proof_of(factor, found),)
        )
        return replace(site, recovered=tuple(self.recovered))

    def _features(self, dot: Dot) -> Extent:
        operand = self.reader.leaves[dot.left.tensor]
        return shape_of(operand.node)[-1 if operand.channel_place is None else operand.channel_place]

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

    def _divisor(self, weigh: Expr, dot: Dot, found: Separated) -> Expr:
        """What O is divided by, in terms of the row that goes through the same steps."""

        def visit(expr: Expr) -> Expr | None:
            if not isinstance(expr, RowReduce):
                return None
            body = self.facts.equal(self._lifted(self.reader.element(expr.node, expr.index)))
            past, own, future = (at(place, body) for place in Place)
            if future not in (ZERO, Const(0.0)):
                return None  # it sums keys after the query too
            other, factor, divided = parts_of(past)
            mine = separate(factor, own if own in (ZERO, Const(0.0)) else parts_of(own)[1], self.facts)
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
        batched = {axis for axis in axes_of(dot.right) if axis.startswith("batch")}
        sizes = (keys, queries, channels, self._features(dot))
        if not batched or not all(isinstance(size, int) for size in sizes):
            raise NothingToSay
        n, m, d, c = (int(size) for size in sizes)
        if n != m or n * m * (c + d) <= 4 * (n + m) * c * d:
            raise NothingToSay
