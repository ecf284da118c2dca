"""generate() and its relatives: whatever loop of transformers asks, each token is what recomputation gives."""

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import random_batch, tiny_model
from tiny_routed import CACHED, KINDS, routed_model, with_reference

from router_tuning.model import record_routing

CASES = [*CACHED, ("attn_sequence+mlp_token", "keep")]
# Of whole, sliding and mixed attention, and of experts.
MATRIX = [
    *[(f, *case, "zero") for f in ("llama", "gemma3_text") for case in (*KINDS, ("attn_token+mlp_token", "keep"))],
    *[(f, "attn_sequence+mlp_token", "keep", "zero") for f in ("llama", "gemma3_text")],
    *[(f, "attn_token", "drop", "zero") for f in ("mistral", "gemma2", "phi3", "smollm3")],
    *[("mixtral", g, p, "zero") for g, p in (("expert_token", "keep"), ("attn_token+expert_token", "drop"))],
    *[("llama", g, "keep", "low_rank") for g in ("attn_sequence+mlp_token", "block_token")],
]
GREEDY = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8}
WITH_LOGITS = {"return_dict_in_generate": True, "output_logits": True}
PADDED = dict(zip(("input_ids", "attention_mask"), random_batch(padding="left"), strict=True))
PROMPT, _ = random_batch(2, 6)


@functools.cache
def pair(family, granularity, policy="keep", skip="zero"):
    return with_reference(family, granularity, policy, "eager" if family == "gemma2" else "sdpa", skip=skip)


def recomputed(reference, input_ids, attention_mask, sequences, granularity):
    """Logits behind each generated token, from scratch, with the prompt's decisions where they hold."""
    held, times = "sequence" in granularity, len(sequences) // len(input_ids)
    prompt, mask = (each.repeat_interleave(times, 0) for each in (input_ids, attention_mask))
    if held:
        reference.logits(prompt, mask)
    new = torch.ones(len(sequences), sequences.shape[1] - prompt.shape[1], dtype=torch.long)
    return reference.logits(sequences, torch.cat([mask, new], 1), hold=held)[:, prompt.shape[1] - 1 : -1]


def close(logits, expected):
    """Those of ``generate``, one ``[b, vocabulary]`` a step, are the expected ones."""
    torch.testing.assert_close(torch.stack(logits, 1), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "granularity", "policy", "skip", "copies"),
    [
        *[(*case, 1) for case in MATRIX],
        *[("llama", *case, "zero", 3) for case in CASES[::3]],
        ("llama", "attn_token+mlp_token", "keep", "low_rank", 12),  # more rows than run whole or not at all
    ],
)
def test_logits_are_those_of_recomputation(family, granularity, policy, skip, copies):
    model, reference = pair(family, granularity, policy, skip)
    options = dict(do_sample=copies > 1, num_return_sequences=copies, min_new_tokens=6, max_new_tokens=6)
    out = model.generate(**PADDED, **options, **WITH_LOGITS)
    assert len(out.sequences.unique(dim=0)) == 3 * copies
    close(out.logits, recomputed(reference, **PADDED, sequences=out.sequences, granularity=granularity))


@pytest.mark.parametrize(("family", "granularity", "policy", "skip"), MATRIX)
def test_beam_search_equals_recomputation(family, granularity, policy, skip):
    """Beams fork and die; what the cache then holds must still be each beam's own past."""
    model, reference = pair(family, granularity, policy, skip)
    inputs = {name: values[:2] for name, values in PADDED.items()}
    out = model.generate(
        **inputs, max_new_tokens=5, min_new_tokens=5, num_beams=3, num_return_sequences=2, do_sample=False,
        output_scores=True, return_dict_in_generate=True, length_penalty=0.0,
    )  # fmt: skip
    logits = recomputed(reference, **inputs, sequences=out.sequences, granularity=granularity)
    chosen = logits.log_softmax(-1).gather(2, out.sequences[:, PADDED["input_ids"].shape[1] :, None])
    assert torch.allclose(chosen.sum((1, 2)), out.sequences_scores, atol=1e-3)


