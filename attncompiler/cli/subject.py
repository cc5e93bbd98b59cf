"""What a command is about: `path.py:name`, and the inputs it is called with."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attncompiler.errors import OptionError

INPUTS_HELP = """example inputs, in this order of precedence:
  --input SHAPE[:DTYPE]   once for each tensor argument, e.g. --input 2,8,1024,64:bf16 (random values; default f32)
  example_inputs_<name>() or example_inputs() in the file, returning (args...) or ((args...), {kwargs})
a class is made by make_<Name>() in the file, or without arguments"""
_DTYPES = {
    "f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "i64": torch.int64,
    "i32": torch.int32,
    "bool": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A callable of the user's with example inputs."""

    name: str
    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def load(target: str, inputs: Sequence[str]) -> Subject:
    """Raises: OptionError for a missing file, a missing name, or inputs that are nowhere to be found."""
    path, _, name = target.rpartition(":")
    if not path or not name:
        raise OptionError(f"{target!r} is not of the form path.py:function_or_Class")
    if not Path(path).is_file():
        raise OptionError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(Path(path).stem, module)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        names = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise OptionError(f"{path} has no {name!r}", do=f"it has {', '.join(names) or 'no functions or classes'}")
    call = getattr(module, name)
    if isinstance(call, type):
        call = getattr(module, f"make_{name}", call)()
    args, kwargs = _inputs(module, path, name, inputs)
    return Subject(name, call, args, kwargs)


def _inputs(module: Any, path: str, name: str, inputs: Sequence[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if inputs:
        return tuple(_tensor(text) for text in inputs), {}
    for maker in (f"example_inputs_{name}", "example_inputs"):
        if hasattr(module, maker):
            made = getattr(module, maker)()
            if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], tuple) and isinstance(made[1], dict):
                return made
            return (made if isinstance(made, tuple) else (made,)), {}
    raise OptionError(f"no example inputs for {name}", do=f"give --input, or write example_inputs() in {path}")


def _tensor(text: str) -> torch.Tensor:
    shape, _, dtype = text.partition(":")
    try:
        sizes = [int(part) for part in shape.split(",") if part]
        kind = _DTYPES[dtype or "f32"]
    except (ValueError, KeyError):
        raise OptionError(
            f"--input {text!r} is not SHAPE[:DTYPE]", do=f"for example 2,8,1024,64:bf16; dtypes: {', '.join(_DTYPES)}"
        ) from None
    if kind.is_floating_point:
        return torch.randn(sizes).to(kind)
    return torch.randint(0, 2, sizes).to(kind)
