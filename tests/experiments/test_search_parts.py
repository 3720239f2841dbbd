"""The parts of a search: objectives, budget, space, the rule of hopeless trials, suggestions."""

import json
import math
import pickle
from itertools import pairwise

import pytest

from ibpcore import UserError
from ibpcore.choices import METHODS
from ibpcore.experiments.searches.objectives import (
    Budget,
    Objective,
    budget_of,
    objective_values,
    objectives_of,
)
from ibpcore.experiments.searches.pruning import HopelessRule, curve_of, values_at
from ibpcore.experiments.searches.space import (
    DEFAULT_SPACE,
    Choice,
    Problem,
    Range,
    default_space,
    searched,
    space_of,
    used,
    written,
)
from ibpcore.experiments.searches.tables import best_of, front_area, front_of, spread
from ibpcore.experiments.searches.trials import (
    COMPLETE,
    DIVERGED,
    PRUNED,
    Ended,
    Trial,
    TrialStore,
    before,
    next_point,
)
from ibpcore.training.config import make_config

BOTH = objectives_of("accuracy,acr")


def ended(values, place=0, status=COMPLETE, curve=()):
    return Ended(status, place, 1, 0.0, {}, values, [*curve])


def trials_of(*values):
    return [Trial(n, {}, n, ended(value, n)) for n, value in enumerate(values)]


# Objectives and budget


def test_objectives():
    assert [one.name for one in BOTH] == ["accuracy", "acr"]
    assert [one.title for one in BOTH] == ["accuracy", "ACR"]
    accuracy, certified = objectives_of(" accuracy, certified@8/255")
    assert (certified.name, certified.title) == ("certified@8/255", "certified at 8/255")
    measures = {"accuracy": 0.9, "acr": 0.3, "certified_accuracy": {"8/255": 0.5}}
    assert objective_values((accuracy, certified), measures) == (0.9, 0.5)
    assert objective_values(BOTH, measures) == (0.9, 0.3)


@pytest.mark.parametrize(
    "text",
    ["", "accuracy", "acr,acr", "accuracy,acr,art", "accuracy,loss", "accuracy,certified"]
    + [f"accuracy,certified@{radius}" for radius in ("", "x", "0", "2", "-1", "1/0", "nan")],
)
def test_bad_objectives(text):
    with pytest.raises(UserError, match=r"objectives must|the radius of"):
        objectives_of(text)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("50", Budget(trials=50)),
        ("2h", Budget(seconds=7200)),
        ("30m", Budget(seconds=1800)),
        ("1h30m", Budget(seconds=5400)),
        ("0.5h", Budget(seconds=1800)),
        ("90s", Budget(seconds=90)),
    ],
)
def test_budgets(text, budget):
    assert budget_of(text) == budget


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "h", "0h", "2d", "1.5.5h", "2h x", "30 m"])
def test_bad_budgets(text):
    with pytest.raises(UserError, match="budget must be"):
        budget_of(text)


@pytest.mark.parametrize(
    "budget",
    [
        *(Budget(trials=50), Budget(trials=600_000)),
        *(Budget(seconds=seconds) for seconds in (0.5, 0.001, 5400, 150 * 3600, 1 / 3)),
    ],
)
def test_a_budget_twice_as_large(budget):
    twice = budget_of(budget.doubled())
    assert twice.trials == (budget.trials and 2 * budget.trials)
    assert twice.seconds == (budget.seconds and 2 * budget.seconds)


def test_a_budget_is_spent_by_trials_or_by_time():
    assert [Budget(trials=3).is_spent(n, 1e9) for n in (2, 3, 4)] == [False, True, True]
    assert [Budget(seconds=3).is_spent(10**6, s) for s in (2.9, 3.0)] == [False, True]


# The space


def problem(values=None, methods=("acert",), **common):
    common = {"epochs": 10, "validation": 8, **common}
    return Problem("digits", methods, common, space_of(values or {}, [*common]))


def test_the_default_space_is_allowed_for_every_method():
    problem(methods=METHODS).check()
    for name in METHODS:
        assert searched(problem(methods=(name,)).space, name).keys() <= DEFAULT_SPACE.keys()


def test_methods_search_what_they_use():
    space = space_of({})
    assert "kappa" not in searched(space, "standard")
    assert {"box_size", "relu_shrinkage"} <= searched(space, "sabr").keys()
    assert "box_size" not in searched(space, "acert")
    assert {"ibp_weight", "attack_scale"} <= searched(space, "mtl-ibp").keys()


