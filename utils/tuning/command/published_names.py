"""Arguments as the published code, and earlier versions of this one, named them."""

from __future__ import annotations

from collections import deque

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

BOOLEANS = {"chat_template": {"true": "own", "false": "published"}}
"""Arguments that took true or false (without a value: true) → what each now means."""

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


def modernise(argv: list[str]) -> tuple[list[str], list[str]]:
    """Map old names and values in ``argv`` to new ones and drop those without effect; the arguments and notes."""
    result: list[str] = []
    renamed: dict[str, str] = {}
    dropped: dict[str, str] = {}
    rest = deque(argv)
    while rest:
        token = rest.popleft()
        if not token.startswith("--"):
            result.append(token)
            continue
        name, equals, value = token[2:].partition("=")
        name, values = name.replace("-", "_"), [value] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            values.append(rest.popleft())
        if name in WITHOUT_EFFECT:
            dropped[name] = WITHOUT_EFFECT[name]
            continue
        if name in RENAMED:
            renamed[f"--{name}"] = f"--{RENAMED[name]}"
            name = RENAMED[name]
        given = " ".join(values) or "true"
        if new := BOOLEANS.get(name, {}).get(given.lower()):
            renamed[f"--{name} {given}"], values = f"--{name} {new}", [new]
        result += [f"--{name}={values[0]}"] if equals else [f"--{name}", *values]
    notes = []
    if renamed:
        notes.append("old names: " + ", ".join(f"{old} is now {new}" for old, new in renamed.items()))
    if dropped:
        notes.append("without effect: " + "; ".join(f"--{name} ({why})" for name, why in dropped.items()))
    return result, notes
