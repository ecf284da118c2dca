"""Scores in process: stock lm-eval's numbers, whatever the batch, with every document's and the cost beside them."""

import logging
from functools import partial

import pytest
import torch
from lm_eval.api.instance import Instance
from tiny_checkpoint import write_run
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from router_tuning.evaluation import tasks
from router_tuning.evaluation.routed_lm import RoutedLM
from router_tuning.evaluation.tasks import evaluate, requested_tokens
from router_tuning.model import force_routing, load_routers, record_routing
from router_tuning.model.recording import routed_base

TASKS = ["mod_copy_gen", "mod_math_mc", "mod_dialogue_mc", "mod_story_text"]


@pytest.fixture(scope="module")
def result(routed, tokenizer):
    return evaluate(routed, tokenizer, TASKS, batch_size=4, limit=6)["tasks"]


@pytest.mark.parametrize("size", [16, "auto"])
def test_batch_size_changes_no_score(routed, tokenizer, result, monkeypatch, size):
    monkeypatch.setattr(tasks, "RoutedLM", partial(RoutedLM, max_batch_size=2))  # of "auto", which tries it out
    other = evaluate(routed, tokenizer, TASKS, batch_size=size, limit=6)["tasks"]
    for task in TASKS:
        assert other[task]["scores"] == pytest.approx(result[task]["scores"], rel=1e-5)
        assert other[task]["capacity"] == pytest.approx(result[task]["capacity"])
    found = result["mod_math_mc"]
    assert found["metric"] == "acc_norm" and found["value"] == found["documents"].count("1") / 6
    assert result["mod_copy_gen"]["version"] == 1.0 and "documents" not in result["mod_story_text"]


def test_padding_is_not_counted_as_what_ran(base, tokenizer, tmp_path):
    run = write_run(tmp_path / "run", base, "mlp_token")
    model = load_routers(AutoModelForCausalLM.from_pretrained(base), run).eval()
    one, many = (
        evaluate(model, tokenizer, ["mod_dialogue_mc"], batch_size=size, limit=3)["tasks"]["mod_dialogue_mc"]
        for size in (1, 16)
    )
    assert many["decisions"] == one["decisions"] and many["scores"] == pytest.approx(one["scores"], rel=1e-5)
    assert many["capacity"] == pytest.approx(one["capacity"]) and many["share"] == pytest.approx(one["share"])


def test_a_task_says_how_long_an_answer_may_be_and_not_the_base(routed, tokenizer, monkeypatch):
    generate, lengths = routed.generate, []

    def noted(ids, **options):
        output = generate(ids, **options)
        lengths.append(output.shape[1] - ids.shape[1])
        return output

    monkeypatch.setattr(routed, "generate", lambda input_ids, **options: noted(input_ids, **options))
    monkeypatch.setattr(routed.generation_config, "max_new_tokens", 1)
    evaluate(routed, tokenizer, ["mod_copy_gen"], limit=1)
    assert lengths[0] > 1 and routed.generation_config.max_new_tokens == 1


def test_decisions_on_the_prompt_alone_see_no_answer(routed, tokenizer, monkeypatch):
    """All choices of a question are scored under one decision, that of its prompt, whatever their lengths."""
    monkeypatch.setattr(routed_base(routed).mod_config, "router_pooling", "prompt")
    monkeypatch.setattr(routed.config, "mod_router_pooling", "prompt")
    lm = RoutedLM(pretrained=routed, tokenizer=tokenizer, batch_size=4)
    prompt = tokenizer("Which?")["input_ids"]
    answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("ab", "abcd efg", "hi jkl", "zy")]
    with torch.no_grad(), record_routing(routed) as log:
        found = [score for score, _ in lm._loglikelihood_tokens([(None, prompt, answer) for answer in answers])]
        routed(torch.tensor([prompt]))
    for records in log.records.values():
        assert all(torch.equal(r.keep, records[-1].keep.expand(len(r.keep))) for r in records)
    for answer, score in zip(answers, found, strict=True):
        with torch.no_grad(), force_routing(routed, log.decisions):
            logits = routed(torch.tensor([prompt + answer]), prompt_length=torch.tensor([len(prompt)])).logits
        chosen = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert score == pytest.approx(float(chosen.gather(1, torch.tensor(answer)[:, None]).sum()), rel=1e-5)


def test_cost_of_a_task_is_what_runs_under_its_context(routed, tokenizer, result):
    found = result["mod_math_mc"]
    assert set(found["capacity"]) == {"1.attn", "2.attn", "3.attn"} and found["requests"] == 24
    asked = []

    def under(task):
        asked.append(task)
        return force_routing(routed, {1: True, 2: False, 3: False})

    forced = evaluate(routed, tokenizer, ["mod_math_mc"], limit=2, under=under)["tasks"]["mod_math_mc"]
    assert forced["capacity"] == {"1.attn": 1.0, "2.attn": 0.0, "3.attn": 0.0} and asked == ["mod_math_mc"]
    assert forced["share"] < found["share"] < 1


@torch.no_grad()
def test_rolling_text_stands_behind_one_bos(base):
    """Also where the tokenizer puts one in front of the text by itself."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    first = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=first)
    text = "Ian was a black frog."
    request = Instance("loglikelihood_rolling", {}, (text,), 0, metadata=("t", 0, 1))
    lm = RoutedLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    [found] = lm.loglikelihood_rolling([request], disable_tqdm=True)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    logits = model(ids).logits[0, :-1].log_softmax(-1)
    assert ids[0].tolist().count(tokenizer.bos_token_id) == 1 and "capacity" not in lm.costs["t"]
    assert found == pytest.approx(float(logits.gather(1, ids[0, 1:, None]).sum()), rel=1e-5)
    assert lm.tok_encode(text) == ids[0].tolist(), "and is as before for prompts"


def test_tokens_to_read_are_those_of_prompts_and_choices(tokenizer, caplog):
    logging.getLogger("lm_eval").setLevel(logging.INFO)
    one, two = (requested_tokens(["mod_math_mc"], limit, tokenizer) for limit in (1, 2))
    assert 0 < one < two and requested_tokens([], None, tokenizer) == 0
    assert not caplog.records, "lm-eval's own remarks are none for a user"
