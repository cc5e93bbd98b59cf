"""The sign of all elements of a traced tensor, where its operators tell it."""

from __future__ import annotations

import enum

import torch
from torch.fx import Node

from attncompiler.passes.constants import Constants
from attncompiler.passes.elementwise import base_name
from attncompiler.passes.nodes import CASTS, EXPANDS, PERMUTES, RESHAPES, SAME_ELEMENT, is_tensor


class Sign(enum.Enum):
    """What is known of a number: ANY says nothing."""

    POSITIVE = "positive"
    NOT_NEGATIVE = "not negative"
    NOT_POSITIVE = "not positive"
    NEGATIVE = "negative"
    ANY = "any"


_MIRRORED = {
    Sign.POSITIVE: Sign.NEGATIVE, Sign.NEGATIVE: Sign.POSITIVE, Sign.NOT_NEGATIVE: Sign.NOT_POSITIVE,
    Sign.NOT_POSITIVE: Sign.NOT_NEGATIVE, Sign.ANY: Sign.ANY,
}  # fmt: skip
# Floating results may round to 0 (exp, sigmoid of what is far below 0), which 'not negative' covers.
_KNOWN = {
    **dict.fromkeys(("exp", "exp2", "sigmoid", "softplus", "abs", "relu", "square", "softmax", "sqrt", "rand"), Sign.NOT_NEGATIVE),
    **dict.fromkeys(("log_sigmoid", "logsigmoid", "log_sigmoid_forward", "log_softmax"), Sign.NOT_POSITIVE),
}
_WEAK = {Sign.POSITIVE: Sign.NOT_NEGATIVE, Sign.NEGATIVE: Sign.NOT_POSITIVE}
_SAME = CASTS | SAME_ELEMENT | RESHAPES | PERMUTES | EXPANDS | {"slice", "select", "repeat", "repeat_interleave", "cumsum", "sum"}


def sign_of(node: Node, constants: Constants) -> Sign:
    """The sign of every element. Constants are looked at only where the graph itself makes them: no assumption is needed."""
    constant = constants.of(node)
    if constant is not None and constant.recipe.source is None:
        return sign_of_values(constant.value)
    name = base_name(node.target)
    if name in _KNOWN:
        return _KNOWN[name]
    if name in ("neg", "negative"):
        return _MIRRORED[_of_argument(node.args[0], constants)]
    if name in ("mul", "div", "multiply", "divide") and "rounding_mode" not in node.kwargs:
        return _product(_of_argument(node.args[0], constants), _of_argument(node.args[1], constants))
    if name == "add" and not node.kwargs:
        return _sum(_of_argument(node.args[0], constants), _of_argument(node.args[1], constants))
    if name in _SAME and node.args:
        return _of_argument(node.args[0], constants)
    if name in ("clamp", "clip"):
        low, high = ([*node.args[1:], None, None][place] for place in (0, 1))
        low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
        if isinstance(low, int | float) and low >= 0:
            return Sign.POSITIVE if low > 0 else Sign.NOT_NEGATIVE
        if isinstance(high, int | float) and high <= 0:
            return Sign.NEGATIVE if high < 0 else Sign.NOT_POSITIVE
    return Sign.ANY


def _of_argument(value: object, constants: Constants) -> Sign:
    if isinstance(value, int | float):
        return Sign.POSITIVE if value > 0 else Sign.NEGATIVE if value < 0 else Sign.NOT_NEGATIVE
    return sign_of(value, constants) if isinstance(value, Node) and is_tensor(value) else Sign.ANY


def sign_of_values(values: torch.Tensor) -> Sign:
    """The sign of all numbers of a tensor."""
    if not values.numel() or values.is_complex():
        return Sign.ANY
    for sign, holds in (
        (Sign.POSITIVE, values > 0), (Sign.NEGATIVE, values < 0), (Sign.NOT_NEGATIVE, values >= 0), (Sign.NOT_POSITIVE, values <= 0),
    ):  # fmt: skip
        if bool(holds.all()):
            return sign
    return Sign.ANY


def _product(left: Sign, right: Sign) -> Sign:
    if Sign.ANY in (left, right):
        return Sign.ANY
    weak = _WEAK.get(left, left), _WEAK.get(right, right)
    return Sign.NOT_NEGATIVE if weak[0] is weak[1] else Sign.NOT_POSITIVE


def _sum(left: Sign, right: Sign) -> Sign:
    weak = _WEAK.get(left, left), _WEAK.get(right, right)
    if weak[0] is not weak[1] or weak[0] is Sign.ANY:
        return Sign.ANY
    strict = next((sign for sign in (left, right) if sign in _WEAK), weak[0])
    return strict
