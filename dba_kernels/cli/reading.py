"""Files to records: JSON lines, JSON, tables and plain text, each by its name; other kinds are refused by name."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from .output import InputError

JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
CONVERT = "convert it to JSON lines"
REFUSED = dict.fromkeys((".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".lz4", ".7z"), "unpack it first") | {
    ".parquet": "read it with datasets.load_dataset and save it with save_to_disk, then give that folder",
    ".arrow": "give the folder that datasets saved, not a file in it",
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".pkl", ".pickle", ".pt", ".npy", ".npz", ".safetensors"), CONVERT),
    **dict.fromkeys((".pdf", ".docx", ".doc", ".odt", ".epub"), "save it as plain text"),
}
"""Kinds of files that hold text in a form that is not read, and the fix."""

BOM = b"\xef\xbb\xbf"
WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff")
READ_ERRORS = (OSError, EOFError, zlib.error)
"""What reading a file that is not there, or is cut off, raises."""


class JsonLines(Sequence[Any]):
    """The records of a file of JSON lines; lines are found once, and read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts, position = array("q"), 0
        try:
            self._file = _opened(path)
            for line in self._file:
                if line.strip(b" \t\r\n" + BOM):
                    self._starts.append(position)
                position += len(line)
        except READ_ERRORS as error:
            raise unreadable(path, error) from error

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        self._file.seek(self._starts[index])
        line = self._file.readline()
        try:
            return json.loads(line.removeprefix(BOM) if index == 0 else line)
        except (ValueError, RecursionError) as error:  # of encoding, of JSON, or nested without end
            one = line.strip() in (b"[", b"{")
            hint = "; is it one JSON document over several lines? Then name it .json" if one else ""
            raise InputError(
                f"{self.path}, record {index + 1}: expected a line of JSON in UTF-8: {_why(error)}{hint}"
            ) from error


def read_records(path: Path, is_record: Callable[[Any], bool], longest: int) -> Sequence[Any]:
    """What a file holds, in its order.

    Args:
        is_record: whether a JSON object is one record, rather than a mapping whose values are records.
        longest: characters of a document that is cut from plain text.

    Raises:
        InputError: not a regular file, of a kind that is not read, or damaged.
    """
    suffix = kind_of(path)
    if suffix in JSON_LINES:
        return JsonLines(path)
    text = read_text(path)
    if suffix == ".json":
        return _json(path, text, is_record)
    if suffix in DELIMITERS:
        return list(_table(path, text, DELIMITERS[suffix]))
    return list(pieces(text, longest))


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read, in small letters, ``.gz`` set aside.

    Raises:
        InputError: it is no regular file, or of a kind that is not read.
    """
    if not path.is_file():
        raise InputError(f"cannot read {str(path)!r}: expected a regular file, got a pipe or a device; save it first")
    name = Path(path.name.lower().removesuffix(".gz"))
    if fix := REFUSED.get(name.suffix):
        raise InputError(f"cannot read {str(path)!r}: {name.suffix} files are not read; {fix}")
    return name.suffix


def read_text(path: Path) -> str:
    """The whole file; of a text whose name does not say JSON, it is seen to that it is none.

    Raises:
        InputError: it cannot be read, is not UTF-8, or is JSON lines under another name.
    """
    try:
        with _opened(path) as file:
            content = file.read()
        text = content.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        wide = content.startswith(WIDE_MARKS)
        got = "got UTF-16; save it as UTF-8" if wide else str(error)
        raise InputError(f"cannot read {str(path)!r}: expected text in UTF-8: {got}") from error
    except READ_ERRORS as error:
        raise unreadable(path, error) from error
    if "\0" in text:
        raise InputError(f"cannot read {str(path)!r}: expected text in UTF-8, got binary data; {CONVERT}")
    if kind_of(path) not in (".json", *JSON_LINES) and _looks_like_json_lines(text):
        raise InputError(
            f"cannot read {str(path)!r} as plain text: its lines are JSON records; let its name end in .jsonl"
        )
    return text


def check_text(text: str) -> str:
    """The text itself.

    Raises:
        InputError: half of a surrogate pair stands in it, which is no character and which no tokenizer takes.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"expected text in Unicode, got the lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start + 1}; correct the record or leave it out"
        ) from error
    return text


def pieces(text: str, longest: int) -> Iterator[str]:
    """Cut at the last line end, or else the last space, within ``longest`` characters."""
    start = 0
    while start < len(text):
        stop = start + longest
        if stop < len(text):
            cut = next((at for mark in "\n " if (at := text.rfind(mark, start, stop)) > start), stop - 1)
            stop = cut + 1
        if piece := text[start:stop].strip():
            yield piece
        start = stop


def unreadable(path: Path, error: BaseException) -> InputError:
    return InputError(f"cannot read {str(path)!r}: {getattr(error, 'strerror', None) or error}")


def _opened(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked where its name ends in ``.gz``, at any position as fast as at the first."""
    if not path.name.lower().endswith(".gz"):
        file = open(path, "rb")  # noqa: SIM115 - JsonLines keeps it open: records are read in any order
        wide = file.read(2) in WIDE_MARKS
        file.seek(0)
        if wide and kind_of(path) in JSON_LINES:
            raise InputError(f"cannot read {str(path)!r}: expected JSON lines in UTF-8, got UTF-16; save it as UTF-8")
        return file
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115
    with gzip.open(path) as packed:
        shutil.copyfileobj(packed, unpacked)
    unpacked.seek(0)
    return unpacked


def _json(path: Path, text: str, is_record: Callable[[Any], bool]) -> Sequence[Any]:
    if not text.strip():
        return []
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        if _looks_like_json_lines(text):
            return JsonLines(path)
        raise InputError(f"cannot read {str(path)!r} as JSON: {_why(error)}") from error
    if isinstance(data, dict) and not is_record(data):
        return list(data.values())
    return data if isinstance(data, list) else [data]


def _table(path: Path, text: str, delimiter: str) -> Iterator[dict[str, str]]:
    """A record a row, under the names of the first row."""
    csv.field_size_limit(2**31 - 1)  # a text may be longer than 128 KiB
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    number = 0
    try:
        names = next(rows, [])
        for number, row in enumerate(filter(None, rows), 1):
            if len(row) != len(names):
                raise InputError(
                    f"{path}, record {number}: expected {len(names)} values, as many as the first row names "
                    f"({', '.join(names)}), got {len(row)}; quote values with {delimiter!r} in them"
                )
            yield dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}, after record {number}: expected a table of quoted values: {error}") from error


def _looks_like_json_lines(text: str) -> bool:
    """Whether the first two lines that are not blank are JSON objects, each by itself."""
    lines = (line for line in text.split("\n", 50)[:50] if line.strip())
    first = [line for line, _ in zip(lines, range(2), strict=False)]
    try:
        return len(first) == 2 and all(isinstance(json.loads(line), dict) for line in first)
    except (ValueError, RecursionError):
        return False


def _why(error: Exception) -> str:
    return "it is nested too deep" if isinstance(error, RecursionError) else str(error)
