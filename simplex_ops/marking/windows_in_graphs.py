"""Windows that change are numbers in a compiled graph, not constants: a schedule compiles once.

Dynamo takes an int on a module for a constant, and after eight values of it (recompile_limit) runs
the model in eager code for good. So what may change is named to it as dynamic, by a public setting,
torch.compiler.config.dynamic_sources, which it reads when it compiles:

- The windows of a mark with a window_schedule, which is one that says so or one that was put in
  place of another with other windows. One graph serves them all: Dynamo makes constants of 0 and 1
  and of None even there, so it is given the number past a window, a large one where that is
  unbounded.
- Those of all marks, once modules are marked with more than four different pairs: layers that are
  compiled one by one then share graphs, but for a window of 1 and an unbounded one.

Until then they are constants, and always where a program is exported: torch.export(strict=True)
knows no number that comes from a module.

Private name: torch.compiler._is_exporting_flag, seen in 2.11 to 2.15; is_exporting() is true
of all that Dynamo traces in 2.11.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import config

if TYPE_CHECKING:
    from simplex_ops.marking.setting import Mark

_SCHEDULED = r".*\.simplex_mark\.past_w[12]$"
_ALL = r".*\.simplex_mark\.w[12]$"
_CONSTANTS = 4
# A window that reaches from any int32 q_start over any sequence. Larger numbers are clipped where
# kernels are launched, by a guard, and so would be a graph apart.
_UNBOUNDED = 2**32 - 1
_seen: set[tuple[int | None, int | None]] = set()


def count_windows(mark: "Mark") -> None:
    """Note that a module was marked."""
    _seen.add((mark.w1, mark.w2))
    if len(_seen) > _CONSTANTS:
        _name(_ALL)


def as_scheduled(before: "Mark", after: "Mark") -> "Mark":
    """Return a mark that replaces another, with a schedule where their windows differ."""
    if (before.w1, before.w2) == (after.w1, after.w2) or after.window_schedule:
        return after
    return replace(after, window_schedule=True)


def make_schedules_dynamic() -> None:
    """Name the windows of marks with a schedule among torch.compiler's dynamic sources, once."""
    _name(_SCHEDULED)


def past(window: int | None) -> int:
    """Return the number past a window, which is at least 2."""
    return (_UNBOUNDED if window is None else window) + 1


def windows_of(mark: Any) -> tuple[int | None, int | None]:
    """Return the windows of a mark as a graph holds them; torch.compile traces it."""
    if mark.window_schedule and not torch.compiler._is_exporting_flag:
        return mark.past_w1 - 1, mark.past_w2 - 1
    return mark.w1, mark.w2


def told(window: int | None) -> int | None:
    """Return the window that a number in a graph stands for."""
    return None if window == _UNBOUNDED else window


@contextlib.contextmanager
def constant_windows() -> Iterator[None]:
    """Let windows be constants in what is traced inside."""
    others = ",".join(name for name in config.dynamic_sources.split(",") if name != _ALL)
    with config.patch(dynamic_sources=others):  # pyright: ignore[reportAttributeAccessIssue]
        yield


def _name(source: str) -> None:
    named = config.dynamic_sources
    if source not in named.split(","):
        config.dynamic_sources = f"{named},{source}" if named else source
