"""What a mask is worth: every input under many masks, forward only, with the features that its routers would see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel

from router_tuning.errors import UserError
from router_tuning.model import prompt_length_from, routed_modules
from router_tuning.model.recording import routed_base
from router_tuning.model.routed import Routed
from router_tuning.model.router import pooled_mean
from router_tuning.tuning.recipes.budget.layers import Layerwise

Batch = dict[str, Tensor]
_LOGIT_ROWS = 8192
_FLOOR = -6.0  # nats per token; a mask worse than this is as bad as any other


@dataclass
class Explored:
    """``N`` inputs under ``K`` masks of ``R`` routers.

    Attributes:
        features: per router ``[N, S_r, d]`` float16, what it sees; ``S_r`` states differ by the masks of earlier ones.
        states: per router int64 ``[K]``, the state that each mask leads to.
        masks: bool ``[N or 1, K, R]``.
        proposal: log-probability with which each mask was drawn, ``[N or 1, K]``; 0 where all are listed.
        likelihood: mean log-likelihood of the answer's tokens, ``[N, K]`` nats.
        exact: whether greedy decoding would give the whole answer, bool ``[N, K]``.
    """

    features: list[Tensor]
    states: list[Tensor]
    masks: Tensor
    proposal: Tensor
    likelihood: Tensor
    exact: Tensor

    @property
    def score(self) -> Tensor:
        """Exact match plus clamped likelihood, ``[N, K]``: the first protects generation, the second has no cliffs."""
        return self.exact.float() + self.likelihood.clamp(min=_FLOOR)

    @property
    def kept(self) -> Tensor:
        """Share of the routers that a mask runs, ``[N or 1, K]``."""
        return self.masks.float().mean(-1)


def all_masks(routers: int) -> Tensor:
    """All ``2^R`` masks ``[K, R]``; bit by bit, the first router's the highest."""
    index = torch.arange(2**routers)
    return torch.stack([(index >> (routers - 1 - r)) & 1 for r in range(routers)], dim=1).bool()


