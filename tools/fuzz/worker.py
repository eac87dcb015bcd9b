"""One fuzzing process: draws cases until its time is up and says what it does through a pipe.

A process of its own, since a kernel that goes wrong can take its process or its GPU context along.
"""

import contextlib
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from simplex_ops.testing import Case, Problem, run_attn
from simplex_ops.testing.oracle import assert_results, differing, run_leaving
from tools.fuzz import hopper

BATCH = 50
BATCH_OF_A_FAMILY = 20  # small, so that a run that ends early has met all of them
# What PyTorch and Triton say once a kernel has broken the GPU context of its process.
LOST_DEVICE = (
    "CUDA error", "HIP error", "illegal memory access", "misaligned address",
    "unspecified launch failure", "device-side assert",
)  # fmt: skip
HALF_AND_SINGLE = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Settings:
    """What is fuzzed, where, and for how long."""

    device: str
    backend: str
    seconds: float
    shrink_seconds: float
    max_seq: int
    max_work: int
    seed: int
    threads: int
    workers: int = 1
    hopper: str = ""  # draw for the Hopper kernels: "families" of constants, or "constants" too


@dataclass(frozen=True)
class Message:
    """What a worker says: that it starts a case, how it ended, or that it is done."""

    kind: Literal["start", "passed", "skipped", "failed", "shrunk", "lost", "done"]
    case: Case | None = None
    text: str = ""
    failure: str = ""  # what makes two failures the same kind
    branches: tuple[str, ...] = ()  # of the Hopper kernels, that the case took
    compiled: frozenset[str] = frozenset()  # programs that the process had compiled by now


class Pipe(Protocol):
    """Where messages go: a multiprocessing Connection."""

    def send(self, message: Message, /) -> None: ...
    def close(self) -> None: ...


class Stop(Protocol):
    """How the parent ends the drawing: an Event of multiprocessing or threading."""

    def is_set(self) -> bool: ...


class LostDeviceError(BaseException):
    """The GPU context is gone, and with it every later answer in this process."""


def work(settings: Settings, number: int, pipe: Pipe, stop: Stop) -> None:
    """Draw and run cases until the time is up; the first failure of each kind is then shrunk."""
    torch.set_num_threads(settings.threads)
    quieten()
    if settings.hopper:
        hopper.serve_all(have_one_division=settings.hopper == "families")
        hopper.note_compilations()
    worker = Worker(settings, pipe, stop, time.monotonic() + settings.seconds)
    batch = 0
    try:
        if settings.hopper == "families":
            for case in hopper.first_cases()[number :: settings.workers]:
                worker.take(case)
        while not worker.is_over():
            worker.run_batch((settings.seed * 1_000_003 + number) * 1_000_003 + batch)
            batch += 1
    except LostDeviceError as error:
        pipe.send(Message("lost", text=str(error), failure=str(error)))
    else:
        pipe.send(Message("done"))
    pipe.close()


@dataclass
class Worker:
    """The loop of one process: batches that go on after failures, and their shrinking."""

    settings: Settings
    pipe: Pipe
    stop: Stop
    ends: float
    seen: set[str] = field(default_factory=set)

    def is_over(self) -> bool:
        return self.stop.is_set() or time.monotonic() > self.ends

    def run_batch(self, seed: int) -> None:
        """Run one batch; at the first failure of a new kind, leave the rest and shrink it."""
        fresh = ""

        def body(case: Case) -> None:
            nonlocal fresh
            if not fresh:
                fresh = self.take(case)

        _draw(self.settings, seed, body, shrink=False)
        if fresh:
            self.shrink(seed, fresh)

    def take(self, case: Case) -> str:
        """Run a case, unless the time is up, and say how it ended; return a new kind of failure."""
        if self.is_over():
            return ""
        self.pipe.send(Message("start", case))
        found: list[str] = []
        error = _failure(case, self.settings, found)
        if error is None:
            compiled = frozenset(hopper.COMPILED)
            self.pipe.send(Message("passed", case, "", "", tuple(found), compiled))
        elif isinstance(error, _SkippedError):
            self.pipe.send(Message("skipped", case, str(error)))
        else:
            kind = kind_of(error)
            self.pipe.send(Message("failed", case, describe(error), kind))
            if kind not in self.seen:
                self.seen.add(kind)
                return kind
        return ""

    def shrink(self, seed: int, kind: str) -> None:
        """Draw the batch again, now failing, and say the smallest case that hypothesis comes to."""
        ends = time.monotonic() + self.settings.shrink_seconds
        smallest: list[tuple[Case, Exception]] = []

        def body(case: Case) -> None:
            if time.monotonic() > ends:
                return
            self.pipe.send(Message("start", case))
            error = _failure(case, self.settings, [])
            if error is not None and kind_of(error) == kind:
                if not smallest or len(repr(case)) <= len(repr(smallest[0][0])):
                    smallest[:] = [(case, error)]
                raise error

        # hypothesis raises what body raised, or, once the time is up, that body is flaky.
        with contextlib.suppress(Exception):
            _draw(self.settings, seed, body, shrink=True)
        if smallest:
            case, error = smallest[0]
            self.pipe.send(Message("shrunk", case, describe(error), kind))


