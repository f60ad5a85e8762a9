"""Local data files as rows that know where they stand (`my.jsonl:12`): a bad one costs a row, not the file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cookbook.errors import UsageError
from cookbook.keys import did_you_mean

ENDINGS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
PARQUET_BATCH_ROWS = 1000


class RowProblem(ValueError):
    """Why one row cannot be used: `reason` is what the table of `data check` counts, `detail` tells what was seen."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class RawRow:
    """One row as it was found; `value` is a RowProblem when it could not even be read."""

    label: str  # "my.jsonl:12" (a line) or "no_robots[7]" (an index)
    value: dict[str, object] | RowProblem


def read_file(path: str | Path) -> Iterator[RawRow]:
    """The rows of a jsonl, json, parquet, csv or tsv file. UsageError at once for a file that cannot be read at all."""
    path = Path(path).expanduser()
    head = _checked_head(path)
    ending = path.suffix.lower()
    if ending == ".parquet":
        return _read_parquet(path)
    if ending in (".csv", ".tsv"):
        return _read_csv(path)
    if ending == ".json" and head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        return _read_json_list(path)
    return _read_lines(path)


def _checked_head(path: Path) -> bytes:
    """The first 8 KB, after refusing what is no data file."""
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix.lower() in ENDINGS)
        hint = f" (in it: {', '.join(inside[:3])})" if inside else ""
        raise UsageError(f"{path} is a folder; data.path wants one file{hint}")
    if path.suffix.lower() not in ENDINGS:
        exists = "" if path.exists() else " (and there is no such file)"
        raise UsageError(
            f"{path}: cannot tell the format{exists}; data.path wants a file ending in {', '.join(ENDINGS)}"
        )
    try:
        with path.open("rb") as file:
            head = file.read(8192)
    except FileNotFoundError:
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UsageError(f"no such file: {path}{did_you_mean(path.name, names)}; check data.path") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; check data.path") from None
    if not head:
        raise UsageError(f"{path} is empty (0 bytes); it should hold at least one row")
    _check_kind(path, head)
    return head


def _check_kind(path: Path, head: bytes) -> None:
    if path.suffix.lower() == ".parquet":
        if not head.startswith(b"PAR1"):
            raise UsageError(f"{path} is not a parquet file (it starts with {head[:4]!r}, not b'PAR1')")
        return
    if head.startswith(b"PAR1"):
        raise UsageError(f"{path} is a parquet file; rename it to end in .parquet")
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04", b"(\xb5/\xfd", b"BZh", b"\xfd7zXZ")):
        raise UsageError(f"{path} is compressed; unpack it first")
    if b"\0" in head:
        raise UsageError(f"{path} is a binary file; expected UTF-8 text ({path.suffix})")


def _read_lines(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield RawRow(f"{path.name}:{number}", parse_object(line))


def parse_object(line: bytes) -> dict[str, object] | RowProblem:
    """One line of a jsonl file."""
    try:
        value = json.loads(line.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        return RowProblem("not UTF-8 text", f"byte {line[error.start]:#04x} at column {error.start + 1}")
    except json.JSONDecodeError as error:
        return RowProblem("broken JSON", f"{error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand open brackets
        return RowProblem("broken JSON", str(error).split(";")[0])
    return as_object(value)


def as_object(value: object) -> dict[str, object] | RowProblem:
    """The row itself when it is an object with columns."""
    if isinstance(value, dict):
        return value
    names = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "a boolean", type(None): "null"}
    return RowProblem("not an object", f'{names[type(value)]}; a row looks like {{"messages": [...]}}')


def _read_json_list(path: Path) -> Iterator[RawRow]:
    """The elements of one JSON list, each with the line it starts at."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    decoder = json.JSONDecoder()
    at = text.index("[") + 1
    line, counted = 1, 0
    while (at := _skip(text, at, " \t\r\n")) < len(text) and text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
            at = _skip(text, at, " \t\r\n")
            if text[at : at + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        except json.JSONDecodeError as error:
            raise UsageError(
                f"{path.name}:{error.lineno}: broken JSON ({error.msg} at column {error.colno}) in the row that starts"
                f" at line {line}; the rest of a JSON list cannot be read: fix it, or write an object per line (.jsonl)"
            ) from None
        yield RawRow(f"{path.name}:{line}", as_object(value))
        at += text[at] == ","
    if at >= len(text):
        raise UsageError(f"{path.name}: the JSON list never ends (no closing ']'); is the file cut short?")


def _skip(text: str, at: int, blanks: str) -> int:
    while at < len(text) and text[at] in blanks:
        at += 1
    return at


def _read_csv(path: Path) -> Iterator[RawRow]:
    csv.field_size_limit(2**31 - 1)  # the default refuses a cell of more than 128 KB
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            records = csv.reader(file, delimiter=max(",;\t", key=first.count))
            header = next(records, [])
            start = records.line_num + 1
            for record in records:
                if record:
                    yield RawRow(f"{path.name}:{start}", _csv_row(header, record))
                start = records.line_num + 1
    except UnicodeDecodeError as error:
        seen = f"byte {error.object[error.start]:#04x}"
        raise UsageError(f"{path} is not UTF-8 text ({seen}); save it as UTF-8") from None
    except csv.Error as error:
        raise UsageError(f"{path.name}:{start}: broken CSV ({error})") from None


def _csv_row(header: list[str], record: list[str]) -> dict[str, object] | RowProblem:
    if len(record) != len(header):
        return RowProblem("wrong number of fields", f"{len(record)}, the header has {len(header)}")
    return dict(zip(header, record, strict=True))


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        index = 0
        for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
            for value in batch.to_pylist():
                yield RawRow(f"{path.name}[{index}]", value)
                index += 1
    except pyarrow.ArrowException as error:
        raise UsageError(f"{path} is a damaged parquet file ({str(error).splitlines()[0]})") from None
