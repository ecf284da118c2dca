"""Routers under a training loop of one's own: stay close to the dense model, and pay for what runs.

python examples/own_loop.py
"""

import json

import torch
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from router_tuning.embedded import TINY_LLAMA
from router_tuning.model import (
    capacity_penalty,
    fit_skip_paths,
    force_routing,
    record_routing,
    route,
    save_routers,
    unroute,
)
from router_tuning.places import ROOT

torch.manual_seed(0)
model = unroute(AutoModelForCausalLM.from_pretrained(TINY_LLAMA))
tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA, padding_side="right")
rows = [json.loads(line)["messages"] for line in open(ROOT / "data/sample/heldout/dialogue.jsonl", encoding="utf-8")]
texts = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in rows]
batches = [dict(tokenizer(texts[i : i + 16], return_tensors="pt", padding=True)) for i in range(0, len(texts), 16)]
for batch in batches:
    batch.pop("token_type_ids", None)

route(model, mod_n=6, granularity="attn_token", skip="low_rank", target_capacity=0.5, gradient_scale=0.0)
fit_skip_paths(model, batches, kind="low_rank", rank=32)  # closed form: what a skipped token gets
routers = [p.requires_grad_() for name, p in model.requires_grad_(False).named_parameters() if "mod_router" in name]
optimizer = torch.optim.Adam(routers, lr=0.01)

for step in range(24):
    batch = batches[step % len(batches)]
    real = batch["attention_mask"].bool()
    with torch.no_grad(), force_routing(model.eval(), True):
        dense = log_softmax(model(**batch).logits[real], -1)
    logits = model.train()(**batch).logits[real]
    divergence = kl_div(log_softmax(logits, -1), dense, log_target=True, reduction="batchmean")
    loss = divergence + 0.1 * capacity_penalty(model)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 8 == 7:
        print(f"step {step + 1}: divergence {divergence.item():.4f} nats per token")

save_routers(model.eval(), "routers")
with torch.no_grad(), record_routing(model) as log:
    model(**batches[0])
print(f"capacity {log.capacity()['total']:.2f}; routers in routers")
