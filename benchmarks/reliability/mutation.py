"""Random damage to bytes, JSON and text."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

SIZES = (
    0,
    1,
    127,
    128,
    255,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63,
    2**64 - 1,
)


def nested(depth: int) -> Any:
    """A list nested in lists, `depth` times."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


STRANGE: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 0.5, -0.5, -0.0, 1e-320, 1e308, math.nan, math.inf),
    *(2**31, 2**53 + 1, 2**63, -(2**63), 10**30, 10**400, -(10**400)),
    *("", "x", "..", "/", "a/b", "0.1", "1/0", "nan", "é", "٣", "x" * 3000, "a\nb", "\x1b[2J"),
    *("\x00", "\ud800", "acert", "standard", "digits", "mnist", "tracked", "validation"),
    *([], {}, [[]], [1, 2], [0, 0, 0], {"a": 1}, nested(20), nested(200)),
)
TEXTS = (
    *("", " ", "0", "1", "2", "-1", "0.1", "8/255", "8.8/255", "1/0", "0/0", "nan", "inf", "-inf"),
    *(
        "1e-400",
        "1e400",
        "1e-320",
        "1e-45",
        "1e400/1e400",
        "1/1e-400",
        "8/255/2",
        "1//2",
        "/",
        "1/",
    ),
    *(
        "٣/٤",
        "\uff11",
        "1_0",
        "0x1p-3",
        "1e",
        "e1",
        ".",
        "+1",
        "--1",
        "1,2",
        ",",
        "1:2",
        "1:20",
        "0:1:0.1",
    ),
    *(
        "0:1:0",
        "0:1e9:1e-9",
        "0:1:-1",
        "0:1e308:1e-308",
        "1:0:1",
        "nan:nan:nan",
        ":",
        "::",
        "0:1:1e-3",
    ),
    *("9" * 400, "9" * 5000, "x" * 300, "a b", "é", "\x1b[31m", "a\nb", "\udcff", "true", "acert"),
)


def damaged_bytes(rng: random.Random, content: bytes) -> bytes:
    """Bytes and bits changed, parts removed or copied, sizes forged; mostly near the start."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(min(len(data), 2 ** rng.randrange(1, 24)) + 1)
        length = rng.randrange(1, 2 ** rng.randrange(1, 10))
        kind = rng.randrange(7)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 2:
            del data[place : place + length]
        elif kind == 3:
            del data[len(data) - min(place, len(data)) :]
        elif kind == 4:
            part, other = data[place : place + length], rng.randrange(len(data) + 1)
            data[other:other] = part
        elif kind == 5:
            width = rng.choice((4, 8))
            size = rng.choice(SIZES) % 256**width
            data[place : place + width] = size.to_bytes(width, rng.choice(("little", "big")))
        else:
            data[place:place] = bytes(length)
    return bytes(data)


def damaged_value(rng: random.Random, value: Any) -> Any:
    """JSON with some of its nodes replaced, removed, or repeated under another name."""
    whole = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        node, key = rng.choice(_places(whole))
        kind = rng.randrange(5)
        if kind == 0 and node is not whole:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[rng.choice(("", "x", "..", "a/b", "\x1b[2J\n", "x" * 3000, "\ud800"))] = node[key]
        else:
            node[key] = copy.deepcopy(rng.choice(STRANGE))
    return whole[0]


def _places(whole: list[Any]) -> list[tuple[Any, Any]]:
    """(list or dictionary, index or key) of the first 500 nodes or so, breadth first."""
    found: list[tuple[Any, Any]] = [(whole, 0)]
    for node, key in found:
        child = node[key]
        if len(found) > 500:
            break
        if isinstance(child, dict):
            found += [(child, name) for name in child]
        elif isinstance(child, list):
            found += [(child, index) for index in range(len(child))]
    return found


def damaged_json(rng: random.Random, value: Any) -> bytes:
    """JSON text, damaged; about one in four is no valid JSON any more, some are too deep."""
    if rng.random() < 0.02:
        return rng.choice((b"[", b'{"a":')) * rng.choice((10, 1000, 100_000))
    text = json.dumps(damaged_value(rng, value)).encode()
    return damaged_bytes(rng, text) if rng.random() < 0.25 else text


def damaged_text(rng: random.Random) -> str:
    """A strange text, or one joined from strange parts."""
    if rng.random() < 0.3:
        return rng.choice(TEXTS)
    parts = [rng.choice(TEXTS) for _ in range(rng.choice((1, 2, 2, 3, 5)))]
    text = rng.choice(("", "/", ":", ",", ".", "e", "-")).join(parts)
    if text and rng.random() < 0.5:
        place = rng.randrange(len(text))
        text = text[:place] + rng.choice("0123456789/:,.e-+ naif_٣") + text[place + 1 :]
    return text
