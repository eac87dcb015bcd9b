"""Launch choices: pure functions of (traits of the problem, device).

A choice that has a comment was measured; the device, versions and date stand there.
"""

import dataclasses
import functools

import torch


@dataclasses.dataclass(frozen=True)
class Traits:
    """What a launch choice depends on."""

    group: int  # query heads of a key-value head
    block_d: int  # columns of q and k in a tile
    block_dv: int  # columns of v in a tile
    is_bf16: bool  # the other dtypes are multiplied as float32
    form: str
    is_describable: bool  # the wide pair's addresses and strides allow tensor descriptors
    are_rows_describable: bool  # and those of q and dout

    @property
    def columns(self) -> int:
        """Return the columns of the wider of the two."""
        return max(self.block_d, self.block_dv)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a launch choice knows of the device."""

    backend: str  # "cuda", "hip", "xpu" or "cpu" (the interpreter)
    capability: int  # 90 for sm_90; 0 where there is no such number


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a kernel is tiled and compiled."""

    num_warps: int
    num_stages: int
    constants: dict[str, int]
    tiles_of_a_part: int = 1

    @property
    def block_q(self) -> int:
        return self.constants["BLOCK_Q"]

    @property
    def reads_by_descriptor(self) -> bool:
        """Tell whether the kernel takes what it reads tile by tile as tensor descriptors."""
        return bool(self.constants.get("DESCRIPTORS", False))


@dataclasses.dataclass(frozen=True)
class BackwardChoice:
    """Which kernels the backward runs, and how."""

    wide: Choice  # the wide pair's gradients
    query: Choice  # dq alone
    keys: Choice  # dq and the narrow pair's gradients, narrow key by narrow key
    query_with_parts: Choice | None = None  # the same offset by offset; None: take `keys`
    pairs: Choice | None = None  # all four key-value gradients at once; None: the others


def is_small(grid: tuple[int]) -> bool:
    """Tell whether a grid has so few programs for each multiprocessor that its last ones matter."""
    return grid[0] <= 1024


@functools.cache
def device_of(device: torch.device) -> Device:
    """Return what launch choices know of a device."""
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        return Device("cuda", 10 * major + minor)
    return Device("hip" if device.type == "cuda" else device.type, 0)


def forward_choice(traits: Traits, device: Device) -> Choice:
    """Choose the forward's tiles: BLOCK_Q rows, REPLICAS offsets at a time, BLOCK_N wide keys."""
    how = {"DESCRIPTORS": _reads_by_descriptor(traits, device)}
    if device.backend == "cpu":
        return Choice(4, 1, {"BLOCK_Q": 16, "REPLICAS": 2, "BLOCK_N": 16} | how)
    if not _is_measured(traits, device):
        rows = 64 if traits.columns <= 64 and traits.is_describable else 32
        return Choice(4, 1, {"BLOCK_Q": rows, "REPLICAS": 1, "BLOCK_N": 32} | how)
    # tools.bench on an H100 80GB HBM3, torch 2.11.0+cu130, Triton 3.6.0, 2026-11-25, D 128, windows
    # 512 x 32, nominal TFLOP/s: 459 at a group of 64, 353 at 8, 315 at 1.
    if traits.group >= 64:
        return Choice(4, 2, {"BLOCK_Q": 64, "REPLICAS": 1, "BLOCK_N": 64} | how)
    if traits.group >= 8:
        return Choice(4, 3, {"BLOCK_Q": 64, "REPLICAS": 1, "BLOCK_N": 64} | how)
    return Choice(4, 2, {"BLOCK_Q": 16, "REPLICAS": 4, "BLOCK_N": 64} | how)


