"""Grids beside other tokens run part by part: what is joined, and the sums of gradients, against plain PyTorch in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import attncompiler
from attncompiler import masks
from attncompiler.dsl.attention import declare
from attncompiler.ir.program import Empty, Keep
from attncompiler.masks import Mask
from attncompiler.runtime import lowering, parted, row_kernels

_DISC, _WINDOW, _VIDEO = masks.disc((16, 24), 5), masks.grid((16, 24), 5), masks.grid((4, 8, 12), 3)
CASES: dict[str, tuple[Mask, int, int]] = {
    "text first": (masks.disc((16, 24), 5, text=40), 424, 424),
    "text of an odd length": (masks.disc((16, 24), 5, text=13), 397, 397),
    "image first": (masks.segments({"image": 384, "text": 21}, {("image", "image"): _WINDOW}), 405, 405),
    "between": (masks.segments({"a": 7, "image": 384, "b": 9}, {("image", "image"): _WINDOW}), 400, 400),
    "extra keys": (masks.segments({"grid": 384}, {("grid", "grid"): _DISC}, keys={"grid": 384, "extra": 16}), 384, 400),
    "the image sees no text": (
        masks.segments({"text": 5, "image": 384}, {("image", "image"): _WINDOW, ("image", "text"): False}), 389, 389
    ),
    "video": (masks.segments({"text": 10, "video": 384}, {("video", "video"): _VIDEO}), 394, 394),
}  # fmt: skip
PARTS = {"between": 5, "extra keys": 2, "the image sees no text": 2}


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Parts however small the grid is."""
    monkeypatch.setattr(parted, "_WINS", float("inf"))
    parted.parts_of.cache_clear()
    yield
    parted.parts_of.cache_clear()


def _kept(mask: Mask, m: int, n: int) -> Tensor:
    b, h = (torch.zeros(1, 1, 1, 1, dtype=torch.int64) for _ in range(2))
    return mask.at(b, h, torch.arange(m).view(1, 1, m, 1), torch.arange(n).view(1, 1, 1, n)).expand(1, 1, m, n)


def _drawn(m: int, n: int, dtype: torch.dtype, heads: int = 4, kv_heads: int = 4) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((heads, m), (kv_heads, n), (kv_heads, n), (heads, m))
    return [torch.randn(2, rows, tokens, 64, dtype=torch.float32).to(dtype) for rows, tokens in shapes]


