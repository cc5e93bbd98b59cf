"""A bar on stderr for what takes longer than a moment; nothing where stderr is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def steps(items: Collection[T], about: str) -> Iterator[T]:
    """The items one by one, beside a bar that is gone when they are done."""
    bar = tqdm(
        items, desc=about, file=sys.stderr, disable=None, leave=False, bar_format="{desc}: {n_fmt}/{total_fmt} |{bar:24}| {elapsed}"
    )
    yield from bar