def test_a_file_replaces_entries_and_may_replace_all():
    space = space_of({"kappa": 0.5, "flip": [True, False]})
    assert space["kappa"] == Choice((0.5,))
    assert space["flip"] == Choice((True, False))
    assert space["learning_rate"] == Range(1e-4, 1e-2, log=True)
    only = space_of({"defaults": False, "batch_size": {"low": 8, "high": 64}})
    assert only == {"batch_size": Range(8, 64, whole=True)}
    assert "kappa" not in space_of({}, ["kappa"]), "the command line fixes it"


def test_the_written_space_is_the_same_space():
    values = {"initial_kappa": ["none", 0.5], "flip": True, "batch_size": {"low": 8, "high": 9}}
    space = space_of(values)
    again = json.loads(json.dumps(written(space)))
    assert space_of(again) == space
    assert again["l1"] == DEFAULT_SPACE["l1"]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([], "holds no named settings"),
        ({"defaults": 1}, "defaults must be true or false"),
        ({"learning_rte": 1}, "unknown setting learning_rte; did you mean learning_rate?"),
        ({"lr": 1}, "unknown setting lr; did you mean learning_rate?"),
        ({"method": ["acert"]}, "method is not searched: give --methods"),
        ({"warmup": [1, 2]}, "warmup is not searched: give warmup_share"),
        ({"epsilon_max": 0.1}, "epsilon_max is not searched: it is the same"),
        ({"seed": [0, 1]}, "seed is not searched"),
        ({"kappa": []}, "kappa must be a value"),
        ({"kappa": [[0, 1]]}, "kappa must be a value"),
        ({"kappa": [0.5, 0.5]}, "kappa has a value twice"),
        ({"kappa": {"low": 0}}, "kappa: a range has low and high"),
        ({"kappa": {"low": 0, "high": 1, "step": 1}}, "kappa: a range has .* not step"),
        ({"kappa": {"low": 1, "high": 0}}, "kappa: low must be below high"),
        ({"kappa": {"low": "0", "high": 1}}, "kappa: low must be a finite number"),
        ({"kappa": {"low": 0, "high": float("inf")}}, "kappa: high must be a finite number"),
        ({"kappa": {"low": 0, "high": 1, "log": True}}, "kappa: low must be above 0"),
        ({"kappa": {"low": 0, "high": 1, "log": 1}}, "kappa: log must be true or false"),
        ({"kappa": {"low": 0, "high": 1, "zero": True}}, "kappa: zero is for logarithmic"),
        ({"batch_size": {"low": 8.5, "high": 16}}, "batch_size: low must be a whole number"),
        ({"flip": {"low": 0, "high": 1}}, "flip is no number"),
        ({"schedule": {"low": 0, "high": 1}}, "schedule is no number"),
        ({"learning_rate_drops": [0.7, 0.85]}, "learning_rate_drops is not searched"),
        ({"learning_rate": {"low": 1, "high": 10**400}}, "high must be a finite number"),
        *(
            ({"warmup_share": bad}, "warmup_share must be above 0 and at most 1")
            for bad in ("half", "none", ["half"], [True], 2, 0, math.inf, math.nan, 10**400)
        ),
        ({"warmup_share": {"low": 0.0, "high": 0.5}}, "warmup_share must be above 0"),
        ({"warmup_share": {"low": 0.5, "high": 2}}, "warmup_share must be above 0"),
    ],
)
def test_a_bad_space_names_the_key(values, says):
    with pytest.raises(UserError, match=says):
        space_of(values)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"kappa": {"low": 0.0, "high": 1.5}}, r"kappa must be in \[0, 1\], but is 1.5"),
        ({"kappa": [0.5, "half"]}, "kappa must be a finite number"),
        ({"schedule": ["smoothed", "cosine"]}, "schedule must be one of .* 'cosine'"),
        ({"batch_size": [1, 32]}, "batch_size must be at least 2"),
        ({"adaptive": [True, False]}, "adaptive must be on for acert"),
    ],
)
def test_values_are_checked_before_a_trial_begins(values, says):
    with pytest.raises(UserError, match=says):
        problem(values).check()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"adaptive": [True, False], "random_radii": [True, False]},
            "^adaptive = true and random_radii = true cannot be searched together: random_radii",
        ),
        (
            {"architecture": ["none", "linear 16, relu, linear"], "width": [8, 16]},
            "^architecture = linear 16, relu, linear and width = 8 cannot be searched together",
        ),
    ],
)
def test_values_that_exclude_each_other_are_refused(values, says):
    with pytest.raises(UserError, match=says):
        problem(values, methods=("fastibp",)).check()


