"""The files of a run folder, written so that a run which is killed at any moment leaves whole ones."""

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from harness.options import fail

# What a run appends to, and what `write_folder` leaves when it is killed.
LOGS = ("metrics.jsonl", "timing.jsonl", "completions.jsonl", "eval_completions.jsonl")
LEFTOVER = re.compile(r"\.((model|best|adapter)-[a-z0-9_]{8}|checkpoint-[0-9]+-[a-z0-9_]+)(-old)?")


def write_text(path: Path, text: str) -> None:
    """Writes a second file and renames it: at any moment `path` holds the old text or the new text, never a half."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    os.replace(temporary, path)


def read_lines(path: Path) -> list[dict]:
    """The records of a log of a run. A killed process may have left half a line at the end: it is ignored."""
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
            record["step"] + 0  # every record of a run has it
        except (ValueError, TypeError, KeyError):
            break
        records.append(record)
    return records


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Calls write(temporary folder), then renames that folder to `path` and so replaces what was there. `path`
    is never half-written. For a moment it can be missing."""
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
        step = re.fullmatch(r"checkpoint-(0|[1-9][0-9]*)", path.name)
        if step and path.is_dir():  # otherwise it is the user's own, such as a copy named checkpoint-old
            found[int(step[1])] = path
    return found


def last_checkpoint(folder: Path) -> Path:
    """The checkpoint of the latest step."""
    found = checkpoints(folder)
    if not found:
        fail(f"--resume {folder}: there is no checkpoint in it")
    return found[max(found)]


def cut_back(folder: Path, step: int) -> None:
    """Removes from a run folder what was logged after `step`, and what a killed process has left half-written. Whatever
    a run does not write itself is the user's, and stays."""
    for leftover in folder.glob(".*"):
        if LEFTOVER.fullmatch(leftover.name) and leftover.is_dir():
            shutil.rmtree(leftover)
    for name in LOGS:
        if (folder / name).exists():
            kept = [record for record in read_lines(folder / name) if record["step"] <= step]
            write_text(folder / name, "".join(json.dumps(record) + "\n" for record in kept))
