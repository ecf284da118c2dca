"""Where a data set is: files, folders as people and the hub lay them out, hub ids."""

import datasets
from raw_data import read_jsonl, sample_rows, write_rows
from refused import refused

from router_tuning.data.sources import locate, source_of
from router_tuning.errors import UserError


def test_layouts_of_the_hub(tmp_path, convert):
    """data/train-0000N-of-0000M.parquet beside other splits, a card and metadata; several shards keep their order.

    The cache of the hub holds several snapshots, of which one is the current.
    """
    rows = sample_rows("alpaca", 30)
    folder = tmp_path / "datasets--tatsu-lab--alpaca"
    snapshot = folder / "snapshots" / "bbb"
    for shard in range(3):
        write_rows(snapshot / "data" / f"train-0000{shard}-of-00003", rows[10 * shard :][:10], ".parquet")
    write_rows(snapshot / "data" / "test-00000-of-00001", sample_rows("alpaca", 3), ".parquet")
    for other in ("README.md", "dataset_infos.json", ".cache/x.json", "../aaa/data/train.json", "../../refs/main"):
        (snapshot / other).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / other).write_text("bbb")
    data = read_jsonl(convert("alpaca", folder) / "data.jsonl")
    assert [row["id"] for row in data] == [f"alpaca_{number}" for number in range(30)]
    assert [row["messages"][1]["content"] for row in data] == [row["output"] for row in rows]


def test_published_name_wins_and_doubtful_folders_are_refused(tmp_path):
    rows = sample_rows("vicuna_sharegpt", 2)
    folder = tmp_path / "vicuna_sharegpt"
    write_rows(folder / "HTML_cleaned_raw_dataset" / "part1", rows, ".json")
    write_rows(folder / "ShareGPT_V3_unfiltered_cleaned_split", rows, ".json")
    assert len(source_of("vicuna_sharegpt", folder).files) == 2
    exact = write_rows(folder / "ShareGPT_V3_unfiltered_cleaned_split_no_imsorry", rows, ".json.gz")
    assert source_of("vicuna_sharegpt", folder).files == (exact,)
    write_rows(folder / "ShareGPT_V3_unfiltered_cleaned_split_no_imsorry", rows, ".json")
    with refused("same data twice", UserError):
        source_of("vicuna_sharegpt", folder)
    mixed = tmp_path / "mixed"
    write_rows(mixed / "a", rows, ".json")
    write_rows(mixed / "a", rows, ".parquet")
    with refused("json and parquet", UserError):
        source_of("slim_orca", mixed)


def test_places_without_data(tmp_path):
    write_rows(tmp_path / "held" / "test", sample_rows("alpaca", 1), ".jsonl")
    (tmp_path / "none").mkdir()
    for place, message in (
        (tmp_path / "none", "no data file"),
        (tmp_path / "absent", "no file, no folder"),
        ("a/b/c", "no hub id"),
        (tmp_path / "held", "only test or validation"),
    ):
        with refused(message, UserError):
            source_of("alpaca", place)


def test_files_and_folders_under_the_root(tmp_path):
    assert locate("alpaca", tmp_path) is None
    for ending in (".parquet", ".jsonl.zst", ".json"):
        path = write_rows(tmp_path / "alpaca", [{"a": 1}], ending)
        assert locate("alpaca", tmp_path) == path
    (tmp_path / "alpaca.json.old").touch()
    assert locate("alpaca", tmp_path).name == "alpaca.json"
    (tmp_path / "alpaca").mkdir()
    assert locate("alpaca", tmp_path) == tmp_path / "alpaca"


def test_hub_ids_go_through_datasets(tmp_path, monkeypatch, convert):
    """A local folder stands for the hub, which ``load_dataset`` reads in the same way."""
    rows = sample_rows("meta_math_qa", 20)
    write_rows(tmp_path / "meta-math" / "MetaMathQA" / "MetaMathQA-395K", rows, ".json")
    load = datasets.load_dataset

    def local(hub_id: str, split: str):
        return load(str(tmp_path / hub_id), split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", local)
    folder = convert("meta_math_qa", "meta-math/MetaMathQA")
    assert [row["messages"][0]["content"] for row in read_jsonl(folder / "data.jsonl")] == [r["query"] for r in rows]
    with refused("nobody/nothing cannot be loaded from the hub", UserError):
        source_of("meta_math_qa", "nobody/nothing")