def test_a_setting_is_searched_once():
    with pytest.raises(UserError, match="kappa stands in the command line too"):
        space_of({"kappa": 0.5}, ["kappa"])


def test_zero_is_the_lowest_part_of_a_range():
    l1 = Range(1e-7, 1e-3, log=True, zero=True)
    assert l1.lowest == pytest.approx(1e-7 / 10 ** (4 / 3)), "a quarter of all 16/3 decades"
    assert [l1.setting(point) for point in (l1.lowest, 9e-8, 1e-7, 1e-4)] == [0, 0, 1e-7, 1e-4]
    assert (l1.nearest(0.0), l1.nearest(1e-8), l1.nearest(1.0)) == (l1.lowest, l1.lowest, 1e-3)


def test_a_point_becomes_a_configuration():
    found = problem(methods=("acert", "sabr"))
    point = {"method": "sabr", "kappa": 0.25, "warmup_share": 0.34, "l1": 1e-9, "box_size": 0.5}
    config = found.config(point)
    assert (config.method, config.kappa, config.warmup) == ("sabr", 0.25, (1, 3))
    assert (config.l1, config.box_size, config.epochs) == (0.0, 0.5, 10)
    assert problem({"kappa": 0.5}).config({}).kappa == 0.5


def test_the_preset_is_a_point():
    found = problem(methods=("acert", "ibp"))
    for method in found.methods:
        config = found.config(found.preset(method))
        usual = make_config("digits", method, epochs=10, validation=8)
        explicit = {"initial_kappa": usual.initial_kappa or usual.kappa}
        assert config == make_config("digits", method, epochs=10, validation=8, **explicit)
    elsewhere = {"learning_rate": {"low": 1.0, "high": 2.0}, "batch_size": [7, 9]}
    near = problem(elsewhere).preset("acert")
    assert (near["learning_rate"], near["batch_size"]) == (1.0, 9)


def test_the_nearest_of_several_values():
    assert Choice((32, 64)).nearest(128) == 64
    assert Choice((0.999, 0.9)).nearest(0.95) == 0.999
    assert Choice((None, 4)).nearest(3) == 4
    assert Choice((4, None)).nearest(None) is None
    assert Choice(("linear", "step")).nearest("smoothed") == "linear"
    assert Choice((4, 8)).nearest(None) == 4


@pytest.mark.parametrize("epsilon_max", [0.1, 0.7, 1 / 1.37, 0.99, 1.0])
def test_the_default_space_has_no_radius_above_1(epsilon_max):
    space = space_of({}, ["epsilon_max"], default_space(epsilon_max))
    factors = space["train_epsilon_factor"].ends
    assert factors[0] == 1
    assert max(factors) * epsilon_max <= 1
    assert max(factors) == 1.5 or (max(factors) + 0.01) * epsilon_max > 1
    Problem("digits", ("acert",), {"epsilon_max": epsilon_max}, space).check()


def test_the_largest_batches_of_a_space():
    assert problem().largest("acert").batch_size == 256
    assert problem({"batch_size": {"low": 8, "high": 100}}).largest("acert").batch_size == 100
    assert problem({"batch_size": 16}).largest("acert").batch_size == 16
    assert problem(batch_size=24).largest("acert").batch_size == 24


def test_settings_that_no_method_uses():
    space = space_of({"box_size": 0.5, "kappa": 0.5})
    assert used(space, ("standard", "sabr"), ["defaults", "box_size", "kappa"])["kappa"]
    assert "box_size" not in used(space, ("acert", "taps"), ["kappa"])
    with pytest.raises(UserError, match="box_size is not for acert, taps"):
        used(space, ("acert", "taps"), ["kappa", "box_size"])
    with pytest.raises(UserError, match="kappa is not for standard"):
        used(space, ("standard",), ["kappa"])


@pytest.mark.parametrize("method", METHODS)
def test_the_space_of_a_method_can_be_given_again(method):
    space = used(space_of({}), [method], {})
    again = written(space)
    assert used(space_of(again), [method], again) == space


# The rule


