"""The declared form: against plain torch, and against the same attention recognised."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attncompiler
from attncompiler import masks
from attncompiler.dsl.attention import declare
from attncompiler.errors import AttnCompilerError, DeviceError, InvalidProgram, OptionError
from attncompiler.ir.text import to_text
from attncompiler.masks import Mask


def operands(b: int = 2, h: int = 4, hk: int = 2, m: int = 24, n: int = 24, d: int = 16, dv: int = 16) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = (b, h, m, d), (b, hk, n, d), (b, hk, n, dv)
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


def reference(q: Tensor, k: Tensor, v: Tensor, dense: Tensor, change: Callable[[Tensor], Tensor] = lambda s: s) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = change(q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~dense, float("-inf"))
    empty = ~dense.any(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0) @ v


def agree(ours: Tensor, expected: Tensor, leaves: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(ours, expected)
    grad = torch.randn_like(expected)
    found = torch.autograd.grad(ours, leaves, grad)
    for mine, other in zip(found, torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(mine, other)


BLOCKS = torch.ones(2, 3, dtype=torch.bool)
IDS = torch.repeat_interleave(torch.arange(4), 6)


@pytest.mark.parametrize(
    "mask",
    [
        masks.full(), masks.causal(), masks.causal() & masks.window(5), masks.causal() & (masks.window(3) | masks.sink(2)),
        masks.prefix(torch.tensor([0, 7])) | masks.causal(), masks.padding(torch.tensor([24, 0])),
        masks.causal() & masks.document(IDS),
        masks.dilated(2, 3), masks.blocks(5), masks.strided(2, 2, 3, 4), masks.grid((4, 6), (3, 3), (1, 2)),
        masks.segments([4, 20], {(1, 1): masks.grid((4, 5), 3), (0, 1): False}), masks.sampled(3, [1.0, 0.5, 0.2], 3),
        masks.disc((4, 5), 2, 4), masks.halo((4, 6), 2, 1), masks.radial(3, 6, 24, block=4), masks.regions(IDS.flip(0) % 3),
        masks.per_head([masks.causal(), masks.window(1), masks.sink(1), masks.causal()]),
        masks.where(lambda b, h, q_idx, kv_idx: (q_idx - kv_idx) % (h + 2) == 0),
    ],
    ids=str,
)  # fmt: skip
def test_masks(mask: Mask) -> None:
    q, k, v = operands()
    agree(attncompiler.attention(q, k, v, keep=mask, enable_gqa=True), reference(q, k, v, mask.dense(2, 4, 24, 24)), (q, k, v))


def test_heads_of_a_group_with_plans_of_their_own() -> None:
    """Enough tokens for several tiles: each head then comes by itself, while keys are shared."""
    q, k, v = operands(b=1, m=300, n=300, d=8, dv=8)
    mask = masks.strided(16, 2, 4, 4)
    ours = attncompiler.attention(q, k, v, keep=mask, enable_gqa=True)
    agree(ours, reference(q, k, v, mask.dense(1, 4, 300, 300)), (q, k, v))


def test_scores_with_captured_tensors() -> None:
    q, k, v = operands(hk=4)
    table = torch.randn(4, 47, dtype=torch.float64, requires_grad=True)

    def score(s: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return torch.tanh(s / 3.0) * 3.0 + table[h, q_idx - kv_idx + 23]

    i = torch.arange(24)
    bias = table[:, i[:, None] - i + 23]
    expected = reference(q, k, v, torch.ones(24, 24, dtype=torch.bool), lambda s: torch.tanh(s / 3.0) * 3.0 + bias)
    agree(attncompiler.attention(q, k, v, score=score), expected, (q, k, v, table))


NUMBERS = torch.tensor([0.5, -1.5, 2.0], dtype=torch.float64)
MODS: dict[str, Callable[..., Tensor]] = {
    "a constant index": lambda s, b, h, i, j: s * NUMBERS[0] + NUMBERS[-1] * (i - j),
    "gelu": lambda s, b, h, i, j: F.gelu(s),
    "gelu by tanh": lambda s, b, h, i, j: F.gelu(s, approximate="tanh"),
    "silu": lambda s, b, h, i, j: F.silu(s),
}


@pytest.mark.parametrize("name", MODS)
@pytest.mark.parametrize("compiled", [False, True])
def test_mods_of_scores(name: str, compiled: bool) -> None:
    q, k, v = operands(hk=4)
    i = torch.arange(24)
    whole = torch.ones(24, 24, dtype=torch.bool)
    expected = reference(q, k, v, whole, lambda s: MODS[name](s, 0, 0, i[:, None], i[None, :]))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = attncompiler.attention(q, k, v, score=MODS[name])
        assert isinstance(o, Tensor)
        return o

    torch._dynamo.reset()
    ours = torch.compile(attend, backend="attncompiler", options={"inner": "aot_eager"})(q, k, v) if compiled else attend(q, k, v)
    agree(ours, expected, (q, k, v))


def test_masks_that_make_tensors_move_with_the_operands() -> None:
    q, k, v = (t.detach().to("meta") for t in operands(hk=4))
    for mask in (masks.causal() & masks.document(lengths=[20, 4]), masks.per_head([masks.radial(3, 6, 24, block=4)] * 4)):
        with pytest.raises(DeviceError, match=r"is on cpu, q is on meta\n  do:  mask.to\(q.device\)"):
            declare(q, k, v, keep=mask)
        assert declare(q, k, v, keep=mask.to("meta")).captured[0].device.type == "meta"


def test_a_function_may_read_another_tensor_next_time() -> None:
    q, k, v = operands(hk=4)
    ids = IDS

    def same_document(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ids[q_idx] == ids[kv_idx]

    mask = masks.causal() & masks.where(same_document)
    for ids in (IDS, IDS % 2):
        dense = (ids[:, None] == ids) & torch.ones(24, 24, dtype=torch.bool).tril()
        torch.testing.assert_close(attncompiler.attention(q, k, v, keep=mask), reference(q, k, v, dense))


@pytest.mark.parametrize(
    ("mask", "message"),
    [(masks.grid((5, 5), 3), "25 tokens, not 24"), (masks.per_head([masks.causal()] * 3), "3 masks for 4 heads")],
)
def test_mistakes_are_named_when_compiled(mask: Mask, message: str) -> None:
    q, k, v = operands(hk=4)
    with pytest.raises(OptionError, match=message):
        torch.compile(lambda q, k, v: attncompiler.attention(q, k, v, keep=mask), backend="attncompiler")(q, k, v)


def test_lse_and_dropout() -> None:
    q, k, v = operands(hk=4)
    _, lse = attncompiler.attention(q, k, v, keep=masks.causal(), return_lse=True)
    scores = (q @ k.mT * 0.25).masked_fill(torch.ones(24, 24).triu(1).bool(), float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.manual_seed(3)
    first = attncompiler.attention(q, k, v, dropout_p=0.5)
    second = attncompiler.attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(first, attncompiler.attention(q, k, v, dropout_p=0.5)) and not torch.equal(first, second)


def test_declared_and_recognised_are_one_program() -> None:
    q, k, v = (t.detach().float() for t in operands())

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(24)
        dense = (i[None, :] <= i[:, None]) & (i[:, None] - i[None, :] <= 5)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, dense, enable_gqa=True)

    found = attncompiler.explain(plain, q, k, v).regions[0].ir
    declared = to_text(declare(q, k, v, keep=masks.causal() & masks.window(5, 0), enable_gqa=True).program)
    assert found.split("\n", 1)[1].strip() == declared.split("\n", 1)[1].strip()


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal() & masks.window(5), masks.causal() & (masks.window(3) | masks.sink(2)), masks.dilated(2, 3),
        masks.blocks(5), masks.strided(2, 2, 3, 4), masks.grid((4, 6), (3, 2), (1, 2), (1, 2)), masks.disc((4, 5), 2, 4),
        ~masks.document(every=7),
    ],
    ids=str,
)  # fmt: skip
def test_the_plain_form_is_recognised_as_declared(mask: Mask) -> None:
    """What `attention` is to Dynamo, plain torch, gives the program that it builds itself."""
    q, k, v = (t.detach().float() for t in operands(hk=4))
    (region,) = attncompiler.explain(lambda q, k, v: attncompiler.attention(q, k, v, keep=mask), q, k, v).regions
    assert region.source_location.startswith("test_attention.py")
    found = region.ir
    declared = to_text(declare(q, k, v, keep=mask).program)
    assert found.split("\n", 1)[1].strip() == declared.split("\n", 1)[1].strip()


@pytest.mark.parametrize("backend", ["attncompiler", "aot_eager"])
def test_inside_a_compiled_function(backend: str) -> None:
    q, k, v = operands(hk=4)
    mask = masks.causal() & masks.document(IDS)

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attncompiler.attention(q * 2.0, k, v, keep=mask)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2).flatten(2)

    compiled = torch.compile(block, backend=backend, fullgraph=True)
    expected = reference(q * 2.0, k, v, mask.dense(2, 4, 24, 24)).transpose(1, 2).flatten(2)
    agree(compiled(q, k, v), expected, (q, k, v))


def test_a_score_may_be_wider_than_the_values() -> None:
    q, k, v = (torch.randn(1, 2, 9, 16, dtype=torch.bfloat16) for _ in range(3))
    bias = torch.randn(9)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attncompiler.attention(q, k, v, score=lambda s, b, h, i, j: s + bias[j])

    torch.testing.assert_close(torch.compile(attend, backend="attncompiler")(q, k, v), attend(q, k, v))


def test_segments_with_extra_keys_are_recognised_by_any_backend() -> None:
    """GNA's extra keys, and documents in one run alone: nothing of another run reaches the tensor that it reads."""
    q = torch.randn(2, 4, 24, 16)
    k, v = (torch.randn(2, 4, 30, 16) for _ in range(2))
    rules = {("text", "text"): masks.document(torch.tensor([0, 0, 1, 1])), ("grid", "grid"): masks.grid((4, 5), 3)}
    mask = masks.segments({"text": 4, "grid": 20}, rules, keys={"text": 4, "grid": 20, "extra": 6})
    expected = reference(q, k, v, mask.dense(2, 4, 24, 30))
    (region,) = attncompiler.explain(lambda q, k, v: attncompiler.attention(q, k, v, keep=mask), q, k, v).regions
    assert "[minimum(kv_idx, 3)]" in region.ir
    torch.testing.assert_close(attncompiler.attention(q, k, v, keep=mask), expected)
    for backend in ("attncompiler", "aot_eager"):
        compiled = torch.compile(lambda q, k, v: attncompiler.attention(q, k, v, keep=mask), backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(q, k, v), expected)


