"""What the compiler says of a function: which attentions it took, which it left, where, why, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from tabulate import tabulate

from attncompiler.tuning.speed_of_light import SpeedOfLight


@dataclass(frozen=True)
class Region:
    """One attention that was taken: a score-to-sum site of the user's code.

    `ir` is the program's text, `mask` its keep clause ("all pairs" if it drops none), `density` the share of (query, key) tiles
    that the forward kernel visits (of routed heads, those expected to be on; of all keys, where a list of some is read), `template` the
    lowering, `kernels` the generated sources by name, `speed_of_light` what the mask can be worth, in the tiles of that kernel, on the
    GPU that the operands are on, else on an H100.
    """

    family: str
    ir: str
    mask: str
    density: float
    template: str
    source_location: str
    kernels: Mapping[str, str] = field(repr=False, default_factory=dict)
    notes: tuple[str, ...] = ()
    speed_of_light: SpeedOfLight | None = None


@dataclass(frozen=True)
class Missed:
    """One attention, or a part of one, that was left to Inductor."""

    reason: str
    source_location: str
    advice: str = ""


@dataclass(frozen=True)
class Explanation:
    """All regions of a function. `str()` is a table for people; `to_dict()` serves --json."""

    regions: tuple[Region, ...]
    missed: tuple[Missed, ...]
    graphs: int = 1
    graph_breaks: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = []
        if self.regions:
            rows = [
                (i, r.source_location, r.family, r.mask, f"{100 * r.density:.3g} %", _milliseconds(r.speed_of_light), r.template)
                for i, r in enumerate(self.regions)
            ]
            headers = ("#", "where", "family", "mask", "tiles visited", "predicted ms", "lowering")
            widths = [None, 40, None, 60, None, None, 30]
            parts.append(tabulate(rows, headers=headers, maxcolwidths=widths, disable_numparse=True))
        notes: dict[str, list[str]] = {}
        for i, region in enumerate(self.regions):
            for note in region.notes:
                notes.setdefault(note, []).append(str(i))
        parts += [f"Note on {', '.join(numbers)}: {note}" for note, numbers in notes.items()]
        if self.missed:
            rows_missed = [(m.source_location, m.reason, m.advice) for m in self.missed]
            parts.append(
                "Left to Inductor:\n" + tabulate(rows_missed, headers=("where", "why", "what to do"), maxcolwidths=[40, 60, 50])
            )
        if not parts:
            parts.append("No attention found.")
        for reason in self.graph_breaks:
            parts.append(f"Graph break (Dynamo): {reason}")
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, object]:
        """Plain data: lists, dicts, strings and numbers."""
        return {
            "regions": [
                {
                    "family": r.family, "ir": r.ir, "mask": r.mask, "density": r.density, "template": r.template,
                    "source_location": r.source_location, "kernels": dict(r.kernels), "notes": list(r.notes),
                    "speed_of_light": asdict(r.speed_of_light) if r.speed_of_light is not None else None,
                }
                for r in self.regions
            ],
            "missed": [{"reason": m.reason, "source_location": m.source_location, "advice": m.advice} for m in self.missed],
            "graphs": self.graphs,
            "graph_breaks": list(self.graph_breaks),
        }  # fmt: skip


def _milliseconds(light: SpeedOfLight | None) -> str:
    return "-" if light is None else f"{light.predicted_ms:.2g}"
