"""One text for a conversation: the published rendering and the loss mask equal slow, obviously right ones; templates
of a tokenizer's own; what a template refuses or mangles; one beginning-of-sequence token; rows of both kinds."""

import random
from functools import partial

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from router_tuning.errors import UserError
from router_tuning.tuning import encoding
from router_tuning.tuning.encoding import (
    IGNORE_INDEX,
    TemplateRefusal,
    encode_row,
    encode_text,
    render_prompt,
    use_template,
)

EOS = "</s>"
WORDS = [
    *("the quick brown fox jumps over a lazy dog print return if x = [1, 2] : < | > user assistant system").split(),
    *("naïve", "漢字", "🙂", "\n", "\n\n", "    ", "\t", "don't", "<|user|>", "<|assistant|>\n", EOS),
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def talk(*texts: str) -> list[dict]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


def parts(messages: list[dict]) -> list[tuple[str, bool]]:
    """The published rendering, part by part, and whether a part carries loss."""
    found = []
    for message in messages:
        answer, text = message["role"] == "assistant", message["content"].strip()
        found += [(f"<|{message['role']}|>\n", False), (text, answer), (EOS * answer, answer), ("\n", False)]
    return found


def written(messages: list[dict]) -> str:
    return "".join(text for text, _ in parts(messages))


def corpus() -> list[str]:
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=20)) for _ in range(300)]
    return lines + [written([{"role": role, "content": lines[0]}]) for role in ("system", "user", "assistant")]


