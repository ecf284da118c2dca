"""Mixing: exact portions, caps, duplicates, a shuffle that is uniform in any number of buckets, and its faults."""

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


def make_set(folder: Path, name: str, count: int, text: str = "", talk: list[dict] | None = None) -> list[dict]:
    talks = [talk or [{"role": "assistant", "content": f"{text or name} {n}"}] for n in range(count)]
    rows = [{"dataset": name, "id": f"{name}_{n}", "messages": talk} for n, talk in enumerate(talks)]
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def mixed(folder: Path, caps: dict[str, int] | None = None, seed: int = 1, dedup: bool = False, **portions: object):
    """The report of a mix, and how often each row of it is there, in order."""
    plan = MixPlan({name: Fraction(str(share)) for name, share in portions.items()}, caps or {}, seed, dedup)
    report = mix(plan, folder, folder / "mixed")
    return report, Counter(row["id"] for row in read_jsonl(folder / "mixed" / "data.jsonl"))


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(mixing, "BUCKET_BYTES", 1500)
    monkeypatch.setattr(mixing, "BUFFERED_BYTES", 700)


def test_the_report_says_what_was_mixed(tmp_path):
    make_set(tmp_path, "a", 30)
    make_set(tmp_path, "b", 10)
    report, _ = mixed(tmp_path, {"b": 15}, a=0.5, b=2)
    assert report == json.loads((tmp_path / "mixed" / "mix.json").read_text())
    digests = [hashlib.sha256((tmp_path / name / "data.jsonl").read_bytes()).hexdigest() for name in ("mixed", "b")]
    counts = {"rows": 10, "held_out": 0, "duplicates": 0, "portion": "2", "cap": 15, "mixed": 15}
    assert report["sets"]["b"] == {"file": "b/data.jsonl", "sha256": digests[1], **counts}
    assert (report["sha256"], report["sets"]["a"]["mixed"], report["rows"]) == (digests[0], 15, 30)
    assert sorted(path.name for path in (tmp_path / "mixed").iterdir()) == ["data.jsonl", "mix.json"]


def test_the_seed_decides(tmp_path):
    """Also what an earlier version of this package made of it."""
    make_set(tmp_path, "a", 100)
    first, again, other = (mixed(tmp_path, seed=seed, a=1.5)[0]["sha256"] for seed in (1, 1, 2))
    assert first == again == "bc3b82e7ab834fa30a3c28aba828e822141d7b13b07e7f4504114c215c0aaa0b" != other


SIZES = {"rows": st.integers(1, 40), "hundredths": st.integers(1, 450), "bucket": st.integers(50, 3000)}


@settings(max_examples=120, deadline=None)
@given(cap=st.none() | st.integers(0, 60), **SIZES)
def test_any_portion(rows, hundredths, cap, bucket, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "portions"
    make_set(folder, "a", rows)
    make_set(folder, "b", 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "BUCKET_BYTES", bucket)
        _, counts = mixed(folder, {} if cap is None else {"a": cap}, a=hundredths / 100, b=1)
    wanted, per_row = (rows * hundredths + 50) // 100, [counts[f"a_{number}"] for number in range(rows)]
    assert sum(per_row) == min(wanted, wanted if cap is None else cap) and max(per_row) - min(per_row) <= 1


def test_duplicates_within_and_across_sets(tmp_path):
    rows = make_set(tmp_path, "a", 20, "same")
    make_set(tmp_path, "b", 30, "same")
    with (tmp_path / "a" / "data.jsonl").open("a") as file:
        file.write(json.dumps({**rows[3], "id": "twice"}) + "\n\n" + json.dumps({**rows[3], "id": "thrice"}) + "\n")
    report, counts = mixed(tmp_path, dedup=True, a=1, b=2)
    assert counts == {**{f"a_{n}": 1 for n in range(20)}, **{f"b_{n}": 2 for n in range(20, 30)}}
    assert [report["sets"][name]["duplicates"] for name in "ab"] == [2, 20]
    assert mixed(tmp_path, a=1, b=2)[0]["rows"] == 22 + 60


def test_single_exchanges_are_rendered_in_proportion_and_the_last_rows_held_out(tmp_path):
    exchange = [{"role": "user", "content": "q?\n"}, {"role": "assistant", "content": " a"}]
    talks = {"one": exchange, "two": exchange * 2, "told": [{"role": "system", "content": "s"}, *exchange]}
    for name, talk in talks.items():
        make_set(tmp_path, name, 300, talk=talk)
    asked = "portions: {one: 1, two: 1, told: 1}\nrenderings: {chat: 1, question: 2}\nheld_out: {one: 100}\n"
    (tmp_path / "plan.yaml").write_text(asked)
    report = mix(make_plan(tmp_path / "plan.yaml", [], [], None, None), tmp_path, tmp_path / "mixed")
    made = {row["id"]: row for row in read_jsonl(tmp_path / "mixed" / "data.jsonl")}
    kept = {"one": 200, "two": 300, "told": 300}
    assert set(made) == {f"{name}_{n}" for name, count in kept.items() for n in range(count)}
    assert report["sets"]["one"]["held_out"] == 100
    questions = {name: [row for row in made.values() if row["dataset"] == name and "prompt" in row] for name in kept}
    assert 110 <= len(questions["one"]) <= 155 and questions["two"] == []
    for name, prompt in {"one": "Question: q?\nAnswer:", "told": "Question: s\nq?\nAnswer:"}.items():
        assert {(row["prompt"], row["completion"]) for row in questions[name]} == {(prompt, " a")}


def test_every_order_is_as_likely(tmp_path, monkeypatch):
    """360 seeds, 6 orders of 3 rows over 3 buckets: 60 each but for chance (standard deviation 7)."""
    make_set(tmp_path, "a", 3)
    monkeypatch.setattr(mixing, "BUCKET_BYTES", (tmp_path / "a" / "data.jsonl").stat().st_size // 3)
    orders = Counter(tuple(mixed(tmp_path, seed=seed, a=1)[1]) for seed in range(360))
    assert set(orders) == set(permutations(["a_0", "a_1", "a_2"]))
    assert all(32 <= count <= 88 for count in orders.values()), orders


@pytest.mark.parametrize("row", [None, '{"prompt": "p", "completion": "c"}'])
def test_rows_of_either_form_without_a_last_line_end_and_with_windows_line_ends(row, tmp_path):
    lines = [json.dumps(made) for made in make_set(tmp_path, "a", 3)] if row is None else [row] * 3
    (tmp_path / "a").mkdir(exist_ok=True)
    (tmp_path / "a" / "data.jsonl").write_bytes("\r\n".join(lines).encode())
    mix(MixPlan({"a": Fraction(2)}, {}, 1, True), tmp_path, tmp_path / "mixed")
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
def test_bad_rows_are_named_and_nothing_is_left(line, message, tmp_path):
    make_set(tmp_path, "a", 3)
    make_set(tmp_path, "b", 3)
    with (tmp_path / "b" / "data.jsonl").open("a") as file:
        file.write(line + "\n")
    with refused(f"b/data.jsonl:4: .*{message}", UserError):
        mixed(tmp_path, a=1, b=1)
    assert not (tmp_path / "mixed").exists()


def test_plans_from_flags_and_yaml(tmp_path, root):
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
def test_bad_plans(text, message, tmp_path):
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
