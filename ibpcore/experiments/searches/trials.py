"""The trials of a search on disk, in a journal of Optuna, and the next point to try."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ibpcore.errors import REFUSED, UserError
from ibpcore.experiments.searches.objectives import Values
from ibpcore.experiments.searches.pruning import Curve
from ibpcore.experiments.searches.space import METHOD, Choice, Domain, Problem
from ibpcore.io.files import write_atomic
from ibpcore.io.locks import check_held

NEEDED = "ibp search needs optuna: pip install 'ibpcore[search]'"
STUDY = "search"
COMPLETE, PRUNED, DIVERGED = "complete", "pruned", "diverged"
STARTUP = 10
"""Trials that are drawn at random, besides the presets, before others are learnt from."""
WORST: Values = (0.0, 0.0)
"""What a diverged trial counts as."""

Point = Mapping[str, Any]
"""A value for each free setting of a method, and the method if there are several."""


@dataclass(frozen=True)
class Ended:
    """How a trial ended.

    Attributes:
        status: `COMPLETE`, `PRUNED` or `DIVERGED`.
        place: the number of trials that had ended before.
        epochs: number of them trained.
        seconds: of training.
        measures: of held-out images, of the weights that the run delivers, or for a pruned trial
            the last ones; none if it diverged.
        values: the objectives of these.
        curve: the objectives over the epochs.
    """

    status: str
    place: int
    epochs: int
    seconds: float
    measures: dict[str, Any]
    values: Values
    curve: Curve


@dataclass(frozen=True)
class Trial:
    """A run of a search.

    Attributes:
        number: from 0, in the order in which they began.
        point: of the space.
        after: the number of trials that had ended when it began.
        ended: how it ended; None while it has not.
    """

    number: int
    point: Point
    after: int
    ended: Ended | None = None


def before(trial: Trial, trials: Sequence[Trial]) -> list[Trial]:
    """Those of `trials` that had ended when `trial` began, on which its end depends."""
    return [t for t in trials if t.ended is not None and t.ended.place < trial.after]


def optuna_module() -> ModuleType:
    """Optuna, which says nothing of its own.

    Raises:
        UserError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise UserError(NEEDED) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def next_point(problem: Problem, trials: Sequence[Trial], seed: int) -> Point:
    """The point of the trial that begins after `trials`, a function of the arguments alone.

    The first trials are the presets of the methods. Then it is the multi-objective
    tree-structured Parzen estimator (Ozaki et al. 2022), which learns from fewer trials than
    evolution does, and takes settings together, since learning rate and batch size, say, do not
    act alone. Trials that have not ended count as bad, so that others are not put beside them.
    """
    optuna = optuna_module()
    number = len(trials)
    own_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=own_seed,
            multivariate=True,
            group=True,
            constant_liar=True,
            n_startup_trials=STARTUP + len(problem.methods),
        )
    study = optuna.create_study(directions=["maximize"] * 2, sampler=sampler)
    for trial in trials:
        values = None if trial.ended is None else trial.ended.values
        study.add_trial(_frozen(problem, trial.point, values))
    if number < len(problem.methods):
        study.enqueue_trial(problem.preset(problem.methods[number]))
    asked = study.ask()
    method = problem.methods[0]
    if len(problem.methods) > 1:
        method = asked.suggest_categorical(METHOD, problem.methods)
    for name, domain in problem.free(method).items():
        _suggest(asked, name, domain)
    return dict(asked.params)


def _suggest(asked: Any, name: str, domain: Domain) -> None:
    if isinstance(domain, Choice):
        asked.suggest_categorical(name, domain.values)
    elif domain.whole:
        asked.suggest_int(name, domain.low, domain.high, log=domain.log)
    else:
        asked.suggest_float(name, domain.lowest, domain.high, log=domain.log)


def _distribution(domain: Domain) -> Any:
    kinds = optuna_module().distributions
    if isinstance(domain, Choice):
        return kinds.CategoricalDistribution(domain.values)
    if domain.whole:
        return kinds.IntDistribution(domain.low, domain.high, log=domain.log)
    return kinds.FloatDistribution(domain.lowest, domain.high, log=domain.log)


def _frozen(problem: Problem, point: Point, values: Values | None, **attributes: Any) -> Any:
    """A trial of Optuna, which is complete, or runs if it has no values."""
    trial = optuna_module().trial
    domains = problem.free(point.get(METHOD, problem.methods[0]))
    domains = {METHOD: Choice(problem.methods), **domains}
    return trial.create_trial(
        state=trial.TrialState.RUNNING if values is None else trial.TrialState.COMPLETE,
        values=values,
        params=dict(point),
        distributions={name: _distribution(domains[name]) for name in point},
        user_attrs=attributes,
    )


