"""Each bug that a peer has, and that this operator must not: the label is the peer's.

L: lucidrains/simplicial-attention 0.1.6. F: FBGEMM's experimental simplicial_attention.

Tested elsewhere, each where its kind is:
L5, L6: work done twice, in an order that changes. test_laws.py, the same call gives the same bits
F11: a wheel without its inner packages. test_packaging.py, the wheel holds the three packages whole
F13: FLOPs undercounted. test_functional.py, the FLOPs counted are those of visible pairs
L11, causal attention refused for three sets of keys or more, has nothing here to be tested on.
"""

import pytest
import torch

from simplex_ops import SimplicialAttention, reference, simplicial_attention
from simplex_ops.testing import Case, Problem, assert_matches_reference, run_attn

pytestmark = pytest.mark.usefixtures("poisoned_memory")

attn = torch.ops.simplex.attn


# L1: head_dim above 64 silently wrong, upper channels never written
@pytest.mark.parametrize("head_dim", [65, 80, 128, 256])
def test_L1_large_heads(head_dim, device):
    case = Case(1, 1, 2, 12, head_dim=head_dim, w1=8, w2=3, through="both")
    assert_matches_reference(case, device=device)


# L2: w2 above 32 gave wrong dq, dk2 and dv2; F8: the backward asserted w2 == 32
@pytest.mark.parametrize(("w1", "w2"), [(8, 16), (8, 33), (40, 48), (3, 64), (32, 256)])
def test_L2_F8_any_second_window(w1, w2, device):
    case = Case(1, 1, 1, 66, head_dim=8, w1=w1, w2=w2, through="both")
    assert_matches_reference(case, device=device)


# L3: not causal right only up to 64 tokens; the backward never
@pytest.mark.parametrize("seq", [48, 64, 70, 128])
def test_L3_not_causal(seq, device):
    case = Case(1, 1, 1, seq, head_dim=8, w1=9, w2=4, is_causal=False, through="both")
    assert_matches_reference(case, device=device)


# L4: a ragged N wrote out of bounds
@pytest.mark.parametrize("seq", [1, 17, 63, 65])
def test_L4_ragged_lengths(seq, device):
    assert_matches_reference(Case(1, 2, 1, seq, w1=9, w2=4, through="both"), device=device)


# L4: q's strides were used for k and v; F: k1's batch stride for all four
@pytest.mark.parametrize("which", range(5))
def test_L4_strides_of_each_input_are_its_own(which, device):
    case = Case(2, 2, 2, 11, head_dim=6, w1=5, w2=3, through="both")
    problem = Problem.of(case, device)
    inputs = list(problem.inputs)
    wide = inputs[which].new_full((11, 3, 4, 12, 2), torch.nan)  # N, B, H, D, and a gap
    heads = inputs[which].shape[1]
    view = wide[:, :2, :heads, :6, 0].permute(1, 2, 0, 3)
    inputs[which] = view.copy_(inputs[which])
    assert not inputs[which].is_contiguous()
    odd = Problem(tuple(inputs), problem.windows, problem.options, problem.dout, problem.dlse)
    assert_matches_reference(odd, device=device)


# L7: the module was causal whatever it was told
def test_L7_a_layer_that_is_not_causal_is_not(device):
    torch.manual_seed(0)
    x = torch.randn(1, 9, 16, device=device)
    later = x.clone()
    later[:, 6:] += 1.0
    for is_causal in (True, False):
        layer = SimplicialAttention(16, 2, window=(5, 3), is_causal=is_causal, device=device)
        feels = not torch.allclose(layer(x)[:, :6], layer(later)[:, :6])
        assert feels != is_causal


# L8: a value_dim of its own crashed
@pytest.mark.parametrize(("head_dim", "value_dim"), [(8, 24), (24, 8), (7, 1), (1, 7)])
def test_L8_values_have_a_size_of_their_own(head_dim, value_dim, device):
    case = Case(1, 1, 2, 12, head_dim=head_dim, value_dim=value_dim, w1=8, w2=3, through="both")
    assert_matches_reference(case, device=device)


# L9: a mask lacked the head axis, and was silently wrong where B = H
def test_L9_bounds_belong_to_batch_rows_not_to_heads(device):
    case = Case(3, 1, 3, 9, w1=7, w2=4, bounds="ranges", through="both")
    assert_matches_reference(case, device=device)


