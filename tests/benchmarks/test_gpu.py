"""What is measured on a GPU: planned within the time, and each part without the others."""

import json
from importlib import import_module

import pytest
from click.testing import CliRunner

from benchmarks import gpu, reduced
from benchmarks.gpu import PRESET, Part, limit, parts, run_all


def test_the_preset_gets_its_share_and_what_is_left():
    part, preset = Part("a", [], 60, 150), Part(PRESET, [], 90, float("inf"))
    assert limit(part, left=900, kept=400) == 150
    assert limit(part, left=500, kept=400) == 100
    assert limit(part, left=450, kept=400) == 0  # 50 seconds are too few
    assert limit(preset, left=700, kept=400) == 700
    assert limit(preset, left=80, kept=400) == 0


@pytest.mark.parametrize("minutes", [9, 25])
def test_most_parts_fit_into_the_time(tmp_path, minutes):
    """If each takes the least that it needs."""
    left, kept, begun = 60.0 * minutes, 60 * minutes * gpu.PRESET_SHARE, []
    for part in parts("cuda", tmp_path, tmp_path):
        if limit(part, left, kept) > 0:
            begun.append(part.name)
            left -= part.least
    assert begun[:3] == ["tests", "step-64", "step-64-compiled"]
    assert begun[-1] == PRESET
    assert len(begun) == (10 if minutes == 25 else 6)


def test_a_part_that_fails_or_hangs_stops_no_other(tmp_path):
    (tmp_path / "bad.json").write_text("of an earlier call")
    hanging = ["timeit", "-n1", "-r1", "import time; print('begun', flush=True); time.sleep(99)"]
    given = [
        Part("bad", ["no_such_module"], 0.1, 9),
        Part("long", hanging, 0.1, 2, table=False),
        Part("huge", [], 1000, 2000),
        Part("good", ["json.tool", "--help"], 0.1, 9, table=False),
    ]
    ended = [outcome.ended for outcome in run_all(given, 30, "facts", tmp_path)]
    assert ended == [
        "failed with exit code 1",
        "stopped after 2 s",
        "left out: it needs 1000 s",
        "done",
    ]
    page = (tmp_path / "README.md").read_text()
    assert "No module named no_such_module" in page
    assert "\nbegun\n" in page
    assert "suppress all whitespace" in page  # the end of the help
    assert "huge | left out" in page


def test_options_of_every_part_exist(tmp_path):
    for part in [*parts("cuda", tmp_path, tmp_path), *gpu.quick_parts("cpu", tmp_path, tmp_path)]:
        words = part.command(60, tmp_path)[2:]
        if words[0].startswith("benchmarks."):
            options = import_module(words[0]).main.params
            known = {name for option in options for name in option.opts}
            assert {word for word in words if word.startswith("--")} <= known


def test_a_reduced_run_has_as_many_epochs_as_fit(tmp_path):
    assert reduced.epochs_within(100, 0.9, 200) == 111
    assert reduced.epochs_within(1000, 0.9, 200) == 200
    assert reduced.epochs_within(0.1, 0.9, 200) == 1
    given = ["--quick", "--dataset", "digits", "--device", "cpu", "--out", str(tmp_path / "run")]
    file = ["--json", str(tmp_path / "preset.json")]
    result = CliRunner().invoke(reduced.main, [*given, *file], catch_exceptions=False)
    assert result.exit_code == 0
    assert "2 of 2 epochs" in result.output
    (row,) = json.loads((tmp_path / "preset.json").read_text())["rows"]
    assert row["epochs"] == row["preset_epochs"] == 2
    assert row["art"] == pytest.approx((row["accuracy"] * row["acr"]) ** 0.5)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 2


def test_an_unknown_part_is_refused(tmp_path):
    given = ["--out", str(tmp_path), "--only", "nothing"]
    result = CliRunner().invoke(gpu.main, given)
    assert result.exit_code == 2
    assert "there is no part nothing" in result.output
