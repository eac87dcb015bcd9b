"""Registers the FLOP formulas, no sooner than somebody counts FLOPs.

`torch.utils.flop_counter` imports triton where it is installed, 0.12 s that `import simplex_ops`
must not take. So the formulas wait until that module is imported, by whoever needs it.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

from simplex_ops.rules import flops

_COUNTER = "torch.utils.flop_counter"


class _AfterImport:
    """A finder that leaves the import of one module as it is and registers the formulas after."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register
        return spec


def register_formulas() -> None:
    """Register the formulas of simplex::attn and simplex::attn_backward, now or when needed."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _AfterImport())


def _register(counter: ModuleType) -> None:
    for name in ("attn", "attn_backward"):
        counter.register_flop_formula(getattr(torch.ops.simplex, name))(getattr(flops, name))
