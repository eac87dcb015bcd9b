"""The graphs inside a graph, as checkpoints and regions compiled once make, and their callers."""

from typing import Any

from torch import fx

# Higher-order operators that give a body its inputs as their last arguments, in order, each call
# once. A loop does not: what its body is given changes from turn to turn.
_CALLS_ONCE = ("tag_activation_checkpoint", "invoke_subgraph", "wrap")


class Subgraphs:
    """A graph and all it calls, each graph once.

    `modules` holds, for each, the modules that share it: several for a region compiled once. No
    pass adds or takes away a graph, so one reading serves them all.
    A graph that no node takes is left out: Dynamo keeps the bodies that it inlined.
    """

    def __init__(self, root: fx.GraphModule) -> None:
        self.modules: dict[fx.Graph, list[fx.GraphModule]] = {}
        self._calls: dict[fx.Graph, list[fx.Node]] = {}
        self._bodies: dict[fx.Node, list[fx.Graph]] = {}
        pending = [root]
        while pending:
            module = pending.pop(0)
            holders = self.modules.setdefault(module.graph, [])
            if module in holders:
                continue
            holders.append(module)
            for node in module.graph.find_nodes(op="get_attr"):
                held = getattr(module, str(node.target), None)
                if isinstance(held, fx.GraphModule):
                    self._calls.setdefault(held.graph, []).extend(node.users)
                    for user in node.users:
                        self._bodies.setdefault(user, []).append(held.graph)
                    pending.append(held)

    def bodies_of(self, node: fx.Node) -> list[fx.Graph]:
        """Return the graphs that a node calls."""
        return self._bodies.get(node, [])

    def sources_of(self, node: Any) -> list[fx.Node]:
        """Follow an input of a body to what its callers give; any other node is its own source."""
        calls = self._calls.get(node.graph, [])
        if node.op != "placeholder" or not calls:
            return [node]
        if not all(str(call.target) in _CALLS_ONCE for call in calls):
            return [node]
        inputs = [n for n in node.graph.nodes if n.op == "placeholder"]
        back = inputs.index(node) - len(inputs)
        return [s for call in calls for s in self.sources_of(call.args[back])]
