"""Conversations to text, token ids and labels: the one way of tuning, calibration, evaluation, routing page and chat.

A tokenizer's ``chat_template`` writes the whole text of a conversation, its beginning-of-sequence token included, and
nothing is added when that text is tokenised: so do ``apply_chat_template`` of transformers and the servers built on
it. :func:`use_template` decides which template that is. The published rendering is one like any other
(``published_template.jinja``): ``<|system|>\\n{text}\\n``, ``<|user|>\\n{text}\\n`` and
``<|assistant|>\\n{text}{eos}\\n``, texts without the white space around them.

The text is tokenised once, as a whole, so the ids are those that inference sees. Only what the model itself has to
write carries loss: an answer and its end mark. Which tokens these are follows from their character offsets; a token
belongs to the text that its first character belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

import router_tuning.model  # noqa: F401  registers the routed configurations, which folders of routed models name
from router_tuning.errors import UserError

IGNORE_INDEX = -100
TEMPLATES = ("auto", "own", "published")
PUBLISHED = Path(__file__).with_name("published_template.jinja").read_text(encoding="utf-8").rstrip()

_MARK = "\ue000answer\ue000"
"""Text that no template writes and no conversation holds: private use characters."""

Message = Mapping[str, str]
Span = tuple[int, int]
"""First character and the one behind the last, in a rendered text."""


class TemplateRefusal(UserError):
    """A conversation that a chat template does not render, or renders without all of its text."""


def load_tokenizer(
    place: str | Path, chat_template: str = "auto", trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, with the chosen template (see :func:`use_template`) as its own.

    Raises:
        UserError: if there is none, or it has no character offsets or no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(place), trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged files raise whatever their reader meets
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{place}: no tokenizer can be loaded from there ({reason})") from None
    if not tokenizer.is_fast or tokenizer.eos_token is None:
        raise UserError(f"the tokenizer in {place} must be a fast one with an end-of-sequence token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    use_template(tokenizer, chat_template)
    return tokenizer


def use_template(tokenizer: PreTrainedTokenizerBase, choice: str = "auto") -> None:
    """Set ``tokenizer.chat_template`` to the template that conversations are rendered in.

    Args:
        choice: ``own`` (the tokenizer's), ``published`` (which begins with ``bos`` where the tokenizer puts one in
            front of plain text), ``auto`` (its own if it has one), or the text of a template.

    Raises:
        UserError: for ``own`` where the tokenizer has none.
    """
    if choice == "auto":
        choice = "own" if tokenizer.chat_template else "published"
    if choice == "own" and not tokenizer.chat_template:
        raise UserError(f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template of its own; use published")
    if choice == "published":
        tokenizer.chat_template = ("{{- bos_token }}" if bos_of(tokenizer) else "") + PUBLISHED
    elif choice != "own":
        tokenizer.chat_template = choice
    elif not isinstance(tokenizer.chat_template, str):  # several by name
        tokenizer.chat_template = tokenizer.get_chat_template()


def template_kind(tokenizer: PreTrainedTokenizerBase) -> str:
    """``published``, or ``own`` for any other template."""
    return "published" if tokenizer.chat_template.rstrip().endswith(PUBLISHED) else "own"


def bos_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the tokenizer puts in front of plain text: its beginning-of-sequence token, or nothing."""
    return tokenizer.bos_token if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else ""


def render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, **options: bool) -> str:
    """Text of a conversation in the tokenizer's template; :class:`TemplateRefusal` for one that it does not take."""
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except Exception as error:  # a template is a program: it may fail in any way
        raise TemplateRefusal(f"the chat template refuses this conversation: {' '.join(str(error).split())}") from None


def render_prompt(row: Mapping[str, object], tokenizer: PreTrainedTokenizerBase) -> str:
    """Text that a model continues with the last answer of a row (``messages``, or ``prompt`` and ``completion``).

    Raises:
        TemplateRefusal: for a conversation that the template does not render whole, and a row without a prompt.
    """
    if "messages" not in row:
        if not row["prompt"]:
            raise TemplateRefusal("the row has no prompt")
        return bos_of(tokenizer) + row["prompt"]
    turns = row["messages"]
    asked = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    text = render(asked, tokenizer, add_generation_prompt=True)
    # Templates may shorten earlier answers (their reasoning); what was asked has to be there.
    _check_whole([message for message in asked if message["role"] != "assistant"], text)
    return text


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids ``[t]`` of a rendered text; nothing is added to it."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def encode_row(
    row: Mapping[str, object], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> dict[str, list[int]]:
    """Encode a row of a training file: ``messages``, or ``prompt`` and ``completion``, which go without a template.

    Returns ``{"input_ids": [t], "labels": [t]}``, cut to ``max_length`` tokens; labels are -100 or the id. Of the
    second kind the completion and ``eos`` carry loss; a blank separates the two unless one brings white space or there
    is no prompt.

    Raises:
        TemplateRefusal: for a conversation that the template refuses, leaves text out of, or renders so that its
            answers cannot be told apart.
    """
    if "messages" in row:
        text, spans = _rendered_answers(row["messages"], tokenizer)
    else:
        prompt, completion = bos_of(tokenizer) + row["prompt"], row["completion"]
        blank = (" ", "\n", "\t")
        gap = " " if row["prompt"] and not prompt.endswith(blank) and not completion.startswith(blank) else ""
        text = f"{prompt}{gap}{completion}{tokenizer.eos_token}"
        spans = [(len(prompt), len(text))]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = encoded["input_ids"]
    labels = _labels(ids, encoded["offset_mapping"], spans)
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def learns(labels: Sequence[int]) -> bool:
    """Whether a row teaches anything. The first label is never predicted: a causal loss shifts by one."""
    return any(label != IGNORE_INDEX for label in labels[1:])


def _rendered_answers(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Span]]:
    """Text of a conversation and the spans of its answers, each found by rendering up to it: without it, and with it.

    White space that the template puts behind an answer and its end mark carries no loss.
    """
    whole, spans = render(messages, tokenizer), []
    _check_whole(messages, whole)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        after = render(messages[: number + 1], tokenizer).rstrip()
        if number:
            before = render(messages[:number], tokenizer, add_generation_prompt=True)
        else:  # templates render no empty conversation, so a mark stands for the answer
            before = render([{**message, "content": _MARK}], tokenizer).partition(_MARK)[0]
        if not (whole.startswith(after) and after.startswith(before)):
            raise TemplateRefusal(
                "the chat template writes this conversation differently once it goes on, so its answers cannot be "
                "told apart"
            )
        spans.append((len(before), len(after)))
    return whole, spans


def _check_whole(messages: Sequence[Message], text: str) -> None:
    for message in messages:
        if message["content"].strip() not in text:
            start = " ".join(message["content"].split())[:40]
            raise TemplateRefusal(f"the chat template changes or leaves out a {message['role']} message ({start} …)")


def _labels(ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """The ids of tokens that start inside a span, -100 for others."""
    labels, covered, span = [], 0, 0
    for token, (start, end) in zip(ids, offsets, strict=True):
        # Tokenizers that trim offsets give a token of nothing but white space an empty one, behind its text.
        first = start if end > start else covered
        covered = max(covered, end)
        while span < len(spans) and spans[span][1] <= first:
            span += 1
        inside = span < len(spans) and spans[span][0] <= first
        labels.append(token if inside else IGNORE_INDEX)
    return labels
