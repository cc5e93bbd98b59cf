"""attncompiler: write attention as plain PyTorch; get one specialised kernel."""

from torch._dynamo import register_backend

from attncompiler.backend import attncompiler as _backend
from attncompiler.explain import explain
from attncompiler.explanation import Explanation, Missed, Region

__version__ = "0.1.0"
__all__ = ["Explanation", "Missed", "Region", "__version__", "explain"]

register_backend(_backend, name="attncompiler")  # the entry point does this for installed copies; an import does it for any
