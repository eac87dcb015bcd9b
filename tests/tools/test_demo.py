"""The demo: its corpus, its training loop, and `python -m tools.demo` itself, once, very short."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from simplex_ops import mark
from tools.demo import corpus, two_hops
from tools.demo.llama import CPU, build
from tools.demo.train import Trainer
from tools.experiments.hops import Hops
from tools.experiments.train import Setting, Training

ROOT = Path(__file__).parents[2]
TINY = replace(CPU, hidden=32, layers=4, seq=32, batch=4, window=(16, 4), steps=20)


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    return corpus.load()


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Make 64 source files, and what must not be read."""
    for n in range(64):
        (tmp_path / f"module{n}.py").write_text(f"value = {n}\n")
    for name in ("test", "site-packages", "package/tests"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "other.py").write_text("not read")
    return tmp_path


def test_corpus_reads_sources_without_tests_and_installed_packages(library: Path) -> None:
    assert len(corpus.sources(library)) == 64
    assert b"not read" not in b"".join(bytes(part.tolist()) for part in corpus.load(library))


def test_each_file_is_in_one_part_of_the_corpus_alone(library: Path) -> None:
    training, validation = (set(bytes(part.tolist()).split(b"\0")) for part in corpus.load(library))
    assert training.isdisjoint(validation)
    assert training | validation == {f"value = {n}\n".encode() for n in range(64)}
    assert validation


def test_split_depends_on_paths_alone(library: Path) -> None:
    held_out = {p for p in corpus.sources(library) if corpus.is_held_out(p, library)}
    (library / "aaa.py").write_text("one more file")
    for path in held_out:
        path.write_text("changed")
    assert held_out == {p for p in corpus.sources(library) if corpus.is_held_out(p, library)} - {
        library / "aaa.py"
    }


def test_missing_sources_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="the corpus needs Python sources under"):
        corpus.load(tmp_path)


def test_standard_library_is_text_enough_to_train_on(
    data: tuple[torch.Tensor, torch.Tensor],
) -> None:
    training, validation = data
    assert training.numel() > 3_000_000
    assert 0.01 < validation.numel() / training.numel() < 0.2
    assert corpus.load()[0].equal(training)


def test_batches_hold_stretches_of_the_text() -> None:
    text = torch.arange(200, dtype=torch.uint8)
    drawn = [corpus.random_batch(text, 8, 16, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert drawn[0].equal(drawn[1])
    for batch in (drawn[0], *corpus.even_batches(text, 8, 16, 3)):
        assert batch.shape == (8, 17)
        assert (batch.diff(dim=1) == 1).all()
    first, *_, last = corpus.even_batches(text, 8, 16, 3)
    assert (first[0, 0], last[-1, -1]) == (0, 199)


@pytest.mark.parametrize("marked", [False, True])
def test_training_is_repeatable_and_lowers_the_loss(
    data: tuple[torch.Tensor, torch.Tensor], marked: bool
) -> None:
    curves = []
    for _ in range(2):
        model = build(TINY, seed=1)
        if marked:
            mark(model.model.layers[3].self_attn, window=TINY.window)
        trainer = Trainer(model, model, TINY, data, torch.device("cpu"))
        trainer.begin(TINY.steps, seed=2)
        trainer.validate()
        losses = [trainer.step() for _ in range(TINY.steps)]
        trainer.validate()
        curves.append((losses, trainer.curve.loss))
    assert curves[0] == curves[1]
    before, after = curves[0][1]
    assert after < before - 1
    assert trainer.curve.tokens == [0, 20 * 4 * 32]


def test_a_marked_model_starts_as_windowed_attention_of_the_same_weights(
    data: tuple[torch.Tensor, torch.Tensor],
) -> None:
    plain, marked = build(TINY, seed=5), build(TINY, seed=5)
    mark(marked.model.layers[3].self_attn, window=(TINY.seq, 4))
    tokens = corpus.random_batch(data[0], 2, 31, torch.Generator().manual_seed(0))
    expected, got = (m(input_ids=tokens, use_cache=False).logits for m in (plain, marked))
    torch.testing.assert_close(got, expected)


def test_completion_ends_with_the_line_and_keeps_the_prompt(
    data: tuple[torch.Tensor, torch.Tensor],
) -> None:
    model = build(TINY, seed=1)
    trainer = Trainer(model, model, TINY, data, torch.device("cpu"))
    prompts = ["import ", "x"]
    lines = trainer.complete(prompts, length=9)
    assert lines == trainer.complete(prompts, length=9)
    for prompt, line in zip(prompts, lines, strict=True):
        assert line.startswith(prompt)
        assert len(prompt) < len(line) <= len(prompt) + 9
        assert "\n" not in line


def test_two_hops_trains_and_draws_both_models_of_as_many_parameters(tmp_path: Path) -> None:
    said: list[str] = []
    device = torch.device("cpu")
    run = Setting(Hops(2, nodes=4), two_hops.SHOWN.shape, Training(100), 0)
    arms = two_hops.train_both(device, said.append, run=run)
    assert set(arms) == {two_hops.ARM_2_SIMPLICIAL, two_hops.ARM_ORDINARY}
    few, many = sorted(arm.parameters for arm in arms.values())
    assert many < 1.05 * few
    for name, arm in arms.items():
        assert arm.accuracy > arm.curve[0][1]
        assert any(f"one {name} layer, {arm.parameters:,} parameters" in line for line in said)
    two_hops.plot(arms, tmp_path / "two.png", device=device, run=run)
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_of_the_readme_is_small() -> None:
    figure = ROOT / "tools" / "demo" / "two_hops.png"
    assert figure.stat().st_size < 100_000
    assert f"]({figure.relative_to(ROOT)})" in (ROOT / "README.md").read_text()


def demo(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.demo", *arguments],
        cwd=ROOT,
        env={**os.environ, "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def test_a_device_that_is_not_there_is_said_plainly() -> None:
    done = demo("--device", "abacus")
    assert done.returncode == 2
    assert "--device must be cpu or cuda, got 'abacus'" in done.stderr


@pytest.mark.slow
def test_demo_rewrites_trains_plots_and_generates(tmp_path: Path) -> None:
    plot = tmp_path / "figure" / "demo.png"
    done = demo("--part", "llama", "--steps", "2", "--plot", plot, "--prompt", "import ")
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        "rewritten: 1\n  - model.layers.3.self_attn: trilinear, w1=64, w2=8\n",
        "refused: 0\n",
        "left as they were, not marked: 3\n",
        "step 2 of 2, loss on held-out files: as it is ",
        "tokens/s",
        f"plot: {plot}\n",
        "marked: 'import ' goes on ",
    ):
        assert line in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
