"""A tuned run as a folder of its own: each form holds all that the run trained, or is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from router_tuning.bases.description import dense_config, skeleton
from router_tuning.bases.shards import INDEX, WEIGHTS, bring, row_reader, small_files, tensor_names, weight_map
from router_tuning.errors import UserError
from router_tuning.files import new_folder, read_json, write_json
from router_tuning.model import load_routers
from router_tuning.model.fingerprint import base_fingerprint, check_base
from router_tuning.model.saving import CONFIG_NAME, WEIGHTS_NAME, read_router_config, read_router_weights
from router_tuning.tuning.run_folder import ADAPTER, MODEL, TEMPLATE, read_run, refuse_run, tokenizer_of, trained

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
HOLDS = {"routers": ("full", "adapter"), "routers and LoRA": ("peft", "merged"), "all weights": ("full",)}
"""Which forms of an export hold what a run trained."""
FORMS = ("full", "adapter", "peft", "merged")


def export(
    run: Path,
    base: Path | None,
    output: Path,
    form: str = "full",
    card: str = "",
    overwrite: bool = False,
    link: bool = False,
) -> int:
    """Write ``output`` and return the bytes that were copied or written.

    Args:
        run: folder with ``router.safetensors`` and ``router_config.json``, and ``adapter/`` or ``model/``.
        base: folder of the base that the run was tuned on (safetensors); the form ``adapter`` needs none.
        form: ``full``: a checkpoint, its routers in a file of their own. ``adapter``: routers alone, for
            ``load_routers``. ``peft``: LoRA and routers, beside ``base/``, the routed base. ``merged``: a checkpoint
            with LoRA merged into its weights.
        card: text of ``README.md``.
        overwrite: replace an earlier export.
        link: link the base's weights where they would be copied. The export then needs that folder, and an editor
            that writes into files in place would change it.

    Raises:
        UserError: for a form that would leave out what the run trained; if a part is missing, damaged, or does not fit
            the base; if the system refuses to write.
    """
    what = trained(run)
    if form not in HOLDS[what]:
        known = " or ".join(HOLDS[what])
        raise UserError(f"{run} trained {what}, which --form {form} does not hold: use --form {known}")
    refuse_run(output)
    if form != "adapter" and base is None:
        raise UserError(f"--form {form} needs the base that {run} was tuned on: name it with --base")
    with new_folder(output, overwrite, ADAPTER_FILES[0] if form == "peft" else CONFIG_NAME) as draft:
        if form == "adapter":
            read_router_config(run), read_router_weights(run)
            for name in (WEIGHTS_NAME, CONFIG_NAME):
                shutil.copyfile(run / name, draft / name)
        elif form == "full":
            write_routed(run, run / MODEL if what == "all weights" else base, draft, link)
        elif form == "peft":
            _write_peft(run, base, draft, output, link)
        else:
            _write_merged(run, base, draft)
        (draft / "README.md").write_text(card + _linked_note(base, draft), encoding="utf-8")
        return sum(path.stat().st_size for path in draft.rglob("*") if path.is_file() and not path.is_symlink())


def write_routed(run: Path, weights: Path, folder: Path, link: bool) -> None:
    """Shards, ``router.safetensors``, index, configuration, code and tokenizer into ``folder``."""
    model = fitted(run, weights, own=weights == run / MODEL)
    routers, files = tensor_names(run / WEIGHTS_NAME), weight_map(weights)
    shards = {name: file for name, file in files.items() if name not in routers}
    # A lone model.safetensors would be preferred to the index, which names the routers' file, too.
    names = {file: "base.safetensors" if file.name == WEIGHTS else file.name for file in set(shards.values())}
    folder.mkdir(exist_ok=True)
    for file, name in names.items():
        bring(file, folder / name, link)
    _write_tokenizer(run, weights, folder)
    shutil.copyfile(run / WEIGHTS_NAME, folder / WEIGHTS_NAME)
    config = read_router_config(run) | {"base": base_fingerprint(model, row_reader(weights))}
    write_json(folder / CONFIG_NAME, config)
    places = {name: names[file] for name, file in shards.items()} | dict.fromkeys(routers, WEIGHTS_NAME)
    size = sum((folder / name).stat().st_size for name in set(places.values()))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    write_json(folder / INDEX, index)
    custom_object_save(model, str(folder), config=model.config)
    model.config.save_pretrained(folder)


def fitted(run: Path, weights: Path, own: bool = False) -> PreTrainedModel:
    """The routed model without memory (meta device), after its routers were checked against the weights' folder.

    Args:
        own: the weights were tuned with the routers, so they are not those of the recorded base.

    Raises:
        UserError: if routers and weights do not fit each other.
    """
    model = skeleton(weights)
    if not own:
        check_base(model, read_router_config(run).get("base"), run / CONFIG_NAME, row_reader(weights))
    with torch.device("meta"):
        load_routers(model, run)
    model.config.architectures = [type(model).__name__]
    return model


def _write_peft(run: Path, base: Path, draft: Path, output: Path, link: bool) -> None:
    """``PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(output/base, …), output)`` loads it."""
    check_adapter(run / ADAPTER)
    write_routed(run, base, draft / "base", link)
    config = read_json(run / ADAPTER / ADAPTER_FILES[0])
    config["base_model_name_or_path"] = str(output.resolve() / "base")
    write_json(draft / ADAPTER_FILES[0], config)
    shutil.copyfile(run / ADAPTER / ADAPTER_FILES[1], draft / ADAPTER_FILES[1])


def _write_merged(run: Path, base: Path, draft: Path) -> None:
    check_adapter(run / ADAPTER)
    fitted(run, base)
    model = AutoModelForCausalLM.from_pretrained(base, config=dense_config(base), dtype="auto", use_safetensors=True)
    merged = PeftModel.from_pretrained(load_routers(model, run), run / ADAPTER).merge_and_unload()
    merged.save_pretrained(draft)
    _write_tokenizer(run, base, draft)
    shutil.copyfile(run / CONFIG_NAME, draft / CONFIG_NAME)


def _write_tokenizer(run: Path, base: Path, folder: Path) -> None:
    """The tokenizer that the run used, with the chat template that it used, and the base's generation settings."""
    for file in small_files(base):
        bring(file, folder / file.name)
    if read_run(run).get("tokenizer", {}).get("name"):
        tokenizer_of(run, base).save_pretrained(folder)
    elif (run / TEMPLATE).is_file():
        shutil.copyfile(run / TEMPLATE, folder / TEMPLATE)


def check_adapter(folder: Path) -> None:
    """UserError unless ``folder`` holds a LoRA adapter as safetensors (a pickle beside it is never read)."""
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file; tune with --lora True again")
    path = folder / ADAPTER_FILES[1]
    for name in tensor_names(path):
        with safe_open(path, framework="pt") as file:
            if not bool(torch.isfinite(file.get_tensor(name)).all()):
                raise UserError(f"{path}: {name} holds values that are not finite; save it anew")


def _linked_note(base: Path | None, draft: Path) -> str:
    if not any(path.is_symlink() for path in draft.rglob("*.safetensors")):
        return ""
    return f"\nThe weights are links into `{base.resolve()}`: this folder needs that one, unchanged.\n"
