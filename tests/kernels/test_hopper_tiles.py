"""The Hopper forward for groups of fewer than 64 heads, without a GPU: tiles, and a program."""

import pytest
import torch

pytest.importorskip("triton")

from csrc_free import problem
from csrc_free.hopper import forward_tiles
from csrc_free.traits import DEVICES
from tools.compiled.launches import recorded
from tools.compiled.registers import device_of, usage_of

HOPPER = DEVICES["sm_90"]


@pytest.mark.parametrize(
    ("group", "positions"), [(1, 64), (2, 32), (3, 16), (4, 16), (5, 8), (8, 8), (33, 1), (63, 1)]
)
def test_a_tile_is_of_64_rows_of_a_power_of_two_a_position(group, positions):
    assert forward_tiles.choose(group, 512, 128, 128).p == positions


@pytest.mark.parametrize("group", [1, 2, 3, 4, 8, 16, 32, 40])
@pytest.mark.parametrize("dims", [(128, 128), (64, 64), (64, 128)])
@pytest.mark.parametrize("width", [1, 63, 64, 65, 250, 256, 500, 512, 513, 1024, 2**20])
def test_tiles_fit_and_a_tail_covers_all_further_positions(group, dims, width):
    config = forward_tiles.choose(group, width, *dims)
    assert config.bytes_of(*dims) <= HOPPER.shared_limit
    assert config.tail == 0 or config.p - 1 <= config.tail
    assert config.narrow_rows >= config.chunk + config.p - 1
    assert width + config.p - 1 <= config.covered(width) <= 2 * (width + config.p - 1) + 128


@pytest.mark.parametrize(("width", "tiles", "tail"), [(64, 1, 16), (256, 4, 16), (512, 4, 16)])
def test_a_tail_replaces_a_tile_where_little_is_left(width, tiles, tail):
    config = forward_tiles.choose(8, width, 128, 128)
    assert (config.tiles, config.tail) == (tiles, tail)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "spills"),
    [(8, 300), (1, 400)],
)
def test_compiles_for_sm_90_with_few_spills(group, spills):
    def make(heads):
        return torch.empty(2, heads, 600, 128, dtype=torch.bfloat16, device="meta")

    inputs = (make(2 * group), *(make(2) for _ in range(4)))
    out, lse = torch.empty_like(inputs[0]), torch.empty(2, 2 * group, 600, device="meta")
    with recorded(HOPPER) as launches:
        this = problem.problem_of(
            *inputs, reach1=(511, 0), reach2=(31, 0), scale=0.1, form="trilinear",
            k2_bias=0.0, v2_bias=0.0, kv_bounds=None, q_start=None,
        )  # fmt: skip
        forward_tiles.compute(this, out, lse)
    usage = usage_of(launches[0], device_of("sm_90"))
    assert usage.registers == 168
    assert usage.spills <= spills
    bound = forward_tiles.choose(group, 512, 128, 128).bytes_of(128, 128)
    assert usage.shared <= bound
