"""The graphs inside a graph, as checkpoints and regions compiled once make, and their callers."""

from typing import Any

from torch import fx


class Subgraphs:
    """A graph and all it calls, each graph once.

    `modules` holds, for each, the modules that share it: several for a region compiled once.
    """

    def __init__(self, root: fx.GraphModule) -> None:
        modules: list[fx.GraphModule] = [m for m in root.modules() if isinstance(m, fx.GraphModule)]
        self.modules: dict[fx.Graph, list[fx.GraphModule]] = {}
        for module in modules:
            self.modules.setdefault(module.graph, []).append(module)
        self._calls: dict[fx.Graph, list[fx.Node]] = {}
        for module in modules:
            for node in module.graph.nodes:
                if node.op == "get_attr":
                    held = getattr(module, str(node.target), None)
                    if isinstance(held, fx.GraphModule):
                        self._calls.setdefault(held.graph, []).extend(node.users)

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
