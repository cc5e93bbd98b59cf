"""The commands, as a person types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attncompiler.cli.main import main

MODEL = """
import torch
def attend(q, k, v):
    n = q.shape[2]
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    return (q @ k.mT * 0.125).masked_fill(hidden, float("-inf")).softmax(-1) @ v
def talk(q, k, v, mix):
    return torch.einsum("gh,bhij->bgij", mix, (q @ k.mT).softmax(-1)) @ v
class Net(torch.nn.Module):
    def forward(self, x):
        return attend(x, x * 2, x * 3)
def example_inputs_Net():
    return (torch.randn(1, 2, 96, 64),)
def linear(q, k, v):
    return (q @ k.mT).tril() @ v
def example_inputs_linear():
    return tuple(torch.randn(1, 2, 96, 16) for _ in range(3))
"""
INPUTS = ["--input", "1,2,96,64", "--input", "1,2,96,64", "--input", "1,2,96,64"]


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model.py").write_text(MODEL)
    return str(tmp_path / "model.py")


def test_explain_says_what_was_taken(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{model}:attend", *INPUTS]) == 0
    shown = capsys.readouterr().out
    assert "model.py:6" in shown and "kv_idx" in shown


def test_explain_says_what_was_not_and_why(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{model}:talk", *INPUTS, "--input", "2,2", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["regions"] and found["missed"][0]["reason"]


def test_inputs_may_stand_in_the_file(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{model}:Net", "--json"]) == 0
    (region,) = json.loads(capsys.readouterr().out)["regions"]
    assert region["source_location"] == "model.py:6" and 0 < region["density"] <= 1


@pytest.mark.parametrize("show", ["ir", "source"])
def test_inspect_shows_text(model: str, show: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{model}:Net", "--show", show]) == 0
    assert {"ir": "weigh   softmax", "source": "@triton.jit"}[show] in capsys.readouterr().out


def test_inspect_compiles_without_a_gpu(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{model}:Net", "--target", "sm_80", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["kernel"] for row in rows} >= {"attention_forward", "attention_backward_keys"}
    assert all(row["fits"] == "yes" and row["registers"] > 0 for row in rows)


def test_inspect_shows_machine_code(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{model}:Net", "--show", "ptx"]) == 0
    assert ".target sm_90a" in capsys.readouterr().out
    assert main(["inspect", f"{model}:Net", "--show", "sass"]) == 0
    assert "EXIT" in capsys.readouterr().out


def test_inspect_shows_states(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subject, page = f"{model}:linear", tmp_path / "page.html"
    assert main(["inspect", subject, "--show", "ir", "--html", str(page)]) == 0
    assert capsys.readouterr().out.startswith("state  # model.py") and "state_outputs" in page.read_text()
    assert main(["inspect", subject, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["kernel"] for row in rows} >= {"state_segments", "state_outputs", "state_backward"}
    assert all(row["fits"] == "yes" and row["spilled bytes"] == 0 for row in rows)


def test_inspect_writes_a_page(model: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["inspect", f"{model}:Net", "--show", "ir", "--html", str(page)]) == 0
    text = page.read_text()
    assert "<svg" in text and "attention_forward" in text and "http" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "nothing.py:f"], "there is no file nothing.py"),
        (["explain", "no_colon"], "not of the form path.py:function_or_Class"),
        (["explain", "MODEL:wrong"], "it has attend, talk"),
        (["explain", "MODEL:attend"], "give --input, or write example_inputs()"),
        (["explain", "MODEL:attend", "--input", "1,x"], "is not SHAPE[:DTYPE]"),
        (["inspect", "MODEL:Net", "--region", "7"], "there is no region 7"),
    ],
)
def test_wrong_usage_is_one_clear_error(model: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([a.replace("MODEL", model) for a in arguments]) == 2
    assert message in capsys.readouterr().err


def test_doctor_tries_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    findings = {f["what"]: f for f in json.loads(capsys.readouterr().out)}
    assert findings["cross-compilation to gfx942"]["ok"] and "recompile limit" in findings


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """The seven-diagonal window over 512 tokens: 4 rows of tiles of 128 x 64, each with two of its own and the one before."""
    assert main(["plan", "causal & window(6)", "--shape", "2,4,512,64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kept_pairs"] == 8 * sum(min(i + 1, 7) for i in range(512))
    assert (found["visited_tiles"], found["full_tiles"], found["worst_row_tiles"]) == (8 * 11, 0, 3)
    assert found["bound_tiles"] == 32 / 11 and found["bound_worst"] == 8 / 3 and found["predicted_ms"] > 0 and found["build_ms"] > 0


def test_plan_of_queries_after_a_cache(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "(causal & window(6)).after(500)", "--shape", "2,4,12,512,64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept_pairs"] == 8 * 12 * 7


def test_plan_of_a_grid_and_its_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    grid = ["plan", "grid((16, 16), window=(8, 8), stride=8)", "--shape", "1,1,256,64", "--tile", "64,64"]
    assert main([*grid, "--picture", "--svg", str(tmp_path / "grid.svg"), "--png", str(tmp_path / "grid.png")]) == 0
    assert (tmp_path / "grid.svg").read_text().count("<rect") == 2 + 3 + 3 + 2  # box after box, each sees itself
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert "16,384" in text and "\u00b7\u2588\u00b7\u00b7" in text and "in boxes of 8x8:8x8" in text


def test_plan_of_what_runs_in_parts(capsys: pytest.CaptureFixture[str]) -> None:
    """The boxes are of the image alone, the picture is in runs of tokens."""
    image = ["plan", "disc((128, 128), 16, text=512)", "--shape", "1,16,16896,128"]
    assert main([*image, "--picture"]) == 0
    text = capsys.readouterr().out
    assert "parts            512 queries by 16896 keys, 16384 queries by 512 keys, 16384 queries by 16384 keys" in text
    assert "8x16:8x16" in text and "in boxes" not in text
    assert main([*image, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"] == [[512, 16896], [16384, 512], [16384, 16384]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["causal &"], "no expression of masks"),
        (["causal & __import__('os')"], "is no mask"),
        (["window(x)"], "must be literals"),
        (["causal.after(x)"], "after takes one number"),
        (["causal.after(1, 2)"], "after takes one number"),
        (["causal.after(-1)"], "after(-1) of a mask"),
        (["window(left=1, middle=2)"], "window: "),
        (["grid((4, 4), 3)"], "is for 16 tokens, not 64 queries"),
        (["segments({'text': 4}, {('text', 'image'): causal})"], "segments has no pair ('text', 'image')"),
        (["segments({'text': 4}, window(3))"], "segments: "),
        (["causal", "--head", "1", "--picture"], "--head 1: the shape has 1 heads"),
        (["disc((8, 8), 3)", "--lattice", "4x4"], "no rule for each axis of a grid"),
        (["grid((8, 8), 3)", "--lattice", "4x4x4"], "is not a tile of queries and one of keys in 2 axes"),
        (["grid((8, 8), 3)", "--lattice", "4x4:0x4"], "is not a tile of queries and one of keys in 2 axes"),
        (["grid((8, 8), 3)", "--lattice", "4x4", "--tile", "16,32"], "--lattice 4x4 has tiles of 16 x 16 tokens"),
        (["halo((8, 8), 2, 1)", "--strides"], "is no neighbourhood of a grid"),
        (["grid((8, 8), 3)", "--strides", "--row-major"], "--row-major has no boxes"),
    ],
)
def test_plan_names_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments, "--shape", "1,1,64,64"]) == 2
    assert message in capsys.readouterr().err


_VIDEO = ["plan", "grid((30, 48, 80), window=(18, 24, 24))", "--shape", "1,24,115200,128"]


def test_plan_on_a_lattice(capsys: pytest.CaptureFixture[str]) -> None:
    """The bounds of Generalized Neighborhood Attention for HunyuanVideo, where boxes of our own do better."""
    assert main([*_VIDEO, "--lattice", "2x8x8:2x8x8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    bounds = [round(found[f"bound_{name}"], 1) for name in ("tiles", "worst", "flops")]
    assert bounds == [5.4, 3.6, 11.1] and found["full_strides"] == [[2, 8, 8]] and found["lattice"]
    assert found["boxes"] == [[2, 8, 8], [2, 8, 8]] and found["tile"] == [128, 128]
    assert main([*_VIDEO, "--lattice"]) == 0
    assert "8x4x4:4x8x4 (queries:keys), on a fixed lattice" in capsys.readouterr().out
    assert main([*_VIDEO, "--json"]) == 0
    assert round(json.loads(capsys.readouterr().out)["bound_tiles"], 1) == 6.9


def test_plan_of_every_stride(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*_VIDEO, "--lattice", "2x8x8", "--strides"]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    (own,) = (row for row in table if row[-2:] == ["this", "mask"])
    (smallest,) = (row for row in table if row[-2:] == ["smallest", "block-sparse"])
    assert own[0] == "1x1x1" and own[2:5] == ["11.11", "5.44", "3.60"] and own[5:7] == ["17", "%"]
    assert smallest[0] == "2x8x8" and smallest[2:7] == ["11.11", "11.11", "11.11", "100", "%"]
    assert main([*_VIDEO, "--strides", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["strides"]
    assert [row["own"] for row in rows].count(True) == 1 and all(row["kept_pairs"] == rows[0]["kept_pairs"] for row in rows)
    assert [2, 8, 8] in [row["stride"] for row in rows if row["smallest"]]
    assert all(row["full_share"] == 1 for row in rows if row["block_sparse"])


def test_plan_shows_the_kernel_that_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    shapes = {"1,1,1,4096,128": [16, 32], "1,1,4096,128": [128, 128], "1,1,4096,80": [128, 64]}
    for shape, tile in shapes.items():
        assert main(["plan", "window(1024)", "--shape", shape, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["tile"] == tile


def test_plan_of_segments_and_of_one_head(capsys: pytest.CaptureFixture[str]) -> None:
    image = "segments({'text': 64, 'image': 64}, {('image', 'image'): disc((8, 8), 2), ('text', 'more'): False}, keys={'text': 64, "
    assert main(["plan", image + "'image': 64, 'more': 8})", "--shape", "1,1,128,136,64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept_pairs"] == 64 * 128 + 64 * (64 + 8) + 64 + 4 * 8 * 7 + 4 * 7 * 7
    heads = ["plan", "per_head([causal, sampled(1, [1, 0])])", "--shape", "1,2,256,64", "--picture"]
    assert main(heads) == 0 and "head 0  head 1\n▒·      █·" in capsys.readouterr().out.replace("  \n", "\n")
    assert main([*heads, "--head", "1"]) == 0 and "head 0" not in capsys.readouterr().out


def test_a_mask_that_keeps_nothing_is_said_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "causal & ~causal", "--shape", "1,1,64,64"]) == 1
    assert "keeps no key for any query" in capsys.readouterr().out
    assert main(["plan", "causal & ~causal", "--shape", "1,1,64,64", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["bound_tiles"] is None


def test_zoo_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "list"]) == 0
    assert "Radial attention, video" in capsys.readouterr().out
    assert main(["zoo", "list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["rat"]["file"] == "attncompiler/zoo/rat.py" and "2025" in rows["gna-2d"]["source"]


def test_zoo_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "show", "attention-sinks"]) == 0
    text = capsys.readouterr().out
    for part in ("back = i[:, None] - i", "masks.sink(sinks)", "(kv_idx >= q_idx - 1019) | (kv_idx < 4)", "the same program",
                 "causal() & (window(1019, 0) | sink(4))", "\u2592", "bound tiles"):  # fmt: skip
        assert part in text


def test_zoo_show_with_helpers_and_without_a_mask(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "show", "halonet", "--size", "small", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "def windows(" in found["plain"] and "def windows(" in found["declared"] and "def halonet_masked" not in found["plain"]
    assert found["likeness"] == "through_views" and found["mask"] == "" and not found["missed"]
    assert found["plans"][0]["kept_pairs"] == 2 * 2 * 9 * 16 * 36 and "weigh   softmax" in found["recognised"][0]


def test_zoo_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "run", "sliding-window", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["judged"] and [row["form"] for row in found["forms"]] == ["plain, eager", "plain, compiled", "declared"]
    assert [row["tiles"] for row in found["forms"]] == [64, 28, 28] and found["dense_tiles"] == 64
    assert all(row["agrees"] and row["forward_ms"] > 0 and row["error"] < 1e-5 for row in found["forms"])


def test_zoo_knows_selections(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "list"]) == 0 and "dma-decode" in capsys.readouterr().out
    for name in ("dma", "dma-rows"):
        assert main(["zoo", "show", name, "--size", "small"]) == 0
        shown = capsys.readouterr().out
        assert "q, k and v read through views" in shown and "picked" in shown
    assert main(["zoo", "run", "dma-decode", "--device", "cpu", "--json"]) == 0
    forms = json.loads(capsys.readouterr().out)["forms"]
    assert [form["tiles"] for form in forms] == [16, 4, 4] and all(form["agrees"] for form in forms)


def test_zoo_shows_states(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "show", "lightning"]) == 0
    shown = capsys.readouterr().out
    assert "proved with sympy" in shown and "decay   exp(g[h])" in shown and "linear in the tokens" in shown
    assert main(["zoo", "show", "rala", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["states"]["declared"]) == 1 and not found["states"]["plain"] and found["missed"]


def test_zoo_runs_states(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "run", "lightning", "--device", "cpu", "--json"]) == 0
    forms = json.loads(capsys.readouterr().out)["forms"]
    assert len(forms) == 3 and all(form["agrees"] and form["tiles"] is None for form in forms)


def test_zoo_says_where_float64_does_not_fit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attncompiler.cli.zoo.free_bytes", lambda device: 1)
    assert main(["zoo", "run", "davit-channel", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "Not compared with float64" in text and "plain, eager" not in text and text.count("not judged") == 2


def test_zoo_names_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "show", "bat"]) == 2
    assert "the zoo has no 'bat'" in capsys.readouterr().err
    assert main(["zoo", "run", "rat", "--device", "abacus"]) == 1
    assert "there is no device 'abacus'" in capsys.readouterr().err
