"""The name of the module that a node was traced in, as its model calls it."""

import gc

from torch import fx, nn

from lowering import compat


def path_of(node: fx.Node) -> str:
    """Return the path of a node's module from whatever was compiled, as Dynamo noted it."""
    stack = compat.module_stack(node)
    return next(reversed(stack.values())) if stack else "the compiled module"


def name_in_model(node: fx.Node, made_by_child: fx.Node) -> str:
    """Return the name of a node's module in the outermost module that holds it.

    Where a frame was resumed after a graph break, or layers are compiled one by one, Dynamo's path
    begins somewhere within the model. The search through all live modules is for messages alone.

    Args:
        node: traced in the module.
        made_by_child: what a layer of the module made, whose weight tells the module where Dynamo
            noted none.
    """
    held = _holders()
    stack = compat.module_stack(node)
    wanted = int(next(reversed(stack))) if stack else _holder_of_weight(made_by_child, held)
    names: list[str] = []
    while wanted in held:
        wanted, name = held.pop(wanted)
        names.append(name)
    return ".".join(reversed(names)) or path_of(node)


def _holders() -> dict[int, tuple[int, str]]:
    """Map the id of every live module and weight to that of the module which holds it, and how."""
    held: dict[int, tuple[int, str]] = {}
    for module in gc.get_objects():
        if issubclass(type(module), nn.Module) and "_modules" in module.__dict__:
            children = {**module.__dict__["_modules"], **module.__dict__["_parameters"]}
            children.pop("_orig_mod", None)  # torch.compile's wrapper is no part of the model
            held.update(
                {id(c): (id(module), name) for name, c in children.items() if c is not None}
            )
    return held


def _holder_of_weight(made: fx.Node, held: dict[int, tuple[int, str]]) -> int | None:
    pending, seen = [made], {made}
    while pending:
        node = pending.pop(0)  # nearest first
        weight = compat.weight_of(node)
        if weight is not None and id(weight) in held:
            layer, _ = held[id(weight)]
            return held[layer][0] if layer in held else None
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        pending.extend(new)
    return None
