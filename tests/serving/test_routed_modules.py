"""Routed modules on a flat list of tokens, without vLLM: each token alone says what they must give, and cost."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from router_tuning.model.router import threshold_logit
from router_tuning.serving.routed_modules import (
    KeptQueries,
    Pass,
    RoutedAttention,
    RoutedMLP,
    put_in_front,
    route_module,
)

TOKENS, SIZE = 7, 16


class PlainMLP(nn.Module):
    """As vLLM's: one argument, tokens in a list."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.ran = nn.Linear(SIZE, 3 * SIZE), nn.Linear(3 * SIZE, SIZE), []

    def forward(self, x):
        self.ran.append(len(x))
        return self.down(torch.relu(self.up(x)))


class Cached(nn.Module):
    """vLLM's layer between the projections: here it notes the keys, and attends to the past."""

    attn_backend = SimpleNamespace(forward_includes_kv_cache_update=True)

    def forward(self, query, key, value):
        self.keys = key
        seen = torch.ones(len(query), len(query)).tril().bool()
        return torch.softmax((query @ key.T).masked_fill(~seen, -torch.inf), -1) @ value


class PlainAttention(nn.Module):
    """As vLLM's: projections, the layer with the cache, output projection."""

    def __init__(self):
        super().__init__()
        self.qkv_proj, self.o_proj = nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, SIZE)
        self.attn, self.ran = Cached(), []

    def forward(self, positions, hidden_states):
        output = self.attn(*self.qkv_proj(hidden_states).chunk(3, dim=-1))
        self.ran.append(len(output))
        return self.o_proj(output)


def routed(module, mixin, rank, threshold, always):
    route_module(module, mixin, SIZE, rank)
    module.mod_logit = threshold_logit(threshold)
    with torch.no_grad():
        for parameter in [module.mod_router.weight, *(module.mod_skip.parameters() if module.mod_skip else ())]:
            parameter.normal_()
    module.mod_pass = Pass()
    module.mod_pass.always = always
    return module


def kept(module, hidden):
    """The decision of each token by itself."""
    scores = [float(torch.sigmoid(token @ module.mod_router.weight[0])) for token in hidden]
    threshold = 1 / (1 + torch.tensor(-module.mod_logit).exp().item())
    always = module.mod_pass.always
    return [score >= threshold or (always is not None and bool(always[i])) for i, score in enumerate(scores)]


def skipped(module, token):
    path = module.mod_skip
    if path is None:
        return torch.zeros_like(token)
    return path.bias + (token @ path.down @ path.up if path.down is not None else 0)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rank", [None, 0, 3], ids=["zero", "mean", "low_rank"])
@pytest.mark.parametrize("first", [False, True])
@torch.no_grad()
def test_kept_tokens_run_and_no_others(threshold, rank, first):
    hidden, always = torch.randn(TOKENS, SIZE), (torch.arange(TOKENS) % 4 == 0) if first else None
    mlp, attention = PlainMLP(), PlainAttention()
    whole = {mlp: mlp(hidden), attention: attention(torch.arange(TOKENS), hidden)}
    routed(mlp, RoutedMLP, rank, threshold, always)
    routed(attention, RoutedAttention, rank, threshold, always)
    put_in_front(attention.attn, KeptQueries)
    for module, output in ((mlp, mlp(hidden)), (attention, attention(torch.arange(TOKENS), hidden))):
        keep = kept(module, hidden)
        expected = [whole[module][i] if keep[i] else skipped(module, hidden[i]) for i in range(TOKENS)]
        torch.testing.assert_close(output, torch.stack(expected))
        ran = module.ran[1:]
        assert ran == ([] if module is mlp and not any(keep) else [max(sum(keep), 1)])
    assert len(attention.attn.keys) == TOKENS and attention.attn.mod_places is None
