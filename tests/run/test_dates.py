"""A chat template that prints the date: one day for the whole run, through every resume."""

from datetime import date, timedelta
from pathlib import Path

import msgspec

from dapo_async.config import settings as config
from dapo_async.observe.checkpoint_folder import write_manifest
from dapo_async.run.check import load_material
from dapo_async.run.launch import fixed_settings, with_date_of
from tests.model.test_checks import qwen_tokenizer, run_config, write_model

DATED = "{{ strftime_now('%d') }}+{% for m in messages %}{{ m.content }}{% endfor %}"


def run_of(folder: Path, template: str | None, **data: str) -> config.Config:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = template
    return run_config(write_model(folder, tokenizer), data=data)


def on_day(settings: config.Config, day: str) -> config.Config:
    return msgspec.structs.replace(settings, data=msgspec.structs.replace(settings.data, template_date=day))


def test_a_run_begins_with_today_where_its_template_prints_a_date(tmp_path: Path) -> None:
    days = {date.today().isoformat()}
    material = load_material(run_of(tmp_path, DATED))
    days.add(date.today().isoformat())  # it may be midnight
    assert material.config.data.template_date in days
    assert material.train[0].text == material.config.data.template_date[-2:] + "+0+0"


def test_other_runs_have_no_date_and_their_checkpoints_name_none(tmp_path: Path) -> None:
    for number, (template, use) in enumerate([(None, "auto"), ("{{ messages[0].content }}", "auto"), (DATED, "never")]):
        material = load_material(run_of(tmp_path / str(number), template, chat_template=use))
        assert material.config.data.template_date == ""
        assert "data.template_date" not in fixed_settings(material.config, material)


def test_a_resumed_run_prints_the_day_on_which_it_began(tmp_path: Path) -> None:
    today = run_of(tmp_path, DATED)
    before = (date.today() - timedelta(days=1)).isoformat()
    began = load_material(
        msgspec.structs.replace(today, data=msgspec.structs.replace(today.data, template_date=before))
    )
    checkpoint = tmp_path / "step_1"
    checkpoint.mkdir()
    write_manifest(checkpoint, 1, fixed_settings(began.config, began), {})
    resumed = load_material(with_date_of(today, [checkpoint]))
    assert fixed_settings(resumed.config, resumed) == fixed_settings(began.config, began)
    assert resumed.train.fingerprint != load_material(today).train.fingerprint


def test_a_date_of_ones_own_stands_and_a_checkpoint_without_one_says_nothing(tmp_path: Path) -> None:
    own = run_of(tmp_path, DATED, template_date="2025-01-02")
    for fixed in ({"data.template_date": "2025-01-01"}, {"run.seed": 0}):
        checkpoint = tmp_path / f"step_{len(fixed)}_{next(iter(fixed))}"
        checkpoint.mkdir()
        write_manifest(checkpoint, 1, fixed, {})
        assert with_date_of(own, [checkpoint]) is own
    undated = on_day(own, "")
    assert with_date_of(undated, [checkpoint]) is undated
    assert with_date_of(undated, []) is undated
