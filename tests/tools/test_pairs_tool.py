"""tools.pairs: what it records of a model, what it draws, and what a two-hop model attends to."""

import pytest
import torch
import typer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from simplex_ops import SimplicialAttention, mark
from tools.experiments.hops import SHOWN, Hops
from tools.experiments.train import train
from tools.pairs import __main__ as command
from tools.pairs.calls import calls_of
from tools.pairs.next_edges import edges_in_order, heaviest_is_next_two, next_two, weight_by_steps
from tools.pairs.pictures import draw, draw_query

app = typer.Typer()
app.command()(command.main)


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
    edges = edges_in_order(Hops(2, nodes=9), torch.Generator().manual_seed(4))
    assert sorted(edges[0, :, 0].tolist()) == list(range(9))
    follows = edges[0, 1:, 0] == edges[0, :-1, 1]
    ends = [*(~follows).nonzero()[:, 0].tolist(), 8]
    cycles = [end - begin for begin, end in zip([-1, *ends[:-1]], ends, strict=True)]
    assert len(cycles) > 1
    assert cycles == sorted(cycles, reverse=True)
    assert (edges[0, ends, 1] == edges[0, [0, *(n + 1 for n in ends[:-1])], 0]).all()


def test_a_model_without_a_2_simplicial_layer_is_refused():
    with pytest.raises(ValueError, match=r"model must call simplicial_attention"):
        calls_of(nn.Linear(2, 2), torch.zeros(1, 2))


def test_steps_are_counted_along_the_edges():
    task = Hops(2, nodes=6)
    edges = task.draw(5, torch.Generator().manual_seed(3))[0]
    (call,) = calls_of(TwoHops(6), edges)
    by_steps = weight_by_steps(call.pairs(top=36), edges)
    assert by_steps.shape == (1, 6, 6)
    assert by_steps[0, 1, 2] > 0.99


def test_each_query_of_the_trained_two_hop_model_attends_to_the_next_two_edges():
    model, (result,) = train([SHOWN], torch.device("cpu"))
    assert result["learned"]
    edges = SHOWN.task.draw(20, torch.Generator().manual_seed(9))[0]
    (call,) = calls_of(model, edges)
    pairs = call.pairs(top=SHOWN.task.nodes**2)
    assert heaviest_is_next_two(pairs, edges).float().mean() > 0.9
    (by_steps,) = weight_by_steps(pairs, edges)
    assert by_steps[1, 2] > 0.9


def test_a_saved_marked_model_is_drawn_on_a_text(tmp_path, monkeypatch):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 256}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    mark(model.model.layers[1].self_attn, window=(3, 2))
    model.save_pretrained(tmp_path / "saved")
    drawn = []
    monkeypatch.setattr(command, "draw", lambda *args, title: drawn.append((*args, title)))
    arguments = ["--model", str(tmp_path / "saved"), "--text", "a = b\n"]
    result = CliRunner().invoke(app, [*arguments, "--plot", str(tmp_path / "pairs.png")])
    assert result.exit_code == 0, result.output
    ((layers, labels, file, title),) = drawn
    assert labels == ["a", " ", "=", " ", "b", "\\n"]
    (call,) = calls_of(model, input_ids=torch.tensor([list(b"a = b\n")]), use_cache=False)
    (pairs,) = layers
    assert pairs.j.shape == (1, 2, 6, 8)
    torch.testing.assert_close(pairs.weight, call.pairs().weight)
    assert (file, title) == (tmp_path / "pairs.png", r"saved: 'a = b\n'")


def test_a_model_needs_a_text_and_a_text_a_model(tmp_path):
    for arguments in (["--text", "x"], ["--model", str(tmp_path)]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert "--model and --text go together" in result.output
