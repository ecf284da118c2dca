"""What one forward pass of a routed decoder knows, and what a routed causal LM adds to its family's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .cache_mod import HeldDecisions, adopt_layers
from .class_swap import claim_forwards, plain_class
from .configuration_mod import ModConfig
from .context import CarriesContext, Forced, RouterKey, RoutingContext, routing_context
from .penalty import join_penalty, with_penalty
from .recording import RoutingLog, routed_base
from .routed import Routed
from .router import InitializesRouting
from .skip_path import first_tokens
from .trial import try_at_first_use

NO_GRAPH = (
    "a routed model is not one graph: which rows and tokens run, and with them the shapes, depends on its decisions. "
    "Compile without fullgraph, or export the checkpoint that entrypoints/checkpoint/freeze_static.py makes of it"
)

INCOMPLETE = {"output_attentions": {"attn", "block"}, "output_router_logits": {"mlp", "block"}}
"""Outputs that lack what is skipped, by the parts whose skipping they suffer from."""


class RoutedDecoder(InitializesRouting, CarriesContext):
    """Mixin for the decoder (``LlamaModel`` …): opens one :class:`RoutingContext` per forward pass."""

    is_routed_decoder = True
    mod_config: ModConfig
    mod_cache_plan: dict[int, type[HeldDecisions] | None]
    mod_modules: list[Routed]
    mod_deciding: int | None
    mod_logs: list[RoutingLog] | tuple = ()
    mod_forced: list[tuple[Forced]] | tuple = ()
    mod_observer = None
    mod_untried = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        prompt_length: Tensor | None = None,
        **kwargs,
    ):
        """The decoder's forward; ``prompt_length [b]`` bounds the pooled tokens under ``router_pooling="prompt"``.

        Sequence level: the decision is taken in the pass that fills a cache and holds for the life of that cache
        (decoding, further chunks, further turns). Without a cache every pass decides on what it sees. Token level:
        exact for any split of the work.

        Raises:
            ValueError: for inputs whose meaning routing cannot keep (a cache in training, packed sequences or custom
                4-D masks at sequence level, outputs that lack what is skipped).
        """
        if torch.compiler.is_dynamo_compiling():  # an exception would be told without its text
            torch._dynamo.graph_break(msg=NO_GRAPH)
        elif torch.jit.is_tracing() or torch.compiler.is_exporting():
            raise ValueError(NO_GRAPH)
        claim_forwards(self.mod_modules)
        if self.mod_untried:
            try_at_first_use(self)
        training = (self.training and torch.is_grad_enabled()) or self.mod_observer is not None
        self._check_outputs(kwargs, training)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if training:
            if past_key_values is not None:
                raise ValueError("a routed model trains without past_key_values: pass whole sequences")
            use_cache = False
        elif use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        depth = self.config.num_hidden_layers  # fewer than there are while assisted decoding exits early
        sequence, past = self.mod_deciding is not None and self.mod_deciding < depth, 0
        if past_key_values is not None:
            adopt_layers(past_key_values, {n: kind for n, kind in self.mod_cache_plan.items() if n < depth})
            past = int(past_key_values.get_seq_length())
        shape = (input_ids if input_ids is not None else inputs_embeds).shape[:2]
        waiting = past_key_values.layers[self.mod_deciding].mod_blank if sequence and past else None
        decides = sequence and (past == 0 or waiting is not None)
        # What is decoded behind a past is no padding, and need not be asked for at every step.
        masked = decides or not past or shape[1] > 1
        real = self._real(attention_mask, position_ids, past, shape[1], sequence) if masked else None
        pool = decided = blank = None
        if decides:
            pool = self._bounded(real, shape, prompt_length, past_key_values)
            decided, blank = _decided(pool, waiting, past_key_values)
        first = None
        if self.mod_config.skip != "zero":
            first = first_tokens(shape, attention_mask, position_ids, past, past_key_values, self.device)
        learns = self.training and torch.is_grad_enabled()
        logs = [*self.mod_logs, RoutingLog()] if learns else self.mod_logs
        context = RoutingContext(
            real=real,
            pool=pool,
            first=first,
            decides=decides,
            decided=decided,
            blank=blank,
            cache=past_key_values,
            past=past,
            training=training,
            forced=self.mod_forced[-1][0] if self.mod_forced else None,
            record=functools.partial(_record, logs, set()) if logs else None,
            observe=self.mod_observer,
        )
        with routing_context(context):
            outputs = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
        return join_penalty(self, outputs, logs[-1]) if learns else outputs

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Refused: no automatic class of transformers would load a routed decoder without its head."""
        raise ValueError(
            f"a routed {type(self).__name__} is not saved alone: save_pretrained the whole model, or save_routers"
        )

    def _check_outputs(self, asked: Mapping[str, Any], training: bool) -> None:
        """ValueError for what skipping leaves incomplete, whether a keyword asks for it or the configuration.

        In training every module runs, so that the losses which MoE models take of their router logits stay right.
        """
        for name, parts in INCOMPLETE.items():
            wanted = asked.get(name) if not training or name == "output_attentions" else False
            if wanted is None:
                wanted = getattr(self.config, name, False)
            if wanted and parts & set(self.mod_config.parts):
                raise ValueError(
                    f"{name} would be incomplete, since modules that are skipped give none: leave it out (a keyword, "
                    f"or model.config.{name} = False), or unroute(model) to look at all of them"
                )

    def _real(self, attention_mask, position_ids, past, tokens, sequence) -> Tensor | None:
        """Tokens of the pass that are not padding, bool ``[b, t]``; None without a mask: all are."""
        plain = attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2)
        if sequence and not plain:
            raise ValueError("sequence-level routing needs a 2-D attention mask [batch, tokens] to know the padding")
        if sequence and attention_mask is None and past == 0 and position_ids is not None:
            if bool((position_ids.diff(dim=-1) < 0).any()):
                raise ValueError("packed sequences cannot be routed per sequence: one row, one sequence")
        return attention_mask[:, -tokens:].bool() if plain and attention_mask is not None else None

    def _bounded(self, pool: Tensor | None, shape: torch.Size, prompt_length, cache) -> Tensor | None:
        """The part of ``pool [b, t]`` that a decision may look at: the prompt, and no token of assisted decoding."""
        drafted = getattr(cache, "mod_prompt_tokens", None)
        if drafted is not None:
            cache.mod_prompt_tokens = None
            pool = torch.ones(shape, dtype=torch.bool, device=self.device) if pool is None else pool
            pool = pool & (torch.arange(shape[1], device=pool.device) < drafted)
        if self.mod_config.router_pooling != "prompt":
            return pool
        if prompt_length is None:
            if self.training and torch.is_grad_enabled():
                raise ValueError(
                    'router_pooling "prompt" trains on batches that say where their prompts end: pass prompt_length '
                    "(real tokens of each prompt, [batch]), or labels, to the causal model"
                )
            return pool
        fits = isinstance(prompt_length, Tensor) and prompt_length.shape == shape[:1]
        if not fits or prompt_length.is_floating_point():
            raise ValueError(f"prompt_length must be an integer tensor [{shape[0]}], the real tokens of each prompt")
        pool = torch.ones(shape, dtype=torch.bool, device=self.device) if pool is None else pool
        return pool & (pool.long().cumsum(1) <= prompt_length.to(pool.device).clamp(min=1)[:, None])