def backward_choice(traits: Traits, device: Device) -> BackwardChoice:
    """Choose the backward's kernels and their tiles."""
    how = {"DESCRIPTORS": _reads_by_descriptor(traits, device)}
    if device.backend == "cpu":
        query = {"BLOCK_Q": 16, "REPLICAS": 2, "BLOCK_N": 16, "TILE_STAGES": 1}
        # The interpreter meets every kernel, each at one range of group sizes.
        does_pairs = traits.group >= 4 and traits.form == "trilinear"
        return BackwardChoice(
            wide=Choice(4, 1, {"BLOCK_Q": 16, "BLOCK_N": 16, "OFFSET_STAGES": 1}),
            query=Choice(4, 1, query | how),
            keys=Choice(4, 1, {"BLOCK_Q": 16, "BLOCK_N": 16, "TILE_STAGES": 1} | how, 2),
            query_with_parts=Choice(4, 1, query | how) if traits.group == 1 else None,
            pairs=_pairs_choice(traits, device, 4, 1, rows=16, keys=16) if does_pairs else None,
        )
    if not _is_measured(traits, device):
        rows = 32 if traits.columns <= 128 else 16
        query = {"BLOCK_Q": 32, "REPLICAS": 1, "BLOCK_N": 32, "TILE_STAGES": 1}
        return BackwardChoice(
            wide=Choice(4, 1, {"BLOCK_Q": rows, "BLOCK_N": 32, "OFFSET_STAGES": 1}),
            query=Choice(4, 1, query | how),
            keys=Choice(4, 1, {"BLOCK_Q": 32, "BLOCK_N": 32, "TILE_STAGES": 1} | how, 2),
        )
    # In the same run: 263 at a group of 64, 208 at 8, 160 at 1, of 2.5 times the forward's FLOPs.
    query = {"BLOCK_Q": 64, "REPLICAS": 1, "BLOCK_N": 64, "TILE_STAGES": 2}
    with_parts = {"BLOCK_Q": 16, "REPLICAS": 4, "BLOCK_N": 32, "TILE_STAGES": 3}
    rows, stages = (64, 2) if traits.group % 64 == 0 else (32, 3)
    pairs = _pairs_choice(traits, device, 4, stages, rows=rows, keys=64)
    return BackwardChoice(
        wide=Choice(4, 1, {"BLOCK_Q": 32, "BLOCK_N": 64, "OFFSET_STAGES": 1}),
        query=Choice(4, 2, query | how),
        keys=Choice(4, 2, {"BLOCK_Q": 64, "BLOCK_N": 64, "TILE_STAGES": 2} | how, 1),
        query_with_parts=Choice(4, 3, with_parts | how) if traits.group < 8 else None,
        pairs=pairs if traits.group >= 32 else None,
    )


def _pairs_choice(
    traits: Traits, device: Device, warps: int, stages: int, *, rows: int, keys: int
) -> Choice:
    """Choose tiles of `pairs`; it reads rows by descriptor where a tile is of one position."""
    can = traits.are_rows_describable and traits.group % rows == 0
    return Choice(warps, stages, {
        "BLOCK_Q": rows, "BLOCK_N": keys, "TILE_STAGES": stages,
        "DESCRIPTORS": can and _reads_by_descriptor(traits, device),
    })  # fmt: skip


def _reads_by_descriptor(traits: Traits, device: Device) -> bool:
    """Tell whether tiles are read through descriptors; the interpreter takes them too."""
    return traits.is_describable and (device.backend == "cpu" or _is_measured(traits, device))


def _is_measured(traits: Traits, device: Device) -> bool:
    """Tell whether the large tiles were seen to fit and to pay: Hopper, bfloat16, trilinear.

    And to be right: where rows are no multiple of 16 bytes, tiles of 64 rows and 64 keys read by
    pointers gave wrong outputs and illegal accesses (head sizes 65 and 20, or 18 and 2; causal or
    not; H100, torch 2.11.0+cu130, Triton 3.6.0, 2026-11-25), and those of 32 right ones.
    """
    return (
        device == Device("cuda", 90)
        and traits.is_describable
        and traits.is_bf16
        and traits.columns <= 128
        and traits.form == "trilinear"
    )
