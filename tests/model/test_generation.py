"""generate() and its relatives: threaded, continued, sampled, assisted, without cache."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import random_batch, tiny_model
from tiny_routed import CACHED, routed_model, with_reference

from router_tuning.model import record_routing

CASES = [*CACHED, ("attn_sequence+mlp_token", "keep")]
GREEDY = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8}


def recomputed(reference, prompt, sequences, granularity):
    """Logits behind each generated token, from scratch, with the prompt's decisions where they hold."""
    held = "sequence" in granularity
    if held:
        reference.logits(prompt)
        repeats = len(sequences) // len(prompt)
        reference.held = {key: keep.repeat_interleave(repeats, 0) for key, keep in reference.held.items()}
    return reference.logits(sequences, hold=held)[:, prompt.shape[1] - 1 : -1]


@pytest.mark.parametrize(("granularity", "policy"), [("attn_sequence", "keep"), ("attn_token", "drop")])
def test_generations_in_threads_do_not_disturb_each_other(granularity, policy):
    model, _ = with_reference("llama", granularity, policy)
    prompts = [random_batch(1 + seed % 3, 5 + seed, seed=seed)[0] for seed in range(6)]
    alone = [model.generate(ids, **GREEDY) for ids in prompts]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda ids: model.generate(ids, **GREEDY), prompts))
    for expected, actual in zip(alone, together, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize(("granularity", "policy"), CASES)
def test_a_conversation_continues_on_its_cache(family, granularity, policy):
    model, reference = with_reference(family, granularity, policy)
    prompt, question = random_batch(2, 8, seed=4)[0], random_batch(2, 4, seed=5)[0]
    first = model.generate(prompt, **GREEDY, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, question], 1)
    options = dict(return_dict_in_generate=True, output_logits=True, past_key_values=first.past_key_values)
    # Without a mask generate() would take the pad ids among the generated tokens for padding.
    second = model.generate(turn, attention_mask=torch.ones_like(turn), **GREEDY, **options)
    assert second.sequences.shape[1] == turn.shape[1] + 8
    expected = recomputed(reference, prompt, second.sequences, granularity)[:, -8:]
    assert (torch.stack(second.logits, 1) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(("granularity", "policy"), CASES[::3])
def test_sampling_with_several_returned_sequences(granularity, policy):
    model, reference = with_reference("llama", granularity, policy)
    prompt = random_batch(2, 8)[0]
    options = dict(do_sample=True, num_return_sequences=3, min_new_tokens=6, max_new_tokens=6)
    options |= dict(return_dict_in_generate=True, output_logits=True)
    torch.manual_seed(7)
    once = model.generate(prompt, **options)
    torch.manual_seed(7)
    assert torch.equal(model.generate(prompt, **options).sequences, once.sequences)
    assert once.sequences.shape == (6, 14) and len(once.sequences.unique(dim=0)) > 2
    expected = recomputed(reference, prompt, once.sequences, granularity)
    assert (torch.stack(once.logits, 1) - expected).abs().max() <= 1e-4


HELPERS = ["itself, dense", "another", "prompt look-up", "its first layers"]


@pytest.mark.parametrize(
    ("family", "granularity", "policy", "helper"),
    [
        *[("llama", *case, helper) for case in CASES[::3] for helper in HELPERS],
        *[("mistral", *case, HELPERS[1]) for case in CASES],
    ],
)
def test_assisted_decoding_gives_the_text_of_plain_decoding(family, granularity, policy, helper):
    model, _ = with_reference(family, granularity, policy)
    for seed in range(2):
        prompt = random_batch(1, 7, seed=seed)[0]
        prompt = torch.cat([prompt, prompt[:, :3]], 1)  # something that a look-up finds
        if helper == "prompt look-up":
            assistance = {"prompt_lookup_num_tokens": 3}
        elif helper == "its first layers":
            assistance = {"assistant_early_exit": 1 + seed}
        else:
            assistance = {"assistant_model": tiny_model(family, seed=0 if helper == "itself, dense" else 9)}
        with record_routing(model) as log:
            plain = model.generate(prompt, **GREEDY)
        with record_routing(model) as assisted_log:
            assisted = model.generate(prompt, **GREEDY, **assistance)
        assert torch.equal(assisted, plain) and model.config.num_hidden_layers == 5
        for key, keep in log.decisions.items():
            if keep.dim() == 1:
                assert torch.equal(assisted_log.decisions[key], keep), "candidates must not be pooled"


def test_a_routed_model_may_assist():
    model, dense = routed_model("llama"), tiny_model("llama", seed=3)
    prompt = random_batch(1, 7)[0]
    assert torch.equal(dense.generate(prompt, assistant_model=model, **GREEDY), dense.generate(prompt, **GREEDY))


@pytest.mark.parametrize(("granularity", "policy"), CASES)
def test_without_a_cache_every_pass_decides_on_what_it_sees(granularity, policy):
    model, reference = with_reference("llama", granularity, policy)
    prompt = random_batch(2, 6)[0]
    out = model.generate(prompt, use_cache=False, **GREEDY, return_dict_in_generate=True, output_logits=True)
    for step, logits in enumerate(out.logits):
        expected = reference.logits(out.sequences[:, : prompt.shape[1] + step])[:, -1]
        assert (logits - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(("granularity", "policy"), CASES[::3])
def test_embeddings_as_prompt_give_the_same_text(granularity, policy):
    model, _ = with_reference("llama", granularity, policy)
    prompt = random_batch(2, 6)[0]
    embedded = model.generate(inputs_embeds=model.get_input_embeddings()(prompt).detach(), **GREEDY)
    assert torch.equal(embedded, model.generate(prompt, **GREEDY)[:, 6:])
