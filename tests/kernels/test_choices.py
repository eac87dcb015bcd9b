"""Launch choices: each fits its device, lies in its tuning space, and is what was measured."""

import dataclasses
import itertools
import json

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl

from csrc_free import measured
from csrc_free.device.forms import CODES
from csrc_free.hopper import (
    backward_keys,
    backward_narrow,
    backward_wide,
    forward_tiles,
    half_range,
    ordered,
)
from csrc_free.hopper import backward_query as hopper_backward_query
from csrc_free.hopper import forward as hopper_forward
from csrc_free.portable import backward, forward, keys, pairs, query, wide, wide_parts
from csrc_free.steps import delta, parts_sum
from csrc_free.traits import DEVICES, INTERPRETER, Device, Traits, first_that_fits
from simplex_ops.contract.checks import FORMS
from simplex_ops.rules import cache_key
from tools.compiled import registers
from tools.compiled.launches import Launch

PRECISIONS = (
    (torch.bfloat16, None), (torch.float16, "tf32"), (torch.float32, "ieee"),
    (torch.float32, "bf16x6"),
)  # fmt: skip
GROUPS = (1, 2, 4, 7, 8, 16, 31, 32, 40, 64, 96, 128)
BLOCKS = (16, 32, 64, 128, 256)
SPACES = {module.Config: module.SPACE for module in (forward, wide, query, keys, pairs)}
EVERY = tuple(
    Traits(group, d, dv, dtype, form, of_keys, of_rows, precision=precision)
    for group, d, dv, (dtype, precision), form, (of_keys, of_rows)
    in itertools.product(
        GROUPS, BLOCKS, BLOCKS, PRECISIONS, FORMS, ((False, False), (True, False), (True, True))
    )
    if precision != "bf16x6" or max(d, dv) <= 128  # as `precision_of` has it
)  # fmt: skip


def _configs(traits: Traits, device: Device):
    return forward.choose(traits, device), *backward.choose(traits, device).configs


@pytest.mark.parametrize("name", DEVICES)
def test_every_choice_fits_every_target(name):
    device = DEVICES[name]
    for traits in EVERY:
        for config in _configs(traits, device):
            assert config.shared_bytes(traits, device) <= device.shared_limit, (traits, config)


@pytest.mark.parametrize("name", DEVICES)
def test_every_choice_lies_in_its_tuning_space(name):
    for config in {c for traits in EVERY for c in _configs(traits, DEVICES[name])}:
        space = SPACES[type(config)]
        for field in dataclasses.fields(config):
            if field.name != "descriptors":
                assert getattr(config, field.name) in space[field.name], config


def test_every_form_has_a_code():
    assert tuple(CODES) == FORMS
    assert sorted(CODES.values()) == list(range(len(FORMS)))


def test_what_a_device_may_not_have_is_refused_by_name():
    traits = Traits(1, 256, 256, torch.float32, "trilinear", False, False)
    small = Device("cuda", 75, 16_384)
    with pytest.raises(ValueError, match=r"no kernel for sm_75: its programs may have 16384 bytes"):
        forward.choose(traits, small)


def test_the_first_that_fits_wins():
    traits = Traits(8, 128, 128, torch.bfloat16, "trilinear", True, True)
    large, small = forward.Config(128, 1, 128, 4, 4), forward.Config(16, 1, 16, 4, 1)
    assert first_that_fits([large, small], traits, DEVICES["sm_90"]) == small
    assert first_that_fits([large, small], traits, INTERPRETER) == large


KINDS = {
    "forward_kernel": forward.Config,
    "hopper_forward_kernel": hopper_forward.Config,
    "hopper_forward_tiles_kernel": forward_tiles.Config,
    "hopper_backward_keys_kernel": backward_keys.Config,
    "hopper_backward_wide_kernel": backward_wide.Config,
    "hopper_backward_query_kernel": hopper_backward_query.Config,
    "hopper_backward_narrow_kernel": backward_narrow.Config,
    "backward_wide_kernel": wide.Config,
    "backward_query_kernel": query.Config,
    "backward_keys_kernel": keys.Config,
    "backward_pairs_kernel": pairs.Config,
    "parts_kernel": wide_parts.Config,
    "largest_of_keys_kernel": half_range.Config,
    "largest_of_rows_kernel": half_range.Config,
    "scaled_narrow_kernel": half_range.Config,
    "scaled_rows_kernel": half_range.Config,
    "delta_kernel": delta.Config,
    "sum_parts_kernel": parts_sum.Config,
    "order_columns_kernel": ordered.Config,
}


def _config_of(launch: Launch):
    """Return the config that a launch was made with, and of its traits those that take room."""
    kind, constants = KINDS[launch.kernel.__name__], launch.constants
    given = constants | {name.upper(): value for name, value in launch.options.items()}
    config = kind(**{field.name: given[field.name.upper()] for field in dataclasses.fields(kind)
                     if field.name.upper() in given})  # fmt: skip
    dtype = torch.bfloat16 if constants.get("DOT_DTYPE") == tl.bfloat16 else torch.float32
    block_d = constants.get("BLOCK_D", 16)
    block_dv = constants.get("BLOCK_DV", block_d)
    traits = Traits(1, block_d, block_dv, dtype, "trilinear", False, False)
    return config, dataclasses.replace(traits, precision=constants.get("PRECISION"))


