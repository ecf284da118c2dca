"""The static control: the search finds the mask that brute force finds."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from tiny_models import tiny_model
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from router_tuning.errors import UserError
from router_tuning.evaluation.rows import labelled_batches, read_rows
from router_tuning.evaluation.static_drop import answer_loss, best_static
from router_tuning.model import force_routing, route

LAYERS = [1, 2, 3]


@pytest.fixture
def model():
    return route(tiny_model(vocab_size=300, max_position_embeddings=512), mod_layers=LAYERS)


@pytest.fixture
def batches(base, root):
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [
        *read_rows(root / "data/sample/heldout/dialogue.jsonl", 3),
        *read_rows(root / "data/sample/heldout/add.jsonl", 4),
    ]
    return labelled_batches(rows, tokenizer, batch_size=3, max_length=256)


@torch.no_grad()
def slow_loss(model, batches):
    """One row at a time, without padding."""
    losses = []
    for batch in batches:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            real = mask.bool()
            logits = model(ids[real][None]).logits[0, :-1]
            losses.append(cross_entropy(logits, labels[real][1:], reduction="none")[labels[real][1:] != -100])
    return torch.cat(losses).mean().item()


def test_answer_loss_is_the_mean_over_answer_tokens(model, batches):
    with force_routing(model, {1: False, 2: True, 3: True}):
        assert answer_loss(model, batches) == pytest.approx(slow_loss(model, batches), rel=1e-5)


def test_search_equals_brute_force(model, batches):
    losses = {}
    for kept in combinations(LAYERS, 2):
        with force_routing(model, {layer: layer in kept for layer in LAYERS}):
            losses[kept] = slow_loss(model, batches)
    assert len(set(losses.values())) == 3
    found = best_static(model, LAYERS, 2, batches)
    assert found.kept == min(losses, key=losses.get) and found.method == "exhaustive"
    assert found.loss == pytest.approx(min(losses.values()), rel=1e-5) and found.capacity == pytest.approx(2 / 3)
    assert found.mask() == {layer: layer in found.kept for layer in LAYERS}


def test_greedy_beyond_the_limit_says_so(model, batches):
    found = best_static(model, LAYERS, 1, batches, max_masks=2)
    assert found.method == "greedy" and len(found.kept) == 1
    two = best_static(model, LAYERS, 2, batches)
    assert set(found.kept) < set(two.kept)


def test_edges(model, batches):
    assert best_static(model, LAYERS, 3, batches).mask() == dict.fromkeys(LAYERS, True)
    assert best_static(model, LAYERS, 0, batches).capacity == 0
    with pytest.raises(ValueError, match="keep_count 4"):
        best_static(model, LAYERS, 4, batches)


@pytest.mark.parametrize(
    "content, message",
    [("{", ":1: no JSON"), ('{"a": 1}', ":1: neither a list of 'messages'"), ("\n", "holds no rows")],
)
def test_bad_rows_are_named(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(UserError, match="(?i)no such file"):
        read_rows(path)
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_rows(path)
