"""Property: after any sequence of passes and cache operations, the next pass equals recomputing everything."""

import functools
import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from tiny_models import COMMON, reset_empties
from tiny_routed import CACHED, with_reference
from transformers import DynamicCache

CASES = [*CACHED, ("attn_sequence+mlp_sequence", "keep"), ("attn_token+mlp_sequence", "drop")]
EXAMPLES = int(os.environ.get("CACHE_EXAMPLES", "6"))  # more of them for a longer search
MAX_ROWS = 6
SEED = st.integers(0, 10**6)

pair = functools.cache(with_reference)


class Conversation(RuleBasedStateMachine):
    """A batch with its cache, and beside it all its tokens and the reference that recomputes them."""

    def __init__(self, family, granularity, policy):
        super().__init__()
        self.model, self.reference = pair(family, granularity, policy)
        self.window = getattr(self.model.config, "sliding_window", None)

    @initialize(rows=st.integers(1, 3), tokens=st.integers(1, 9), padded=st.booleans(), seed=SEED)
    def begin(self, rows, tokens, padded, seed):
        self.padded, self.generator = padded, torch.Generator().manual_seed(seed)
        # Without a configuration a cache has plain layers, made when they are first asked for.
        self.cache = DynamicCache(config=self.model.config if self.window or seed % 2 else None)
        if self.window:
            self.cache.activate_past_recording()
        self.start(rows, tokens)

    def start(self, rows, tokens):
        """An empty cache decides anew."""
        assert self.cache.get_seq_length() == 0
        self.ids, self.mask = torch.zeros(2, rows, 0, dtype=torch.long)
        self.croppable = 0
        self.feed(tokens)

    @rule(tokens=st.integers(1, 5))
    def feed(self, tokens):
        rows, past = self.ids.shape
        new = torch.randint(3, COMMON["vocab_size"], (rows, tokens), generator=self.generator)
        mask = torch.ones_like(new)
        if past == 0 and self.padded:
            for row in range(rows):
                mask[row, : min(row, tokens - 1)] = 0
        self.ids, self.mask = torch.cat([self.ids, new * mask], 1), torch.cat([self.mask, mask], 1)
        inputs = {"attention_mask": self.mask, "past_key_values": self.cache, "use_cache": True}
        with torch.no_grad():
            actual = self.model(self.ids[:, past:], **inputs).logits
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

    @rule(seed=SEED)
    def reorder(self, seed):
        indices = self.random_rows(len(self.ids), seed)
        self.cache.reorder_cache(indices)
        self.take_rows(indices)

    @rule(rows=st.integers(1, MAX_ROWS), by_mask=st.booleans(), seed=SEED)
    def select(self, rows, by_mask, seed):
        chosen = self.random_rows(rows, seed)
        if by_mask:
            chosen = torch.zeros(len(self.ids), dtype=torch.bool).index_fill_(0, chosen, True)
        self.cache.batch_select_indices(chosen)
        self.take_rows(chosen)

    @rule(times=st.integers(1, 3))
    def repeat(self, times):
        times = min(times, max(1, MAX_ROWS // len(self.ids)))
        self.cache.batch_repeat_interleave(times)
        self.take_rows(torch.arange(len(self.ids)).repeat_interleave(times))

    @rule(tokens=st.integers(0, 8))
    def crop(self, tokens):
        # A sliding layer forgets at each crop what has left the window: only what came since can be taken back.
        tokens = min(tokens, self.croppable if self.window else self.ids.shape[1])
        self.cache.crop(-tokens)
        self.croppable, end = 0, self.ids.shape[1] - tokens
        if end == 0:  # the plain layers beside the routed ones go on with as many rows only
            self.start(len(self.ids), 4)
        else:
            self.ids, self.mask = self.ids[:, :end], self.mask[:, :end]

    @precondition(lambda _: reset_empties())
    @rule(rows=st.integers(1, 3))
    def reset(self, rows):
        self.cache.reset()
        self.start(rows, 4)

    def teardown(self):
        self.feed(1)
        self.feed(3)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize(("granularity", "policy"), CASES)
def test_any_sequence_of_operations_equals_recomputation(family, granularity, policy):
    search = settings(
        max_examples=EXAMPLES, derandomize=EXAMPLES == 6, stateful_step_count=7,
        deadline=None, database=None, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(functools.partial(Conversation, family, granularity, policy), settings=search)