# L10: N != M returned another length
@pytest.mark.parametrize(("seq", "keys"), [(1, 5), (5, 9), (9, 5)])
def test_L10_out_has_as_many_rows_as_there_are_queries(seq, keys, device):
    case = Case(1, 1, 2, seq, keys1=keys, keys2=keys, w1=4, w2=2, through="both")
    got = assert_matches_reference(case, device=device)
    assert got["out"].shape[2] == seq


# F1: biases accepted and never used in the forward
@pytest.mark.parametrize(("k2_bias", "v2_bias"), [(1.0, 0.0), (0.0, 1.0), (0.125, 1.0)])
def test_F1_biases_are_used(k2_bias, v2_bias, device):
    case = Case(1, 1, 2, 12, w1=6, w2=3, k2_bias=k2_bias, v2_bias=v2_bias, through="both")
    got = assert_matches_reference(case, device=device)
    assert (got["out"] - attn(*case.inputs(device), 6, 3)[0]).abs().max() > 1e-2


# F2: an explicit 0.0 was read as "use the default"
def test_F2_zero_is_a_number(device):
    inputs = Case(1, 1, 2, 12).inputs(device)
    plain = attn(*inputs, 6, 3)[0]
    assert torch.equal(attn(*inputs, 6, 3, k2_bias=0.0, v2_bias=0.0)[0], plain)
    assert not torch.allclose(attn(*inputs, 6, 3, scale=0.0)[0], plain)
    layer = SimplicialAttention(16, 2, k2_bias=0.0, v2_bias=0.0, device=device)
    assert (layer.k2_bias, layer.v2_bias) == (0.0, 0.0)
    assert (layer(torch.randn(1, 5, 16, device=device)) == 0).all()  # v2 = 0 and no bias


# F3: the saved statistic was neither base 2 nor natural
@pytest.mark.parametrize("amplitude", [1.0, 8.0])
def test_F3_lse_is_a_natural_logarithm(amplitude, device):
    case = Case(2, 1, 2, 14, w1=6, w2=3, amplitude=amplitude, through="lse")
    q, k1, k2, *_ = (t.double() for t in case.inputs(device))
    k1, k2 = (t.expand(2, 2, 14, 8) for t in (k1, k2))
    s = torch.einsum("bhid,bhjd,bhkd->bhijk", q, k1, k2) / 8**0.5
    distance = torch.arange(14, device=device)[:, None] - torch.arange(14, device=device)
    sees1, sees2 = ((distance >= 0) & (distance < w) for w in (6, 3))
    s = s.masked_fill(~(sees1[:, :, None] & sees2[:, None, :]), -torch.inf)
    expected = s.flatten(3).exp().sum(-1).log()
    lse = attn(*case.inputs(device), 6, 3)[1]
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-5)


