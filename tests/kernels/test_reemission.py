"""Inductor writes a kernel that compiled code calls out by source, with what it can see of it.

That is nested jit functions and constants, and no class: what a kernel takes from elsewhere is lost
without a word. Held here with no GPU: every kernel compiles from the source that is written, and
only its outputs count as written to.
"""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._higher_order_ops.triton_kernel_wrap import (
    create_tma_stable_metadata,
    get_mutated_tensors,
    kernel_side_table,
)
from torch._inductor.codegen.wrapper import (
    user_defined_triton_kernel_transitive_closure_source_code as source_code_of,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _triton

from simplex_ops.devices import gpu

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.runtime import jit
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from csrc_free import attn, problem
from csrc_free.portable.forward import forward_kernel
from csrc_free.traits import DEVICES

HEADER = "import triton\nimport triton.language as tl\n\n@triton.jit\n"
WRITTEN = {
    "forward_kernel": {"out", "lse"},
    "delta_kernel": {"delta", "lse2", "has_huge"},
    "backward_wide_kernel": {"dk_wide", "dv_wide"},
    "backward_keys_kernel": {"dq", "dk_parts", "dv_parts"},
    "backward_query_kernel": {"dq", "dk_parts", "dv_parts"},
    "backward_pairs_kernel": {"dk_wide", "dv_wide", "dk_parts", "dv_parts"},
    "sum_parts_kernel": {"dk", "dv"},
}
FLAGS = {"NEEDS_DQ": "dq", "FILLS_DK": "dk_parts", "FILLS_DV": "dv_parts"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
# Each way of computing: Hopper's large tiles at three sizes of group, other forms in small ones.
CASES = {
    "large group": (64, {}),
    "group": (8, {}),
    "alone": (1, {}),
    "determinant": (2, {"form": "determinant", "k2_bias": 1.0, "v2_bias": 1.0}),
    "strassen": (2, {"form": "strassen", "is_causal": False, "k2_bias": 1.0}),
}


class _Driver:
    """Says which target kernels are compiled for; nothing is launched."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def calls(monkeypatch, request):
    """Return (kernel, arguments) of each launch of a forward and a backward."""
    noted: list[tuple[JITFunction, dict[str, Any]]] = []

    def run(kernel, *args, grid, warmup, **constants):
        named = dict(zip(kernel.arg_names, args, strict=False)) | constants
        noted.append((kernel, {name: x for name, x in named.items() if name not in OPTIONS}))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(torch.cuda, "_exchange_device", lambda index: index)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", lambda index: index)
    monkeypatch.setattr(problem, "device_of", lambda device: DEVICES["sm_90"])
    monkeypatch.setattr(problem, "can_describe", lambda tensor: True)  # it has no address
    monkeypatch.setattr(problem, "are_rows_aligned", lambda tensor: True)
    # What asks for a real device:
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, _values: to)
    monkeypatch.setattr(TensorDescriptor, "__post_init__", lambda self: None)
    group, options = CASES[request.param]
    with FakeTensorMode():
        q = torch.empty(2, group, 512, 64, dtype=torch.bfloat16, device="cuda")
        k = torch.empty(2, 1, 512, 64, dtype=torch.bfloat16, device="cuda")
        starts = torch.empty(2, dtype=torch.int32, device="cuda")
        bounds = torch.empty(2, 512, 2, dtype=torch.int32, device="cuda")
        options = {"q_start": starts, "kv_bounds": bounds, **options}
        with attn.portable_alone():
            out, lse = gpu.attn(q, k, k, k, k, 100, 20, **options)
            gpu.attn_backward(out, None, q, k, k, k, k, out, lse, 100, 20, **options)
    monkeypatch.undo()
    return noted


@pytest.mark.timeout(600)
@pytest.mark.parametrize("calls", CASES, indirect=True)
def test_every_kernel_compiles_from_the_source_that_inductor_writes(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "_active", _Driver())
    monkeypatch.setattr(_triton, "has_triton_tensor_descriptor_host_tma", lambda: True)
    _make_floats_double(monkeypatch)
    assert {kernel.__name__ for kernel, _arguments in calls} > {"forward_kernel", "delta_kernel"}
    for kernel, arguments in calls:
        emitted = _emitted(kernel, tmp_path / f"{kernel.__name__}.py")
        metadata, plain = {}, {}
        for name, value in arguments.items():
            if isinstance(value, TensorDescriptor):
                metadata[name] = create_tma_stable_metadata(list(value.block_shape))
            plain[name] = value.base if isinstance(value, TensorDescriptor) else value
        # Where it does not compile, every tensor counts as written to.
        index = kernel_side_table.add_kernel(emitted), kernel_side_table.add_constant_args({})
        written = get_mutated_tensors(*index, plain, metadata)
        unwanted = {name for flag, name in FLAGS.items() if plain.get(flag) is False}
        assert set(written) == WRITTEN[kernel.__name__] - unwanted, kernel.__name__


def _make_floats_double(monkeypatch) -> None:
    """Give Python floats the type with which Inductor hands them to a user's kernel."""

    def mangle(value, *args):
        return "fp64" if isinstance(value, float) else known(value, *args)

    known = jit.mangle_type
    monkeypatch.setattr(jit, "mangle_type", mangle)


def _emitted(kernel: JITFunction, path: Path) -> JITFunction:
    return getattr(_loaded(path, HEADER + source_code_of(kernel)), kernel.__name__)


def _loaded(path: Path, source: str) -> Any:
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_goes_together_in_another_order_is_another_kernel(tmp_path):
    """Triton's cache is asked by a key of sources: a tuple's order must be one of them."""
    source = HEADER + source_code_of(forward_kernel)
    known = _loaded(tmp_path / "known.py", source).forward_kernel.cache_key
    made = r"^    (?:return|\w+: tl\.constexpr =) \(?(\w+), (\w+), "
    bundles = list(re.finditer(made, source, re.MULTILINE))
    assert {bundle[1] for bundle in bundles} >= {"seq", "wide_begin", "i", "lo", "k", "FORM"}
    for number, bundle in enumerate(bundles):
        swapped = "".join([
            source[: bundle.start(1)], f"{bundle[2]}, {bundle[1]}", source[bundle.end(2) :],
        ])  # fmt: skip
        module = _loaded(tmp_path / f"swapped{number}.py", swapped)
        assert module.forward_kernel.cache_key != known, bundle[0]
    assert _loaded(tmp_path / "again.py", source).forward_kernel.cache_key == known