def _decided(pool: Tensor | None, waiting: Tensor | None, cache: Any) -> tuple[Tensor | None, Tensor | None]:
    """``decided`` and ``blank`` of a pass, given the rows that were blank before it."""
    if pool is None:
        return waiting, None
    counts = pool.any(1)
    if cache is not None and bool(counts.all()):  # without a cache nothing waits, and the host need not know
        return waiting, None
    decided = counts if waiting is None else counts & waiting.to(counts.device)
    blank = ~counts if waiting is None else waiting.to(counts.device) & ~counts
    return decided, blank


def _record(logs: list[RoutingLog], seen: set, key: RouterKey, *decision) -> None:
    """Hand a decision to all logs, once per pass: gradient checkpointing takes it again in the backward pass."""
    if key not in seen:
        seen.add(key)
        for log in logs:
            log.add(key, *decision)


class RoutedCausalLM(InitializesRouting, CarriesContext):
    """Mixin for the causal LM: labels say where prompts end, and bring a loss that holds the regulariser."""

    def _get_name(self) -> str:
        """The family's: by this name the Trainer knows a causal LM, whose labels label smoothing has to shift."""
        return plain_class(self).__name__

    def enable_input_require_grads(self) -> None:
        """Nothing to do, though checkpointing and peft ask for it: only reentrant checkpointing needs such inputs.

        They would make autograd record, and run backwards through, the frozen layers below the first routed one.
        """

    def _assisted_decoding(self, input_ids: Tensor, *args, **kwargs):
        """Tell the cache where the prompt ends: the first pass of assisted decoding carries candidate tokens too."""
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() == 0 and input_ids.shape[1]:
            cache.mod_prompt_tokens = input_ids.shape[1]
        return super()._assisted_decoding(input_ids, *args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """Refused, and with it ``generate_batch``: pages hold keys of every token and a row holds many requests."""
        raise ValueError(
            "a routed model does not run in continuous batching (paged cache): call generate() on a batch, which "
            "skips for real, or unroute(model) to serve the dense one"
        )

    def forward(self, *args, penalty_weight: float | None = None, **inputs):
        """As of the family. In training ``loss`` has ``λ · weight · penalty``, and the outputs ``mod_penalty``.

        Args:
            penalty_weight: what share of its step this micro-batch is; by default that of its labels in the Trainer's
                ``num_items_in_batch``, without one 1. With 0 the caller adds the term.
        """
        claim_forwards([self.base_model])
        learns, prompts = self.training and torch.is_grad_enabled(), self.config.mod_router_pooling == "prompt"
        if not (learns or prompts):
            return super().forward(*args, **inputs)
        given = {**dict(zip(_parameters(type(self).forward)[1:], args, strict=False)), **inputs}
        shifted = given.get("shift_labels") is not None
        labels = given["shift_labels"] if shifted else given.get("labels")
        if labels is not None and prompts and given.get("prompt_length") is None:
            inputs["prompt_length"] = prompt_length_from(labels, given.get("attention_mask"), shifted)
        outputs = super().forward(*args, **inputs)
        if not learns:
            return outputs
        counted = given.get("num_items_in_batch")
        if penalty_weight is None and labels is not None and counted is not None:
            penalty_weight = ((labels if shifted else labels[:, 1:]) != -100).sum() / counted
        weight = 1.0 if penalty_weight is None else penalty_weight
        return with_penalty(outputs, routed_base(self), weight, given.get("labels") is not None)


@functools.cache
def _parameters(forward) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)


def prompt_length_from(labels: Tensor, attention_mask: Tensor | None, shifted: bool = False) -> Tensor:
    """Real tokens before the first label that is learnt, int64 ``[b]``; rows without labels are prompt as a whole.

    Args:
        labels: ``[b, t]``, -100 where nothing is learnt.
        attention_mask: ``[b, t]``, zero on padding; None: no padding.
        shifted: whether ``labels`` stand a place early, each at the token that predicts it.
    """
    learnt = labels != -100
    if shifted:
        learnt = torch.cat([torch.zeros_like(learnt[:, :1]), learnt[:, :-1]], dim=1)
    before = learnt.long().cumsum(1) == 0
    if attention_mask is not None:
        before = before & attention_mask.bool()
    return before.sum(1)
