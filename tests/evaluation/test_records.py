"""Tables say what the records hold, differences are paired, and a line is there whole or not at all."""

import statistics
from concurrent.futures import ProcessPoolExecutor

import pytest

from router_tuning.errors import UserError
from router_tuning.evaluation.comparison import comparison_table, reading
from router_tuning.evaluation.figures import front_figure, quality_figure
from router_tuning.evaluation.records import all_tables, control_table, difference_table, read_records, summary_table
from router_tuning.evaluation.tables import Table, with_error
from router_tuning.experiments.readme import bases_table, joined
from router_tuning.files import append_json, read_json_lines

TIMES = {"seconds_dense": 2.0, "seconds_routed": 1.0, "time_ratio": 0.51}
COST = {"share": 0.7, "kv_bytes_dense": 4000, "kv_bytes_routed": 3000, "kv_share": 0.75, "new_tokens": 16}
NEAR = {"perplexity": 9.0, "dense_perplexity": 6.0, "agreement": 0.75}


def record(policy, documents, kl=(0.0, 0.0, 0.0), share=1.0, **cell):
    task = {"metric": "acc", "value": documents.count("1") / len(documents), "stderr": 0.01, "documents": documents}
    text = {"kl": sum(kl) / 6, "share": share, **NEAR, "documents": {"tokens": [1, 2, 3], "kl": list(kl)}}
    found = {"cell": {"policy": policy, **cell}, "share": share, "capacity": share, "texts": {"wiki": text}}
    return {**found, "tasks": {"t": task, "mmlu_law": task, "mmlu_art": task}}


@pytest.fixture
def records():
    at = {"recipe": "fit", "seed": 0, "budget": 0.7, "granularity": "attn_token"}
    ours = [
        record("routed", "1101", (1, 2, 3), 0.7, **at),
        record("routed", "1001", (2, 3, 4), 0.7, **at | {"seed": 1}),
    ]
    ours[0]["cost"] = {**COST, "prefill": TIMES, "generate": TIMES}
    return [
        record("static_zero", "0100", (5, 5, 5), 0.7, **at),
        record("static_zero", "0000", (5, 5, 5), 0.6, **at | {"budget": 0.6}),
        *ours,
        record("random", "1000", (4, 4, 4), 0.7, **at),
        record("random", "1000", (4, 4, 4), 0.7, **at | {"recipe": "other"}),
        record("dense", "1111"),
        {"cell": {"policy": "routed", "recipe": "fit", "budget": 0.1, "seed": 0}, "refused": "out of reach"},
    ]


def rows_of(table):
    return [dict(zip(table.header, row, strict=True)) for row in table.rows]


def test_summary_has_a_row_per_policy_and_budget(records):
    rows = rows_of(summary_table(records))
    labels = ["dense", "fit", "random, fit", "random, other", "static zero, fit", "static zero, fit"]
    assert [row["policy"] for row in rows] == labels
    ours = next(row for row in rows if row["policy"] == "fit")
    found = (ours["choices"], ours["KL, wiki"], ours["time, prefill"])
    assert found == ("0.625 ± 0.177", "1.250 ± 0.354", "0.510")
    assert rows[0]["choices"] == "1.000" and rows[0]["time, prefill"] is None


def test_controls_stand_beside_the_policy_that_they_are_of(records):
    tasks, text = rows_of(control_table(records))
    assert (tasks["score"], tasks["ours"], tasks["dense"]) == ("choices", "0.625 ± 0.177", "1.000")
    assert tasks["random"] == tasks["static zero"] == "0.250", "of the same run and budget"
    assert (text["score"], text["budget"], text["FLOPs"], text["capacity"]) == ("KL, wiki", 0.7, "0.700 ± 0.000", None)
    assert (text["ours"], text["random"], text["static zero"]) == ("1.250 ± 0.354", "2.000", "2.500")
    assert text["perplexity"] == "1.500 ± 0.000"


def test_differences_are_paired_by_document(records):
    rows = {row["less"]: row for row in rows_of(difference_table(records))}
    assert list(rows) == ["dense", "random, fit", "static zero, fit"], "of the same run and budget"
    gaps = [1 - 0, 0.5 - 1, 0 - 0, 1 - 0]
    # Two units, t and the subjects of MMLU, of which the second has the same documents twice.
    error = (statistics.variance(gaps) / 4 + statistics.variance(gaps * 2) / 8) ** 0.5 / 2
    assert rows["static zero, fit"]["choices"] == with_error(0.375, error, 4)
    gaps = [1.5 - 5, 2.5 - 5, 3.5 - 5]
    mean = sum(gaps) / 6
    error = (sum((gap - mean * size) ** 2 for gap, size in zip(gaps, (1, 2, 3), strict=True)) * 3 / 2) ** 0.5 / 6
    assert rows["static zero, fit"]["KL, wiki"] == with_error(mean, error, 4)
    assert difference_table(records[-2:]) is None


def test_tasks_are_a_table_too(records):
    _, _, tasks = all_tables(records[2:3] + records[6:7])
    assert tasks.rows[0] == ["t", "acc", "0.750 ± 0.010", "1.000 ± 0.010"] and tasks.header[2:] == ["fit 0.7", "dense"]


