"""A mask as it is at the sizes of the example: the nodes that it comes from, run on the CPU.

That proves it at these sizes alone: `sizes` are the symbolic ones that were read, and whoever
relies on the mask makes constants of them, so that another size is compiled and proven anew.
"""

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from lowering import compat
from lowering.graphs.not_proven import NotProven


class MaskAtSize:
    """Runs the nodes that a mask comes from."""

    def __init__(self) -> None:
        self.known: dict[fx.Node, Any] = {}
        self.sizes: list[Any] = []

    def value_of(self, wanted: fx.Node) -> Tensor:
        with compat.real_tensors(), torch.random.fork_rng(devices=()):
            before = torch.get_rng_state()
            mask = self._run_all(wanted)
            if not torch.equal(before, torch.get_rng_state()):
                raise NotProven("it is drawn at random")
        if not isinstance(mask, Tensor):
            raise NotProven(f"it is {mask!r}, no tensor")
        return mask

    def _run_all(self, wanted: fx.Node) -> Any:
        pending = [wanted]
        while pending:
            node = pending[-1]
            inputs = [] if _is_number(node) else node.all_input_nodes
            missing = [n for n in inputs if n not in self.known]
            if missing:
                pending.extend(missing)
                continue
            pending.pop()
            if node not in self.known:
                self.known[node] = self._run(node)
        return self.known[wanted]

    def _run(self, node: fx.Node) -> Any:
        if _is_number(node):  # whatever tensor has this size
            return self._at_size(compat.example(node))
        if node.op == "placeholder":
            raise NotProven(f"it depends on the input {node.name}", node)
        if node.op not in ("call_function", "call_method"):
            raise NotProven(f"it depends on {node.op} {node.name}")
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.known[n])
        args, kwargs = tree_map(self._at_size, (args, kwargs))
        try:
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            assert callable(node.target)
            return node.target(*args, **kwargs)
        except Exception as error:  # whatever failed, it is unproven
            raise NotProven(f"{node.name} could not be run ahead of time ({error})") from error

    def _at_size(self, value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if not compat.is_symbolic(value):
            return value
        self.sizes.append(value)
        try:
            return compat.hint(value)
        except Exception as error:  # a size that only running the graph can tell
            raise NotProven(f"its size {value} is known at run time only") from error


def _is_number(node: fx.Node) -> bool:
    found = compat.example(node)
    return not isinstance(found, Tensor) and compat.is_number(found)