@pytest.mark.parametrize("target", registers.TARGETS)
def test_the_arithmetic_bounds_what_the_compiler_takes(target):
    tables = [registers.read_table(version) for version in registers.versions()]
    for name, launch in registers.launches(target).items():
        config, traits = _config_of(launch)
        bound = config.shared_bytes(traits, DEVICES[target])
        for table in tables:
            if table is not None and target in table:
                assert table[target][name].shared <= bound, (name, config)


def test_a_measured_table_gives_what_was_measured():
    traits = Traits(64, 128, 128, torch.bfloat16, "trilinear", False, False)
    hopper = DEVICES["sm_90"]
    assert forward.choose(traits, hopper) == forward.Config(64, 1, 64, 4, 2)
    of_eight = dataclasses.replace(traits, group=8)
    assert forward.choose(of_eight, hopper) == forward.Config(64, 1, 64, 4, 3)
    assert backward.choose(of_eight, hopper).pairs is None
    assert backward.choose(traits, hopper).pairs == pairs.Config(64, 64, 2, 4, 2)
    of_forty = dataclasses.replace(traits, group=40)
    assert backward.choose(of_forty, hopper).pairs == pairs.Config(32, 64, 3, 4, 3)
    of_one = dataclasses.replace(traits, group=1)
    assert backward.choose(of_one, hopper).query_with_parts == query.Config(16, 4, 32, 3, 4, 3)
    of_four = dataclasses.replace(traits, group=4)
    assert backward.choose(of_four, hopper).query_with_parts is None
    assert forward.choose(of_four, hopper) == forward.Config(64, 1, 64, 4, 3)
    assert forward.choose(of_one, hopper) == forward.Config(16, 4, 64, 4, 2)
    of_64_columns = dataclasses.replace(of_one, block_d=64, block_dv=64)
    assert forward.choose(of_64_columns, hopper) == forward.Config(64, 1, 64, 4, 3)


@pytest.mark.parametrize(("programs", "splits"), [(1, 16), (32, 8), (64, 4), (128, 2), (256, 1)])
def test_narrow_keys_are_shared_where_multiprocessors_would_be_idle(programs, splits):
    hopper = DEVICES["sm_90"]
    assert pairs.splits_of(programs, hopper) == splits
    of_any_number = dataclasses.replace(hopper, multiprocessors=0)
    assert pairs.splits_of(programs, of_any_number) == 1


@pytest.mark.parametrize("path", sorted(measured.ROOT.glob("*.json")), ids=lambda path: path.stem)
def test_a_measured_table_says_what_was_measured_when_and_with_what(path):
    assert path.stem in DEVICES
    table = measured.table(path.stem)
    assert table is not None
    assert set(table) == {"device", "versions", "date", "figures", *measured.CHOOSING}
    assert set(table["versions"]) == {"torch", "triton"}


def test_an_unknown_condition_of_a_line_is_an_error(monkeypatch):
    table = {
        "serves": {"precisions": [None], "forms": ["trilinear"], "columns_to": 128},
        "lines": {"forward": [{"when": {"groups": 8}, "config": {}}]},
    }
    monkeypatch.setattr(measured, "table", lambda name: table)
    traits = Traits(8, 128, 128, torch.bfloat16, "trilinear", False, False)
    with pytest.raises(KeyError, match="groups"):
        list(measured.configs("forward", forward.Config, traits, DEVICES["sm_80"]))


def test_what_can_change_a_choice_joins_the_compile_caches_keys(monkeypatch, tmp_path):
    """A figure or a date does not: it would compile everything anew for nothing."""
    table = json.loads((measured.ROOT / "sm_90.json").read_text())
    read = cache_key.sources.__wrapped__
    monkeypatch.setattr(measured, "ROOT", tmp_path)

    def digest() -> str:
        (tmp_path / "sm_90.json").write_text(json.dumps(table))
        return read()

    before = digest()
    table["date"], table["figures"][0]["value"] = "2027-01-01", 500
    table["versions"]["triton"] = "4.0"
    assert digest() == before
    table["lines"]["forward"][0]["config"]["num_stages"] = 3
    after = digest()
    assert after != before
    table["serves"]["columns_to"] = 64
    assert digest() not in (before, after)


def test_large_tiles_of_float32_are_small_enough_for_every_device():
    """`keys` took 135,168 bytes at 256 columns, where sm_89 and sm_120 have 101,376."""
    traits = Traits(8, 256, 256, torch.float32, "trilinear", False, False)
    before = keys.Config(32, 32, 1, 4, 1)
    assert before.shared_bytes(traits, DEVICES["sm_89"]) >= 135_168
    for device in DEVICES.values():
        assert backward.choose(traits, device).keys == keys.Config(16, 16, 1, 8, 1)
        assert forward.choose(traits, device) == forward.Config(16, 1, 16, 8, 1)


def test_float16_is_exact_in_tf32_and_ieee_where_there_is_none():
    assert {name for name, device in DEVICES.items() if not device.has_tf32} == {"gfx950"}
    for target, of_float16, of_float32 in (
        ("sm_90", "tf32", "bf16x6"), ("gfx942", "tf32", "ieee"), ("gfx950", "ieee", "ieee")
    ):  # fmt: skip
        launches = registers.launches(target)
        assert launches["forward_kernel fp16"].constants["PRECISION"] == of_float16
        assert launches["forward_kernel fp32"].constants["PRECISION"] == of_float32
