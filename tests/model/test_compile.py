"""torch.compile: the dense parts become graphs, a routed module adds a fixed few, and nothing compiles for ever."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_batch, tiny_model
from tiny_routed import LAYERS, routed_model

CASES = [
    ("attn_sequence", "keep"),
    pytest.param("block_token", "drop", marks=pytest.mark.full),
    pytest.param("attn_token+mlp_token", "keep", marks=pytest.mark.full),
]


class Compiled:
    """A compiled model whose backend runs graphs as they are and counts them."""

    def __init__(self, model):
        torch._dynamo.reset()
        self.graphs = 0
        self.model = torch.compile(model, backend=self.count)

    def count(self, graph, inputs):
        self.graphs += 1
        return graph.forward

    def __call__(self, *args, **kwargs):
        with torch.no_grad():
            return self.model(*args, **kwargs)


@pytest.fixture(autouse=True)
def _clean():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("granularity", "policy"), CASES)
def test_a_routed_module_breaks_the_graph_a_fixed_number_of_times(granularity, policy):
    model = routed_model("llama", granularity, kv_policy=policy)
    ids, mask = random_batch(4, 12, padding="left")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
    dense = Compiled(tiny_model())
    dense(ids, attention_mask=mask, use_cache=False)
    compiled = Compiled(model)
    actual = compiled(ids, attention_mask=mask, use_cache=False).logits
    assert torch.allclose(actual[mask.bool()], expected[mask.bool()], atol=1e-4)
    modules = len(LAYERS) * (1 + granularity.count("+"))
    # Before the module, up to its decision (read on the host: shapes depend on it), what it runs, what comes after.
    assert dense.graphs == 1 and compiled.graphs <= 2 + 4 * modules


@pytest.mark.full
@pytest.mark.parametrize(("granularity", "policy"), CASES)
def test_decoding_stops_compiling(granularity, policy):
    model = routed_model("llama", granularity, kv_policy=policy)
    ids, _ = random_batch(2, 20)
    compiled = Compiled(model)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits if "sequence" not in granularity else None
    cache = compiled(ids[:, :6], use_cache=True).past_key_values
    graphs = []
    for step in range(6, 20):
        logits = compiled(ids[:, step : step + 1], past_key_values=cache, use_cache=True).logits
        if expected is not None:
            assert torch.allclose(logits[:, 0], expected[:, step], atol=1e-4)
        graphs.append(compiled.graphs)
    assert graphs[-1] == graphs[-5], "the last steps must run what is compiled"


ONE_GRAPH = {
    "jit": lambda model, ids: torch.jit.trace(model, (ids,), strict=False),
    "strict export": lambda model, ids: torch.export.export(model, (ids,), strict=True),
    "fullgraph": lambda model, ids: torch.compile(model, backend="eager", fullgraph=True)(ids),
}


@pytest.mark.parametrize("way", ONE_GRAPH)
def test_one_graph_is_refused_in_a_line_that_names_the_frozen_form(way):
    ids, _ = random_batch(1)
    with torch.no_grad(), pytest.raises(Exception, match="depends on its decisions.*freeze_static"):
        ONE_GRAPH[way](routed_model(), ids)
