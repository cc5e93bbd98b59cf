"""Options of the backend, and the cache directory: what is allowed, and what happens where it is not there."""

from __future__ import annotations

import difflib
import enum
import functools
import hashlib
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attncompiler.errors import OptionError


class Inner(enum.Enum):
    """What compiles everything that is not attention."""

    INDUCTOR = "inductor"
    AOT_EAGER = "aot_eager"
    EAGER = "eager"


@dataclass(frozen=True, slots=True)
class Options:
    """The options of `torch.compile(f, backend="attncompiler", options={...})`."""

    inner: Inner = Inner.INDUCTOR


def parse_options(options: Mapping[str, Any] | None, mode: str | None) -> Options:
    """Raises: OptionError for an unknown name, a bad value, or `mode` (alone or beside `options`)."""
    if mode is not None and options:
        raise OptionError(
            f"mode={mode!r} and options={dict(options)!r} are given together",
            why="torch.compile takes one or the other",
            do="keep the options; attncompiler has no modes",
        )
    if mode not in (None, "default"):
        raise OptionError(f"mode={mode!r} is not known to attncompiler", do='leave it out, or use backend="inductor" for that mode')
    known = ("inner",)
    for name in options or {}:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]!r}?" if close else f"the options are {', '.join(known)}"
            raise OptionError(f"unknown option {name!r} of backend attncompiler", do=hint)
    value = (options or {}).get("inner", Inner.INDUCTOR.value)
    values = [inner.value for inner in Inner]
    if value not in values:
        raise OptionError(f"option inner={value!r} is not one of {', '.join(map(repr, values))}")
    return Options(Inner(value))


# ----------------------------------------------------------------------------------------------------------- the cache


def cache_dir() -> Path:
    """Where generated sources are kept: ATTNCOMPILER_CACHE_DIR, or the user's cache folder.

    A directory that cannot be written is replaced for this process by a private temporary one, with one warning."""
    base = os.environ.get("ATTNCOMPILER_CACHE_DIR")
    if base is None:
        base = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attncompiler")
    return _usable(Path(base))


@functools.lru_cache(maxsize=16)
def _usable(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path) as probe:
            probe.write(b"probe")
            probe.flush()
        return path
    except OSError as error:
        fallback = Path(tempfile.mkdtemp(prefix="attncompiler-"))
        warnings.warn(
            f"attncompiler can't write its cache {path}: {error}\n"
            f"  why: the directory is read-only, full or not a directory\n"
            f"  do:  set ATTNCOMPILER_CACHE_DIR; until then {fallback} serves this process",
            stacklevel=3,
        )
        return fallback


def write_atomic(path: Path, text: str) -> bool:
    """Write a cache entry whole or not at all; its first line is the hash of the rest. False, and a warning, where it can't be
    written: the entry is made again next time."""
    body = f"# {hashlib.sha256(text.encode()).hexdigest()}\n{text}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, suffix=".tmp") as file:
            file.write(body)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"attncompiler could not write {path}: {error}; it will be made again next time", stacklevel=2)
        return False
    return True


def read_checked(path: Path) -> str | None:
    """A cache entry's text; None if there is none, or if its hash says that it is not what was written (then it is removed)."""
    try:
        first, _, text = path.read_text().partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    if first == f"# {hashlib.sha256(text.encode()).hexdigest()}":
        return text
    warnings.warn(f"attncompiler found a damaged cache entry, {path}; it is discarded and made again", stacklevel=2)
    path.unlink(missing_ok=True)
    return None
