"""kv_bounds from cu_seqlens, document ids and padding masks, against the masks they stand for."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simplex_ops.bounds import (
    kv_bounds_from_cu_seqlens,
    kv_bounds_from_document_ids,
    kv_bounds_from_padding_mask,
)


def _mask(kv_bounds, keys):
    """Rebuild the mask as the module's docstring does."""
    assert kv_bounds.dtype == torch.int32
    assert kv_bounds.is_contiguous()
    start, end = kv_bounds[:, :, :1], kv_bounds[:, :, 1:]
    key = torch.arange(keys, device=kv_bounds.device)
    return (start <= key) & (key < end)


rows_of_documents = st.lists(
    st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=3
)


@given(rows=rows_of_documents, tail=st.integers(0, 4), first=st.integers(0, 2))
def test_cu_seqlens_stand_for_their_documents(rows, tail, first):
    """`first` tokens before the first document and `tail` after the last belong to none."""
    longest = max(map(len, rows))
    edges = torch.tensor([[0, *row, *[0] * (longest - len(row))] for row in rows]).cumsum(1) + first
    length = int(edges.max()) + tail
    expected = torch.zeros(len(rows), length, length, dtype=torch.bool)
    for b, row in enumerate(edges.tolist()):
        for start, end in pairwise(row):
            expected[b, start:end, start:end] = True
    assert torch.equal(_mask(kv_bounds_from_cu_seqlens(edges, length), length), expected)
    one = kv_bounds_from_cu_seqlens(edges[0].int(), length)
    assert torch.equal(_mask(one, length), expected[:1])


@given(rows=rows_of_documents, padding=st.booleans())
def test_document_ids_stand_for_equal_ids(rows, padding):
    sizes = [[max(1, size) for size in row] for row in rows]
    length = max(sum(row) for row in sizes) + padding
    ids = torch.full((len(rows), length), -1)
    for b, row in enumerate(sizes):
        flat = [7 * d % 11 for d, size in enumerate(row) for _ in range(size)]
        ids[b, : len(flat)] = torch.tensor(flat)
    expected = (ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, :, None]
    assert torch.equal(_mask(kv_bounds_from_document_ids(ids), length), expected)


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=4),
    st.sampled_from([torch.bool, torch.int64, torch.int32]),
    st.none() | st.integers(0, 3),
)
def test_a_padding_mask_stands_for_its_real_tokens(rows, dtype, queries):
    keys = max(left + real for left, real in rows) + 1
    mask = torch.zeros(len(rows), keys, dtype=dtype)
    for b, (left, real) in enumerate(rows):
        mask[b, left : left + real] = 1
    n = keys if queries is None else queries
    got = kv_bounds_from_padding_mask(mask, queries)
    assert torch.equal(_mask(got, keys), mask.bool()[:, None].expand(-1, n, -1))


def test_empty_rows_are_valid():
    assert kv_bounds_from_document_ids(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 2)
    assert kv_bounds_from_padding_mask(torch.ones(2, 0, dtype=torch.bool)).shape == (2, 0, 2)
    assert kv_bounds_from_cu_seqlens(torch.tensor([0]), 0).shape == (1, 0, 2)
    nothing = kv_bounds_from_padding_mask(torch.zeros(1, 3, dtype=torch.bool))
    assert (nothing[..., 0] == nothing[..., 1]).all()


def _documents(device):
    edges = torch.tensor([[0, 3, 4, 9], [0, 5, 9, 9]], device=device)
    ids = torch.tensor([[0] * 3 + [1] + [2] * 5, [4] * 5 + [2] * 4], device=device)
    mask = torch.tensor([[0] * 2 + [1] * 7, [1] * 5 + [0] * 4], device=device)
    return (
        (lambda e: kv_bounds_from_cu_seqlens(e, 9), edges),
        (kv_bounds_from_document_ids, ids),
        (kv_bounds_from_padding_mask, mask),
    )


@pytest.mark.parametrize("which", range(3))
def test_compiled_code_makes_the_same_in_one_graph(device, which):
    make, argument = _documents(device)[which]
    compiled = torch.compile(make, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(argument), make(argument.cpu()).to(device))


