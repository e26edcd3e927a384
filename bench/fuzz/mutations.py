"""Ways to spoil a file: its bytes, the JSON in it, or what lies at its path."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEEP: Any = []
for _ in range(500):
    DEEP = [DEEP]

ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3.5,
    1e308,
    float("nan"),
    float("inf"),
    10**15,
    10**400,
    "",
    "x",
    "\ud800",
    "\0",
]
ODD += ["x" * 5000, [], {}, [[]], {"": None}, DEEP, "../../x", "nan", ["a", "b"], {"role": "user"}, "1e999", -(2**63)]

Change = Callable[[random.Random, Path], None]


def _bytes(change: Callable[[random.Random, bytes], bytes]) -> Change:
    def apply(drawn: random.Random, path: Path) -> None:
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(change(drawn, content))

    return apply


def _cut(drawn: random.Random, content: bytes) -> bytes:
    return content[: drawn.randrange(len(content) + 1)]


def _flip(drawn: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(drawn.choice((1, 1, 2, 8))):
        if changed:
            changed[drawn.randrange(len(changed))] ^= 1 << drawn.randrange(8)
    return bytes(changed)


def _splice(drawn: random.Random, content: bytes) -> bytes:
    """A part is taken out, put in twice, or replaced by noise."""
    start = drawn.randrange(len(content) + 1)
    stop = min(len(content), start + drawn.choice((1, 8, 100, 10_000)))
    middle = drawn.choice((b"", 2 * content[start:stop], drawn.randbytes(stop - start), b"\xff" * 16))
    return content[:start] + middle + content[stop:]


def _json(drawn: random.Random, content: bytes) -> bytes:
    """One node of the JSON, of one line of JSON lines, or of a safetensors header, becomes something odd."""
    if len(content) > 8 and 0 < (size := int.from_bytes(content[:8], "little")) < len(content):
        header = _changed(drawn, content[8 : 8 + size])
        return len(header).to_bytes(8, "little") + header + content[8 + size :]
    try:
        json.loads(content)
        return _changed(drawn, content)
    except (ValueError, RecursionError):
        lines = content.split(b"\n")
        at = drawn.randrange(len(lines))
        lines[at] = _changed(drawn, lines[at])
        return b"\n".join(lines)


def _changed(drawn: random.Random, text: bytes) -> bytes:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return json.dumps(drawn.choice(ODD)).encode()
    return json.dumps(_spoilt(drawn, data)).encode()


def _spoilt(drawn: random.Random, node: Any) -> Any:
    if isinstance(node, str) and node.startswith("{") and drawn.random() < 0.8:  # JSON in JSON: a description
        return _changed(drawn, node.encode()).decode()
    if not isinstance(node, (dict, list)) or not node or drawn.random() < 0.1:
        return drawn.choice(ODD)
    key: Any = drawn.choice(list(node)) if isinstance(node, dict) else drawn.randrange(len(node))
    if drawn.random() < 0.15:
        del node[key]
    else:
        node[key] = _spoilt(drawn, node[key])
    return node


def _instead(make: Callable[[Path], object]) -> Change:
    def apply(_: random.Random, path: Path) -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)

    return apply


MUTATIONS: dict[str, Change] = {
    "cut": _bytes(_cut),
    "bits flipped": _bytes(_flip),
    "part replaced": _bytes(_splice),
    "JSON node": _bytes(_json),
    "JSON node ": _bytes(_json),
    "JSON node  ": _bytes(_json),
    "empty": _bytes(lambda *_: b""),
    "noise": _bytes(lambda drawn, content: drawn.randbytes(len(content) // 2)),
    "byte order mark": _bytes(lambda _, content: b"\xef\xbb\xbf" + content),
    "UTF-16": _bytes(lambda _, content: content.decode("latin-1").encode("utf-16")),
    "CRLF": _bytes(lambda _, content: content.replace(b"\n", b"\r\n")),
    "nested": _bytes(lambda *_: b"[" * 100_000),
    "surrogates": _bytes(lambda *_: b'{"text": "\\ud800 x"}\n' * 2),
    "packed twice": _bytes(lambda _, content: gzip.compress(content, mtime=0)),
    "missing": _instead(lambda path: None),
    "folder": _instead(Path.mkdir),
    "pipe": _instead(os.mkfifo),
    "link to nothing": _instead(lambda path: path.symlink_to("nothing")),
    "link to itself": _instead(lambda path: path.symlink_to(path.name)),
    "device": _instead(lambda path: path.symlink_to("/dev/null")),
}


def mutate(drawn: random.Random, path: Path) -> str:
    """Spoil the file in one way; its name."""
    name = drawn.choice(list(MUTATIONS))
    MUTATIONS[name](drawn, path)
    if drawn.random() < 0.1 and path.is_file() and not path.is_symlink():
        os.chmod(path, 0)  # which root reads all the same
        return f"{name.strip()}, unreadable"
    return name.strip()
