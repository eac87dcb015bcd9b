"""The Hopper kernels without a GPU: what they serve, who is asked, and that they compile."""

import warnings

import pytest
import torch

pytest.importorskip("triton")

from csrc_free import attn, problem
from csrc_free.hopper.forward import choose
from csrc_free.hopper.serve import why_not_forward
from csrc_free.traits import DEVICES
from tools.compiled.launches import recorded
from tools.compiled.registers import device_of, usage_of

HOPPER = DEVICES["sm_90"]


def _inputs(
    group=64, kv_heads=2, seq=300, dim=128, value_dim=None, dtype=torch.bfloat16, step=1, width=0
):  # fmt: skip
    """Return five tensors on the meta device, [B, N, H, D] seen through a transpose."""

    def make(heads, columns):
        wide = torch.empty(2, seq, heads, (width or columns) * step, dtype=dtype, device="meta")
        return wide[..., : columns * step : step].transpose(1, 2)

    value_dim = value_dim or dim
    return (
        make(group * kv_heads, dim), make(kv_heads, dim), make(kv_heads, dim),
        make(kv_heads, value_dim), make(kv_heads, value_dim),
    )  # fmt: skip


def _arguments(w1=128, w2=16, scale=0.1, form="trilinear", **others):
    return {
        "reach1": (w1 - 1, 0), "reach2": (2**30 if w2 is None else w2 - 1, 0),
        "scale": scale, "form": form,
        "k2_bias": 0.0, "v2_bias": 0.0, "kv_bounds": None, "q_start": None, **others,
    }  # fmt: skip


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(problem, "device_of", lambda device: HOPPER)


def _why_not(inputs, **arguments):
    return why_not_forward(problem.problem_of(*inputs, **_arguments(**arguments)))


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        ({}, {}),
        ({"group": 128}, {}),
        *(({"group": group, "seq": 600}, {"w1": 512}) for group in (1, 2, 3, 7, 8, 32, 48, 63)),
        ({"group": 8, "dim": 40, "value_dim": 120}, {}),
        ({"dim": 64}, {}),
        ({"dim": 96, "value_dim": 128}, {}),
        ({"dim": 40, "value_dim": 120}, {}),
        ({"width": 136}, {}),
        ({}, {"form": "strassen"}),
        ({}, {"form": "determinant"}),
        ({"dim": 64, "group": 8}, {"form": "determinant", "w1": 9, "w2": 100}),
        ({}, {"k2_bias": 1.0, "v2_bias": 0.5}),
        ({}, {"w1": 8, "w2": 200, "k2_bias": 1.0}),
        ({}, {"kv_bounds": torch.zeros(2, 300, 2, dtype=torch.int32)}),
        ({}, {"q_start": torch.zeros(2, dtype=torch.int32)}),
        ({}, {"reach1": (99, 99)}),
    ],
)
def test_serves(hopper, given, arguments):
    assert _why_not(_inputs(**given), **arguments) is None


@pytest.mark.parametrize(
    ("given", "arguments", "reason"),
    [
        ({"dtype": torch.float32}, {}, "they take bfloat16 and float16, and q is float32"),
        ({"dim": 32}, {}, "they take D from 33 to 128, got 32"),
        ({"dim": 136}, {}, "they take D from 33 to 128, got 136"),
        ({"value_dim": 256}, {}, "they take Dv from 33 to 128, got 256"),
        ({"dim": 100}, {}, "q must have an address and strides of a positive multiple of 16 bytes"),
        ({"width": 132}, {}, "q must have an address and strides of a positive multiple"),
        ({"value_dim": 100}, {}, "the wide values must have an address and strides"),
        ({"group": 96}, {}, "a tile holds a group, or 64 heads of it, and a key-value head has 96"),
        ({"group": 5}, {}, "a tile has 8 rows for each of 8 positions, of which a group fills 5"),
        ({"group": 1}, {"w1": 40}, "and meets 128 keys, of which a query sees 40"),
        ({"group": 1, "dim": 64, "seq": 600}, {"w1": 512}, "tiles of 64 columns and 64 positions"),
        ({"group": 4, "seq": 15}, {}, "a tile is 16 positions of 4 heads, and q has 15"),
        ({}, {"scale": 0.0}, "the scale is 0"),
        ({}, {"w2": 3}, "a narrow window of fewer than 4 keys is no faster, got 3"),
        ({}, {"w1": 2, "w2": None}, "a narrow window of fewer than 4 keys is no faster, got 2"),
    ],
)
def test_says_why_it_does_not_serve(hopper, given, arguments, reason):
    assert reason in _why_not(_inputs(**given), **arguments)


@pytest.mark.parametrize("name", sorted(set(DEVICES) - {"sm_90"}))
def test_serves_no_other_device(monkeypatch, name):
    monkeypatch.setattr(problem, "device_of", lambda device: DEVICES[name])
    assert _why_not(_inputs()) == f"they are written for sm_90, and this is {name}"


