"""What the pass did to a graph: rewritten modules, refused marks with their reasons, the rest."""

import logging
from collections import deque
from dataclasses import dataclass
from typing import Any

from simplex_ops.marking.call import UnservedMarkError


@dataclass(frozen=True)
class Rewritten:
    """One scaled_dot_product_attention that became simplex::attn."""

    module: str
    w1: Any
    w2: Any
    form: str

    def __str__(self) -> str:
        return f"{self.module}: {self.form}, w1={self.w1}, w2={self.w2}"


@dataclass(frozen=True)
class Refused:
    """One mark that the pass could not serve."""

    module: str
    reason: str

    def __str__(self) -> str:
        return f"{self.module}: {self.reason}"


@dataclass(frozen=True)
class Report:
    """What one graph held. `unmarked` names the modules whose attention no mark asked for.

    `joined` names the marked modules whose attention was spelled out and became one call, `folded`
    those whose keys and values were repeated to all heads and are no more.
    """

    rewritten: tuple[Rewritten, ...] = ()
    refused: tuple[Refused, ...] = ()
    unmarked: tuple[str, ...] = ()
    joined: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()

    def raise_if_refused(self) -> None:
        """Raise UnservedMarkError naming every refused mark and its reason."""
        if not self.refused:
            return
        lines = "\n".join(f"  - {refused}" for refused in self.refused)
        raise UnservedMarkError(
            f"{len(self.refused)} of {len(self.refused) + len(self.rewritten)} marked modules "
            "cannot run 2-simplicial attention in this graph, and are not left ordinary:\n"
            f"{lines}"
        )

    def _prepared(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        return (
            ("attention spelled out, made one call", self.joined),
            ("keys and values repeated to all heads, folded back", self.folded),
        )

    def __str__(self) -> str:
        parts = (
            ("rewritten", self.rewritten),
            ("refused", self.refused),
            ("left as they were, not marked", self.unmarked),
            *((title, items) for title, items in self._prepared() if items),
        )
        return "\n".join(
            f"{title}: {len(items)}" + "".join(f"\n  - {item}" for item in items)
            for title, items in parts
        )


# The name that users know, and not this package's: TORCH_LOGS="+simplex_ops" turns it on.
LOG = logging.getLogger("simplex_ops")

_KEPT: deque[Report] = deque(maxlen=64)


def keep(report: Report) -> None:
    """Remember a report for `last_report`, and log it where that is asked for."""
    _KEPT.append(report)
    LOG.info("%s", report)


def last_report() -> Report:
    """Return the report of the last graph with marks or attention; an empty one before the first.

    A model that compiles to several graphs leaves several reports, and compiling again another.
    """
    return _KEPT[-1] if _KEPT else Report()
