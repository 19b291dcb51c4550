"""Reads and writes the tables of experiments/data: CSV, compressed with gzip. The same rows give the same bytes."""

import csv
import gzip
import io
import os
from pathlib import Path

DATA = Path(__file__).resolve().parent / "data"


def read_rows(path: Path) -> list[dict]:
    """The rows of a file, with numbers as numbers and empty fields as None. No file: no rows."""
    if not path.exists():
        return []
    with gzip.open(path, "rt", newline="") as file:
        rows = []
        for row in csv.DictReader(file):
            rows.append({name: text if name in ("variant", "options") else value(text) for name, text in row.items()})
        return rows


def value(text: str) -> int | float | str | None:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            pass
    return text or None


def write_rows(path: Path, rows: list[dict]) -> None:
    """Writes floats with six digits. A process that is killed leaves the old file or the new one, never half of it."""
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    for row in rows:
        table.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in row.items()})
    temporary = path.with_name(f".{path.name}")
    # No name and no time of writing in the header: they would make other bytes of the same rows.
    with open(temporary, "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as compressed:
        compressed.write(text.getvalue().encode())
    os.replace(temporary, path)
