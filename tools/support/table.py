"""The support table as text: for a terminal, and for the document that holds it."""

import re
from pathlib import Path

from tools.support.cells import COLUMNS, Outcome

README = Path(__file__).parents[2] / "lowering" / "README.md"
_BEGIN, _END = "<!-- made by tools.support -->", "<!-- end -->"


def markdown(found: dict[str, list[Outcome]], made_with: str) -> str:
    """Return the table of outcomes by model, and the reasons of what is not served below it."""
    reasons: dict[str, int] = {}
    lines = [f"{made_with}.", "", f"| model | {' | '.join(c.title for c in COLUMNS)} |"]
    lines.append("| --- " * (len(COLUMNS) + 1) + "|")
    for name, outcomes in found.items():
        cells = [_cell(outcome, reasons) for outcome in outcomes]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {reason}" for reason, number in reasons.items())]
    return "\n".join(lines).rstrip()


def written(text: str, document: str) -> str:
    """Return a document with the table in its place."""
    place = re.compile(f"{re.escape(_BEGIN)}.*{re.escape(_END)}", re.DOTALL)
    if place.search(document) is None:
        raise ValueError(f"the document has no place for the table: {_BEGIN} to {_END}")
    return place.sub(lambda _: f"{_BEGIN}\n{text}\n{_END}", document)


def _cell(outcome: Outcome, reasons: dict[str, int]) -> str:
    if outcome.said not in ("refused", "nor unmarked", "fails"):
        return outcome.said
    return f"{outcome.said} ({reasons.setdefault(outcome.why, len(reasons) + 1)})"
