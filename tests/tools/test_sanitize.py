"""The small problems of tools.compiled.sanitize: they reach every kernel, in each way it reads."""

from unittest import mock

import pytest

from simplex_ops.devices import gpu
from simplex_ops.testing import Problem
from tools.compiled import sanitize

pytest.importorskip("triton")


def _launches(case):
    from csrc_free.traits import DEVICES
    from tools.compiled.launches import recorded

    problem = Problem.of(case)
    found = []
    for implementation in sanitize.implementations():
        with (
            recorded(DEVICES["sm_90"]) as noted,
            mock.patch.object(gpu, "unserved", return_value=None),
            implementation,
        ):
            out, lse = gpu.attn(*problem.inputs, *problem.windows, **problem.options)
            gpu.attn_backward(
                problem.dout, problem.dlse, *problem.inputs, out, lse, *problem.windows,
                **problem.options,
            )  # fmt: skip
        found += noted
    return found


# Kernels that read no tiles by descriptors.
ONE_WAY = (
    "delta", "backward_wide", "sum_parts", "spans", "parts", "order_columns",
    "largest_of_keys", "largest_of_rows", "scaled_narrow", "scaled_rows",
)  # fmt: skip


def test_the_small_problems_reach_every_kernel():
    reached = {
        (launch.kernel.__name__, launch.constants.get("DESCRIPTORS"))
        for case in sanitize.CASES
        for launch in _launches(case)
    }
    tiled = ("forward", "backward_query", "backward_keys", "backward_pairs")
    assert reached == {
        *((f"{name}_kernel", how) for name in tiled for how in (True, False)),
        *((f"{name}_kernel", None) for name in ONE_WAY),
        *(
            (f"hopper_{name}_kernel", None)
            for name in (
                "forward",
                "forward_tiles",
                "backward_keys",
                "backward_wide",
                "backward_query",
                "backward_narrow",
            )
        ),
    }
