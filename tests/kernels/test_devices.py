"""On which device and stream kernels are launched, with which options, and where none is."""

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import csrc_free
import simplex_ops
from simplex_ops.devices import gpu

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from csrc_free import problem
from csrc_free.launch import on_device_of
from csrc_free.traits import DEVICES
from tools.compiled import registers


class FakeDriver:
    """Two devices, of which 0 is current; it notes the current one at every launch."""

    def __init__(self) -> None:
        self.current = 0
        self.launches: list[tuple[str, int]] = []

    def exchange(self, index: int) -> int:
        before = self.current
        if index >= 0:
            self.current = index
        return before


@pytest.fixture
def driver(monkeypatch):
    fake = FakeDriver()

    def run(kernel, *args, **kwargs):
        fake.launches.append((kernel.__name__, fake.current))

    monkeypatch.setattr(torch.cuda, "_exchange_device", fake.exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", fake.exchange)
    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(problem, "device_of", lambda device: DEVICES["sm_90"])
    monkeypatch.setattr(problem, "can_describe", lambda tensor: False)  # it has no address
    monkeypatch.setattr(problem, "are_rows_aligned", lambda tensor: True)
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda to, _values: to
    )  # which asks for a real device
    return fake


def _run(device: str, group: int) -> None:
    with FakeTensorMode():
        q = torch.empty(1, 40, group, 32, dtype=torch.bfloat16, device=device).transpose(1, 2)
        k = torch.empty(1, 40, 1, 32, dtype=torch.bfloat16, device=device).transpose(1, 2)
        out, lse = gpu.attn(q, k, k, k, k, 20, 4)
        gpu.attn_backward(out, None, q, k, k, k, k, out, lse, 20, 4)


@pytest.mark.parametrize("group", [1, 8, 64])
@pytest.mark.parametrize("index", [0, 1])
def test_every_kernel_is_launched_on_the_device_of_its_tensors(driver, group, index):
    _run(f"cuda:{index}", group)
    names = {name for name, _current in driver.launches}
    assert {"forward_kernel", "delta_kernel", "sum_parts_kernel"} < names
    assert {current for _name, current in driver.launches} == {index}
    assert driver.current == 0


def test_the_current_device_comes_back_after_an_error(driver, monkeypatch):
    def fail(kernel, *args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(JITFunction, "run", fail)
    with pytest.raises(MemoryError):
        _run("cuda:1", 8)
    assert driver.current == 0


def test_tensors_on_the_host_have_no_device_to_make_current(driver):
    for device in ("cpu", "meta"):
        with on_device_of(torch.empty(0, device=device)):
            assert driver.current == 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_every_launch_asks_for_fused_multiply_adds(target):
    for name, launch in registers.launches(target).items():
        assert launch.options["enable_fp_fusion"] is True, name


def test_kernels_are_launched_in_one_place():
    """A kernel with a grid in brackets: there its options are given."""
    root = Path(next(iter(csrc_free.__path__)))
    places = [
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if re.search(r"kernel\w*\[|\.run\(|\.warmup\(", path.read_text())
    ]
    assert places == ["launch.py"]


@pytest.mark.parametrize("name", ["q", "k1", "v1"])
@pytest.mark.parametrize("device", ["cuda:0", "meta"])
def test_a_wrong_rank_is_said_in_our_words_before_anything_is_asked_of_it(driver, device, name):
    shapes = dict.fromkeys(("q", "k1", "k2", "v1", "v2"), (2, 1, 40, 32)) | {name: (2, 40)}
    sentence = rf"{name} must have 4 dimensions \[batch, heads, seq, head_dim\], got 2 of shape"
    with FakeTensorMode():
        inputs = {n: torch.empty(shape, device=device) for n, shape in shapes.items()}
        with pytest.raises(ValueError, match=sentence):
            gpu.attn(**inputs)
        out, lse = inputs["k2"], torch.empty(2, 1, 40, device=device)
        with pytest.raises(ValueError, match=sentence):
            gpu.attn_backward(out, None, *inputs.values(), out, lse)
    assert driver.launches == []


@pytest.mark.parametrize("device", ["xpu", "meta", "mps"])
def test_no_kernel_runs_where_none_was_compiled(device):
    with FakeTensorMode():
        q = torch.empty(1, 1, 4, 8, device=device)
        assert gpu.unserved(q, q) == f"no kernel runs on {device} devices"


def test_the_warning_of_the_slow_path_has_a_public_name():
    assert simplex_ops.SlowPathWarning is gpu.SlowPathWarning
    assert "SlowPathWarning" in simplex_ops.__all__
