"""What may have been meant by a command or an option that does not exist."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

import click

COMMAND_WORDS = {
    "fit": "train",
    "evaluate": "certify",
    "test": "certify",
    "convert": "import",
    "compare": "report",
    "plot": "report",
    "grid": "sweep",
    "tune": "search",
    "optimize": "search",
    "hpo": "search",
    "check": "doctor",
}
"""Commands by words for what they do."""
OPTION_WORDS = {
    "architecture": ("net", "network", "arch"),
    "average-last": ("swa", "ema", "use-swa", "weight-averaging"),
    "batch-size": ("bs", "batch"),
    "beta2": ("betas", "adam-beta2"),
    "box-size": ("eps-shrinkage", "lambda-ratio"),
    "budget": ("n-trials", "trials", "timeout"),
    "config": ("cfg", "settings"),
    "data-dir": ("data", "data-path", "data-root", "root"),
    "dataset": ("data",),
    "device": ("gpu", "cuda", "cpu"),
    "epsilon-max": ("epsilon", "eps-max", "eps-test", "eps-train", "radius", "perturbation"),
    "gradient-clip": ("grad-clip", "clip-grad", "max-norm"),
    "ibp-weight": ("alpha",),
    "jobs": ("workers", "num-workers"),
    "learning-rate-drops": ("milestones", "lr-milestones", "lr-decay-milestones"),
    "learning-rate-schedule": ("lr-schedule", "lr-scheduler", "scheduler"),
    "limit": ("n", "num-samples"),
    "limit-test": ("n", "num-samples", "limit"),
    "max-iterations": ("iterations", "iters", "max-iter"),
    "method": ("loss", "algorithm"),
    "out": ("output", "output-dir", "outdir", "save", "save-dir"),
    "precise-batch-norm": ("pop-bn-stats", "use-pop-bn-stats", "bn-stats"),
    "regularizer": ("lambda", "reg"),
    "rtol": ("tol", "tolerance"),
    "samples": ("n", "num-samples", "limit"),
    "seed": ("random-seed", "rng"),
    "taps-weight": ("taps-grad-scale",),
    "tensorboard": ("log-dir", "logdir"),
    "threads": ("workers", "num-workers"),
    "train-epsilon-factor": ("train-eps-mul", "train-eps"),
    "validation": ("val", "val-size", "holdout"),
    "weight-decay": ("wd", "decay"),
    "xtol": ("tol", "tolerance"),
}
"""Words of the field by the options that stand for them."""


LEAST = 0.6
"""Similarity from which on a name may be meant, as measured by difflib."""


def unknown_command(name: str, commands: Iterable[str]) -> str:
    """The message for a command that does not exist."""
    word = name.lower()
    meant = COMMAND_WORDS.get(word) or " or ".join(similar(word, commands))
    return _message("command", name, meant)


def unknown_option(name: str, command: click.Command) -> str:
    """The message for an option that the command does not have."""
    flags = [flag for param in command.params for flag in (*param.opts, *param.secondary_opts)]
    words = [flag[2:] for flag in flags if flag.startswith("--")]
    word = name.lstrip("-").lower().replace("_", "-")
    found = [known for known in words if word in OPTION_WORDS.get(known, ())]
    return _message("option", name, " or ".join(f"--{w}" for w in found or similar(word, words)))


def similar(word: str, words: Iterable[str]) -> list[str]:
    """Those that begin with `word`; else the most similar one, or several that are equally so."""
    begin = [known for known in words if len(word) > 2 and known.startswith(word)]
    scores = {known: SequenceMatcher(None, known, word).ratio() for known in words}
    best = max(scores.values())
    return begin or [known for known, score in scores.items() if score == best >= LEAST]


def _message(kind: str, name: str, meant: str) -> str:
    hint = f" Did you mean {meant}?" if meant else ""
    return f"No such {kind} {name!r}.{hint}"
