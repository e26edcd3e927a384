"""The results on disk: one JSON line per finished run, one file per domain, safe against being killed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
Record = dict[str, Any]


def load(domain: str, folder: Path = FOLDER) -> dict[str, Record]:
    """Records by key, in the order they were written; a line cut off by a kill is ignored, a broken one is an error."""
    path = folder / f"{domain}.jsonl"
    if not path.exists():
        return {}
    *lines, _torn = path.read_text(encoding="utf-8").split("\n")
    records = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records[record["key"]] = record
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(
                f"{path.name} line {number}: expected a result record, got {line[:60]!r}; delete the line"
            ) from error
    return records


def done(domains: Iterable[str], base: str, folder: Path = FOLDER) -> set[str]:
    """Keys of the finished runs, all of which must have started from the base model ``base``."""
    finished = set()
    for domain in domains:
        for key, record in load(domain, folder).items():
            if record["base"] != base:
                raise ValueError(
                    f"{domain}.jsonl, run {key}: expected base model {base} (this machine's), got {record['base']}; "
                    "start a grid of your own with --output FOLDER"
                )
            finished.add(key)
    return finished


def append(records: list[Record], folder: Path = FOLDER) -> None:
    """Append whole lines and flush them to the disk; a torn last line is removed first."""
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        path = folder / f"{record['setting']['domain']}.jsonl"
        with path.open("ab+") as file:
            content_end = file.seek(0, os.SEEK_END)
            file.seek(0)
            whole = file.read(content_end).rfind(b"\n") + 1
            file.truncate(whole)
            file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
