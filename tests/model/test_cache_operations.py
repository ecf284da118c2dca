"""Property: after any sequence of passes and cache operations, the next pass equals recomputing everything."""

from __future__ import annotations

import functools
import os

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from tiny_models import COMMON, reset_empties
from tiny_routed import CACHED, with_reference
from transformers import DynamicCache

CASES = [*CACHED, ("attn_sequence+mlp_sequence", "keep"), ("attn_token+mlp_sequence", "drop")]
EXAMPLES = int(os.environ.get("CACHE_EXAMPLES", "6"))  # more of them for a longer search
MAX_ROWS = 6

SEED = st.integers(0, 10**6)
OPERATIONS = st.one_of(
    *[st.tuples(st.just("feed"), st.integers(1, 5))] * 2,
    *[st.tuples(st.just(name), SEED) for name in ("reorder", "select", "select_mask")],
    *[st.tuples(st.just(name), st.integers(*range_)) for name, range_ in {"repeat": (1, 3), "crop": (0, 8)}.items()],
    *[st.tuples(st.just(name), st.just(value)) for name, value in (("feed", 1), ("reset", 0))],
)
STARTS = st.tuples(st.integers(1, 3), st.integers(1, 9), st.sampled_from([None, "left"]))


pair = functools.cache(with_reference)


class Conversation:
    """A batch with its cache, and beside it all its tokens and the reference that recomputes them."""

    def __init__(self, family, granularity, policy, seed, padding):
        self.model, self.reference = pair(family, granularity, policy)
        self.reference.held = {}
        self.generator = torch.Generator().manual_seed(seed)
        self.window = getattr(self.model.config, "sliding_window", None)
        self.padding = padding
        # Without a configuration a cache has plain layers, made when they are first asked for.
        self.cache = DynamicCache(config=self.model.config if self.window or seed % 2 else None)
        if self.window:
            self.cache.activate_past_recording()

    def start(self, rows, tokens):
        self.ids, self.mask = torch.zeros(2, rows, 0, dtype=torch.long)
        self.croppable = 0
        self.feed(tokens)

    def feed(self, tokens):
        past, rows = self.ids.shape[1], self.ids.shape[0]
        new = torch.randint(3, COMMON["vocab_size"], (rows, tokens), generator=self.generator)
        mask = torch.ones_like(new)
        if past == 0 and self.padding:
            for row in range(rows):
                mask[row, : min(row, tokens - 1)] = 0
        self.ids, self.mask = torch.cat([self.ids, new * mask], 1), torch.cat([self.mask, mask], 1)
        with torch.no_grad():
            actual = self.model(
                self.ids[:, past:], attention_mask=self.mask, past_key_values=self.cache, use_cache=True
            ).logits
        expected = self.reference.logits(self.ids, self.mask, hold=past > 0)[:, past:]
        difference = (actual - expected).abs().amax(-1)[mask.bool()].max().item()
        assert difference <= 1e-4, f"logits differ by {difference:.1e}"
        assert self.cache.get_seq_length() == self.ids.shape[1]
        self.croppable += tokens

    def take_rows(self, indices):
        self.ids, self.mask = self.ids[indices], self.mask[indices]
        self.reference.held = {key: keep[indices] for key, keep in self.reference.held.items()}

    def random_rows(self, number, seed):
        return torch.randint(len(self.ids), (number,), generator=torch.Generator().manual_seed(seed))

    def reorder(self, seed):
        indices = self.random_rows(len(self.ids), seed)
        self.cache.reorder_cache(indices)
        self.take_rows(indices)

    def select(self, seed, by_mask=False):
        chosen = self.random_rows(1 + seed % MAX_ROWS, seed)
        if by_mask:
            chosen = torch.zeros(len(self.ids), dtype=torch.bool).index_fill_(0, chosen, True)
        self.cache.batch_select_indices(chosen)
        self.take_rows(chosen)

    def select_mask(self, seed):
        self.select(seed, by_mask=True)

    def repeat(self, times):
        times = min(times, max(1, MAX_ROWS // len(self.ids)))
        self.cache.batch_repeat_interleave(times)
        self.take_rows(torch.arange(len(self.ids)).repeat_interleave(times))

    def crop(self, tokens):
        # A sliding layer forgets at each crop what has left the window: only what came since can be taken back.
        tokens = min(tokens, self.croppable if self.window else self.ids.shape[1])
        self.cache.crop(-tokens)
        self.croppable = 0
        end = self.ids.shape[1] - tokens
        if end == 0:  # the plain layers beside the routed ones go on with as many rows only
            self.restart(len(self.ids))
        else:
            self.ids, self.mask = self.ids[:, :end], self.mask[:, :end]

    def reset(self, _):
        if not reset_empties():
            return
        self.cache.reset()
        self.restart(1 + self.ids.shape[0] % 3)

    def restart(self, rows):
        """An empty cache decides anew."""
        assert self.cache.get_seq_length() == 0
        self.start(rows, 4)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize(("granularity", "policy"), CASES)
def test_any_sequence_of_operations_equals_recomputation(family, granularity, policy):
    quiet = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))

    @settings(max_examples=EXAMPLES, derandomize=EXAMPLES == 6, **quiet)
    @given(start=STARTS, operations=st.lists(OPERATIONS, min_size=1, max_size=7), seed=st.integers(0, 1000))
    def check(start, operations, seed):
        rows, tokens, padding = start
        conversation = Conversation(family, granularity, policy, seed, padding)
        conversation.start(rows, tokens)
        for name, argument in operations:
            note(f"{name} {argument} on {tuple(conversation.ids.shape)}")
            getattr(conversation, name)(argument)
        conversation.feed(1)
        conversation.feed(3)

    check()
