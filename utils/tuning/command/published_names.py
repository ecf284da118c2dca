"""Arguments as the published code, and earlier versions of this one, named them."""

from __future__ import annotations

RENAMED = {
    "mindskip_n": "mod_n",
    "router_layers": "mod_n",
    "mindskip_capacity": "target_capacity",
    "num_epochs": "num_train_epochs",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "torch_dtype": "dtype",
    "use_auth_token": "token",
    "use_checkpointing": "activation_checkpointing",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "group_by_length": "length_grouping",
    "no_cuda": "use_cpu",
    "resume": "resume_from_checkpoint",
}
"""Published and former names → today's."""

WITHOUT_EFFECT = {
    "use_fast_tokenizer": "labels need the offsets of a fast tokenizer",
    "use_flash_attn": "SDPA takes the flash kernel; --attn_implementation flash_attention_2 for the package",
    "low_cpu_mem_usage": "weights are always loaded lean",
    "overwrite_cache": "encoded data is cached by content",
    "save_safetensors": "only safetensors are written",
    "include_tokens_per_second": "always logged",
    "logging_dir": "TensorBoard logs lie in the output folder",
    "do_train": "this command trains",
}
"""Published names that have nothing left to decide, with the reason."""
