"""The families that marking knows, and which of them a module belongs to."""

from torch import nn

from simplex_ops.marking.families.family import Family, Projections
from simplex_ops.marking.families.llama import Llama

FAMILIES: tuple[Family, ...] = (Llama(),)  # asked in this order


def family_of(module: nn.Module) -> tuple[Family, Projections]:
    """Return the first family that can read a module, and its reading.

    Raises:
        TypeError: no family knows the module; the message says what each found missing.
    """
    lacks: list[str] = []
    for family in FAMILIES:
        reading = family.read(module)
        if isinstance(reading, Projections):
            return family, reading
        lacks.append(reading)
    raise TypeError(
        "mark() serves attention modules shaped as Hugging Face's LlamaAttention, got "
        f"{type(module).__name__}: {'; '.join(lacks)}"
    )
