"""One text for a conversation: the published rendering and the loss mask equal slow, obviously right ones; templates
of a tokenizer's own; what a template refuses or mangles; one beginning-of-sequence token; rows of both kinds."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from router_tuning.errors import UserError
from router_tuning.tuning.encoding import (
    IGNORE_INDEX,
    TemplateRefusal,
    encode_row,
    encode_text,
    learns,
    load_tokenizer,
    render,
    render_prompt,
    template_kind,
    use_template,
)

EOS = "</s>"
WORDS = [
    *("the quick brown fox jumps over a lazy dog print return if x = [1, 2] : < | > user assistant system").split(),
    *("naïve", "漢字", "🙂", "\n", "\n\n", "    ", "\t", "don't", "<|user|>", "<|assistant|>\n"),
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def turns(messages: list[dict]) -> list[tuple[str, bool]]:
    """The published rendering, part by part, and whether a part carries loss."""
    parts = []
    for message in messages:
        answer, text = message["role"] == "assistant", message["content"].strip()
        parts += [(f"<|{message['role']}|>\n", False), (text, answer), (EOS * answer, answer), ("\n", False)]
    return parts


def written(messages: list[dict]) -> str:
    return "".join(text for text, _ in turns(messages))


def corpus() -> list[str]:
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=20)) for _ in range(300)]
    return lines + [written([{"role": role, "content": lines[0]}]) for role in ("system", "user", "assistant")]


def wrapped(tokenizer: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": EOS, **names})
    use_template(found, "published")
    return found


def byte_level(trim_offsets: bool) -> PreTrainedTokenizerFast:
    """As of Llama 3, GPT-2: bytes, with a first token of its own; ``trim_offsets`` as of RoBERTa."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=[EOS, "<s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(corpus(), trainer)
    first = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    trimming = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.post_processor = processors.Sequence([trimming, first])
    return wrapped(tokenizer, bos_token="<s>")


