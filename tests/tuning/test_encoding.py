"""The loss mask equals a slow, obviously right one, with three kinds of tokenizer; templates; rows of both kinds."""

from __future__ import annotations

import random
from functools import cache

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from router_tuning.errors import UserError
from router_tuning.tuning.encoding import (
    IGNORE_INDEX,
    TemplateRefusal,
    encode_completion,
    encode_conversation,
    encode_row,
    learns,
    render,
    render_prompt,
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


def corpus() -> list[str]:
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=20)) for _ in range(300)]
    return lines + [render([{"role": role, "content": lines[0]}], EOS) for role in ("system", "user", "assistant")]


def wrapped(tokenizer: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": EOS, **names})


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


def word_piece() -> PreTrainedTokenizerFast:
    """As of BERT: lower-cased words and their parts, white space gone, a token before and one behind."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = [EOS, "<unk>", "<cls>", "<sep>"]
    letters = sorted({letter for line in corpus() for letter in line.lower() if not letter.isspace()})
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=names, initial_alphabet=letters)
    tokenizer.train_from_iterator(corpus() + [f"a{letter}" for letter in letters], trainer)
    ids = [(name, tokenizer.token_to_id(name)) for name in ("<cls>", "<sep>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<cls> $A <sep>", special_tokens=ids)
    return wrapped(tokenizer, unk_token="<unk>", cls_token="<cls>", sep_token="<sep>")


@cache
def byte_letters() -> dict[str, int]:
    """The bytes that printable characters stand for in byte-level tokens, in the order of the standard."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def bytes_of(token: str) -> bytes:
    """Bytes of a byte-level token."""
    return bytes(byte_letters()[letter] for letter in token)


def firsts(tokens: list[str], text: str, kind: str) -> list[int | None]:
    """Index in ``text`` of the first character of each token, found without offsets; None for added tokens."""
    position, found = 0, []
    letters = [index for index, letter in enumerate(text) for _ in letter.encode()]
    for token in tokens:
        if token in ("<s>", "<cls>", "<sep>"):
            found.append(None)
            continue
        if kind == "bytes":
            found.append(letters[position])
            position += len(EOS) if token == EOS else len(bytes_of(token))
        elif kind == "pieces":
            found.append(position)
            position += len(token)
        else:
            while text[position].isspace():
                position += 1
            found.append(position)
            part = token.removeprefix("##")
            assert text[position : position + len(part)].lower() == part
            position += len(part)
    return found


def slow_labels(messages: list[dict], ids: list[int], tokens: list[str], kind: str) -> list[int]:
    """One flag per character of the rendered text, written down turn by turn; a token has that of its first one."""
    text, flags = "", []
    for message in messages:
        header = f"<|{message['role']}|>\n"
        body = message["content"].strip()
        for part, flag in ((header, False), (body, message["role"] == "assistant")):
            text += part
            flags += [flag] * len(part)
        ending = EOS + "\n" if message["role"] == "assistant" else "\n"
        text += ending
        flags += [True] * len(EOS) + [False] if message["role"] == "assistant" else [False]
    assert text == render(messages, EOS)
    places = firsts(tokens, text, kind)
    return [
        token if place is not None and flags[place] else IGNORE_INDEX for token, place in zip(ids, places, strict=True)
    ]


def conversation(draw: random.Random) -> list[dict]:
    roles = draw.choices(["system", "user", "assistant"], [1, 3, 3], k=draw.randint(1, 7))
    return [
        {"role": role, "content": draw.choice(["", " ", "\n"]).join(draw.choices(WORDS, k=draw.randint(0, 12)))}
        for role in roles
    ]


TOKENIZERS = {
    "byte-level BPE": (lambda: byte_level(False), "bytes"),
    "byte-level BPE, trimmed offsets": (lambda: byte_level(True), "bytes"),
    "unigram": (unigram, "pieces"),
    "WordPiece": (word_piece, "words"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_mask_of_1000_random_conversations(name: str):
    make, kind = TOKENIZERS[name]
    tokenizer, draw, learnt, cut = make(), random.Random(233), 0, 0
    for _ in range(1000):
        messages = conversation(draw)
        whole = encode_conversation(messages, tokenizer, 100_000)
        tokens = tokenizer.convert_ids_to_tokens(whole["input_ids"])
        assert "<unk>" not in tokens
        assert whole["input_ids"] == tokenizer(render(messages, EOS))["input_ids"]
        assert whole["labels"] == slow_labels(messages, whole["input_ids"], tokens, kind)
        limit = draw.randint(3, len(tokens) + 3)
        short = encode_conversation(messages, tokenizer, limit)
        added = tokens[-1] == "<sep>"
        kept = min(limit, len(tokens)) - added
        assert short["input_ids"][:kept] == whole["input_ids"][:kept] and len(short["input_ids"]) == kept + added
        assert short["labels"] == whole["labels"][:kept] + [IGNORE_INDEX] * added
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
    encoded = encode_conversation(messages, tokenizer, 1000)
    trained = tokenizer.decode([label for label in encoded["labels"] if label != IGNORE_INDEX])
    assert trained == f"if x:\n    return  1{EOS}dog{EOS}"
    assert tokenizer.decode(encoded["input_ids"]) == "<s>" + render(messages, EOS)
    prompt = tokenizer(render_prompt(messages[:-1], EOS))["input_ids"]
    assert encoded["input_ids"][: len(prompt)] == prompt


def test_what_is_left_to_learn():
    assert learns([IGNORE_INDEX, 5]) and not learns([5, IGNORE_INDEX]) and not learns([5]) and not learns([])
    tokenizer = byte_level(False)
    messages = [{"role": "user", "content": "the fox " * 50}, {"role": "assistant", "content": "dog"}]
    assert learns(encode_conversation(messages, tokenizer, 1000)["labels"])
    assert not learns(encode_conversation(messages, tokenizer, 20)["labels"])


@pytest.mark.parametrize(
    ("prompt", "completion", "text"),
    [("a fox", "jumps", "a fox jumps"), ("a fox\n", "jumps", "a fox\njumps"), ("a fox", "\tjumps ", "a fox\tjumps ")],
)
def test_prompt_and_completion(prompt: str, completion: str, text: str):
    tokenizer = byte_level(False)
    encoded = encode_row({"prompt": prompt, "completion": completion}, tokenizer, 1000)
    assert encoded == encode_completion(prompt, completion, tokenizer, 1000)
    assert tokenizer.decode(encoded["input_ids"]) == f"<s>{text}{EOS}"
    trained = tokenizer.decode([label for label in encoded["labels"] if label != IGNORE_INDEX])
    assert trained == text.removeprefix(prompt) + EOS


def test_own_chat_template():
    tokenizer = byte_level(False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    messages = [
        {"role": "user", "content": "a dog"},
        {"role": "assistant", "content": " a\nfox "},
        {"role": "user", "content": "a dog"},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": "a dog"},
    ]
    encoded = encode_conversation(messages, tokenizer, 1000, chat_template=True)
    assert tokenizer.decode(encoded["input_ids"]) == tokenizer.apply_chat_template(messages, tokenize=False)
    trained = tokenizer.decode([label for label in encoded["labels"] if label != IGNORE_INDEX])
    assert trained == " a\nfox <|im_end|>a dog<|im_end|>"
    first = encode_conversation(messages[1:], tokenizer, 1000, chat_template=True)
    trained = tokenizer.decode([label for label in first["labels"] if label != IGNORE_INDEX])
    assert trained == " a\nfox <|im_end|>a dog<|im_end|>"


def test_default_template_as_chat_template(root):
    """The same ids and labels by both ways, where the tokenizer's own template is the default one."""
    tokenizer = byte_level(False)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}"
        "{% if m['role'] == 'assistant' %}</s>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    draw = random.Random(5)
    for _ in range(100):
        messages = [turn for turn in conversation(draw) if turn["content"].strip()]
        if not messages:
            continue
        ours = encode_conversation(messages, tokenizer, 1000)
        own = encode_conversation(messages, tokenizer, 1000, chat_template=True)
        assert [IGNORE_INDEX, *own["labels"]] == ours["labels"] and own["input_ids"] == ours["input_ids"][1:]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{% for m in messages %}{{ loop.length }}{{ m['content'] }}{% endfor %}",
        "{{ messages[7]['content'] }}",
    ],
)
def test_templates_that_cannot_be_used(template: str):
    tokenizer = byte_level(False)
    tokenizer.chat_template = template
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    with pytest.raises(TemplateRefusal):
        encode_conversation(messages, tokenizer, 100, chat_template=True)


def test_tokenizers_that_cannot_be_used():
    tokenizer = byte_level(False)
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(UserError, match="no chat template"):
        encode_conversation(messages, tokenizer, 100, chat_template=True)
    with pytest.raises(UserError, match="message 1: unknown role 'tool'"):
        encode_conversation([*messages, {"role": "tool", "content": ""}], tokenizer, 100)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="eos_token"):
        encode_conversation(messages, tokenizer, 100)
