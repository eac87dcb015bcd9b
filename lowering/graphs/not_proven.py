"""The finding that something could not be proven of a graph."""

from torch import fx


class NotProven(Exception):  # noqa: N818 (a finding, not an error)
    """Why a mask may be more than causal; `source` is the input that it comes from, if any."""

    def __init__(self, reason: str, source: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.source = source
