"""Every rule of the configuration refuses with one sentence: where, the value, and what would be right."""

import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dapo_async.config import settings as config
from dapo_async.config.settings import Config
from dapo_async.config.toml import apply_override, build_config, load_config
from dapo_async.errors import ConfigError
from dapo_async.transport.addresses import check_address
from tests import ROOT

SHIPPED = sorted((ROOT / "configs").glob("*.toml"))
BASE = {"model": {"path": "somewhere"}, "data": {"train": "prompts.jsonl"}}


def build(overrides: str = "") -> Config:
    """The smallest valid configuration, changed by ``table.key=value`` separated by spaces."""
    table: dict[str, Any] = {name: dict(section) for name, section in BASE.items()}
    for override in overrides.split():
        apply_override(table, override)
    return build_config(table, "run.toml")


def refusal(overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        build(overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is accepted ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_configuration_loads_and_says_what_it_is_for(path: Path) -> None:
    load_config(path)
    assert path.read_text(encoding="utf-8").startswith("# "), "opens with what it is for"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_recipe_says_where_its_files_come_from(path: Path) -> None:
    header = path.read_text(encoding="utf-8").partition("\n[")[0]
    data = load_config(path).data
    ids = {"data/dapo-math-17k.parquet": "DAPO-Math-17k", "data/aime-2024.parquet": "AIME-2024"}
    for file in filter(None, (data.train, data.heldout)):
        assert f"download {file}" in header or f" and {file}" in header
        assert f"BytedTsinghua-SIA/{ids[file]}" in header


def test_configurations_are_shipped() -> None:
    assert {"quickstart.toml", "sync.toml", "grpo.toml"} <= {path.name for path in SHIPPED}


def test_defaults_are_those_of_the_paper() -> None:
    """arXiv 2503.14476, section 4.1: clip 0.2 and 0.28, token mean, dynamic sampling, no KL, lr 1e-6."""
    defaults = build()
    assert (defaults.objective.clip_low, defaults.objective.clip_high) == (0.2, 0.28)
    assert (defaults.objective.aggregation, defaults.objective.kl_coef) == ("token-mean", 0.0)
    assert defaults.schedule.filter
    assert defaults.optimizer.lr == 1e-6


def test_an_empty_file_with_overrides_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("")
    loaded = load_config(path, ["demo.task=sums", "schedule.max_staleness=0", "optimizer.lr = 3e-4"])
    assert (loaded.demo.task, loaded.schedule.max_staleness, loaded.optimizer.lr) == ("sums", 0, 3e-4)


def test_overrides_win_over_the_file_and_the_last_one_over_the_others(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[demo]\ntask = "sums"\n[run]\nseed = 1\nname = "file"\n')
    loaded = load_config(path, ["run.seed=2", "run.seed=3"])
    assert (loaded.run.seed, loaded.run.name) == (3, "file")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("t.k=1", 1),
        ("t.k=1.5", 1.5),
        ("t.k=true", True),
        ("t.k=[1, 2]", [1, 2]),
        ('t.k="a b"', "a b"),
        ("t.k=sums", "sums"),  # not TOML, so a string
        ("t.k=tcp://127.0.0.1:5555", "tcp://127.0.0.1:5555"),
        ("t.k=a=b", "a=b"),
        ("t.k=", ""),
        (" t . k = 1 ", 1),
    ],
)
def test_the_value_of_an_override_is_toml_or_a_string(override: str, value: object) -> None:
    table: dict[str, Any] = {}
    apply_override(table, override)
    assert table == {"t": {"k": value}}


def test_a_resolved_configuration_can_be_read_back() -> None:
    resolved = build("schedule.max_staleness=3 sampling.stop_token_ids=[1,2]")
    assert build_config(msgspec.to_builtins(resolved), "config.json") == resolved
    assert msgspec.json.decode(msgspec.json.encode(resolved), type=Config) == resolved


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        build().run.seed = 1  # type: ignore[misc]


# --- what is refused: rules between fields ---------------------------------------------------------------

RULES = {
    "run.name=a/b": '[run]: run.name = "a/b" must be one folder name, without a slash; see run.folder',
    "run.name=..": '[run]: run.name = ".." must be one folder name, without a slash; see run.folder',
    "demo.min_terms=8": "[demo]: min_terms (8) must not exceed max_terms (7)",
    "sampling.top_p=0.9": "[sampling]: top_p must be 1.0 and top_k 0 for training (got 0.9 and 0)",
    "sampling.top_k=50": "[sampling]: top_p must be 1.0 and top_k 0 for training (got 1.0 and 50)",
    "objective.dual_clip=1.2": "[objective]: dual_clip (1.2) must be 0 or exceed 1 + clip_high (1.28)",
    "objective.correction=truncate": '[objective]: correction = "truncate" needs ratio_against = "proximal"',
    "objective.correction_floor=0.5 objective.correction_cap=0.5": (
        "[objective]: correction_floor (0.5) must be below correction_cap (0.5)"
    ),
    "network.silence_s=2": "[network]: silence_s (2.0) must exceed two heartbeats (heartbeat_s = 1.0)",
    "network.control=tcp://0.0.0.0:5555": '[network]: network.control "tcp://0.0.0.0:5555" is reachable',
    "network.weights=tcp://10.0.0.1:*": '[network]: network.weights "tcp://10.0.0.1:*" is reachable',
    "network.control=tcp://0.0.0.0:5555 network.insecure=true": "[network]: workers of other machines could not reach",
    "network.control=tcp://[::1]:5555 network.weights=tcp://[::1]:5555": (
        '[network]: network.control and network.weights need different ports, both are "tcp://[::1]:5555"'
    ),
    "network.control=ipc:///tmp/x": '[network]: network.control must look like "tcp://127.0.0.1:5555"',
    "demo.task=sums": "demo.task fills in model.path, data.train and data.heldout: leave those empty, or demo.task",
    'model.path=""': "model.path and data.train are needed (or demo.task, which makes both)",
    'data.train=""': "model.path and data.train are needed (or demo.task, which makes both)",
    "learner.minibatches=3": "learner.minibatches (3) must divide schedule.groups_per_batch (16)",
    "learner.microbatch_tokens=1087": (
        "learner.microbatch_tokens (1087) must hold the longest sequence: "
        "data.max_prompt_tokens + sampling.max_tokens = 1088"
    ),
    "reward.overlong_cache_tokens=64": "reward.overlong_cache_tokens (64) must be below sampling.max_tokens (64)",
    "network.max_message_mb=1 evaluation.samples=256": (
        "network.max_message_mb (1) must hold a group of the longest completions: at least 2"
    ),
    "weights.push_every=4": "weights.push_every (4) must not exceed schedule.max_staleness + 1 (3)",
}


@pytest.mark.parametrize(("overrides", "sentence"), RULES.items())
def test_a_rule_between_fields_is_kept(overrides: str, sentence: str) -> None:
    assert refusal(overrides).startswith(f"run.toml: {sentence}")


@pytest.mark.parametrize(
    "overrides",
    [
        "demo.min_terms=7",
        "objective.dual_clip=0",
        "objective.correction=truncate objective.ratio_against=proximal",
        "network.silence_s=2.1",
        "network.control=tcp://0.0.0.0:5555 network.weights=tcp://0.0.0.0:5556 network.insecure=true",
        "network.control=tcp://localhost:5555 network.weights=tcp://[::1]:*",
        "network.control=tcp://127.0.0.1:5555 network.weights=tcp://127.0.0.1:5556",
        "network.control=tcp://127.0.0.1:* network.weights=tcp://127.0.0.1:*",
        "learner.minibatches=4",
        "learner.microbatch_tokens=1088",
        "reward.overlong_cache_tokens=63",
        "network.max_message_mb=1 evaluation.samples=227",
        "weights.push_every=3",
    ],
)
def test_what_just_meets_a_rule_is_accepted(overrides: str) -> None:
    table = msgspec.to_builtins(build(overrides))
    for override in overrides.split():
        (section, key), value = override.partition("=")[0].split("."), override.partition("=")[2]
        found = table[section][key]
        assert str(found).lower() in (value, f"{value}.0")


@pytest.mark.parametrize("address", ["", "tcp://", "tcp://127.0.0.1", "tcp://:5", "tcp://h:0", "tcp://h:65536", "h:1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="x must look like"):
        check_address("x", address, permitted=True)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "10.1.2.3", "example.org", "localhost.example.org", "127.example.org", "[::]", "*"]
)
def test_what_other_machines_reach_needs_insecure(host: str) -> None:
    with pytest.raises(ValueError, match="is reachable from other machines"):
        check_address("x", f"tcp://{host}:5555", permitted=False)


# --- what is refused: single fields ----------------------------------------------------------------------


def settings(kind: type) -> list[tuple[str, Any]]:
    """Dotted path and declared limits of every setting of one kind of number."""
    found = []
    for section in msgspec.inspect.type_info(Config).fields:  # type: ignore[attr-defined]
        for setting in section.type.fields:
            limits = setting.type.type if isinstance(setting.type, msgspec.inspect.Metadata) else setting.type
            if isinstance(limits, kind):
                found.append((f"{section.name}.{setting.name}", limits))
    return found


INTEGERS = settings(msgspec.inspect.IntType)
FLOATS = settings(msgspec.inspect.FloatType)


def bounds() -> list[tuple[str, int | float]]:
    """For every limit of every numeric setting, a value just outside of it."""
    found = []
    for path, limits in [*INTEGERS, *FLOATS]:
        step = 1 if isinstance(limits, msgspec.inspect.IntType) else 0.5
        outside = [limits.gt, limits.lt]
        outside += [limits.ge - step] if limits.ge is not None else []
        outside += [limits.le + step] if limits.le is not None else []
        found += [(path, value) for value in outside if value is not None]
    return found


BOUNDS = bounds()


@pytest.mark.parametrize(("path", "value"), BOUNDS)
def test_a_value_outside_its_bounds_is_refused_by_path_and_value(path: str, value: int | float) -> None:
    assert refusal(f"{path}={value}").startswith(f"run.toml: {path} = {value}: Expected `")


@pytest.mark.parametrize("path", [path for path, _ in FLOATS])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_number_may_be_nan_or_infinite(path: str, value: str) -> None:
    assert refusal(f"{path}={value}").startswith(f"run.toml: {path} = {value}: ")


@pytest.mark.parametrize("path", [path for path, _ in INTEGERS])
def test_every_integer_has_a_lower_bound(path: str) -> None:
    assert refusal(f"{path}=-1000000").startswith(f"run.toml: {path} = -1000000: Expected `int` >")


def test_the_limits_above_are_really_tested() -> None:
    assert len(BOUNDS) > 80
    assert {"sampling.group_size", "optimizer.beta1", "network.silence_s"} <= {path for path, _ in BOUNDS}


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "schedule.max_stalenes=1",
            "schedule.max_stalenes: there is no such setting; known here: groups_",
        ),
        ("scheduler.max_staleness=1", "scheduler: there is no such setting; known here: run, model, demo, data"),
        ("schedule.max_staleness=one", "schedule.max_staleness = 'one': Expected `int`, got `str`"),
        ("schedule.max_staleness=1.5", "schedule.max_staleness = 1.5: Expected `int`, got `float`"),
        ("schedule.filter=1", "schedule.filter = 1: must be true or false, in lower case"),
        ("schedule.filter=False", "schedule.filter = 'False': must be true or false, in lower case"),
        (
            "vllm.engine_args.seed=1 vllm.engine_args.x=[1]",
            "vllm.engine_args.x = [1]: must be a string, a number, true or false",
        ),
        ("vllm.engine_args.x.y=1", "vllm.engine_args.x = {'y': 1}: must be a string, a number, true or false"),
        ("vllm.engine_args=1", "vllm.engine_args = 1: Expected `object`, got `int`"),
        (
            "schedule.straggler=waits",
            'schedule.straggler = \'waits\': must be "wait" or "late" or "expire"',
        ),
        ("run.name=''", "run.name = '': Expected `str` of length >= 1"),
        ("sampling.stop_token_ids=[1,-2]", "sampling.stop_token_ids[1] = -2: Expected `int` >= 0"),
        ("sampling.stop_token_ids=2", "sampling.stop_token_ids = 2: Expected `array`, got `int`"),
    ],
)
def test_a_wrong_key_type_or_word_is_refused_by_path_and_value(override: str, sentence: str) -> None:
    assert refusal(override).startswith(f"run.toml: {sentence}")


