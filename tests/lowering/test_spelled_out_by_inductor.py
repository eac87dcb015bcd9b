"""Spelled-out attention and keys repeated to all heads, compiled down to code, and run."""

import pytest
import torch
from spellings import Spelling
from tiny_llama import Attention, randomize, states

import lowering
from simplex_ops import mark

SPELLINGS = {
    "matmul": Spelling("matmul", "expand", "* s", "added", "float32 and back", "none"),
    "einsum": Spelling("einsum", "contiguous", "*=", "masked_fill_", "method", "p=0"),
    "bmm": Spelling("bmm", "repeat_interleave", "both", "twice", "F.softmax", "in eval"),
    "groups": Spelling("einsum of groups", "expand", "/ s", "where", "F.softmax", "none"),
    "sequences first": Spelling(
        "einsum of sequences first", "before transposing", "q * s", "tril == 0", "method", "none"
    ),
    "baddbmm": Spelling(
        "baddbmm", "unsqueeze and repeat", "/ full", "where, the other way", "module", "none"
    ),
}
# A C++ compiler takes its time; what differs from spelling to spelling is the pass's work.
EACH = [
    *(pytest.param(name, "cpu", marks=pytest.mark.long) for name in ("matmul", "bmm")),
    pytest.param("groups", "cpu", marks=pytest.mark.slow),
    *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in SPELLINGS),
]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def _two(spelling, device):
    """Return a marked module that calls its attention, and one of its weights that spells it."""
    torch.manual_seed(0)
    called = randomize(mark(Attention(), window=(5, 3)))
    spelled = mark(Attention(spelling), window=(5, 3))
    spelled.load_state_dict(called.state_dict())
    return called.to(device), spelled.to(device)


def _trained(run, module, x):
    """Return the output, and the gradients of the input and of all weights."""
    x = x.clone().requires_grad_()
    out = run(x)
    out.square().sum().backward()
    return {"out": out, "x": x.grad, **{n: p.grad for n, p in module.named_parameters()}}


@pytest.mark.parametrize(("name", "device"), EACH)
def test_it_trains_as_the_call_does(name, device):
    called, spelled = _two(SPELLINGS[name], device)
    run = torch.compile(spelled, backend=lowering.simplex, fullgraph=True)
    for seq in (12, 40):  # the second graph is of symbolic sizes
        x = states(seq).to(device)
        got, wanted = _trained(run, spelled, x), _trained(called, called, x)
        for key, value in wanted.items():
            torch.testing.assert_close(
                got[key], value, rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
            )
        called.zero_grad()
        spelled.zero_grad()
    report = lowering.last_report()
    assert len(report.joined) == len(report.rewritten) == 1
    assert len(report.folded) == (name != "groups")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
@torch.no_grad()
def test_every_mode_answers_as_the_call(mode):
    called, spelled = (module.bfloat16() for module in _two(SPELLINGS["matmul"], "cuda"))
    run = torch.compile(spelled, backend=lowering.simplex, fullgraph=True, mode=mode)
    x = states(40).to("cuda", torch.bfloat16)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(run(x), called(x), rtol=2e-2, atol=2e-2)
