"""The compiler's plugin, loaded when it is called: users of marks import this package alone."""

from importlib import import_module
from typing import Any


def enable() -> Any:
    """Serve marks in every model that Inductor compiles from here on, until `disable()`.

    Without it, name the backend: torch.compile(model, backend="simplex"). `with enable():` is for
    the block alone. A model must be called while it stands, since it is compiled when it is called.
    """
    return import_module("lowering").enable()


def disable() -> None:
    """Undo `enable()`; without it, nothing."""
    import_module("lowering").disable()


def last_report() -> Any:
    """Return what became of each mark in the last graph compiled with marks or attention in it.

    Printed, it lists by the names that `marked_modules` gives what was rewritten, what was refused
    and why, and what was left as it was. Layers that are compiled one by one share a graph where
    they are alike: the report names the first. Every graph's report is logged when it is compiled:
    TORCH_LOGS="simplex_ops", set when torch is imported, or Python's logger of that name at INFO;
    TORCH_LOGS="+simplex_ops", or DEBUG, adds the graph.
    """
    return import_module("lowering").last_report()