def test_a_value_in_place_of_a_table_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run\.toml: schedule = 3: Expected `object`, got `int`"):
        build_config({**BASE, "schedule": 3}, "run.toml")


@pytest.mark.parametrize("override", ["seed=1", "run.seed", "run.=1", ".seed=1", "=1", ""])
def test_a_malformed_override_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"must look like table\.key=value"):
        apply_override({}, override)


def test_an_override_below_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match='"seed" is a value, not a table'):
        apply_override({"run": {"seed": 1}}, "run.seed.x=1")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "no such configuration file"),
        (b"[run", "not valid TOML: "),
        (b"\xff\xfe", "cannot be read as a text file: "),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: {sentence}")


NO_DEMO = '[model]\npath = "m"\n[data]\ntrain = "t.jsonl"\n'


def test_without_a_demo_the_longest_answer_must_be_given(tmp_path: Path) -> None:
    """The default is the demo's, and a real model's answers would be cut off and judged wrong."""
    path = tmp_path / "run.toml"
    path.write_text(NO_DEMO + "[sampling]\ngroup_size = 4\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == (
        f"{path}: sampling.max_tokens is needed without [demo]: the longest answer in tokens, such as 2048; its "
        "default of 64 suits the demo, and would cut the answers of other models short"
    )
    assert load_config(path, ["sampling.max_tokens=64"]).sampling.max_tokens == 64  # the same number, but chosen
    path.write_text(NO_DEMO)
    with pytest.raises(ConfigError, match=r"sampling\.max_tokens is needed"):
        load_config(path)


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read as a text file"):
        load_config(tmp_path)


def test_every_setting_says_what_it_does() -> None:
    for section in msgspec.structs.fields(Config):
        assert section.type.__doc__, section.name
        for setting in msgspec.structs.fields(section.type):
            metadata = [m for m in getattr(setting.type, "__metadata__", ()) if isinstance(m, msgspec.Meta)]
            assert metadata, f"{section.name}.{setting.name} has no description"
            assert metadata[0].description, f"{section.name}.{setting.name} has no description"


def test_toml_examples_of_tables_match_their_classes() -> None:
    """A table is named like its class, so that an error about one leads to the other."""
    for section in msgspec.structs.fields(Config):
        assert getattr(config, section.name.capitalize()) is section.type
    assert tomllib.loads("[run]\nseed = 1") == {"run": {"seed": 1}}
