"""Attention of packed queries in chunks is attention under their mask."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from router_tuning.model.packed_attention import ChunkedMask
from router_tuning.model.packing import pack

HEAD_DIM = 4


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