def wrapped(tokenizer: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": EOS, **names})
    use_template(found, "published")
    return found


def byte_level(trim_offsets: bool = False) -> PreTrainedTokenizerFast:
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
    """One flag per character, or byte, of the text; a token has that of its first one, and ``<s>`` is not of it."""
    flags = [flag for text, flag in parts(messages) for _ in (text.encode() if by_bytes else text)]
    starts, position = [], 0
    for token in tokens:  # a character of a token is one of the text or, of byte-level ones, a byte
        starts.append(None if token == "<s>" else position)
        position += 0 if token == "<s>" else len(token)
    places = zip(ids, starts, strict=True)
    return [number if start is not None and flags[start] else IGNORE_INDEX for number, start in places]


@pytest.mark.parametrize("make", [byte_level, partial(byte_level, True), unigram])
def test_text_prompt_mask_and_cut_of_1000_random_conversations(make):
    tokenizer, draw, cut, learnt = make(), random.Random(233), 0, 0
    bos = tokenizer.bos_token or ""
    for _ in range(1000):
        roles = draw.choices(["system", "user", "assistant"], [1, 3, 3], k=draw.randint(1, 7))
        texts = [draw.choice(["", " ", "\n"]).join(draw.choices(WORDS, k=draw.randint(0, 12))) for _ in roles]
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        row, asked = {"messages": messages}, messages[: -1 if roles[-1] == "assistant" else None]
        whole = encode_row(row, tokenizer)
        tokens = tokenizer.convert_ids_to_tokens(whole["input_ids"])
        assert "<unk>" not in tokens
        assert whole["input_ids"] == encode_text(bos + written(messages), tokenizer)
        assert whole["labels"] == slow_labels(messages, whole["input_ids"], tokens, make is not unigram)
        assert not asked or render_prompt(row, tokenizer) == bos + written(asked) + "<|assistant|>\n"
        limit = draw.randint(3, len(tokens) + 3)
        assert encode_row(row, tokenizer, limit) == {name: values[:limit] for name, values in whole.items()}
        cut += len(tokens) > limit
        learnt += set(whole["labels"]) != {IGNORE_INDEX}
    assert cut > 500 and learnt > 500


@pytest.mark.parametrize(
    ("prompt", "completion", "text"),
    [("a fox", "jumps", "a fox jumps"), ("a fox\n", "jumps", "a fox\njumps"), ("a fox", "\tjumps ", "a fox\tjumps ")],
)
def test_prompt_and_completion_are_plain_text_behind_one_bos(prompt, completion, text):
    tokenizer, row = byte_level(), {"prompt": prompt, "completion": completion}
    encoded = encode_row(row, tokenizer)
    assert encoded["input_ids"] == tokenizer(text + EOS)["input_ids"]
    assert tokenizer.decode([i for i in encoded["labels"] if i != IGNORE_INDEX]) == text.removeprefix(prompt) + EOS
    assert encode_text(render_prompt(row, tokenizer), tokenizer) == tokenizer(prompt)["input_ids"]


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("bos", ["", "{{ bos_token }}"])
def test_a_template_of_its_own_is_the_whole_text(bos, start):
    """As ``apply_chat_template`` gives it to every stock tool: one bos if the template writes one, else none."""
    tokenizer, messages = byte_level(), talk("a dog", " a\nfox ", "a dog", "a dog", "a dog")[start:]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = bos + CHATML
    use_template(tokenizer, "auto")
    encoded = encode_row({"messages": messages}, tokenizer)
    assert encoded["input_ids"] == tokenizer.apply_chat_template(messages, return_dict=False)
    assert encoded["input_ids"].count(tokenizer.bos_token_id) == bool(bos)
    trained = tokenizer.decode([label for label in encoded["labels"] if label != IGNORE_INDEX])
    assert trained == " a\nfox <|im_end|>a dog<|im_end|>"
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode_text(render_prompt({"messages": messages}, tokenizer), tokenizer) == prompt


SEVERAL = {"default": CHATML, "tool_use": "{{ tools }}"}


@pytest.mark.parametrize(
    ("has", "choice", "kind"),
    [
        (None, "auto", "published"),
        (CHATML, "auto", "own"),
        (CHATML, "published", "published"),
        (SEVERAL, "own", "own"),
    ],
)
def test_which_template_is_chosen(has, choice, kind):
    tokenizer = byte_level()
    tokenizer.chat_template = has
    use_template(tokenizer, choice)
    assert encoding.template_kind(tokenizer) == kind and (kind == "published" or tokenizer.chat_template == CHATML)
    assert encoding.render(talk("a"), tokenizer).startswith("<s><|user|>" if kind == "published" else "<|im_start|>")


REFUSING = {
    "raises": "{{ raise_exception('roles must alternate') }}",
    "type": "{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson }}{% endfor %}",
    "syntax": "{% for m in messages %}",
    "depends on what follows": "{% for m in messages %}{{ loop.length }}{{ m['content'] }}{% endfor %}",
    "drops a role": "{% for m in messages if m.role != 'user' %}{{ m.content }}{% endfor %}",
    "strips reasoning": "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}{% endfor %}",
}


@pytest.mark.parametrize("template", REFUSING.values(), ids=REFUSING)
def test_what_a_template_refuses_or_mangles_is_said_to_be_that(template):
    tokenizer, row = byte_level(), {"messages": talk("dog one", "<think>quick</think>fox", "lazy")}
    use_template(tokenizer, template)
    with pytest.raises(TemplateRefusal, match="^the chat template [^\n]*$"):
        encode_row(row, tokenizer)
    if "think" in template:  # earlier answers of a prompt may be shortened
        assert render_prompt(row, tokenizer) == "[user]dog one[assistant]fox[user]lazy"


def test_tokenizers_that_cannot_be_used(tmp_path):
    tokenizer = byte_level()
    with pytest.raises(TemplateRefusal, match="unknown role tool"):
        encode_row({"messages": [{"role": "tool", "content": ""}]}, tokenizer)
    with pytest.raises(UserError, match=f"{tmp_path}: no tokenizer can be loaded"):
        encoding.load_tokenizer(tmp_path)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template of its own"):
        use_template(tokenizer, "own")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="end-of-sequence token"):
        encoding.load_tokenizer(tmp_path)
