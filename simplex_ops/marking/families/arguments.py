"""The arguments of a call by the names of the module's forward."""

from typing import Any

from torch import nn


def by_name(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: str
) -> dict[str, Any]:
    """Name the arguments of a call of a marked module, of which `wanted` must be one.

    Raises:
        TypeError: they do not fit the module's forward.
    """
    names: Any = module.simplex_arguments
    if len(args) > len(names):
        raise TypeError(
            f"forward of a marked module takes {len(names)} positional arguments "
            f"({', '.join(names)}), got {len(args)}"
        )
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    if len(arguments) != len(args) + len(kwargs):
        raise TypeError("forward of a marked module got an argument by position and by name")
    if wanted not in arguments:
        raise TypeError(f"forward of a marked module was not given {wanted}")
    return arguments
