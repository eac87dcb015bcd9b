"""The graphs inside a graph, as checkpoints and regions compiled once make, and their callers."""

from typing import Any

from torch import fx


class Subgraphs:
    """A graph and all it calls, each graph once.

    `modules` holds, for each, the modules that share it: several for a region compiled once.
    A graph that no node takes is left out: Dynamo keeps the bodies that it inlined.
    """

    def __init__(self, root: fx.GraphModule) -> None:
        self.modules: dict[fx.Graph, list[fx.GraphModule]] = {}
        self._calls: dict[fx.Graph, list[fx.Node]] = {}
        pending = [root]
        while pending:
            module = pending.pop(0)
            holders = self.modules.setdefault(module.graph, [])
            if module in holders:
                continue
            holders.append(module)
            for node in module.graph.nodes:
                held = getattr(module, str(node.target), None) if node.op == "get_attr" else None
                if isinstance(held, fx.GraphModule):
                    self._calls.setdefault(held.graph, []).extend(node.users)
                    pending.append(held)

    def sources_of(self, node: Any) -> list[fx.Node]:
        """Follow an input of a body to what its callers give; any other node is its own source.

        A higher-order operator takes the body's inputs as its last arguments, in order.
        """
        calls = self._calls.get(node.graph, [])
        if node.op != "placeholder" or not calls:
            return [node]
        inputs = [n for n in node.graph.nodes if n.op == "placeholder"]
        back = inputs.index(node) - len(inputs)
        return [s for call in calls for s in self.sources_of(call.args[back])]
