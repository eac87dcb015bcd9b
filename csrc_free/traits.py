"""What a launch choice may depend on: traits of the problem, and of the device."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch


@dataclass(frozen=True)
class Traits:
    """What a launch choice depends on of the problem."""

    group: int  # query heads of a key-value head
    block_d: int  # columns of q and k in a tile
    block_dv: int  # columns of v in a tile
    dtype: torch.dtype
    form: str
    is_describable: bool  # the wide pair's addresses and strides allow tensor descriptors
    are_rows_describable: bool  # and those of q and dout
    are_keys_aligned: bool = True  # every row of the wide pair begins at a multiple of 16 bytes
    precision: str | None = None  # of matrix products, as `precision_of` says

    @property
    def columns(self) -> int:
        """Return the columns of the wider of the two."""
        return max(self.block_d, self.block_dv)

    @property
    def operand_bytes(self) -> int:
        """Return the bytes of a matrix product's operand: float16 is multiplied as float32.

        In three parts of bfloat16, as "bf16x6" says, it has six.
        """
        if self.precision == "bf16x6":
            return 6
        return 2 if self.dtype == torch.bfloat16 else 4

    @property
    def plain_tile(self) -> tuple[int, int]:
        """Return the rows and keys of a tile, both the same, and its warps, where none is measured.

        Chosen by what the compiler spills. On sm_90, Triton 3.7.1: float32 at 256 columns spills
        40 kB a thread at 32 in 4 warps, and nothing at 16 in 8; at 128 columns 2.8 kB at 32 in 4
        and under 0.1 kB in 8; bfloat16 at 256 columns 1.6 kB in 4 and 0.4 kB in 8.

        Rows of no multiple of 16 bytes take the smallest: in larger ones some answers were wrong
        (DESIGN.md, known limits).
        """
        if not self.are_keys_aligned:
            return 16, 8 if self.columns > 128 else 4
        if self.dtype != torch.bfloat16 and self.columns > 128:
            return 16, 8
        is_large = self.columns > (64 if self.dtype == torch.float32 else 128)
        return 32, 8 if is_large else 4


@dataclass(frozen=True)
class Device:
    """What a launch choice knows of the device."""

    backend: str  # "cuda", "hip" or "cpu" (the interpreter)
    arch: int | str  # as Triton names it: 90 for sm_90, "gfx942"; 0 for the interpreter
    shared_limit: int  # bytes of shared memory that one program may have
    multiprocessors: int = 0  # 0 where nothing was measured that depends on it

    @property
    def is_interpreted(self) -> bool:
        return self.backend == "cpu"

    @property
    def has_tf32(self) -> bool:
        """Tell whether matrix products of float32 can be rounded to TF32: Triton names no other."""
        return self.backend != "hip" or self.arch == "gfx942"

    @property
    def name(self) -> str:
        """Return the architecture's name, e.g. sm_90."""
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)


INTERPRETER = Device("cpu", 0, 2**63, 3)  # so that a small problem is split
# The limits of the CUDA programming guide (most shared memory of a thread block) and of AMD's
# instruction set manuals (LDS of a workgroup); a device that is present is asked.
DEVICES = {
    device.name: device
    for device in (
        Device("cuda", 80, 166_912),
        Device("cuda", 86, 101_376),
        Device("cuda", 89, 101_376),
        Device("cuda", 90, 232_448, 132),
        Device("cuda", 100, 232_448),
        Device("cuda", 120, 101_376),
        Device("hip", "gfx942", 65_536),
        Device("hip", "gfx950", 163_840),
    )
}


@functools.cache
def device_of(device: torch.device) -> Device:
    """Return what launch choices know of a device, asked by index."""
    if device.type == "cpu":
        return INTERPRETER
    from triton.runtime import driver

    # The number that Triton compares a kernel's need to before it launches.
    found = driver.active.utils.get_device_properties(device.index)  # pyright: ignore[reportAttributeAccessIssue]
    limit, multiprocessors = found["max_shared_mem"], found["multiprocessor_count"]
    if torch.version.hip is not None:
        properties = torch.cuda.get_device_properties(device)
        return Device("hip", properties.gcnArchName.split(":")[0], limit, multiprocessors)
    major, minor = torch.cuda.get_device_capability(device)
    return Device("cuda", 10 * major + minor, limit, multiprocessors)


class Config(Protocol):
    """How one kernel is tiled and compiled; a frozen dataclass beside the kernel.

    Its fields are the kernel's constants of these names in upper case, and Triton's num_warps and
    num_stages.
    """

    num_warps: int
    num_stages: int

    def shared_bytes(self, traits: Traits, device: Device) -> int:
        """Return a bound on the shared memory that the kernel needs."""
        ...


AnyConfig = TypeVar("AnyConfig", bound=Config)


def first_that_fits(configs: Iterable[AnyConfig], traits: Traits, device: Device) -> AnyConfig:
    """Return the first config, best first, whose shared memory the device has."""
    needs = []
    for config in configs:
        need = config.shared_bytes(traits, device)
        if need <= device.shared_limit:
            return config
        needs.append(need)
    raise ValueError(
        f"simplex::attn has no kernel for {device.name}: its programs may have "
        f"{device.shared_limit} bytes of shared memory, and the smallest tiles at head_dim "
        f"{traits.columns} take {min(needs)}; use a smaller head_dim, or tensors on the CPU"
    )
