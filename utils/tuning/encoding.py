"""Conversations to token ids and labels.

In the published template, which is the default, a conversation is rendered as ``<|system|>\\n{text}\\n``,
``<|user|>\\n{text}\\n`` and ``<|assistant|>\\n{text}{eos}\\n``, texts without the white space around them; only
assistant text and its ``eos`` carry loss. With ``chat_template`` the tokenizer's own template is used instead.

The rendered text is tokenised once, as a whole, so the ids are those that inference sees; which tokens carry loss
follows from their character offsets. A token belongs to the text that its first character belongs to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from router_tuning.errors import UserError

IGNORE_INDEX = -100
GENERATION_PROMPT = "<|assistant|>\n"

_MARK = "\ue000answer\ue000"
"""Text that no template writes and no conversation holds: private use characters."""

Message = Mapping[str, str]
Piece = tuple[str, bool]
"""Text, and whether it carries loss."""


class TemplateRefusal(UserError):
    """A conversation that a tokenizer's own chat template cannot render, such as two user turns in a row."""


def _pieces(messages: Iterable[Message], eos: str) -> Iterable[Piece]:
    """Pieces whose concatenation is the rendered conversation."""
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
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, max_length: int, chat_template: bool = False
) -> dict[str, list[int]]:
    """Encode a conversation to ``{"input_ids": [t], "labels": [t]}``, ``t <= max_length``; labels are -100 or the id.

    Raises :class:`UserError` for an unknown role, and for a tokenizer that has no offsets (a slow one), no
    end-of-sequence token or, with ``chat_template``, no template; :class:`TemplateRefusal` for a conversation that
    the template refuses, or renders so that the assistant's text cannot be told apart.
    """
    if chat_template:
        return _encode(_template_pieces(messages, tokenizer), tokenizer, max_length, add_special_tokens=False)
    return _encode(_pieces(messages, _eos(tokenizer)), tokenizer, max_length)


def encode_completion(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[int]]:
    """Encode a prompt and its completion, as they are and without a template; the completion and ``eos`` carry loss.

    A blank separates the two unless one of them brings white space.
    """
    gap = "" if prompt.endswith((" ", "\n", "\t")) or completion.startswith((" ", "\n", "\t")) else " "
    return _encode([(prompt, False), (f"{gap}{completion}{_eos(tokenizer)}", True)], tokenizer, max_length)


def encode_row(
    row: Mapping[str, object], tokenizer: PreTrainedTokenizerBase, max_length: int, chat_template: bool = False
) -> dict[str, list[int]]:
    """Encode a row of a training file: ``messages``, or ``prompt`` and ``completion``."""
    if "messages" in row:
        return encode_conversation(row["messages"], tokenizer, max_length, chat_template)
    return encode_completion(row["prompt"], row["completion"], tokenizer, max_length)


def learns(labels: Sequence[int]) -> bool:
    """Whether a row teaches anything. The first label is never predicted: a causal loss shifts by one."""
    return any(label != IGNORE_INDEX for label in labels[1:])


def _eos(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise UserError(f"{tokenizer.name_or_path or 'the tokenizer'} has no eos_token; answers could not be ended")
    return tokenizer.eos_token


def _encode(
    pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerBase, max_length: int, add_special_tokens: bool = True
) -> dict[str, list[int]]:
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer is needed")
    text, spans = "", []
    for piece, carries_loss in pieces:
        if carries_loss:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    encoded = tokenizer(
        text,
        max_length=max_length,
        truncation=True,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    ids, offsets, added = encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"]
    return {"input_ids": list(ids), "labels": _labels(ids, offsets, added, spans)}


def _labels(
    ids: Sequence[int], offsets: Sequence[tuple[int, int]], added: Sequence[int], spans: Sequence[tuple[int, int]]
) -> list[int]:
    """The ids of tokens that start inside a span, -100 for others and for those that the tokenizer added itself."""
    labels, covered, span = [], 0, 0
    for token, (start, end), is_added in zip(ids, offsets, added, strict=True):
        if is_added:
            labels.append(IGNORE_INDEX)
            continue
        # Tokenizers that trim offsets give a token of nothing but white space an empty one, behind its text.
        first = start if end > start else covered
        covered = max(covered, end)
        while span < len(spans) and spans[span][1] <= first:
            span += 1
        inside = span < len(spans) and spans[span][0] <= first
        labels.append(token if inside else IGNORE_INDEX)
    return labels


def _template_pieces(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Pieces in the tokenizer's chat template, by rendering it up to each answer: without it, and with it.

    White space that the template puts behind an answer and its end mark carries no loss.
    """
    whole = _rendered(messages, tokenizer)
    pieces, done = [], 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        after = _rendered(messages[: number + 1], tokenizer).rstrip()
        if number:
            before = _rendered(messages[:number], tokenizer, add_generation_prompt=True)
        else:  # templates render no empty conversation, so a mark stands for the answer
            before = _rendered([{**message, "content": _MARK}], tokenizer).partition(_MARK)[0]
        if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
            raise TemplateRefusal(
                f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} writes this conversation "
                "differently once it goes on, so its answers cannot be told apart"
            )
        pieces += [(whole[done : len(before)], False), (whole[len(before) : len(after)], True)]
        done = len(after)
    return [*pieces, (whole[done:], False)]


def _rendered(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, **options: bool) -> str:
    if tokenizer.chat_template is None:
        raise UserError(f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template; use the default template")
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except (TemplateError, ValueError, IndexError) as error:
        raise TemplateRefusal(f"the chat template refuses this conversation: {' '.join(str(error).split())}") from None
