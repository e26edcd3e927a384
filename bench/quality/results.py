"""The results on disk: one JSON line per finished run, one file per domain, safe against being killed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bench import jsonl
from bench.jsonl import Record
from bench.quality import data

FOLDER = Path(__file__).parent / "results"
FOLDER = FOLDER if data.SIZE.name == "4M" else FOLDER / data.SIZE.name


def load(domain: str, folder: Path = FOLDER) -> dict[str, Record]:
    """Records by key, in the order they were written; a line cut off by a kill is ignored, a broken one is an error."""
    path = folder / f"{domain}.jsonl"
    records = {}
    for number, record in enumerate(jsonl.load(path), 1):
        if "key" not in record:
            raise ValueError(f"{path.name} line {number}: expected a result record, got one without a key; delete it")
        records[record["key"]] = record
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
        jsonl.append(folder / f"{record['setting']['domain']}.jsonl", record)
