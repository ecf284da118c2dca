"""The slow, obvious routed model: a dense one whose outputs are masked, recomputed whole for every question.

It shares no code with the engine: hooks on the plain modules compute ``m = 1[σ(W·h) ≥ τ]`` from the router weights
and choose between the module's output and the skip path. Under ``kv_policy="drop"`` the keys of skipped tokens are
masked as well.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import torch


class MaskedReference:
    """A dense model with masks; ``weights[(layer, part)]`` are router weights ``[outputs, d]``.

    ``paths[(layer, part)]`` are skip paths ``(U, V, b)``; with them the first real token of a sequence always runs.
    """

    def __init__(self, model, weights, parts, kv_policy="keep", threshold=0.5, paths=None):
        self.model, self.weights, self.parts, self.paths = model, weights, parts, paths or {}
        self.kv_policy, self.threshold = kv_policy, threshold
        self.held = {}
        self.real = None

    @torch.no_grad()
    def logits(self, ids, mask=None, hold=False, **inputs):
        """Dense logits under the masks; with ``hold`` the sequence decisions of the first call are kept."""
        self.real = torch.ones_like(ids).bool() if mask is None or mask.dim() == 4 else mask.bool()
        if not hold:
            self.held = {}
        with self._hooks():
            return self.model(input_ids=ids, attention_mask=mask, use_cache=False, **inputs).logits

    def decide(self, layer, part, hidden):
        """Bool ``[b, t]``."""
        score = torch.sigmoid(hidden.float() @ self.weights[layer, part].float().T)
        if self.parts[part] == "token":
            keep = (score[..., 0] >= self.threshold) & self.real
            return self.with_first(layer, part, keep)
        total = (hidden.float() * self.real[..., None]).sum(1) / self.real.sum(1, keepdim=True)
        score = torch.sigmoid(total @ self.weights[layer, part].float().T)
        now = torch.where(self.real.any(1, keepdim=True), (score >= self.threshold).float(), torch.nan)
        held = self.held.get((layer, part), now)
        self.held[layer, part] = held = torch.where(held.isnan(), now, held)  # a row of padding alone still waits
        return self.with_first(layer, part, (held == 1).expand(hidden.shape[:2]))

    def with_first(self, layer, part, keep):
        """``keep``, and the first real token of each sequence where there is a skip path."""
        first = self.real & (self.real.cumsum(1) == 1)
        return keep | first if (layer, part) in self.paths else keep

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
        decision = {}

        def drop_keys(keep, kwargs):
            if self.kv_policy == "keep" or self.parts[part] == "sequence":
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

        def attn_pre(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            decision["m"] = self.decide(layer, part, hidden)
            decision["P"] = self.skipped(layer, part, hidden)
            return args, drop_keys(decision["m"], kwargs)

        def attn_post(module, args, kwargs, output):
            return (torch.where(decision["m"][..., None], output[0], decision["P"]), *output[1:])

        def mlp_post(module, args, output):
            keep, hidden = self.decide(layer, part, args[0]), args[0]
            return torch.where(keep[..., None], output, self.skipped(layer, part, hidden))

        def block_pre(module, args, kwargs):
            norm = getattr(block, "input_layernorm", None)
            hidden = args[0] if norm is None else norm(args[0])
            decision["m"], decision["P"] = self.decide(layer, part, hidden), self.skipped(layer, part, hidden)
            return args, drop_keys(decision["m"], kwargs)

        def block_post(module, args, kwargs, output):
            return torch.where(decision["m"][..., None], output, args[0] + decision["P"])

        def expert_pre(module, args):
            hidden, index, weight = args
            score = torch.sigmoid(hidden.float() @ self.weights[layer, part].float().T)
            keep = (score.gather(1, index) >= self.threshold) & self.real.flatten()[:, None]
            return hidden, index, weight * keep

        if part == "attn":
            return (
                block.self_attn.register_forward_pre_hook(attn_pre, with_kwargs=True),
                block.self_attn.register_forward_hook(attn_post, with_kwargs=True),
            )
        if part == "mlp":
            return (block.mlp.register_forward_hook(mlp_post),)
        if part == "expert":
            return (block.mlp.experts.register_forward_pre_hook(expert_pre),)
        return (
            block.register_forward_pre_hook(block_pre, with_kwargs=True),
            block.register_forward_hook(block_post, with_kwargs=True),
        )
