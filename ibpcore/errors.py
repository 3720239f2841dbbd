"""`UserError`, and how messages are cut to one printable line."""

from __future__ import annotations

LONGEST = 1000
"""Characters of a message."""


class UserError(ValueError):
    """Something the caller gave (an argument, a file, a data set) does not fit.

    The message is one line, names what is wrong, and is fit to be printed as it stands.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class RankZeroFailedError(UserError):
    """Rank 0 of several processes failed; it reports the reason itself."""


def printable(text: str) -> str:
    """`text` without line breaks and control characters, which a file may hold, and not endless."""
    short = text if len(text) <= LONGEST else text[:LONGEST] + "..."
    # A lone surrogate, as in file names that are not UTF-8, no terminal takes either.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)


def first_line(error: BaseException) -> str:
    """What an error of another library says, cut to one line."""
    return (str(error) or type(error).__name__).splitlines()[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; on the CPU torch raises a plain RuntimeError for it."""
    full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return full or "can't allocate memory" in str(error)


REFUSED = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError)
"""What is raised where values are not what they are taken for."""
