"""Order of rows: the same micro-batches for any number of processes, steps as drawn, little padding."""

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler
from transformers import AutoTokenizer

from router_tuning.tuning.batching import Collator, StepOrder

LENGTHS = [int(n) for n in torch.randint(5, 200, (100,), generator=torch.Generator().manual_seed(0))]


def micro_batches(size=4, seed=1, epoch=0, **options):
    """All of an epoch, in steps of 16 rows."""
    order = StepOrder(LENGTHS, 16, seed, **options)
    order.set_epoch(epoch)
    return BatchSampler(order, batch_size=size, drop_last=False)


def test_grouping_changes_the_order_within_a_step_only():
    for ours, theirs in zip(micro_batches(16), micro_batches(16, group=False), strict=True):
        assert sorted(ours) == sorted(theirs) and ours != theirs
        assert [LENGTHS[row] for row in ours] == sorted((LENGTHS[row] for row in ours), reverse=True)


def test_seed_and_epoch_decide_the_order_of_an_epoch_which_uses_each_row_at_most_once():
    first, again, other, later = (sum(micro_batches(**o), []) for o in ({}, {}, {"seed": 2}, {"epoch": 1}))
    assert len(first) == len(set(first)) == 96 and first == again
    assert first != other and first != later


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_micro_batches_of_one(world):
    whole, ranks = list(micro_batches()), range(world)
    shares = [list(BatchSamplerShard(micro_batches(), num_processes=world, process_index=rank)) for rank in ranks]
    assert all(len(mine) * world == len(whole) for mine in shares)
    for step in range(6):
        together = [batch for mine in shares for batch in mine[step * 4 // world : (step + 1) * 4 // world]]
        assert sorted(together) == sorted(whole[step * 4 : (step + 1) * 4])


def test_collator_pads_on_the_right_and_masks(parts):
    tokenizer = AutoTokenizer.from_pretrained(parts["base"])
    batch = Collator(tokenizer)(
        [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "length": 3}, {"input_ids": [8], "labels": [8], "length": 1}]
    )
    pad = tokenizer.pad_token_id
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, pad, pad]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["prompt_length"].tolist() == [1, 0]