# F4: the module's backward always crashed
def test_F4_a_layer_can_be_trained(device):
    layer = SimplicialAttention(16, 2, window=(5, 3), device=device)
    layer(torch.randn(2, 9, 16, device=device)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


# F5: every head read key-value head 0; F6: the backward took Hkv for H
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_F5_F6_each_head_has_its_key_value_head(kv_heads, group, device):
    case = Case(2, kv_heads, group, 10, w1=6, w2=3, through="both")
    assert_matches_reference(case, device=device)


# F7: delta of batch rows after the first was lost
@pytest.mark.parametrize("batch", [2, 3])
def test_F7_every_batch_row_has_its_delta(batch, device):
    case = Case(batch, 2, 2, 10, w1=6, w2=3, through="both")
    whole = run_attn(attn, Problem.of(case, device))
    problem = Problem.of(case, device)
    assert problem.dout is not None
    assert problem.dlse is not None
    for b in range(batch):
        row = Problem(
            tuple(t[b : b + 1] for t in problem.inputs), problem.windows, problem.options,
            problem.dout[b : b + 1], problem.dlse[b : b + 1],
        )  # fmt: skip
        for name, value in run_attn(attn, row).items():
            torch.testing.assert_close(whole[name][b : b + 1], value, msg=lambda t, n=name: n + t)


# F7: dout was read by the strides of out
def test_F7_dout_has_strides_of_its_own(device):
    problem = Problem.of(Case(2, 1, 3, 9, w1=5, w2=3, through="both"), device)
    assert problem.dout is not None
    gap = torch.full((9, 2, 3, 16), torch.nan, device=device)
    view = gap[..., ::2].permute(1, 2, 0, 3)
    view.copy_(problem.dout)
    # a sum of out hands over an expanded dout, stride 0 everywhere
    ones = torch.ones((), device=device).expand(problem.dout.shape)
    for dout in (view, ones):
        odd = Problem(problem.inputs, problem.windows, problem.options, dout, problem.dlse)
        dense = Problem(
            problem.inputs, problem.windows, problem.options, dout.contiguous(), problem.dlse
        )
        for (name, a), b in zip(
            run_attn(attn, odd).items(), run_attn(attn, dense).values(), strict=True
        ):
            torch.testing.assert_close(a, b, msg=lambda t, n=name: n + t)


# F8: the backward did not exchange the axes that the forward exchanged
@pytest.mark.parametrize(("w1", "w2"), [(9, 2), (2, 9), (5, 5)])
def test_F8_either_window_may_be_the_wider(w1, w2, device):
    case = Case(1, 1, 2, 20, w1=w1, w2=w2, k2_bias=0.5, v2_bias=1.0, through="both")
    assert_matches_reference(case, device=device)


# F9: statistics in bfloat16, and dq in another dtype than q
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_F9_dtypes_stay_what_they_are(dtype, device):
    got = run_attn(attn, Problem.of(Case(seq=9, dtype=dtype, through="both"), device))
    statistic = torch.float64 if dtype == torch.float64 else torch.float32
    for name, value in got.items():
        assert value.dtype == (statistic if name == "lse" else dtype), name


# F9: float32 lost its precision on the way
def test_F9_float32_stays_float32(device):
    """Far below what TF32 or bfloat16 on the way would leave: 1e-3 and 8e-3."""
    case = Case(1, 1, 4, 24, head_dim=64, w1=16, w2=4, through="both")
    problem = Problem.of(case, device)
    got, exact = run_attn(attn, problem), run_attn(reference.attn, problem.to(torch.float64))
    for name, value in got.items():
        error = (value.double() - exact[name]).abs().max() / exact[name].abs().max()
        assert error < 5e-6, name


# F10: "strassen" computed the triple product
def test_F10_forms_are_three(device):
    inputs = Case(1, 1, 2, 10).inputs(device)
    outs = [
        simplicial_attention(*inputs, form=form)
        for form in ("trilinear", "determinant", "strassen")
    ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(outs[a], outs[b], atol=1e-2)


# F: H below 16 or not a power of two, D not a power of two
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(1, 12, 24), (4, 3, 33), (1, 7, 9)])
def test_F_sizes_need_not_be_powers_of_two(kv_heads, group, head_dim, device):
    case = Case(1, kv_heads, group, 9, head_dim=head_dim, w1=5, w2=3, through="both")
    assert_matches_reference(case, device=device)


# F: hidden pairs scored -1e6, more than visible ones may
@pytest.mark.parametrize(("w1", "w2", "is_causal"), [(4, 2, True), (2, 4, True), (3, 2, False)])
def test_F_hidden_pairs_weigh_nothing_however_low_the_visible(w1, w2, is_causal, device):
    q, k1, k2, v1, v2 = Case(1, 1, 2, 12, head_dim=4).inputs(device)
    low = torch.ones_like(q) * 1e4, -1e4 * torch.ones_like(k1), torch.ones_like(k2)  # s = -2e8
    out, lse = attn(*low, v1, v2, w1, w2, is_causal=is_causal)
    assert (lse < -1e8).all()
    average, _ = attn(q, k1, k2, v1, v2, w1, w2, is_causal=is_causal, scale=0.0)
    torch.testing.assert_close(out, average)


# F12: bfloat16 was judged by bfloat16
@pytest.mark.parametrize("form", ["trilinear", "determinant", "strassen"])
def test_F12_float64_judges_bfloat16(form, device):
    """As near to float64 as bfloat16 storage allows, not as near as bfloat16 arithmetic."""
    case = Case(2, 1, 4, 24, head_dim=48, w1=16, w2=4, form=form, dtype=torch.bfloat16,
                through="both")  # fmt: skip
    problem = Problem.of(case, device)
    got, exact = run_attn(attn, problem), run_attn(reference.attn, problem.to(torch.float64))
    for name, value in got.items():
        error = (value.double() - exact[name]).norm() / exact[name].norm()
        assert error < 1.5e-2, name
