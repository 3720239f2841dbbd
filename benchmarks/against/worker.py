"""Takes and times training steps with the `ibpcore` that it finds, whatever its version.

    python worker.py FILE

FILE is what `benchmarks.against.__main__` saved of a network. The worker prints where its
`ibpcore` lies. Then it reads names of contenders, one a line: for each it takes two steps with the
next batch, and prints the milliseconds of the second one.
"""

import sys
import time
from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any

import torch

import ibpcore
from ibpcore.data.images import Dataset, ImageSet
from ibpcore.training.config import make_config
from ibpcore.training.loop import epoch_batches, train_step
from ibpcore.training.state import start_state

BATCHES = 8
STILL = {"learning_rate": 1e-30}
"""So small that no weight changes."""


def times(given: dict[str, Any], settings: dict[str, Any]) -> Iterator[float]:
    """Milliseconds of step after step of a contender."""
    config = make_config(given["dataset"], **{**given["settings"], **settings, **STILL})
    images = ImageSet(given["images"], given["labels"])
    parts = images, images, given["mean"], given["std"]
    data = Dataset(given["dataset"], given["dataset"], given["classes"], *parts)
    state = start_state(config, data, given["device"])
    state.model.load_state_dict(given["model"])
    state.model.train()
    moved = images.to(given["device"])
    batches = list(islice(epoch_batches(state, moved, config), BATCHES))
    for batch in cycle(batches):
        for _ in range(2):
            state.slopes.copy_(given["slopes"])
            if hasattr(state, "trend"):  # older versions have none
                state.trend.copy_(torch.stack([torch.zeros(()), given["deviation"]]))
            started = time.perf_counter()
            train_step(state, batch, 1.0, config)
            if torch.device(given["device"]).type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
        yield 1e3 * seconds


def main() -> None:
    """Answers until the input ends."""
    print(ibpcore.__file__, flush=True)
    given = torch.load(sys.argv[1], weights_only=True)
    torch.set_num_threads(given["threads"])
    torch.manual_seed(0)
    runs = {name: times(given, settings) for name, settings in given["contenders"].items()}
    for line in sys.stdin:
        print(next(runs[line.strip()]), flush=True)


if __name__ == "__main__":
    main()
