"""The runs of each table of the paper, and the paper's own results, as data.

A row is one run, one for each of its seeds, or one for each of several kappas, of which one is
chosen on the held-out images. The paper's results are accuracy / ACR / ART in percent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ibpcore.training.config import TrainConfig, make_config

KAPPAS = (0.0, 0.25, 0.5, 0.75, 0.9)
"""The kappas to choose from; the paper tries [0, 1] in steps of about 0.05."""

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "small": {
        # The preset's warm-up, a fifth of the epochs, is too short here: bounds explode in it.
        "mnist": {
            "width": 8,
            "hidden": 64,
            "epochs": 10,
            "warmup": (1, 5),
            "limit_train": 20_000,
        },
        "cifar10": {"width": 8, "hidden": 64, "epochs": 15, "limit_train": 10_000},
        "tinyimagenet": {"width": 8, "hidden": 64, "epochs": 15, "limit_train": 10_000},
    },
    "full": {"mnist": {}, "cifar10": {}, "tinyimagenet": {}},
}
HELD_OUT = {
    "small": {"mnist": 1_000, "cifar10": 1_000, "tinyimagenet": 1_000},
    "full": {"mnist": 5_000, "cifar10": 5_000, "tinyimagenet": 5_000},
}
CUSTOMARY = {"mnist": "0.3", "cifar10": "8/255", "tinyimagenet": "1/255"}
"""The radius at which tables give certified accuracies."""
TIGHTER = "crown"
"""The bound that is tried where IBP is known to be loose."""
LOOSE = ("sabr", "mtl-ibp", "cc-ibp", "exp-ibp", "taps", "staps")
"""The methods that train networks which IBP does not bound tightly."""


@dataclass(frozen=True, eq=False)
class Row:
    """A line of a table.

    Attributes:
        method: a name in `ibpcore.training.methods.METHODS`.
        settings: settings other than the presets'.
        kappas: the kappas to choose from; empty if `settings` or the preset has the kappa.
        seeds: number of seeds, which start at 0.
        paper: the paper's result; "" if it has none.
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    kappas: tuple[float, ...] = ()
    seeds: int = 1
    paper: str = ""

    def choices(self) -> list[dict[str, Any]]:
        """The alternatives to choose from; at least one."""
        given = dict(self.settings)
        return [{**given, "kappa": kappa} for kappa in self.kappas] or [given]

    @property
    def is_loose(self) -> bool:
        """Whether `TIGHTER` certifies it, too."""
        return self.method in LOOSE

    @property
    def label(self) -> str:
        """The method and its special settings, for the table."""
        special = [_words(name, value) for name, value in self.settings.items() if name != "kappa"]
        return ", ".join([self.method, *special])


def _words(name: str, value: Any) -> str:
    texts = {"adaptive": "adaptive radii", "max_iterations": f"{value} iterations"}
    texts |= {"loss_fusion": "loss fusion", "solver": str(value), "schedule": f"schedule {value}"}
    texts |= {"learning_rate_schedule": str(value), "learning_rate": f"rate {value}"}
    return texts.get(name, f"{name} {value}")


ZERO = {"kappa": 0.0}
AS_ACERT = {"kappa": 0.0, "learning_rate": 2e-3, "learning_rate_schedule": "onecycle"}
ADAPTIVE = {"kappa": 0.0, "adaptive": True}
FUSED = {"kappa": 0.0, "loss_fusion": True}
LOOSE_ROWS = tuple(Row(method, ZERO) for method in LOOSE)


def _table1(paper: Mapping[str, str]) -> tuple[Row, ...]:
    """All methods at kappa 0, the paper's two with tuned kappa, and rows that it does not have."""
    plain = ("ibp", "fastibp", "sabr", "mtl-ibp", "cc-ibp", "exp-ibp", "acert")
    return (
        Row("standard", paper=paper.get("standard", "")),
        Row("crown-ibp", FUSED, paper=paper.get("crown-ibp", "")),
        *(Row(method, ZERO, paper=paper.get(method, "")) for method in plain),
        *(
            Row(method, kappas=KAPPAS, paper=paper.get(f"{method} tuned", ""))
            for method in ("fastibp", "acert")
        ),
        Row("fastibp", AS_ACERT),
        Row("sabr", ADAPTIVE),
        Row("mtl-ibp", ADAPTIVE),
    )


