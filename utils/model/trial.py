"""Acceptance by trial: a routed model runs beside its masked dense self before anybody trusts it.

Modules of the right names may mean something else: attention whose keys later layers reuse, keys normalised in a way
of their own, an MLP that returns a tuple, arguments per token that nobody here knows. No list of names tells them; a
small batch does, in which every routed module runs for some sequences or tokens and not for others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from .recording import force_routing, routed_base
from .routed import Routed

_HELD = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM)
"""Classes that tests hold at every granularity; a model made of nothing else need not be tried."""
_PROMPT = 4
"""Tokens that fill the cache; one more is decoded."""
_MASK = ((0, 1, 1, 1, 1), (1, 1, 1, 1, 1), (1, 1, 1, 0, 1))  # padding on either side
_ROWS = ((False, True, False), (False, False, False), (True, False, True))  # sequences that a router keeps, in turn
_NAMES = {"attn": "attention", "mlp": "MLP", "expert": "experts", "block": "block", "layer": "output"}


def accept(model: PreTrainedModel) -> None:
    """Try a freshly routed model; one without weights (meta device, ZeRO-3's shards) when it first runs with them."""
    held = type(model) in _HELD and _is_the_librarys(model)
    if not held and _has_weights(model):
        try_out(model)
    elif not held:
        routed_base(model).mod_untried = True


def try_at_first_use(decoder: nn.Module) -> None:
    """Try a decoder that was routed without weights. Processes that run together cannot: they hold parts of it."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if _has_weights(decoder) and not together:
        decoder.mod_untried = False
        try:
            try_out(decoder)
        except ValueError:
            decoder.mod_untried = True
            raise


def _is_the_librarys(model: PreTrainedModel) -> bool:
    """Whether all modules that matter are those of the family's own file, not somebody's in their place."""
    parts = [part for layer in routed_base(model).layers for part in (layer, layer.self_attn, layer.mlp)]
    return {type(part).__module__ for part in parts} == {type(model).__module__}


def _has_weights(model: nn.Module) -> bool:
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return False
    meta = any(parameter.is_meta for parameter in model.parameters())
    return not meta or any(hasattr(module, "_hf_hook") for module in model.modules())  # offloaded weights come back


def try_out(model: nn.Module) -> None:
    """Compare a routed model under forced mixed decisions, a prefill and a decoded token, with the masked dense one.

    Three passes over three sequences of at most five tokens. Every layer is given the dense model's input, so that
    rounding does not add up and what differs is named where it differs. The model is left as it was found.

    Raises:
        ValueError: one line that names layer, module and reason.
    """
    trial = _Trial(model)
    decoder, mask = trial.decoder, trial.mask
    embedding = decoder.get_input_embeddings()
    ids = (torch.arange(15, device=mask.device) * 37 + 3).view(3, 5) % embedding.weight.shape[0]
    with _evaluation(decoder), torch.no_grad():
        try:
            with force_routing(decoder, True), trial.masked_dense():
                decoder(input_ids=ids, attention_mask=mask, use_cache=False)
        except Exception as error:
            raise trial.refusal(*trial.at, f"fails on a whole batch: {_line(error)}") from None
        try:
            with force_routing(decoder, trial.decision), trial.routed():
                first = decoder(input_ids=ids[:, :_PROMPT], attention_mask=mask[:, :_PROMPT], use_cache=True)
                trial.past = _PROMPT
                held = first.past_key_values
                decoder(input_ids=ids[:, _PROMPT:], attention_mask=mask, past_key_values=held, use_cache=True)
        except Exception as error:
            raise trial.refusal(*trial.at, f"fails on a part of a batch: {_line(error)}") from None
    trial.compare()


class _Trial:
    """What the dense and the routed passes leave: inputs and outputs of layers, outputs of routed modules."""

    def __init__(self, model: nn.Module) -> None:
        self.decoder, self.name = routed_base(model), type(model).__name__
        found = [m for m in self.decoder.modules() if isinstance(getattr(m, "mod_router", None), nn.Module)]
        self.modules: list[Routed] = sorted(found, key=lambda m: (m.mod_layer, m.mod_part))
        self.numbers = {(m.mod_layer, m.mod_part): number for number, m in enumerate(self.modules)}
        self.levels = self.decoder.mod_config.parts
        self.mask = torch.tensor(_MASK, device=self.decoder.get_input_embeddings().weight.device)
        self.past, self.at = 0, (0, "layer")
        self.inputs: dict[int, Tensor] = {}
        self.wanted: dict[tuple[int, str], Tensor] = {}
        self.got: dict[tuple[int, str], list[Tensor]] = {}

    def decision(self, layer: int, part: str, shape: torch.Size, past: int) -> Tensor:
        """The forced decision of a router: ``[3]``, ``[3, t]`` or, for experts, ``[3·t, k]``."""
        number, device = self.numbers[layer, part], self.mask.device
        if self.levels[part] == "sequence":
            return torch.tensor(_ROWS[number % 3], device=device)
        tokens = shape[0] // 3 if part == "expert" else shape[1]
        kind = torch.arange(3, device=device)[:, None] + 2 * torch.arange(self.past, self.past + tokens, device=device)
        if part == "expert":
            kind = kind.view(-1, 1) + torch.arange(shape[1], device=device)
        return (kind + number) % 3 != 0

    @contextmanager
    def masked_dense(self) -> Iterator[None]:
        """Mask the outputs of modules that run whole, and the keys that are not offered; note what passes through."""
        with ExitStack() as stack:
            for module in self.modules:
                stack.callback(module.register_forward_pre_hook(self._mask_input, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._mask_output, with_kwargs=True).remove)
            self._watch(stack, self.wanted.__setitem__)
            for number, layer in enumerate(self.decoder.layers):

                def note(_, args, kwargs, number=number):
                    self.inputs[number] = (args[0] if args else kwargs["hidden_states"]).clone()

                stack.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
            yield

    @contextmanager
    def routed(self) -> Iterator[None]:
        """Give each layer the dense model's input; note what comes out."""
        with ExitStack() as stack:
            for number, layer in enumerate(self.decoder.layers):

                def give(_, args, kwargs, number=number):
                    given = args[0] if args else kwargs["hidden_states"]
                    known = self.inputs[number].narrow(-2, self.past, given.shape[-2])
                    return ((known, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": known})

                stack.callback(layer.register_forward_pre_hook(give, with_kwargs=True).remove)
            self._watch(stack, lambda key, output: self.got.setdefault(key, []).append(output))
            yield

    def _watch(self, stack: ExitStack, put: Any) -> None:
        watched = {(m.mod_layer, m.mod_part): m for m in self.modules}
        watched |= {(number, "layer"): layer for number, layer in enumerate(self.decoder.layers)}
        for key, module in watched.items():

            def enter(*_, key=key):
                self.at = key

            def leave(_, args, output, key=key):
                output = output[0] if isinstance(output, tuple) else output
                put(key, output.unflatten(0, (3, -1)) if key[1] == "expert" else output)

            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)

    def _keep(self, module: Routed, tokens: int) -> Tensor:
        """What runs of ``[3, t]``; padding never does at token level, the first token always beside a skip path."""
        keep = self.decision(module.mod_layer, module.mod_part, torch.Size((3, tokens)), 0)
        keep = keep[:, None].expand(3, tokens) if keep.dim() == 1 else keep & self.mask.bool()
        return keep if module.mod_skip is None else keep | (self.mask.bool() & (self.mask.cumsum(1) == 1))

    def _mask_input(self, module: Routed, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if module.mod_part == "expert":
            hidden, index, weights = args
            keep = self.decision(module.mod_layer, "expert", index.shape, 0)
            return (hidden, index, weights * (keep & self.mask.bool().view(-1, 1))), kwargs
        mask = kwargs.get("attention_mask")
        if (
            module.mod_part == "mlp"
            or module.mod_level == "sequence"
            or module.mod_kv_policy == "keep"
            or mask is None
        ):
            return args, kwargs
        keep = self._keep(module, mask.shape[-1])
        offered = (keep[:, None] | torch.eye(keep.shape[1], dtype=torch.bool, device=keep.device))[:, None]
        if mask.dtype == torch.bool:
            return args, {**kwargs, "attention_mask": mask & offered}
        return args, {**kwargs, "attention_mask": mask.masked_fill(~offered, torch.finfo(mask.dtype).min)}

    def _mask_output(self, module: Routed, args: tuple, kwargs: dict, output: Any) -> Any:
        if module.mod_part == "expert":
            return output
        given = args[0] if args else kwargs["hidden_states"]
        skipped = module.mod_skipped(given)
        if module.mod_part == "block":
            skipped = module.mod_skipped(module.mod_features(given), given)
        update = output[0] if isinstance(output, tuple) else output
        update = torch.where(self._keep(module, given.shape[-2])[..., None], update, skipped)
        return (update, *output[1:]) if isinstance(output, tuple) else update

    def compare(self) -> None:
        """ValueError for the first module or layer whose output differs where tokens are real."""
        order = list(_NAMES)
        for key in sorted(self.wanted, key=lambda key: (key[0], order.index(key[1]))):
            wanted = self.wanted[key].float()
            if key not in self.got:
                raise self.refusal(*key, "takes no part in a pass through a cache")
            got = torch.cat(self.got[key], dim=-2).float()
            if got.shape != wanted.shape:
                raise self.refusal(*key, f"gives {tuple(got.shape)} in place of {tuple(wanted.shape)}")
            size = wanted.norm(dim=-1)
            usual = size[size > 0].median() if bool((size > 0).any()) else size.new_ones(())
            error = (got - wanted).norm(dim=-1) / size.clamp(min=usual)
            error = error[..., self.mask.bool()].nan_to_num(0.0).max().item()
            if error > max(1e-3, 8 * torch.finfo(self.wanted[key].dtype).eps):
                raise self.refusal(*key, f"differs from the masked dense model's by {error:.2g} of its size")

    def refusal(self, layer: int, part: str, reason: str) -> ValueError:
        """The error that says what cannot be routed, and why."""
        config = self.decoder.mod_config
        packs = config.kv_policy == "keep" and "token" in (self.levels.get("attn"), self.levels.get("block"))
        advice = "; try kv_policy 'drop', or sequence level" if packs and part not in ("mlp", "expert") else ""
        what = f"layer {layer} of {self.name} cannot be routed as {config.granularity!r}"
        return ValueError(f"{what}: its {_NAMES[part]} {reason}{advice}")


@contextmanager
def _evaluation(decoder: nn.Module) -> Iterator[None]:
    """No dropout, no log, no random number spent; every module's own mode afterwards."""
    modes, logs = [(module, module.training) for module in decoder.modules()], decoder.mod_logs
    decoder.eval()
    decoder.mod_logs = ()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        decoder.mod_logs = logs
        for module, mode in modes:
            module.training = mode


def _line(error: Exception) -> str:
    """An error in one line of at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
