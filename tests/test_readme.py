"""README's examples: each runs as it stands, from an empty directory, in the order of the page."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
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


@pytest.mark.parametrize("number", range(len(blocks())))
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
