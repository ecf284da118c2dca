"""One answer of a routed model in a conversation, with what it ran and what that saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from router_tuning.errors import UserError
from router_tuning.evaluation.texts import executed
from router_tuning.evaluation.timing import timed
from router_tuning.model import force_routing, record_routing
from router_tuning.tuning.encoding import encode_text, render_prompt


class Answer(NamedTuple):
    """Text, what ran of each router and of the decoder's operations, seconds; ``seconds_dense`` of the dense model."""

    text: str
    tokens: int
    capacity: dict[str, float]
    share: float
    seconds: float
    seconds_dense: float | None = None

    def summary(self) -> str:
        """One line: a bar per router, the share of depth that was spent, time."""
        bars = "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * share))] for share in self.capacity.values())
        line = f"{bars} depth {self.share:.0%} of the decoder, {self.tokens} tokens in {self.seconds:.2f} s"
        if self.seconds_dense is None:
            return line
        saved = 1 - self.seconds / self.seconds_dense
        return f"{line}, dense {self.seconds_dense:.2f} s: {saved:+.0%} of the time saved"


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    max_new_tokens: int = 128,
    streamer: TextStreamer | None = None,
    compare: bool = False,
) -> Answer:
    """Greedy answer to a conversation.

    ``streamer`` gets the tokens as they come. ``compare`` lets the model generate as many tokens densely
    afterwards and notes the time. Raises :class:`UserError` if the chat template refuses the conversation, or if it
    leaves no room for an answer.
    """
    prompt = render_prompt({"messages": messages}, tokenizer)
    ids = torch.tensor([encode_text(prompt, tokenizer)], device=model.device)
    used, room = ids.shape[1], model.config.max_position_embeddings
    if used >= room:
        raise UserError(f"the conversation has {used} tokens, the model holds {room}")
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    options["max_new_tokens"] = min(max_new_tokens, room - used)
    outputs: list[torch.Tensor] = []

    def generate(**more: Any) -> None:
        outputs.append(model.generate(ids, **{**options, **more}))

    with record_routing(model) as log:
        seconds = timed(lambda: generate(streamer=streamer), model.device)
    new, seconds_dense = outputs[0][0, used:], None
    if compare:
        with force_routing(model, True):
            length = {"max_new_tokens": len(new), "min_new_tokens": len(new)}
            seconds_dense = timed(lambda: generate(**length), model.device)
    ran = executed(model, log)
    text = tokenizer.decode(new, skip_special_tokens=True).strip()
    return Answer(text, len(new), ran["capacity"], ran["share"], seconds, seconds_dense)
