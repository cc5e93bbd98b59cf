"""attncompiler: write attention as plain PyTorch; get one specialised kernel."""

from importlib.metadata import entry_points

from torch._dynamo import register_backend

from attncompiler import masks, select
from attncompiler.backend import attncompiler as _backend
from attncompiler.dsl.attention import attention
from attncompiler.dsl.linear_attention import RowSum, StateValue, linear_attention
from attncompiler.dsl.routing import route
from attncompiler.explain import explain
from attncompiler.explanation import Explanation, Missed, Region

__version__ = "0.1.0"
__all__ = [
    "Explanation", "Missed", "Region", "RowSum", "StateValue", "__version__", "attention", "explain", "linear_attention", "masks",
    "route", "select",
]  # fmt: skip

if not entry_points(group="torch_dynamo_backends", name="attncompiler"):
    register_backend(_backend, name="attncompiler")  # imported from a checkout: Dynamo finds installed copies by their entry point
