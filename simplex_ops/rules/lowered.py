"""Tells Inductor of the kernels, no sooner than it is there and a trace comes by."""

import importlib
import sys

import torch
from torch import Tensor


def register() -> None:
    """Register the Inductor lowerings where Inductor is loaded; the fake kernels call it.

    Tracing runs them before a graph is lowered, so that whoever compiles a call of the operator
    gets its kernels, without an import or a call of theirs.
    """
    if "torch._inductor.lowering" in sys.modules:
        importlib.import_module("lowering.inductor.registered").register()


def guard_precision(q: Tensor) -> None:
    """Let a graph with the call be compiled again where another precision of float32 is set.

    The fake kernels call it too: caches may hold the lowered graph, and no lowering may run.
    """
    if q.dtype == torch.float32 and q.device.type == "cuda" and "torch._dynamo" in sys.modules:
        importlib.import_module("lowering.compat").guard_precision()
