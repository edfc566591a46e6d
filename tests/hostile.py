"""Files changed at random, as bytes and by what they say; and the readers that must take them."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 3, 2**63, 1e300, 0.5, "", "x", "1", "\u2028", "a\x00b", "../up"),
    *([], [1], ["a"], [[1]], {}, {"a": 1}, [[]] * 3, "x" * 3_000, [1, "a", None], {"": {}}),
]
PIECES = [
    *(b"NaN", b"1e999", b"[" * 300, b'{"a":' * 200, b"\\ud800", b"\xff", b"\x00", b"\n", b'"'),
    *(b"\xe2\x80\xa8", b",", b"9" * 5_000, b"\xef\xbb\xbf", b"\r", b"}", b"-", b"inf", b"=", b"'"),
]


@dataclass(frozen=True)
class Reader:
    """A reader with one whole file that it reads.

    Attributes:
        name: Name of the test.
        path: The file that is changed.
        read: Reads it, and whatever belongs to it.
    """

    name: str
    path: Path
    read: Callable[[], Any]


def changed_bytes(content: bytes, rng: random.Random) -> bytes:
    """Some bytes exchanged, removed, doubled or put in."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(changed) + 1)
        kind = rng.randrange(5)
        if kind == 0 and place < len(changed):
            changed[place] = rng.randrange(256)
        elif kind == 1:
            del changed[place : place + rng.randint(1, 30)]
        elif kind == 2:
            changed[place:place] = rng.choice(PIECES)
        elif kind == 3:
            changed[place:place] = changed[place : place + rng.randint(1, 60)]
        elif rng.random() < 0.3:
            del changed[place:]
    return bytes(changed)


def changed_json(text: str, rng: random.Random) -> str:
    """A value exchanged, a key renamed, or one left out or added; the text stays JSON."""
    value = json.loads(text)
    places = list(_places(value))
    if not places:
        return json.dumps(rng.choice(VALUES))
    holder, key = rng.choice(places)
    kind = rng.randrange(4)
    if kind == 0 or isinstance(holder, list):
        holder[key] = rng.choice(VALUES)
    elif kind == 1:
        holder[rng.choice(["x", "", "id", str(key).upper()])] = holder.pop(key)
    elif kind == 2:
        del holder[key]
    else:
        holder[f"{key}x"] = rng.choice(VALUES)
    return json.dumps(value, ensure_ascii=rng.random() < 0.5)


def changed(path: Path, content: bytes, rng: random.Random) -> bytes:
    """A file changed as bytes, or, if it is JSON, by what it says."""
    if rng.random() < 0.5 and path.suffix == ".json":
        return changed_json(content.decode(), rng).encode(errors="replace")
    if rng.random() < 0.5 and path.suffix == ".jsonl":
        lines = content.decode().split("\n")[:-1]
        index = rng.randrange(len(lines))
        lines[index] = changed_json(lines[index], rng)
        return "".join(f"{line}\n" for line in lines).encode(errors="replace")
    return changed_bytes(content, rng)


def _places(value: Any) -> list[tuple[Any, Any]]:
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    found = [(value, key) for key in keys]
    return found + [place for key in keys for place in _places(value[key])]
