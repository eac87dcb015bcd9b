"""A kernel has one key in Triton's cache, whatever ran before it in its process."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton.experimental.gluon")

PROGRAM = """
import sys
from csrc_free.hopper.backward_narrow import hopper_backward_narrow_kernel
from csrc_free.hopper.backward_query import hopper_backward_query_kernel
from csrc_free.hopper.forward import hopper_forward_kernel
from csrc_free.hopper.forward_tiles import hopper_forward_tiles_kernel
from csrc_free.launch import settle_cache_key

kernels = [
    hopper_backward_narrow_kernel, hopper_backward_query_kernel, hopper_forward_kernel,
    hopper_forward_tiles_kernel,
]
for kernel in kernels[:: int(sys.argv[1])]:
    settle_cache_key(kernel)
print([kernel.cache_key for kernel in kernels])
"""


def test_the_order_of_kernels_does_not_change_their_keys():
    found = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM, order], check=True, capture_output=True, text=True,
            env=os.environ, timeout=100,
        ).stdout
        for order in ("1", "-1")
    ]  # fmt: skip
    assert found[0] == found[1]
