"""attended_pairs against the weights of the reference's definition, all of them at once."""

import pytest
import torch

import simplex_ops.attended
from simplex_ops import attended_pairs, reference, simplicial_attention
from simplex_ops.contract.checks import FORMS


def _problem(seed=0, n=21, m1=21, m2=21, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, n, 7, generator=g, dtype=dtype) * 3
    k1 = torch.randn(2, 2, m1, 7, generator=g, dtype=dtype)
    k2 = torch.randn(2, 2, m2, 7, generator=g, dtype=dtype)
    return q, k1, k2


def _weights(q, k1, k2, w1, w2, **options):
    """Read every weight off the reference: with one-hot values, out is a table of them."""
    rows1, rows2 = k1.shape[2], k2.shape[2]
    eye1 = torch.eye(rows1, dtype=q.dtype).repeat_interleave(rows2, dim=1)
    eye2 = torch.eye(rows2, dtype=q.dtype).repeat(1, rows1)
    v1, v2 = (e.expand(*k1.shape[:2], -1, -1) for e in (eye1, eye2))
    out, _ = reference.attn(q, k1, k2, v1, v2, w1, w2, **options)
    return out.unflatten(-1, (rows1, rows2))  # [B, H, N, M1, M2]


OPTIONS = {
    "plain": {},
    "not causal": {"is_causal": False},
    "k2_bias": {"k2_bias": 1.0},
    "scale": {"scale": 0.7},
    "q_start": {"q_start": torch.tensor([3, -2], dtype=torch.int32)},
    "bounds": {"kv_bounds": torch.tensor([4, 15], dtype=torch.int32).expand(2, 21, 2)},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPTIONS)
def test_the_heaviest_pairs_are_those_of_the_reference(form, name, monkeypatch):
    monkeypatch.setattr(simplex_ops.attended, "LOGITS_AT_ONCE", 256)  # several steps, merged
    q, k1, k2 = _problem()
    found = attended_pairs(q, k1, k2, window=(9, 4), form=form, top=5, **OPTIONS[name])
    expected = _weights(q, k1, k2, 9, 4, form=form, **OPTIONS[name])
    heaviest = expected.flatten(3).topk(5).values
    torch.testing.assert_close(found.weight, heaviest)
    is_pair = found.j >= 0
    assert torch.equal(is_pair, heaviest > 0)
    j, k = found.j.clamp(min=0), found.k.clamp(min=0)
    at = expected.flatten(3).gather(3, j * expected.shape[4] + k)
    torch.testing.assert_close(torch.where(is_pair, at, 0.0), found.weight)
    assert torch.equal(found.k >= 0, is_pair)


def test_all_weights_of_a_query_sum_to_one():
    found = attended_pairs(*_problem(), window=(5, 3), top=15)
    torch.testing.assert_close(found.weight.sum(-1), torch.ones(2, 4, 21, dtype=torch.float64))


def test_pairs_of_different_length_end_at_the_same_position():
    q, k1, k2 = _problem(n=6, m1=11, m2=4)
    found = attended_pairs(q, k1, k2, window=None, top=3)
    heaviest = _weights(q, k1, k2, None, None).flatten(3).topk(3).values
    torch.testing.assert_close(found.weight, heaviest)
    assert (found.k < 4).all()


@pytest.mark.parametrize("window", [None, (3, None), (2**31, None)])
@pytest.mark.parametrize("start", [2**31 - 1, 2**30 + 5, -(2**31)])
def test_q_start_at_the_ends_of_int32(start, window):
    options = {"is_causal": False, "q_start": torch.tensor([start, 0], dtype=torch.int32)}
    q, k1, k2 = _problem(n=6, m1=11, m2=11)
    found = attended_pairs(q, k1, k2, window=window, top=3, **options)
    expected = _weights(q, k1, k2, *(window or (None, None)), **options)
    torch.testing.assert_close(found.weight, expected.flatten(3).topk(3).values)


def test_a_query_that_sees_no_pair_has_none():
    nothing = torch.zeros(2, 21, 2, dtype=torch.int32)
    found = attended_pairs(*_problem(), window=(9, 4), kv_bounds=nothing, top=2)
    assert (found.j == -1).all()
    assert (found.k == -1).all()
    assert (found.weight == 0).all()


def test_no_queries_have_no_pairs():
    found = attended_pairs(*_problem(n=0), top=2)
    assert found.j.shape == (2, 4, 0, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_float32_and_close_in_lower_precision(dtype):
    q, k1, k2 = (t.to(dtype) for t in _problem())
    found = attended_pairs(q, k1, k2, window=(9, 4), top=4)
    exact = _weights(*(t.double() for t in (q, k1, k2)), 9, 4).flatten(3).topk(4).values
    assert found.weight.dtype == torch.float32
    torch.testing.assert_close(found.weight.double(), exact, rtol=1e-4, atol=1e-5)


def test_the_output_is_what_the_pairs_say():
    q, k1, k2 = _problem()
    v1, v2 = torch.randn_like(k1), torch.randn_like(k2)
    out = simplicial_attention(q, k1, k2, v1, v2, window=(4, 3))
    j, k, weight = attended_pairs(q, k1, k2, window=(4, 3), top=12)
    head = torch.arange(4) // 2
    v1, v2 = v1[:, head], v2[:, head]  # [B, H, N, D]
    at = [
        v.unsqueeze(2).expand(-1, -1, 21, -1, -1).gather(
            3, row.clamp(min=0)[..., None].expand(-1, -1, -1, -1, 7)
        )
        for v, row in ((v1, j), (v2, k))
    ]  # fmt: skip
    torch.testing.assert_close((weight[..., None] * at[0] * at[1]).sum(3), out)


def test_no_more_logits_stand_in_memory_than_a_limit(monkeypatch):
    made, plain = [], simplex_ops.attended._Logits.of

    def of(self, j, k):
        made.append(plain(self, j, k))
        return made[-1]

    monkeypatch.setattr(simplex_ops.attended._Logits, "of", of)
    q = torch.randn(1, 1, 320, 8)
    found = attended_pairs(q, q, q, window=None, top=1)
    assert (found.j[0, 0] <= torch.arange(320)[:, None]).all()
    assert max(logits.numel() for logits in made) <= simplex_ops.attended.LOGITS_AT_ONCE
    assert sum(logits.numel() for logits in made) > 320**3 // 4


@pytest.mark.parametrize("top", [0, 1.5, "8"])
def test_a_top_that_counts_no_pairs_is_refused(top):
    with pytest.raises(ValueError, match=rf"top must be an int, at least 1 .*, got {top!r}"):
        attended_pairs(*_problem(), top=top)


def test_a_wrong_k2_is_refused_as_the_operator_does():
    q, k1, k2 = _problem()
    with pytest.raises(ValueError, match="k2 must have"):
        attended_pairs(q, k1, k2[..., :3])
