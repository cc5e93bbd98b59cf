"""Constant masks in models: what is lifted gives what eager gives, before and after the mask is written, moved or replaced."""

from __future__ import annotations

import contextlib
import gc
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attncompiler
from attncompiler import masks
from attncompiler.assumed import checked
from attncompiler.dsl.attention import declare
from attncompiler.dsl.masks import Mask
from attncompiler.explanation import Region
from attncompiler.ir.text import expr_text

N = 36
CAUSAL = torch.ones(N, N, dtype=torch.bool).tril()
BAND = CAUSAL.triu(-4)
BACKENDS = {"backend": "attncompiler", "options": {"inner": "aot_eager"}}


def qkv(n: int = N, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 16, generator=g).to(dtype).requires_grad_() for _ in range(3))
    return q, k, v


def agree(compiled: Callable[..., Tensor], eager: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """Outputs and gradients, to a float64's rounding."""
    found, expected = compiled(*inputs), eager(*inputs)
    weight = torch.sin(torch.arange(found.numel(), dtype=found.dtype)).view_as(found)
    grads = [torch.autograd.grad((out * weight).sum(), inputs[:3]) for out in (found, expected)]
    torch.testing.assert_close((found, *grads[0]), (expected, *grads[1]), atol=1e-10, rtol=1e-10)


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """How many calls of graphs with lifted masks ran the lifted one, and how many the one that reads."""
    calls: Counter[str] = Counter()

    def counting(name: str, f: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            calls[name] += 1
            return f(*args)

        return run

    def wrapped(lifted: Callable[..., Any], rules: Any, read: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        return checked(counting("lifted", lifted), rules, lambda: counting("read", read()))

    torch._dynamo.reset()
    with mock.patch("attncompiler.backend.checked", wrapped):
        yield calls


def region_of(f: Callable[..., Any], *inputs: Tensor) -> Region:
    torch._dynamo.reset()
    explanation = attncompiler.explain(f, *inputs)
    assert not explanation.missed
    (region,) = explanation.regions
    return region


class Masked(nn.Module):
    """Attention under a mask in a buffer, cut to the length of the call, as GPT-2 has it."""

    kept: Tensor

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept.clone())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        return (q @ k.mT / 4).masked_fill(~self.kept[..., :n, :n], -math.inf).softmax(-1) @ v


class Added(Masked):
    """The same with an additive mask [1, 1, N, N], as transformers makes it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        return (q @ k.mT / 4 + self.kept[:, :, :n, :n]).softmax(-1) @ v


def added(kept: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(1, 1, *kept.shape, dtype=dtype).masked_fill(~kept, torch.finfo(dtype).min)


MODULES: dict[str, tuple[Callable[[Tensor], Masked], str]] = {
    "bool": (Masked, "nan"),
    "added": (lambda kept: Added(added(kept)), "score"),
    "added -inf": (lambda kept: Added(torch.zeros(1, 1, N, N, dtype=torch.float64).masked_fill(~kept, -math.inf)), "nan"),
}


@pytest.mark.parametrize("kind", MODULES)
def test_the_life_of_a_buffer(kind: str) -> None:
    """Lifted at first; whatever happens to the buffer, results are eager's; a mask that is the rule again is lifted again."""
    make, empty = MODULES[kind]
    model = make(CAUSAL)
    region = region_of(model, *qkv())
    assert f"keep    kv_idx <= q_idx else {empty}\n" in region.ir and "kept" not in region.ir
    assert "lifted to kv_idx <= q_idx; checked at each call" in region.notes[0]
    with counted() as calls:
        compiled = torch.compile(model, **BACKENDS)

        def expect(**more: int) -> None:
            calls.clear()
            agree(compiled, model, qkv())
            assert calls == more

        expect(lifted=1)
        model.kept.copy_(make(BAND).kept)
        expect(read=1)
        model.kept.copy_(make(CAUSAL).kept)
        expect(lifted=1)
        model.kept[..., -1, 0] = model.kept[..., 0, -1]
        expect(read=1)
        model.load_state_dict(make(CAUSAL).state_dict())
        expect(lifted=1)
        model.kept = make(BAND).kept
        expect(read=1)
        model.kept = make(CAUSAL).kept
        expect(lifted=1)
        with torch.inference_mode():
            model.kept.copy_(make(BAND).kept)
        expect(read=1)
        model.kept.view(-1)[:] = make(CAUSAL).kept.view(-1)
        expect(lifted=1)
        model.kept.data = make(BAND).kept
        expect(read=1)


def test_a_module_that_moves() -> None:
    model = Added(added(CAUSAL, torch.float32))
    with counted() as calls:
        compiled = torch.compile(model, **BACKENDS)
        compiled(*qkv(dtype=torch.float32))
        model.to(torch.float64)
        agree(compiled, model, qkv())
        model.kept.fill_(0)
        agree(compiled, model, qkv())
    assert calls == {"lifted": 2, "read": 1}


def test_modules_that_share_a_graph() -> None:
    """Layers compiled one by one: each has the mask that it holds, and looks at it once."""
    layers = [Masked(kept) for kept in (CAUSAL, BAND, CAUSAL, CAUSAL)]

    def attend(layer: Masked, *inputs: Tensor) -> Tensor:
        out: Tensor = layer(*inputs)
        return out

    with counted() as calls, mock.patch("attncompiler.passes.constant_masks.Recovery.still_holds", autospec=True) as looks:
        looks.side_effect = lambda recovery, tensor: recovery.lifted.explains(recovery.view.of(tensor))
        compiled = torch.compile(attend, **BACKENDS)
        for _ in range(2):
            for layer in layers:
                agree(lambda *x: compiled(layer, *x), layer, qkv())  # noqa: B023  called at once
    assert calls == {"lifted": 6, "read": 2} and looks.call_count == 4


def test_lengths_that_change() -> None:
    model = Masked(CAUSAL)
    with counted() as calls:
        compiled = torch.compile(model, **BACKENDS)
        for n in (12, 20, 28, 36):
            agree(compiled, model, qkv(n))
        model.kept.copy_(BAND)
        for n in (12, 20, 28):
            agree(compiled, model, qkv(n))
    assert calls == {"lifted": 4, "read": 3}


def test_training_between_writes() -> None:
    """A step with another mask, as schedules of a window have it; gradients are those of the step's own mask."""
    model = Masked(BAND)
    with counted():
        compiled = torch.compile(model, backend="attncompiler")
        for width in (4, 8, 4):
            model.kept.copy_(CAUSAL.triu(-width))
            agree(compiled, model, qkv())


def closure(kept: Any) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, torch.as_tensor(kept))

    return attend


def test_a_tensor_of_a_closure() -> None:
    kept = BAND.clone()
    attend = closure(kept)
    assert region_of(attend, *qkv()).mask == "(kv_idx >= q_idx - 4) & (kv_idx <= q_idx)"
    with counted() as calls:
        compiled = torch.compile(attend, **BACKENDS)
        agree(compiled, attend, qkv())
        kept.logical_not_().fill_diagonal_(True)
        agree(compiled, attend, qkv())
    assert calls == {"lifted": 1, "read": 1}


def test_memory_of_others_is_read() -> None:
    """NumPy writes to its array without a word to torch."""
    array = CAUSAL.numpy().copy()
    for attend in (closure(array), closure(torch.from_numpy(array))):
        assert "kv_idx]" in region_of(attend, *qkv()).mask
        torch._dynamo.reset()
        compiled = torch.compile(attend, **BACKENDS)
        agree(compiled, attend, qkv())
        np.copyto(array, BAND.numpy())
        agree(compiled, attend, qkv())
        np.copyto(array, CAUSAL.numpy())


def test_a_tensor_that_numpy_comes_to_share_is_read() -> None:
    model = Masked(CAUSAL)
    with counted() as calls:
        compiled = torch.compile(model, **BACKENDS)
        agree(compiled, model, qkv())
        np.copyto(model.kept.numpy(), BAND.numpy())
        agree(compiled, model, qkv())
    assert calls == {"lifted": 1, "read": 1}


def test_arguments_and_trained_tensors_are_read() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, kept)

    with mock.patch("attncompiler.passes.constant_masks.lift_tensor") as look:
        assert region_of(attend, *qkv(), CAUSAL).mask == "kept[q_idx, kv_idx]"
        assert region_of(attend, *qkv(), added(CAUSAL)).mask == "kept[0, 0, q_idx, kv_idx] != -inf"
    look.assert_not_called()

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(added(CAUSAL))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT + self.bias).softmax(-1) @ v

    assert region_of(Learned(), *qkv()).mask == "all pairs"


