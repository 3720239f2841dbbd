"""Progress as it is printed: a line that fits any terminal, and lines in a pipe."""

import contextlib
import fcntl
import io
import os
import re
import struct
import sys
import termios
import threading

import pytest
from helpers import run_ibp

from ibpcore.training.config import make_config
from ibpcore_cli import progress as module
from ibpcore_cli.epoch_lines import epoch_printer
from ibpcore_cli.main import main
from ibpcore_cli.progress import clear_progress, duration, fitted, progress

TINY = ("--epochs", 2, "--width", 1, "--hidden", 2, "--batch-size", 32, "--limit-train", 96)
SMALL = (*TINY, "--limit-test", 8, "--device", "cpu", "--out")
FACTS = ["epoch 7/30", "loss 0.432", "accuracy 88.3 %", "epsilon 0.0125", "validation 86.0 %"]


class Screen:
    """What a terminal shows of what is written to it, and how often it had to wrap a line."""

    def __init__(self, columns):
        self.columns, self.wraps = columns, 0
        self.lines, self.place = [[]], 0

    def write(self, text):
        for code in re.findall(r"\x1b\[\w|.", text, re.S):
            if code == "\r":
                self.place = 0
            elif code == "\n":
                self.lines.append([])
            elif code == "\x1b[J":
                del self.lines[-1][self.place :]
            else:
                assert code.isprintable(), repr(code)
                self.put(code, 2 if "\u1100" <= code <= "\uffef" else 1)

    def put(self, letter, cells):
        if self.place + cells > self.columns:
            self.wraps += 1
            self.lines.append([])
            self.place = 0
        line = self.lines[-1]
        line[self.place : self.place + cells] = [letter, ""][:cells]
        self.place += cells

    def shown(self):
        return ["".join(line) for line in self.lines]


class Terminal:
    """A pseudo-terminal in the place of stderr."""

    def __init__(self, columns):
        self.screen, (self.master, slave) = Screen(columns), os.openpty()
        self.resize(columns)
        self.stderr = open(slave, "w", encoding="utf-8")  # noqa: SIM115
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def resize(self, columns):
        size = struct.pack("4H", 24, columns, 0, 0)
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, size)

    def read(self):
        written = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(self.master, 4096):
                written += part
        self.screen.write(written.decode())

    def close(self):
        self.stderr.close()
        self.reader.join()
        os.close(self.master)


