"""JSONL, CSV and Parquet files as rows that know where they stand, so that a bad one can be named."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from weft.errors import InvalidData

_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file. where: `FILE:LINE`, or `FILE, row N` of a file without lines."""

    where: str
    values: Mapping[str, Any]

    def refuse(self, words: str) -> InvalidData:
        return InvalidData(f"{self.where}: {words}")


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """The rows of the files, one after another.

    Raises InvalidData for a file that can't be read or holds no rows, and for the first row that is none.
    """
    return [row for path in paths for row in _rows_of(path)]


def digest_of(paths: Sequence[Path]) -> str:
    """`sha256:…` of the files' content, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def _rows_of(path: Path) -> list[Row]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InvalidData(f"{path} is of no kind that is read: its name must end in {', '.join(_READERS)}")
    try:
        rows = list(reader(path))
    except OSError as error:
        raise InvalidData(f"{path} can't be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InvalidData(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    if not rows:
        raise InvalidData(f"{path} holds no rows: at least one is needed")
    return rows


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InvalidData(f"{where}: is no JSON ({error})") from None
            if not isinstance(values, dict):
                raise InvalidData(f'{where}: must be a JSON object, such as {{"prompt": …, "completion": …}}')
            yield Row(where, values)


def _csv(path: Path) -> Iterator[Row]:
    """A row's line is its first; a quoted value may go over several."""
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        begins = 1
        try:
            names = next(reader, [])
            if len(set(names)) < len(names):
                raise InvalidData(f"{path}:1: names a column twice: {', '.join(names)}")
            begins = reader.line_num + 1
            for values in reader:
                if values and len(values) != len(names):
                    raise InvalidData(f"{path}:{begins}: has {len(values)} values; the first line names {len(names)}")
                if values:
                    yield Row(f"{path}:{begins}", dict(zip(names, values, strict=True)))
                begins = reader.line_num + 1
        except csv.Error as error:
            raise InvalidData(f"{path}:{begins}: is no CSV ({error})") from None


def _parquet(path: Path) -> Iterator[Row]:
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise InvalidData(f"{path} is no Parquet file that can be read ({' '.join(str(error).split())})") from None
    for number, values in enumerate(table.to_pylist(), start=1):
        yield Row(f"{path}, row {number}", values)


_READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
