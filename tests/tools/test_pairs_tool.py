"""tools.pairs: what it records of a model, what it draws, and what a two-hop model attends to."""

import pytest
import torch
from torch import nn

from simplex_ops import SimplicialAttention
from tools.experiments.hops import SIMPLICIAL, Hops
from tools.experiments.model import Shape
from tools.experiments.train import Setting, Training, train
from tools.pairs import calls_of, draw, draw_query, edges_in_order, heaviest_is_next_two, next_two


class TwoHops(nn.Module):
    """One head whose logit says that k follows j and j follows the query, built by hand."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self.nodes = nodes
        self.attention = SimplicialAttention(
            2 * nodes, 1, window=None, form="strassen", is_causal=False, scale=30.0,
            k2_bias=0.0, v2_bias=0.0,
        )  # fmt: skip
        source, target = torch.eye(2 * nodes).split(nodes)
        nothing = torch.zeros(nodes, 2 * nodes)
        a = self.attention
        a.q_proj.weight.data = torch.cat((target, nothing))
        a.k1_proj.weight.data = torch.cat((source, target))
        a.k2_proj.weight.data = torch.cat((nothing, source))

    def forward(self, edges):
        return self.attention(nn.functional.one_hot(edges, self.nodes).flatten(-2).float())


def test_the_pairs_of_a_head_built_for_two_hops_are_the_next_two_edges(tmp_path):
    task = Hops(2, nodes=6)
    edges = task.draw(5, torch.Generator().manual_seed(0))[0]
    (call,) = calls_of(TwoHops(6), edges)
    pairs = call.pairs(top=3)
    assert heaviest_is_next_two(pairs, edges).all()
    assert (torch.stack((pairs.j, pairs.k), -1)[:, 0, :, 0] == next_two(edges)).all()
    assert pairs.weight[..., 0].min() > 0.99
    labels = [str(edge) for edge in edges[0].tolist()]
    draw([pairs], labels, tmp_path / "all.png", title="")
    draw_query(pairs, labels, 2, tmp_path / "one.png", title="")
    for name in ("all.png", "one.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_edges_stand_in_the_order_in_which_they_follow():
    edges = edges_in_order(Hops(2, nodes=9), torch.Generator().manual_seed(1))
    assert sorted(edges[0, :, 0].tolist()) == list(range(9))
    follows = edges[0, 1:, 0] == edges[0, :-1, 1]
    assert follows.sum() >= 5


def test_a_model_without_a_2_simplicial_layer_is_refused():
    with pytest.raises(ValueError, match=r"model must call simplicial_attention"):
        calls_of(nn.Linear(2, 2), torch.zeros(1, 2))


def test_a_trained_two_hop_model_attends_first_to_the_next_edge():
    task = Hops(2, nodes=6)
    run = Setting(task, Shape((SIMPLICIAL,)), Training(400), 0)
    model, (result,) = train([run], torch.device("cpu"))
    assert result["learned"]
    edges = task.draw(50, torch.Generator().manual_seed(9))[0]
    (call,) = calls_of(model, edges)
    j = call.pairs(top=1).j[:, 0, :, 0]
    near = next_two(edges)
    on_a_long_cycle = near[..., 1].gather(1, near[..., 0]) != torch.arange(6)
    on_a_long_cycle &= near[..., 1] != torch.arange(6)
    assert (j == near[..., 0])[on_a_long_cycle].float().mean() > 0.9
