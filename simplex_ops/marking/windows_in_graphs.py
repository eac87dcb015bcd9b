"""Windows are numbers in a compiled graph, not constants: another window compiles nothing anew.

Dynamo takes an int on a module for a constant, and after eight values of it (recompile_limit) runs
the model in eager code for good. So the two ints of a mark are named to it as dynamic, by a public
setting, torch.compiler.config.dynamic_sources, which it reads when it compiles. A window of 1 and
an unbounded one remain graphs of their own.
"""

from torch.compiler import config

_SOURCE = r".*\.simplex_mark\.w[12]$"


def make_windows_dynamic() -> None:
    """Name the windows of all marks among torch.compiler's dynamic sources, once."""
    named = config.dynamic_sources
    if _SOURCE not in named.split(","):
        config.dynamic_sources = f"{named},{_SOURCE}" if named else _SOURCE
