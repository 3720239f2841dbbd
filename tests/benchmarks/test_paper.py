"""The plan of the paper's tables: what is trained, what tables share, what they print."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.paper import plan, tables
from benchmarks.paper.__main__ import main
from benchmarks.paper.certified import with_tighter
from benchmarks.paper.plan import HELD_OUT, KAPPAS, SIZES, TABLES, Row, named_runs
from ibpcore import certified_margins, load_model
from ibpcore.certification.certificates import read_certificates
from ibpcore.data.batches import as_pixels
from ibpcore.experiments.results import Result, read_result
from ibpcore.experiments.run import dataset_of
from ibpcore.experiments.run_folder import saved_config
from ibpcore.training.config import make_config

EVERY = [(table, dataset) for table, rows in TABLES.items() for dataset in rows]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("table", "dataset"), EVERY)
def test_every_row_can_be_trained_and_holds_images_out(table, dataset, size):
    for row in TABLES[table][dataset]:
        runs = named_runs(row, dataset, size)
        assert len(runs) == max(1, len(row.kappas)) * row.seeds
        for name, config in runs.items():
            assert Path(name).name == name
            assert config.validation == HELD_OUT[size][dataset] > 0


def test_one_name_is_one_configuration():
    """Tables share runs by their names."""
    for size in SIZES:
        for dataset in SIZES[size]:
            seen = {}
            for rows in TABLES.values():
                for row in rows.get(dataset, ()):
                    for name, config in named_runs(row, dataset, size).items():
                        assert seen.setdefault(name, config) == config
            assert len(set(seen.values())) == len(seen)


def test_full_size_is_the_paper():
    runs = named_runs(Row("acert", {"kappa": 0.0}), "cifar10", "full")
    (config,) = runs.values()
    assert replace(config, validation=0) == make_config("cifar10", "acert", kappa=0.0)


def result(config, art, seconds=10.0, certified=0.25):
    measures = {"accuracy": 0.5, "acr": 0.25, "art": art, "validation_art": art}
    measures |= {"training_seconds": seconds, "certified_8/255": certified}
    return Result(Path("run"), config, "CIFAR-10 (JPEG)", measures)


def test_the_held_out_images_choose_kappa():
    row = Row("acert", kappas=KAPPAS)
    runs = named_runs(row, "cifar10", "small")
    results = {name: result(config, 0.4 - abs(config.kappa - 0.5)) for name, config in runs.items()}
    assert tables.chosen(row, "cifar10", "small", results).config.kappa == 0.5
    results.popitem()
    assert tables.chosen(row, "cifar10", "small", results) is None


def test_tables_by_hand():
    """Two seeds of ART 30 and 40 %: mean 35, standard deviation 7.07."""
    row = Row("fastibp", {"kappa": 0.0}, seeds=2, paper="1 / 2 / 3")
    runs = named_runs(row, "cifar10", "small")
    results = {
        name: result(config, art)
        for (name, config), art in zip(runs.items(), (0.3, 0.4), strict=True)
    }
    setting = tables.chosen(row, "cifar10", "small", results)
    line = tables.table("table5", {row: setting})[-1]
    assert "| fastibp | 0 | 50.00 ± 0.00 | 25.00 ± 0.00 | 35.00 ± 7.07 | 2 | 1 / 2 / 3 |" in line
    slow = Row("acert", {"kappa": 0.0, "max_iterations": 2})
    (name,) = runs = named_runs(slow, "cifar10", "small")
    slower = tables.chosen(slow, "cifar10", "small", {name: result(runs[name], 0.3, 25.0)})
    lines = tables.table("table6", {row: setting, slow: slower})
    assert "acert, 2 iterations" in lines[-1]
    assert "| 25 | 2.50 |" in lines[-1]
    assert "| 8/255 | 25.00 ± 0.00 | - | 2 |" in tables.table("table7", {row: setting})[-1]
    assert "not run" in tables.table("table5", {row: None})[-1]


def test_a_table_is_trained_and_written(tmp_path, monkeypatch):
    """On 40 digits, through the command itself; CROWN certifies more of them than IBP."""
    size = {"width": 2, "hidden": 8, "epochs": 2, "limit_train": 200, "limit_test": 40}
    monkeypatch.setitem(plan.SIZES["small"], "cifar10", size)
    monkeypatch.setitem(plan.HELD_OUT["small"], "cifar10", 10)
    monkeypatch.setitem(plan.TABLES, "table7", {"cifar10": (Row("mtl-ibp", {"kappa": 0.0}),)})
    monkeypatch.setitem(plan.CUSTOMARY, "digits", "0.05")
    make = plan.make_config
    monkeypatch.setattr(plan, "make_config", lambda dataset, *a, **k: make("digits", *a, **k))
    command = ["table7", "--out", str(tmp_path), "--data-dir", str(tmp_path), "--device", "cpu"]
    assert CliRunner().invoke(main, command, catch_exceptions=False).exit_code == 0
    (name,) = json.loads((tmp_path / "cifar10-small" / "sweep.json").read_text())["runs"]
    run = tmp_path / "cifar10-small" / "runs" / name
    test = dataset_of(saved_config(run), tmp_path).test
    images, labels = as_pixels(test.images), test.labels.long()
    margins = certified_margins(
        load_model(run / "model.safetensors"), images, labels, 0.05, bound=plan.TIGHTER
    )
    ibp = int((read_certificates(run / "certificates.csv").radius >= 0.05).sum())
    crown = int((margins < 0).sum())
    assert ibp < crown
    line = (tmp_path / "table7-cifar10-small.md").read_text().splitlines()[-1]
    assert f"| 0.05 | {100 * ibp / 40:.2f} | {100 * crown / 40:.2f} | 1 |" in line
    # It is computed once.
    (run / f"{plan.TIGHTER}.json").write_text(json.dumps({"certified": 0.125}))
    assert with_tighter(read_result(run), tmp_path, "cpu").measures[plan.TIGHTER] == 0.125
