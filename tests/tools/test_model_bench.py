"""The bench of a whole model, on a toy: every part writes its lines."""

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from tools.bench.model import __main__ as bench
from tools.bench.model import host, pass_time
from tools.bench.model.contestants import EAGER, EXTERN, OURS, PLAIN, field_of
from tools.bench.model.llama import TOY, shape_from

app = typer.Typer()
app.command()(bench.main)


def run(*arguments):
    return CliRunner().invoke(app, ("--device", "cpu", "--toy", *arguments))


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_steps_of_eager_code_are_timed_in_turn(tmp_path):
    lines = tmp_path / "lines.jsonl"
    result = run("--part", "step", "--who", EAGER, "--json", str(lines))
    assert result.exit_code == 0, result.output
    (line,) = lines_of(lines)
    assert line["who"] == EAGER
    assert line["tokens_per_second"] == pytest.approx(TOY.tokens / line["ms"] * 1e3)
    assert line["torch"] == torch.__version__
    assert f"| step | {EAGER} |" in result.output


def test_the_passes_are_timed():
    found = pass_time.measure(layers=2, runs=1)
    assert all(0 < ms < 1000 for times in found.values() for ms in times)


def test_what_cannot_be_measured_is_said(tmp_path):
    assert "no part" in run("--part", "speed").output
    assert "no such contestant" in run("--who", "nobody").output
    assert shape_from(TOY.as_json()) == TOY


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_part_has_its_aims(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "CALLS", 3)  # a CPU computes in each, where a GPU only queues
    lines = tmp_path / "lines.jsonl"
    result = run("--part", "compile", "--part", "step", "--part", "host", "--json", str(lines))
    assert result.exit_code == 0, result.output
    found = {(line["part"], line["who"]): line for line in lines_of(lines)}
    for part in ("step", "host, operator", "host, layer"):
        ours, extern = found[part, OURS], found[part, EXTERN]
        assert ours["of"] == EXTERN
        assert ours["ratio"] == pytest.approx(ours["ms"] / extern["ms"])
    for state in ("cold", "warm"):
        line = found[f"compile, caches {state}", OURS]
        assert line["of"] == PLAIN
    assert {who for part, who in found if part == "step"} == set(field_of(torch.device("cpu")))
