"""The name of the module that a node was traced in, as its model calls it."""

import functools
from typing import Any

from torch import fx, nn

from lowering import compat
from simplex_ops.marking.living import frozen, living
from simplex_ops.marking.marked import is_marked
from simplex_ops.marking.naming import running


def _path_of(node: fx.Node) -> str:
    """Return the path of a node's module from whatever was compiled, as Dynamo noted it."""
    return next(reversed(compat.paths_of(node)), "the compiled module")


class Names:
    """Names of modules as in `marked_modules` of the outermost model, while it is compiled.

    Where layers are compiled one by one, or a frame was resumed after a graph break, Dynamo's path
    begins somewhere within the model; the frames that wait for the compiler hold the model itself.
    They are read when the first name is asked for.
    """

    @functools.cached_property
    def _models(self) -> list[nn.Module]:
        return running()

    @functools.cached_property
    def _within(self) -> int:
        # A frame that waits within a marked module is that module's own: a mark holds no other.
        return next((id(m) for m in reversed(self._models) if is_marked(m)), 0)

    @functools.cached_property
    def _running(self) -> dict[int, str]:
        found: dict[int, str] = {}
        for model in self._models:
            for name, module in model.named_modules():
                found.setdefault(id(module), _without_wrappers(name))
        return found

    def of(self, node: fx.Node) -> str:
        """Name the module that a node was traced in; where no model holds it, by Dynamo's path."""
        return self._running.get(_innermost(node)) or _path_of(node)

    def of_mark(self, mark: fx.Node) -> str:
        """Name the module that emitted a mark, also where Dynamo noted none."""
        return self.of(mark) if compat.modules_of(mark) else self.searched(mark)

    def searched(self, mark: fx.Node) -> str:
        """Name it wherever it is held: among all live modules, which takes a while.

        Where Dynamo noted no module, the weight that k2 was made with tells it.
        """
        wanted = _innermost(mark) or self._within
        if self._running.get(wanted):
            return self._running[wanted]
        k2: fx.Node = mark.args[1]  # pyright: ignore[reportAssignmentType]
        for search in (living, frozen):
            modules = search((nn.Module,))
            held = _holders(modules)
            found = wanted or _holder_of_weight(k2, held)
            name = self._running.get(found) or _name(found, held)
            if name or any(id(module) == found for module in modules):
                break  # where it is not frozen, what holds it need not be looked for there
        return name or _path_of(mark)


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")  # torch.compile's


def _name(wanted: int, held: dict[int, tuple[int, str]]) -> str:
    """Return the name of a module in the outermost one that holds it."""
    names: list[str] = []
    while wanted in held:
        wanted, name = held.pop(wanted)
        names.append(name)
    return ".".join(reversed(names))


def _innermost(node: fx.Node) -> int:
    """Return the id of the module that a node was traced in; 0 where none was noted.

    In a program that torch.export made, a module's key is its name.
    """
    key = next(reversed(compat.modules_of(node)), "")
    number = key.partition("@")[0]  # a region's second call has the key of the first and @1
    return int(number) if number.isdecimal() else 0


def _holders(modules: list[Any]) -> dict[int, tuple[int, str]]:
    """Map the id of every module and weight to that of the module which holds it, and how."""
    held: dict[int, tuple[int, str]] = {}
    for module in modules:
        if "_modules" in module.__dict__:
            children = {**module.__dict__["_modules"], **module.__dict__["_parameters"]}
            children.pop("_orig_mod", None)  # torch.compile's wrapper is no part of the model
            held.update(
                {id(c): (id(module), name) for name, c in children.items() if c is not None}
            )
    return held


def _holder_of_weight(made: fx.Node, held: dict[int, tuple[int, str]]) -> int:
    pending, seen = [made], {made}
    while pending:
        node = pending.pop(0)  # nearest first
        weight = compat.weight_of(node)
        if weight is not None and id(weight) in held:
            layer, _ = held[id(weight)]
            return held[layer][0] if layer in held else 0
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        pending.extend(new)
    return 0
