"""Mark: how a marked module attends."""

import operator
from dataclasses import dataclass, field
from typing import Any

from simplex_ops.contract.checks import check_form, check_window
from simplex_ops.marking import windows_in_graphs

INITS = ("residual", "copy", "random")


@dataclass(frozen=True)
class Mark:
    """How a marked module attends: those arguments of simplex::attn that its input does not give.

    It stands on the module as `simplex_mark`; to change a window, put another there
    (`dataclasses.replace`): compiled code notices, and compiles again for the first other window
    alone. With `window_schedule` its windows are numbers in compiled code from the first call on.
    """

    w1: int | None
    w2: int | None
    form: str
    k2_bias: float
    v2_bias: float
    is_causal: bool
    head_dim: int
    v_head_dim: int
    without_dropout: bool = False  # the module's attention dropout, in training, is dropped
    init: str = "random"  # how k2 and v2 began
    kv_heads: int = 0  # of k2 and v2
    window_schedule: bool = field(default=False, compare=False)
    past_w1: int = field(init=False, repr=False, compare=False)  # for `windows_in_graphs`
    past_w2: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("w1", "w2"):
            object.__setattr__(self, name, _int_or_none(name, getattr(self, name)))
        check_form(self.form)
        check_init(self.init)
        if self.window_schedule:
            windows_in_graphs.make_schedules_dynamic()
        for name, window in (("past_w1", self.w1), ("past_w2", self.w2)):
            object.__setattr__(self, name, windows_in_graphs.past(window))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()  # in another process


def check_init(init: str) -> None:
    """Raise ValueError where `init` is no way to start k2 and v2."""
    if init not in INITS:
        raise ValueError(f'init must be "residual", "copy" or "random", got {init!r}')


def pair_of(window: Any) -> tuple[Any, Any]:
    """Return the two windows of mark()'s argument, unchecked.

    Raises:
        ValueError: it is no pair.
    """
    try:
        w1, w2 = window
    except (TypeError, ValueError):
        raise ValueError(
            "window must be a pair (w1, w2) of keys, each at least 1 or None for unbounded, "
            f"got {window!r}"
        ) from None
    return w1, w2


def _int_or_none(name: str, window: Any) -> int | None:
    """Return a window as Python's int, whatever kind of integer it is."""
    if window is None:
        return None
    try:
        number = None if isinstance(window, bool) else operator.index(window)
    except TypeError:
        number = None
    if number is None:
        raise ValueError(
            f"{name} must be an int of at least 1 (a window counts the query itself), or None, "
            f"got {window!r}"
        )
    check_window(name, number)
    return number