class TrialStore:
    """The trials of a search, in a file that only the holder of its folder writes.

    Each change is a line of Optuna's journal storage, on disk before it counts. A trial begins
    with one line that has all its settings; so one that a kill cut off is either not there at
    all, or begun, and goes on with the same settings.

    Attributes:
        trials: all of them, by number.
    """

    def __init__(self, path: Path, problem: Problem) -> None:
        """Opens or creates the file.

        Raises:
            UserError: Optuna is not installed, or the file is damaged.
            OSError: it cannot be read or written.
        """
        optuna = optuna_module()
        self._path, self._problem = path, problem
        _repair(path)
        with self._writing(), _undamaged(path):
            new = not path.exists() or path.stat().st_size == 0
            file = optuna.storages.journal.JournalFileBackend(str(path))
            stored: Any = {"storage": optuna.storages.JournalStorage(file), "study_name": STUDY}
            if new:
                self._study = optuna.create_study(directions=["maximize"] * 2, **stored)
            else:
                self._study = optuna.load_study(**stored)
        with _undamaged(path):
            ends = self._study.user_attrs
            self.trials = [
                _trial(problem, frozen, ends.get(str(number)))
                for number, frozen in enumerate(self._study.get_trials(deepcopy=False))
            ]
            places = [t.ended.place for t in self.trials if t.ended is not None]
            if sorted(places) != [*range(len(places))]:
                raise ValueError("trials have ended in no order")

    @property
    def ended(self) -> int:
        """The number of trials that have ended."""
        return sum(trial.ended is not None for trial in self.trials)

    def begin(self, point: Point) -> Trial:
        """Adds a trial.

        Raises:
            OSError: the file cannot be written.
        """
        trial = Trial(len(self.trials), point, self.ended)
        with self._writing():
            self._study.add_trial(_frozen(self._problem, point, None, after=trial.after))
        self.trials.append(trial)
        return trial

    def end(self, number: int, ended: Ended) -> Trial:
        """Ends a trial.

        Raises:
            OSError: the file cannot be written.
        """
        states = optuna_module().trial.TrialState
        with self._writing():
            self._study.set_user_attr(str(number), asdict(ended))
            if ended.status == COMPLETE:
                self._study.tell(number, ended.values)
            else:
                state = states.PRUNED if ended.status == PRUNED else states.FAIL
                self._study.tell(number, state=state)
        trial = self.trials[number]
        self.trials[number] = Trial(number, trial.point, trial.after, ended)
        return self.trials[number]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        check_held(self._path)
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None


def _repair(path: Path) -> None:
    """Removes what a kill may have left: a last line without its end, and Optuna's own lock.

    The folder is held, so nobody else writes there.
    """
    for lock in path.parent.glob(f"{path.name}.lock*"):
        lock.unlink(missing_ok=True)
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        write_atomic(path, whole)


@contextlib.contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    """Whatever Optuna makes of a damaged file becomes a UserError."""
    try:
        yield
    except (*REFUSED, AssertionError):
        raise UserError(f"{path} is damaged: it does not hold the trials of a search") from None


def _trial(problem: Problem, frozen: Any, record: Any) -> Trial:
    """A trial as Optuna keeps it; malformed ones raise an error of any type."""
    method = frozen.params.get(METHOD, problem.methods[0])
    expected = {*problem.free(method), *([METHOD] if len(problem.methods) > 1 else [])}
    if method not in problem.methods or frozen.params.keys() != expected:
        raise ValueError("other settings are searched")
    after = frozen.user_attrs["after"]
    if type(after) is not int:
        raise TypeError("the trials before it are not counted")
    problem.config(frozen.params)
    ended = _ended(record) if frozen.state.is_finished() else None
    return Trial(frozen.number, dict(frozen.params), after, ended)


def _ended(record: Any) -> Ended:
    curve = [(float(share), _values(values)) for share, values in record["curve"]]
    whole = [record[name] for name in ("place", "epochs")]
    if any(type(number) is not int or number < 0 for number in whole):
        raise TypeError("a count is no whole number")
    if record["status"] not in (COMPLETE, PRUNED, DIVERGED):
        raise ValueError("an unknown end")
    ended = Ended(**{**record, "values": _values(record["values"]), "curve": curve})
    if not (isinstance(ended.measures, dict) and 0 <= ended.seconds < math.inf):
        raise ValueError("its measures are none")
    return ended


def _values(pair: Any) -> Values:
    first, second = pair
    if not all(type(x) in (int, float) and 0 <= x <= 1 for x in (first, second)):
        raise ValueError("an objective is no fraction")
    return float(first), float(second)
