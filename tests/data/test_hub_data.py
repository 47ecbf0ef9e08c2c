"""Prompts from folders and hub ids through ``datasets``, and the sentences for what cannot be had."""

import sys
from pathlib import Path

import datasets
import numpy as np
import pytest

from dapo_async.data.hub_data import is_data_set
from tests.data.dapo_data import load_dapo_file, write_dapo_file
from tests.data.test_prompts import (
    CHAT_TOKENIZER,
    DAPO_SCHEMA,
    PLAIN,
    contents,
    dapo_row,
    load,
    refusal,
    write_jsonl,
    write_parquet,
)

ROWS = [dapo_row(f"problem {i}", str(i), f"uuid-{i}") for i in range(20)]
SHUFFLED = [ROWS[i] for i in np.random.default_rng(0).permutation(2000) % 20]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache, and none asks a hub."""
    cache = str(tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(cache))
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as hubs keep them: Parquet files in the DAPO layout, named by split."""
    made = tmp_path / "data"
    made.mkdir()
    write_parquet(made / "train-00000-of-00002.parquet", SHUFFLED[:1000], DAPO_SCHEMA)
    write_parquet(made / "train-00001-of-00002.parquet", SHUFFLED[1000:], DAPO_SCHEMA)
    write_parquet(made / "test-00000-of-00001.parquet", ROWS[:3], DAPO_SCHEMA)
    return made


def test_a_folder_of_parquet_files_gives_the_prompts_of_the_file(folder: Path, tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "all.parquet", SHUFFLED, DAPO_SCHEMA)
    split = Path(f"{folder}:train")
    prompts = load(split, CHAT_TOKENIZER)
    assert contents(prompts) == contents(load(file, CHAT_TOKENIZER))
    assert prompts.counts == (2000, 0, 1980, 0, 0, 0, 20)
    assert prompts.summary() == f"{split}: 20 prompts of 2000 rows, 1980 duplicates removed"
    assert [prompt.text for prompt in load(Path(f"{folder}:test")).prompts] == ["problem 0", "problem 1", "problem 2"]


@pytest.mark.parametrize("how", ["file", "folder"])
def test_the_published_layout_at_a_hundredth_of_its_size(tmp_path: Path, how: str) -> None:
    path = write_dapo_file(tmp_path / "dapo-math-17k.parquet", num_rows=179, copies=100, conflicts=2)
    prompts = load_dapo_file(path if how == "file" else tmp_path)
    # 5 rows share their prompt with another one, 2 of them against its truth; whichever comes first stands.
    assert prompts.counts == (17_900, 0, 17_526, 200, 0, 0, 174)
    assert {prompt.ids.dtype for prompt in prompts.prompts} == {np.dtype(np.int32)}
    assert len({prompt.id for prompt in prompts.prompts}) == 174
    assert all(prompt.text.startswith("<s><user>Solve the following") for prompt in prompts.prompts)
    assert all(prompt.text.endswith('after "Answer:".<assistant>') for prompt in prompts.prompts)


def test_one_split_need_not_be_named_and_several_must(folder: Path, tmp_path: Path) -> None:
    assert refusal(folder) == f"{folder}: has the splits train, test; name one, as in {folder}:train"
    assert refusal(Path(f"{folder}:dev")) == f"{folder}:dev: there is no split dev; there is train, test"
    single = tmp_path / "single"
    single.mkdir()
    write_jsonl(single / "prompts.jsonl", PLAIN)
    assert contents(load(single)) == contents(load(single / "prompts.jsonl"))


def test_subsets_are_named_before_the_split(tmp_path: Path) -> None:
    made = tmp_path / "data"
    for language in ("en", "cn"):
        (made / language).mkdir(parents=True)
        write_jsonl(made / language / "train.jsonl", [{"prompt": language, "answer": "1"}])
    card = "".join(f"- config_name: {n}\n  data_files: {n}/train.jsonl\n" for n in ("en", "cn"))
    (made / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    assert [prompt.text for prompt in load(Path(f"{made}:cn:train")).prompts] == ["cn"]
    assert refusal(Path(f"{made}:train")).startswith(f"{made}:train: holds no data set that can be loaded from here: ")
    for wrong in (f"{made}:a:b:c", f"{made}:"):
        assert refusal(Path(wrong)) == f"{wrong}: must look like PLACE, PLACE:SPLIT or PLACE:SUBSET:SPLIT"


@pytest.mark.parametrize("splits", [True, False])
def test_what_save_to_disk_wrote_is_read(tmp_path: Path, splits: bool) -> None:
    made = tmp_path / "saved"
    rows = datasets.Dataset.from_list(ROWS)
    whole: datasets.Dataset | datasets.DatasetDict = datasets.DatasetDict(train=rows) if splits else rows
    whole.save_to_disk(made)
    reference = contents(load(write_jsonl(tmp_path / "a.jsonl", ROWS)))
    assert contents(load(made)) == reference
    if splits:
        assert contents(load(Path(f"{made}:train"))) == reference
    else:
        assert refusal(Path(f"{made}:train")) == (
            f"{made}:train: {made} holds one split without a name; leave out :train"
        )


def test_bad_columns_and_rows_of_a_data_set_are_named(tmp_path: Path) -> None:
    made = tmp_path / "data"
    datasets.Dataset.from_list([{"question": "1"}]).save_to_disk(made)
    assert refusal(made).startswith(f"{made}: has columns question; needed are prompt and answer, or, ")
    other = tmp_path / "other"
    datasets.Dataset.from_list([*ROWS, dapo_row("x", None)]).save_to_disk(other)
    assert refusal(other) == f"{other}, row 21: reward_model.ground_truth must be a text or an integer, got null"


def test_a_hub_that_cannot_be_reached_and_a_folder_without_data_are_named(tmp_path: Path) -> None:
    for source in ("nobody/nothing", "nobody/nothing:train"):
        told = refusal(Path(source))
        assert told.startswith(
            f"{source}: is no file or folder here, and no data set of a hub that can be loaded from here: "
        )
        assert "\n" not in told
    told = refusal(tmp_path)
    assert told.startswith(f"{tmp_path}: holds no data set that can be loaded from here: ")


def test_without_the_package_files_work_and_a_folder_says_what_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(load(write_jsonl(tmp_path / "a.jsonl", PLAIN))) == 12
    assert len(load(folder / "test-00000-of-00001.parquet")) == 3
    assert refusal(folder) == (
        f"{folder}: a folder or hub id of prompts needs the datasets package: install it, for example with "
        'pip install "dapo-async[data]", or name a JSONL or Parquet file'
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", True),
        ("owner/name:train", True),
        ("owner/na-me.1:all:train", True),
        ("data/train.jsonl", False),  # a file that is missing, not a hub id
        ("data/train.parquet", False),
        ("train", False),
        ("a/b/c", False),
        ("../name", False),
        ("/nowhere/name", False),
    ],
)
def test_what_is_taken_for_a_data_set(source: str, expected: bool) -> None:
    assert is_data_set(source) == expected