@contextlib.contextmanager
def terminal(columns):
    """Gives the screen of a terminal of that width, complete when the block ends."""
    opened = Terminal(columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", opened.stderr)
        try:
            yield opened
        finally:
            opened.close()


@pytest.mark.parametrize("columns", [170, 80, 40, 20, 5, 1])
@pytest.mark.parametrize("facts", [FACTS, ["学習 猫と犬", "損失 0.432", "正解率 88 %"]])
def test_the_line_fits_any_terminal(columns, facts):
    """Drawn in one place, and complete at the end."""
    with terminal(columns) as opened, progress("training", 30) as advance:
        for done in range(1, 31):
            advance(done, facts if done % 2 else facts[:2])
    assert opened.screen.wraps == 0
    first, *rest = opened.screen.shown()
    assert rest == [""]
    assert "training  100 %".startswith(first) or first.startswith(
        ("training  100 %", "training  [")
    )


def test_what_is_left_out_of_a_narrow_line():
    lines = [fitted("training", 0.456, ["2:13 left", *FACTS], width) for width in (169, 79, 39, 19)]
    assert lines == [
        "training  [#########-----------]   45 %  2:13 left  epoch 7/30  loss 0.432"
        "  accuracy 88.3 %  epsilon 0.0125  validation 86.0 %",
        "training   45 %  2:13 left  epoch 7/30  loss 0.432  accuracy 88.3 %",
        "training   45 %  2:13 left  epoch 7/30",
        "training   45 %",
    ]


def test_the_window_is_resized():
    with terminal(170) as opened, progress("training", 30) as advance:
        advance(1, FACTS)
        opened.resize(40)
        opened.screen.columns = 170  # that of the first line, which is drawn over
        advance(2, FACTS)
    (line, _) = opened.screen.shown()
    assert line.startswith("training    6 %  0:0")
    assert len(line) < 40


def test_time_left_is_that_of_the_work_since_the_first_report(monkeypatch):
    """A resumed run begins in the middle. At the end the line says how long it took."""
    clock = iter([100.0, 101.0, 111.0, 131.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    seen = []
    monkeypatch.setattr(module, "_draw_report", lambda label, share, facts: seen.append(facts))
    with terminal(80), progress("training", 400) as advance:
        for done in (300, 310, 400):
            advance(done, ["x"])
    assert seen == [["x"], ["1:30 left", "x"], ["in 0:31", "x"]]
    assert [duration(seconds) for seconds in (0.4, 61, 3733, 360_000)] == [
        *("0:00", "1:01", "1:02:13", "100:00:00")
    ]


def test_an_interrupted_line_ends_before_what_follows():
    with (
        terminal(80) as opened,
        contextlib.suppress(KeyboardInterrupt),
        progress("training", 9) as advance,
    ):
        advance(3, ["epoch 1/3"])
        raise KeyboardInterrupt
    assert opened.screen.shown() == ["training  [######--------------]   33 %  epoch 1/3", ""]


def test_nothing_remains_where_nothing_was_done():
    with terminal(80) as opened, progress("training", 9):
        pass
    assert opened.screen.shown() == [""]


def test_other_lines_take_the_place_of_progress():
    with terminal(80) as opened, progress("sweep", 2) as advance:
        advance(1, ["a name that is longer than what follows"])
        clear_progress()
        print("[1/2] done", file=sys.stderr)
        advance(2, ["b"])
    first, second, end = opened.screen.shown()
    assert (first, second[:7], end) == ("[1/2] done", "sweep  ", "")


def test_in_a_pipe_there_are_lines_after_a_long_time_only(monkeypatch):
    monkeypatch.setattr(sys, "stderr", pipe := io.StringIO())
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with progress("certifying", 100) as advance:
        clear_progress()
        for done in range(0, 101, 10):
            now[0] = 100.0 * done / 10
            advance(done, [f"{done} certified"])
    assert pipe.getvalue().splitlines() == [
        "certifying   60 %  6:40 left  60 certified",
    ]


def test_a_run_on_a_terminal(tmp_path):
    """Two lines, of training and certification, and no line an epoch."""
    out = io.StringIO()
    out.isatty = lambda: True
    with pytest.MonkeyPatch.context() as patch, terminal(80) as opened:
        patch.setattr(sys, "argv", ["ibp", "train", *map(str, (*SMALL, tmp_path / "run"))])
        patch.setattr(sys, "stdout", out)
        with contextlib.suppress(SystemExit):
            main()
    assert opened.screen.wraps == 0
    training, certifying, end = opened.screen.shown()
    assert re.match(r"training  100 %  in 0:0\d  epoch 2/2  loss \d\.\d+  accuracy", training)
    assert re.match(r"certifying .*100 %  in 0:0\d  \d+ certified  \d+ open$", certifying)
    assert end == ""
    assert "accuracy" in out.getvalue()
    assert "epoch 1/2" not in out.getvalue()


EPOCH = (
    r"epoch {}/2  loss +\d\.\d{{4}}  accuracy [ \d]+\.\d\d %  epsilon [\d./]+ +  +\d\.\d s"
    r"  +0:0\d left"
)


def test_a_run_in_a_pipe_says_a_line_an_epoch(tmp_path):
    """And a resumed one those of its own epochs."""
    run = tmp_path / "run"
    code, out, err = run_ibp("train", *SMALL, run)
    assert (code, err) == (0, "")
    lines = [line for line in out.splitlines() if line.startswith("epoch")]
    assert all(re.fullmatch(EPOCH.format(n), line) for n, line in enumerate(lines, 1))
    assert len({len(line) for line in lines}) == 1, "aligned"
    assert len(lines) == 2
    code, out, err = run_ibp("train", "--resume", run, "--epochs", 3)
    assert (code, err) == (0, "")
    (line,) = (line for line in out.splitlines() if line.startswith("epoch"))
    assert line.startswith("epoch 3/3  loss ")


def test_epsilon_has_the_unit_of_its_limit(capsys):
    config = make_config("digits", "acert", epochs=9, epsilon_max=16 / 255)
    row = {"epoch": 1, "loss": 1.0, "accuracy": 1.0, "epsilon": 0.1 / 255, "seconds": 1.0}
    epoch_printer(config, finished=0)(row)
    assert "  epsilon 0.1/255  " in capsys.readouterr().out


def test_the_line_of_an_epoch(capsys):
    config = make_config("digits", "acert", epochs=100)
    row = {"epoch": 9, "loss": 0.123456, "accuracy": 0.98765, "epsilon": 0.05, "seconds": 7.28}
    held_out = {"accuracy": 0.9, "acr": 0.75, "art": 0.8, "images": 9}
    say = epoch_printer(config, finished=8)
    for more in ({"epoch": 8, "seconds": 2.72}, {}, {"epoch": 10, "validation": held_out}):
        say(row | more)
    ninth, tenth = capsys.readouterr().out.splitlines()
    first = "epoch   9/100  loss  0.1235  accuracy  98.77 %"
    assert ninth == f"{first}  epsilon 0.05             7.3 s     7:35 left"
    assert tenth[len(ninth) :] == "  validation  90.00 %  ACR  75.00 %  ART  80.00 %"
