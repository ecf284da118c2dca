"""Routers in an SFT run of TRL: route the model, freeze its base, and the trainer does the rest.

python examples/sft_with_trl.py
"""

import json

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from router_tuning.embedded import TINY_LLAMA
from router_tuning.model import record_routing, route, save_routers, unroute
from router_tuning.places import ROOT

model = unroute(AutoModelForCausalLM.from_pretrained(TINY_LLAMA))
tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
# With gradient_scale the capacity penalty joins every loss, whoever computes it.
route(model, mod_n=6, granularity="attn_token", target_capacity=0.5, gradient_scale=1.0)
for name, parameter in model.named_parameters():
    parameter.requires_grad_("mod_router" in name)

rows = [json.loads(line)["messages"] for line in open(ROOT / "data/sample/heldout/copy.jsonl", encoding="utf-8")]
data = Dataset.from_list([{"prompt": turns[:1], "completion": turns[1:]} for turns in rows])
arguments = SFTConfig(
    output_dir="sft", max_steps=24, per_device_train_batch_size=16, learning_rate=0.01, lr_scheduler_type="constant",
    gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none", save_strategy="no", logging_steps=8,
)  # fmt: skip
SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer).train()
save_routers(model, "sft/routers")

model.eval()
inputs = tokenizer(["<|user|>\nRepeat: red blue\n<|assistant|>\n"], return_tensors="pt")
with record_routing(model) as log:
    model.generate(**inputs, max_new_tokens=8)
print(f"capacity {log.capacity()['total']:.2f}; routers in sft/routers")