@pytest.mark.parametrize(("granularity", "policy"), CASES)
def test_without_a_cache_every_pass_decides_on_what_it_sees(granularity, policy):
    model, reference = pair("llama", granularity, policy)
    out = model.generate(PROMPT, use_cache=False, **GREEDY, **WITH_LOGITS)
    seen = [out.sequences[:, : PROMPT.shape[1] + step] for step in range(8)]
    close(out.logits, torch.stack([reference.logits(ids)[:, -1] for ids in seen], 1))


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize(("granularity", "policy"), CASES)
def test_a_conversation_continues_on_its_cache(family, granularity, policy):
    model, reference = pair(family, granularity, policy)
    prompt, question = random_batch(2, 8, seed=4)[0], random_batch(2, 4, seed=5)[0]
    first = model.generate(prompt, **GREEDY, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, question], 1)
    # Without a mask generate() would take the pad ids among the generated tokens for padding.
    options = dict(attention_mask=torch.ones_like(turn), past_key_values=first.past_key_values)
    second = model.generate(turn, **options, **GREEDY, **WITH_LOGITS)
    assert second.sequences.shape[1] == turn.shape[1] + 8
    close(second.logits, recomputed(reference, prompt, torch.ones_like(prompt), second.sequences, granularity)[:, -8:])


@pytest.mark.parametrize(("granularity", "policy"), [("attn_sequence", "keep"), ("attn_token", "drop")])
def test_generations_in_threads_do_not_disturb_each_other(granularity, policy):
    model, _ = pair("llama", granularity, policy)
    prompts = [random_batch(1 + seed % 3, 5 + seed, seed=seed)[0] for seed in range(6)]
    alone = [model.generate(ids, **GREEDY) for ids in prompts]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda ids: model.generate(ids, **GREEDY), prompts))
    assert all(map(torch.equal, together, alone))


HELPERS = {
    "itself, dense": lambda family, seed: {"assistant_model": tiny_model(family)},
    "another": lambda family, seed: {"assistant_model": tiny_model(family, seed=9)},
    "another, routed": lambda family, seed: {"assistant_model": routed_model(family, seed=9)},
    "prompt look-up": lambda family, seed: {"prompt_lookup_num_tokens": 3},
    "its first layers": lambda family, seed: {"assistant_early_exit": 1 + seed},
}


@pytest.mark.parametrize(
    ("family", "granularity", "policy", "helper"),
    [
        *[("llama", *case, helper) for case in CASES[::3] for helper in HELPERS],
        *[("mistral", *case, "another") for case in CASES],
    ],
)
def test_assisted_decoding_gives_the_text_of_plain_decoding(family, granularity, policy, helper):
    model, _ = pair(family, granularity, policy)
    for seed in range(2):
        prompt = random_batch(1, 7, seed=seed)[0]
        prompt = torch.cat([prompt, prompt[:, :3]], 1)  # something that a look-up finds
        with record_routing(model) as log:
            plain = model.generate(prompt, **GREEDY)
        with record_routing(model) as assisted_log:
            assisted = model.generate(prompt, **GREEDY, **HELPERS[helper](family, seed))
        assert torch.equal(assisted, plain) and model.config.num_hidden_layers == 5
        for key, keep in log.decisions.items():
            assert keep.dim() > 1 or torch.equal(assisted_log.decisions[key], keep), "candidates must not be pooled"


@pytest.mark.parametrize(("granularity", "policy"), CASES[::3])
def test_embeddings_as_prompt_give_the_same_text(granularity, policy):
    model, _ = pair("llama", granularity, policy)
    embedded = model.generate(inputs_embeds=model.get_input_embeddings()(PROMPT).detach(), **GREEDY)
    assert torch.equal(embedded, model.generate(PROMPT, **GREEDY)[:, 6:])
