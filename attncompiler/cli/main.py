"""`attncompiler explain | inspect | plan | zoo | doctor`.

Exit codes: 0 all well, 1 something was missed or failed, 2 wrong usage."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import attncompiler
from attncompiler.cli import doctor, inspect, plan, zoo
from attncompiler.cli.subject import INPUTS_HELP, load
from attncompiler.errors import AttnCompilerError, OptionError
from attncompiler.tuning.target import TARGETS


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of a command line."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except OptionError as error:
        print(f"attncompiler: {error}", file=sys.stderr)
        return 2
    except AttnCompilerError as error:
        print(f"attncompiler: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="attncompiler", description=__doc__)
    parser.add_argument("--version", action="version", version=f"attncompiler {attncompiler.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, about: str, subject: bool) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=about, description=about, epilog=INPUTS_HELP if subject else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        if subject:
            sub.add_argument("subject", metavar="path.py:name", help="a function or class of yours")
            sub.add_argument("--input", action="append", default=[], metavar="SHAPE[:DTYPE]", help="one example tensor")
        sub.add_argument("--json", action="store_true", help="print plain data instead of tables")
        return sub

    explain = command("explain", "say which attentions of a function are taken, which are not, and why", True)
    explain.set_defaults(run=_explain)
    look = command("inspect", "list and show the generated kernels of a function", True)
    look.add_argument("--show", choices=["list", "source", "ir", "ptx", "sass", "resources"], default="list")
    look.add_argument("--region", type=int, help="only this region (its number in the list)")
    look.add_argument("--target", choices=list(TARGETS), default="sm_90", help="GPU to compile for; none is needed here")
    look.add_argument("--html", metavar="FILE", help="write a page: source beside the program, and the mask's picture")
    look.set_defaults(run=inspect.run)
    cost = command("plan", "say what a mask keeps and costs at a shape, without running it", False)
    cost.add_argument("mask", help='an expression of attncompiler.masks, e.g. "causal & window(1024)"')
    cost.add_argument("--shape", required=True, metavar="B,H,N,D", help="or B,H,M,N,D: batch, heads, queries, keys, channels")
    cost.add_argument(
        "--tile", metavar="QUERIES,KEYS", help="tile size (default: that of the kernel for bf16 tensors of this shape)"
    )
    cost.add_argument("--target", choices=list(TARGETS), default="sm_90", help="GPU to predict for")
    cost.add_argument("--row-major", action="store_true", help="tiles of a grid as runs of tokens, not boxes")
    lattice = "grids: tiles on a fixed lattice, as NATTEN's, e.g. 2x8x8:2x8x8 (queries:keys); alone: of the best shape"
    cost.add_argument("--lattice", nargs="?", const="best", metavar="TILES", help=lattice)
    cost.add_argument("--strides", action="store_true", help="grids: a table of strides, and which make every tile full")
    cost.add_argument("--picture", action="store_true", help="draw the tiles")
    cost.add_argument("--svg", metavar="FILE", help="write the picture as SVG")
    cost.add_argument("--png", metavar="FILE", help="write the picture as PNG")
    cost.add_argument("--head", type=int, metavar="H", help="draw this head (default: all that differ, side by side)")
    cost.set_defaults(run=plan.run)
    about = "published systems as users write them, each with a declared twin"
    zoo.add_commands(commands.add_parser("zoo", help=about, description=about))
    health = command("doctor", "check this installation: versions, device, caches, what works here", False)
    health.set_defaults(run=doctor.run)
    return parser


def _explain(arguments: argparse.Namespace) -> int:
    subject = load(arguments.subject, arguments.input)
    explanation = attncompiler.explain(subject.call, *subject.args, **subject.kwargs)
    print(json.dumps(explanation.to_dict(), indent=2) if arguments.json else explanation)
    return 1 if explanation.missed else 0
