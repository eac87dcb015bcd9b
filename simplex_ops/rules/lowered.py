"""Tells Inductor of the kernels, no sooner than it is there and a trace comes by."""

import importlib
import sys


def register() -> None:
    """Register the Inductor lowerings where Inductor is loaded; the fake kernels call it.

    Tracing runs them before a graph is lowered, so that whoever compiles a call of the operator
    gets its kernels, without an import or a call of theirs.
    """
    if "torch._inductor.lowering" in sys.modules:
        importlib.import_module("lowering.inductor.registered").register()
