"""One decoder layer at a time, through the model's own forward: masks that share a beginning share its work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from router_tuning.errors import UserError
from router_tuning.model import force_routing
from router_tuning.model.context import RouterKey
from router_tuning.model.modules import decoder_of

_NORMS = ("norm", "final_layernorm")


class _Pass(nn.Module):
    """Stands in for a layer that is not meant to run; positions in ``layers`` stay what they are."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states


class Layerwise:
    """Parts of a frozen routed causal LM, each run by the model itself with its other layers taken out.

    Rows are padded on the right, so that causal attention needs no mask: what real tokens compute does not depend on
    the padding behind them.

    Raises:
        UserError: for a decoder without a final norm that can be found, or one that changes what it is fed.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.decoder = model, decoder_of(model)
        self.layers = self.decoder.layers
        self.stand_ins = [_Pass(layer) for layer in self.layers]
        self.norm_name = next((name for name in _NORMS if hasattr(self.decoder, name)), None)
        if self.norm_name is None:
            raise UserError(
                f"{type(self.decoder).__name__} has none of {', '.join(_NORMS)}: its masks cannot be searched"
            )
        self.scale = 1.0
        width = model.get_input_embeddings().weight.shape[1]
        probe = torch.ones(1, 2, width, dtype=model.dtype, device=model.device)
        self.scale = float(self._run(0, 0, probe).float().mean())

    @contextmanager
    def _only(self, first: int, last: int, normed: bool) -> Iterator[None]:
        kept = [
            layer if first <= index < last else stand_in
            for index, (layer, stand_in) in enumerate(zip(self.layers, self.stand_ins, strict=True))
        ]
        norm = getattr(self.decoder, self.norm_name)
        self.decoder.layers = nn.ModuleList(kept)
        if not normed:
            setattr(self.decoder, self.norm_name, nn.Identity())
        try:
            yield
        finally:
            self.decoder.layers = self.layers
            setattr(self.decoder, self.norm_name, norm)

    def _run(self, first: int, last: int, states: Tensor) -> Tensor:
        with self._only(first, last, normed=False):
            if states.is_floating_point():
                # Some families multiply their embeddings on the way in.
                return self.decoder(inputs_embeds=states / self.scale, use_cache=False).last_hidden_state
            return self.decoder(input_ids=states, use_cache=False).last_hidden_state

    def through(self, first: int, last: int, states: Tensor, forced: dict[RouterKey, Tensor] | bool = True) -> Tensor:
        """Layers ``first … last-1`` of ``states [b, t, d]`` (or token ids ``[b, t]``), decisions imposed."""
        with force_routing(self.model, forced):
            return self._run(first, last, states)

    def logits(self, states: Tensor) -> Tensor:
        """Final norm and head, position by position: ``[m, d] → [m, vocabulary]`` in float32."""
        with self._only(0, 0, normed=True), force_routing(self.model, True):
            return self.model(inputs_embeds=states[None] / self.scale, use_cache=False).logits[0].float()
