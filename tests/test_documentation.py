"""Every command and every Python block of README.md and docs/ is run, smaller where it is long."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import run_ibp, write_image, write_mnist, write_tinyimagenet, write_tree

from ibpcore import cnn7
from ibpcore.data.sources import CIFAR10_CLASSES
from ibpcore.interop.exporting.onnx import to_onnx
from ibpcore.nn import IntervalFlatten, IntervalLinear, Network
from ibpcore_cli.commands import load_all

ROOT = Path(__file__).parent.parent
TUTORIAL = ROOT / "docs" / "tutorial.md"
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

SHORT_RUN = "--epochs 2 --warmup 1:1 --limit-train 60 --limit-test 20"
SMALL_RUN = f"{SHORT_RUN} --width 2 --hidden 8"
SMALLER = {
    "train": SMALL_RUN,
    "certify": "",
    "predict": "",
    "attack": "--restarts 1 --steps 2 --no-autoattack",
    "inspect": "--samples 4 --grid 9 --line-points 5 --bisections 2",
    "sweep": f"{SMALL_RUN} --methods fastibp --kappa 0.5 --seeds 1",
    "search": "--epochs 2 --limit-train 60 --limit-test 20 --width 2 --hidden 8 --budget 2"
    " --no-prune --certify 1 --jobs 1",
    "report": "",
    "export": "",
    "import": "",
    "verify": "--bound ibp",
    "doctor": "",
    "completion": "",
}
"""What is added to a documented command; of an option given twice the last one counts."""
ADDED = {
    "ibp train --inspect-every 10": f"{SMALL_RUN} --inspect-every 1",
    "ibp train --dataset mnist --validation 1000 --select best --patience 20": (
        f"{SMALL_RUN} --validation 20"
    ),
    "ibp train --help": "",
    "ibp train --resume runs/mnist-acert": "",
    "ibp train --resume fine-tuned --epochs 6": "",
    "ibp train --from runs/mnist-acert --epochs 4 --learning-rate 5e-4 --out fine-tuned": SHORT_RUN,
    "ibp train --validation 100 --select best --patience 5": f"{SMALL_RUN} --validation 20",
    "ibp search --resume digits-search --budget 80": "--budget 2 --certify 1",
    "ibp train --resume runs/digits-acert": "",
    "ibp train --resume runs/digits-acert --epochs 40": "--epochs 2",  # as it has
    "ibp certify --resume runs/mnist-acert/certificates": "",
    "ibp certify --resume runs/digits-acert/certificates": "",
    "ibp certify --resume run/certificates": "",
}
"""The same for single commands."""
FIRST = (
    "ibp train",
    "ibp train --dataset mnist --download --preset best",
    "ibp certify runs/digits-acert --epsilon-max 0.2",
    "ibp certify runs/mnist-acert/model.safetensors --epsilon-max 0.3",
    "ibp sweep --methods acert,fastibp --kappa 0:1:0.25 --seeds 2 --out sweep",
    "ibp sweep --dataset cifar10 --methods acert,fastibp --kappa 0:1:0.1 --seeds 3 --epochs 14"
    " --limit-train 20000 --width 12 --hidden 128 --jobs 2 --out cifar",
)
"""Documented commands that make what others read."""
NOT_RUN = {
    "pip install .": "what is tested is installed already",
    "pip install '.[test]'": "the same",
    "pip install '.[export]'": "the same",
    "pytest -n auto": "this is it",
}
"""And why."""
PARSED = {
    "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500"
    " -m ibpcore_cli sweep --seeds 5 --out sweep": "needs two machines",
    "torchrun --nproc-per-node 4 -m ibpcore_cli train --resume run": "the tutorial does the same",
    "python -m benchmarks.training_step --stage middle --stage end --repeats 15"
    ' --only "acert brentq exact" --only "acert tracked exact" --only "acert tracked"': (
        "takes half an hour; tests/benchmarks/test_benchmarks.py has a quick form"
    ),
    "python -m benchmarks.time_to_art --dataset mnist --width 8 --hidden 64 --threads 1"
    " --json time-to-art.json": "takes hours; tests/benchmarks/test_time_to_art.py is quicker",
    **dict.fromkeys(
        (
            "python -m benchmarks.published --networks networks --repeats 3",
            'python -m benchmarks.published --networks networks --only "oval deep" --images 100',
        ),
        "reads networks that are not here; tests/benchmarks/test_published.py makes one",
    ),
    **dict.fromkeys(
        (
            "python -m benchmarks.operators --json benchmarks/results/operators.json",
            "python -m benchmarks.training_step --dataset digits --threads 1 --width 1 --hidden 8"
            " --batch-size 8",
            "python -m benchmarks.training_step --dataset digits --threads 1 --stage end"
            " --repeats 25",
            "python -m benchmarks.all --out benchmarks/results/cpu",
            "python -m benchmarks.gpu --minutes 25 --out gpu",
            "python -m benchmarks.against before --dataset digits --threads 1",
            "python -m benchmarks.against before --dataset cifar10 --width 64 --hidden 512"
            " --train-images 2560 --train-epochs 2",
            "python -m benchmarks.against before --whole",
        ),
        "takes minutes or hours; tests/benchmarks/ has quick forms",
    ),
}
"""Commands that are only asked whether they take such options, and why."""


FENCE = re.compile(r"^```(sh|python|toml)(?: title=\"([^\"\n]+)\")?\n(.*?)^```", re.M | re.S)


def commands(text: str) -> list[str]:
    """Those of an `sh` block, one by one."""
    lines = text.replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in line.split(" && ") if part.strip()]


def fences(page: Path) -> list[tuple[str, str, str]]:
    """Language, title and text of the blocks that are to be run, in order."""
    return FENCE.findall(page.read_text())


CLI = load_all()
COMMANDS = {
    command
    for page in PAGES
    for language, _, text in fences(page)
    if language == "sh"
    for command in commands(text)
}


def run(command: str) -> None:
    """A command as documented, with what makes it smaller behind it."""
    if command in NOT_RUN:
        return
    if command in PARSED:
        parse(command)
        return
    program, *words = shlex.split(command)
    assert program in ("ibp", "torchrun"), f"{command!r} is not run: say why in NOT_RUN"
    name = words[0] if program == "ibp" else words[words.index("ibpcore_cli") + 1]
    # A network of one's own has no width.
    own = name == "train" and {"--model", "--architecture", "--from"}.intersection(words)
    more = ADDED.get(command, SHORT_RUN if own else SMALLER.get(name))
    assert more is not None, f"no smaller form of {command!r} is known: enter it in SMALLER"
    if program == "ibp":
        code, out, err = run_ibp(*words, *shlex.split(more))
        assert (code, err) == (0, ""), f"{command} {more}\n{out}{err}"
    else:
        execute(["bash", "-c", f"{command} {more}"], Path())


def parse(command: str) -> None:
    """Refuses options that `... -m MODULE OPTIONS` does not take; runs nothing."""
    words = shlex.split(command)
    module, *arguments = words[words.index("-m") + 1 :]
    if module == "ibpcore_cli":
        main = CLI[arguments.pop(0)]
    else:
        package = (ROOT / module.replace(".", "/")).is_dir()
        main = importlib.import_module(f"{module}.__main__" if package else module).main
    with main.make_context(module, arguments):
        pass


def execute(words: list[str], folder: Path) -> None:
    """In a process of its own, by the programs of this Python."""
    here = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": os.pathsep.join([here, os.environ["PATH"]])}
    ended = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, f"{words[-1]}\n{ended.stdout}{ended.stderr}"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """What has been run, in a folder with small data in every layout; `FIRST` to begin with."""
    folder = tmp_path_factory.mktemp("documentation")
    write_mnist(folder / "data")
    write_tinyimagenet(folder / "data", images=4, size=(64, 64))
    write_tree(folder / "data" / "cifar10", CIFAR10_CLASSES, images=4, size=(32, 32))
    write_tree(folder / "my_images", ("cat", "dog"), images=4, size=(70, 64))
    for name in ("photo.png", "photo.jpg", "a.png", "b.jpg", "folder/c.png"):
        write_image(folder / name, 100, (8, 8), "L")
    foreign = {"state_dict": cnn7((3, 32, 32), 10, width=2, hidden=8).state_dict()}
    torch.save(foreign, folder / "cifar10-2-255-mtlibp.pt")
    sizes = {"1": (784, 6), "3": (6, 5), "5": (5, 10)}
    mlp = {f"{name}.weight": torch.zeros(*sizes[name][::-1]) for name in sizes}
    torch.save(mlp, folder / "mnist-mlp.pth")
    column = Network([IntervalFlatten(), IntervalLinear(784, 10)], (784, 1))
    for name, network in {
        "cifar_base_kw": cnn7((3, 32, 32), 10, width=2, hidden=8),
        "mnist-net_256x2": column,
    }.items():
        (folder / f"{name}.onnx").write_bytes(to_onnx(network.eval()))
    for page in PAGES:
        for _, title, text in fences(page):
            if title and page != TUTORIAL:
                (folder / title).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("IBP_DATA_DIR", raising=False)
        for command in FIRST:
            run(command)
        yield {*FIRST}


@pytest.mark.parametrize("page", [p for p in PAGES if p != TUTORIAL], ids=lambda page: page.stem)
def test_the_page_runs(done, page):
    for language, title, text in fences(page):
        if language == "python" and not title:
            exec(compile(text, page.name, "exec"), {"__name__": "__main__"})
        if language == "sh":
            for command in [command for command in commands(text) if command not in done]:
                run(command)
                done.add(command)


@pytest.fixture
def no_network_yet():
    """That of another page has the same name."""
    sys.modules.pop("my_network", None)
    yield
    sys.modules.pop("my_network", None)


def test_the_tutorial_runs(tmp_path, monkeypatch, no_network_yet):
    """As it stands, in one folder; what is more than commands of `ibp`, by a shell."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IBP_DATA_DIR", raising=False)
    for language, title, text in fences(TUTORIAL):
        if title:
            Path(title).write_text(text)
        elif language == "python":
            exec(compile(text, TUTORIAL.name, "exec"), {"__name__": "__main__"})
        elif all(command.startswith("ibp ") for command in commands(text)):
            for command in commands(text):
                code, out, err = run_ibp(*shlex.split(command)[1:])
                assert (code, err) == (0, ""), f"{command}\n{out}{err}"
        elif not {*commands(text)} <= NOT_RUN.keys():
            execute(["bash", "-euo", "pipefail", "-c", text], tmp_path)


