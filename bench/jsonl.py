"""Results on disk as JSON lines: runs are appended as they finish; a kill in the middle of a line loses that line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def load(path: Path) -> list[Record]:
    """Records in the order they were written; none where there is no file. A line cut off by a kill is ignored.

    Raises:
        ValueError: a whole line that is no JSON object.
    """
    if not path.exists():
        return []
    *lines, _torn = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"{path.name} line {number}: expected a result record, got {line[:60]!r}; delete the line")
        records.append(record)
    return records


def append(path: Path, record: Record) -> None:
    """Append a whole line and flush it to the disk; a torn last line is removed first."""
    with path.open("ab+") as file:
        content_end = file.seek(0, os.SEEK_END)
        file.seek(0)
        whole = file.read(content_end).rfind(b"\n") + 1
        file.truncate(whole)
        file.write(json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