def test_tasks_have_a_column_for_every_record(records):
    row = rows_of(all_tables(records[2:4])[-1])[0]
    assert row["fit attn_token 0.7 0"] == "0.750 ± 0.010" and row["fit attn_token 0.7 1"] == "0.500 ± 0.010"
    assert len(all_tables([{"cell": {"policy": "dense"}, "share": 1.0, "capacity": 1.0}])) == 1, "no task, no table"


def test_cells_that_two_files_hold_are_no_seeds_of_each_other(records, tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    for path, some in ((one, records[2:3] + records[4:7]), (two, records[2:3] + records[6:7])):
        for entry in some:
            append_json(path, entry)
    found = read_records(one, two)
    policies = [row["policy"] for row in rows_of(summary_table(found))]
    assert policies == [*(f"dense, {path}" for path in (one, two)), f"fit, {one}", f"fit, {two}",
                        *(f"random, {recipe}, {one}" for recipe in ("fit", "other"))]  # fmt: skip
    pairs = [(row["policy"], row["less"]) for row in rows_of(difference_table(found))]
    assert (f"fit, {one}", f"random, fit, {one}") in pairs and (f"fit, {two}", f"random, fit, {one}") not in pairs
    assert [r["cell"] for r in read_records(one, one)] == [r["cell"] for r in read_records(one)]


def test_a_figure_is_written_whole(records, tmp_path):
    assert quality_figure(records, tmp_path / "quality.svg").stat().st_size > 3000
    assert quality_figure(records[-1:], tmp_path / "none.svg") is None
    assert [path.name for path in tmp_path.iterdir()] == ["quality.svg"]


def test_picture_and_table_of_real_bases(tmp_path):
    at = {"recipe": "budget", "granularity": "attn_token+mlp_token", "budget": 0.8}
    shown = {"routed": ("1110", 0.2, 0.81), "random": ("1000", 0.9, 0.82), "static_zero": ("0000", 3.0, 0.8)}
    shown |= {"static_low_rank": ("1100", 0.6, 0.8)}
    records = [record(policy, right, (2 * kl,) * 3, share, **at) for policy, (right, kl, share) in shown.items()]
    records.append(record("dense", "1111"))
    [row] = bases_table([("a base", records)]).rows
    assert row[:9] == ["a base", *map(pytest.approx, (0.81, 0.2, 0.6, 0.9, 1.0, 1.0, 0.75, 0.5))]
    halves = ([{**one, part: {}} for one in records] for part in ("tasks", "texts"))
    assert bases_table([("a base", joined([*halves, records]))]).rows == [row], "a cell of several files is one"
    picture = front_figure(records, tmp_path / "a.svg").read_bytes()
    assert front_figure(records, tmp_path / "b.svg").read_bytes() == picture
    records.append(record("routed", "1000", (6.0,) * 3, 0.9, recipe="paper", granularity="attn_sequence", budget=None))
    assert front_figure(records, tmp_path / "c.svg").read_bytes() != picture
    assert len(bases_table([("a base", records)]).rows) == 1


def test_a_comparison_without_tasks_is_told_by_its_divergence():
    values = {"dense": ("dense", 0.0), "budget": ("routed", 0.1), "paper": ("routed", 0.3), "static": ("static", 0.2)}
    records = [
        {"cell": {"policy": policy, "recipe": name}, "share": 0.8, "capacity": 0.7, "texts": {"answers": {"kl": kl}}}
        for name, (policy, kl) in values.items()
    ]
    rows = {row[0]: row[2] for row in comparison_table(records).rows}
    assert rows["routers, recipe budget"] == 0.1 and rows["published recipe"] == 0.3
    assert "KL of 0.100" in reading(records) and "the published recipe 0.300" in reading(records)


def append(path, number):
    append_json(path, {"cell": {"policy": f"p{number}"}, "text": "x" * 5000})


def test_lines_of_several_processes_and_of_killed_ones(tmp_path):
    path = tmp_path / "folder" / "records.jsonl"
    assert read_json_lines(path) == []
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(append, [path] * 24, range(24)))
    assert {r["cell"]["policy"] for r in read_records(path)} == {f"p{n}" for n in range(24)}
    path.write_bytes(path.read_bytes()[:-100])  # killed while it wrote
    assert len(read_records(path)) == 23
    append(path, 0)
    assert len(path.read_bytes().splitlines()) == 24 and len(read_records(path)) in (23, 24)


def test_files_without_records_are_named(tmp_path):
    for content, message in (("", "no records"), ("{\n", ":1: not valid JSON"), ("[]\n", ":1: no record")):
        (tmp_path / "x.jsonl").write_text(content)
        with pytest.raises(UserError, match=message):
            read_records(tmp_path / "x.jsonl")


def test_three_notations_of_a_table():
    table = Table(["name", "a_b"], [["x|y", 0.5], ["50%", None]])
    assert table.text().splitlines() == ["name    a_b", "----  -----", "x|y   0.500", "50%       -"]
    assert "| x\\|y | 0.500 |" in table.markdown() and "| --- | ---: |" in table.markdown()
    assert r"a\_b" in table.latex() and r"50\% & - \\" in table.latex()
    with pytest.raises(ValueError, match="1 cells"):
        Table(["a", "b"], [["x"]])
    table = Table.of([{"a": 1, "b": None}, {"c": 2.0}])
    assert list(table.header) == ["a", "c"] and table.rows == [[1, None], [None, 2.0]]
