"""Windows that change are numbers in a compiled graph, not constants: a schedule compiles once.

Dynamo takes an int on a module for a constant, and after eight values of it (recompile_limit) runs
the model in eager code for good. So once a mark is replaced by one with other windows, or modules
are marked with more than four different pairs of windows, the windows of all marks are named to it
as dynamic, by a public setting, torch.compiler.config.dynamic_sources, which it reads when it
compiles. A window of 1 and an unbounded one remain graphs of their own. Until then they are
constants, and always where a program is exported: torch.export(strict=True) knows no number that
comes from a module.
"""

import contextlib
from collections.abc import Iterator

from torch.compiler import config

from simplex_ops.marking.setting import Mark

_SOURCE = r".*\.simplex_mark\.w[12]$"
_CONSTANTS = 4
_seen: set[tuple[int | None, int | None]] = set()


def count_windows(mark: Mark) -> None:
    """Note that a module was marked."""
    _seen.add((mark.w1, mark.w2))
    if len(_seen) > _CONSTANTS:
        make_windows_dynamic()


def compare_windows(before: Mark, after: Mark) -> None:
    """Note that a mark was replaced."""
    if (before.w1, before.w2) != (after.w1, after.w2):
        make_windows_dynamic()


def make_windows_dynamic() -> None:
    """Name the windows of all marks among torch.compiler's dynamic sources, once."""
    named = config.dynamic_sources
    if _SOURCE not in named.split(","):
        config.dynamic_sources = f"{named},{_SOURCE}" if named else _SOURCE


@contextlib.contextmanager
def constant_windows() -> Iterator[None]:
    """Let windows be constants in what is traced inside."""
    others = ",".join(name for name in config.dynamic_sources.split(",") if name != _SOURCE)
    with config.patch(dynamic_sources=others):  # pyright: ignore[reportAttributeAccessIssue]
        yield
