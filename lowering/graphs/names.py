"""The name of the module that a node was traced in, as its model calls it."""

import gc

from torch import fx, nn

from lowering import compat


def path_of(node: fx.Node) -> str:
    """Return the path of a node's module from whatever was compiled, as Dynamo noted it."""
    stack = compat.module_stack(node)
    return next(reversed(stack.values())) if stack else "a module traced after a graph break"


def name_in_model(node: fx.Node) -> str:
    """Return the name of a node's module in the outermost module that holds it.

    Where a frame was resumed after a graph break, or layers are compiled one by one, Dynamo's path
    begins somewhere within the model. The search through all live modules is for messages alone.
    """
    stack = compat.module_stack(node)
    if not stack:
        return path_of(node)
    wanted, names = next(reversed(stack)), []
    held: dict[str, tuple[str, str]] = {}  # module: the one that holds it, and under which name
    for module in gc.get_objects():
        if not issubclass(type(module), nn.Module):
            continue
        for name, child in module.__dict__.get("_modules", {}).items():
            if child is not None and name != "_orig_mod":  # torch.compile's wrapper is no part
                held[str(id(child))] = (str(id(module)), name)
    while wanted in held:
        wanted, name = held.pop(wanted)
        names.append(name)
    return ".".join(reversed(names)) or path_of(node)
