"""Marks of a whole model: set, listed, their parameters."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from simplex_ops.marking.families.known import family_of
from simplex_ops.marking.mark import mark, unmark
from simplex_ops.marking.marked import is_marked
from simplex_ops.module import SimplicialAttention


@dataclass(frozen=True)
class Marking:
    """What `mark_model` did, by the modules' names: those it marked, and why it left the others."""

    marked: dict[str, nn.Module] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"marked: {len(self.marked)}", *(f"  - {name}" for name in self.marked)]
        lines += [f"left: {len(self.left)}"]
        lines += [f"  - {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def mark_model(
    model: nn.Module, every: int | Callable[[str, nn.Module], bool] = 4, **how: Any
) -> Marking:
    """Mark several attention modules of a model, and return which, and why not the others.

    Attention modules are those that a family knows, and those whose class is named so; they are
    counted in the order of `model.named_modules()`.

    Args:
        model: holds the attention modules.
        every: 4 marks the fourth, the eighth and so on; a function of (name, module) is asked of
            each attention module, and marks those for which it is true.
        **how: the arguments of `mark`. With `kv_heads` and `head_dim`, which are for modules of no
            known family, the function is asked of every module of the model.

    Raises:
        ValueError: `every` or an argument of `mark` is wrong. No module is then marked.
    """
    whole = isinstance(every, int) and not isinstance(every, bool) and every >= 1
    if not whole and not callable(every):
        raise ValueError(
            "every must be an int of at least 1, or a function of (name, module) that says whether "
            f"to mark it, got {every!r}"
        )
    done = Marking()
    try:
        asked = every if callable(every) and how.get("kv_heads") is not None else None
        for number, (name, module) in enumerate(attention_modules(model, asked), 1):
            chosen = number % every == 0 if isinstance(every, int) else every(name, module)
            reason = _mark_or_say_why(module, how) if chosen else _not_chosen(every, number)
            if reason is None:
                done.marked[name] = module
            else:
                done.left[name] = reason
    except Exception:
        for module in done.marked.values():
            unmark(module)
        raise
    return done


def marked_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the marked modules of a model by name."""
    return {name: module for name, module in model.named_modules() if is_marked(module)}


def simplicial_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that make k2 and v2, of marked modules and of `SimplicialAttention`.

    To train them alone::

        model.requires_grad_(False)
        for parameter in simplicial_parameters(model):
            parameter.requires_grad_(True)
    """
    found: dict[nn.Parameter, None] = {}  # in order, each once
    for module in model.modules():
        names: tuple[str, ...] = ()
        if is_marked(module):
            names = ("simplex_k2", "simplex_v2", "simplex_k2_norm")
        elif isinstance(module, SimplicialAttention):
            names = ("k2_proj", "v2_proj", "k2_norm")
        for child in (getattr(module, name) for name in names):
            if child is not None:
                found.update(dict.fromkeys(child.parameters()))
    return list(found)


def attention_modules(
    model: nn.Module, also: Callable[[str, nn.Module], bool] | None = None
) -> list[tuple[str, nn.Module]]:
    """Return what is an attention module: marked, known, named so, or one that `also` says yes to.

    What stands inside another one is a part of that.
    """
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") or not outer for outer, _ in found):
            continue
        chosen = also is not None and also(name, module)
        if chosen or is_marked(module) or _known(module) or _named_so(module):
            found.append((name, module))
    return found


def _known(module: nn.Module) -> bool:
    try:
        family_of(module)
    except TypeError:
        return False
    return True


def _named_so(module: nn.Module) -> bool:
    # The one that attends, and not the block around it: its class says so, and no child's does.
    kind = type(module).__name__
    ends = kind.endswith(("Attention", "Attn")) and not isinstance(module, SimplicialAttention)
    return ends and not any(
        type(child).__name__.endswith(("Attention", "Attn")) for child in module.children()
    )


def _mark_or_say_why(module: nn.Module, how: dict[str, Any]) -> str | None:
    if is_marked(module):
        return "it is marked already"
    try:
        mark(module, **how)
    except TypeError as error:
        return str(error)
    return None


def _not_chosen(every: Any, number: int) -> str:
    if isinstance(every, int):
        return f"it is number {number}, and every {every} is marked"
    return "the function that chooses said no"
