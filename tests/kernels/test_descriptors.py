"""Which tensors the copy engine can read, and where launch choices let it."""

import dataclasses

import pytest
import torch

from csrc_free.device.descriptors import can_describe, describe
from csrc_free.portable import backward, forward
from csrc_free.traits import DEVICES, Device, Traits

HOPPER, AMPERE, AMD = DEVICES["sm_90"], DEVICES["sm_80"], DEVICES["gfx942"]
TRAITS = Traits(
    group=64, block_d=128, block_dv=128, dtype=torch.bfloat16, form="trilinear",
    is_describable=True, are_rows_describable=True,
)  # fmt: skip


def _keys(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


TENSORS = {
    "contiguous": (_keys(2, 3, 20, 64), True),
    "seen through a transpose": (_keys(2, 20, 3, 64).transpose(1, 2), True),
    "a head of several fused": (_keys(2, 20, 9, 64)[:, :, 3:6].transpose(1, 2), True),
    "rows of 16 bytes": (_keys(1, 2, 5, 8), True),
    "rows of 10 bytes": (_keys(1, 2, 5, 5), False),
    "rows of 20 bytes": (_keys(1, 2, 5, 5, dtype=torch.float32), False),
    "one element after an aligned address": (_keys(2, 3, 20, 72)[..., 1:65], False),
    "eight elements after one": (_keys(2, 3, 20, 72)[..., 8:], True),
    "one batch row for all": (_keys(1, 3, 20, 64).expand(4, 3, 20, 64), False),
    "no rows": (_keys(2, 3, 0, 64), False),
}


@pytest.mark.parametrize("name", TENSORS)
def test_what_can_be_described(name):
    tensor, expected = TENSORS[name]
    assert can_describe(tensor) == expected
    if expected:  # triton's own checks agree
        assert describe(tensor, 16, 64).block_shape == [1, 1, 16, 64]


def _by_descriptor(traits: Traits, device: Device) -> list[bool]:
    choice = backward.choose(traits, device)
    configs = (forward.choose(traits, device), choice.query, choice.keys, choice.pairs)
    return [config.descriptors for config in configs if config is not None]


@pytest.mark.parametrize("group", [32, 64, 96, 128])
def test_hopper_reads_by_descriptor(group):
    assert _by_descriptor(dataclasses.replace(TRAITS, group=group), HOPPER) == [True] * 4


@pytest.mark.parametrize("device", [AMPERE, AMD])
def test_devices_without_a_copy_engine_do_not(device):
    assert not any(_by_descriptor(TRAITS, device))


@pytest.mark.parametrize(
    "change",
    [{"dtype": torch.float16, "precision": "tf32"}, {"form": "strassen"}, {"block_d": 256}],
)
def test_what_takes_small_tiles_is_read_by_pointers(change):
    assert not any(_by_descriptor(dataclasses.replace(TRAITS, **change), HOPPER))


def test_strides_of_zero_are_read_by_pointers_in_the_same_tiles():
    expanded = dataclasses.replace(TRAITS, is_describable=False)
    described, pointed = forward.choose(TRAITS, HOPPER), forward.choose(expanded, HOPPER)
    assert pointed == dataclasses.replace(described, descriptors=False)


@pytest.mark.parametrize("group", [1, 8, 64])
def test_rows_of_no_multiple_of_16_bytes_are_read_in_small_tiles(group):
    plain = dataclasses.replace(TRAITS, group=group, is_describable=False, are_keys_aligned=False)
    assert not any(_by_descriptor(plain, HOPPER))
    found = backward.choose(plain, HOPPER)
    assert found.pairs is None
    assert found.query_with_parts is None
    for config in (forward.choose(plain, HOPPER), found.wide, found.query, found.keys):
        assert (config.block_q, config.block_n) == (16, 16)


@pytest.mark.parametrize("change", [{"group": 40}, {"are_rows_describable": False}])
def test_rows_are_described_where_a_tile_is_of_one_position(change):
    choice = backward.choose(dataclasses.replace(TRAITS, **change), HOPPER)
    assert choice.pairs is not None
    assert not choice.pairs.descriptors
    assert choice.query.descriptors