def run_case(case: Case, device: str, backend: str) -> Problem:
    """Hold the operator to the reference on one case, and to itself: the same bits twice."""
    attn = _attn(backend)
    problem = Problem.of(case, device)
    # Memory that nobody writes is NaN, so that a result must be written to be right.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first = run_leaving(problem, attn)
        second = run_attn(attn, problem)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_results(problem, first)
    differ = differing(first, second)
    assert not differ, f"two runs of one case differ: {', '.join(differ)}"
    return problem


def quieten() -> None:
    """Silence what is expected of odd cases: the slow path's warning, determinism's."""
    warnings.simplefilter("ignore", UserWarning)


def dtypes(device: str) -> tuple[torch.dtype, ...]:
    """Return what to draw dtypes from: float64 is served everywhere, by the slow path on a GPU."""
    if torch.device(device).type == "cpu":
        return (*HALF_AND_SINGLE, torch.float64)
    return HALF_AND_SINGLE * 3 + (torch.float64,)


def _attn(backend: str) -> Callable[..., Any]:
    if backend == "eager":
        return torch.ops.simplex.attn
    torch.compiler.reset()
    return torch.compile(_call, backend=backend, fullgraph=True)


def _call(*tensors: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.simplex.attn(*tensors, **options)


class _SkippedError(Exception):
    """A case that says nothing: plain PyTorch overflows on it, or it does not fit in memory."""


def _failure(case: Case, settings: Settings, found: list[str]) -> Exception | None:
    """Run a case and return what went wrong; `found` takes the branches of the Hopper kernels."""
    try:
        problem = run_case(case, settings.device, settings.backend)
        if settings.hopper:
            found += hopper.branches_of(problem)
            if settings.hopper == "families" and torch.device(settings.device).type == "cuda":
                portable = [said for said in found if said.endswith(": portable")]
                assert not portable, f"a family is not served by the Hopper kernels: {portable}"
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return _SkippedError("out of memory")
    except Exception as error:
        if "there is no budget" in str(error):
            return _SkippedError("plain PyTorch overflows")
        if any(words in str(error) for words in LOST_DEVICE):
            raise LostDeviceError(f"{error}".splitlines()[0]) from error
        return error
    return None


def _draw(settings: Settings, seed: int, body: Callable[[Case], None], *, shrink: bool) -> None:
    import hypothesis
    from hypothesis import HealthCheck, Phase, Verbosity

    from simplex_ops.testing import cases

    if settings.hopper:
        drawn = hopper.strategy(settings.hopper, seed, settings.max_work)
    else:
        drawn = cases(
            dtypes=dtypes(settings.device), max_seq=settings.max_seq, max_work=settings.max_work
        )

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=BATCH_OF_A_FAMILY if settings.hopper else BATCH,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        suppress_health_check=tuple(HealthCheck),  # pyright: ignore[reportArgumentType]
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
        print_blob=False,
    )
    @hypothesis.given(drawn)
    def loop(case: Case) -> None:
        body(case)

    loop()


def kind_of(error: Exception) -> str:
    """Return what makes two failures the same kind: the type, and what failed, without figures."""
    text = str(error).split(":")[0].splitlines()
    return f"{type(error).__name__} {text[0][:60] if text else ''}"


def describe(error: Exception) -> str:
    """Return an error in one line, with its place where it is not one of the oracle's own."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"
    if isinstance(error, AssertionError):
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{text} ({frame.filename.rsplit('/', 1)[-1]}:{frame.lineno})"