def _plain(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~kept, float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def _with_gradients(
    run: Callable[..., tuple[Tensor, Tensor]], tensors: list[Tensor], dtype: torch.dtype, of_lse: bool
) -> list[Tensor]:
    q, k, v = (x.to(dtype).detach().requires_grad_() for x in tensors[:3])
    o, lse = run(q, k, v)
    loss = (o * tensors[3].to(dtype)).sum() + ((lse * lse.detach().cos()).sum() if of_lse else 0.0)
    return [o.detach(), *torch.autograd.grad(loss, (q, k, v))]


def _ours(mask: Mask) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda q, k, v: attncompiler.attention(q, k, v, keep=mask, enable_gqa=True, return_lse=True)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", CASES)
def test_parts_are_the_whole(name: str) -> None:
    mask, m, n = CASES[name]
    tensors = _drawn(m, n, torch.float64)
    program = declare(*tensors[:3], keep=mask).program
    assert len(parted.parts_of(program)) == PARTS.get(name, 3)
    kept = _kept(mask, m, n)
    exact = _with_gradients(lambda q, k, v: _plain(q, k, v, kept), tensors, torch.float64, True)
    torch.testing.assert_close(_with_gradients(_ours(mask), tensors, torch.float64, True), exact)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_eager(dtype: torch.dtype, kv_heads: int) -> None:
    _check_half(*CASES["text of an odd length"], dtype, kv_heads, "cpu")


@pytest.mark.gpu
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", CASES)
def test_half_precision_on_the_gpu(name: str, kv_heads: int) -> None:
    _check_half(*CASES[name], torch.bfloat16, kv_heads, "cuda")


def _check_half(mask: Mask, m: int, n: int, dtype: torch.dtype, kv_heads: int, device: str) -> None:
    """Errors at most twice those of eager code in the same precision."""
    tensors = [x.to(device) for x in _drawn(m, n, dtype, 4, kv_heads)]
    kept = _kept(mask, m, n).to(device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return _plain(q, k, v, kept)

    exact = _with_gradients(run, tensors, torch.float64, False)
    eager, ours = _with_gradients(run, tensors, dtype, False), _with_gradients(_ours(mask), tensors, dtype, False)
    again = _with_gradients(_ours(mask), tensors, dtype, False)
    for one, other, right, twice in zip(ours, eager, exact, again, strict=True):
        assert (one - right).norm() <= 2 * (other - right).norm()
        assert torch.equal(one, twice)


@pytest.mark.usefixtures("always")
def test_queries_that_keep_nothing_of_the_grid() -> None:
    """Where a row without keys is NaN, those that see text alone are not."""
    right_half = masks.where(lambda b, h, q, k: k % 24 >= 12)
    mask = masks.segments({"text": 13, "image": 384}, {("image", "image"): _WINDOW & right_half})
    tensors = _drawn(397, 397, torch.float64)
    kept = _kept(mask, 397, 397)
    assert not bool(kept[..., 13:, 13:].any(-1).all())
    declared = declare(*tensors[:3], keep=mask).program
    program = replace(declared, keep=Keep(declared.keep.predicate, Empty.NAN))
    assert len(parted.parts_of(program)) == 3
    o, lse, rcp = lowering.forward(program, dict(zip("qkv", tensors, strict=False)), {})
    exact = _with_gradients(lambda *qkv: _plain(*qkv, kept), tensors, torch.float64, False)
    torch.testing.assert_close(o, exact[0])
    found = lowering.backward(program, dict(zip("qkv", tensors, strict=False)), {}, o, lse, rcp, tensors[3], None, frozenset("qkv"))
    torch.testing.assert_close([found[name] for name in "qkv"], exact[1:])


@pytest.mark.usefixtures("always")
def test_frozen_operands_have_no_gradient() -> None:
    mask, m, n = CASES["text first"]
    q, k, v, grad_o = _drawn(m, n, torch.bfloat16)
    full = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(attncompiler.attention(*full, keep=mask), full, grad_o)
    k.requires_grad_()
    (found,) = torch.autograd.grad(attncompiler.attention(q, k, v, keep=mask), (k,), grad_o)
    assert torch.equal(found, expected[1])


@pytest.mark.usefixtures("always")
def test_compiled_code_is_parted_and_explained() -> None:
    """Heads behind tokens in memory; what is said is what runs."""
    mask, m, n = CASES["image first"]
    q, k, v = (x.transpose(1, 2).contiguous() for x in _drawn(m, n, torch.bfloat16)[:3])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attncompiler.attention(q, k, v, keep=mask).transpose(1, 2)

    torch._dynamo.reset()
    found = torch.compile(attend, backend="attncompiler", fullgraph=True)(q, k, v)
    assert torch.equal(found, attend(q, k, v))
    (region,) = attncompiler.explain(attend, q, k, v).regions
    assert any("runs in parts" in note and "384 queries by 21 keys" in note for note in region.notes)
    assert list(region.kernels) == [
        "attention of queries 0:384 and keys 0:384", "attention of queries 0:384 and keys 384:405",
        "attention of queries 384:405 and keys 0:405",
    ]  # fmt: skip
    light = region.speed_of_light
    assert light is not None and light.kept_pairs == 8 * int(_kept(mask, m, n).sum()) and light.predicted_ms > 0


def test_programs_that_are_more_than_vectors_and_a_mask_are_whole() -> None:
    mask = masks.disc((128, 128), 16, text=512)
    q = torch.empty(1, 24, 16896, 128, dtype=torch.bfloat16, device="meta")
    assert len(parted.parts_of(declare(q, q, q, keep=mask).program)) == 3
    assert not parted.parts_of(declare(q, q, q, keep=mask, score=lambda s, b, h, i, j: s - (i - j).abs()).program)
    assert not parted.parts_of(declare(*[q.float()] * 3, keep=mask).program)
    few = q[:, :, : 1024 + 64]
    assert not parted.parts_of(declare(few, few, few, keep=masks.disc((32, 32), 16, text=64)).program)  # slower than the whole


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_that_joins_rows(dtype: torch.dtype) -> None:
    """Against torch, into slices; rows that have nothing in one part or in both."""
    (x, y), (x_lse, y_lse) = (torch.randn(2, 2, 3, 150, *rest, dtype=dtype) for rest in ((24,), ()))
    x_lse[..., ::3], y_lse[..., ::4] = -torch.inf, -torch.inf
    x[..., ::3, :], y[..., ::4, :] = 0.0, 0.0
    o, lse = torch.full((2, 160, 3, 24), torch.nan, dtype=dtype).transpose(1, 2), torch.full((2, 3, 160), torch.nan, dtype=dtype)
    made = [(a.narrow(2, 7, 150), b.narrow(2, 7, 150)) for a, b in ((o, lse), (o.clone(), lse.clone()))]
    row_kernels.join_rows_into(*made[0], (x, x_lse), (y, y_lse))
    parted._join_into(*made[1], (x, x_lse), (y, y_lse))
    torch.testing.assert_close(made[0], made[1])
    assert not made[0][0].isnan().any() and bool(made[0][0][..., ::12, :].eq(0).all())


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_kernel_that_adds_rows(dtype: torch.dtype) -> None:
    """Three terms, one of a slice, of rows that lie behind the heads; narrow types are summed in float32."""
    torch.manual_seed(0)
    out = torch.full((2, 160, 3, 24), torch.nan, dtype=dtype)
    terms = [torch.randn(2, rows, 3, 24).to(dtype) for rows in (150, 150, 160)]
    exact = (terms[0].double() + terms[1].double() + terms[2].double()[:, 7:157]).to(dtype)
    first = torch.empty(2, 150, 3, 24, dtype=torch.promote_types(dtype, torch.float32))
    row_kernels.add_rows_into(*(x.transpose(1, 2) for x in (first, *terms[:2])))
    row_kernels.add_rows_into(*(x.transpose(1, 2) for x in (out.narrow(1, 5, 150), first, terms[2].narrow(1, 7, 150))))
    torch.testing.assert_close(
        out[:, 5:155], exact, rtol=0 if dtype == torch.float16 else 1e-15, atol=1e-3 if dtype == torch.float16 else 1e-15
    )
    assert bool(out[:, :5].isnan().all()) and bool(out[:, 155:].isnan().all())
