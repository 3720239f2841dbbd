"""Reports: fronts, means and the choice of kappa by hand, tables and figures of made-up runs."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import run_ibp, snapshot

from ibpcore import UserError
from ibpcore.certification.metrics import (
    accuracy_at,
    accuracy_curve,
    common_levels,
    hypervolume,
    near_chance,
    pareto_front,
)
from ibpcore.experiments.comparison import TEST_SET, VALIDATION_IMAGES, read_all, sections
from ibpcore.experiments.reports import (
    cost_table,
    front_table,
    main_table,
    markdown_table,
    pooled_radii,
    report,
)
from ibpcore.experiments.results import by_setting, read_result
from ibpcore.experiments.sweeps import Sweep, grid, run_name, write_sweep
from ibpcore.training.config import make_config
from ibpcore.training.methods import METHODS
from ibpcore.visualization.plots.style import STYLES

# (ACR, accuracy) of five points: B beats A in both, and E repeats D's ACR with less.
A, B, C, D, E = (0.1, 0.5), (0.2, 0.6), (0.5, 0.4), (0.6, 0.2), (0.6, 0.1)


@pytest.mark.parametrize(("classes", "most"), [(2, 0.55), (10, 0.19), (200, 0.01)])
def test_near_chance(classes, most):
    """0.5 + 0.5 / 10, 0.1 + 0.9 / 10, and 2 / 200: with few classes twice chance is much."""
    assert [near_chance(a, classes) for a in (0.0, most, most + 1e-9)] == [True, True, False]


def test_the_front():
    assert pareto_front([A, D, E, C, B, B]) == [B, C, D]
    assert pareto_front([A]) == [A]
    assert pareto_front([]) == []


def test_the_area():
    """0.2 wide and 0.6 high, 0.3 and 0.4, 0.1 and 0.2: 0.12 + 0.12 + 0.02."""
    assert hypervolume([A, B, C, D, E]) == pytest.approx(0.26)
    assert hypervolume([(0.5, 0.5)]) == 0.25
    assert hypervolume([(1.0, 1.0), (0.3, 0.9)]) == 1.0
    assert hypervolume([]) == 0.0


def test_accuracy_between_points():
    """A third of the way from B to C: 0.6 - 0.2 / 3."""
    points = [A, B, C, D, E]
    assert accuracy_at(points, 0.3) == pytest.approx(0.6 - 0.2 / 3)
    assert [accuracy_at(points, acr) for acr, _ in (B, C, D)] == [0.6, 0.4, 0.2]
    assert accuracy_at(points, 0.19) is None
    assert accuracy_at(points, 0.61) is None


def test_levels_that_fronts_have_in_common():
    """From 0.2 to 0.6 and from 0.3 to 0.5; a single point spans nothing."""
    one, other, point = [B, C, D], [(0.3, 0.9), (0.5, 0.1)], [(0.9, 0.9)]
    assert common_levels([one, other, point]) == pytest.approx([0.3, 0.4, 0.5])
    assert common_levels([one, point]) == []
    assert common_levels([one, [(0.7, 0.5), (0.8, 0.4)]]) == []


def made_up(root: Path, method="acert", *, acc=0.5, acr=0.3, held=None, seconds=10.0, **given):
    """The folder of a complete run with the numbers given; `held` is its validation ART."""
    config = make_config("digits", method, validation=0 if held is None else 5, **given)
    run = root / run_name(config)
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    rows = [json.dumps({"epoch": epoch, "seconds": 1}) for epoch in range(1, config.epochs + 1)]
    (run / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    (run / "model.safetensors").write_text("")
    summary = {
        "accuracy": acc,
        "acr": acr,
        "art": (acc * acr) ** 0.5,
        "certified_accuracy": {"0.05": acr, "0.1": acr / 2},
        "training_seconds": seconds,
        "dataset": "UCI optical digits",
    }
    (run / "summary.json").write_text(json.dumps(summary))
    if held is not None:
        (run / "validation.json").write_text(json.dumps({**summary, "art": held}))
    lines = ["index,label,prediction,radius,upper,status"]
    lines += [f"{i},0,0,{acr * config.epsilon_max * i / 10},0.1,converged" for i in range(21)]
    (run / "certificates.csv").write_text("\n".join(lines) + "\n")
    return run


def section_of(*runs):
    (section,) = sections(read_all(runs)[0])
    return section


def test_mean_and_deviation(tmp_path):
    """0.5, 0.6, 0.7: mean 0.6, standard deviation 0.1 with n - 1."""
    runs = [made_up(tmp_path, acc=a, acr=0.4, seed=s) for s, a in enumerate((0.5, 0.6, 0.7))]
    runs.append(made_up(tmp_path, kappa=0.5))
    three, one = by_setting(read_result(run) for run in runs)
    assert (len(three.results), len(one.results)) == (3, 1)
    assert three.mean("accuracy") == pytest.approx(0.6)
    assert three.std("accuracy") == pytest.approx(0.1)
    assert one.std("accuracy") is None
    _, rows = main_table(section_of(*runs))
    assert rows[0][3:6] == ["0 †", "60.00 ± 10.00", "40.00 ± 0.00"]
    assert rows[0][7] == "3"


def test_a_copied_run_is_no_second_seed(tmp_path):
    runs = [made_up(tmp_path / place, seed=0) for place in ("here", "there")]
    (setting,) = by_setting(read_result(run) for run in runs)
    assert len(setting.results) == 1
    assert setting.std("art") is None


def test_kappa_is_chosen_on_validation_images(tmp_path):
    """Kappa 1 is best on the test set, 0.5 on the validation images."""
    runs = [
        made_up(tmp_path, kappa=kappa, acc=acc, held=held)
        for kappa, acc, held in ((0.0, 0.5, 0.1), (0.5, 0.6, 0.3), (1.0, 0.7, 0.2))
    ]
    section = section_of(*runs)
    assert section.chosen_on == VALIDATION_IMAGES
    assert [row[3] for row in main_table(section)[1]] == ["0", "0.5 †"]
    # One run that held none out, and there is only the test set to choose on.
    section = section_of(*runs, made_up(tmp_path, "fastibp"))
    assert section.chosen_on == TEST_SET
    chosen = {s.look.method: s.chosen.config.kappa for s in section.series}
    assert chosen == {"acert": 1.0, "fastibp": 0.0}


def test_the_mean_over_seeds_chooses(tmp_path):
    """One lucky seed (0.9, 0.1) is worth less than two good ones (0.6, 0.6)."""
    runs = [
        made_up(tmp_path, kappa=kappa, seed=seed, held=held)
        for kappa, arts in ((0.0, (0.9, 0.1)), (0.5, (0.6, 0.6)))
        for seed, held in enumerate(arts)
    ]
    (series,) = section_of(*runs).series
    assert series.chosen.config.kappa == 0.5


def test_variants_of_a_method_are_series_of_their_own(tmp_path):
    given = {"solver": "brentq"}
    runs = [made_up(tmp_path, max_iterations=n, kappa=k, **given) for n in (0, 2) for k in (0, 1)]
    runs.append(made_up(tmp_path, "fastibp", **given))
    section = section_of(*runs)
    labels = [series.look.label for series in section.series]
    assert labels == ["FastIBP", "ACERT, max_iterations 0", "ACERT, max_iterations 2"]
    assert len({tuple(series.look.line().items()) for series in section.series}) == 3
    assert section.differing == ()


def test_an_unfair_comparison_is_said(tmp_path):
    section = section_of(made_up(tmp_path), made_up(tmp_path, "fastibp", width=3, epochs=5))
    assert section.differing == ("epochs", "width")
    runs = [made_up(tmp_path, "sabr", adaptive=True), made_up(tmp_path, "mtl-ibp", epochs=7)]
    section = section_of(*runs, made_up(tmp_path / "other", "acert", learning_rate=0.1))
    assert section.differing == ("adaptive", "epochs", "learning_rate")


def test_what_all_have_unlike_the_presets_is_said(tmp_path):
    given = {"adaptive": True, "width": 3}
    runs = [made_up(tmp_path, method, **given) for method in ("sabr", "fastibp")]
    section = section_of(*runs)
    assert (section.differing, section.common) == ((), given)
    assert "in all runs: width 3, adaptive True" in report([read_result(r) for r in runs], [])
    assert section_of(made_up(tmp_path / "plain")).common == {}


def test_labels_that_are_long_stay_on_the_page(tmp_path):
    from ibpcore.visualization.plots.style import legend_below, new_figure

    figure, axes = new_figure()
    for number in range(3):
        axes.plot(0, number, label=f"FastIBP, max_iterations {number}, schedule smoothed, " * 3)
    legend_below(figure, axes)
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


def test_fronts_and_costs_of_two_methods(tmp_path):
    """Fronts that share ACR 0.3 to 0.5: accuracy at 0.4 is halfway between 0.6 and 0.4."""
    runs = [
        made_up(tmp_path, "fastibp", kappa=0.0, acr=0.5, acc=0.3),
        made_up(tmp_path, "fastibp", kappa=1.0, acr=0.1, acc=0.5),
        made_up(tmp_path, "acert", kappa=0.0, acr=0.5, acc=0.4),
        made_up(tmp_path, "acert", kappa=1.0, acr=0.3, acc=0.6, seconds=25.0),
    ]
    section = section_of(*runs)
    head, rows = front_table(section)
    assert head[2:] == ["hypervolume", "Acc at ACR 30.00", "Acc at ACR 40.00", "Acc at ACR 50.00"]
    assert rows[0] == ["FastIBP", "38.73", "0.1700", "40.00", "35.00", "30.00"]
    assert rows[1] == ["ACERT", "44.72", "0.2600", "60.00", "50.00", "40.00"]
    head, rows = cost_table(section)
    assert head == ["Method", "κ", "at 0.05", "at 0.1", "training, s"]
    assert rows[0] == ["FastIBP", "0 †", "50.00", "25.00", "10.0"]


def test_radii_of_all_seeds_are_pooled(tmp_path):
    runs = [made_up(tmp_path, acr=0.5, seed=s) for s in (0, 1)]
    (setting,) = by_setting(read_result(run) for run in runs)
    radii = pooled_radii(setting)
    expected = torch.tensor([0.05 * i / 10 for i in range(21)] * 2, dtype=torch.float64)
    torch.testing.assert_close(radii, expected, rtol=1e-6, atol=0)


def test_steps_of_a_curve():
    """Of four radii two are 0.1 and one 0.04: three quarters reach 0.04, a half 0.1."""
    ends, heights = accuracy_curve(torch.tensor([0.1, 0.0, 0.04, 0.1]), 0.2)
    assert ends == pytest.approx([0, 0.04, 0.1, 0.2])
    assert heights == [75, 75, 50, 0]


def test_a_curve_does_not_drop_at_its_limit():
    """Where two images of four reach it, the last step is at a half."""
    radii = torch.tensor([0.1, 0.0, 0.04, 0.1])
    assert accuracy_curve(radii, 0.1) == (pytest.approx([0, 0.04, 0.1]), [75, 75, 50])


def test_columns_are_aligned():
    assert markdown_table(["a", "bcd"], [["ef", "g"]]) == "| a  | bcd |\n| -- | --- |\n| ef | g   |"


def test_every_method_looks_its_own_way():
    assert set(METHODS) <= set(STYLES)
    for part in zip(*STYLES.values(), strict=True):
        assert len(set(part)) == len(STYLES)


# The command


@pytest.fixture
def sweep(tmp_path):
    """Made up, with one run that is not there."""
    folder = tmp_path / "sweep"
    settings = {"kappas": (0.0, 0.5), "seeds": (0, 1), "validation": 5}
    runs = grid("digits", list(METHODS), **settings)
    for number, config in enumerate(runs.values()):
        share = number / len(runs)
        given = {"acc": 0.4 + share / 3, "acr": 0.4 - share / 3, "held": 0.2 + share / 3}
        if number > 0:
            kappa = {} if config.method == "standard" else {"kappa": config.kappa}
            made_up(folder / "runs", config.method, seed=config.seed, **kappa, **given)
    write_sweep(folder, Sweep(runs, "validation"))
    return folder


NAMES = ("tradeoff", "certified_accuracy", "cost")
PICTURES = {f"{name}.{kind}" for name in NAMES for kind in ("png", "svg")}


def test_report_of_a_sweep(sweep):
    code, out, err = run_ibp("report", sweep)
    assert (code, err) == (0, "")
    folder = sweep / "report"
    assert {path.name for path in folder.iterdir()} == {"report.md", "table.csv", *PICTURES}
    text = (folder / "report.md").read_text()
    assert out.startswith(text)
    count = len(grid("digits", list(METHODS), kappas=(0.0, 0.5), seeds=(0, 1)))
    assert f"{count - 1} of {count} runs complete" in text
    assert "† κ with the highest ART on validation images, of those tried." in text
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        assert (folder / f"cost.{kind}").read_bytes().startswith(start)
    with open(folder / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    acert = [row for row in rows if row["method"] == "acert"]
    assert [row["kappa"] for row in acert] == ["0.0", "0.5"]
    assert [row["chosen"] for row in acert].count("yes") == 1
    # Tables and figures of before are kept.
    assert run_ibp("report", sweep).code == 0
    assert (sweep / "report-2" / "report.md").read_text() == text


def test_report_of_runs_says_what_chose(tmp_path):
    """Of two data sets, each with a figure of its own."""
    runs = [made_up(tmp_path, kappa=k, acc=0.5 + k / 5) for k in (0.0, 0.5)]
    runs.append(made_up(tmp_path / "wider", epsilon_max=0.2))
    code, out, _ = run_ibp("report", *runs, runs[0], "--out", tmp_path / "out")
    assert code == 0
    assert out.count("† κ with the highest ART on the test set, of those tried.") == 1
    assert "| 0.5 † |" in out
    assert (tmp_path / "out" / "tradeoff-1.png").exists()
    assert not (tmp_path / "out" / "tradeoff-2.png").exists(), "a single run trades nothing"
    assert (tmp_path / "out" / "certified_accuracy-2.png").exists()
    assert not (tmp_path / "out" / "cost-1.png").exists(), "one method has no cost to compare"
    several, single = out.split("\n## ")[1:]
    assert ("ART of †" in several, "ART of †" in single) == (True, False)


@pytest.mark.parametrize(("kappas", "said"), [((0.0, 0.5), False), ((0.0, 0.25, 0.5), True)])
def test_all_settings_are_listed_if_the_first_table_leaves_some_out(tmp_path, kappas, said):
    runs = [made_up(tmp_path, kappa=k, acc=0.5 + k / 5) for k in kappas]
    _, out, _ = run_ibp("report", *runs, "--out", tmp_path / "out")
    assert ("All settings:" in out) == said
    assert out.count("| 0.5 † |") == (3 if said else 2)


def test_kappas_have_four_digits(tmp_path):
    run = made_up(tmp_path, kappa=0.84123728171234)
    _, out, _ = run_ibp("report", run, "--out", tmp_path / "out")
    assert out.count("| 0.8412 |") == 2


def labels_of(axes):
    return axes.get_legend_handles_labels()[1]


@pytest.fixture
def figures(monkeypatch):
    """The axes of each figure that is written, by its name."""
    from ibpcore.visualization.plots import cost, curves, tradeoff

    drawn = {}
    for module in (cost, curves, tradeoff):
        write = module.write_both
        monkeypatch.setattr(
            *(module, "write_both"),
            lambda figure, path, write=write: (
                drawn.update({path.name: figure.axes[0]}),
                write(figure, path),
            ),
        )
    return drawn


def test_figures_show_the_runs_that_the_table_marks(tmp_path, figures):
    """The best kappa by default; without standard loss where that is asked for."""
    runs = [
        made_up(tmp_path, method, kappa=kappa, acc=acc, seconds=seconds)
        for method in ("fastibp", "sabr", "acert")
        for kappa, acc, seconds in ((0.0, 0.5, 10.0), (0.5, 0.9, 20.0))
    ]
    runs.append(made_up(tmp_path, "mtl-ibp", kappa=0.25))
    code, out, err = run_ibp("report", *runs, "--out", tmp_path / "chosen")
    assert (code, err) == (0, "")
    assert out.count("| 0.5 † |") == 6
    names = [STYLES[method].title for method in ("fastibp", "sabr", "acert")]
    expected = {f"{name}, κ = 0.5 †" for name in names} | {"MTL-IBP, κ = 0.25"}
    expected |= {"† chosen on the test set"}
    assert set(labels_of(figures["certified_accuracy"])) - {"accuracy at radius 0"} == expected
    assert set(labels_of(figures["cost"])) == expected
    times = [line.get_xdata()[0] for line in figures["cost"].lines if len(line.get_xdata())]
    assert times == [20, 20, 10, 20], "in seconds"
    assert run_ibp("report", *runs, "--kappa-zero", "--out", tmp_path / "zero").code == 0
    expected = {f"{name}, κ = 0" for name in names} | {"MTL-IBP, κ = 0.25"}
    assert set(labels_of(figures["cost"])) == expected


def test_two_methods_have_no_figure_of_cost(tmp_path):
    runs = [made_up(tmp_path, "fastibp"), made_up(tmp_path, "acert")]
    assert run_ibp("report", *runs, "--out", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "tradeoff.svg").exists()
    assert not (tmp_path / "out" / "cost.svg").exists()


@pytest.mark.parametrize(
    ("limit", "name", "end"), [(0.1, "pixels in [0, 1]", 0.1), (16 / 255, "255ths", 16)]
)
def test_axes_name_their_units(tmp_path, figures, limit, name, end):
    """And the radii are in this unit; the accuracy begins at 0, and does not drop at the limit."""
    runs = [made_up(tmp_path, method, epsilon_max=limit) for method in ("sabr", "fastibp", "acert")]
    code, out, err = run_ibp("report", *runs, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    curve = figures["certified_accuracy"]
    assert curve.get_xlabel() == f"radius ({name})"
    assert curve.get_ylabel() == "certified accuracy (%)"
    assert curve.get_xlim() == pytest.approx((0, end))
    assert curve.get_ylim()[0] == 0
    lines = [line for line in curve.lines if len(line.get_xdata()) > 6]
    assert len(lines) == 3
    for line in lines:
        assert list(line.get_xdata()) == sorted(set(line.get_xdata()))
        assert line.get_xdata()[-1] == pytest.approx(end)
    assert figures["cost"].get_xlabel() == "training time (s)"
    assert figures["tradeoff"].get_xlabel() == "average certified radius, ACR (%)"
    typed = "0.1" if limit == 0.1 else "16/255 (0.06274)"
    assert curve.get_title() == f"UCI optical digits, ε_max {typed}"
    assert f"## UCI optical digits, ε_max {typed}\n" in out
    if limit != 0.1:
        assert "Unlike the presets, in all runs: epsilon_max 16/255." in out
        assert "0.0627450" not in out


def test_points_have_labels_where_there_is_room(tmp_path, figures):
    """Of three together, far from a fourth, not all have one, and no two overlap."""
    points = {0.0: (0.3, 0.4), 0.2: (0.3001, 0.4001), 0.3: (0.3002, 0.4002), 1.0: (0.9, 0.2)}
    points |= {0.4: (0.3003, 0.4003), 0.5: (0.3001, 0.4002), 0.6: (0.3002, 0.4001)}
    runs = [made_up(tmp_path, kappa=k, acc=acc, acr=acr) for k, (acc, acr) in points.items()]
    assert run_ibp("report", *runs, "--out", tmp_path / "out").code == 0
    axes = figures["tradeoff"]
    axes.figure.draw_without_rendering()
    labels = [text for text in axes.texts if text.get_text().startswith("κ")]
    assert {"κ 1", "κ 0.4"} <= {text.get_text() for text in labels}
    assert len(labels) < len(points)
    boxes = [text.get_window_extent() for text in labels]
    assert all(axes.bbox.contains(box.x0, box.y0) for box in boxes)
    assert all(axes.bbox.contains(box.x1, box.y1) for box in boxes)
    for number, box in enumerate(boxes):
        assert box.count_overlaps(boxes[:number]) == 0


def test_without_matplotlib(sweep, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = run_ibp("report", sweep)
    assert (code, err) == (0, "")
    assert "no figure: pip install 'ibpcore[plot]'" in out
    assert {path.name for path in (sweep / "report").iterdir()} == {"report.md", "table.csv"}


def replaced(name, text):
    return lambda run: (run / name).write_text(text)


BROKEN = {
    "nothing there": (lambda run: [file.unlink() for file in run.iterdir()], "there is no run in"),
    "no summary": (lambda run: (run / "summary.json").unlink(), "is not complete"),
    "no certificates": (lambda run: (run / "certificates.csv").unlink(), "is not complete"),
    "no JSON": (replaced("summary.json", "{"), "summary.json is damaged"),
    "a list": (replaced("summary.json", "[]"), "summary.json is damaged"),
    "no numbers": (replaced("summary.json", '{"accuracy": 1}'), "summary.json is damaged"),
    "no configuration": (replaced("config.json", "{}"), "config.json"),
    "fewer certificates": (
        lambda run: (run / "certificates.csv").write_text(
            "\n".join((run / "certificates.csv").read_text().splitlines()[:9]) + "\n"
        ),
        "its radii are not those of the summary",
    ),
    "a radius that is none": (
        lambda run: (run / "certificates.csv").write_text(
            (run / "certificates.csv").read_text().replace("3,0,0,0", "3,0,0,nan0", 1)
        ),
        "certificates.csv is damaged",
    ),
    "other certificates": (replaced("certificates.csv", "a,b\n1,2\n"), "holds no certificates"),
    "empty certificates": (
        replaced("certificates.csv", ""),
        "its radii are not those of the summary",
    ),
    "words for radii": (replaced("certificates.csv", "radius\nx\n"), "holds no certificates"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_runs(tmp_path, case):
    run = made_up(tmp_path)
    damage, says = BROKEN[case]
    damage(run)
    before = snapshot(run)
    code, out, err = run_ibp("report", run, "--out", tmp_path / "out")
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert says in err
    assert snapshot(run) == before


def test_nothing_to_report(tmp_path):
    write_sweep(tmp_path, Sweep(grid("digits", ["acert"]), "test"))
    assert run_ibp("report", tmp_path).err == (
        "Error: no run is complete: there is nothing to report\n"
    )
    assert "there is no run in none" in run_ibp("report", "none").err
    assert run_ibp("report").code == 2
    with pytest.raises(UserError, match="nothing to report"):
        read_all([])