TABLES: dict[str, dict[str, tuple[Row, ...]]] = {
    "table1": {
        "mnist": _table1(
            {
                "standard": "99.24 / 0.001 / 0.35",
                "crown-ibp": "98.20 / 95.13 / 96.65",
                "sabr": "98.75 / 87.27 / 92.83",
                "fastibp": "97.61 / 94.69 / 96.13",
                "acert": "98.42 / 95.01 / 96.69",
            }
        ),
        "cifar10": _table1(
            {
                "standard": "91.84 / 0.0002 / 0.14",
                "crown-ibp": "45.40 / 38.59 / 41.84",
                "sabr": "52.38 / 42.45 / 47.14",
                "fastibp": "48.94 / 41.23 / 44.91",
                "fastibp tuned": "62.84 / 40.70 / 50.49",
                "acert": "62.21 / 41.80 / 50.96",
                "acert tuned": "64.63 / 41.20 / 51.58",
            }
        ),
        "tinyimagenet": _table1(
            {
                "standard": "46.09 / 0.0004 / 0.13",
                "sabr": "28.85 / 19.99 / 23.96",
                "fastibp": "25.08 / 21.06 / 22.96",
                "fastibp tuned": "30.67 / 19.90 / 24.63",
                "acert tuned": "32.66 / 21.38 / 26.34",
            }
        ),
    },
    "table2": {
        "cifar10": tuple(
            Row(method, {"kappa": kappa, "schedule": schedule}, paper=paper)
            for method, kappa, schedule, paper in (
                ("fastibp", 0.0, "smoothed", "48.94 / 41.23 / 44.91"),
                ("fastibp", 0.0, "none", "33.44 / 29.64 / 31.46"),
                ("fastibp", 0.75, "smoothed", "62.84 / 40.70 / 50.49 (kappa 0.8)"),
                ("fastibp", 0.75, "none", "52.10 / 37.10 / 43.97 (kappa 0.8)"),
                ("acert", 0.0, "smoothed", "62.21 / 41.80 / 50.96"),
                ("acert", 0.0, "none", "52.65 / 38.95 / 45.32"),
                ("acert", 0.25, "smoothed", "64.63 / 41.20 / 51.58"),
                ("acert", 0.25, "none", "54.41 / 37.96 / 45.43"),
            )
        )
    },
    "table5": {
        "cifar10": (
            Row("fastibp", ZERO, seeds=3, paper="48.94 / 41.23 / 44.91, one run"),
            Row("acert", ZERO, seeds=3, paper="61.64±0.34 / 41.79±0.19 / 50.74±0.13, 7 runs"),
            Row(
                "acert",
                {"kappa": 0.25},
                seeds=3,
                paper="64.35±0.16 / 40.48±0.32 / 51.02±0.24, 7 runs",
            ),
        )
    },
    "table6": {
        "cifar10": (
            Row("fastibp", ZERO, paper="48.94 / 41.23 / 44.91, step 1.0"),
            *(
                Row("acert", {**ZERO, "solver": "brentq", "max_iterations": limit}, paper=paper)
                for limit, paper in (
                    (0, "54.35 / 42.37 / 47.92, step 1.0"),
                    (1, ""),
                    (2, "61.82 / 41.66 / 50.70, step 3.3"),
                    (100, "61.64 / 41.79 / 50.74, step 11"),
                )
            ),
            Row("acert", ZERO),
        )
    },
    "table7": {
        "mnist": (
            Row("fastibp", ZERO, paper="97.61, certified 93.13"),
            Row("acert", ZERO, paper="98.42, certified 93.20"),
            *LOOSE_ROWS,
        ),
        "cifar10": (
            Row("fastibp", ZERO, paper="48.94, certified 34.97"),
            Row("fastibp", kappas=KAPPAS, paper="62.83, certified 23.71"),
            Row("acert", ZERO, paper="62.21, certified 26.61"),
            *LOOSE_ROWS,
        ),
        "tinyimagenet": (
            Row("fastibp", ZERO, paper="25.08, certified 17.29"),
            Row("fastibp", kappas=KAPPAS, paper="30.67, certified 11.51"),
            Row("acert", ZERO, paper="32.66, certified 12.42"),
            *LOOSE_ROWS,
        ),
    },
}


def named_runs(row: Row, dataset: str, size: str) -> dict[str, TrainConfig]:
    """The runs of a row; equal runs of other tables have the same name."""
    runs = {}
    for settings in row.choices():
        for seed in range(row.seeds):
            config = make_config(
                dataset,
                row.method,
                seed=seed,
                validation=HELD_OUT[size][dataset],
                **SIZES[size][dataset],
                **settings,
            )
            runs[_run_name(config, row.method, dataset)] = config
    return runs


def _run_name(config: TrainConfig, method: str, dataset: str) -> str:
    """Such as `acert-kappa0.25-seed0`: method, kappa, settings other than the presets', seed."""
    size = set(SIZES["small"][dataset]) | {"seed", "kappa", "validation", "warmup"}
    usual = make_config(dataset, method).to_dict()
    special = {k: v for k, v in config.to_dict().items() if k not in size and v != usual[k]}
    parts = [f"{name}-{value}" for name, value in special.items()]
    return "-".join([method, f"kappa{config.kappa:g}", *parts, f"seed{config.seed}"])
