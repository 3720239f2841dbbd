"""Progress of long computations on stderr: a line that fits the terminal, rare lines in a pipe."""

from __future__ import annotations

import os
import sys
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import click

from ibpcore.errors import printable
from ibpcore.progress import Advance

Show = Callable[[str, float, list[str]], None]
"""Shows a label, the share of the work that is done, and facts, the most important first."""
SILENCE = 600.0
"""Seconds before the first line in a pipe, and between two: short computations are quiet."""
REPORTS = 100
"""Number of the last reports from whose speed the time left is estimated."""
COLUMNS = 80
"""Width of a terminal that does not tell it."""
BAR = 20
"""Length of the bar, which is drawn if it fits beside everything else."""
GAP = "  "
CLEAR_BELOW = "\x1b[J"
"""Clears a terminal from the cursor on."""


@contextmanager
def progress(label: str, length: int) -> Iterator[Advance | None]:
    """A `Watch`: a line that is drawn anew on a terminal, one every `SILENCE` in a pipe."""
    terminal, start = sys.stderr.isatty(), time.monotonic()
    reports = deque[tuple[float, int]](maxlen=REPORTS)
    show = _draw_report if terminal else _rarely(_print)

    def advance(done: int, facts: Sequence[str]) -> None:
        reports.append((time.monotonic(), done))
        timed = _time(start, reports, length)
        show(label, done / length if length else 1.0, [*timed, *map(printable, facts)])

    if terminal:
        _draw(label)
    try:
        yield advance
    finally:
        if terminal:  # the last line stays
            _write("\n" if reports else CLEAR_BELOW)


def clear_progress() -> None:
    """Clears the line of progress, so that other output takes its place."""
    if sys.stderr.isatty():
        _write("\r" + CLEAR_BELOW)


def _time(start: float, reports: Sequence[tuple[float, int]], length: int) -> list[str]:
    """The time left, or taken if nothing is left; nothing before there is a speed.

    A resumed computation begins with what was done before: one report has no speed.
    """
    (before, first), (now, done) = reports[0], reports[-1]
    if done >= length:
        return [f"in {duration(now - start)}"]
    if done <= first:
        return []
    return [f"{duration((now - before) / (done - first) * (length - done))} left"]


def duration(seconds: float) -> str:
    """Minutes and seconds, or hours, minutes and seconds: "2:13", "1:02:13"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours}:{minutes_left:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _draw_report(label: str, share: float, facts: list[str]) -> None:
    _draw(fitted(label, share, facts, _width()))


def _draw(line: str) -> None:
    """Draws a line in the place of the one before.

    The cursor stays at its start. So a line that was wrapped by a narrower window is cleared whole.
    """
    _write(_cut(line, _width()) + CLEAR_BELOW + "\r")


def _print(label: str, share: float, facts: list[str]) -> None:
    click.echo(GAP.join([label, _percent(share), *facts]), err=True)


def _rarely(show: Show) -> Show:
    """Shows what comes after a silence, and leaves out the rest."""
    shown = time.monotonic()

    def show_if_due(label: str, share: float, facts: list[str]) -> None:
        nonlocal shown
        if time.monotonic() - shown >= SILENCE:
            shown = time.monotonic()
            show(label, share, facts)

    return show_if_due


def fitted(label: str, share: float, facts: Sequence[str], width: int) -> str:
    """A line of at most `width` columns, unless label and share are longer: the first facts."""
    percent = _percent(share)
    bar = f"[{'#' * int(BAR * share):-<{BAR}}]"
    shorter = ([label, percent, *facts[:count]] for count in range(len(facts), -1, -1))
    for parts in ([label, bar, percent, *facts], *shorter):
        line = GAP.join(parts)
        if _cells(line) <= width:
            break
    return line


def _cut(line: str, width: int) -> str:
    while _cells(line) > width:
        line = line[:-1]
    return line


def _percent(share: float) -> str:
    return f"{int(100 * share):3} %"


def _cells(text: str) -> int:
    """Columns of a terminal that a text takes: two for a wide character of East Asia."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def _width() -> int:
    """Columns that a line may take on the terminal of stderr, whose size may have changed.

    The last one stays free: there the cursor of some terminals is on the next line already.
    """
    try:
        return (os.get_terminal_size(sys.stderr.fileno()).columns or COLUMNS) - 1
    except (OSError, ValueError):
        return COLUMNS - 1


def _write(text: str) -> None:
    click.echo(text, nl=False, err=True)