def sample_masks(rows: int, count: int, routers: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Masks ``[rows, count, R]`` of all budgets alike, and their log-probability ``[rows, count]``.

    A share u ~ U(0, 1) is drawn per mask, then each router with probability u: a mask that keeps k of R has the
    probability ``k! (R-k)! / (R+1)!``. All and none are always among them.
    """
    share = torch.rand(rows, count, 1, generator=generator)
    masks = torch.rand(rows, count, routers, generator=generator) < share
    masks[:, 0], masks[:, 1] = True, False
    kept = masks.sum(-1).double()
    log_q = torch.lgamma(kept + 1) + torch.lgamma(routers - kept + 1) - math.lgamma(routers + 2)
    return masks, log_q.float()


@torch.no_grad()
def explore(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    max_masks: int = 64,
    seed: int = 0,
    with_features: bool = True,
) -> Explored:
    """Run every batch under all masks if there are at most ``max_masks``, else under as many sampled per input.

    Args:
        model: routed at sequence level; its routers are not asked.
        batches: right-padded ``input_ids, attention_mask, labels [b, t]`` with at least one label each row.
        with_features: keep what the routers see (not needed to score masks alone).
    """
    model.eval()
    routers = list(routed_modules(model).values())
    walk = _Walk(model, routers, with_features)
    listed = 2 ** len(routers) <= max_masks
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for number, batch in enumerate(tqdm(batches, desc="mask search", leave=False)):
        rows = batch["input_ids"].shape[0]
        if listed:
            masks, log_q = all_masks(len(routers))[None], torch.zeros(1, 2 ** len(routers))
        else:
            masks, log_q = sample_masks(rows, max_masks, len(routers), generator)
        part = walk.explore(batch, masks, log_q, listed)
        if number == 0:
            _check(model, batch, part)
        parts.append(part)
    return joined(parts)


class _Walk:
    """Runs one batch under its masks, layer by layer."""

    def __init__(self, model: PreTrainedModel, routers: list[Routed], with_features: bool) -> None:
        if any(router.mod_level != "sequence" for router in routers):
            raise UserError("masks are searched at sequence level; token-level routers are trained by gradient")
        self.model, self.routers, self.with_features = model, routers, with_features
        self.layers = Layerwise(model)
        self.by_layer: dict[int, list[int]] = {}
        for index, router in enumerate(routers):
            self.by_layer.setdefault(router.mod_layer, []).append(index)

    def explore(self, batch: Batch, masks: Tensor, log_q: Tensor, listed: bool) -> Explored:
        ids = batch["input_ids"].to(self.model.device)
        rows, first = ids.shape[0], min(self.by_layer)
        pool = self._pool(batch).to(ids.device)
        states = self.layers.through(0, first, ids)
        width = 1  # states per input
        if not listed:
            width = masks.shape[1]
            states = states.repeat_interleave(width, dim=0)
        features: list[Tensor] = [torch.empty(0)] * len(self.routers)
        index: list[Tensor] = [torch.empty(0)] * len(self.routers)
        done = 0
        for layer in range(first, len(self.layers.layers)):
            here = self.by_layer.get(layer, [])
            if listed and here:
                width *= 2 ** len(here)
                done += len(here)
                states = states.repeat_interleave(2 ** len(here), dim=0)
            forced = {}
            for place, r in enumerate(here):
                if listed:
                    bit = len(here) - 1 - place
                    keep = ((torch.arange(width) >> bit) & 1).bool().repeat(rows)
                    index[r] = torch.arange(masks.shape[1]) >> (len(self.routers) - done)
                else:
                    keep, index[r] = masks[:, :, r].flatten(), torch.arange(width)
                forced[(layer, self.routers[r].mod_part)] = keep.to(ids.device)
            with _Seen([self.routers[r] for r in here] if self.with_features else [], pool, width) as seen:
                states = self.layers.through(layer, layer + 1, states, forced or True)
            for r, feature in zip(here, seen.features, strict=False):
                features[r] = feature.view(rows, width, -1).half().cpu()
        likelihood, exact = self._answers(states, batch["labels"].to(ids.device), width)
        return Explored(features, index, masks, log_q, likelihood.cpu(), exact.cpu())

    def _pool(self, batch: Batch) -> Tensor:
        """Tokens that a sequence's score sees when it generates: those of the prompt."""
        real = batch["attention_mask"].bool()
        return real & (real.long().cumsum(1) <= prompt_length_from(batch["labels"], real).clamp(min=1)[:, None])

    def _answers(self, states: Tensor, labels: Tensor, width: int) -> tuple[Tensor, Tensor]:
        rows = labels.shape[0]
        learnt = labels[:, 1:] != -100
        row, position = learnt.nonzero(as_tuple=True)
        target = labels[:, 1:][learnt]
        chosen = states.view(rows, width, *states.shape[1:])[row, :, position]  # [m, width, d]
        flat, targets = chosen.flatten(0, 1), target.repeat_interleave(width)
        log_p, right = [], []
        for start in range(0, flat.shape[0], _LOGIT_ROWS):
            piece = slice(start, start + _LOGIT_ROWS)
            logits = self.layers.logits(flat[piece])
            log_p.append(-cross_entropy(logits, targets[piece], reduction="none"))
            right.append(logits.argmax(-1) == targets[piece])
        log_p, right = torch.cat(log_p).view(-1, width), torch.cat(right).view(-1, width)
        count = learnt.sum(1)
        total = log_p.new_zeros(rows, width).index_add_(0, row, log_p)
        hits = log_p.new_zeros(rows, width).index_add_(0, row, right.float())
        return total / count[:, None].clamp(min=1), hits == count[:, None]


class _Seen:
    """Collects the pooled input of routed modules while they run under imposed decisions."""

    def __init__(self, routers: list[Routed], pool: Tensor, width: int) -> None:
        self.routers, self.pool, self.width = routers, pool, width
        self.features: list[Tensor] = []

    def __enter__(self) -> _Seen:
        self.handles = [router.register_forward_pre_hook(self._see, with_kwargs=True) for router in self.routers]
        return self

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()

    def _see(self, module: Routed, args: tuple, kwargs: dict) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if module.mod_part == "block":
            hidden = module.mod_features(hidden)
        self.features.append(pooled_mean(hidden, self.pool.repeat_interleave(self.width, dim=0)))


def _check(model: PreTrainedModel, batch: Batch, part: Explored) -> None:
    """UserError if running layer by layer is not what the model does as a whole."""
    from router_tuning.model import force_routing

    with force_routing(model, True):
        logits = model(input_ids=batch["input_ids"].to(model.device), use_cache=False).logits[:, :-1].float().cpu()
    labels = batch["labels"][:, 1:]
    loss = cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    dense = -loss.sum(1) / (labels != -100).sum(1).clamp(min=1)
    full = part.masks[:, :, :].all(-1).expand(len(dense), -1)
    found = torch.stack([part.likelihood[i][full[i]][0] for i in range(len(dense))])
    scale = 1e-3 if model.dtype == torch.float32 else 0.1
    if not torch.allclose(dense, found, atol=scale, rtol=scale):
        name = type(routed_base(model)).__name__
        raise UserError(f"{name} cannot be run layer by layer (its likelihoods differ): use recipe 'paper' on it")


def joined(parts: list[Explored]) -> Explored:
    shared = parts[0].masks.shape[0] == 1 and parts[0].proposal.abs().max() == 0
    return Explored(
        features=[torch.cat([p.features[r] for p in parts]) for r in range(len(parts[0].features))],
        states=parts[0].states,
        masks=parts[0].masks if shared else torch.cat([p.masks for p in parts]),
        proposal=parts[0].proposal if shared else torch.cat([p.proposal for p in parts]),
        likelihood=torch.cat([p.likelihood for p in parts]),
        exact=torch.cat([p.exact for p in parts]),
    )
