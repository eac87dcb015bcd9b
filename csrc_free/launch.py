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
        """Tell whether the kernel takes the wide pair as tensor descriptors."""
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

    def tiles(warps: int, stages: int, rows: int, replicas: int, keys: int) -> Choice:
        sizes = {"BLOCK_Q": rows, "REPLICAS": replicas, "BLOCK_N": keys}
        return Choice(warps, stages, sizes | {"DESCRIPTORS": _reads_by_descriptor(traits, device)})

    if device.backend == "cpu":
        return tiles(4, 1, 16, 2, 16)
    if not _is_measured(traits, device):
        return tiles(4, 1, 64 if traits.columns <= 64 else 32, 1, 32)
    # tools.bench on an H100 80GB HBM3, torch 2.11.0+cu130, Triton 3.6.0, 2026-11-24, D 128, windows
    # 512 x 32, nominal TFLOP/s: 459 at a group of 64, 354 at 8, 314 at 1.
    if traits.group >= 64:
        return tiles(4, 2, 64, 1, 64)
    if traits.group >= 8:
        return tiles(4, 3, 64, 1, 64)
    return tiles(4, 2, 16, 4, 64)


def backward_choice(traits: Traits, device: Device) -> BackwardChoice:
    """Choose the backward's kernels and their tiles."""
    by_descriptor = _reads_by_descriptor(traits, device)

    def wide(warps: int, rows: int, keys: int) -> Choice:
        return Choice(warps, 1, {"BLOCK_Q": rows, "BLOCK_N": keys, "OFFSET_STAGES": 1})

    def query(warps: int, stages: int, rows: int, replicas: int, keys: int) -> Choice:
        sizes = {"BLOCK_Q": rows, "REPLICAS": replicas, "BLOCK_N": keys, "TILE_STAGES": stages}
        return Choice(warps, stages, sizes | {"DESCRIPTORS": by_descriptor})

    def keys(warps: int, stages: int, rows: int, keys: int, tiles_of_a_part: int) -> Choice:
        sizes = {"BLOCK_Q": rows, "BLOCK_N": keys, "TILE_STAGES": stages}
        return Choice(warps, stages, sizes | {"DESCRIPTORS": by_descriptor}, tiles_of_a_part)

    def pairs(warps: int, stages: int, rows: int, keys: int) -> Choice:
        sizes = {"BLOCK_Q": rows, "BLOCK_N": keys, "TILE_STAGES": stages}
        can = by_descriptor and traits.are_rows_describable and traits.group % rows == 0
        return Choice(warps, stages, sizes | {"DESCRIPTORS": can})

    if device.backend == "cpu":
        # The interpreter meets every kernel, each at one range of group sizes.
        return BackwardChoice(
            wide=wide(4, 16, 16),
            query=query(4, 1, 16, 2, 16),
            keys=keys(4, 1, 16, 16, 2),
            query_with_parts=query(4, 1, 16, 2, 16) if traits.group == 1 else None,
            pairs=pairs(4, 1, 16, 16) if traits.group >= 4 and traits.form == "trilinear" else None,
        )
    if not _is_measured(traits, device):
        return BackwardChoice(
            wide=wide(4, 32 if traits.columns <= 128 else 16, 32),
            query=query(4, 1, 32, 1, 32),
            keys=keys(4, 1, 32, 32, 2),
        )
    # In the same run: 266 at a group of 64, 208 at 8, 163 at 1, of 2.5 times the forward's FLOPs.
    pairs_choice = pairs(4, 2, 64, 64) if traits.group % 64 == 0 else pairs(4, 3, 32, 64)
    return BackwardChoice(
        wide=wide(4, 32, 64),
        query=query(4, 2, 64, 1, 64),
        keys=keys(4, 2, 64, 64, 1),
        query_with_parts=query(4, 3, 16, 4, 32) if traits.group < 8 else None,
        pairs=pairs_choice if traits.group >= 32 else None,
    )


def _reads_by_descriptor(traits: Traits, device: Device) -> bool:
    """Tell whether tiles are read through descriptors; the interpreter takes them too."""
    return traits.is_describable and (device.backend == "cpu" or _is_measured(traits, device))


def _is_measured(traits: Traits, device: Device) -> bool:
    """Tell whether the large tiles were seen to fit and to pay: Hopper, bfloat16, trilinear."""
    return (
        device == Device("cuda", 90)
        and traits.is_bf16
        and traits.columns <= 128
        and traits.form == "trilinear"
    )
