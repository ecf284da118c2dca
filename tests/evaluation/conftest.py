"""A tiny base and a run on it, made once for the tests of this folder."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from tiny_checkpoint import write_base, write_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from router_tuning.evaluation.tasks import TASK_CONFIGS
from router_tuning.model import load_routers


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("checkpoints") / "base")


@pytest.fixture(scope="session")
def run(tmp_path_factory, base) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", base)


@pytest.fixture(scope="module")
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


@pytest.fixture(scope="module")
def routed(base, run):
    return load_routers(AutoModelForCausalLM.from_pretrained(base), run).eval()


@pytest.fixture
def task_code():
    """The Python beside task files, which stock lm-eval loads by itself: a module by its path below them."""

    def load(path: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location("task_code", TASK_CONFIGS / path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
