"""The device that a command was asked for, or what is wrong with its name."""

from collections.abc import Sequence

import torch
import typer

KINDS = ("cpu", "cuda")


def device_named(name: str = "", kinds: Sequence[str] = KINDS) -> torch.device:
    """Return the device that --device names; "" is a GPU where there is one, else the CPU.

    Args:
        name: a kind, perhaps with an index, as "cuda:1".
        kinds: those that the command runs on.

    Raises:
        typer.BadParameter: another kind, or PyTorch sees no such GPU here.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in kinds or not (index.isdigit() or name == kind):
        raise typer.BadParameter(f"--device must be {' or '.join(kinds)}, got {name!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        instead = ": use --device cpu" if "cpu" in kinds else ""
        raise typer.BadParameter(
            f"--device {name}: this PyTorch ({torch.__version__}) sees no GPU{instead}"
        )
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise typer.BadParameter(
            f"--device {name}: this PyTorch sees {torch.cuda.device_count()} GPUs, from cuda:0"
        )
    return torch.device(name)
