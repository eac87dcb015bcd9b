"""A mask as ranges of keys: what each query sees, in every shape a mask may have; what is none."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simplex_ops import UnservedMarkError
from simplex_ops.marking.ranges import RANGES_OP


def mask_of(starts: list[int], ends: list[int], keys: int) -> torch.Tensor:
    place = torch.arange(keys)
    start, end = torch.tensor(starts)[:, None], torch.tensor(ends)[:, None]
    return (place >= start) & (place < end)


@given(st.data(), st.integers(1, 5), st.integers(1, 6), st.booleans())
def test_ranges_are_read_from_the_mask_that_they_make(data, queries, keys, additive):
    number = st.integers(0, keys)
    starts = data.draw(st.lists(number, min_size=queries, max_size=queries))
    ends = data.draw(st.lists(number, min_size=queries, max_size=queries))
    mask = mask_of(starts, ends, keys)
    if additive:
        hidden = data.draw(st.sampled_from([float("-inf"), torch.finfo(torch.bfloat16).min]))
        mask = torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, hidden)
    shape = data.draw(st.sampled_from([(), (1,), (3,), (1, 1), (2, 1), (2, 3)]))
    found = RANGES_OP(mask.expand(*shape, -1, -1), 2, queries, keys, is_causal=False)
    assert found.shape == (2, queries, 2)
    assert found.dtype == torch.int32
    for row in found.tolist():
        for (start, end), s, e in zip(row, starts, ends, strict=True):
            assert (start, end) == ((s, e) if s < e else (0, 0))


def test_one_row_of_keys_is_for_all_queries():
    padding = torch.tensor([[True, True, False], [False, True, True]])[:, None, None]
    found = RANGES_OP(padding, 2, 4, 3, is_causal=False)
    assert found.tolist() == [[[0, 2]] * 4, [[1, 3]] * 4]


def test_no_keys_and_no_queries_are_ranges():
    for queries, keys in ((3, 0), (0, 3), (0, 0)):
        mask = torch.ones(queries, keys, dtype=torch.bool)
        assert (
            RANGES_OP(mask, 2, queries, keys, is_causal=False).tolist() == [[[0, 0]] * queries] * 2
        )


CAUSAL = torch.ones(4, 4, dtype=torch.bool).tril()
HOLE = CAUSAL.clone()
HOLE[3, 1] = False


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (HOLE, r"keys that are not one range"),
        (~CAUSAL, r"keys after it.*mark it with is_causal=False"),
        (torch.stack((CAUSAL, HOLE)), r"differs from head to head"),
        (torch.randn(4, 4), r"adds numbers other than 0 and the smallest"),
        (torch.full((4, 4), float("nan")), r"adds numbers other than 0 and the smallest"),
        (torch.zeros(4, 4).masked_fill(~CAUSAL, -1e4), r"adds numbers other than 0"),
    ],
)
def test_what_is_no_range_is_refused(mask, text):
    with pytest.raises(UnservedMarkError, match=text):
        RANGES_OP(mask, 2, 4, 4)


def test_the_operator_is_what_its_fake_says():
    torch.library.opcheck(RANGES_OP, (CAUSAL, 2, 4, 4), {"is_causal": True})
