"""Filling templates: the one way in which generated source is put together."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence


def indent(text: str, depth: int) -> str:
    return textwrap.indent(text, "    " * depth)


def signature(names: Sequence[str]) -> str:
    """Parameters, wrapped as a person would."""
    lines = [""]
    for name in names:
        if len(lines[-1]) + len(name) > 118:
            lines.append("")
        lines[-1] += f"{name}, "
    text = "\n".join(f"    {line.rstrip()}" for line in lines)
    return ", ".join(names) if len(lines) == 1 else f"\n{text}\n"


def fill(template: str, **holes: str) -> str:
    """A template with its holes filled; a hole on a line of its own that has nothing to say takes the line with it."""
    lines = []
    for line in template.splitlines():
        stripped = line.strip()
        hole = stripped[1:-1] if stripped.startswith("{") and stripped.endswith("}") and stripped[1:-1] in holes else None
        if hole is not None:
            if holes[hole]:
                lines.append(indent(holes[hole].strip("\n"), (len(line) - len(line.lstrip())) // 4))
            continue
        for name, value in holes.items():
            line = line.replace("{" + name + "}", value)
        lines.append(line)
    return "\n".join(lines) + "\n"
