"""What is written as JSONL, CSV or Parquet comes back equal, and a row that is none is named by file and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft.errors import InvalidData
from weft.making.rows import digest_of, read_rows

COLUMNS = ("prompt", "completion")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TABLES = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6)
Table = Sequence[tuple[str, str]]


def write_jsonl(path: Path, table: Table) -> None:
    path.write_text(
        "".join(json.dumps(dict(zip(COLUMNS, row, strict=True)), ensure_ascii=False) + "\n" for row in table),
        encoding="utf-8",
        newline="",
    )


def write_csv(path: Path, table: Table) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows([COLUMNS, *table])


def write_parquet(path: Path, table: Table) -> None:
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([dict(zip(COLUMNS, row, strict=True)) for row in table]), path
    )


@pytest.mark.parametrize(("suffix", "write"), [("jsonl", write_jsonl), ("csv", write_csv), ("parquet", write_parquet)])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(table=TABLES)
def test_what_is_written_comes_back(
    tmp_path: Path, suffix: str, write: Callable[[Path, Table], None], table: Table
) -> None:
    path = tmp_path / f"data.{suffix}"
    write(path, table)
    assert [tuple(row.values[name] for name in COLUMNS) for row in read_rows([path])] == list(table)


def test_rows_know_their_line(tmp_path: Path) -> None:
    jsonl, quoted = tmp_path / "a.jsonl", tmp_path / "b.csv"
    jsonl.write_text('{"a": 1}\n\n{"a": 2}\n')
    quoted.write_text('a,b\n"over\ntwo lines",x\ny,z\n')
    assert [row.where for row in read_rows([jsonl, quoted])] == [
        f"{jsonl}:1",
        f"{jsonl}:3",
        f"{quoted}:2",
        f"{quoted}:4",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl holds no rows"),
        ("a.csv", b"text,label\n", "a.csv holds no rows"),
        ("a.csv", b"text,label\nx,y\nz\n", "a.csv:3: has 1 values; the first line names 2"),
        ("a.csv", b"text,label\nx,y\nx,y,z\n", "a.csv:3: has 3 values; the first line names 2"),
        ("a.csv", b'text,label\n"x,y\n', "a.csv:2: is no CSV"),
        ("a.csv", b"text,text\nx,y\n", "a.csv:1: names a column twice: text, text"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "a.jsonl:2: is no JSON"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1: must be a JSON object"),
        ("a.jsonl", b'{"a": "\xff"}\n', "a.jsonl is not UTF-8: invalid start byte at byte 7"),
        ("a.parquet", b"no table", "a.parquet is no Parquet file that can be read"),
        ("a.txt", b"x", r"a.txt is of no kind that is read: its name must end in .jsonl, .csv, .parquet"),
    ],
)
def test_what_is_no_data_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidData, match=message):
        read_rows([tmp_path / name])


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=r"a.jsonl can't be read: No such file"):
        read_rows([tmp_path / "a.jsonl"])


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert digest_of([tmp_path / "a.jsonl"]).startswith("sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca4959")
