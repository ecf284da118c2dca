"""Messages to token ids and labels, in the published chat template.

A conversation is rendered as ``<|system|>\\n{text}\\n``, ``<|user|>\\n{text}\\n`` and
``<|assistant|>\\n{text}{eos}\\n``; only assistant text and its ``eos`` carry loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from utils.errors import UserError

IGNORE_INDEX = -100
GENERATION_PROMPT = "<|assistant|>\n"

Message = Mapping[str, str]


def _pieces(messages: Iterable[Message], eos: str) -> Iterable[tuple[str, bool]]:
    """Yield ``(text, carries_loss)`` pieces whose concatenation is the rendered conversation."""
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"].strip()
        if role in ("system", "user"):
            yield f"<|{role}|>\n{content}\n", False
        elif role == "assistant":
            yield GENERATION_PROMPT, False
            yield f"{content}{eos}", True
            yield "\n", False
        else:
            raise UserError(f"message {number}: unknown role {role!r}; use system, user or assistant")


def render(messages: Iterable[Message], eos: str) -> str:
    """Text of a conversation in the template; ``eos`` is the tokenizer's end-of-sequence string.

    Raises :class:`UserError` for a role other than system, user, assistant.
    """
    return "".join(text for text, _ in _pieces(messages, eos))


def render_prompt(messages: Iterable[Message], eos: str) -> str:
    """Text that a model continues with its answer: the rendered turns and the assistant header."""
    return render(messages, eos) + GENERATION_PROMPT


def encode_conversation(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[int]]:
    """Encode a conversation to ``{"input_ids": [t], "labels": [t]}``, ``t <= max_length``.

    The rendered text is tokenised as a whole, so the ids are those that inference sees; a token carries
    loss if its first character lies in assistant text or its ``eos``, every other label is -100.
    Raises :class:`UserError` for an unknown role and for a tokenizer without offsets (a slow one).
    """
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer is needed")
    text, spans = "", []
    for piece, carries_loss in _pieces(messages, tokenizer.eos_token):
        if carries_loss:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    encoded = tokenizer(text, max_length=max_length, truncation=True, return_offsets_mapping=True)
    labels = []
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        inside = end > start and any(first <= start < last for first, last in spans)
        labels.append(token if inside else IGNORE_INDEX)
    return {"input_ids": list(encoded["input_ids"]), "labels": labels}
