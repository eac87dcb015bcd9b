"""The fuzzer itself: that it finds a planted bug, shrinks it, and prints what reproduces it."""

import threading
import time

import pytest
import torch
import typer
from typer.testing import CliRunner

from simplex_ops.testing import Case
from tools.fuzz import __main__ as fuzz
from tools.fuzz import worker as fuzz_worker
from tools.fuzz.worker import Settings, Worker


class Pipe(list):
    """Stands for the connection to the parent process."""

    def send(self, message, /):
        self.append(message)

    def close(self):
        pass


def wrong_beyond_four_queries(*tensors, **options):
    out, lse = torch.ops.simplex.attn(*tensors, **options)
    return (out * 1.5 if out.shape[2] > 4 else out), lse


def worker(pipe):
    settings = Settings(
        device="cpu", backend="eager", seconds=120, shrink_seconds=60,
        max_seq=8, max_work=20_000, seed=1, threads=2,
    )  # fmt: skip
    return Worker(settings, pipe, threading.Event(), time.monotonic() + settings.seconds)


def test_a_planted_bug_is_found_and_shrunk(monkeypatch):
    monkeypatch.setattr(fuzz_worker, "_attn", lambda _: wrong_beyond_four_queries)
    pipe = Pipe()
    fuzzing = worker(pipe)
    for seed in range(10):
        fuzzing.run_batch(seed)
        if any(message.kind == "shrunk" for message in pipe):
            break
    shrunk = next(message for message in pipe if message.kind == "shrunk")
    failed = next(message for message in pipe if message.kind == "failed")
    assert shrunk.case.seq == 5
    assert len(repr(shrunk.case)) <= len(repr(failed.case))
    again = eval(repr(shrunk.case), {"Case": Case, "torch": torch})  # noqa: S307  (our own words)
    with pytest.raises(AssertionError, match="budget"):
        fuzz_worker.run_case(again, "cpu", "eager")


def test_each_case_is_announced_before_it_runs(monkeypatch):
    monkeypatch.setattr(fuzz_worker, "BATCH", 10)
    pipe = Pipe()
    worker(pipe).run_batch(0)
    kinds = [message.kind for message in pipe]
    assert kinds[::2] == ["start"] * (len(kinds) // 2)
    assert set(kinds[1::2]) <= {"passed", "skipped"}
    assert "passed" in kinds


def test_results_that_change_between_runs_are_a_failure(monkeypatch):
    calls = iter(range(100))

    def drifts(*tensors, **options):
        out, lse = torch.ops.simplex.attn(*tensors, **options)
        return out * (1 + 1e-7 * next(calls)), lse

    monkeypatch.setattr(fuzz_worker, "_attn", lambda _: drifts)
    with pytest.raises(AssertionError, match="two runs of one case differ"):
        fuzz_worker.run_case(Case(seq=4), "cpu", "eager")


def test_one_case_runs_from_the_command_line():
    app = typer.Typer()
    app.command()(fuzz.main)
    result = CliRunner().invoke(app, ["--device", "cpu", "--case", "Case(seq=3, w1=2, seed=7)"])
    assert result.exit_code == 0, result.output
    assert "passed" in result.output


@pytest.mark.slow
def test_a_short_run_ends_well():
    app = typer.Typer()
    app.command()(fuzz.main)
    result = CliRunner().invoke(app, ["--device", "cpu", "--minutes", "0.15", "--seed", "3"])
    assert result.exit_code == 0, result.output
    assert "0 failed" in result.output
    assert "form trilinear" in result.output
