"""Acceptance by trial: a routed model runs beside its masked dense self before anybody trusts it.

Modules of the right names may mean something else: attention whose keys later layers reuse, keys normalised in a way
of their own, an MLP that returns a tuple, arguments per token that nobody here knows. No list of names tells them; a
small batch does, in which every routed module runs for some sequences or tokens and not for others.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedModel, Qwen2ForCausalLM
from transformers.activations import ACT2FN

from .class_swap import plain_class
from .modules import device_of
from .recording import force_routing, routed_base
from .router import AddedByRouting

_HELD = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM)
"""Classes that tests hold at every granularity; a model made of nothing but their code need not be tried."""
_PLAIN = (nn.ModuleList, nn.Linear, type(ACT2FN["silu"]))
_LIBRARY = transformers.__path__[0]
_PROMPT = 4
"""Tokens that fill the cache; one more is decoded."""
_MASK = ((0, 1, 1, 1, 1), (1, 1, 1, 1, 1), (1, 1, 1, 0, 1))  # padding on either side
_ROWS = ((False, True, False), (False, False, False), (True, False, True))  # sequences that a router keeps, in turn
_NAMES = {"attn": "attention", "mlp": "MLP", "expert": "experts", "block": "block", "layer": "output"}


def accept(model: PreTrainedModel) -> None:
    """Try a freshly routed model; one without weights (meta device, ZeRO-3's shards) when it first runs with them."""
    postpone(model)
    decoder = routed_base(model)
    if decoder.mod_untried and _has_weights(model):
        decoder.mod_untried = False
        try_out(model)


def postpone(model: PreTrainedModel) -> None:
    """Have a model tried when it first runs, unless tests hold all that it is made of."""
    routed_base(model).mod_untried = not (plain_class(model) in _HELD and _is_the_librarys(model))


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
    """Whether the layers are the family's own code alone: no module, forward or rotation in its place, no hook."""
    family = sys.modules[plain_class(model).__module__]
    functions = [family.apply_rotary_pos_emb]
    for module in routed_base(model).layers.modules():
        kind, fields = plain_class(module), vars(module)
        if kind.__module__ == family.__name__:
            functions.append(kind.forward)
        elif kind not in _PLAIN and not isinstance(module, AddedByRouting):
            return False
        if "forward" in fields or "mod_patch" in fields or module._forward_hooks or module._forward_pre_hooks:
            return False
    return all(map(_of_the_library, set(functions)))


def _of_the_library(function: Any) -> bool:
    """Whether a function, and all that it wraps, stands in a file of transformers."""
    code = getattr(function, "__code__", None)
    inner = getattr(function, "__wrapped__", None)
    return code is not None and code.co_filename.startswith(_LIBRARY) and (inner is None or _of_the_library(inner))


def _has_weights(model: nn.Module) -> bool:
    if any(hasattr(parameter, "ds_id") or isinstance(parameter, FakeTensor) for parameter in model.parameters()):
        return False
    meta = any(parameter.is_meta for parameter in model.parameters())
    return not meta or any(hasattr(module, "_hf_hook") for module in model.modules())  # offloaded weights come back


def try_out(model: nn.Module) -> None:
    """Compare a routed model under forced mixed decisions, a prefill and a decoded token, with the masked dense one.

    The latter is the pass of training, in which every module runs whole and what it would skip is masked. Four passes
    over three sequences of at most five tokens: the prefill and the decoded token, each beside a whole pass that ends
    where it ends, since attention need not be causal. Every layer is given the same input in both, so that rounding
    does not add up and what differs is named where it differs. The model is left as it was found.

    Raises:
        ValueError: one line that names layer, module and reason.
    """
    trial = _Trial(model)
    decoder, mask = trial.decoder, trial.mask
    ids = (torch.arange(15, device=mask.device) * 37 + 3).view(3, 5)
    ids = ids % decoder.get_input_embeddings().weight.shape[0]
    with _evaluation(decoder), torch.no_grad(), force_routing(decoder, trial.decision):
        try:
            decoder.mod_observer = _ignore
            with trial.watching():
                decoder(input_ids=ids[:, :_PROMPT], attention_mask=mask[:, :_PROMPT], use_cache=False)
                decoder(input_ids=ids, attention_mask=mask, use_cache=False)
        except Exception as error:
            raise trial.refusal(*trial.at, f"fails on a whole batch: {_line(error)}") from None
        finally:
            decoder.mod_observer = None
        trial.hold()
        try:
            with trial.watching():
                first = decoder(input_ids=ids[:, :_PROMPT], attention_mask=mask[:, :_PROMPT], use_cache=True)
                trial.past = _PROMPT
                held = first.past_key_values
                decoder(input_ids=ids[:, _PROMPT:], attention_mask=mask, past_key_values=held, use_cache=True)
        except Exception as error:
            raise trial.refusal(*trial.at, f"fails on a part of a batch: {_line(error)}") from None
    trial.compare()


class _Trial:
    """What the two ways of running a model leave: inputs and outputs of layers, outputs of routed modules."""

    def __init__(self, model: nn.Module) -> None:
        self.decoder, self.name = routed_base(model), type(model).__name__
        routed = [m for m in self.decoder.modules() if isinstance(getattr(m, "mod_router", None), nn.Module)]
        self.modules: dict[tuple[int, str], nn.Module] = {(m.mod_layer, m.mod_part): m for m in routed}
        self.numbers = {key: number for number, key in enumerate(sorted(self.modules))}
        self.levels = self.decoder.mod_config.parts
        self.mask = torch.tensor(_MASK, device=device_of(self.decoder.get_input_embeddings()))
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
    def watching(self) -> Iterator[None]:
        """Note where a pass is and what comes out; layers get the inputs that they had the first way."""
        watched = self.modules | {(number, "layer"): layer for number, layer in enumerate(self.decoder.layers)}
        with ExitStack() as stack:
            for key, module in watched.items():
                enter, leave = functools.partial(self._enter, key), functools.partial(self._leave, key)
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(leave).remove)
            yield

    def _enter(self, key: tuple[int, str], _: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self.at = key
        if key[1] != "layer":
            return None
        given, held = args[0] if args else kwargs["hidden_states"], self.inputs.get(key[0])
        if self.wanted:
            known = held.narrow(-2, self.past, given.shape[-2])
        else:
            known = given.clone() if held is None else torch.cat([held, given[..., held.shape[-2] :, :]], dim=-2)
            self.inputs[key[0]] = known
        return ((known, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": known})

    def _leave(self, key: tuple[int, str], _: nn.Module, args: tuple, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        self.got.setdefault(key, []).append(output.unflatten(0, (3, -1)) if key[1] == "expert" else output)

    def hold(self) -> None:
        """Keep what the whole passes gave: of the longer one, what the shorter one had not seen."""
        for key in (*self.modules, *self.got):
            outputs = self.got.get(key, [])
            if len(outputs) != 2:
                raise self.refusal(*key, f"runs {len(outputs)} times in two passes")
            shorter, longer = outputs
            self.wanted[key] = torch.cat([shorter, longer[..., shorter.shape[-2] :, :]], dim=-2)
        self.got = {}

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
            judged = self.mask.bool() & wanted.isfinite().all(-1)  # weights may be anything, before they are loaded
            error = torch.where(judged, error, 0.0).nan_to_num(torch.inf).max().item()
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
    modes = [(module, module.training) for module in decoder.modules()]
    watching = decoder.mod_logs, decoder.mod_observer
    decoder.eval()
    decoder.mod_logs, decoder.mod_observer = (), None
    try:
        with torch.random.fork_rng():
            yield
    finally:
        decoder.mod_logs, decoder.mod_observer = watching
        for module, mode in modes:
            module.training = mode


def _ignore(*_: Any) -> None:
    """An observer that looks at nothing: modules run whole for it."""


def _line(error: Exception) -> str:
    """An error in one line of at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
