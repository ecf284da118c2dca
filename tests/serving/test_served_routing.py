"""What vLLM is told before it starts: exports that it cannot serve are refused in one line, budgets set thresholds."""

import pytest
from refused import refused
from tiny_models import tiny_model

from router_tuning.errors import UserError
from router_tuning.model import route
from router_tuning.serving.served_routing import served_routing, threshold_at

DIAL = {"capacity": [0.0, 1.0], "flops": [0.4, 1.0], "logit": {"1.mlp": [4.0, -4.0]}}


@pytest.mark.parametrize(
    "routing, overrides, message",
    [
        ({"granularity": "attn_sequence"}, {}, "attn_sequence.*generate"),
        ({"granularity": "block_token"}, {}, "block_token"),
        ({"granularity": "mlp_token+attn_sequence"}, {}, "not attn_sequence"),
        ({"granularity": "attn_token", "kv_policy": "drop"}, {}, "kv_policy 'drop'"),
        ({"granularity": "mlp_token"}, {"mod_capacty": 0.8}, "mod_capacty: no such setting.*mod_capacity"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(routing, overrides, message):
    config = route(tiny_model(), mod_layers=[1, 2], **routing).config
    config.update(overrides)
    with refused(message):
        served_routing(config)


def test_token_level_is_served():
    config = route(tiny_model(), mod_layers=[1, 2], granularity="attn_token+mlp_token", skip="mean").config
    config.update({"mod_capacity": 0.8})
    assert served_routing(config).targets == [(1, "attn"), (1, "mlp"), (2, "attn"), (2, "mlp")]


@pytest.mark.parametrize("budgets", [{"mod_capacity": 0.5}, {"mod_flops": 0.7}])
def test_budgets_are_read_off_the_dial(budgets):
    assert threshold_at(budgets, {"dial": DIAL}, "x") == pytest.approx({"1.mlp": 0.5})


@pytest.mark.parametrize(
    "budgets, config, message",
    [
        ({"mod_capacity": 0.5, "mod_flops": 0.5}, {"dial": DIAL}, "name one"),
        ({"mod_capacity": "half"}, {"dial": DIAL}, "must be a number"),
        ({"mod_capacity": 1.5}, {"dial": DIAL}, r"must lie in \[0, 1\]"),
        ({"mod_flops": 0.2}, {"dial": DIAL}, "out of reach"),
        ({"mod_capacity": 0.5}, {}, "no calibration"),
    ],
)
def test_budgets_out_of_reach_are_refused(budgets, config, message):
    with refused(message, (ValueError, UserError)):
        threshold_at(budgets, config, "x")
