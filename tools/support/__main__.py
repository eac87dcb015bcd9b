"""Run every model in every way, print the support table, and write it where it is kept.

python -m tools.support                         # the first tier
python -m tools.support --tier 2 --write        # all, into lowering/README.md
python -m tools.support --only gpt-2 --then inductor
"""

import platform
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

from tools.support.cells import Outcome, outcomes
from tools.support.models import ROWS
from tools.support.table import README, markdown, written


def main(
    tier: Annotated[int, typer.Option(min=1, max=2, help="1: what CI holds; 2: all models")] = 1,
    only: Annotated[str, typer.Option(help="models whose name contains this")] = "",
    then: Annotated[str, typer.Option(help="what compiles after the pass")] = "eager",
    jobs: Annotated[int, typer.Option(min=1, help="processes, each with a torch of its own")] = 2,
    write: Annotated[bool, typer.Option(help="into lowering/README.md")] = False,
) -> None:
    """Print the table; exit with 1 where a cell fails, which is neither served nor refused."""
    if then not in ("eager", "aot_eager", "inductor"):
        raise typer.BadParameter(f"--then must be eager, aot_eager or inductor, got {then!r}")
    if write and (only or tier != 2):
        raise typer.BadParameter("--write keeps the whole table: give --tier 2, and no --only")
    console = Console()
    names = [row.name for row in ROWS if row.tier <= tier and only.lower() in row.name.lower()]
    if not names:
        raise typer.BadParameter(f"no model of tier {tier} has {only!r} in its name")
    found: dict[str, list[Outcome]] = {}
    with ProcessPoolExecutor(jobs, get_context("spawn")) as processes:
        waiting = [processes.submit(outcomes, name, then) for name in names]
        for name, cells in zip(names, track(waiting, "models", console=console), strict=True):
            found[name] = cells.result()
            said = ", ".join(cell.said for cell in found[name])
            console.print(f"{name}: {said}", markup=False, soft_wrap=True)
    text = markdown(found, _made_with(then))
    if write:
        README.write_text(written(text, README.read_text()))
    console.print(text, markup=False, soft_wrap=True)
    if any(cell.said == "fails" for cells in found.values() for cell in cells):
        raise typer.Exit(1)


def _made_with(then: str) -> str:
    import transformers

    return (
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python "
        f"{platform.python_version()}, on the CPU, {datetime.now(UTC):%Y-%m-%d}; compiled is the "
        f"pass, then {then}"
    )


if __name__ == "__main__":
    typer.run(main)
