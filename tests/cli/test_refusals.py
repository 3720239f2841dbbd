"""What cannot be written is refused before the work."""

import os

import pytest
from helpers import run_ibp, snapshot

TINY = ("--epochs", 1, "--limit-train", 64, "--limit-test", 16, "--width", 2, "--hidden", 8)
FILES = {
    "certify": ("--html",),
    "predict": ("--out", "--html"),
    "verify": ("--counterexample",),
    "export": ("--onnx",),
    "import": ("--out",),
}
"""Options that name a file to be made."""
FOLDERS = {
    **dict.fromkeys(
        ("train", "sweep", "search", "certify", "attack", "inspect", "report"), ("--out",)
    ),
    "predict": ("--heatmap",),
    "export": ("--vnnlib", "--hub"),
}
"""Options that name a folder to be made."""
WORK = {
    "train": "ibpcore_cli.train.train_and_certify",
    "sweep": "ibpcore_cli.sweep.run_sweep",
    "search": "ibpcore_cli.search.run_search",
    "certify": "ibpcore_cli.certify.certify_test_set",
    "attack": "ibpcore_cli.attack.attack_test_set",
    "inspect": "ibpcore_cli.inspect.inspect_model",
    "predict": "ibpcore_cli.predict.certify_pictures",
    "verify": "ibpcore_cli.verify.verify",
    "export": "ibpcore_cli.export.to_onnx",
    "import": "ibpcore_cli.import_.import_model",
    "report": "ibpcore_cli.report.write_report",
}
"""What must not have begun."""


def pairs(options):
    return [(command, flag) for command, flags in options.items() for flag in flags]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run, and files that other commands take."""
    folder = tmp_path_factory.mktemp("made")
    assert run_ibp("train", *TINY, "--out", folder / "run").code == 0
    for name in ("a.png", "net.onnx", "property.vnnlib", "file"):
        (folder / name).write_bytes(b"")
    return folder


def refused(made, monkeypatch, command, flag, path):
    """The message by which the command refuses to write there."""
    monkeypatch.setattr(WORK[command], lambda *args, **kwargs: pytest.fail("the work began"))
    given = {
        "train": TINY,
        "sweep": (*TINY, "--methods", "fastibp", "--select", "test"),
        "search": TINY,
        "predict": (made / "a.png", "--model", made / "run"),
        "verify": (made / "net.onnx", made / "property.vnnlib"),
        "import": (made / "net.onnx",),
    }.get(command, (made / "run",))
    onnx = ("--onnx", made / "x.onnx") if flag == "--hub" else ()
    before = snapshot(made)
    done = run_ibp(command, *given, *onnx, flag, path)
    assert (done.code, len(done.err.splitlines())) == (1, 1), done.err
    assert snapshot(made) == before
    return done.err


@pytest.mark.parametrize(("command", "flag"), pairs(FILES))
@pytest.mark.parametrize(
    ("place", "says"), [("none", "there is no folder"), ("file", "there is no folder")]
)
def test_a_file_in_a_folder_that_is_not_there(made, monkeypatch, command, flag, place, says):
    path = made / place / "new.onnx"
    assert says in refused(made, monkeypatch, command, flag, path)


@pytest.mark.parametrize(("command", "flag"), pairs(FILES))
def test_a_file_in_a_folder_that_is_read_only(made, monkeypatch, command, flag):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    message = refused(made, monkeypatch, command, flag, made / "new.onnx")
    assert f"the folder {made} is read-only" in message


@pytest.mark.parametrize(("command", "flag"), pairs(FOLDERS))
def test_a_folder_below_a_file(made, monkeypatch, command, flag):
    assert "file" in refused(made, monkeypatch, command, flag, made / "file" / "new")