def test_a_buffer_that_the_graph_writes_is_read() -> None:
    class Counting(Masked):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.kept.logical_not_().fill_diagonal_(True)
            return F.scaled_dot_product_attention(q, k, v, self.kept)

    model, same = Counting(CAUSAL), Counting(CAUSAL)
    torch._dynamo.reset()
    compiled = torch.compile(model, **BACKENDS)
    for _ in range(3):
        agree(compiled, same, qkv())


def test_a_mask_that_always_changes_is_soon_read_unseen() -> None:
    model = Masked(CAUSAL)
    with counted() as calls, mock.patch("attncompiler.assumed._MOST_LOOKS", 3):
        compiled = torch.compile(model, **BACKENDS)
        for _ in range(5):
            model.kept.copy_(CAUSAL)
            compiled(*qkv())
    assert calls == {"lifted": 3, "read": 2}


def test_a_mask_is_not_kept_alive() -> None:
    model = Masked(CAUSAL)
    torch._dynamo.reset()
    torch.compile(model, **BACKENDS)(*qkv())
    old = weakref.ref(model.kept)
    model.kept = CAUSAL.clone()
    gc.collect()
    assert old() is None


# ------------------------------------------------------------------------------------------ constants that the graph makes


def blocks(dtype: torch.dtype) -> Tensor:
    return torch.block_diag(*[torch.ones(9, 9)] * 4).to(dtype)


