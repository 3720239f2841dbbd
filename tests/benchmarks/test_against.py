"""Two checkouts take turns; here both are this one."""

import json
import re

import pytest
from click import ClickException
from click.testing import CliRunner

from benchmarks.against.__main__ import CONTENDERS, THIS, compared, main, stepping


def test_checkouts_take_turns_and_ratios_are_of_medians():
    order, times = [], {"other": iter([8.0, 4.0, 2.0]), "this": iter([2.0, 2.0, 8.0])}

    def timer(name):
        order.append(name)
        return next(times[name])

    table = compared({"a": lambda: timer("this")}, {"a": lambda: timer("other")}, 3)
    assert order == ["other", "this"] * 3
    facts = {"contender": "a", "other_ms": 4.0, "this_ms": 2.0, "ratio": 0.5}
    assert table == [{**facts, "low": 0.375, "high": 2.25}]  # of 0.25, 0.5 and 4


def test_each_process_takes_steps_with_its_own_checkout(tmp_path):
    """One path leads to the other: the worker says where it found the package."""
    other = tmp_path / "other"
    other.mkdir()
    for name in ("ibpcore", "cli"):
        (other / name).symlink_to(THIS / name)
    small = ["--quick", "--train-images", "64", "--train-epochs", "2", "--device", "cpu"]
    to = ["--cache", str(tmp_path), "--json", str(tmp_path / "against.json")]
    result = CliRunner().invoke(main, [str(other), *small, *to], catch_exceptions=False)
    assert result.exit_code == 0
    rows = json.loads((tmp_path / "against.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == [*CONTENDERS]
    assert all(row["ratio"] == row["this_ms"] / row["other_ms"] for row in rows)


def test_a_folder_without_the_package_is_refused(tmp_path):
    """Not measured by an installed `ibpcore` instead."""
    with (
        pytest.raises(ClickException, match=re.escape(str(tmp_path))),
        stepping(tmp_path, tmp_path / "network.pt"),
    ):
        pass
