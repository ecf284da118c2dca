"""Closeness to the dense self equals what one row at a time gives; documents are what the file holds."""

import json
import math

import pytest
import torch
from refused import refused
from tiny_checkpoint import write_run
from transformers import AutoModelForCausalLM

from router_tuning.errors import UserError
from router_tuning.evaluation.documents import CONTEXT, encoded, prompt_batches, read_documents, read_rows
from router_tuning.evaluation.texts import answer_loss, compare_texts
from router_tuning.model import flops_share, load_routers
from router_tuning.tuning.batching import Collator
from router_tuning.tuning.encoding import bos_of

PROMPTS = ["<|user|>\nAdd 12 and 3.\n<|assistant|>\n", "<|user|>\nCopy.\nInput: ABC\n<|assistant|>\n", "Hi"]


@pytest.fixture
def files(root):
    return {root / "data/sample/heldout/add.jsonl": 4, root / "data/sample/heldout/code.jsonl": 3}


@pytest.fixture
def documents(tokenizer, files):
    return [document for file, count in files.items() for document in read_documents(file, tokenizer, count, 200)]


@pytest.fixture(scope="module")
def dense(base):
    return AutoModelForCausalLM.from_pretrained(base).eval()


@torch.no_grad()
@pytest.mark.parametrize("granularity", ["attn_token+mlp_token", "attn_sequence"])
def test_closeness_equals_one_row_at_a_time(base, dense, tokenizer, documents, granularity, tmp_path):
    folder = write_run(tmp_path / "run", base, granularity, router_pooling="prompt")
    model = load_routers(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    found = compare_texts(dense, model, documents, Collator(tokenizer))
    kl, nll, agree, tokens = [], [], [], []
    for document in documents:
        ids, labels = torch.tensor([document["input_ids"]]), torch.tensor(document["labels"])[1:]
        learnt = labels != -100
        prompt = torch.tensor([int(learnt.nonzero()[0]) + 1])
        ours = model(ids, prompt_length=prompt, use_cache=False).logits[0, :-1][learnt].log_softmax(-1)
        theirs = dense(ids).logits[0, :-1][learnt].log_softmax(-1)
        kl.append(float((theirs.exp() * (theirs - ours)).sum()))
        nll.append(-float(ours.gather(1, labels[learnt][:, None]).sum()))
        agree.append(int((ours.argmax(-1) == theirs.argmax(-1)).sum()))
        tokens.append(int(learnt.sum()))
    assert found["documents"]["tokens"] == tokens and found["documents"]["agree"] == agree
    assert found["documents"]["kl"] == pytest.approx(kl, rel=1e-3)
    assert found["kl"] == pytest.approx(sum(kl) / sum(tokens), rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(sum(nll) / sum(tokens)), rel=1e-4)
    assert found["share"] == pytest.approx(flops_share(model, found["capacity"]), abs=1e-3) and found["share"] < 1


def test_a_model_is_its_own_dense_self_and_answer_loss_the_mean_over_answers(dense, tokenizer, files, documents):
    found = compare_texts(dense, dense, documents, Collator(tokenizer))
    assert found["kl"] == 0 and found["agreement"] == 1 and found["perplexity"] == found["dense_perplexity"]
    assert "share" not in found
    rows = [row for file, count in files.items() for row in read_rows(file)[:count]]
    loss = answer_loss(dense, encoded(rows, tokenizer, 200), Collator(tokenizer))
    assert loss == pytest.approx(math.log(found["perplexity"]), rel=1e-5)
    asked = encoded([{"messages": row["messages"][:1]} for row in rows], tokenizer, 200)
    for measure in (answer_loss, lambda *given: compare_texts(dense, *given)):
        with refused("none of 7 documents has anything to predict", UserError):
            measure(dense, asked, Collator(tokenizer))


def test_plain_text_becomes_windows_first_ones_first(tokenizer, tmp_path):
    texts = ["Ian was a black frog. " * 12, "A bell rang near the barn. " * 9, "short"]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"page": text}) + "\n" for text in texts))
    found = read_documents(path, tokenizer, 10, 64)
    start = bos_of(tokenizer)
    assert [tokenizer.decode(row["input_ids"])[len(start) :][:30] for row in found[:2]] == [t[:30] for t in texts[:2]]
    for row in found:
        assert row["labels"] == [-100] * CONTEXT + row["input_ids"][CONTEXT:] and len(row["labels"]) <= 64
    assert len(found) > 3 and len(read_documents(path, tokenizer, 2, 64)) == 2
    whole = tmp_path / "whole.txt"
    whole.write_text(texts[0])
    assert read_documents(whole, tokenizer, 1, 64)[0] == found[0]


@pytest.mark.parametrize(
    "content, message, read",
    [
        (None, "(?i)no such file", read_rows),
        ("{", ":1: no JSON", read_rows),
        ('{"a": 1}', ":1: neither a list of 'messages'", read_rows),
        ("\n", "holds no rows", read_rows),
        ('{"text": 3}\n', "need messages", lambda path, t: read_documents(path, t, 3, 64)),
        ('{"text": "a"}\n', "no documents", lambda path, t: read_documents(path, t, 3, 64, 5)),
    ],
)
def test_rows_and_documents_that_are_not_there_are_named(tokenizer, tmp_path, content, message, read):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    with refused(message, UserError):
        read(path) if read is read_rows else read(path, tokenizer)


def test_prompts_are_left_padded_and_complete(tokenizer):
    batches = prompt_batches(PROMPTS, tokenizer, batch_size=2)
    pairs = [pair for b in batches for pair in zip(b["input_ids"], b["attention_mask"], strict=True)]
    rows = [row[mask.bool()].tolist() for row, mask in pairs]
    assert sorted(rows) == sorted(tokenizer(text)["input_ids"] for text in PROMPTS)
    assert all(bool(b["attention_mask"][:, -1].all()) for b in batches)
