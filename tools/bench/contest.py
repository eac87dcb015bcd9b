"""A row of the bench: everyone who is timed on one problem, in turn, and what became of them."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

import simplex_ops  # noqa: F401  (registers the operators)
from simplex_ops.devices.gpu import kernel_arguments
from tools.bench import anchors
from tools.bench.anchors import Job, NotRunError
from tools.bench.peers import fbgemm, flex, lucidrains
from tools.bench.timing import Times, time_in_turn
from tools.workloads import Direction, Inputs, Workload, make_inputs, nominal_flops

Build = Callable[[Workload, Direction, torch.device], Job]

OURS = "simplex"
COMPILED = "simplex compiled"
ANCHORS = ("cudnn fwd", "cudnn bwd", "matmul", "einsum")


@dataclass
class Result:
    """What became of one contestant in one row: times, or the reason why there are none."""

    flops: float = 0.0
    times: Times | None = None
    note: str = ""
    workspace: int | None = None  # bytes on a GPU, beyond what it was given and what it returns

    @property
    def rate(self) -> float | None:
        """FLOP/s at the typical time, or None where it did not run."""
        return self.flops / (self.times.typical / 1e3) if self.times else None

    @property
    def first_rate(self) -> float | None:
        """FLOP/s of the runs right after another contestant's, or None where none was timed."""
        if self.times is None or not self.times.first:
            return None
        return self.flops / (statistics.median(self.times.first) / 1e3)


@dataclass
class Row:
    """One workload in one direction, and everyone who was timed on it in turn."""

    workload: Workload
    direction: Direction
    results: dict[str, Result] = field(default_factory=dict)

    def of(self, name: str, anchor: str) -> float | None:
        """Return the rate of a contestant as a fraction of an anchor's."""
        mine, theirs = (self.results.get(n, Result()).rate for n in (name, anchor))
        return mine / theirs if mine is not None and theirs is not None else None

    def first_of(self, name: str, anchor: str) -> float | None:
        """Return the same of the runs right after another contestant's."""
        mine, theirs = (self.results.get(n, Result()).first_rate for n in (name, anchor))
        return mine / theirs if mine is not None and theirs is not None else None


def ours(workload: Workload, direction: Direction, device: torch.device) -> Job:
    """Build our operator's forward, or its backward operator alone."""
    inputs = make_inputs(workload, device)
    problem, w1, w2, options = inputs.problem, workload.w1, workload.w2, workload.options
    flops = nominal_flops(workload, direction)
    note = _served_by(workload, direction, inputs) if device.type == "cuda" else ""
    if direction == "forward":
        return Job(lambda: torch.ops.simplex.attn(*problem, w1, w2, **options), flops, note)
    out, lse = torch.ops.simplex.attn(*problem, w1, w2, **options)
    return Job(
        lambda: torch.ops.simplex.attn_backward(
            inputs.dout, None, *problem, out, lse, w1, w2, **options, grad_mask=[True] * 5
        ),
        flops,
        note,
    )


def _served_by(workload: Workload, direction: Direction, inputs: Inputs) -> str:
    """Say which kernels serve a workload, and why not faster ones."""
    from csrc_free.attn import backward_served_by, forward_served_by

    q, k1, k2, v1, v2 = inputs.problem
    arguments = kernel_arguments(workload.w1, workload.w2, q, workload.options)
    if direction == "forward":
        return forward_served_by(q, k1, k2, v1, v2, **arguments)
    return backward_served_by(inputs.dout, q, k1, k2, v1, v2, **arguments)


def ours_compiled(workload: Workload, direction: Direction, device: torch.device) -> Job:
    """Build the same call inside a compiled function."""
    inputs = make_inputs(workload, device)
    problem, windows, options = inputs.problem, (workload.w1, workload.w2), workload.options
    flops = nominal_flops(workload, direction)
    operators = torch.ops.simplex

    def forward(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return operators.attn(*given, *windows, **options)

    def backward(*given: torch.Tensor) -> list[torch.Tensor]:
        return operators.attn_backward(
            given[0], None, *given[1:], *windows, **options, grad_mask=[True] * 5
        )

    function, given = forward, problem
    if direction == "backward":
        function, given = backward, (inputs.dout, *problem, *forward(*problem))
    compiled = torch.compile(function, backend="simplex", fullgraph=True, dynamic=False)
    return Job(lambda: compiled(*given), flops)


def field_of(
    workload: Workload,
    direction: Direction,
    device: torch.device,
    fbgemm_path: Path | None,
    *,
    is_compiled_too: bool = False,
) -> dict[str, Build]:
    """Return everyone who takes part in a row; ours is first, anchors are next, peers are last."""
    builds: dict[str, Build] = {OURS: ours}
    if device.type != "cuda" or workload.name in anchors.ROSTER:
        builds["matmul"] = anchors.matmul
    if is_compiled_too:
        builds[COMPILED] = ours_compiled
    if device.type == "cuda":
        builds["cudnn fwd"] = anchors.cudnn_forward
        if direction == "backward" and workload.name in anchors.ROSTER:
            builds["cudnn bwd"] = anchors.cudnn
        if (workload.name, direction) in lucidrains.ROSTER:
            builds["simplicial-attention"] = lucidrains.build
        if (workload.name, direction) in fbgemm.ROSTER:
            builds["FBGEMM Triton"] = partial(fbgemm.build, path=fbgemm_path)
        if (workload.name, direction) in flex.ROSTER:
            builds["FlexAttention of pairs"] = flex.build
        if workload.name in anchors.ROSTER:
            builds["flash fwd" if direction == "forward" else "flash bwd"] = anchors.flash
    elif workload.name == "cpu-short":
        builds["einsum"] = anchors.einsum
    return builds


def measure(
    row: Row, builds: dict[str, Build], device: torch.device, seconds: float, least_rounds: int
) -> None:
    """Time everyone who can run, in turn; the results of the others are the reasons why not."""
    jobs: dict[str, Job] = {}
    for name, build in builds.items():
        found = _prepare(build, row, device)
        if isinstance(found, str):
            row.results[name] = Result(note=f"not run: {found}")
        else:
            jobs[name], workspace = found
            row.results[name] = Result(jobs[name].flops, note=jobs[name].note, workspace=workspace)
    with torch.set_grad_enabled(row.direction == "backward"):
        times = time_in_turn(
            {name: job.run for name, job in jobs.items()},
            device,
            seconds=seconds,
            least_rounds=least_rounds,
        )
    for name in jobs:
        row.results[name].times = times[name]


def _prepare(build: Build, row: Row, device: torch.device) -> tuple[Job, int | None] | str:
    """Build a job and run it; return it and its workspace, or why it cannot run."""
    try:
        with torch.set_grad_enabled(row.direction == "backward"):
            job = build(row.workload, row.direction, device)
            job.run()
            workspace = _workspace(job, device) if device.type == "cuda" else None
    except NotRunError as reason:
        return str(reason)
    except Exception as error:  # noqa: BLE001  (a peer may fail in any way: the row says how)
        text = str(error).strip().splitlines()
        return f"{type(error).__name__}: {text[0][:160] if text else 'no message'}"
    return job, workspace


def _workspace(job: Job, device: torch.device) -> int:
    """Run a job once more; return how much memory it held beyond what it returns."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    returned = job.run()
    torch.cuda.synchronize(device)
    workspace = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    del returned  # it was among what is allocated
    return workspace
