"""The torch.compile plugin: the pass that serves marked modules, and the ways to install it.

torch.compile(model, backend="simplex")           # by entry point, nothing to import
simplex_ops.enable()                              # or: for every torch.compile(model) from here on
print(simplex_ops.last_report())                  # what was rewritten, and what was refused and why
"""

from lowering.backend import simplex
from lowering.enabling import disable, enable
from lowering.passes.marks import rewrite
from lowering.report import Refused, Report, Rewritten, last_report

__all__ = [
    "Refused",
    "Report",
    "Rewritten",
    "disable",
    "enable",
    "last_report",
    "rewrite",
    "simplex",
]
