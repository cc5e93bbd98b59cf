"""Generated source as a module, through the cache directory."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from attncompiler.config import cache_dir, read_checked, write_atomic


def load_module(source: str) -> ModuleType:
    """The generated file as a module; kept in the cache directory under the hash of its text."""
    name = f"attncompiler_kernels_{hashlib.sha256(source.encode()).hexdigest()[:24]}"
    if name in sys.modules:
        return sys.modules[name]
    path = cache_dir() / "kernels" / f"{name}.py"
    if read_checked(path) != source and not write_atomic(path, source):
        path = Path(tempfile.mkdtemp(prefix="attncompiler-")) / path.name  # Triton reads a kernel's source from a file
        path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module