@pytest.mark.parametrize("backend", ["eager", "attncompiler", "aot_eager"])
def test_another_draw_without_another_program(backend: str) -> None:
    """The seed is read at each call: forward and gradients follow it, and nothing is compiled anew."""
    q, k, v = operands(hk=4)
    seed = torch.tensor([3])
    mask = masks.causal() & masks.sampled(seed, [1.0, 0.6, 0.3], 4)
    torch._dynamo.utils.counters.clear()
    f = torch.compile(lambda q, k, v: attncompiler.attention(q, k, v, keep=mask), backend=backend, fullgraph=True)
    if backend == "eager":
        f = lambda q, k, v: attncompiler.attention(q, k, v, keep=mask)
    kept = []
    for number in (3, 4, 3):
        seed.fill_(number)
        dense = mask.dense(2, 4, 24, 24)
        agree(f(q, k, v), reference(q, k, v, dense), (q, k, v))
        kept.append(dense)
    assert torch.equal(kept[0], kept[2]) and not torch.equal(kept[0], kept[1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (backend != "eager")


def test_masks_made_inside_a_compiled_function() -> None:
    q, k, v = operands(hk=4)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        text_first = masks.segments([4, 20], {(1, 1): masks.window(3), (0, 1): lambda b, h, q_idx, kv_idx: q_idx < kv_idx})
        out = attncompiler.attention(q, k, v, keep=text_first & masks.sampled(3, [1.0, 0.6], 4))
        assert isinstance(out, Tensor)
        return out

    compiled = torch.compile(attend, backend="attncompiler", fullgraph=True)
    agree(compiled(q, k, v), attend(q, k, v), (q, k, v))


def test_the_algebra_inside_a_compiled_function() -> None:
    q, k, v = operands(hk=4)
    near, causal = masks.window(6), masks.causal()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = (causal & near).complement() & causal | (lambda b, h, q_idx, kv_idx: q_idx == kv_idx) & near
        out = attncompiler.attention(q, k, v, keep=mask if causal != near else near)
        assert isinstance(out, Tensor)
        return out

    compiled = torch.compile(attend, backend="attncompiler", fullgraph=True, options={"inner": "eager"})
    agree(compiled(q, k, v), attend(q, k, v), (q, k, v))

    broken = torch.compile(
        lambda q: attncompiler.attention(q, q, q, keep=~causal), backend="attncompiler"
    )  # Dynamo can't trace `~`
    torch.testing.assert_close(broken(q), attncompiler.attention(q, q, q, keep=~causal))


def test_draws_are_recognised() -> None:
    q, k, v = (t.detach().float() for t in operands(hk=4))
    mask = masks.sampled(torch.tensor([3]), [1.0, 0.6, 0.3], 4)
    (region,) = attncompiler.explain(lambda q, k, v: attncompiler.attention(q, k, v, keep=mask), q, k, v).regions
    assert (
        "[0], h * 1048576 + q_idx // 4, kv_idx // 4) < " in region.ir and "minimum(abs(q_idx // 4 - kv_idx // 4), 2)" in region.ir
    )


def sorts(s: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return s.sort().values


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q, k, v: attncompiler.attention(q[0], k, v), OptionError, "q has 3 dimensions"),
        (lambda q, k, v: attncompiler.attention(q, k.float(), v), OptionError, "k is torch.float32, q is torch.float64"),
        (lambda q, k, v: attncompiler.attention(q, k, v), OptionError, "pass enable_gqa=True"),
        (lambda q, k, v: attncompiler.attention(q, k[..., :3], v, enable_gqa=True), OptionError, "shapes that do not fit"),
        (lambda q, k, v: attncompiler.attention(q, k.to("meta"), v), DeviceError, "k is on meta"),
        (lambda q, k, v: attncompiler.attention(q, k, v, dropout_p=1.0, enable_gqa=True), OptionError, "dropout_p is 1.0"),
        (lambda q, k, v: attncompiler.attention(q, k, v, keep=masks.document(IDS[:20]), enable_gqa=True), OptionError,
         r"doc \[20\] is read at q_idx, up to 23"),
        (lambda q, k, v: attncompiler.attention(q, k, v, keep=masks.blocks(8, BLOCKS), enable_gqa=True), OptionError,
         r"pattern \[2, 3\] is read at q_idx // 8, up to 2"),
        (lambda q, k, v: attncompiler.attention(q, k, v, keep=masks.grid((5, 5), 3), enable_gqa=True), OptionError, "25 tokens"),
        (lambda q, k, v: attncompiler.attention(q, k, v, score=sorts, enable_gqa=True), InvalidProgram, "no expression"),
    ],
)  # fmt: skip
def test_mistakes_are_named(call: Callable[..., Tensor], error: type[AttnCompilerError], message: str) -> None:
    with pytest.raises(error, match=message):
        call(*operands())


@pytest.mark.parametrize("backend", ["aot_eager", "attncompiler"])
def test_every_size_may_be_dynamic(backend: str) -> None:
    """One graph, whatever takes it: where not even the head size is known, this backend leaves it."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attncompiler.attention(q, k, v, keep=masks.causal())

    options = {"inner": "aot_eager"} if backend == "attncompiler" else {}
    compiled = torch.compile(attend, backend=backend, dynamic=True, fullgraph=True, options=options)
    for length in (40, 23):
        qkv = [torch.randn(2, 3, length, 8) for _ in range(3)]
        expected = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
        torch.testing.assert_close(compiled(*qkv), expected)
