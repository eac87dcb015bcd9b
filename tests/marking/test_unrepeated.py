"""Keys repeated to all heads, in eager code: served as they were before, or refused."""

import pytest
import spellings
import torch
import torch.nn.functional as F
from tiny_llama import Attention, randomize, states

import simplex_ops
from simplex_ops import UnservedMarkError, mark

REPEATS = {
    **spellings.REPEATS,
    "in another dtype": lambda t: t.double().repeat_interleave(2, 1).to(t.dtype),
    "narrowed after": lambda t: t.repeat_interleave(2, 1).double().float(),
    "copied": lambda t: t.repeat_interleave(repeats=2, dim=1).clone(),
    "broadcast_to": lambda t: t[:, :, None].broadcast_to(len(t), 2, 2, -1, 8).flatten(1, 2),
}


def attending(change):
    """Return a marked module that changes keys and values, and one of its weights that does not."""
    torch.manual_seed(0)
    called = randomize(mark(Attention(), window=(5, 3)))

    def attend(q, k, v, **_):
        return F.scaled_dot_product_attention(q, change(k), change(v), is_causal=True)

    changed = mark(Attention(attend), window=(5, 3))
    changed.load_state_dict(called.state_dict())
    return changed, called


@pytest.mark.parametrize("repeat", REPEATS)
def test_repeated_keys_are_served_as_they_were(repeat):
    changed, called = attending(REPEATS[repeat])
    for module in (changed, called):
        module(states()).square().sum().backward()
    assert torch.equal(changed(states()), called(states()))
    for (name, got), wanted in zip(changed.named_parameters(), called.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, msg=lambda m, name=name: f"{name}: {m}")
    with torch.inference_mode():
        assert torch.equal(changed(states()), called(states()))
    (row,) = simplex_ops.explain(changed, states()).rows
    assert row.served, row


@pytest.mark.parametrize(
    "repeat",
    [
        lambda t: t.expand(-1, 4, -1, -1),
        lambda t: t.repeat(1, 4, 1, 1),
        lambda t: t.repeat_interleave(4, 1),
        lambda t: t[:, :, None].expand(-1, -1, 4, -1, -1).reshape(len(t), 4, -1, 8),
    ],
)
def test_one_head_is_repeated_in_any_way(repeat):
    class OneKeyHead(Attention):
        def __init__(self, attend):
            super().__init__(attend)
            self.k_proj = self.v_proj = torch.nn.Linear(32, 8, bias=False)

    def attend(q, k, v, **_):
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=True)

    changed = randomize(mark(OneKeyHead(attend), window=(5, 3)))
    called = mark(OneKeyHead(None), window=(5, 3))
    called.load_state_dict(changed.state_dict())
    assert torch.equal(changed(states()), called(states()))


def _written(t):
    t = t.repeat_interleave(2, 1)
    t *= 2
    return t


def _source_written(t):
    repeated = t.repeat_interleave(2, 1)
    t.detach().zero_()
    return repeated


def _out_written(t):
    repeated = t.repeat_interleave(2, 1).detach()
    return torch.mul(repeated, 2, out=repeated)


@torch.library.custom_op("simplex_test::halve", mutates_args=("t",))
def _halve(t: torch.Tensor) -> None:
    t.mul_(0.5)


def _operator_written(t):
    wide = t.detach().repeat_interleave(2, 1)
    torch.ops.simplex_test.halve(wide)
    return wide


def _numpy_written(t):
    wide = t.detach().repeat_interleave(2, 1)
    wide.numpy()[:] *= 0.5
    return wide


UNKNOWN = {
    "written into by an operator": _operator_written,
    "written into as an array": _numpy_written,
    "tiles": lambda t: t.repeat(1, 2, 1, 1),
    "permuted heads": lambda t: t[:, [1, 0], None].expand(-1, -1, 2, -1, -1).flatten(1, 2)[:, 1:],
    "scaled after": lambda t: t.repeat_interleave(2, 1) * 2,
    "written into": _written,
    "its source written into": _source_written,
    "written into by out=": _out_written,
    "without gradients": lambda t: t.repeat_interleave(2, 1).detach(),
    "each its own number": lambda t: torch.repeat_interleave(t, torch.tensor([1, 3]), 1),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_to_be_a_repeat_is_refused(name):
    changed, _ = attending(UNKNOWN[name])
    with pytest.raises(UnservedMarkError, match=r"key has \d heads and k2 has 2: keys must keep"):
        changed(states())
