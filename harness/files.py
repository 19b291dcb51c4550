"""How files are written so that a run which is killed leaves whole ones, and what is made of them."""

import importlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from options import fail


def write_text(path: Path, text: str) -> None:
    """Writes beside the file and renames: it holds the old text or the new, never half of one."""
    beside = path.with_name(f".{path.name}")
    beside.write_text(text)
    os.replace(beside, path)


def read_lines(path: Path) -> list[dict]:
    """The records of a JSON Lines file, but for half a line at its end, which a killed process has left."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def write_folder(path: Path, write) -> None:
    """Calls write(temporary folder) and renames the result to `path`, replacing what was there: whoever reads `path`
    finds the old folder, the new one, or none, but never half of one."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        write(temporary)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cut_back(folder: Path, step: int) -> None:
    """Removes from a run folder what was logged after `step`, and what a killed process left half-written."""
    for leftover in folder.glob(".*-*"):
        shutil.rmtree(leftover)
    for file in folder.glob("*.jsonl"):
        kept = [record for record in read_lines(file) if record["step"] <= step]
        file.write_text("".join(json.dumps(record) + "\n" for record in kept))


def last_checkpoint(folder: Path) -> Path:
    """The checkpoint of the latest step. Each that has its name is whole."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    if not found:
        fail(f"--resume {folder}: there is no checkpoint in it")
    return found[-1]


def new_folder(out: Path, name: str | None) -> Path:
    """<out>/<name>, or for no name the first free of <out>/<script>-1, -2, ..."""
    stem, number = Path(sys.argv[0]).stem or "run", 1
    while True:
        folder = out / (name or f"{stem}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            if name:
                fail(f"--name {name}: {folder} exists already; choose another, or --resume it")
            number += 1


def tracker(kind: str, folder: Path, config: dict):
    """A function that sends a step's metrics on to a tracker."""
    if kind == "none":
        return lambda metrics: None
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder / "tensorboard")
        return lambda metrics: [writer.add_scalar(name, v, metrics["step"]) for name, v in metrics.items()]
    library = importlib.import_module(kind)  # wandb and trackio share these two calls
    library.init(project="entropy-rl", name=folder.name, config=config)
    return lambda metrics: library.log(metrics, step=metrics["step"])


def plot(folder: Path) -> None:
    """Draws reward, entropy and length over the steps of metrics.jsonl into curves.png."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not (folder / "metrics.jsonl").exists():
        return
    rows = read_lines(folder / "metrics.jsonl")
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3), layout="constrained")
    for axis, key in zip(axes, ("reward", "entropy", "completions/mean_length"), strict=True):
        axis.plot([row["step"] for row in rows], [row[key] for row in rows])
        axis.set(title=key, xlabel="step")
    figure.savefig(folder / "curves.png", dpi=120)
    pyplot.close(figure)
