"""The families that marking knows, and which of them a module belongs to."""

from torch import nn

from simplex_ops.marking.families.family import Family, Projections
from simplex_ops.marking.families.gpt2 import GPT2
from simplex_ops.marking.families.llama import Llama
from simplex_ops.marking.families.multi_head import MultiHead
from simplex_ops.marking.families.sized import Sized

_FAMILIES: list[Family] = [Llama(), GPT2(), MultiHead()]  # asked in this order
_GIVEN = (
    "give mark() its kv_heads= and head_dim= where its forward takes [B, N, E] first and calls "
    "scaled_dot_product_attention once, or describe it by register_family()"
)


def register_family(family: Family) -> Family:
    """Let `mark`, `mark_model` and `explain` know another kind of attention module.

    A family is an object with three methods, which `simplex_ops.marking.families.family` describes:
    `read(module)` gives the sizes of its projections, or says what the module lacks;
    `bind(module, args, kwargs)` says which argument is the input, the mask and the cache;
    `run(module, forward, arguments)` calls the module's own forward. It must be hashable and equal
    to its copies, as a frozen dataclass without fields is. It is asked before all families that
    stand already, and once is enough. Returns the family, so it serves as a decorator's core.
    """
    for name in ("read", "bind", "run"):
        if not callable(getattr(family, name, None)):
            raise TypeError(
                f"a family must have read, bind and run, and {family!r} has no {name}: give an "
                "instance of a class with the three methods of "
                "simplex_ops.marking.families.family.Family"
            )
    hash(family)
    if family not in _FAMILIES:
        _FAMILIES.insert(0, family)
    return family


def family_of(
    module: nn.Module, kv_heads: int | None = None, head_dim: int | None = None
) -> tuple[Family, Projections]:
    """Return the first family that can read a module, and its reading.

    Raises:
        TypeError: no family knows the module; the message says what each found missing.
        ValueError: sizes were given that are not those that the family reads.
    """
    _check_sizes(kv_heads, head_dim)
    lacks: list[str] = []
    for family in _FAMILIES:
        reading = family.read(module)
        if isinstance(reading, Projections):
            for name, given in (("kv_heads", kv_heads), ("head_dim", head_dim)):
                read = getattr(reading, name)
                if given is not None and given != read:
                    raise ValueError(
                        f"{name} of a {type(module).__name__} is {read}, got {given}: leave it out"
                    )
            return family, reading
        lacks.append(f"as {type(family).__name__}, {reading}")
    if kv_heads is not None and head_dim is not None:
        sized = Sized(kv_heads, head_dim)
        reading = sized.read(module)
        if isinstance(reading, Projections):
            return sized, reading
        raise TypeError(f"mark() cannot serve a {type(module).__name__}: {reading}")
    raise TypeError(
        f"mark() does not know the attention module {type(module).__name__}: "
        f"{'; '.join(lacks)}. Where it is one, {_GIVEN}"
    )


def _check_sizes(kv_heads: int | None, head_dim: int | None) -> None:
    for name, given in (("kv_heads", kv_heads), ("head_dim", head_dim)):
        whole = isinstance(given, int) and not isinstance(given, bool) and given >= 1
        if given is not None and not whole:
            raise ValueError(f"{name} must be an int of at least 1, or None, got {given!r}")
    if (kv_heads is None) != (head_dim is None):
        raise ValueError(
            "kv_heads and head_dim are given together, for a module of no known family, got "
            f"kv_heads={kv_heads} and head_dim={head_dim}"
        )
