"""A launch like one before runs what Triton compiled for it, without asking Triton again."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from csrc_free import launch as launches
from csrc_free.launch import launch

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)


@triton.jit
def _kernel(x, length, scale, BLOCK: triton.language.constexpr, num_warps): ...


@dataclasses.dataclass(frozen=True)
class _Config:
    block: int = 32
    num_warps: int = 4
    num_stages: int = 1

    def shared_bytes(self, traits, device):
        return 0


class _Program(CompiledKernel):
    """What was compiled, and what it was launched with."""

    def __init__(self):
        self.launched = []

    def __getitem__(self, grid):
        return lambda *args: self.launched.append((grid, args))


@pytest.fixture
def compiled(monkeypatch):
    """Return the programs that Triton was asked for, in order."""
    programs = []

    def run(kernel, *args, grid, warmup, **constants):
        programs.append(_Program())
        return programs[-1]

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(launches, "_compiled", {})
    return programs


SPACE = torch.zeros(64)


@pytest.mark.parametrize("repeats", [2, 3])
def test_what_was_compiled_is_launched_again(compiled, repeats):
    for scale in range(repeats):
        launch(_kernel, 7, SPACE, 5, float(scale), config=_Config())
    (program,) = compiled
    expected = [((7, 1, 1), (SPACE, 5, float(n), 32, 4)) for n in range(1, repeats)]
    assert program.launched == expected


@pytest.mark.parametrize(
    ("args", "config"),
    [
        ((SPACE[1:], 5, 1.0), _Config()),
        ((SPACE.half(), 5, 1.0), _Config()),
        ((SPACE.to("meta"), 5, 1.0), _Config()),
        ((None, 5, 1.0), _Config()),
        ((SPACE, 16, 1.0), _Config()),
        ((SPACE, 2**40, 1.0), _Config()),
        ((SPACE, 5, 1), _Config()),
        ((SPACE, 5, 1.0), _Config(block=64)),
        ((SPACE, 5, 1.0), _Config(num_warps=8)),
        ((TensorDescriptor(SPACE.view(8, 8), [8, 8], [8, 1], [4, 4]), 5, 1.0), _Config()),
    ],
)
def test_what_triton_may_compile_for_is_told_apart(compiled, args, config):
    launch(_kernel, 7, SPACE, 5, 1.0, config=_Config())
    launch(_kernel, 7, *args, config=config)
    assert len(compiled) == 2
    assert not compiled[0].launched


def test_blocks_of_descriptors_are_told_apart(compiled):
    for rows in (4, 8, 4):
        described = TensorDescriptor(SPACE.view(8, 8), [8, 8], [8, 1], [rows, 4])
        launch(_kernel, 7, described, 5, 1.0, config=_Config())
    assert len(compiled) == 2


def test_where_triton_asks_for_more_it_is_asked_every_time(compiled, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for _ in range(2):
        launch(_kernel, 7, SPACE, 5, 1.0, config=_Config())
    assert len(compiled) == 2


def test_an_argument_of_another_kind_is_always_asked_for(compiled):
    for _ in range(2):
        launch(_kernel, 7, True, 5, 1.0, config=_Config())
    assert len(compiled) == 2


def test_no_more_than_so_many_are_kept(compiled, monkeypatch):
    monkeypatch.setattr(launches, "_MOST_COMPILED", 3)
    for length in range(20):
        launch(_kernel, 7, SPACE, length, 1.0, config=_Config())
        assert len(launches._compiled) <= 3
    assert len(compiled) == 20
