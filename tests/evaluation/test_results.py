"""Tables, summary and report say what the measurements say."""

from __future__ import annotations

import json

import pytest

from router_tuning.evaluation.figures import capacity_figure, quality_figure
from router_tuning.evaluation.report import measured, report
from router_tuning.evaluation.results import cost_table, files_table, headline, score_table
from router_tuning.evaluation.tables import Table, with_error


def test_score_table(comparison):
    rows = {row[0]: row[1:] for row in score_table(comparison).rows}
    assert rows["t_gen"] == ["exact_match", "0.800 ± 0.010", "0.700 ± 0.010", "0.600 ± 0.010", 0.4]
    assert rows["t_mc"] == ["acc_norm", "0.800", "0.800", "0.800", None]
    assert rows["t_text"][0] == "word_perplexity ↓" and list(rows)[-1] == "g (mean)"


def test_headline_averages_tasks_not_groups(comparison):
    found = {system["name"]: system for system in headline(comparison)}
    assert found["tuned"]["score"] == pytest.approx((0.7 + 0.35) / 2) and found["tuned"]["metric"] == "exact_match"
    for system in comparison["systems"]:
        for task in ("t_gen", "u_gen", "g"):
            del system["evaluation"]["scores"][task]
    assert headline(comparison)[0]["score"] == 0.8


def test_cost_table(comparison):
    rows = {row[0]: list(row[1:]) for row in cost_table(comparison).rows}
    assert rows["GFLOPs, forward over the prompts"] == [2.0, 1.4, 0.7]
    assert rows["seconds, prompts + 16 new tokens"] == [2.0, 1.0, 0.51]
    assert rows["KV cache after the prompts, KB"] == [4.0, 3.0, 0.75]


def test_files_table_takes_results_of_different_tasks(evaluated):
    dense = {"name": "dense", **evaluated(0.8)}
    tuned = {"name": "tuned", **evaluated(0.7, 0.4)}
    del tuned["scores"]["t_mc"]
    rows = {row[0]: row[1:] for row in files_table([dense, tuned]).rows}
    assert rows["t_gen"] == ["exact_match", "0.800 ± 0.010", "0.700 ± 0.010", None, 0.4]
    assert rows["t_mc"] == ["acc_norm", "0.800", None, None, None]
    assert rows["all tasks"] == ["seconds", "2.0", "2.0", None, None]


def test_three_notations_of_a_table():
    table = Table(["name", "a_b"], [["x|y", 0.5], ["50%", None]])
    assert table.text().splitlines() == ["name    a_b", "----  -----", "x|y   0.500", "50%       -"]
    assert "| x\\|y | 0.500 |" in table.markdown() and "| --- | ---: |" in table.markdown()
    assert r"a\_b" in table.latex() and r"50\% & - \\" in table.latex()
    with pytest.raises(ValueError, match="1 cells"):
        Table(["a", "b"], [["x"]])
    assert with_error(0.5, None) == "0.500" and with_error(0.5, 0.01, 2) == "0.50 ± 0.01"


def test_report_names_masks_pooling_and_origin(comparison):
    text = report(comparison, {"arguments": {"recipe": "paper"}}, ["a.png"], "run")
    summary = "| tuned | 0.400 | 0.700 | 0.525 |"
    search = "keeps layers 3, 5 for every input; exhaustive search, loss 1.250"
    for part in (summary, search, "router_pooling: sequence", "commit abc", "all documents", "![a.png](a.png)"):
        assert part in text
    comparison["systems"].pop()
    assert "Static masks" not in measured(comparison)


def test_figures_are_written_whole(comparison, tmp_path):
    log = [{"step": s, "capacity": 0.5, "capacity_layer_03": 0.4, "capacity_layer_04": 0.6} for s in (1, 2)]
    for path in (
        capacity_figure([{"step": 0, "loss": 1.0}, *log], tmp_path / "capacity.png", target=0.5),
        quality_figure(headline(comparison), tmp_path / "quality.svg"),
    ):
        assert path.stat().st_size > 3000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["capacity.png", "quality.svg"]
    with pytest.raises(ValueError, match="capacity_layer_"):
        capacity_figure([{"step": 0, "loss": 1.0}], tmp_path / "x.png")


def test_results_survive_json(comparison):
    again = json.loads(json.dumps(comparison))
    assert measured(again) == measured(comparison)
