"""Run by `test_shards` as one of several processes: commands of `ibp`, and a kill among them.

Its arguments: a folder, and a JSON list of commands, each with a port for the ranks to meet
at, the arguments of `ibp`, and which rank is killed, or removes the output folder, if one does.
Each rank writes how every command ended there into `RANK.json` in the folder.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from unittest import mock

import torch
from helpers import leave, run_ibp

from ibpcore.certification import certify as certification
from ibpcore.experiments import sweeps, test_set
from ibpcore.experiments.run import dataset_of, train_and_certify
from ibpcore.experiments.run_folder import is_begun


def main(folder: Path, commands: list[dict]) -> None:
    torch.set_num_threads(1)
    rank, ends = int(os.environ["RANK"]), []
    # Patches fail if there is nothing of that name to replace.
    mock.patch.object(test_set, "figures_possible", return_value=False).start()
    for command in commands:
        os.environ["MASTER_PORT"] = str(command["port"])
        with contextlib.ExitStack() as patches:
            if "killed" not in command:
                patches.enter_context(mock.patch.object(sweeps, "run_all", run_all_here))
            elif command["killed"] == rank:
                die_soon()
            if command.get("removed by") == rank:
                patches.enter_context(removing(Path(command["arguments"][-1])))
            ends.append(run_ibp(*command["arguments"]))
        (folder / f"{rank}.json").write_text(json.dumps(ends))


def die_soon() -> None:
    """In the second batch to be certified, or as soon as a run of a sweep is being trained."""
    before, real, seen = certification.find_radii, sweeps.run_all, []

    def find_radii(*given, **more):
        seen.append(1)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return before(*given, **more)

    def run_all(jobs, at_once, **told):
        told["advance"] = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        real(jobs, at_once, **told)

    mock.patch.object(certification, "find_radii", find_radii).start()
    mock.patch.object(sweeps, "run_all", run_all).start()


def removing(folder: Path):
    """Removes the folder in the second batch, as if another command then began there."""
    before, seen = certification.find_radii, []

    def find_radii(*given, **more):
        seen.append(1)
        if len(seen) == 2:
            shutil.rmtree(folder)
            folder.mkdir()
            (folder / "certificates.journal").write_text("of another command")
            (folder / "certificates.1.journal").write_text("of another command")
        return before(*given, **more)

    return mock.patch.object(certification, "find_radii", find_radii)


def run_all_here(jobs, at_once, *, ended, advance):
    """`run_all` in this process, which saves the seconds that a new one takes to start."""
    for name, job in jobs:
        job.run.mkdir(parents=True, exist_ok=True)
        data = dataset_of(job.config, job.data_dir)
        train_and_certify(job.config, data, job.run, resume=is_begun(job.run))
        ended(name, "")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    leave()
