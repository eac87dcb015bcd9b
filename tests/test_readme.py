"""README: each example runs as it stands, from an empty directory; what it points at is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ROOMS = ("csrc_free", "lowering", "simplex_ops", "tests", "tools")
# A block that goes on from an earlier one uses its names, as a reader would.
CONTINUES = {1: 0}
# A test function is run by whoever reads it with pytest; here it is called.
CALLS = {3: "test_my_attention()\n"}


def blocks() -> list[str]:
    found = BLOCK.findall((ROOT / "README.md").read_text())
    assert all(language == "python" for language, _ in found), "say how this block is tested"
    return [code for _, code in found]


def program(number: int) -> str:
    before = program(CONTINUES[number]) if number in CONTINUES else ""
    return before + blocks()[number] + CALLS.get(number, "")


def test_every_test_in_an_example_is_called() -> None:
    for number, code in enumerate(blocks()):
        names = re.findall(r"^def (test_\w+)", code, re.MULTILINE)
        assert [f"{name}()" for name in names] == CALLS.get(number, "").split()


# One that another goes on from is run with it, and not once more alone.
LAST = sorted(set(range(len(blocks()))) - set(CONTINUES.values()))


@pytest.mark.parametrize("number", LAST)
def test_example_runs_from_an_empty_directory(number: int, tmp_path: Path) -> None:
    lent = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-c", program(number)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": lent, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def pointers(cell: str) -> list[str]:
    """Return the paths of a cell: a name without a folder is in the last folder named before it."""
    found, folder = [], ""
    for name in re.findall(r"`([^`]+)`", cell):
        rooted = name.partition("/")[0] in ROOMS
        if rooted:
            folder = name.rpartition("/")[0] if not name.endswith("/") else name.split("/")[0]
        found.append(name if rooted else f"{folder}/{name}")
    return found


def test_what_the_table_of_places_points_at_is_there() -> None:
    page = (ROOT / "README.md").read_text()
    table = page.partition("## Where things are")[2].partition("\n\n`make help`")[0]
    cells = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(cells) > 15
    lost = [path for cell in cells for path in pointers(cell) if not (ROOT / path).exists()]
    assert not lost, "README points at what is not there"


@pytest.mark.parametrize(
    ("document", "one"),
    [
        ("CONTRIBUTING.md", "tests/op/test_laws.py"),
        ("DESIGN.md", "simplex_ops/functional.py"),
        ("CHANGELOG.md", "lowering/README.md"),
    ],
)
def test_what_a_document_points_at_is_there(document: str, one: str) -> None:
    page = (ROOT / document).read_text()
    named = set(re.findall(rf"\b((?:{'|'.join(ROOMS)})/[\w/.]*\w/?)", page))
    assert one in named
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_contents_of_design_are_its_chapters() -> None:
    page = (ROOT / "DESIGN.md").read_text()
    asked = set(re.findall(r"\]\(#([\w-]+)\)", page))
    titles = re.findall(r"^##+ (.*)$", page, re.MULTILINE)
    assert asked == {title.lower().replace(" ", "-") for title in titles}
