"""What transformers offers for serving: streaming gives the text of generate, what cannot work is refused clearly."""

from threading import Thread

import pytest
from tiny_models import random_batch
from tiny_routed import routed_model
from transformers import AutoTokenizer, GenerationConfig, TextIteratorStreamer

from router_tuning.checkpoint.loading import load_tuned
from router_tuning.model import unroute


@pytest.mark.parametrize("granularity", ["attn_sequence", "attn_token+mlp_token"])
def test_continuous_batching_is_refused_before_it_starts(granularity):
    model, (ids, _) = routed_model(granularity=granularity), random_batch(2, 6)
    options = {
        "generation_config": GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=2, pad_token_id=0)
    }
    with pytest.raises(ValueError, match="continuous batching.*generate") as caught:
        model.generate_batch(ids.tolist(), **options)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="continuous batching"):
        model.init_continuous_batching(**options)
    assert "init_continuous_batching" not in vars(type(unroute(model))), "the dense model may"


def test_streamed_text_is_that_of_generate(base, run):
    model, tokenizer = load_tuned(base, run), AutoTokenizer.from_pretrained(base)
    batch = tokenizer("<|user|>\nAdd 12 and 3.\n<|assistant|>\n", return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=model.generate, kwargs={**batch, **options, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    whole = model.generate(**batch, **options)[0, batch["input_ids"].shape[1] :]
    assert len(pieces) > 1 and "".join(pieces) == tokenizer.decode(whole)
