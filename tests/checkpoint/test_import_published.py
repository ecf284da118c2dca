"""Published routers: mapped to ours, on the right base, and refused where they are not what they seem."""

import pytest
import torch
from refused import refused
from safetensors.torch import save_file
from tiny_checkpoint import write_base
from tiny_models import random_batch
from transformers import AutoModelForCausalLM

from router_tuning.bases.description import skeleton
from router_tuning.bases.shards import row_reader
from router_tuning.checkpoint.import_published import import_published
from router_tuning.errors import UserError
from router_tuning.model import load_routers, record_routing, route, routed_modules
from router_tuning.model.fingerprint import base_fingerprint


@pytest.fixture
def published(tmp_path):
    """As the published code leaves it: routers beside other weights of a checkpoint folder."""
    generator = torch.Generator().manual_seed(1)
    weights = {f"model.layers.{n}.router.weight": torch.randn(1, 32, generator=generator) for n in (2, 4)}
    (tmp_path / "published").mkdir()
    others = {"model.layers.2.mlp.router.weight": torch.zeros(4, 32), "lm_head.weight": torch.zeros(2, 2)}
    save_file({**weights, **others}, tmp_path / "published" / "model.safetensors")
    return tmp_path / "published", weights


@torch.no_grad()
def test_decisions_are_those_of_the_published_weights(tmp_path, published, base):
    source, weights = published
    assert import_published(source, base, tmp_path / "run", "mlp_sequence") == [2, 4]
    model = load_routers(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run").eval()
    assert model.config.mod_granularity == "mlp_sequence"
    expected = route(AutoModelForCausalLM.from_pretrained(base), mod_layers=[2, 4], granularity="mlp_sequence")
    for name, module in routed_modules(expected.eval()).items():
        module.mod_router.weight.copy_(weights[f"model.layers.{name.split('.')[0]}.router.weight"])
    ids, mask = random_batch(rows=8)
    with record_routing(model) as log:
        found = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(found, expected(ids, attention_mask=mask).logits)
    assert 0 < log.capacity()["total"] < 1


def test_probes_equal_those_of_a_loaded_model_so_that_another_base_is_refused(tmp_path, published, base):
    loaded = base_fingerprint(AutoModelForCausalLM.from_pretrained(base))
    assert base_fingerprint(skeleton(base), row_reader(base))["probes"] == loaded["probes"]
    import_published(published[0], base, tmp_path / "run", "attn_sequence")
    other = write_base(tmp_path / "other", seed=3)
    with refused("other weights", UserError):
        load_routers(AutoModelForCausalLM.from_pretrained(other), tmp_path / "run")


ZEROS = torch.zeros(1, 32)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"model.layers.1.self_attn.q_proj.weight": ZEROS}, "no key ends in"),
        ({"model.layers.1.router.weight": torch.zeros(1, 31)}, r"\(1, 31\) where"),
        ({"model.layers.1.router.weight": torch.full((1, 32), float("inf"))}, "not finite"),
        ({"model.layers.9.router.weight": ZEROS}, "distinct indices"),
        ({"a.layers.1.router.weight": ZEROS, "b.layers.1.router.weight": ZEROS.clone()}, "two routers"),
        ({"model.layers.1.router.weight": ZEROS}, "one router per layer"),
    ],
)
def test_wrong_sources_are_refused(tmp_path, base, tensors, message):
    save_file(tensors, tmp_path / "model.safetensors")
    granularity = "attn_token+mlp_token" if message == "one router per layer" else "attn_sequence"
    with refused(message, UserError):
        import_published(tmp_path, base, tmp_path / "run", granularity)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
