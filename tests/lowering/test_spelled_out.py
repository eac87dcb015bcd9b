"""Attention that a marked module spells out: what becomes one call, and what is refused."""

import pytest
import spellings
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from passed import passed_alone, refusal_of
from spellings import HIDDEN, Spelling
from tiny_llama import Attention, Residual, randomize, sdpa, states
from torch import Tensor, nn

from lowering import compat
from lowering.backend import serve_marks
from lowering.report import last_report
from simplex_ops import mark
from simplex_ops.marking.call import UnservedMarkError


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def _like(module: nn.Module, attend: object) -> Attention:
    """Return a marked module of the same weights that attends in another way."""
    torch.manual_seed(0)
    other = mark(Attention(attend), window=(5, 3))  # pyright: ignore[reportArgumentType]
    other.load_state_dict(module.state_dict())
    return other


def _marked() -> Attention:
    torch.manual_seed(0)
    return randomize(mark(Attention(), window=(5, 3)))


SPELLINGS = st.builds(
    Spelling,
    products=st.sampled_from([*spellings.PRODUCTS, *spellings.GROUPED]),
    repeat=st.sampled_from([*spellings.REPEATS]),
    scale=st.sampled_from([*spellings.BEFORE, *spellings.AFTER]),
    mask=st.sampled_from([*spellings.MASKS]),
    softmax=st.sampled_from([*spellings.SOFTMAXES]),
    dropout=st.sampled_from([*spellings.DROPOUTS]),
)


@settings(max_examples=20, phases=[Phase.generate])
@given(spelling=SPELLINGS, sizes=st.sampled_from([(12, 2), (12, 4), (4, 3), (5, 1), (4, 4)]))
@torch.no_grad()
def test_a_spelling_computes_what_the_call_does(spelling, sizes):
    torch._dynamo.reset()
    called, x = _marked(), states(*sizes)
    got = passed_alone(_like(called, spelling))(x)
    torch.testing.assert_close(got, called(x), msg=lambda text: f"{spelling}: {text}")
    report = last_report()
    assert len(report.joined) == len(report.rewritten) == 1
    assert len(report.folded) == (spelling.products in spellings.PRODUCTS)


def test_a_spelling_is_read_where_sizes_are_symbolic():
    called, spelling = _marked(), Spelling("bmm", "expand", "/ s", "where", "method", "p=0")
    run = passed_alone(_like(called, spelling), dynamic=True)
    for sizes in ((12, 2), (7, 3)):
        torch.testing.assert_close(run(states(*sizes)), called(states(*sizes)))


