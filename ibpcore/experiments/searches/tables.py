"""Tables of a search: all trials and the front, as CSV and for readers, and the figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ibpcore.certification.metrics import hypervolume, pareto_front
from ibpcore.experiments.results import Result, write_rows
from ibpcore.experiments.searches.objectives import Objectives, Values
from ibpcore.experiments.searches.space import METHOD, Problem
from ibpcore.experiments.searches.trials import COMPLETE, Trial
from ibpcore.visualization.plots.front import Dots, write_front
from ibpcore.visualization.plots.style import STYLES, Look, figures_possible, style_of

TRIALS_TABLE, FRONT_TABLE, FIGURE = "trials.csv", "front.csv", "front"
MEASURES = ("accuracy", "acr", "art")
FAILED, OPEN = "failed", "open"


def run_name(trial: Trial) -> str:
    """Of the folder of a trial, such as `trial-0012`."""
    return f"trial-{trial.number:04}"


def values_of(trial: Trial) -> Values:
    """The objectives of a trial that has ended."""
    assert trial.ended is not None
    return trial.ended.values


def complete_trials(trials: Sequence[Trial]) -> list[Trial]:
    """Those that were trained to their end."""
    return [t for t in trials if t.ended is not None and t.ended.status == COMPLETE]


def front_of(trials: Sequence[Trial]) -> list[Trial]:
    """The complete trials that no other beats in both objectives, by the second, rising."""
    complete = complete_trials(trials)
    front = pareto_front(values_of(trial)[::-1] for trial in complete)
    return [trial for point in front for trial in complete if values_of(trial)[::-1] == point]


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The first complete trial with the highest geometric mean of the objectives.

    For accuracy and ACR that is the ART. None if none is complete.
    """
    return max(front_of(trials), key=lambda trial: (_merit(trial), -trial.number), default=None)


def _merit(trial: Trial) -> float:
    first, second = values_of(trial)
    return first * second


def spread(front: Sequence[Trial], count: int) -> list[Trial]:
    """At most `count` trials, evenly spread along a front, the best one among them."""
    if len(front) <= count:
        return [*front]
    best = best_of(front)
    if best is None or count == 0:
        return []
    steps = range(count) if count > 1 else ()
    places = [round(step * (len(front) - 1) / (count - 1)) for step in steps] or [0]
    at = front.index(best)
    if at not in places:
        # The ends stay where there are others.
        free = places[1:-1] or places[:1]
        places[places.index(min(free, key=lambda place: abs(place - at)))] = at
    return [front[place] for place in places]


def front_area(trials: Sequence[Trial]) -> float:
    """The hypervolume of the front, with the reference point (0, 0)."""
    return hypervolume(values_of(trial) for trial in complete_trials(trials))


def settings_of(problem: Problem, trial: Trial) -> dict[str, Any]:
    """The settings in which the trials differ, by name, the method first."""
    method = trial.point.get(METHOD, problem.methods[0])
    domains = problem.free(method)
    chosen = {n: d.setting(trial.point[n]) for n, d in domains.items()}
    return {METHOD: method, **chosen}


def write_tables(
    folder: Path,
    problem: Problem,
    trials: Sequence[Trial],
    reasons: Mapping[int, str],
    certified: Sequence[Result],
) -> None:
    """Writes `trials.csv` and `front.csv`.

    Args:
        folder: of the search.
        problem: that was searched.
        trials: all of them.
        reasons: why trials failed, by number.
        certified: results of trials on the test images.

    Raises:
        OSError: a file cannot be written.
    """
    front = front_of(trials)
    tests = {result.run.name: result.measures for result in certified}
    rows = [_row(problem, t, reasons.get(t.number, ""), t in front) for t in trials]
    write_rows(folder / TRIALS_TABLE, rows)
    shown = [
        {n: value for n, value in rows[t.number].items() if n not in ("front", "status", "reason")}
        | {f"test_{n}": tests[run_name(t)][n] for n in MEASURES if run_name(t) in tests}
        for t in front
    ]
    write_rows(folder / FRONT_TABLE, shown)


def _row(problem: Problem, trial: Trial, reason: str, on_front: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"trial": trial.number, "run": run_name(trial)}
    row |= settings_of(problem, trial)
    ended = trial.ended
    if ended is not None:
        row |= {"front": "yes" if on_front else "no", "epochs_trained": ended.epochs}
        row |= {"training_seconds": f"{ended.seconds:.1f}"}
        row |= {f"validation_{n}": ended.measures[n] for n in MEASURES if n in ended.measures}
        shares = ended.measures.get("certified_accuracy", {})
        row |= {f"validation_certified@{radius}": share for radius, share in shares.items()}
    status = ended.status if ended is not None else FAILED if reason else OPEN
    return {**row, "status": status, "reason": reason}


def front_table(
    problem: Problem, objectives: Objectives, trials: Sequence[Trial]
) -> Iterator[list[str]]:
    """The head, and a row for each of the trials, objectives in percent; for readers."""
    settings = [settings_of(problem, trial) for trial in trials]
    names = dict.fromkeys(name for one in settings for name in one)
    yield ["trial", *(objective.title for objective in objectives), *names]
    for trial, one in zip(trials, settings, strict=True):
        shares = [f"{100 * value:.2f} %" for value in values_of(trial)]
        yield [str(trial.number), *shares, *(_cell(one.get(name, "-")) for name in names)]


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def draw_search(
    folder: Path, problem: Problem, objectives: Objectives, trials: Sequence[Trial], title: str
) -> None:
    """Writes the figure of all trials and the front, if there are any and matplotlib is installed.

    Raises:
        OSError: a file cannot be written.
    """
    ended = [trial for trial in trials if trial.ended is not None and trial.ended.measures]
    if not ended or not figures_possible():
        return
    front = front_of(trials)
    methods = [settings_of(problem, trial)[METHOD] for trial in ended]
    groups = []
    for method in [name for name in STYLES if name in methods]:
        own = [t for t, used in zip(ended, methods, strict=True) if used == method]
        groups.append(
            Dots(
                Look(style_of(method).title, method),
                [values_of(t) for t in own if t not in front],
                [values_of(t) for t in own if t in front],
            )
        )
    labels = (objectives[0].title, objectives[1].title)
    write_front(folder / FIGURE, groups, labels, title)
