"""The one exception that a caller can cause and mend."""


class UserError(ValueError):
    """Something the caller gave (an argument, a file, a data set) does not fit.

    The message is one line, names what is wrong, and is fit to be printed as it
    stands.
    """


def first_line(error: BaseException) -> str:
    """What an error of another library says, cut to one line."""
    return (str(error) or type(error).__name__).splitlines()[0]
