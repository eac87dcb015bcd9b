"""What a fuzzing process does besides where the Hopper kernels are fuzzed."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from simplex_ops.testing import Case, Problem

if TYPE_CHECKING:
    from hypothesis import strategies as st

COMPILED: set[str] = set()
"""What this process compiled, or took from Triton's cache: a kernel's name and a digest."""


def strategy(drawn: str, seed: int, max_work: int) -> "st.SearchStrategy[Case]":
    """Return what a batch is drawn from: one family, or problems whose constants are drawn too.

    Workers begin with different families, so that no two wait for the same compilation.
    """
    from tools.fuzz.families import FAMILIES, any_constants, member

    if drawn == "constants":
        return any_constants(max_work)
    return member(FAMILIES[seed % len(FAMILIES)])


def first_cases() -> list[Case]:
    """Return problems of every family that need one large compilation each.

    Shared out among workers, so that none waits for another's and none is made twice: forwards
    come first, then of the gradients that of q and that of the wide keys, which two kernels make.
    """
    from tools.fuzz.families import FAMILIES, NO_GRADIENT, largest_member

    forwards, of_q, of_keys = [], [], []
    for family in FAMILIES:
        case = largest_member(family)
        forwards.append(dataclasses.replace(case, grad_mask=NO_GRADIENT))
        if family.has_gradients:
            first, second = (False, True) if family.is_exchanged else (True, False)
            of_q.append(dataclasses.replace(case, grad_mask=(True, False, False, False, False)))
            of_keys.append(
                dataclasses.replace(case, grad_mask=(False, first, second, False, False))
            )
    return forwards + of_q + of_keys


def serve_all(*, have_one_division: bool = False) -> None:
    """Let the Hopper kernels serve in this process what others would be faster at, or raise.

    With one division of the key side's work it is the same program whatever the sizes.
    """
    from csrc_free.attn import PortableWarning
    from csrc_free.hopper import backward, least_work, serve

    least_work.LEAST = 0
    serve.USEFUL_FROM = dict.fromkeys(serve.USEFUL_FROM, 0.0)
    serve.MOST_POSITIONS_OF_64_COLUMNS = 64
    if have_one_division:
        backward.plan_of = of_one_processor(backward.plan_of)
        backward.splits_of_wide = of_one_processor(backward.splits_of_wide)
    warnings.simplefilter("error", PortableWarning)


def of_one_processor(choose: Callable[..., Any]) -> Callable[..., Any]:
    """Return a choice made as for a device of one multiprocessor, which shares no work."""

    def choose_there(problem: Any, *others: Any) -> Any:
        device = dataclasses.replace(problem.device, multiprocessors=1)
        return choose(dataclasses.replace(problem, device=device), *others)

    return choose_there


def note_compilations() -> None:
    """Have Triton say in this process what it compiles, into COMPILED."""
    from triton import knobs

    def note(*, metadata: dict[str, Any], **_: Any) -> None:
        COMPILED.add(f"{metadata['name']} {metadata['hash'][:16]}")

    knobs.compilation.listener = note


def branches_of(problem: Problem) -> list[str]:
    """Return who serves a problem, and the branches that it takes there."""
    from csrc_free import attn
    from csrc_free.hopper import backward
    from csrc_free.problem import problem_of
    from simplex_ops.devices.gpu import kernel_arguments
    from tools.fuzz.branches import branches

    q, k1, k2, v1, v2 = problem.inputs
    arguments = kernel_arguments(*problem.windows, q, problem.options)
    served_by = attn.forward_served_by(q, k1, k2, v1, v2, **arguments)
    found = [f"forward: {served_by.split(':')[0]}"]
    launched = problem_of(q, k1, k2, v1, v2, **arguments)
    choice = None
    if any(problem.grad_mask):
        dout = v1.new_empty(*q.shape[:3], v1.shape[3]) if problem.dout is None else problem.dout
        dout = dout if dout.stride(3) == 1 else dout.contiguous()
        said = attn.backward_served_by(dout, q, k1, k2, v1, v2, **arguments)
        found.append(f"backward: {said.split(', portable')[0].split(':')[0]}")
        if said.startswith("hopper"):
            choice = backward.choose(launched, dout)
    if served_by == "hopper":
        found += branches(launched, choice)
    return found