def test_the_notebook_runs(tmp_path, monkeypatch):
    """Its cells, in order, in one module."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    notebook = ModuleType("notebook")  # functions in it are found by their names
    monkeypatch.setitem(sys.modules, notebook.__name__, notebook)
    for number, cell in enumerate(code_cells()):
        program = compile("".join(cell["source"]), f"cell {number}", "exec")
        exec(program, vars(notebook))
    matplotlib.pyplot.close("all")


def code_cells():
    return [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]


def test_the_notebook_has_its_outputs():
    """All of one execution, in order; neither errors nor warnings."""
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(cell["outputs"] for cell in cells)
    assert {o["output_type"] for o in outputs} <= {"stream", "display_data", "execute_result"}
    assert {o.get("name", "stdout") for o in outputs} == {"stdout"}
    assert sum("image/png" in o.get("data", ()) for o in outputs) >= 4


def test_no_block_is_passed_over():
    for page in PAGES:
        every = re.findall(r"^```(.*)\n(?:.*\n)*?```", page.read_text(), re.M)
        executed = [opening for opening in every if re.match(r"(sh|python|toml)\b", opening)]
        shown = [opening for opening in every if opening in ("", "text", "yaml")]
        assert len(executed) + len(shown) == len(every)
        assert len(executed) == len(fences(page))


def test_what_is_entered_here_is_still_documented():
    entered = {*ADDED, *FIRST, *NOT_RUN, *PARSED}
    assert entered <= COMMANDS
    assert {*SMALLER} <= CLI.keys()


def options_of(name: str) -> set[str]:
    """Names of a command's options, `--no-...` too."""
    params = CLI[name].params
    return {name for p in params for name in (*p.opts, *p.secondary_opts)} | {"--help"}


def test_every_option_in_the_text_exists():
    """In `code` that stands in a line: of the command named there, else of any."""
    every = set().union(*map(options_of, CLI), {"--version"})
    for page in PAGES:
        if page.name == "comparison.md":  # names those of others
            continue
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        for code in re.findall(r"`([^`\n]+)`", prose):
            named = re.match(r"ibp ([a-z]+)", code)
            known = options_of(named[1]) if named else every
            if code.startswith(("ibp ", "--")):
                found = set(re.findall(r"--[a-z][\w-]*", code))
                assert found <= known, f"{page.name}: {code}"
            if code.startswith("python -m benchmarks"):
                parse(code)


def test_every_command_has_its_page_and_every_page_its_place():
    pages = {page.stem: page.read_text() for page in (ROOT / "docs" / "commands").glob("*.md")}
    assert pages.keys() == CLI.keys()
    assert all(f"::: ibp {name}\n" in text for name, text in pages.items())
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES[1:]:
        assert f": {page.relative_to(ROOT / 'docs').as_posix()}\n" in navigation
