"""The shape of the repository: imports go down, shipped files stand alone, files stay short, libraries are quiet."""

import ast
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Who may import whom inside utils, besides the modules of the ground floor.
GROUND = {"errors", "files", "places", "provenance"}
FLOORS = ("model", "data", "bases", "tuning", "checkpoint", "evaluation", "speed", "experiments")
BELOW = {name: set(FLOORS[:number]) for number, name in enumerate(FLOORS)}
BELOW |= dict.fromkeys((*GROUND, "__main__", "model", "data"), set())
BELOW |= {"bases": {"model"}, "serving": {"model"}, **dict.fromkeys(("embedded", "viewer"), BELOW["speed"])}
SHIPPED_MAY_IMPORT = {"__future__", "collections", "contextlib", "contextvars", "dataclasses", "functools", "math"}
SHIPPED_MAY_IMPORT |= {"copy", "inspect", "sys", "types", "typing", "weakref", "torch", "transformers"}
MAX_LINES = 320


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def dotted(path: Path) -> tuple[str, ...]:
    """The import name of a file, in parts: ``utils/`` is imported as ``router_tuning``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ("router_tuning", *parts[1:]) if parts[0] == "utils" else parts


def imports(path: Path) -> list[str]:
    """Absolute dotted names of all modules that a file imports, at any depth; relative ones are resolved."""
    package = dotted(path)[:-1]
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            stem = [*base, *(node.module.split(".") if node.module else [])]
            names.append(".".join(stem))
            if stem in (["router_tuning"], list(package)):  # `from router_tuning import data`, `from . import packing`
                names += [".".join([*stem, alias.name]) for alias in node.names]
    return names


def shipped() -> list[Path]:
    """modeling_mod.py and everything that it imports relatively: what save_pretrained copies into a checkpoint."""
    found, queue = set(), [ROOT / "utils/model/modeling_mod.py"]
    while queue:
        path = queue.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and "." not in node.module, f"{path.name}: only siblings ship"
                queue.append(path.parent / f"{node.module}.py")
    return sorted(found)


def offenders(paths: list[Path], forbidden: Callable[[Path, str], bool]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}" for path in paths for name in imports(path) if forbidden(path, name)
    ]


def test_utils_import_downwards():
    def upwards(path, name):
        package, parts = dotted(path)[1], name.split(".")
        inside = parts[0] == "router_tuning" and len(parts) > 1 and parts[1] != package
        return parts[0] == "entrypoints" or (inside and parts[1] not in BELOW[package] | GROUND)

    assert offenders(sources("utils"), upwards) == []


def test_entrypoints_import_utils_only():
    forbidden = {"entrypoints", "tests", "scripts"}
    assert offenders(sources("entrypoints"), lambda path, name: name.split(".")[0] in forbidden) == []


def test_shipped_files_need_torch_and_transformers_only():
    def foreign(path, name):
        return not name.startswith("router_tuning.model") and name.split(".")[0] not in SHIPPED_MAY_IMPORT

    assert offenders(shipped(), foreign) == []


def test_what_ships_is_the_model_without_saving_and_routing_entrances():
    names = {path.name for path in shipped()}
    assert {"modeling_mod.py", "configuration_mod.py", "routed_model.py", "cache_mod.py"} <= names
    assert not {"saving.py", "routing.py", "__init__.py"} & names, "these import the rest of the package"


def test_files_stay_short():
    lengths = {
        str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in sources("utils", "entrypoints", "tests")
    }
    assert lengths and {path: n for path, n in lengths.items() if n > MAX_LINES} == {}, "split these by concern"


def test_libraries_do_not_print():
    printing = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources("utils")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print"
    ]
    assert printing == [], "log, return or use tqdm"