def unigram() -> PreTrainedTokenizerFast:
    """As of T5, Llama 2: pieces that may span line ends, blanks as ▁."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never", split=False)
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=[EOS, "<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator(corpus(), trainer)
    return wrapped(tokenizer, unk_token="<unk>")


def slow_labels(messages: list[dict], ids: list[int], tokens: list[str], by_bytes: bool) -> list[int]:
    """One flag per character, or byte, of the text; a token has that of its first one."""
    flags = [flag for text, flag in turns(messages) for _ in (text.encode() if by_bytes else text)]
    labels, position = [], 0
    for token, number in zip(tokens, ids, strict=True):
        if token == "<s>":  # not of the text
            labels.append(IGNORE_INDEX)
            continue
        labels.append(number if flags[position] else IGNORE_INDEX)
        position += len(token)  # a character of a token is one of the text or, of byte-level ones, a byte
    return labels


def conversation(draw: random.Random) -> list[dict]:
    roles = draw.choices(["system", "user", "assistant"], [1, 3, 3], k=draw.randint(1, 7))
    return [
        {"role": role, "content": draw.choice(["", " ", "\n"]).join(draw.choices(WORDS, k=draw.randint(0, 12)))}
        for role in roles
    ]


@pytest.mark.parametrize("make", [partial(byte_level, False), partial(byte_level, True), unigram])
def test_mask_of_1000_random_conversations(make: Callable[[], PreTrainedTokenizerFast]):
    tokenizer, draw, learnt, cut = make(), random.Random(233), 0, 0
    for _ in range(1000):
        messages = conversation(draw)
        whole = encode_row({"messages": messages}, tokenizer)
        tokens = tokenizer.convert_ids_to_tokens(whole["input_ids"])
        assert "<unk>" not in tokens
        assert whole["input_ids"] == encode_text((tokenizer.bos_token or "") + written(messages), tokenizer)
        assert whole["labels"] == slow_labels(messages, whole["input_ids"], tokens, make is not unigram)
        limit = draw.randint(3, len(tokens) + 3)
        short = encode_row({"messages": messages}, tokenizer, limit)
        assert short == {name: values[:limit] for name, values in whole.items()}
        learnt += learns(whole["labels"])
        cut += len(tokens) > limit
    assert learnt > 500 and cut > 500


def test_only_the_answer_and_its_end_carry_loss():
    tokenizer = byte_level(False)
    messages = [
        {"role": "system", "content": "the system"},
        {"role": "user", "content": " x = [1, 2]\n"},
        {"role": "assistant", "content": "\n\nif x:\n    return  1 \n"},
        {"role": "user", "content": f"a fox {EOS} <|assistant|>\ndog"},
        {"role": "assistant", "content": "dog"},
    ]
    encoded = encode_row({"messages": messages}, tokenizer)
    trained = tokenizer.decode([label for label in encoded["labels"] if label != IGNORE_INDEX])
    assert trained == f"if x:\n    return  1{EOS}dog{EOS}"
    assert tokenizer.decode(encoded["input_ids"]) == "<s>" + written(messages)
    for turns in (messages, messages[:-1]):  # the prompt of a row is what stands before its last answer
        prompt = encode_text(render_prompt({"messages": turns}, tokenizer), tokenizer)
        assert encoded["input_ids"][: len(prompt)] == prompt


def test_what_is_left_to_learn():
    assert learns([IGNORE_INDEX, 5]) and not learns([5, IGNORE_INDEX]) and not learns([5]) and not learns([])


@pytest.mark.parametrize(
    ("prompt", "completion", "text"),
    [("a fox", "jumps", "a fox jumps"), ("a fox\n", "jumps", "a fox\njumps"), ("a fox", "\tjumps ", "a fox\tjumps ")],
)
def test_prompt_and_completion(prompt: str, completion: str, text: str):
    tokenizer = byte_level(False)
    row = {"prompt": prompt, "completion": completion}
    encoded = encode_row(row, tokenizer)
    assert encoded["input_ids"] == tokenizer(text + EOS)["input_ids"], "as plain text, bos included"
    trained = tokenizer.decode([label for label in encoded["labels"] if label != IGNORE_INDEX])
    assert trained == text.removeprefix(prompt) + EOS
    assert encode_text(render_prompt(row, tokenizer), tokenizer) == tokenizer(prompt)["input_ids"]


TALK = [
    {"role": "user", "content": "a dog"},
    {"role": "assistant", "content": " a\nfox "},
    {"role": "user", "content": "a dog"},
    {"role": "assistant", "content": "a dog"},
    {"role": "user", "content": "a dog"},
]


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("bos", ["", "{{ bos_token }}"])
def test_a_template_of_its_own_is_the_whole_text(bos: str, start: int):
    """As ``apply_chat_template`` gives it to every stock tool: one bos if the template writes one, else none."""
    tokenizer = byte_level(False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = bos + CHATML
    use_template(tokenizer, "auto")
    encoded = encode_row({"messages": TALK[start:]}, tokenizer)
    assert encoded["input_ids"] == tokenizer.apply_chat_template(TALK[start:], return_dict=False)
    assert encoded["input_ids"].count(tokenizer.bos_token_id) == bool(bos)
    trained = tokenizer.decode([label for label in encoded["labels"] if label != IGNORE_INDEX])
    assert trained == " a\nfox <|im_end|>a dog<|im_end|>"
    prompt = tokenizer.apply_chat_template(TALK[start:], add_generation_prompt=True, return_dict=False)
    assert encode_text(render_prompt({"messages": TALK[start:]}, tokenizer), tokenizer) == prompt


def test_which_template_is_chosen():
    tokenizer = byte_level(False)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template of its own"):
        use_template(tokenizer, "own")
    use_template(tokenizer, "auto")
    assert template_kind(tokenizer) == "published" and render(TALK, tokenizer) == "<s>" + written(TALK)
    tokenizer.chat_template = CHATML
    use_template(tokenizer, "auto")
    assert template_kind(tokenizer) == "own" and tokenizer.chat_template == CHATML
    use_template(tokenizer, "published")
    assert template_kind(tokenizer) == "published" and render(TALK, tokenizer).startswith("<s><|user|>")
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ tools }}"}
    use_template(tokenizer, "own")
    assert tokenizer.chat_template == CHATML


REFUSING = {
    "raises": "{{ raise_exception('roles must alternate') }}",
    "type": "{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson }}{% endfor %}",
    "syntax": "{% for m in messages %}",
    "depends on what follows": "{% for m in messages %}{{ loop.length }}{{ m['content'] }}{% endfor %}",
    "drops a role": "{% for m in messages if m.role != 'user' %}{{ m.content }}{% endfor %}",
    "strips reasoning": "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}{% endfor %}",
}


@pytest.mark.parametrize("template", REFUSING.values(), ids=REFUSING)
def test_what_a_template_refuses_or_mangles_is_said_to_be_that(template: str):
    tokenizer = byte_level(False)
    use_template(tokenizer, template)
    messages = [
        {"role": "user", "content": "dog one"},
        {"role": "assistant", "content": "<think>quick</think>fox"},
        {"role": "user", "content": "lazy"},
    ]
    with pytest.raises(TemplateRefusal, match="^the chat template [^\n]*$"):
        encode_row({"messages": messages}, tokenizer)
    if "think" in template:  # earlier answers of a prompt may be shortened
        assert render_prompt({"messages": messages}, tokenizer) == "[user]dog one[assistant]fox[user]lazy"


def test_tokenizers_that_cannot_be_used(tmp_path):
    tokenizer = byte_level(False)
    with pytest.raises(TemplateRefusal, match="unknown role tool"):
        encode_row({"messages": [{"role": "tool", "content": ""}]}, tokenizer)
    with pytest.raises(UserError, match=f"{tmp_path}: no tokenizer can be loaded"):
        load_tokenizer(tmp_path)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="end-of-sequence token"):
        load_tokenizer(tmp_path)
