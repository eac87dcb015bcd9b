"""Who takes part: the ways in which a model, or a call of the operator, is run."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest import mock

import torch

import lowering

PLAIN = "unmarked, compiled"
EAGER = "marked, eager"
OURS = "marked, compiled"
EXTERN = "marked, compiled, operator called"
WRITTEN = "the same on portable kernels"
WRITTEN_EXTERN = "the same on portable kernels, operator called"


@dataclass(frozen=True)
class Contestant:
    """A way to run.

    Where the operator `is_called`, compiled code leaves it a call; where it `is_portable`, the
    portable kernels run, which Inductor writes into its code, where Gluon's would be called.
    """

    is_marked: bool
    compiler: Literal["none", "inductor", "simplex"] = "none"
    is_called: bool = False
    is_portable: bool = False

    def compiled(self, function: Any) -> Any:
        if self.compiler == "none":
            return function
        if self.compiler == "inductor":
            return torch.compile(function, fullgraph=True)

        def simplex(gm: Any, inputs: Any) -> Any:  # Dynamo shares code by backend, so each has one
            return lowering.simplex(gm, inputs)

        return torch.compile(function, backend=simplex, fullgraph=True)

    @contextlib.contextmanager
    def stands(self) -> Iterator[None]:
        """Compile and run inside."""
        with contextlib.ExitStack() as stack:
            if self.is_portable:
                from csrc_free import attn

                stack.enter_context(attn.portable_alone())
            if self.is_called:
                from lowering.inductor import launcher

                leave = mock.patch.object(launcher, "lower_to_kernels", return_value=None)
                stack.enter_context(leave)
            tag = f"called {self.is_called}, portable {self.is_portable}"
            patch = torch.compiler.config.patch  # pyright: ignore[reportAttributeAccessIssue]
            stack.enter_context(patch(cache_key_tag=tag))
            yield


def field_of(device: torch.device) -> dict[str, Contestant]:
    """Return everyone who takes part on a device."""
    marked = Contestant(is_marked=True, compiler="simplex")
    found = {
        "unmarked, eager": Contestant(is_marked=False),
        PLAIN: Contestant(is_marked=False, compiler="inductor"),
        EAGER: Contestant(is_marked=True),
        OURS: marked,
        EXTERN: replace(marked, is_called=True),
    }
    if device.type == "cuda":
        found[WRITTEN] = replace(marked, is_portable=True)
        found[WRITTEN_EXTERN] = replace(marked, is_portable=True, is_called=True)
    return found
