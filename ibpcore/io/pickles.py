"""Pickles, interpreted without running code: no class or function that they name is looked up."""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

MOST_CODES = 5_000_000
"""Operations of a pickle; a checkpoint with a long history has some ten thousand."""

PUSHED: dict[str, Callable[[], Any]] = {
    **{"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False},
    **{"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list},
}
"""Values of operations without an argument. Sets become lists, which need no hashes."""
VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
"""Operations whose argument is the value."""
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Name(str):
    """The name of a class or function, as "module name"."""


class Unknown:
    """Stands in for an object of any class.

    Attributes:
        kind: name of the class, without its module.
        state: the pickled state of the object, usually its attributes.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.state: Any = None


def unpickled(
    file: BinaryIO,
    calls: Mapping[str, Callable[..., Any]],
    persistent: Callable[[Any], Any],
    other: Callable[[str], Any] = Unknown,
) -> Any:
    """The object of the pickle that begins at the position of `file`, which moves behind it.

    Args:
        calls: what is called in place of functions and classes, by "module name".
        persistent: the object for a persistent id.
        other: what is called in place of any other class, with its name.

    Raises: almost anything, if the pickle is damaged. Memory grows with its length only.
    """
    interpreter = _Interpreter(calls, persistent, other)
    for count, (code, value, _) in enumerate(pickletools.genops(file)):
        if count == MOST_CODES:
            raise ValueError("the pickle has too many operations")
        interpreter.step(code.name, value)
    return interpreter.stack.pop()


class _Interpreter:
    """The stack machine of a pickle."""

    def __init__(
        self,
        calls: Mapping[str, Callable[..., Any]],
        persistent: Callable[[Any], Any],
        other: Callable[[str], Any],
    ) -> None:
        self.calls, self.persistent, self.other = calls, persistent, other
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def step(self, code: str, value: Any) -> None:
        if code in VALUES:
            self.stack.append(value)
        elif code in PUSHED:
            self.stack.append(PUSHED[code]())
        elif code in TUPLES:
            self.stack.append(tuple(self._last(TUPLES[code])))
        elif code in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if value is None else value] = self.stack[-1]
        elif code in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[value])
        elif code == "MARK":
            self.marks.append(self.stack)
            self.stack = []
        elif code not in ("PROTO", "FRAME", "STOP"):
            self._combine(code, value)

    def _combine(self, code: str, value: Any) -> None:
        """The operations that take values off the stack."""
        match code:
            case "TUPLE" | "LIST" | "FROZENSET":
                items = self._marked()
                self.stack.append(tuple(items) if code == "TUPLE" else items)
            case "APPEND":
                self._extend(self._last(1))
            case "APPENDS" | "ADDITEMS":
                self._extend(self._marked())
            case "SETITEM":
                self._update(self._last(2))
            case "SETITEMS":
                self._update(self._marked())
            case "GLOBAL":
                self.stack.append(Name(value))
            case "STACK_GLOBAL":
                self.stack.append(Name(" ".join(self._last(2))))
            case "REDUCE" | "NEWOBJ":
                self.stack.append(self._called(*self._last(2)))
            case "NEWOBJ_EX":
                self.stack.append(self._called(*self._last(3)[:2]))
            case "BUILD":
                (state,) = self._last(1)
                if isinstance(self.stack[-1], Unknown):
                    self.stack[-1].state = state
            case "BINPERSID":
                self.stack.append(self.persistent(*self._last(1)))
            case _:
                raise ValueError(f"{code} is not supported")

    def _last(self, count: int) -> list[Any]:
        """Takes that many values off the stack."""
        if len(self.stack) < count:
            raise ValueError("too few values")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def _marked(self) -> list[Any]:
        """Takes the values above the last mark off the stack."""
        values, self.stack = self.stack, self.marks.pop()
        return values

    def _extend(self, items: list[Any]) -> None:
        # An unknown object may be a list or a dictionary of another class.
        if not isinstance(self.stack[-1], Unknown):
            self.stack[-1].extend(items)

    def _update(self, items: list[Any]) -> None:
        keys, values = items[::2], items[1::2]
        if any(isinstance(key, tuple) for key in keys):
            raise ValueError("a tuple as a key, whose hash may take an endless recursion")
        if not isinstance(self.stack[-1], Unknown):
            self.stack[-1].update(zip(keys, values, strict=True))

    def _called(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Name):
            raise ValueError("something that is called is no function")
        if function in self.calls:
            return self.calls[function](*arguments)
        return self.other(function.rpartition(" ")[2].rpartition(".")[2])
