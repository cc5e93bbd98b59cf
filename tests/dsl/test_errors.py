"""What a person reads who makes a mistake with masks: what it is, and what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import attncompiler
from attncompiler import masks
from attncompiler.dsl.attention import declare
from attncompiler.errors import AttnCompilerError, DeviceError, InvalidProgram, OptionError
from attncompiler.masks import Mask

Q = torch.zeros(2, 4, 24, 8)
TABLE = torch.ones(24, dtype=torch.bool)


def call(mask: Mask | Callable[..., object]) -> Tensor:
    out = attncompiler.attention(Q, Q, Q, keep=mask)
    assert isinstance(out, Tensor)
    return out


def below(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score < 0


def distance(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx - kv_idx


def by_distance(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return TABLE[q_idx - kv_idx]


def by_value(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return Q[b, h, q_idx].sum(-1) > 0


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: attncompiler.attention(Q, Q, Q, score=lambda s, b, h, i, j: s + Q[0, 0, :, 0]), InvalidProgram,
         "<lambda> is no expression of positions: the result has the shape [24]\n"
         "  why: there is one number for each pair of a query and a key\n"
         "  do:  read captured tensors at as many places as they have dimensions, as in bias[h, q_idx]"),
        (lambda: masks.window(3.5), OptionError, "window: left is 3.5\n  do:  give a whole number"),  # type: ignore[arg-type]
        (lambda: masks.grid((8, 8), 3.5), OptionError, "grid: window is 3.5\n  do:  give a whole number"),  # type: ignore[arg-type]
        (lambda: masks.disc((8, 8, 8), 3), OptionError, "disc of (8, 8, 8)\n  do:  give the grid as (rows, columns)"),
        (lambda: masks.halo(8, 0, 1), OptionError, "halo((8,), 0, 1) has a size that can't be"),  # type: ignore[arg-type]
        (lambda: masks.padding([3, 4]), OptionError,  # type: ignore[arg-type]
         "lengths is [3, 4]\n  do:  give a tensor of integers, on the device of q"),
        (lambda: masks.blocks(4, [[True]]), OptionError,  # type: ignore[arg-type]
         "the pattern of blocks is bool [query blocks, key blocks] or [heads, query blocks, key blocks]"),
        (lambda: masks.grid((4, 6), 5), OptionError,
         "axis 0 of 4 tokens can't have window 5, stride 1, dilation 1\n"
         "  why: 1 <= stride <= window and window * dilation <= length must hold\n"
         "  do:  give a window of at most 4; a window as long as its axis sees all of it"),
        (lambda: masks.grid((4, 6), 2, dilation=(1, 4)), OptionError, "do:  give a window of at most 1; a window as long"),
        (lambda: masks.grid((4, 6), 3, stride=4), OptionError, "do:  give a stride of at most 3"),
        (lambda: masks.grid((4, 6), 0), OptionError, "do:  give numbers from 1 on"),
        (lambda: masks.causal() and masks.window(2), OptionError,
         "the mask causal() is asked whether it is true\n  why: `and`, `or` and `not` would keep one of two masks and drop the other\n"
         "  do:  join masks by & and |, and turn one round by ~"),
        (lambda: attncompiler.attention(Q, Q, Q, scale=torch.tensor(0.3)), OptionError,
         "scale is a tensor\n  why: as a number it would have no gradient\n  do:  multiply q by it, with scale=1.0"),
        (lambda: call(masks.grid((5, 5), 3)), OptionError,
         "grid((5, 5), window=3) is for 25 tokens, not 24 queries\n"
         "  do:  make it for the number of tokens; for text or extra keys beside them there is masks.segments"),
        (lambda: call(masks.segments({"text": 4, "image": 25}, {})), OptionError,
         "segments is for 29 queries, not 24\n  why: its runs are 4 of text + 25 of image\n"
         "  do:  give runs that add up to the number of queries"),
        (lambda: call(masks.segments([4, 20], {(1, 1): masks.grid((5, 5), 3)})), OptionError, "is for 25 tokens, not 20 queries"),
        (lambda: masks.segments({"text": 4}, {("text", "extra"): False}), OptionError,
         "segments has no pair ('text', 'extra') of (queries, keys)\n  why: its queries are 'text', its keys 'text'"),
        (lambda: masks.segments({"text": -4}, {}), OptionError, "do:  give the number of tokens of each, one or more in all"),
        (lambda: call(masks.per_head([masks.causal()] * 3)), OptionError,
         "per_head has 3 masks for 4 heads\n  do:  give one mask for each head of the queries"),
        (lambda: call(masks.strided(4, 2, 3, 8)), OptionError,
         "strided(block=4, local=2, stride=3, heads=8) is for 8 heads, not 4 heads\n  do:  make it for the number of query heads"),
        (lambda: call(masks.blocks(8, TABLE.view(8, 3, 1).expand(8, 3, 3))), OptionError, "is for 8 heads, not 4 heads"),
        (lambda: call(masks.padding(torch.tensor([3, 4, 5]))), OptionError,
         "padding(lengths) is for 3 batches, not 2 batches\n  do:  give it tensors with an entry for each batch"),
        (lambda: call(masks.document(torch.zeros(20, dtype=torch.int64))), OptionError,
         "doc [20] is read at q_idx, up to 23\n  why: its dimension 0 has 20\n  do:  give a tensor of 24 or more there"),
        (lambda: call(by_distance), InvalidProgram,
         "by_distance is no expression of positions: a tensor [24] is read at q_idx - kv_idx, from -23 to 23"),
        (lambda: call(by_distance), InvalidProgram,
         "  why: its dimension 0 has 24, and places below 0 would count from the end\n"
         "  do:  clamp the index, or give a tensor that holds all places"),
        (lambda: call(below), OptionError,
         "below does not take (b, h, q_idx, kv_idx): missing a required argument: 'kv_idx'\n"
         "  why: which keys are kept is decided before any score exists\n"
         "  do:  let a mask depend on positions alone; what depends on scores is written in `score`"),
        (lambda: call(by_value), InvalidProgram, "by_value is no expression of positions: the mod uses aten.sum"),
        (lambda: call(distance), InvalidProgram,
         "where(distance) gives numbers, not True or False\n  do:  compare: a mask says which keys are kept"),
        (lambda: masks.sampled(0, [1.0, 1.5]), OptionError, "probability holds one number from 0 to 1 for each distance"),
        (lambda: masks.sampled(torch.zeros(2), [1.0]), OptionError, "do:  give an integer, or an int64 tensor with one element"),
    ],
)  # fmt: skip
def test_mistakes(make: Callable[[], object], error: type[AttnCompilerError], text: str) -> None:
    with pytest.raises(error) as raised:
        make()
    assert text in str(raised.value)


def test_tensors_on_another_device() -> None:
    q = Q.to("meta")
    with pytest.raises(DeviceError) as raised:
        declare(q, q, q, keep=masks.document(torch.zeros(24, dtype=torch.int64)))
    assert str(raised.value) == "doc of the mask or score is on cpu, q is on meta\n  do:  mask.to(q.device) moves it"


def test_masks_on_a_device_are_drawn_and_counted_on_the_cpu() -> None:
    """`meta` has no values to move: what matters is that they are asked for."""
    mask = masks.document(torch.zeros(24, dtype=torch.int64)).to("meta")
    with pytest.raises(NotImplementedError, match="meta"):
        mask.kept_pairs(1, 1, 24, 24)


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal() & ~masks.causal(), ~masks.full(), masks.window(2) & masks.causal(-3), masks.padding(torch.tensor([0, 0])),
        masks.dilated(3, 2) & (masks.where(lambda b, h, q_idx, kv_idx: (q_idx - kv_idx) % 2 == 1)),
    ],
    ids=str,
)  # fmt: skip
def test_a_mask_that_keeps_nothing_is_named_once(mask: Mask) -> None:
    for size in (24, 20):  # anew for other sizes
        q = Q[:, :, :size]
        with pytest.warns(UserWarning) as caught:
            assert not torch.as_tensor(attncompiler.attention(q, q, q, keep=mask)).any()
        (warning,) = caught
        assert f"the mask {mask} keeps no key for any of 2 x 4 x {size} queries" in str(warning.message)
        assert "do:  see mask.show" in str(warning.message) and warning.filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attncompiler.attention(q, q, q, keep=mask)
    assert mask.keeps_nothing(2, 4, 24, 24)


@pytest.mark.parametrize("mask", [masks.causal() & masks.causal().complement(), masks.window(2) & masks.causal(-3)], ids=str)
def test_a_mask_that_keeps_nothing_is_named_when_compiled(mask: Mask) -> None:
    compiled = torch.compile(call, backend="attncompiler", options={"inner": "eager"}, fullgraph=True)
    with pytest.warns(
        UserWarning, match=r"attention at .* keeps no key for any of 2 x 4 x 24 queries over 24 keys: the output is zero"
    ):
        assert not compiled(mask).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(mask)


@pytest.mark.parametrize(
    "mask",
    [masks.causal(-5), masks.padding(torch.tensor([0, 1])), ~masks.sink(23) & masks.causal(), masks.blocks(5) & ~masks.causal()],
    ids=str,
)
def test_queries_without_keys_are_no_mistake(mask: Mask) -> None:
    assert not mask.keeps_nothing(2, 4, 24, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not torch.isnan(call(mask)).any()