def history(*rows):
    """Of (accuracy, ACR), or None for an epoch that is not measured."""
    found = []
    for epoch, row in enumerate(rows, 1):
        found.append({"epoch": epoch})
        if row is not None:
            found[-1]["validation"] = {"accuracy": row[0], "acr": row[1]}
    return found


def rule(rivals=(), epochs=10, warmup=2, classes=10):
    config = make_config("digits", "fastibp", epochs=epochs, warmup=(1, warmup), validation=8)
    return HopelessRule(config, classes, BOTH, [*rivals])


def test_curves():
    curve = curve_of(history(None, (0.5, 0.1), None, (0.75, 0.25)), 4, BOTH)
    assert curve == [(0.5, (0.5, 0.1)), (1.0, (0.75, 0.25))]
    assert [values_at(curve, share) for share in (0.4, 0.5, 0.99, 1.0)] == [
        *(None, (0.5, 0.1), (0.5, 0.1), (0.75, 0.25)),
    ]


def test_two_measurements_near_chance_after_the_warm_up_end_a_run():
    low, good = (0.1, 0.1), (0.8, 0.5)
    ends = rule()
    assert not ends([])
    assert not ends(history(low)), "in the warm-up"
    assert not ends(history(low, low)), "one of them is in the warm-up"
    assert ends(history(low, low, low))
    assert not ends(history(low, low, low, None)), "nothing is measured there"
    assert not ends(history(low, low, good, low))
    assert ends(history(good, low, None, low))


def test_below_both_medians_of_five_is_behind():
    pairs = [(0.5, 0.9), (0.6, 0.8), (0.7, 0.7), (0.8, 0.6), (0.9, 0.5)]
    rivals = [[(0.2, (0.1, 0.0)), (0.5, pair)] for pair in pairs]
    ends = rule(rivals)

    def at(*last):
        return history(None, None, None, None, last)

    assert ends(at(0.69, 0.69))
    assert not ends(at(0.7, 0.1)), "at the median of one"
    assert not ends(at(0.2, 0.71)), "above that of the other"
    assert not rule(rivals[:4])(at(0.3, 0.3)), "too few rivals"
    assert not rule([*rivals[:4], [(0.9, (1.0, 1.0))]])(at(0.3, 0.3)), "one was not measured yet"
    assert not ends(history(None, None, (0.2, 0.1))), "at that time they were no better"
    assert not rule(rivals, warmup=6)(at(0.3, 0.3)), "in the warm-up"


def test_the_rule_goes_to_another_process():
    ends = pickle.loads(pickle.dumps(rule([[(0.5, (0.5, 0.5))]])))
    assert ends == rule([[(0.5, (0.5, 0.5))]])


# The front


def test_the_front_by_hand():
    trials = trials_of((0.9, 0.2), (0.8, 0.5), (0.8, 0.4), (0.5, 0.8), (0.8, 0.5))
    trials[3:3] = [Trial(9, {}, 0, ended((1.0, 1.0), status=PRUNED)), Trial(10, {}, 0)]
    assert [trial.number for trial in front_of(trials)] == [0, 1, 4, 3]
    assert best_of(trials).number == 1
    assert front_area(trials) == pytest.approx(0.2 * 0.9 + 0.3 * 0.8 + 0.3 * 0.5)
    assert (front_of(trials[3:5]), best_of(trials[3:5])) == ([], None)


def test_models_are_spread_along_the_front():
    front = trials_of(*((1 - n / 10, n / 10) for n in range(1, 10)))
    assert [t.number for t in spread(front, 5)] == [0, 2, 4, 6, 8]
    assert [t.number for t in spread(front, 3)] == [0, 4, 8]
    assert [t.number for t in spread(front, 1)] == [4], "the best"
    assert [t.number for t in spread(front, 2)] == [4, 8]
    assert spread(front, 0) == []
    assert spread(front, 9) == spread(front, 20) == front
    tilted = trials_of(*((1 - n / 20, n / 10) for n in range(1, 10)))
    assert [t.number for t in spread(tilted, 3)] == [0, 4, 8]


# Suggestions


