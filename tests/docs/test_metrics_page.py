"""The generated page of metrics says what is declared, no more and no less."""

import fnmatch
import re

from dapo_async.config.settings import Config, Demo
from dapo_async.observe.metrics import METRICS
from docs.generators.metrics_page import metrics_page
from tests import ROOT


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert sorted(set(METRICS) - set(rows)) == [], "declared, not on the page"
    assert sorted(set(rows) - set(METRICS)) == [], "on the page, not declared"
    assert page == metrics_page(), "run: python -m docs.generators.metrics_page --write docs/metrics.md"


def test_what_to_look_at_first_names_numbers_and_settings_that_exist() -> None:
    section = metrics_page().partition("## Look at these first")[2].partition("\n## ")[0]
    names = re.findall(r"`(\w+/[\w*]+)`", section)
    assert len(names) >= 18
    assert [name for name in names if not fnmatch.filter(METRICS, name)] == []
    for table, key in re.findall(r"`(\w+)\.(\w+)`", section):
        assert hasattr(getattr(Config(demo=Demo(task="sums")), table), key)
