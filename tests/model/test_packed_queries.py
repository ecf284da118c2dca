"""Tensors that packed queries run on: plain to all but the projections that are spared and attention under a mask."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from router_tuning.model.packed_queries import ChunkedMask, PackedHidden
from router_tuning.model.packing import pack

HEAD_DIM = 4


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return torch.randn(2, 3, 8), torch.randn(16, 8), torch.randn(16, 8)


def test_spared_projections_are_not_computed(tensors):
    plain, spared, other = tensors
    hidden = PackedHidden.of(plain, [spared], HEAD_DIM)
    assert torch.equal(linear(hidden, spared), torch.zeros(2, 3, HEAD_DIM))
    for made in (linear(hidden, other), linear(input=hidden, weight=other)):
        assert torch.equal(made.as_subclass(torch.Tensor), linear(plain, other))
    assert type(linear(hidden, other)) is torch.Tensor


def test_what_is_spared_is_known_through_a_norm_and_a_residual(tensors):
    plain, spared, other = tensors
    hidden = PackedHidden.of(plain, [spared], HEAD_DIM)
    normed = (hidden * hidden.pow(2).mean(-1, keepdim=True).rsqrt()).to(torch.float32)
    assert linear(normed, spared).shape == (2, 3, HEAD_DIM)
    assert linear(plain + normed, spared).shape == (2, 3, HEAD_DIM)
    unwrapped = (hidden + 1).as_subclass(torch.Tensor)
    assert type(unwrapped) is torch.Tensor and torch.equal(linear(unwrapped, spared), linear(plain + 1, spared))


def test_operations_on_several_tensors_give_plain_ones(tensors):
    plain, spared, _ = tensors
    joined = torch.cat([PackedHidden.of(plain, [spared], HEAD_DIM), plain])
    assert torch.equal(linear(joined, spared), linear(torch.cat([plain, plain]), spared))


@pytest.mark.parametrize("counts", [(256, 256), (130, 201), (511, 128)])
@pytest.mark.parametrize("given", [True, False])
def test_attention_in_chunks_is_attention_under_the_mask(counts, given):
    """Whatever the number of queries, which need not be the same in each row nor divide into chunks."""
    draw = torch.Generator().manual_seed(sum(counts))
    tokens = 512
    keep = torch.zeros(2, tokens, dtype=torch.bool)
    for row, count in enumerate(counts):
        keep[row, torch.randperm(tokens, generator=draw)[:count]] = True
    packing = pack(keep, list(counts))
    assert ChunkedMask.pays(packing)
    query = torch.randn(2, 2, max(counts), HEAD_DIM, generator=draw)
    key, value = torch.randn(2, 2, 2, tokens, HEAD_DIM, generator=draw)
    mask = (torch.arange(tokens) <= packing.index[..., None])[:, None]
    chunked = ChunkedMask.of(mask if given else None, packing, tokens)
    made = scaled_dot_product_attention(query, key, value, attn_mask=chunked)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    for row, count in enumerate(counts):
        assert torch.allclose(made[row, :, :count], expected[row, :, :count], atol=1e-6)
    assert type(made) is torch.Tensor and len(chunked.behind) > 1
