"""What is aimed at: fractions of an anchor's rate, or of our own on another workload, or a rate."""

from collections.abc import Callable
from dataclasses import dataclass

from tools.workloads import WORKLOADS, Direction

YARDSTICK = {"cuda": "cudnn fwd", "cpu": "matmul"}
# The least fraction of the yardstick's rate.
AIMS: dict[tuple[str, Direction], float] = {
    ("llama-mqa", "forward"): 1.0,
    ("gqa8", "forward"): 0.82,
    ("gqa4", "forward"): 0.75,
    ("mha16", "forward"): 0.68,
    ("llama-mqa", "backward"): 0.62,
    ("gqa8-2k", "backward"): 0.48,
    ("gqa4-2k", "backward"): 0.44,
    ("mha16-2k", "backward"): 0.38,
    ("mqa-d64", "forward"): 0.85,
    ("gqa4-d64", "forward"): 0.75,
    ("mqa-d64", "backward"): 0.5,
    ("gqa4-d64", "backward"): 0.45,
    ("cpu", "forward"): 0.40,
    ("cpu", "backward"): 0.25,
}
# The least fraction of our useful rate on another workload, in the same direction: (forward,
# backward). Short sequences see less of their windows, and nominal rates count whole ones.
RELATIVE_AIMS: dict[str, tuple[str, float, float]] = {
    "mqa-1024x32": ("llama-mqa", 0.85, 0.85),
    "mqa-256x64": ("llama-mqa", 0.85, 0.85),
    "mqa-128x128": ("llama-mqa", 0.85, 0.85),
    "mqa-512x16": ("llama-mqa", 0.85, 0.85),
    "mqa-32x512": ("llama-mqa", 0.85, 0.85),
    "mqa-fp16": ("llama-mqa", 0.9, 0.9),
    "gqa4-b1": ("gqa4", 0.6, 0.6),
    "gqa5-odd": ("gqa5", 0.6, 0.6),
    "odd": ("gqa3-d96", 0.6, 0.6),
    "determinant": ("trilinear", 0.7, 0.6),
    "strassen": ("trilinear", 0.85, 0.75),
    "n32k": ("n4k", 0.95, 0.95),
    "n128k": ("n4k", 0.95, 0.95),
}
# The least nominal TFLOP/s, where no anchor computes the same.
RATES: dict[tuple[str, Direction], float] = {("fp32", "forward"): 40.0}
# Of eager code's rate, through torch.compile.
OF_EAGER = 0.97


@dataclass(frozen=True)
class Aim:
    """How much of which rate we aim at, and how much of it was reached, where both ran."""

    least: float
    of: str
    reached: float | None

    @property
    def is_reached(self) -> bool | None:
        """Tell whether it was reached, if that is known."""
        return None if self.reached is None else self.reached >= self.least

    @property
    def verdict(self) -> str:
        """Say it in words."""
        answer = {None: "?", True: "yes", False: "NO"}[self.is_reached]
        ratio = "" if self.reached is None else f", {self.reached:.2f}"
        return f"{self.least:.2f} of {self.of}{ratio}: {answer}"


def aim_of(
    name: str, direction: Direction, rate: float | None, share: float | None,
    useful: Callable[[str], float | None],
) -> Aim | None:  # fmt: skip
    """Return what is aimed at in a row of our nominal TFLOP/s and share of the yardstick's rate.

    `useful` gives our useful rate on a workload in the same direction, or None.
    """
    if (name, direction) in RATES:
        return Aim(RATES[name, direction], "1 TFLOP/s", rate)
    if (name, direction) in AIMS:
        return Aim(AIMS[name, direction], YARDSTICK[WORKLOADS[name].device], share)
    if name not in RELATIVE_AIMS:
        return None
    other, *least = RELATIVE_AIMS[name]
    mine, theirs = useful(name), useful(other)
    reached = mine / theirs if mine is not None and theirs is not None else None
    return Aim(least[direction == "backward"], other, reached)
