"""The examples run, at toy size, and say what they should; the notebook's cells in their order.

A notebook is a list of cells: run as one program it needs neither Jupyter nor a kernel, which would
be a dozen packages more to install and another process to wait for.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(600)  # half a minute each on two free cores

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "tools" / "examples"
LAYER = "model.layers.3.self_attn"
MARKED = {
    "from_scratch": (["--steps", "3", "--seq", "32", "--dim", "32"], ["step 2: "]),
    "sharded": (
        ["--dim", "32", "--layers", "4", "--seq", "32", "--steps", "2"],
        ["step 1: loss", "rewritten: 1\n  - 4.attention: trilinear, w1=256, w2=16", "refused: 0"],
    ),
    "finetune": (
        ["--steps", "2", "--seq", "32", "--window", "16", "4"],
        [f"marked: 1\n  - {LAYER}", f"{LAYER}: trilinear, w1=16, w2=4", "refused: 0",
         f"marked as it was: {LAYER}"],
    ),
}  # fmt: skip


def said_by(program: list[str], folder: Path) -> str:
    lent = os.pathsep.join([str(ROOT), *sys.path])
    environment = {
        **os.environ,
        "PYTHONPATH": lent,
        "CUDA_VISIBLE_DEVICES": "",
        "MPLBACKEND": "agg",
    }
    done = subprocess.run(
        [sys.executable, *program], cwd=folder, env=environment, capture_output=True, text=True,
        check=False, timeout=590,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", MARKED)
def test_an_example_runs(name, tmp_path):
    if name == "finetune":
        pytest.importorskip("peft")
    options, wanted = MARKED[name]
    said = said_by(["-m", f"tools.examples.{name}", *options], tmp_path)
    assert [text for text in wanted if text not in said] == []


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    cells = json.loads((EXAMPLES / "step_by_step.ipynb").read_text())["cells"]
    program = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    said = said_by(["-c", program], tmp_path)
    for text in ("marked: 1", "served", "rewritten: 1", "refused: 0", "the same logits: True"):
        assert text in said


def test_every_example_is_run_short_and_free_of_outputs():
    programs = {path.stem: path for path in EXAMPLES.glob("[a-z]*.py")}
    assert programs.keys() == MARKED.keys()
    assert all(len(path.read_text().splitlines()) < 80 for path in programs.values())
    (notebook,) = EXAMPLES.glob("*.ipynb")
    cells = json.loads(notebook.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
