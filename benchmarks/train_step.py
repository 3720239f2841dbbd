"""Time of one training step, method by method, side by side.

Claims nothing but what it prints: the median wall time of a step of each method on the
same batches, the contenders taking turns so that a drift of the machine's speed meets all
of them alike, and the ratio to the first one. Each method is first trained for some steps,
since the work of `acert` depends on how many samples are classified correctly.

    python benchmarks/train_step.py --dataset mnist --width 16 --hidden 128 --out step.json
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from pathlib import Path

import click
import torch

from ibpcore.config import make_config
from ibpcore.data import ImageSet, Request, load_dataset, shuffled_batches
from ibpcore.training import start_state, train_step


def contender(
    method: str, width: int, hidden: int, iterations: int
) -> tuple[str, str, dict[str, int]]:
    """Name, method and settings of one column."""
    name = f"{method}, {iterations} iterations" if method == "acert" else method
    return name, method, {"width": width, "hidden": hidden, "max_iterations": iterations}


@click.command()
@click.option("--dataset", default="digits", show_default=True)
@click.option("--data-dir", default="data", envvar="IBP_DATA_DIR", show_default=True)
@click.option("--width", default=16, show_default=True)
@click.option("--hidden", default=128, show_default=True)
@click.option("--warmup-steps", default=60, show_default=True, help="Training before timing.")
@click.option("--repeats", default=9, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
def main(
    dataset: str,
    data_dir: str,
    width: int,
    hidden: int,
    warmup_steps: int,
    repeats: int,
    device: str,
    out: Path | None,
) -> None:
    """Compare the training steps of fastibp and acert."""
    data = load_dataset(dataset, Request(Path(data_dir), limit_train=10_000, limit_test=1))
    train: ImageSet = data.train.to(device)
    methods = [contender("fastibp", width, hidden, 100)]
    methods += [contender("acert", width, hidden, n) for n in (0, 2, 100)]
    configs = {name: make_config(dataset, method, **s) for name, method, s in methods}
    states = {name: start_state(config, data, device) for name, config in configs.items()}

    def step(name: str, batch: tuple[torch.Tensor, torch.Tensor], share: float) -> float:
        started = time.perf_counter()
        train_step(states[name], *batch, share, configs[name])
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    config = next(iter(configs.values()))
    batches = [
        batch
        for epoch in range(-(-(warmup_steps + repeats) * config.batch_size // len(train)) + 1)
        for batch in shuffled_batches(
            train, config.batch_size, seed=0, epoch=epoch, flip=config.flip, padding=config.padding
        )
    ]
    for i in range(warmup_steps):
        for name in configs:
            step(name, batches[i], i / warmup_steps)
    times: dict[str, list[float]] = {name: [] for name in configs}
    for batch in batches[warmup_steps : warmup_steps + repeats]:
        for name in configs:
            times[name].append(step(name, batch, 1.0))

    first = statistics.median(times[next(iter(times))])
    rows = [
        {"method": name, "ms": 1e3 * statistics.median(t), "ratio": statistics.median(t) / first}
        for name, t in times.items()
    ]
    facts = {
        "dataset": data.title,
        "batch_size": config.batch_size,
        "width": width,
        "hidden": hidden,
        "device": platform.machine() if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "command": " ".join(["python", *sys.argv]),
    }
    click.echo("  ".join(f"{key}: {value}" for key, value in facts.items()))
    for row in rows:
        click.echo(f"{row['method']:<24}{row['ms']:10.1f} ms{row['ratio']:8.2f}")
    if out is not None:
        out.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
