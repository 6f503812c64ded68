"""Parquet in bounded memory: rows beyond the limits are found before a Python object is made of them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import sample_of

from gen2embed_mteb.data_files import parquet
from gen2embed_mteb.data_files.json_lines import JsonLines
from gen2embed_mteb.data_files.rows import RowFault, RowLimits
from gen2embed_mteb.data_files.shards import DataError

HELPERS = Path(__file__).parents[1] / "helpers"


def outcomes(path: Path, columns: list[str], **limits: int) -> list[Any]:
    rows = parquet.read_rows(path, columns, RowLimits(**limits))
    return [row.reason if isinstance(row, RowFault) else row for row in rows]


def test_each_limit_falls_on_its_row_alone(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b" * 500, "c", "d"], "list": [["x"], ["y"], ["z"] * 30, None]})
    path = tmp_path / "t.parquet"
    pq.write_table(table, path)
    assert outcomes(path, ["text", "list"]) == table.to_pylist()
    found = outcomes(path, ["text", "list"], max_row_bytes=400, max_candidates=20)
    assert found == [
        {"text": "a", "list": ["x"]},
        "the row has more than max_row_bytes 400",
        "list has 30 entries, more than max_candidates 20",
        {"text": "d", "list": None},
    ]


def test_a_column_that_is_not_read_may_hold_anything(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": ["a"], "bad": bad, "text.more": ["x" * 999]}), tmp_path / "t.parquet")
    assert outcomes(tmp_path / "t.parquet", ["text"], max_row_bytes=100) == [{"text": "a"}]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()])
def test_other_types_of_text(tmp_path: Path, kind: pa.DataType) -> None:
    values = ["a", None, "é" * 40, "a"]
    pq.write_table(pa.table({"text": pa.array(values).cast(kind)}), tmp_path / "t.parquet")
    assert [row["text"] for row in outcomes(tmp_path / "t.parquet", ["text"])] == values
    limited = outcomes(tmp_path / "t.parquet", ["text"], max_row_bytes=60)
    assert [row if isinstance(row, str) else row["text"] for row in limited] == [
        "a", None, "the row has more than max_row_bytes 60", "a"
    ]  # fmt: skip


def test_row_groups_that_cannot_fit_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"list": [[1]] * 3 + [[2] * 5000]}), tmp_path / "t.parquet", row_group_size=3)
    monkeypatch.setattr(parquet, "_MAX_GROUP_VALUES", 4000)
    assert outcomes(tmp_path / "t.parquet", ["list"]) == [
        *[{"list": [1]}] * 3,
        "its row group of 1 rows holds 5000 values; write the table in smaller row groups",
    ]
    pq.write_table(pa.table({"text": ["a", "b" * 5000]}), tmp_path / "u.parquet", row_group_size=1)
    monkeypatch.setattr(parquet, "_LARGE_GROUP", 1000)
    (first, second) = outcomes(tmp_path / "u.parquet", ["text"], max_row_bytes=900)
    assert first == {"text": "a"}
    assert second.startswith("its row group of 1 rows holds 5")


def test_an_error_of_the_system_is_not_called_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "t.parquet")

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(pq, "ParquetFile", fails)
    with pytest.raises(OSError, match="Too many open files") as caught:
        outcomes(tmp_path / "t.parquet", ["text"])
    assert not isinstance(caught.value, DataError)


def test_the_name_of_a_column_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": ["a"], "spoiled": ["b"]}), path)
    data = path.read_bytes()
    places = [place for place in range(len(data)) if data.startswith(b"spoiled", place)]
    assert len(places) > 1  # in the schema, and beside every chunk of the column
    for place in places:
        path.write_bytes(data[:place] + b"\xff" + data[place + 1 :])
        try:
            assert outcomes(path, ["text"]) == [{"text": "a"}]
        except DataError as error:
            assert "parquet file" in str(error)


def test_types_that_python_has_no_value_for(tmp_path: Path) -> None:
    seconds = pa.array([0, 2**62, 1], pa.timestamp("us"))
    table = pa.table({"text": ["a", "b", "c"], "time": seconds})
    pq.write_table(table, tmp_path / "t.parquet")
    first, second, third = outcomes(tmp_path / "t.parquet", ["text", "time"])
    assert (first["text"], third["text"]) == ("a", "c")
    assert isinstance(second, dict) or second.startswith("time cannot be read")


# Each runs in a process of its own: how much memory it ever had is known of a process only.
LARGE = {
    "20 million candidates": (
        """pq.write_table(pa.table({"list": pa.array([["a"], ["b"] * 20_000_000, ["c"]])}), path)""",
        "list has 20000000 entries, more than max_candidates 100000",
    ),
    "one text of 200 MB": (
        """pq.write_table(pa.table({"list": ["a", "b" * 200_000_000, "c"]}), path)""",
        "the row has more than max_row_bytes 67108864",
    ),
    "a line of 100 MB": (
        """path.write_bytes(b'{"list": "a"}\\n{"list": "' + b"b" * 100_000_000 + b'"}\\n{"list": "c"}\\n')""",
        "line 2: more than max_row_bytes 67108864",
    ),
    "a line of 1 GB without an end": (
        """path.write_bytes(b'{"list": "a"}\\n'); os.truncate(path, 1 << 30)""",
        "line 2: more than max_row_bytes 67108864",
    ),
    "deeply nested": (
        """path.write_bytes(b'{"list": "a"}\\n' + b"[" * 1_000_000 + b'\\n{"list": "c"}\\n')""",
        "line 2: no JSON that can be read (nested too deeply)",
    ),
}
READ = """
import sys
from pathlib import Path
from peak_memory import peak_memory
from gen2embed_mteb.data_files.parquet import read_rows
from gen2embed_mteb.data_files.rows import RowFault, RowLimits
from gen2embed_mteb.data_files.json_lines import JsonLines
path = Path(sys.argv[1])
lines = "line" in sys.argv[2] or "nested" in sys.argv[2]
rows = JsonLines(path).rows(["list"]) if lines else read_rows(path, ["list"], RowLimits())
print(*[row.reason if isinstance(row, RowFault) else "".join(row["list"]) for row in rows], sep="\\n")
print(peak_memory() >> 20)
"""


@pytest.mark.parametrize("kind", sample_of(LARGE, list(LARGE)[1:3]))
@pytest.mark.slow
def test_large_rows_in_bounded_memory(tmp_path: Path, kind: str) -> None:
    make, reason = LARGE[kind]
    path = tmp_path / "large"
    head = "import os\nimport sys\nfrom pathlib import Path\nimport pyarrow as pa, pyarrow.parquet as pq\n"
    subprocess.run([sys.executable, "-c", f"{head}path = Path(sys.argv[1])\n{make}", str(path)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(HELPERS)}
    command = [sys.executable, "-c", READ, str(path), kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *rows, megabytes = done.stdout.splitlines()
    assert rows == ["a", reason, *(["c"] if "without an end" not in kind else [])]
    assert int(megabytes) < 1200


def test_a_json_line_is_cut_at_the_limit_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    for length in (20, 21, 22, 5000):
        long = '{"a": "' + "x" * (length - 9) + '"}'
        path.write_text(f'{long}\n{{"a": "y"}}\n{long}')
        rows = list(JsonLines(path).rows(["a"], limits=RowLimits(max_row_bytes=21)))
        fits = length + 1 <= 21  # with its line break
        assert [isinstance(row, dict) for row in rows] == [fits, True, length <= 21]
