"""torch.compile: the dense parts become graphs, a routed module adds a fixed few, and nothing compiles for ever."""

import pytest
import torch
from masked_reference import close
from tiny_models import random_batch, tiny_model
from tiny_routed import LAYERS, routed_model, with_reference

CASES = [("attn_sequence", "keep"), ("block_token", "drop"), ("attn_token+mlp_token", "keep")]


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


@pytest.mark.full
@pytest.mark.parametrize(("granularity", "policy"), CASES)
def test_a_routed_module_breaks_the_graph_a_fixed_number_of_times(granularity, policy):
    model, reference = with_reference("llama", granularity, policy)
    ids, mask = random_batch(4, 12, padding="left")
    dense = Compiled(tiny_model())
    dense(ids, attention_mask=mask, use_cache=False)
    compiled = Compiled(model)
    close(compiled(ids, attention_mask=mask, use_cache=False).logits, reference.logits(ids, mask), mask)
    modules = len(LAYERS) * (1 + granularity.count("+"))
    # Before the module, up to its decision (read on the host: shapes depend on it), what it runs, what comes after.
    assert dense.graphs == 1 and compiled.graphs <= 2 + 4 * modules


@pytest.mark.full
@pytest.mark.parametrize(("granularity", "policy"), CASES)
def test_decoding_stops_compiling(granularity, policy):
    (model, reference), (ids, _) = with_reference("llama", granularity, policy), random_batch(2, 20)
    compiled, cache, graphs = Compiled(model), None, []
    for start, end in ((0, 6), *((step, step + 1) for step in range(6, 20))):
        out = compiled(ids[:, start:end], past_key_values=cache, use_cache=True)
        cache, expected = out.past_key_values, reference.logits(ids[:, :end], hold=start > 0)
        close(out.logits, expected[:, start:], torch.ones_like(ids[:, start:end]))
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
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match="depends on its decisions.*freeze_static"):
        ONE_GRAPH[way](routed_model(), ids)
