"""Mixing: exact portions, caps, duplicates, a shuffle that is uniform in any number of buckets, and its faults."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from fractions import Fraction
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_data import read_jsonl
from refused import refused

from router_tuning.data import mixing
from router_tuning.data.mix_plan import PUBLISHED_PORTIONS, MixPlan, make_plan
from router_tuning.data.mixing import mix
from router_tuning.errors import UserError


def make_set(folder: Path, name: str, count: int, prefix: str = "", talk: list[dict] | None = None) -> list[dict]:
    talks = [talk or [{"role": "assistant", "content": f"{prefix or name} {n}"}] for n in range(count)]
    rows = [{"dataset": name, "id": f"{name}_{n}", "messages": talk} for n, talk in enumerate(talks)]
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def plan(*portions: str, caps: tuple[str, ...] = (), seed: int = 1, dedup: bool = False) -> MixPlan:
    made = {name: Fraction(number) for name, number in (text.split("=") for text in portions)}
    return MixPlan(made, {name: int(rows) for name, rows in (text.split("=") for text in caps)}, seed, dedup)


def ids(folder: Path) -> list[str]:
    return [row["id"] for row in read_jsonl(folder / "data.jsonl")]


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(mixing, "BUCKET_BYTES", 1500)
    monkeypatch.setattr(mixing, "BUFFERED_BYTES", 700)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_provenance(tmp_path: Path):
    make_set(tmp_path, "a", 30)
    make_set(tmp_path, "b", 10)
    report = mix(plan("a=0.5", "b=2", caps=("b=15",), seed=9), tmp_path, tmp_path / "mixed")
    assert report == json.loads((tmp_path / "mixed" / "mix.json").read_text())
    assert report["sha256"] == sha256(tmp_path / "mixed" / "data.jsonl")
    counts = {"rows": 10, "held_out": 0, "duplicates": 0, "portion": "2", "cap": 15, "mixed": 15}
    assert report["sets"]["b"] == {"file": "b/data.jsonl", "sha256": sha256(tmp_path / "b" / "data.jsonl"), **counts}
    assert report["sets"]["a"]["mixed"] == 15 and report["rows"] == 30
    assert sorted(path.name for path in (tmp_path / "mixed").iterdir()) == ["data.jsonl", "mix.json"]


def test_the_seed_decides(tmp_path: Path):
    """Also what an earlier version of this package made of it."""
    make_set(tmp_path, "a", 100)
    digests = [mix(plan("a=1.5", seed=seed), tmp_path, tmp_path / "mixed")["sha256"] for seed in (1, 1, 2)]
    assert digests[0] == digests[1] == "bc3b82e7ab834fa30a3c28aba828e822141d7b13b07e7f4504114c215c0aaa0b"
    assert digests[2] != digests[0]


@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(1, 40),
    hundredths=st.integers(1, 450),
    cap=st.none() | st.integers(0, 60),
    bucket=st.integers(50, 3000),
)
def test_any_portion(rows: int, hundredths: int, cap: int | None, bucket: int, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "portions"
    make_set(folder, "a", rows)
    make_set(folder, "b", 3)
    wanted = (rows * hundredths + 50) // 100
    wanted = wanted if cap is None else min(wanted, cap)
    caps = () if cap is None else (f"a={cap}",)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "BUCKET_BYTES", bucket)
        mix(plan(f"a={hundredths / 100}", "b=1", caps=caps), folder, folder / "mixed")
    counts = Counter(name for name in ids(folder / "mixed") if name.startswith("a"))
    assert counts.total() == wanted
    if wanted:
        per_row = [counts[f"a_{number}"] for number in range(rows)]
        assert max(per_row) - min(per_row) <= 1


def test_duplicates_within_and_across_sets(tmp_path: Path):
    make_set(tmp_path, "a", 20, "same")
    make_set(tmp_path, "b", 30, "same")
    rows = read_jsonl(tmp_path / "a" / "data.jsonl")
    with (tmp_path / "a" / "data.jsonl").open("a") as file:
        file.write(json.dumps({**rows[3], "id": "twice"}) + "\n\n" + json.dumps({**rows[3], "id": "thrice"}) + "\n")
    report = mix(plan("a=1", "b=2", dedup=True), tmp_path, tmp_path / "mixed")
    counts = Counter(ids(tmp_path / "mixed"))
    assert counts == {**{f"a_{n}": 1 for n in range(20)}, **{f"b_{n}": 2 for n in range(20, 30)}}
    assert [report["sets"][name]["duplicates"] for name in "ab"] == [2, 20]
    report = mix(plan("a=1", "b=2"), tmp_path, tmp_path / "mixed")
    assert report["rows"] == 22 + 60


def test_single_exchanges_are_rendered_in_proportion_and_the_last_rows_held_out(tmp_path: Path):
    exchange = [{"role": "user", "content": "q?\n"}, {"role": "assistant", "content": " a"}]
    talks = {"one": exchange, "two": exchange * 2, "told": [{"role": "system", "content": "s"}, *exchange]}
    for name, talk in talks.items():
        make_set(tmp_path, name, 300, talk=talk)
    (tmp_path / "plan.yaml").write_text(
        "portions: {one: 1, two: 1, told: 1}\nrenderings: {chat: 1, question: 2}\nheld_out: {one: 100}\n"
    )
    report = mix(make_plan(tmp_path / "plan.yaml", [], [], None, None), tmp_path, tmp_path / "mixed")
    made = {row["id"]: row for row in read_jsonl(tmp_path / "mixed" / "data.jsonl")}
    kept = {"one": 200, "two": 300, "told": 300}
    assert set(made) == {f"{name}_{n}" for name, count in kept.items() for n in range(count)}
    assert report["sets"]["one"]["held_out"] == 100 and all("messages" in made[f"two_{n}"] for n in range(300))
    asked = [row for name, row in made.items() if "prompt" in row and name.startswith("one")]
    assert 110 <= len(asked) <= 155 and {row["completion"] for row in asked} == {" a"}
    assert {row["prompt"] for row in asked} == {"Question: q?\nAnswer:"}
    told = {row["prompt"] for name, row in made.items() if "prompt" in row and name.startswith("told")}
    assert told == {"Question: s\nq?\nAnswer:"}


def test_every_order_is_as_likely(tmp_path: Path, monkeypatch):
    """360 seeds, 6 orders of 3 rows over 3 buckets: 60 each but for chance (standard deviation 7)."""
    make_set(tmp_path, "a", 3)
    monkeypatch.setattr(mixing, "BUCKET_BYTES", (tmp_path / "a" / "data.jsonl").stat().st_size // 3)
    orders: Counter = Counter()
    for seed in range(360):
        mix(plan("a=1", seed=seed), tmp_path, tmp_path / "mixed")
        orders[tuple(ids(tmp_path / "mixed"))] += 1
    assert set(orders) == set(permutations(["a_0", "a_1", "a_2"]))
    assert all(32 <= count <= 88 for count in orders.values()), orders


@pytest.mark.parametrize("row", [None, '{"prompt": "p", "completion": "c"}'])
def test_rows_of_either_form_without_a_last_line_end_and_with_windows_line_ends(row: str | None, tmp_path: Path):
    lines = [json.dumps(made) for made in make_set(tmp_path, "a", 3)] if row is None else [row] * 3
    (tmp_path / "a").mkdir(exist_ok=True)
    (tmp_path / "a" / "data.jsonl").write_bytes("\r\n".join(lines).encode())
    mix(plan("a=2", dedup=True), tmp_path, tmp_path / "mixed")
    made = (tmp_path / "mixed" / "data.jsonl").read_bytes().decode()
    assert Counter(made.split("\n")) == {**dict.fromkeys(lines, 2), "": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', "no JSON"),
        ("[]", "no JSON object"),
        ('{"id": 1}', "neither"),
        ('{"messages": []}', "no list of turns"),
        ('{"messages": "x"}', "no list of turns"),
        ('{"messages": [{"role": "user"}]}', "message 0 has no text"),
        ('{"messages": [{"role": "user", "content": 1}]}', "message 0 has no text"),
        ('{"messages": [{"role": "b", "content": ""}]}', "message 0 has the role 'b'"),
    ],
)
def test_bad_rows_are_named_and_nothing_is_left(line: str, message: str, tmp_path: Path):
    make_set(tmp_path, "a", 3)
    make_set(tmp_path, "b", 3)
    with (tmp_path / "b" / "data.jsonl").open("a") as file:
        file.write(line + "\n")
    with refused(f"b/data.jsonl:4: .*{message}", UserError):
        mix(plan("a=1", "b=1"), tmp_path, tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


def test_plans_from_flags_and_yaml(tmp_path: Path, root: Path):
    published = make_plan(None, [], [], None, None)
    assert make_plan(root / "configs" / "data" / "mix.yaml", [], [], None, None) == published
    changed = make_plan(None, ["alpaca=1/3", "slim_orca=0"], ["alpaca=7"], 5, True)
    assert changed.names == ["vicuna_sharegpt", "evol_instruct", "meta_math_qa", "evol_code_alpaca", "alpaca"]
    assert changed.wanted("alpaca", 9) == 3 and changed.wanted("alpaca", 99) == 7 and changed.seed == 5
    config = tmp_path / "mix.yaml"
    config.write_text("portions: {a: 2.9, b: 0.1}\ncaps: {a: 500}\nseed: 4\ndedup: true\n")
    read = make_plan(config, ["b=1"], [], None, None)
    assert (read.wanted("a", 100), read.wanted("a", 200), read.wanted("b", 7)) == (290, 500, 7)
    assert read.seed == 4 and read.dedup
    assert make_plan(config, [], [], 8, None).seed == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("portions: {a: -1}", "at least 0"),
        *[(f"portions: {{a: {value}}}", "no number") for value in ("x", "true", ".inf")],
        ("portions: {a: 1}\ncaps: {a: 1.5}", "whole number"),
        ("portions: {a: 1}\ncaps: {b: 1}", "cap or held_out is given for b"),
        ("portions: {a: 1}\nheld_out: {b: 1}", "held_out is given for b"),
        ("portions: {a: 1}\nheld_out: {a: 3}", "held_out keeps 3 rows of a out of the mix, and it has 3"),
        ("portions: {a: 1}\nrenderings: {poem: 1}", "rendering poem is none of chat, question, plain"),
        ("portions: {a: 1}\nrenderings: {chat: 0}", "no rendering has a proportion above 0"),
        ("portions: {a: 1}\nseed: x", "'seed' must be a whole number"),
        ("portions: {a: 1}\nproportions: {}", "unknown key proportions"),
        ("portions: [a]", "'portions' must be a mapping"),
        ("seed: 1", "no 'portions'"),
        ("a: [", "cannot be read"),
        *[(f"portions: {text}", "nothing to mix") for text in ("{}", "{a: 0}", "{a: 0.1}")],
        (None, "absent.yaml cannot be read"),
        *[(["--portion", text], f"--portion {text}: expected NAME=NUMBER") for text in ("a", "a=", "=1")],
        (["--portion", "b=1"], "b: no data.jsonl .* --portion b=0"),
        (["--portion", "empty=1"], "empty/data.jsonl holds no row"),
        (["--cap", "a=x"], "caps, a: 'x' is no whole number"),
    ],
)
def test_bad_plans(text: str | list[str] | None, message: str, tmp_path: Path):
    """Of a file or of flags, found when it is read or when it meets the rows."""
    make_set(tmp_path, "a", 3)
    make_set(tmp_path, "empty", 0)
    flag, value = text if isinstance(text, list) else (None, None)
    config = None if flag else tmp_path / ("absent.yaml" if text is None else "plan.yaml")
    if isinstance(text, str):
        config.write_text(text)
    portions, caps = ([value] if flag == name else [] for name in ("--portion", "--cap"))
    others = [f"{name}=0" for name in PUBLISHED_PORTIONS] if flag and "=" in value else []
    with refused(message, UserError):
        mix(make_plan(config, [*others, *portions], caps, None, None), tmp_path, tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()