def test_gradients_are_those_of_the_call():
    called = _marked()
    products = "einsum of sequences first"
    spelling = Spelling(products, "repeat_interleave", "both", "added", "float32 and back", "none")
    spelled = _like(called, spelling)
    for run in (called, passed_alone(spelled)):
        run(states()).square().sum().backward()
    for (name, got), wanted in zip(spelled.named_parameters(), called.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_numbers_are_widened_and_narrowed_as_the_call_does_it():
    def attend(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        s = q.float() @ k.repeat_interleave(2, 1).float().mT * 8**-0.5
        p = s.masked_fill(_above(s), HIDDEN).softmax(-1)
        return (p @ v.repeat_interleave(2, 1).float()).to(q.dtype)

    called = _marked().to(torch.bfloat16)
    spelled = _like(_marked(), attend).to(torch.bfloat16)
    x = states().to(torch.bfloat16)
    assert torch.equal(passed_alone(spelled)(x), called(x))


def test_one_head_needs_no_axis():
    def attend(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        q, k, v = q.flatten(1, 2), k[:, 0], v[:, 0]  # [B, N, D]
        s = q @ k.mT / 8**0.5
        return ((s + torch.full(s.shape[-2:], HIDDEN).triu(1)).softmax(-1) @ v)[:, None]

    class OneHead(Attention):
        def __init__(self, attend: object = None) -> None:
            super().__init__(attend)  # pyright: ignore[reportArgumentType]
            self.q_proj = self.k_proj = self.v_proj = nn.Linear(32, 8, bias=False)
            self.o_proj = nn.Linear(8, 32, bias=False)

    called = randomize(mark(OneHead(), window=(5, 3)))
    spelled = mark(OneHead(attend), window=(5, 3))
    spelled.load_state_dict(called.state_dict())
    torch.testing.assert_close(passed_alone(spelled)(states()), called(states()))


def _above(s: Tensor) -> Tensor:
    return torch.ones(s.shape[-2:], dtype=torch.bool).triu(1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scores=lambda s: s, weights=lambda p: p, dim=-1, hide=True
) -> Tensor:
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    s = q @ k.mT * 8**-0.5
    s = scores(s.masked_fill(_above(s), HIDDEN) if hide else s)
    return weights(s.softmax(dim)) @ v


_BIAS, _TEMPERATURE = nn.Parameter(torch.zeros(12, 12)), nn.Parameter(torch.ones(()))


def _without_gradients(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    with torch.no_grad():
        s = q @ k.mT
        p = s.masked_fill(_above(s), HIDDEN).softmax(-1)
    return p @ v


NEAR_MISSES = {
    "a factor on P": (
        lambda q, k, v, **_: _attend(q, k, v, weights=lambda p: p * torch.ones(4, 1, 1)),
        "its attention weights are multiplied or filled (mul",
    ),
    "softcap": (
        lambda q, k, v, **_: _attend(q, k, v, scores=lambda s: torch.tanh(s / 50) * 50),
        "its attention scores pass through tanh, as a softcap does",
    ),
    "softmax over the queries": (
        lambda q, k, v, **_: _attend(q, k, v, dim=-2),
        "its softmax does not run over the keys whose values are summed",
    ),
    "softmax over the heads": (
        lambda q, k, v, **_: _attend(q, k, v, dim=1),
        "its softmax runs over axis 1 of the scores, which are not keys",
    ),
    "P used twice": (
        lambda q, k, v, **_: _attend(q, k, v, weights=lambda p: p / p.sum(-1, keepdim=True)),
        "its attention weights are used 2 times",
    ),
    "scores used twice": (
        lambda q, k, v, **_: _attend(q, k, v, scores=lambda s: s - s.amax(-1, keepdim=True)),
        "its attention scores are used twice",
    ),
    "hides nothing": (
        lambda q, k, v, **_: _attend(
            q, k, v, scores=lambda s: s.masked_fill(_above(s), -5.0), hide=False
        ),
        "its attention scores are -5 in the end where a mask says so, which does not hide",
    ),
    "a temperature": (
        lambda q, k, v, **_: _attend(q, k, v, scores=lambda s: s * _TEMPERATURE),
        "its attention scores are multiplied by what is no constant",
    ),
    "a trained bias": (
        lambda q, k, v, **_: _attend(q, k, v, scores=lambda s: s + _BIAS),
        "it is an additive bias that is trained",
    ),
    "relative positions": (
        lambda q, k, v, **_: _attend(q, k, v, scores=lambda s: s + q.mean(-1, keepdim=True)),
        "is made from the module's input, as relative positions",
    ),
    "a sink": (
        lambda q, k, v, **_: _attend(
            q, k, v, scores=lambda s: F.pad(s, (0, 1)), weights=lambda p: p[..., :-1]
        ),
        "its softmax is of no product of queries and keys that the pass can read",
    ),
    "dropout": (
        lambda q, k, v, **_: _attend(q, k, v, weights=lambda p: F.dropout(p, 0.25)),
        "its attention dropout is 0.25",
    ),
    "not causal": (
        lambda q, k, v, **_: _attend(q, k, v, hide=False),
        "its attention hides no keys, and the module was marked with is_causal=True",
    ),
    "shown again by a factor": (
        lambda q, k, v, **_: _attend(
            q, k, v, scores=lambda s: s.masked_fill(_above(s), -1e4) / 8**4, hide=False
        ),
        "its attention scores are -2.44141 in the end where a mask says so",
    ),
    "weights without gradients": (
        _without_gradients,
        "its attention weights are made without gradients",
    ),
    "turned after it was masked": (
        lambda q, k, v, **_: _attend(q, k, v, scores=lambda s: s * -1.0),
        "its attention scores are multiplied by -1.0 after they were masked",
    ),
    "weights that are cut": (
        lambda q, k, v, **_: _attend(q, k, v, weights=lambda p: p[..., :, :]),
        "its attention weights pass through getitem",
    ),
    "another function than softmax": (
        lambda q, k, v, **_: (q @ k.repeat_interleave(2, 1).mT).relu() @ v.repeat_interleave(2, 1),
        "no scaled_dot_product_attention in its graph takes its query",
    ),
    "keys in the order of tiles": (
        lambda q, k, v, **o: sdpa(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), **o),
        "key has 4 heads and k2 has 2",
    ),
    "keys and values in two orders": (
        lambda q, k, v, **o: sdpa(q, k.repeat_interleave(2, 1), v.repeat(1, 2, 1, 1), **o),
        "key has 4 heads and k2 has 2",
    ),
    "keys of permuted heads": (
        lambda q, k, v, **o: sdpa(
            q, *(t[:, [1, 0], None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v)), **o
        ),
        "key has 4 heads and k2 has 2",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_refused(name):
    attend, text = NEAR_MISSES[name]
    assert text in refusal_of(mark(Attention(attend)), states())
    assert last_report().joined == () or name in ("a trained bias", "dropout")


def test_numbers_that_are_added_are_refused_when_they_are_seen():
    def attend(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        slopes = -torch.arange(12.0).sub(torch.arange(12.0)[:, None]).abs()
        return _attend(q, k, v, scores=lambda s: s + slopes)

    with pytest.raises(UnservedMarkError, match="adds numbers other than 0 and the smallest"):
        passed_alone(mark(Attention(attend)))(states())


def test_attention_that_is_not_causal_is_served_once_marked_so():
    def attend(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        return _attend(q, k, v, hide=False)

    called = randomize(mark(Attention(is_causal=False), window=(5, 3), is_causal=False))
    spelled = mark(Attention(attend), window=(5, 3), is_causal=False)
    spelled.load_state_dict(called.state_dict())
    torch.testing.assert_close(passed_alone(spelled)(states()), called(states()))


def test_what_is_not_marked_stays_as_it_is():
    def attend(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        return _attend(q, k, v)

    graphs = []

    def passed(gm, example_inputs):
        before = [str(n) for n in gm.graph.nodes if "blocks.1" in str(compat.paths_of(n))]
        serve_marks(gm)
        graphs.append([before, [str(n) for n in gm.graph.nodes if str(n) in before]])
        return gm

    stack = Residual(mark(Attention(attend), window=(5, 3)), Attention(attend))
    run = torch.compile(stack, backend=passed, fullgraph=True)
    x = states()
    middle = x + passed_alone(stack.blocks[0])(x)
    torch.testing.assert_close(run(x), middle + stack.blocks[1](middle))
    ((before, after),) = graphs
    assert before == after
    assert "softmax" in " ".join(after)


@pytest.mark.parametrize("repeat", spellings.REPEATS)
def test_repeated_keys_of_a_call_are_folded_back(repeat):
    def attend(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        k, v = spellings.REPEATS[repeat](k), spellings.REPEATS[repeat](v)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    called = _marked()
    torch.testing.assert_close(passed_alone(_like(called, attend))(states()), called(states()))
    assert len(last_report().folded) == 1


class Packed(nn.Module):
    """One projection for queries, keys and values, cut in three in one way or another."""

    def __init__(self, cut: object, attend: object) -> None:
        super().__init__()
        self.qkv, self.cut, self.attend = nn.Linear(32, 96), cut, attend

    def forward(self, x: Tensor) -> Tensor:
        out = self.attend(*self.cut(self.qkv(x)))  # pyright: ignore[reportCallIssue]
        return out.transpose(1, 2).flatten(2)


CUTS = {
    "unbind": lambda t: (p.transpose(1, 2) for p in t.unflatten(-1, (3, 4, 8)).unbind(2)),
    "index": lambda t: t.view(*t.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4),
    "split": lambda t: (p.unflatten(-1, (4, 8)).transpose(1, 2) for p in t.split(32, -1)),
    "heads first": lambda t: (
        p.unflatten(-1, (4, 8)).permute(0, 2, 1, 3) for p in torch.chunk(t, 3, dim=2)
    ),
}


@pytest.mark.parametrize("cut", CUTS)
@torch.no_grad()
def test_as_many_rows_as_heads_are_told_apart(cut):
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))  # [H, B, N, D]
        s = torch.einsum("hbid,hbjd->hbij", q, k) / 8**0.5
        p = s.masked_fill(_above(s), HIDDEN).softmax(-1)
        return torch.einsum("hbij,hbjd->bhid", p, v)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    how = {"window": (5, 3), "kv_heads": 4, "head_dim": 8}
    called = randomize(mark(Packed(CUTS[cut], call), **how))
    spelled = mark(Packed(CUTS[cut], attend), **how)
    spelled.load_state_dict(called.state_dict())
    for batch in (4, 3):
        torch.testing.assert_close(
            passed_alone(spelled)(states(4, batch)), called(states(4, batch))
        )
