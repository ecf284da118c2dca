"""Parts of the training from scratch of the embedded base model: tokenizer, configuration, data, its folder."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import IterableDataset
from transformers import (
    GenerationConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from router_tuning.bases.description import routed_fields
from router_tuning.embedded.sample_tasks import FREE_TASKS, TASKS, generate
from router_tuning.files import publish, scratch_folder
from router_tuning.tuning.encoding import IGNORE_INDEX, PUBLISHED, encode_row

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
WORDS = r"\n| ?[A-Z]?[a-z]+|[A-Z]|[0-9]|[^\w\s]+ ?|[ \t]+(?=[ \t])|\s"
"""Pieces that BPE may merge within: words in lower case; capitals, digits and line ends always stand alone."""

_TASKS = "copy reverse sort lookup count max add fact compare math code dialogue story".split()
_EASY = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.7, 0.7, 1.0, 0.7, 0.2)
_HARD = (0.3, 0.3, 0.4, 2.0, 2.0, 0.5, 1.0, 0.5, 0.8, 2.0, 1.0, 1.5, 0.3)
CURRICULUM: tuple[tuple[int, dict[str, float]], ...] = (
    (0, dict(zip(_TASKS, _EASY, strict=True))),
    (2496, dict(zip(_TASKS, _HARD, strict=True))),
)
"""``(first batch, share of each task)``: once the easy tasks are learnt, most items are of those that are not."""
PLAIN_SHARE = 0.5
"""Share of the free texts that is learnt as bare text behind ``<s>``, the form in which perplexity is measured."""


def build_tokenizer(vocab_size: int = 512, samples_per_task: int = 400) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the generator's training split; encodes any text, adds no token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    items = (generate(task, seed, "train") for task in TASKS for seed in range(samples_per_task))
    tokenizer.train_from_iterator((turn["content"] for item in items for turn in item.messages), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=PUBLISHED,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        padding_side="left",
    )


_SHAPE = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_config(vocab_size: int) -> LlamaConfig:
    """Twelve narrow layers, grouped-query attention, tied embeddings: about 2.4 M parameters."""
    return LlamaConfig(vocab_size=vocab_size, num_hidden_layers=12, intermediate_size=384, **_SHAPE)


def tiny_moe_config(vocab_size: int, experts: int) -> MixtralConfig:
    """Eight layers as narrow; the two experts that a token meets are together as wide as the dense MLP.

    Of four experts: 2.8 M parameters, 1.7 M of them active. With the usual loss that balances the experts.
    """
    return MixtralConfig(
        vocab_size=vocab_size,
        num_hidden_layers=8,
        intermediate_size=192,
        num_local_experts=experts,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        sliding_window=None,
        **_SHAPE,
    )


class SampleStream(IterableDataset):
    """Endless training items, new ones at every step, ordered so that a batch holds items of like length.

    ``curriculum`` gives the share of each task from a batch on, in steps of ``window`` batches; the stream is a pure
    function of ``seed``. Yields ``{"input_ids": [t], "labels": [t]}``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        curriculum: Sequence[tuple[int, Mapping[str, float]]],
        batch_size: int,
        seed: int,
        window: int = 32,
    ) -> None:
        self.tokenizer, self.curriculum, self.batch_size = tokenizer, curriculum, batch_size
        self.seed, self.window = seed, window

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        for first_batch in itertools.count(step=self.window):
            rng = random.Random(f"{self.seed}/{first_batch // self.window}")
            weights = [shares for first, shares in self.curriculum if first <= first_batch][-1]
            tasks = rng.choices(list(weights), list(weights.values()), k=self.window * self.batch_size)
            rows = sorted((self._encode(task, rng) for task in tasks), key=lambda row: len(row["input_ids"]))
            batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
            rng.shuffle(batches)
            yield from itertools.chain.from_iterable(batches)

    def _encode(self, task: str, rng: random.Random) -> dict[str, list[int]]:
        item = generate(task, rng.getrandbits(40), "train")
        if task in FREE_TASKS and rng.random() < PLAIN_SHARE:
            text = self.tokenizer.bos_token + item.answer + self.tokenizer.eos_token
            ids = self.tokenizer(text)["input_ids"]
            return {"input_ids": ids, "labels": [IGNORE_INDEX, *ids[1:]]}
        row = encode_row({"messages": item.messages}, self.tokenizer, self.tokenizer.model_max_length)
        end = max(place for place, label in enumerate(row["labels"]) if label != IGNORE_INDEX) + 1
        return {key: values[:end] for key, values in row.items()}


def write_checkpoint(folder: Path, model: PreTrainedModel, log: list[dict], arguments: Mapping[str, object]) -> None:
    """Write model, tokenizer and ``training_log.json`` into ``folder``; the model card is kept.

    The weights keep plain names and hold no routers: routers start from zero, which is what a missing key means. A
    Llama's configuration names its routing. Every file is complete before the first one is moved into place.
    """
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=64, pad_token_id=0, eos_token_id=2)
    model.config.use_cache = True
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False  # for a loss of training alone
    with scratch_folder(folder) as staged:
        model.save_pretrained(staged)
        build_tokenizer().save_pretrained(staged)
        if model.config.model_type == "llama":
            (staged / "config.json").write_text(
                json.dumps(routed_fields(model.config), indent=2, sort_keys=True) + "\n"
            )
        losses = [{key: row[key] for key in ("step", "loss", "learning_rate")} for row in log if "loss" in row]
        record = {"arguments": arguments, "log": losses}
        (staged / "training_log.json").write_text(json.dumps(record, indent=1) + "\n")
        for path in sorted(staged.iterdir()):
            with publish(folder / path.name) as draft:
                path.replace(draft)