@pytest.mark.gpu
@pytest.mark.parametrize("which", range(3))
def test_nothing_waits_for_the_gpu(which):
    make, argument = _documents("cuda")[which]
    make(argument)
    torch.cuda.set_sync_debug_mode("error")
    try:
        make(argument)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_both_ways_of_saying_documents_agree(device):
    (from_edges, edges), (from_ids, ids), _ = _documents(device)
    assert torch.equal(from_edges(edges), from_ids(ids))


@pytest.mark.parametrize("far", [9, 2**31, 2**33])
def test_an_edge_beyond_the_row_ends_with_it(far):
    bounds = kv_bounds_from_cu_seqlens(torch.tensor([0, 3, far]), 5)
    assert bounds.tolist() == [[[0, 3]] * 3 + [[3, 5]] * 2]


def test_edges_of_a_byte_serve_a_row_longer_than_255():
    bounds = kv_bounds_from_cu_seqlens(torch.tensor([0, 3, 255], dtype=torch.uint8), 300)
    assert bounds[0, [2, 254, 255]].tolist() == [[0, 3], [3, 255], [255, 255]]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: kv_bounds_from_cu_seqlens(torch.zeros(3), 4), TypeError,
         "cu_seqlens must be of an integer dtype, got torch.float32"),
        (lambda: kv_bounds_from_cu_seqlens(torch.zeros(0, dtype=torch.int32), 4), ValueError,
         r"cu_seqlens must have shape \[documents \+ 1\] or \[batch, documents \+ 1\], got \[0\]"),
        (lambda: kv_bounds_from_document_ids(torch.zeros(3, dtype=torch.int32)), ValueError,
         r"document_ids must have shape \[batch, seq\], got \[3\]"),
        (lambda: kv_bounds_from_document_ids(torch.zeros(1, 3)), TypeError,
         "document_ids must be of an integer dtype, got torch.float32"),
        (lambda: kv_bounds_from_document_ids(torch.tensor([[0, 1, 1], [0, 1, 0]])), ValueError,
         "document_ids must hold each id in one run, got an id that comes back in batch row 1"),
        (lambda: kv_bounds_from_padding_mask(torch.ones(1, 3)), TypeError,
         "mask must be bool or of an integer dtype, got torch.float32"),
        (lambda: kv_bounds_from_padding_mask(torch.ones(3, dtype=torch.bool)), ValueError,
         r"mask must have shape \[batch, keys\], got \[3\]"),
        (lambda: kv_bounds_from_padding_mask(torch.tensor([[0, 1, 1], [1, 0, 1]])), ValueError,
         "mask must have its real tokens in one run, got padding between real tokens in batch row"),
        (lambda: kv_bounds_from_cu_seqlens([0, 3], 4), TypeError,
         "cu_seqlens must be of an integer dtype, got list"),
        (lambda: kv_bounds_from_cu_seqlens(torch.tensor([0, 3]), -1), ValueError,
         "length must be at least 0, got -1"),
        (lambda: kv_bounds_from_document_ids([[0, 1]]), TypeError,
         "document_ids must be of an integer dtype, got list"),
        (lambda: kv_bounds_from_document_ids(torch.zeros(1, 3, dtype=torch.uint16)), TypeError,
         "document_ids must be of an integer dtype, got torch.uint16"),
        (lambda: kv_bounds_from_padding_mask([[1, 0]]), TypeError,
         "mask must be bool or of an integer dtype, got list"),
        (lambda: kv_bounds_from_padding_mask(torch.ones(1, 3, dtype=torch.bool), -1), ValueError,
         "queries must be at least 0, got -1"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_helpers_export_from_two_tokens_up():
    class Ids(torch.nn.Module):
        def forward(self, ids):
            return kv_bounds_from_document_ids(ids)

    ids = torch.tensor([[0, 0, 1, 1, 1, -1], [2, 2, 2, 2, 3, 3]])
    shapes = ({1: torch.export.Dim("n", min=2)},)
    program = torch.export.export(Ids(), (ids,), dynamic_shapes=shapes)
    for n in (2, 3, 6):
        assert torch.equal(program.module()(ids[:, :n]), kv_bounds_from_document_ids(ids[:, :n]))