def _run(inputs, **arguments):
    """Run the entry on the meta device; return the names of the kernels that were launched."""
    q, v1 = inputs[0], inputs[3]
    out = torch.empty(*q.shape[:3], v1.shape[3], dtype=q.dtype, device="meta")
    lse = torch.empty(q.shape[:3], device="meta")
    with recorded(HOPPER) as launches:
        attn.attn_forward(*inputs, out=out, lse=lse, **_arguments(**arguments))
    return launches


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (64, "hopper_forward_kernel"),
        (32, "hopper_forward_tiles_kernel"),
        (96, "forward_kernel"),
    ],
)
def test_who_serves_can_be_asked(hopper, group, name):
    inputs = _inputs(group=group)
    (launch,) = _run(inputs)
    said = attn.forward_served_by(*inputs, **_arguments())
    assert launch.kernel.__name__ == name
    assert launch.kernel.is_gluon() == (group != 96)
    assert said.startswith("portable: a tile holds" if group == 96 else "hopper")


@pytest.mark.parametrize("seq", [0, 5])
def test_nothing_is_launched_for_no_rows(seq):
    inputs = list(_inputs(seq=5))
    if seq == 0:
        inputs[0] = inputs[0][:, :, :0]
    assert len(_run(inputs)) == (1 if seq else 0)


@pytest.mark.parametrize(
    "error",
    [
        ImportError("no module named gluon"),
        AttributeError("module has no attribute 'warpgroup_mma'"),
        TypeError("warp_specialize() takes 3 arguments"),
        RuntimeError("PassManager::run failed"),
    ],
)
def test_a_gluon_that_does_not_compile_leaves_the_portable_path_with_one_warning(
    hopper, monkeypatch, error
):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(attn, "_broken", [])
    monkeypatch.setattr("csrc_free.hopper.forward.compute", fail)
    with pytest.warns(attn.PortableWarning, match="could not be compiled"):
        (launch,) = _run(_inputs())
    assert not launch.kernel.is_gluon()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (again,) = _run(_inputs())
    assert not again.kernel.is_gluon()
    assert str(error) in attn.forward_served_by(*_inputs(), **_arguments())


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Triton Error [CUDA]: an illegal")],
)
def test_what_the_device_says_is_not_hidden(hopper, monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(attn, "_broken", [])
    monkeypatch.setattr("csrc_free.hopper.forward.compute", fail)
    with pytest.raises(type(error)):
        _run(_inputs())
    assert attn._broken == []


@pytest.mark.parametrize(
    ("width", "tiles"),
    [(1, 1), (64, 1), (65, 2), (128, 2), (192, 3), (256, 4), (300, 3), (512, 4), (1024, 4)],
)
def test_as_many_tiles_stay_as_waste_the_least(width, tiles):
    assert choose(width, 128, 128, has_bias=False).tiles == tiles
    assert choose(width, 64, 128, has_bias=False).tiles == tiles


@pytest.mark.parametrize(("width", "tiles"), [(64, (1, 64)), (128, (1, 128)), (512, (2, 128))])
def test_tiles_of_64_columns_have_more_keys(width, tiles):
    config = choose(width, 64, 64, has_bias=False)
    assert (config.tiles, config.block_n) == tiles


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "arguments", "spills"),
    [
        ({}, {"w1": 512, "w2": 32}, 64),
        ({}, {"w1": 512, "w2": 32, "form": "determinant"}, 100),
        ({"dim": 64}, {"w1": 128}, 64),
        ({"dim": 64}, {"w1": 64, "k2_bias": 1.0}, 200),  # in the warp that brings rows
    ],
)
def test_compiles_for_sm_90_almost_without_spills(hopper, given, arguments, spills):
    inputs = _inputs(seq=600, **given)
    *_moves, launch = _run(inputs, **arguments)
    usage = usage_of(launch, device_of("sm_90"))
    assert usage.registers == 168
    assert usage.spills <= spills
    traits = problem.problem_of(*inputs, **_arguments()).traits()
    config = choose(
        arguments["w1"], traits.block_d, traits.block_dv, has_bias="k2_bias" in arguments
    )
    assert usage.shared <= config.shared_bytes(traits, HOPPER) <= HOPPER.shared_limit


def test_the_bench_names_who_serves(hopper):
    from tools.bench.contest import _served_by
    from tools.workloads import WORKLOADS, meta_inputs

    said = {
        (name, direction): _served_by(WORKLOADS[name], direction, meta_inputs(WORKLOADS[name]))
        for name in ("llama-mqa", "mha", "fp32", "fp16")
        for direction in ("forward", "backward")
    }
    assert said["llama-mqa", "forward"] == "hopper"
    assert said["llama-mqa", "backward"] == "hopper (keys, query)"
    assert said["mha", "backward"] == "hopper (wide, narrow)"
    unserved = "portable: they take bfloat16 and float16, and q is float32"
    assert said["fp32", "forward"] == said["fp32", "backward"] == unserved
    assert said["fp16", "backward"] == "hopper (wide, narrow)"
