"""What is suggested for commands and options that do not exist."""

import re

import click
import pytest
from helpers import run_ibp

from ibpcore_cli.commands import COMMANDS, cli, load_all
from ibpcore_cli.suggestions import COMMAND_WORDS, OPTION_WORDS, unknown_command, unknown_option

ALL = load_all()


def slips(word):
    """What a slip makes of it: a letter left out, exchanged with the next one, or another."""
    for i in range(len(word)):
        yield word[:i] + word[i + 1 :]
        yield word[:i] + word[i + 1 : i + 2] + word[i] + word[i + 2 :]
        yield word[:i] + "x" + word[i + 1 :]
    yield word.upper()
    yield word[:3]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_slip_in_a_command_suggests_it(command):
    for slip in slips(command):
        message = unknown_command(slip, COMMANDS)
        assert command in re.findall(r"\w+", message.split(". ", 1)[1]), message


def test_a_slip_in_an_option_suggests_it():
    for flag in [param.opts[0] for param in ALL["certify"].params if len(param.opts[0]) > 5]:
        for i in range(2, len(flag)):
            message = unknown_option(flag[:i] + flag[i + 1 :], ALL["certify"])
            assert flag in message.split(". ", 1)[1], message


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("trian",), "train"),
        (("tran",), "train"),
        (("cert",), "certify"),
        (("evaluate",), "certify"),
        (("eport",), "export or report"),
        (("train", "--output-dir", "x"), "--out"),
        (("train", "--output", "x"), "--out"),
        (("train", "--lr-schedule", "x"), "--learning-rate-schedule"),
        (("train", "--batchsize", "1"), "--batch-size"),
        (
            (
                "train",
                "--batch_size=1",
            ),
            "--batch-size",
        ),
        (("train", "--gpu"), "--device"),
        (("train", "--data", "x"), "--dataset or --data-dir"),
        (("certify", "run", "--limit", "5"), "--limit-test"),
        (("sweep", "--method", "acert"), "--methods"),
        (("search", "--n-trials", "9"), "--budget"),
        (("search", "--timeout", "9"), "--budget"),
        (("tune",), "search"),
        (("import", "net", "--output", "x"), "--out"),
        (("report", "--output", "x"), "--out"),
    ],
)
def test_what_is_suggested(words, meant):
    done = run_ibp(*words)
    assert done.code == 2
    kind = "option" if len(words) > 1 else "command"
    unknown = words[-1 if len(words) == 1 else next(i for i, w in enumerate(words) if w[0] == "-")]
    unknown = unknown.partition("=")[0]
    assert done.err == f"Error: No such {kind} {unknown!r}. Did you mean {meant}?\n"


@pytest.mark.parametrize("words", [("x",), ("train", "--zzz"), ("certify", "run", "--lr", "1")])
def test_nothing_is_suggested_for_what_is_like_nothing(words):
    done = run_ibp(*words)
    assert done.code == 2
    assert "Did you mean" not in done.err


def test_words_of_the_field_stand_for_what_exists_and_for_nothing_else():
    assert set(COMMAND_WORDS.values()) <= set(COMMANDS)
    assert not COMMAND_WORDS.keys() & set(COMMANDS)
    flags = {flag for command in ALL.values() for param in command.params for flag in param.opts}
    assert {f"--{name}" for name in OPTION_WORDS} <= flags


@pytest.mark.parametrize(("short", "name"), [("--lr", "learning_rate"), ("--eps", "epsilon_max")])
def test_short_forms_of_options(short, name):
    """They are there wherever the option is."""
    having = [
        command for command in ALL.values() if any(param.name == name for param in command.params)
    ]
    assert having
    for command in having:
        (param,) = [param for param in command.params if param.name == name]
        assert short in param.opts
    context = ALL["train"].make_context("train", [short, "0.25"])
    assert context.params[name] == 0.25


def test_short_form_of_version():
    with click.Context(cli) as context:
        assert cli.get_params(context)[0].opts == ["-V", "--version"]
    assert run_ibp("-V").out == run_ibp("--version").out
