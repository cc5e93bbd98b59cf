"""The examples run and check themselves; the demo in small."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "examples/train_gpt.py", "--steps", "5", "--length", "192"],
        [sys.executable, "examples/transformers_qwen3.py"],
        [sys.executable, "examples/custom_variant.py"],
        [sys.executable, "examples/declared_masks.py"],
        ["bash", "examples/inspect_walkthrough.sh"],
    ],
    ids=lambda command: Path(command[1]).stem,
)
def test_example(command: list[str], tmp_path: Path) -> None:
    if "--steps" in command:
        command = [*command, "--out", str(tmp_path)]
    environment = {**os.environ, "ATTNCOMPILER": str(Path(sys.executable).parent / "attncompiler")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
