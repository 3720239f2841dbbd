"""Run by `test_ranks` as one of several processes: trains, and compares with training alone."""

import json
import sys
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
from helpers import leave

from ibpcore import cnn7
from ibpcore.attacks import pgd
from ibpcore.data import batches
from ibpcore.data.images import Dataset, hold_out
from ibpcore.data.sources import Request, load_dataset
from ibpcore.distributed import SINGLE_PROCESS, Ranks, joined, ranks_of_environment
from ibpcore.training import loop as training
from ibpcore.training import model as network
from ibpcore.training import run_files
from ibpcore.training import state as states
from ibpcore.training.config import TrainConfig, make_config

SMALL = {"epochs": 2, "width": 2, "hidden": 4, "batch_size": 8, "warmup": (1, 2)}
LATER = SMALL | {"warmup": (1, 1), "attack_steps": 3}
EVERY_SOLVER = ("tracked", "brentq", "fused", "bisect")
CONFIGS: dict[str, TrainConfig] = {
    "standard": make_config("digits", "standard", **SMALL),
    "fastibp": make_config("digits", "fastibp", **SMALL, kappa=0.3, flip=True, padding=1),
    **{
        f"acert {solver}": make_config("digits", "acert", **SMALL, solver=solver)
        for solver in EVERY_SOLVER
    },
    "acert fast": make_config("digits", "acert", **SMALL, solver="brentq", max_iterations=0),
    "crown-ibp": make_config("digits", "crown-ibp", **SMALL),
    "crown-ibp fused": make_config("digits", "crown-ibp", **SMALL, loss_fusion=True, adaptive=True),
    "taps": make_config("digits", "taps", **LATER, kappa=0.3),
    "staps": make_config("digits", "staps", **LATER, adaptive=True),
    "in parts": make_config("digits", "acert", **SMALL, accumulate=3, l1=1e-4),
    "stopped": make_config(
        *("digits", "acert"),
        **SMALL | {"epochs": 9},
        validation=7,
        patience=1,
        select_weights="best",
    ),
}


DATA = load_dataset("digits", Request(limit_train=26, limit_test=4))
"""Three batches of 8, and one of 2, which is too small for four ranks."""


State = dict[str, torch.Tensor]


def without_idle_biases(*facts: object) -> torch.nn.Module:
    """A CNN7 whose biases before batch norm are left as they are.

    They have no effect, and a gradient of 0 but for rounding, of which Adam makes steps of
    another size.
    """
    model = cnn7(*facts)
    for layer, following in pairwise(model):
        if isinstance(following, torch.nn.modules.batchnorm._BatchNorm):
            layer.bias.requires_grad_(False)
    return model


def trained(config: TrainConfig, folder: Path, ranks: Ranks) -> State:
    folder.mkdir()
    return weights(training.train_model(config, data_of(config), folder, ranks=ranks))


def data_of(config: TrainConfig) -> Dataset:
    return hold_out(DATA, config.validation)


def weights(model: torch.nn.Module) -> State:
    return {name: value for name, value in model.state_dict().items() if value.dim() > 0}


def difference(one: State, two: State) -> float:
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    # Loud where there is nothing of that name to replace.
    mock.patch.object(network, "cnn7", without_idle_biases).start()
    mock.patch.object(batches, "as_pixels", lambda images: images.double() / 255).start()
    # The random starts of attacks are not those of one process.
    mock.patch.object(pgd, "_random", lambda box, generator: box.mid).start()
    ranks, found = ranks_of_environment(), {}
    with joined(ranks, "cpu"):
        for name, config in CONFIGS.items():
            shared = folder / f"{name}, rank {ranks.rank}"
            together = trained(config, shared, ranks)
            if not ranks.first:
                assert not list(shared.iterdir()), "only the first rank writes"
                continue
            alone = folder / f"{name}, alone"
            whole = trained(config, alone, SINGLE_PROCESS)
            start = weights(states.start_state(config, data_of(config), "cpu").model)
            found[name] = {
                "difference": difference(together, whole),
                "moved": difference(together, start),
                "slopes": slopes(shared, alone),
                "measures": [measures(folder) for folder in (shared, alone)],
            }
    if ranks.first:
        (folder / "found.json").write_text(json.dumps(found))


def slopes(*folders: Path) -> float:
    """Largest difference between what two runs remember of the samples."""
    one, two = [torch.load(f / run_files.STATE, weights_only=True)["slopes"] for f in folders]
    assert torch.equal(one.isnan(), two.isnan())
    return float((one - two).nan_to_num().abs().max())


def measures(folder: Path) -> list[list[float]]:
    """Those of the held-out images, in each epoch in which they were measured."""
    rows = [json.loads(line) for line in (folder / run_files.METRICS).read_text().splitlines()]
    return [[*row["validation"].values()] for row in rows if "validation" in row]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
