"""What the commands of tools say of a device that is not there, or an option without meaning."""

import importlib

import pytest
import torch
import typer
from typer.testing import CliRunner

from tools.device import device_named

ON_A_DEVICE = ("bench", "bench.model", "demo", "experiments", "fuzz", "pairs", "precision", "tune")
ARGUMENTS = {"experiments": ["hops"]}


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def _said_by(command, *options):
    """Run a command in this process; return what it says of options that it refuses."""
    name = "__main__" if hasattr(importlib.import_module(f"tools.{command}"), "__path__") else ""
    module = importlib.import_module(".".join(filter(None, ("tools", command, name))))
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(module.main)
    given = [*ARGUMENTS.get(command, ()), *options]
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, given)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.mark.parametrize("command", ON_A_DEVICE)
def test_a_gpu_that_is_not_there_is_said(command):
    assert f"--device cuda: this PyTorch ({torch.__version__}) sees no GPU" in _said_by(
        command, "--device", "cuda"
    )


@pytest.mark.parametrize("command", ON_A_DEVICE)
def test_a_device_of_another_kind_is_said(command):
    kinds = "cuda" if command in ("precision", "tune") else "cpu or cuda"
    assert f"--device must be {kinds}, got 'abacus'" in _said_by(command, "--device", "abacus")


@pytest.mark.parametrize(
    ("command", "options", "text"),
    [
        ("fuzz", ("--hopper", "family"), "--hopper is families or constants, got 'family'"),
        ("fuzz", ("--backend", "abacus"), "torch.compile knows no such backend"),
        ("fuzz", ("--case", "Case(seq="), "--case Case(seq=: SyntaxError"),
        ("fuzz", ("--minutes", "-1"), "Invalid value for '--minutes'"),
        ("support", ("--only", "abacus"), "no model of tier 1 has 'abacus' in its name"),
        ("support", ("--jobs", "0"), "Invalid value for '--jobs'"),
    ],
)
def test_an_option_that_means_nothing_is_said(command, options, text):
    assert text in _said_by(command, *options)


def test_a_problem_that_the_sanitizer_does_not_have_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "--only: problems are 0 to" in _said_by("compiled.sanitize", "--only", "99")


def test_a_device_has_the_index_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_named() == torch.device("cuda")
    assert device_named("cuda:1") == torch.device("cuda", 1)
    assert device_named("cpu") == torch.device("cpu")
    with pytest.raises(typer.BadParameter, match="sees 2 GPUs, from cuda:0"):
        device_named("cuda:2")
    with pytest.raises(typer.BadParameter, match="must be cpu or cuda, got 'cuda:x'"):
        device_named("cuda:x")
