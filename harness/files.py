"""The files of a run folder, written so that a run which is killed at any moment leaves whole ones."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from harness.options import fail


def write_text(path: Path, text: str) -> None:
    """Writes a second file and renames it: at any moment `path` holds the old text or the new text, never a half."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    os.replace(temporary, path)


def read_lines(path: Path) -> list[dict]:
    """The records of a JSON Lines file. A killed process may have left half a line at the end: it is ignored."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Calls write(temporary folder), then renames that folder to `path` and so replaces what was there. At any moment
    `path` is the old folder, the new one, or for an instant none, but never half of one."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    old = temporary.with_name(temporary.name + "-old")
    try:
        write(temporary)
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def new_folder(out: Path, name: str | None) -> Path:
    """Makes <out>/<name>; without a name the first free one of <out>/<script>-1, -2, ..."""
    script = Path(sys.argv[0]).stem or "run"
    number = 1
    while True:
        folder = out / (name or f"{script}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            if name:
                fail(f"--name {name}: {folder} exists already; choose another, or --resume it")
            number += 1


def checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints of a run folder, by step. Each is a whole one, because write_folder has renamed it into place."""
    found = {}
    for path in folder.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit():  # otherwise it is the user's own, such as a copy named checkpoint-old
            found[int(step)] = path
    return found


def last_checkpoint(folder: Path) -> Path:
    """The checkpoint of the latest step."""
    found = checkpoints(folder)
    if not found:
        fail(f"--resume {folder}: there is no checkpoint in it")
    return found[max(found)]


def cut_back(folder: Path, step: int) -> None:
    """Removes from a run folder what was logged after `step`, and what a killed process has left half-written."""
    for leftover in folder.glob(".*-*"):
        shutil.rmtree(leftover)
    for file in folder.glob("*.jsonl"):
        kept = [record for record in read_lines(file) if record["step"] <= step]
        write_text(file, "".join(json.dumps(record) + "\n" for record in kept))
