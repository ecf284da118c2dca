"""The slow, obvious routed model: a dense one whose outputs are masked, recomputed whole for every question.

It shares no code with the engine: hooks on the plain modules compute ``m = 1[σ(W·h) ≥ τ]`` from the router weights
and choose between the module's output and the skip path. Under ``kv_policy="drop"`` the keys of skipped tokens are
masked as well. With gradients it is the relaxed formula ``x + (m + s − stop(s))·F(h)`` in plain autograd.
"""

import itertools
from contextlib import ExitStack, contextmanager

import torch
from tiny_models import random_batch

from router_tuning.model import record_routing


class MaskedReference:
    """A dense model with masks; ``weights[(layer, part)]`` are router weights ``[outputs, d]``.

    ``paths[(layer, part)]`` are skip paths ``(U, V, b)``; with them the first real token of a sequence always runs.
    """

    def __init__(self, model, weights, parts, kv_policy="keep", threshold=0.5, paths=None):
        self.model, self.weights, self.parts, self.paths = model, weights, parts, paths or {}
        self.kv_policy, self.threshold = kv_policy, threshold
        self.held, self.shares, self.real = {}, {}, None

    @torch.no_grad()
    def logits(self, ids, mask=None, hold=False, **inputs):
        """Dense logits under the masks; with ``hold`` the sequence decisions of the first call are kept."""
        if not hold:
            self.held = {}
        return self.outputs(ids, mask, **inputs).logits

    def outputs(self, ids, mask=None, **inputs):
        """All outputs, with gradients."""
        self.real = torch.ones_like(ids).bool() if mask is None or mask.dim() == 4 else mask.bool()
        with self._hooks():
            return self.model(input_ids=ids, attention_mask=mask, use_cache=False, **inputs)

    def scores(self, layer, part, hidden):
        return torch.sigmoid(hidden.float() @ self.weights[layer, part].float().T)

    def decide(self, layer, part, hidden):
        """Decision and score, ``[b, t]`` each."""
        first = self.real & (self.real.cumsum(1) == 1) & ((layer, part) in self.paths)
        if self.parts[part] == "token":
            score = self.scores(layer, part, hidden)[..., 0]
            keep, score = (score >= self.threshold) & self.real | first, torch.where(first, score.detach(), score)
            self.count(layer, part, keep, score, self.real)
            return keep, score
        count = self.real.sum(1, keepdim=True).clamp(min=1)
        score = self.scores(layer, part, (hidden.float() * self.real[..., None]).sum(1) / count)
        now = torch.where(self.real.any(1, keepdim=True), (score >= self.threshold).float(), torch.nan)
        held = self.held.get((layer, part), now)
        self.held[layer, part] = held = torch.where(held.isnan(), now, held)  # a row of padding alone still waits
        self.count(layer, part, held == 1, score, ~held.isnan())
        keep, score = (held == 1).expand(hidden.shape[:2]), score.expand(hidden.shape[:2])
        return keep | first, torch.where(first, score.detach(), score)

    def count(self, layer, part, keep, score, real):
        """The share of real rows, tokens or assignments that run, in the relaxed formula."""
        self.shares[layer, part] = ((keep + score - score.detach()) * real).sum() / real.sum()

    def penalty(self, target):
        """``Σ ReLU(c − target)`` of the last pass."""
        return sum((share - target).relu() for share in self.shares.values())

    def skipped(self, layer, part, hidden):
        """``P(h)``."""
        if (layer, part) not in self.paths:
            return torch.zeros_like(hidden)
        down, up, bias = self.paths[layer, part]
        return hidden @ down @ up + bias

    @contextmanager
    def _hooks(self):
        with ExitStack() as stack:
            for layer, part in self.weights:
                for handle in self._install(layer, part):
                    stack.callback(handle.remove)
            yield

    def _install(self, layer, part):
        block = self.model.model.layers[layer]
        names = {"attn": "self_attn", "mlp": "mlp", "expert": "mlp.experts", "block": ""}
        module, state = block.get_submodule(names[part]), {}

        def drop_keys(keep, kwargs):
            if self.kv_policy == "keep" or self.parts[part] == "sequence" or part == "mlp":
                return kwargs
            tokens = keep.shape[1]
            seen = keep[:, None, None, :] | torch.eye(tokens, dtype=torch.bool)[None, None]
            mask = kwargs["attention_mask"]
            if mask is None:
                mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool)
                mask = mask.tril() if kwargs.get("is_causal", block.self_attn.is_causal) else mask
            if mask.dtype == torch.bool:
                mask = mask & seen
            else:
                mask = mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
            if mask.dtype == torch.bool and self.model.config._attn_implementation == "eager":
                mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
            return {**kwargs, "attention_mask": mask}

        def before(_, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            normed = block.input_layernorm(hidden) if part == "block" and hasattr(block, "input_layernorm") else hidden
            keep, score = self.decide(layer, part, normed)
            path = self.skipped(layer, part, normed)
            state.update(keep=keep[..., None], score=score[..., None], path=hidden + path if part == "block" else path)
            return args, drop_keys(keep, kwargs)

        def after(_, args, output):
            whole = output[0] if isinstance(output, tuple) else output
            merged = torch.where(state["keep"], whole, state["path"])
            if torch.is_grad_enabled():
                merged = merged + (state["score"] - state["score"].detach()) * (whole - state["path"])
            return (merged, *output[1:]) if isinstance(output, tuple) else merged

        def experts_before(_, args):
            hidden, index, weight = args
            score = self.scores(layer, part, hidden).gather(1, index)
            real = self.real.flatten()[:, None].expand_as(score)
            keep = (score >= self.threshold) & real
            self.count(layer, part, keep, score, real)
            return hidden, index, weight * (keep + score - score.detach())

        if part == "expert":
            return (module.register_forward_pre_hook(experts_before),)
        return (
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        )


# ---------------------------------------------------------------- comparing


def close(actual, expected, real, tolerance=1e-4):
    """Logits are the same at real tokens."""
    difference = (actual - expected).abs().amax(-1)[real.bool()].max().item()
    assert difference <= tolerance, f"logits differ by {difference:.2e}"


@torch.no_grad()
def check(model, reference, tolerance=1e-4):
    """The routed model equals its reference on padded batches, whole and through a cache, and alone in a batch."""
    mixed = False
    for rows, padding in ((3, None), (3, "left"), (3, "right"), (1, None)):
        ids, mask = random_batch(rows, padding=padding)
        with record_routing(model) as log:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        mixed |= 0 < log.capacity()["total"] < 1
        close(logits, reference.logits(ids, mask), mask, tolerance)
        if padding != "right":
            check_cached(model, reference, ids, mask, tolerance)
    assert mixed, "the routers must split these inputs, or nothing is tested"


def check_cached(model, reference, ids, mask, tolerance):
    """Chunks and single steps through a cache equal one recomputation, under the decisions of the cache.

    The first chunk may hold nothing of a row but padding: what begins it, and decides on it, then comes later.
    """
    cache = None
    for start, end in itertools.pairwise((0, 3, 10, 11, 12)):
        out = model(input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        expected = reference.logits(ids[:, :end], mask[:, :end], hold=start > 0)
        close(out.logits, expected[:, start:], mask[:, start:end], tolerance)
    assert cache.get_seq_length() == ids.shape[1]
