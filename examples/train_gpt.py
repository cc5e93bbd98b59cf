"""Train a small GPT on Python's own sources: eager, Inductor and attncompiler side by side.

    python examples/train_gpt.py [--steps 100] [--length 1024]

The model below is plain PyTorch: grouped-query attention with ALiBi, every other layer with a sliding window. Nothing in it is
written for attncompiler; `torch.compile(model, backend="attncompiler")` finds its attention. Uses a GPU where there is one.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import inspect
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, LAYERS, HEADS, KV_HEADS, WINDOW = 256, 4, 8, 2, 128
BACKENDS = ("eager", "inductor", "attncompiler")


class Attention(nn.Module):
    """Causal grouped-query attention with ALiBi; `window` limits how far back a token looks."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window, self.size = window, WIDTH // HEADS
        self.query = nn.Linear(WIDTH, WIDTH, bias=False)
        self.key = nn.Linear(WIDTH, KV_HEADS * self.size, bias=False)
        self.value = nn.Linear(WIDTH, KV_HEADS * self.size, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("slopes", 2.0 ** (-8.0 * torch.arange(1, HEADS + 1) / HEADS))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.query(x).view(b, t, HEADS, self.size).transpose(1, 2)
        k = self.key(x).view(b, t, KV_HEADS, self.size).transpose(1, 2).repeat_interleave(HEADS // KV_HEADS, dim=1)
        v = self.value(x).view(b, t, KV_HEADS, self.size).transpose(1, 2).repeat_interleave(HEADS // KV_HEADS, dim=1)
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.size)
        distance = torch.arange(t, device=x.device)[:, None] - torch.arange(t, device=x.device)
        scores = scores - self.slopes[:, None, None] * distance
        hidden = distance < 0
        if self.window is not None:
            hidden = hidden | (distance >= self.window)
        weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, t, WIDTH))


class Block(nn.Module):
    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), Attention(window)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList(Block(WINDOW if i % 2 == 0 else None) for i in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def example_inputs_GPT() -> tuple[Tensor]:
    """For `attncompiler explain examples/train_gpt.py:GPT`."""
    return (torch.zeros(1, 1024, dtype=torch.long),)


def text() -> Tensor:
    """The bytes of a few modules of the standard library, documentation strings and code."""
    modules = (argparse, inspect, json, subprocess)
    return torch.tensor(list("\n".join(inspect.getsource(module) for module in modules).encode()))


def batch(data: Tensor, step: int, length: int) -> tuple[Tensor, Tensor]:
    """The same piece of text for the same step, whoever trains."""
    start = int(torch.randint(len(data) - length - 1, (1,), generator=torch.Generator().manual_seed(step)))
    piece = data[start : start + length + 1][None]
    return piece[:, :-1], piece[:, 1:]


def train(backend: str, steps: int, length: int) -> dict[str, object]:
    """Losses, seconds a step (the first three not counted), seconds of the first step, and peak memory above the start, in MiB."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = GPT().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    run = model if backend == "eager" else torch.compile(model, backend=backend)
    data = text()
    losses, times = [], []
    for step in range(steps):
        if step == 3:
            started = _memory(device, start=True)
        begin = time.perf_counter()
        tokens, targets = (x.to(device) for x in batch(data, step, length))
        loss = F.cross_entropy(run(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        times.append(time.perf_counter() - begin)
        if sys.stderr.isatty():
            print(f"\r{backend:13} step {step + 1:4} of {steps}, loss {losses[-1]:.3f} ", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return {
        "backend": backend,
        "losses": losses,
        "seconds": sorted(times[3:])[len(times[3:]) // 2],
        "first": times[0],
        "memory": _memory(device, start=False) - started,
    }


def _memory(device: str, start: bool) -> float:
    """MiB: allocated now (start) or at the most; on a CPU the resident set of this process, as the system counts it."""
    if device == "cuda":
        if start:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated() / 2**20
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if start:
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # what compiling left free in the heap would hide what the steps need
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    field = "VmRSS" if start else "VmHWM"
    return int(next(line for line in status.read_text().splitlines() if line.startswith(field)).split()[1]) / 2**10


def show(results: list[dict[str, object]], steps: int) -> None:
    from tabulate import tabulate

    eager = results[0]
    marks = sorted({0, *range(steps // 5 - 1, steps, max(steps // 5, 1)), steps - 1})
    print("\nLoss at step:")
    rows = [[r["backend"], *(f"{r['losses'][m]:.4f}" for m in marks)] for r in results]
    print(tabulate(rows, headers=["", *(str(m + 1) for m in marks)], disable_numparse=True))
    rows = []
    for r in results:
        worst = max(abs(a - b) for a, b in zip(r["losses"], eager["losses"], strict=True))
        rows.append([r["backend"], f"{1e3 * r['seconds']:.0f}", f"{eager['seconds'] / r['seconds']:.2f}x", f"{r['memory']:.0f}",
                     f"{r['first']:.1f}", f"{worst:.1e}"])  # fmt: skip
    print()
    headers = ["", "ms a step", "speed-up", "peak memory, MiB", "first step, s", "largest difference of the loss from eager"]
    print(tabulate(rows, headers=headers, disable_numparse=True))


def show_compiler(folder: Path) -> None:
    import attncompiler

    explanation = attncompiler.explain(GPT(), *example_inputs_GPT())
    print(explanation)
    folder.mkdir(parents=True, exist_ok=True)
    for number, region in enumerate(explanation.regions):
        for name, source in region.kernels.items():
            (folder / f"region{number}_{name}_sm_90.py").write_text(source)
    print(f"\nThe kernels for sm_90 (no GPU needed to read or compile them) lie in {folder}/;")
    print("`attncompiler inspect examples/train_gpt.py:GPT` compiles them and shows registers, spills and shared memory.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=1024, help="tokens a step")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="where the emitted kernels are written")
    parser.add_argument("--only", choices=BACKENDS, help="train with one backend and print the result as JSON")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(train(arguments.only, arguments.steps, arguments.length)))
        return 0
    show_compiler(arguments.out)
    results = []
    for backend in BACKENDS:  # each in a process of its own, so that memory is its own
        command = [sys.executable, __file__, "--only", backend, "--steps", str(arguments.steps), "--length", str(arguments.length)]
        print(f"training with {backend} ...", flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout))
    show(results, arguments.steps)
    worst = max(abs(a - b) for r in results for a, b in zip(r["losses"], results[0]["losses"], strict=True))
    return 0 if worst < 1e-2 else 1


if __name__ == "__main__":
    sys.exit(main())