def documents() -> Tensor:
    ids = torch.bucketize(torch.arange(N), torch.tensor([5, 16, 30]))
    return (ids[:, None] - ids) == 0


def near_on_grid() -> Tensor:
    place = torch.stack(torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij"), -1).view(-1, 2)
    return torch.cdist(place, place, p=float("inf")) <= 2


def written_block_by_block() -> Tensor:
    kept = torch.zeros(N, N, dtype=torch.bool)
    for start in range(0, N, 9):
        kept[start : start + 9, start : start + 9] = True
    return kept


MADE: dict[str, tuple[Callable[[], Tensor], str]] = {
    "block_diag": (lambda: blocks(torch.bool), "kv_idx // 9 == q_idx // 9"),
    "kron": (lambda: torch.kron(torch.eye(4), torch.ones(9, 9)) == 1, "kv_idx // 9 == q_idx // 9"),
    "repeat_interleave": (lambda: torch.eye(4, dtype=torch.bool).repeat_interleave(9, 0).repeat_interleave(9, 1), "kv_idx // 9 =="),
    "block by block": (written_block_by_block, "kv_idx // 9 == q_idx // 9"),
    "cumsum": (lambda: torch.ones(N, N).cumsum(1) <= torch.ones(N, N).cumsum(0) + 2, "kv_idx <= q_idx + 2"),
    "scatter": (
        lambda: torch.zeros(N, N).scatter(1, torch.arange(N)[:, None] // 4 * 4 + torch.arange(4), 1.0).bool(),
        "kv_idx // 4 == q_idx // 4",
    ),
    "distances": (near_on_grid, "(kv_idx // 6 <= q_idx // 6 + 2) & (kv_idx % 6 >= q_idx % 6 - 2)"),
    "documents": (documents, "[q_idx] =="),
    "additive": (lambda: (1 - blocks(torch.float64)) * torch.finfo(torch.float64).min, "kv_idx // 9 == q_idx // 9"),
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_masks_that_the_graph_makes(name: str) -> None:
    """They need no check: nothing can change them."""
    make, rule = MADE[name]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = make()
        scores = q @ k.mT / 4
        return (scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -math.inf)).softmax(-1) @ v

    region = region_of(attend, *qkv())
    assert rule in region.mask and "mask[" not in region.ir and "checked" not in str(region.notes)
    with counted() as calls:
        agree(torch.compile(attend, **BACKENDS), attend, qkv())
    assert not calls


def test_random_masks_are_made_anew() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(torch.kron(torch.eye(4), torch.rand(9, 9).round()) == 1, -1e300).softmax(-1) @ v

    assert "[q_idx, kv_idx]" in region_of(attend, *qkv()).ir


# ----------------------------------------------------------------------------------------------- as declared, and as others do

TWINS: tuple[Mask, ...] = (
    masks.causal(), masks.causal() & (masks.window(5, 0) | masks.sink(2)), masks.grid((6, 6), 3), masks.strided(3, 2, 3, 4),
    masks.causal() & masks.document(torch.repeat_interleave(torch.arange(3), torch.tensor([9, 20, 7]))),
    masks.blocks(18, torch.tensor([[True, False], [False, True]])) | masks.full() & masks.sink(18),
)  # fmt: skip


@pytest.mark.parametrize("mask", TWINS, ids=str)
def test_a_dense_mask_ends_in_the_declared_program(mask: Mask) -> None:
    q, k, v = qkv()
    kept = mask.dense(1, 4, N, N)
    attend = closure(kept)
    region = region_of(attend, q, k, v)
    declared = declare(q, k, v, keep=mask).program
    if "pattern" not in str(mask):
        assert region.mask == expr_text(declared.keep.predicate)
    torch._dynamo.reset()
    agree(torch.compile(attend, backend="attncompiler"), attend, (q, k, v))


def test_flex_attention_with_a_table_for_a_mask() -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    kept = torch.ones(256, 256, dtype=torch.bool).tril().triu(-30)
    block_mask = create_block_mask(lambda b, h, q_idx, kv_idx: kept[q_idx, kv_idx], None, None, 256, 256, device="cpu")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flex_attention(q, k, v, block_mask=block_mask)
        assert isinstance(out, Tensor)
        return out

    inputs = [t.detach() for t in qkv(256, torch.float32)]
    assert region_of(attend, *inputs).mask == "(kv_idx >= q_idx - 30) & (kv_idx <= q_idx)"


def test_gpt2_as_it_was() -> None:
    """Two layers, each with a causal buffer of its own, in float16's way of masking: where, with a tensor of finfo.min."""

    class Layer(nn.Module):
        bias: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bias", torch.ones(64, 64, dtype=torch.bool).tril().view(1, 1, 64, 64), persistent=False)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = q @ k.mT / 4
            queries, keys = q.shape[2], k.shape[2]
            causal = self.bias[:, :, keys - queries : keys, :keys]
            return torch.where(causal, scores, torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype)).softmax(-1) @ v

    layers = nn.ModuleList([Layer(), Layer()])

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for layer in layers:
            q = layer(q, k, v)
        return q

    torch._dynamo.reset()
    regions = attncompiler.explain(model, *qkv()).regions
    assert [region.mask for region in regions] == ["kv_idx <= q_idx"] * 2
    with counted() as calls:
        compiled = torch.compile(model, **BACKENDS)
        agree(compiled, model, qkv())
        layers[1].bias.copy_(layers[1].bias.triu(-3))
        agree(compiled, model, qkv())
        q, k, v = qkv()
        agree(compiled, model, (q[:, :, :5], k, v))
    assert calls == {"lifted": 2, "read": 1}, "the last call is a graph of its own, of masks as they are by then"