def test_suggestions_depend_on_what_has_ended_and_the_number():
    found = problem(methods=("acert", "sabr"))
    trials = []
    for number in range(16):
        point = next_point(found, trials, 0)
        assert point == next_point(found, [*trials], 0)
        found.config(point)
        expected = {"method", *searched(found.space, point["method"])}
        assert point.keys() == expected
        trials.append(Trial(number, point, number, ended((point["kappa"], 0.5), number)))
    assert [t.point["method"] for t in trials[:2]] == ["acert", "sabr"], "the presets come first"
    assert next_point(found, trials, 0) != next_point(found, trials, 1)
    other = [*trials[:-1], Trial(15, trials[-1].point, 15, ended((1.0, 1.0), 15))]
    assert next_point(found, other, 0) != next_point(found, trials, 0)
    # It has learnt that a large kappa is good.
    later = [next_point(found, trials, seed)["kappa"] for seed in range(8)]
    assert sum(later) / 8 > 0.6


def test_every_kind_of_setting_is_suggested():
    values = {
        **{"defaults": False, "hidden": {"low": 8, "high": 16}, "flip": [True, False]},
        **{"initial_kappa": ["none", 0.5], "schedule": ["smoothed", "linear"]},
        **{"width": {"low": 2, "high": 8, "log": True}, "l1": DEFAULT_SPACE["l1"]},
    }
    found = problem(values)
    found.check()
    configs = []
    trials = []
    for number in range(20):
        trials.append(Trial(number, next_point(found, trials, 3), 0, ended((0.5, 0.5), number)))
        configs.append(found.config(trials[-1].point))
    assert {config.flip for config in configs} == {True, False}
    assert {config.initial_kappa for config in configs} == {None, 0.5}
    assert {config.schedule for config in configs} == {"smoothed", "linear"}
    assert 0.0 in {config.l1 for config in configs}
    assert any(1e-7 <= config.l1 <= 1e-3 for config in configs)
    assert all(8 <= c.hidden <= 16 and 2 <= c.width <= 8 for c in configs)


# The store


def filled(path, found):
    store = TrialStore(path, found)
    for number, status in enumerate((COMPLETE, PRUNED, DIVERGED)):
        store.begin(next_point(found, store.trials, 0))
        curve = [(0.5, (0.25, 0.5)), (1.0, (0.5, 0.75))]
        store.end(number, ended((0.5, 0.75), number, status, curve))
    store.begin(next_point(found, store.trials, 0))
    return store


def test_trials_come_back_from_the_disk(tmp_path):
    found = problem(methods=("acert", "sabr"))
    store = filled(tmp_path / "journal", found)
    again = TrialStore(tmp_path / "journal", found)
    assert again.trials == store.trials
    last = again.trials[-1]
    assert (last.number, last.after, last.ended) == (3, 3, None)
    assert [t.number for t in before(last, again.trials)] == [0, 1, 2]
    assert before(again.trials[0], again.trials) == []


def test_a_torn_line_and_a_stale_lock_are_removed(tmp_path):
    """At any byte: a trial is there as a whole, or not at all."""
    found, path = problem(), tmp_path / "journal"
    filled(path, found)
    content = path.read_bytes()
    whole = TrialStore(path, found).trials
    starts = [place + 1 for place in range(len(content)) if content[place : place + 1] == b"\n"]
    for start, end in pairwise(starts):
        for cut in {start, start + 1, (start + end) // 2, end - 1}:
            path.write_bytes(content[:cut])
            (tmp_path / "journal.lock").symlink_to(path)
            trials = TrialStore(path, found).trials
            assert [t.point for t in trials] == [t.point for t in whole[: len(trials)]]
            assert path.read_bytes() == content[:start]
            assert not (tmp_path / "journal.lock").is_symlink()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[2:],
        lambda text: text.replace('"place":1', '"place":7'),
        lambda text: text.replace('"place":1', '"place":"1"'),
        lambda text: text.replace('"complete"', '"finished"'),
        lambda text: text.replace("[0.5,0.75]", "[0.5,7]"),
        lambda text: text.replace("[0.5,0.75]", "null"),
        lambda text: text.replace('"after":2', '"after":"2"'),
        lambda text: text.replace("learning_rate", "learning_rte"),
        lambda text: text.replace('"op_code":0', '"op_code":99', 1),
        lambda text: "\0" * 40 + "\n" + text,
    ],
)
def test_a_damaged_store_is_refused(tmp_path, damage):
    found, path = problem(), tmp_path / "journal"
    filled(path, found)
    text = damage(path.read_text())
    assert text != path.read_text()
    path.write_text(text)
    with pytest.raises(UserError, match="journal is damaged"):
        TrialStore(path, found)


def test_an_objective_is_hashable_and_compares():
    assert Objective("acr") in BOTH
