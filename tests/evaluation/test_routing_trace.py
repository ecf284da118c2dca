"""The data behind the routing report: the decisions that generation really took, and honest averages of them."""

import json

import pytest
import torch
from tiny_checkpoint import write_run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from router_tuning.errors import UserError
from router_tuning.evaluation.documents import encoded, rendered
from router_tuning.model import load_routers, record_routing
from router_tuning.tuning.batching import Collator
from router_tuning.tuning.encoding import render_prompt
from router_tuning.viewer.routing_page import routing_page
from router_tuning.viewer.routing_trace import capacities, collect, dial_curve, dynamics, token_texts, trace_prompts

ASKED = {"What is 3+9?": "add", "What is 4+4?": "add", "Copy </script><!-- the\ntext": "copy"}
ROWS = [
    {"task": task, "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "12"}]}
    for text, task in ASKED.items()
]


@pytest.fixture(scope="module")
def token_model(tmp_path_factory, base):
    run = write_run(tmp_path_factory.mktemp("trace"), base, "attn_token+mlp_token")
    return load_routers(AutoModelForCausalLM.from_pretrained(base), run).eval()


def traced(model, tokenizer, new):
    """The trace of a prompt that is padded, beside a longer one, and its ids."""
    trace = trace_prompts(model, tokenizer, [ROWS[2], ROWS[0]], max_new_tokens=new)[1]
    return trace, tokenizer(render_prompt(ROWS[0], tokenizer), return_tensors="pt")["input_ids"]


@torch.no_grad()
def test_token_level_trace_is_that_of_one_pass_over_the_answer(token_model, tokenizer):
    trace, ids = traced(token_model, tokenizer, 6)
    whole = token_model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)[:, :-1]
    with record_routing(token_model) as log:
        token_model(whole, use_cache=False)
    assert trace["prompt_tokens"] == ids.shape[1] and len(trace["tokens"]) == whole.shape[1]
    assert set(trace["routers"]) == {f"{layer}.{part}" for layer in (1, 2, 3) for part in ("attn", "mlp")}
    for (layer, part), keep in log.decisions.items():
        found = trace["routers"][f"{layer}.{part}"]
        assert found["keep"] == keep[0].float().tolist()
        assert found["score"] == pytest.approx(log.scores[layer, part][0].tolist(), abs=1e-4)
    kept = [share for router in trace["routers"].values() for share in router["keep"]]
    assert 0 < sum(kept) < len(kept)


@torch.no_grad()
def test_sequence_level_trace_is_the_decision_on_the_prompt(routed, tokenizer):
    trace, ids = traced(routed, tokenizer, 3)
    with record_routing(routed) as log:
        routed(ids)
    for layer, keep in log.decisions.items():
        found = trace["routers"][f"{layer}.attn"]
        assert found == {"keep": int(keep), "score": pytest.approx(log.scores[layer].item(), abs=1e-4)}


def test_tokens_are_told_as_text_whatever_the_tokenizer_cuts():
    """Bytes of one character lie in several tokens of a byte-level tokenizer; a leading space is shown."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    found = token_texts(tokenizer, tokenizer("a é\n🙂שא", add_special_tokens=False)["input_ids"])
    assert found == ["a", "␣", "é¹", "é²", "⏎", "🙂¹", "🙂²", "🙂³", "🙂⁴", "ש¹", "ש²", "א¹", "א²"]
    cut = tokenizer("x🙂", add_special_tokens=False)["input_ids"][:3]
    assert token_texts(tokenizer, cut)[0] == "x" and len(token_texts(tokenizer, cut)) == 3


def test_collect_summarises_what_the_prompts_show(routed, token_model, tokenizer):
    found = collect(routed, tokenizer, ROWS, max_new_tokens=2)
    keeps = {name: [prompt["routers"][name]["keep"] for prompt in found["prompts"]] for name in found["routers"]}
    assert found["capacity"]["by_router"] == {name: pytest.approx(sum(keep) / 3) for name, keep in keeps.items()}
    assert found["capacity"]["by_task"]["add"]["1.attn"] == sum(keeps["1.attn"][:2]) / 2
    assert found["dynamics"]["inputs"] == 3 and "by_position" not in found["capacity"]
    plain = {"prompt": "3+9=", "completion": "12"}
    tokens = collect(token_model, tokenizer, [ROWS[0], plain], max_new_tokens=2)
    assert [prompt["prompt"] for prompt in tokens["prompts"]] == ["What is 3+9?", "3+9="]
    with pytest.raises(UserError, match="no prompt"):
        rendered([{"prompt": "", "completion": "It was a dark night."}], tokenizer)
    assert tokens["dynamics"] is None


def test_capacities_by_position_and_phase():
    keep = [1.0] * 10 + [0.0] * 10
    prompts = [{"task": "t", "tokens": keep, "prompt_tokens": 15, "routers": {"2.mlp": {"keep": keep, "score": None}}}]
    found = capacities(prompts, ["2.mlp"])
    assert found["by_position"]["2.mlp"] == [1.0] * 5 + [0.0] * 5 and found["total"] == 0.5
    assert found["by_phase"]["2.mlp"] == {"prompt": pytest.approx(2 / 3), "generated": 0.0}


def test_dial_reaches_all_and_nothing_and_is_put_back(routed, tokenizer):
    documents = encoded(ROWS, tokenizer, 128)
    before = routed.config.mod_threshold
    curve = dial_curve(routed, documents, Collator(tokenizer), {"none": 1.0, "all": 0.0, "own": before})
    assert curve[0]["capacity"] == 0 and curve[-1] == {"label": "all", "capacity": 1.0, "loss": curve[-1]["loss"]}
    assert routed.config.mod_threshold == before and len({point["loss"] for point in curve}) == 3


def test_page_carries_its_data_and_nothing_from_elsewhere(routed, tokenizer):
    data = collect(routed, tokenizer, ROWS, max_new_tokens=2)
    data |= {"dial": [], "training": [], "metadata": {"run": "<b>"}}
    page = routing_page(data, "A <title> & more")
    assert "<title>A &lt;title&gt; &amp; more</title>" in page
    assert page.count("</script>") == 2 and "<!--" not in page, "data must not end the script element"
    packed = page.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    assert json.loads(packed)["prompts"] == json.loads(json.dumps(data["prompts"]))
    assert not any(word in page for word in ("src=", "href=", "@import"))


@pytest.mark.parametrize(
    "decisions, mask_entropy, task_information, masks",
    [
        ({"a": [[1, 0]] * 5, "b": [[1, 0]] * 3}, 0, 0, 1),
        ({"a": [[1, 1]] * 4, "b": [[0, 1]] * 4}, 1, 1, 2),
        ({task: [[0, 1], [1, 1]] * 8 for task in "ab"}, 1, 0, 2),
    ],
    ids=["static", "a mask per task", "noise"],
)
def test_known_distributions_of_decisions_have_known_entropies(decisions, mask_entropy, task_information, masks):
    found = dynamics(decisions)
    assert found["mask_entropy"] == pytest.approx(mask_entropy) and found["masks"] == masks
    assert found["task_information"] == pytest.approx(task_information)
    first, second = found["routers"]
    assert first["entropy"] == pytest.approx(mask_entropy) and first["information"] == pytest.approx(task_information)
    assert second["entropy"] == second["information"] == 0
