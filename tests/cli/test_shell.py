"""What a shell sees beside the work: help, versions, completion and the doctor."""

import ast
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import torch
from click.shell_completion import BashComplete
from helpers import run_ibp, snapshot

import ibpcore
import ibpcore_cli
from ibpcore import Interval, UserError, selftest
from ibpcore.certification.radii import RootOptions
from ibpcore.data.sources import DATASETS
from ibpcore.distributed import LostRankError
from ibpcore.roots import SOLVERS
from ibpcore.training.methods import METHODS
from ibpcore_cli import doctor as doctor_module
from ibpcore_cli.commands import COMMANDS, cli, load_all
from ibpcore_cli.decorators import GroupedCommand, bundle, option_groups
from ibpcore_cli.options import shared

LIGHT = """
import sys
from ibpcore_cli.main import main
sys.argv = ["ibp", *sys.argv[1:]]
try:
    main()
finally:
    heavy = {"torch", "torchvision", "numpy", "safetensors", "matplotlib"} & set(sys.modules)
    assert not heavy, f"imported: {heavy}"
"""
"""A program that is `ibp` and fails if that imports what takes long."""


def light(*arguments, **environment):
    """The exit code of `ibp ARGUMENTS`, which imports nothing that takes long, and its output."""
    command = [sys.executable, "-c", LIGHT, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert "imported" not in done.stderr, done.stderr
    return done


def completions(*words):
    """What follows when the last of these words is completed."""
    *before, last = words
    found = BashComplete(cli, {}, "ibp", "_IBP_COMPLETE").get_completions([*before], last)
    return [item.value for item in found]


def test_the_summaries_are_those_of_the_commands():
    commands = load_all()
    assert set(commands) == set(COMMANDS)
    for name, command in commands.items():
        assert (command.name, command.get_short_help_str(1000)) == (name, COMMANDS[name])


def test_every_help_text_is_a_sentence():
    for name, command in load_all().items():
        for option in command.params:
            if isinstance(option, click.Option):
                says = option.help or ""
                assert re.fullmatch(r"[A-Z].*\w.*\.", says, re.DOTALL), (
                    f"{name} {option.name}: {says}"
                )
        assert COMMANDS[name].endswith(".")


def test_many_options_stand_in_groups():
    for name, command in load_all().items():
        groups = option_groups(command, click.Context(command))
        assert groups.pop("Options")[-1][0].endswith("--help")
        options = [option for option in command.params if isinstance(option, click.Option)]
        listed = [record for records in groups.values() for record in records]
        assert len(listed) == (len(options) if len(options) > 10 else 0), name
        text = run_ibp(name, "--help").out
        assert all(f"\n{title}:\n" in text for title in groups)


def failing(error):
    @click.command(cls=GroupedCommand)
    @shared.certification_options
    @shared.data_option("--samples", int, "Number.", "limit_test")
    def command(**settings):
        raise error

    with pytest.raises((UserError, click.UsageError)) as raised:
        command.main([], standalone_mode=False)
    return raised.value


MESSAGES = {
    "epsilon_max must be above 0": "--epsilon-max must be above 0",
    "xtol and rtol must be above 0": "--xtol and --rtol must be above 0",
    "limit_test must be 1": "--samples must be 1",
    "elide can be left out": "--elide can be left out",
    "run.toml: epsilon_max must be above 0": "run.toml: epsilon_max must be above 0",
    "line_points must be odd": "line_points must be odd",
    "the epsilon_max must be above 0": "the epsilon_max must be above 0",
    "epsilon_max": "epsilon_max",
}


@pytest.mark.parametrize("kind", [UserError, LostRankError])
@pytest.mark.parametrize("message", MESSAGES)
def test_errors_of_a_command_name_its_options(kind, message):
    """Then a value in the command line is wrong; other errors stay what they are."""
    error = kind(message)
    raised = failing(error)
    if MESSAGES[message] == message:
        assert raised is error
    else:
        assert type(raised) is click.UsageError
        assert raised.message == MESSAGES[message]


def test_errors_advise_no_python_that_the_command_line_does_not_have():
    """Such as `pass elide=False`. Commands convert every module, so none is told to."""
    python = re.compile(r"\bpass \w|\bcall (?!ibpcore\.convert)\w|\w=(True|False|None)|\w\(\)")
    for file in Path(ibpcore.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error"):
                texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                found = [text for text in texts if isinstance(text, str) and python.search(text)]
                assert found == [], f"{file.name}: {found}"


def test_functions_take_at_most_seven_arguments():
    for file in Path(ibpcore_cli.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                found = [*node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
                assert len([*filter(None, found)]) <= 7, f"{file.name}: {node.name}"


def test_options_that_belong_together_are_one_argument():
    """What is left out has the default of its field, also where `kind` checks its values."""

    @click.command()
    @click.option("--xtol", type=float)
    @click.option("--solver")
    @click.option("--out")
    @bundle(RootOptions, "solving")
    def command(solving, out):
        return solving, out

    def called(*arguments):
        return command.main(arguments, standalone_mode=False)

    assert called("--solver", "fused", "--out", "x") == (RootOptions("fused"), "x")
    assert called("--xtol", "0.5") == (RootOptions(xtol=0.5), None)
    with pytest.raises(click.UsageError, match="xtol and rtol must be above 0"):
        called("--xtol", "0")


def test_a_mistyped_command_is_guessed():
    assert run_ibp("trian").err == "Error: No such command 'trian'. Did you mean train?\n"
    assert "Did you mean" not in run_ibp("nothing").err
    assert completions("trian", "--") == ["--version", "--help"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_completion_import_nothing_that_takes_long(command):
    done = light(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: ")
    asked = {"_IBP_COMPLETE": "bash_complete", "COMP_WORDS": f"ibp {command} --", "COMP_CWORD": "2"}
    done = light(**asked)
    assert (done.returncode, done.stderr) == (0, "")
    assert "plain,--help" in done.stdout.split()


@pytest.mark.parametrize("arguments", [["--help"], ["completion", "bash"], []])
def test_the_group_imports_nothing_that_takes_long(arguments):
    done = light(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "No such command"),
        (["train", "--method", "trades"], "'trades' is not one of"),
        (["train", "--epsilon-max", "2"], "not above 0 and at most 1"),
        (["certify", "--lambda", "1"], "No such option"),
        (["certify", "run", "--bound", "crown,ibp"], "from the loosest to the tightest"),
        (["certify", "run", "--resume", "nowhere"], "nothing to resume in nowhere"),
        (["predict"], "IMAGES"),
    ],
)
def test_errors_of_options_come_at_once(arguments, says):
    done = light(*arguments)
    assert done.returncode in (1, 2)
    assert len(done.stderr.splitlines()) == 1
    assert says in done.stderr


def test_commands_and_options_are_completed():
    assert completions("t") == ["train"]
    assert set(completions("")) == set(COMMANDS)
    assert completions("--ver") == ["--version"]
    assert completions("train", "--epsilon") == ["--epsilon-max"]
    assert completions("nothing", "--") == ["--version", "--help"]


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (("train", "--dataset", ""), DATASETS),
        (("train", "--method", ""), METHODS),
        (("certify", "--solver", ""), SOLVERS),
        (("completion", ""), ("bash", "zsh", "fish")),
        (("sweep", "--methods", "acert,fast"), ("acert,fastibp",)),
        (("search", "--objectives", "accuracy,ac"), ("accuracy,accuracy", "accuracy,acr")),
    ],
)
def test_values_are_completed(words, values):
    assert set(completions(*words)) == set(values)


BASH = """
eval "$(ibp completion bash)"
complete -p ibp
COMP_WORDS=(ibp cer); COMP_CWORD=1; _ibp_completion ibp; echo "${COMPREPLY[@]}"; COMPREPLY=()
COMP_WORDS=(ibp train --dataset m); COMP_CWORD=3; _ibp_completion ibp; echo "${COMPREPLY[@]}"
"""


def test_bash_completes(tmp_path):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    ibp = tmp_path / "ibp"
    ibp.write_text(f'#!/bin/sh\nexec {sys.executable} -m ibpcore_cli "$@"\n')
    ibp.chmod(ibp.stat().st_mode | stat.S_IXUSR)
    done = subprocess.run(
        [bash, "--norc", "-c", BASH],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
    )
    assert done.stderr == ""
    defined, command, value = done.stdout.splitlines()
    assert defined.endswith("_ibp_completion ibp")
    assert (command, value) == ("certify", "mnist")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_gets_a_script_of_its_own(shell):
    done = run_ibp("completion", shell)
    assert (done.code, done.err) == (0, "")
    assert f"_IBP_COMPLETE={shell}_complete" in done.out
    program = shutil.which(shell)
    if program is not None:
        subprocess.run([program, "-n"], input=done.out, text=True, check=True)


def test_another_shell_is_refused():
    done = run_ibp("completion", "csh")
    assert done.code == 2
    assert len(done.err.splitlines()) == 1


def test_version():
    done = run_ibp("--version")
    assert (done.code, done.err) == (0, "")
    ours, python, torchs, device = done.out.splitlines()
    assert ours == f"ibpcore {ibpcore.__version__}"
    assert python.startswith(f"Python {platform.python_version()} ")
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    assert torchs.startswith(f"torch {torch.__version__}, ")
    assert torchs.endswith(cuda)
    assert device.startswith("device: cuda" if torch.cuda.is_available() else "device: cpu")


def test_broken_packages_are_for_the_doctor(tmp_path):
    """A torch that cannot be imported: one line, and the doctor still comes."""
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so: no such file')\n")
    for arguments, code in ((["--version"], 1), (["train"], 1), (["doctor"], 1)):
        done = subprocess.run(
            [sys.executable, "-m", "ibpcore_cli", *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )
        assert done.returncode == code
        assert len(done.stderr.splitlines()) == 1
        says = done.stdout if arguments == ["doctor"] else done.stderr
        assert "libtorch.so: no such file" in says
        assert ("see: ibp doctor" in done.stderr) == (arguments != ["doctor"])


def test_a_command_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(cli.commands, "report", cli.commands.get("report"))
    monkeypatch.delitem(cli.commands, "report")
    monkeypatch.setitem(sys.modules, "ibpcore_cli.report", None)
    done = run_ibp("report", "x")
    assert done.code == 1
    assert done.err.startswith("Error: ")
    assert done.err.endswith("; see: ibp doctor\n")
    assert len(done.err.splitlines()) == 1


# The doctor


def test_the_doctor_finds_nothing_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_ibp("doctor", "--data-dir", tmp_path / "none", "--device", "cpu")
    assert (done.code, done.err) == (0, "")
    for name in ("torch", "torchvision", "numpy", "safetensors", "click", "[plot]", "--compile"):
        assert f"\n  {name} " in done.out
    assert "\n  digits        UCI optical digits, images (1, 8, 8), 10 classes\n" in done.out
    assert "\n  mnist         - " in done.out
    passed = [line.split()[0] for line in done.out.splitlines() if " ok: " in line]
    assert passed == [*selftest.CHECKS]
    assert snapshot(tmp_path) == {}


def test_the_doctor_names_what_is_missing(monkeypatch):
    required = [
        "torch>=2.6",
        "no-such-package",
        'matplotlib>=3.8; extra == "plot"',
        "no-such-plotter ; python_version >= '3.10' and extra == 'plot'",
        "ibpcore[test]; extra == 'dev'",
    ]
    monkeypatch.setattr(doctor_module, "requires", lambda name: required)
    monkeypatch.setattr(
        doctor_module, "_version", lambda name: "" if name.startswith("no-such") else "1.2"
    )
    assert [*doctor_module.packages()] == [
        "ibpcore       1.2",
        "torch         1.2",
        "no-such-package missing: pip install no-such-package",
        "[plot]        matplotlib 1.2, no-such-plotter missing: pip install 'ibpcore[plot]'",
    ]


def test_the_doctor_is_there_where_nothing_can_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "ibpcore.selftest", None)
    done = run_ibp("doctor", "--device", "cpu")
    assert done.code == 1
    failed = [line.split()[0] for line in done.out.splitlines() if " FAILED: " in line]
    assert failed == [*selftest.CHECKS]
    assert done.err == f"Error: the self-test failed: {', '.join(selftest.CHECKS)}\n"


TRAINED = selftest.train_step


def without_end(*args):
    return TRAINED(*args)._replace(bad=torch.tensor(1))


def elsewhere(images, radius):
    return Interval.ball(images + 0.2, 0.0)


def too_large(model, images, labels, found):
    return found._replace(radius=1.5 * found.radius.double())


FAULTS = {
    "training": ("train_step", without_end),
    "bounds": ("Interval", SimpleNamespace(ball=elsewhere)),
    "certificates": ("verified_radii", too_large),
    "files": ("load_model", lambda path, device: lambda images: images),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_self_test_can_fail(monkeypatch, name):
    monkeypatch.setattr(selftest, *FAULTS[name])
    done = run_ibp("doctor", "--device", "cpu")
    assert (done.code, done.err) == (1, f"Error: the self-test failed: {name}\n")
