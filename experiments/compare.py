"""Measures what the five methods do on the tiny task, and what their options change.

    python experiments/compare.py --quick           the methods on `easy`, 3 seeds: quick.csv and quick.md
    python experiments/compare.py                   everything: results.csv, curves.csv, cost.csv, tables.md, figures
    python experiments/compare.py --only gtpo egsw  these questions; the other rows of results.csv stay

A cell is one run of a script: a setting, a method, its options and a seed. All cells of a setting start from the same
base, and all cells of a seed draw the same prompts. All stop after TOKENS sampled completion tokens, including those
that dynamic sampling throws away, and all are evaluated in the same way. Each cell runs on one thread, --jobs of them
at a time, and leaves its folder in --work. A finished cell runs again only if its options, its setting or the defaults
of its script have changed. A cell that several questions share runs once. On the same kind of CPU, a second run gives
the same files, except for cost.csv.

Exit status: 0 done; 1 some cells failed: they are named, and the rest is written; 2 wrong options; 130, 143 stopped.
"""

import argparse
import csv
import dataclasses
import functools
import importlib
import io
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import figures
from cost import cost
from tables import report

from harness import files, tiny
from harness.options import bounded, fail

METHODS = ("grpo", "dapo", "egsw", "gtpo", "grpo_s")
TOKENS = 450_000  # completion tokens of a run: what 60 steps of GRPO sample on `easy`
EVALUATION = dict(eval_rows=256, eval_k=32)
TRAIN_ROWS = 4096  # of a setting with terms of its own
# recipe: what the warm start of the base changes in tiny.RECIPE. terms: of the chains to train and to evaluate on.
SETTINGS = {
    "easy": dict(recipe={}, terms=None, max_new_tokens=64),
    "trap": dict(recipe=dict(guess=0.5), terms=None, max_new_tokens=64),
    "long": dict(recipe={}, terms=(6, 8), max_new_tokens=96),
}
SEEDS = dict(methods=5, gtpo=3, egsw=3, egsw_forms=3, grpo_s=3, updates=3, reduction=3)
QUESTIONS = (*SEEDS, "cost")
CURVE_POINTS = 30


# --- the cells --------------------------------------------------------------------------------------------------------


def plan(question: str) -> list[tuple[str, str, dict]]:
    """The lines of a question's tables as (setting, method, options). In each setting, the others are compared with the
    first one."""

    def lines(settings, method, *options):
        return [(setting, method, o) for setting in settings for o in options]

    def product(**values):
        return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]

    if question == "methods":
        return [(setting, method, {}) for setting in SETTINGS for method in METHODS]
    if question == "gtpo":
        readings = [dict(normalize="own"), *product(compare=["row", "matrix"]), dict(compare="row", mean="geometric")]
        options = [{}, *readings, *product(alpha2=[0.0, 0.05, 0.2, 0.5]), dict(alpha1=0.9, alpha2=0.1)]
        group, batch = ([dict(scope=scope) | o for o in options] for scope in ("group", "batch"))
        return lines(SETTINGS, "gtpo", *batch) + lines(("easy", "long"), "gtpo", *group) + [("trap", "gtpo", group[0])]
    if question == "egsw":
        # The cells that end in short guesses take many steps, so they cost most.
        means = ["token", "sequence"]
        easy = product(reduction=means, weight_temperature=[1.0, 2.0, 4.0, 8.0], alpha=[0.0, 0.1, 0.5, 1.0])
        trap = product(reduction=means, weight_temperature=[2.0, 4.0, 8.0], alpha=[0.0, 0.5])
        long = product(reduction=means[:1], weight_temperature=[1.0, 2.0, 4.0, 8.0], alpha=[0.0, 0.5])
        return lines(("easy",), "egsw", *easy) + lines(("trap",), "egsw", *trap) + lines(("long",), "egsw", *long)
    if question == "egsw_forms":
        kinds = ("grpo", "token"), ("grpo", "sequence"), ("rloo", "sequence"), ("dr_grpo", "constant")
        kinds = [dict(advantage=advantage, reduction=reduction) for advantage, reduction in kinds]
        forms = product(step_wise=[True, False], mean_one=[True, False])
        weighted = [{**kind, **form} for kind in kinds for form in forms]
        return lines(("easy",), "grpo", *kinds) + lines(("easy",), "egsw", *weighted)
    if question == "grpo_s":
        return lines(("easy",), "grpo_s", *product(minibatches=[1, 4, 16], ratio=["geometric", "arithmetic"]))
    # The defaults of the scripts differ in more than the method. These questions remove one difference at a time.
    if question == "updates":
        settings, options = ("easy", "long"), product(minibatches=[1, 4])
        return [line for o in options for method in METHODS for line in lines(settings, method, o)]
    if question == "reduction":
        options = product(reduction=["sequence", "token", "constant"])
        return [line for method in ("grpo", "egsw", "grpo_s") for line in lines(SETTINGS, method, *options)]


@functools.cache
def defaults(method: str) -> dict:
    return {f.name: f.default for f in dataclasses.fields(importlib.import_module(method).Config)}


def new_cell(setting: str, method: str, options: dict, seed: int) -> tuple:
    """(setting, method, options that are not the script's defaults, seed), the same for the same run."""
    changed = {name: value for name, value in options.items() if defaults(method)[name] != value}
    return setting, method, tuple(sorted(changed.items())), seed


def name_of(cell: tuple) -> str:
    setting, method, options, seed = cell
    return "-".join([setting, method, *(f"{name}={value}" for name, value in options), f"seed={seed}"])


def identity(cell: tuple) -> dict:
    """Everything that decides the cell's result, except the code. It is stored with the result."""
    setting, method, options, seed = cell
    shape = SETTINGS[setting] | dict(recipe=tiny.RECIPE | SETTINGS[setting]["recipe"], rows=TRAIN_ROWS)
    config = {**defaults(method), **dict(options), **EVALUATION, "seed": seed, "stop_tokens": TOKENS}
    return json.loads(json.dumps({"method": method, "setting": shape, "model": tiny.MODEL, "config": config}))


def finished(cell: tuple, work: Path) -> dict | None:
    """The summary of a cell, if it has been run to its end with the same identity as now."""
    try:
        stored = json.loads((work / name_of(cell) / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return stored["summary"] if stored["identity"] == identity(cell) else None


def prepare(setting: str, work: Path) -> list[str]:
    """The setting's base and data, as options of a script. Makes them if they are missing."""
    shape, threads = SETTINGS[setting], torch.get_num_threads()
    name = "-".join(["base", *(f"{key}={value}" for key, value in shape["recipe"].items())])
    torch.set_num_threads(1)  # so that the base is the same on every number of cores
    base = tiny.base(work / name, shape["recipe"])
    torch.set_num_threads(threads)
    options = ["--model", str(base), "--max-new-tokens", str(shape["max_new_tokens"])]
    if shape["terms"]:
        for flag, rows, held_out in (
            ("--dataset", TRAIN_ROWS, False),
            ("--eval-dataset", EVALUATION["eval_rows"], True),
        ):
            path = work / f"{setting}{'-held-out' if held_out else ''}.jsonl"
            lines = [json.dumps(row) + "\n" for row in tiny.problems(rows, 0, held_out, *shape["terms"])]
            files.write_text(path, "".join(lines))
            options += [flag, str(path)]
    return options


def command_line(options) -> list[str]:
    """Pairs of name and value, as arguments of a script."""
    result = []
    for name, value in options:
        flag = name.replace("_", "-")
        result += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return result


def start(cell: tuple, work: Path, inputs: list[str]) -> subprocess.Popen:
    """Starts a cell's script from its beginning, in its own process group. What it prints goes to <cell>.log."""
    _, method, options, seed = cell
    shutil.rmtree(work / name_of(cell), ignore_errors=True)
    command = [sys.executable, ROOT / f"{method}.py", "--out", work, "--name", name_of(cell), *inputs]
    command += ["--steps", "1000000", "--stop-tokens", str(TOKENS), "--seed", str(seed), "--no-save-plots"]
    command += command_line([*options, *EVALUATION.items(), ("log_completions", 0)])
    with open(work / f"{name_of(cell)}.log", "w") as log:
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=log, stderr=log, env=one_thread, start_new_session=True)


def run_cells(cells: list[tuple], work: Path, jobs: int) -> dict[tuple, dict]:
    """Runs the cells that are not finished, `jobs` at a time. Returns the summaries by cell; a failed cell has none."""
    summaries = {cell: finished(cell, work) for cell in cells}
    waiting = [cell for cell, summary in summaries.items() if summary is None]
    print(f"{len(summaries)} cells, {len(summaries) - len(waiting)} of them finished before", flush=True)
    inputs = {setting: prepare(setting, work) for setting in dict.fromkeys(cell[0] for cell in waiting)}
    total, done, running = len(waiting), 0, {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                running[cell] = start(cell, work, inputs[cell[0]]), time.monotonic()
            time.sleep(0.05)
            for cell, (process, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[cell]
                done += 1
                try:
                    if process.returncode:
                        raise ValueError(f"exit status {process.returncode}")
                    summaries[cell] = settle(cell, work)
                except (OSError, ValueError, KeyError) as error:
                    print(f"{name_of(cell)}: FAILED ({error}); see {work / name_of(cell)}.log", file=sys.stderr)
                    continue
                s, k = summaries[cell], f"mean@{EVALUATION['eval_k']}"
                print(f"[{done}/{total}] {name_of(cell)}: {s['before ' + k]:.3f} -> {s['after ' + k]:.3f}, "
                      f"{s['steps']} steps, {time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
    finally:
        for process, _ in running.values():  # the next time the cell starts again, so it need not end well
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {cell: summary for cell, summary in summaries.items() if summary}


def settle(cell: tuple, work: Path) -> dict:
    """Writes the summary of a run that has ended, and deletes its large files, which nothing here reads."""
    folder = work / name_of(cell)
    summary = summarise(folder)
    for large in (folder / "model", *folder.glob("checkpoint-*")):
        shutil.rmtree(large)
    for large in folder.glob("*completions.jsonl"):
        large.unlink()
    stored = {"identity": identity(cell), "summary": summary}
    files.write_text(folder / "summary.json", json.dumps(stored, indent=1) + "\n")
    return summary


# --- what a run says --------------------------------------------------------------------------------------------------


def running_mean(values: list[float], width: int) -> list[float]:
    """Means of each `width` values in a row, from the first `width` on."""
    return [statistics.fmean(values[i : i + width]) for i in range(len(values) - width + 1)]


def summarise(folder: Path) -> dict:
    """The numbers of a run folder that results.csv holds.

    steps to 0.8: the first step at which the mean reward of the last 5 is 0.8 or more (None: never); tokens to 0.8:
    completion tokens sampled until then. Entropies, in nats, are means over a tenth of the steps: the first tenth, the
    lowest, and the last. rebound: the last over the lowest of those before it; above 1 the entropy has risen again.
    """
    metrics, timing = files.read_lines(folder / "metrics.jsonl"), files.read_lines(folder / "timing.jsonl")
    tokens = list(itertools.accumulate(line["tokens"] for line in timing))
    reached = next((i + 5 for i, r in enumerate(running_mean([m["reward"] for m in metrics], 5)) if r >= 0.8), None)
    width = max(1, len(metrics) // 10)
    entropy = running_mean([m["entropy"] for m in metrics], width)
    summary = {
        "steps": len(metrics),
        "tokens": tokens[-1],
        "steps to 0.8": reached,
        "tokens to 0.8": reached and tokens[reached - 1],
        "entropy first": entropy[0],
        "entropy lowest": min(entropy),
        "entropy last": entropy[-1],
        "rebound": entropy[-1] / max(min(entropy[:-width] or entropy), 1e-9),
        "skipped updates": sum(m["skipped_updates"] for m in metrics),
    }
    before, after = json.loads((folder / "eval.json").read_text())
    for when, result in (("before", before), ("after", after)):
        summary |= {f"{when} {key}": v for key, v in result.items() if key != "step" and not key.endswith("_ci")}
    return summary


def curve(folder: Path) -> list[dict]:
    """Reward, entropy (nats) and length (tokens) of a run's steps at CURVE_POINTS equal numbers of sampled tokens."""
    metrics = files.read_lines(folder / "metrics.jsonl")
    tokens = list(itertools.accumulate(line["tokens"] for line in files.read_lines(folder / "timing.jsonl")))
    points, i = [], 0
    for point in range(1, CURVE_POINTS + 1):
        at = TOKENS * point // CURVE_POINTS
        first = i
        while i < len(tokens) - 1 and tokens[i] < at:
            i += 1
        some = metrics[first : i + 1]  # from the step that reached the last point to the one that reaches this point
        keys = dict(reward="reward", entropy="entropy", length="completions/mean_length")
        points.append({"tokens": at} | {name: statistics.fmean(m[key] for m in some) for name, key in keys.items()})
    return points


# --- files ------------------------------------------------------------------------------------------------------------


def read_csv(path: Path) -> list[dict]:
    """Rows of a CSV file, with numbers as numbers and empty fields as None. No file: no rows."""

    def value(text: str):
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                pass
        return text or None

    if not path.exists():
        return []
    with open(path, newline="") as f:
        return [
            {k: (v if k in ("variant", "options") else value(v)) for k, v in row.items()} for row in csv.DictReader(f)
        ]


def write_csv(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    table.writeheader()
    for row in rows:
        table.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in row.items()})
    files.write_text(path, text.getvalue())


def main(argv: list[str] | None = None, out: Path = HERE) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    positive = bounded(int, at_least=1)
    parser.add_argument("--quick", action="store_true", help="the methods on `easy`, 3 seeds")
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, metavar="QUESTION", help=", ".join(QUESTIONS))
    parser.add_argument("--seeds", type=positive, metavar="N", help="seeds 0 to N-1 for every question")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count(), metavar="N", help="cells at a time [cores]")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "compare", help="folder of the cells")
    args = parser.parse_args(argv)
    if args.quick and args.only:
        fail("--quick and --only: give one of them")
    try:
        args.work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--work {args.work}: {error.strerror}")

    asked = ["methods"] if args.quick else args.only or QUESTIONS
    wanted = []  # (question, cell, options as the question names them)
    for question in (q for q in SEEDS if q in asked):
        for setting, method, options in plan(question):
            if setting == "easy" or not args.quick:
                seeds = args.seeds or (3 if args.quick else SEEDS[question])
                wanted += [(question, new_cell(setting, method, options, seed), options) for seed in range(seeds)]
    summaries = run_cells(list(dict.fromkeys(cell for _, cell, _ in wanted)), args.work, args.jobs)
    rows, curves = [], []
    for question, cell, options in wanted:
        if cell in summaries:
            setting, method, changed, seed = cell
            variant = " ".join(f"{name}={value}" for name, value in options.items())
            given = " ".join(command_line(changed))
            about = dict(question=question, setting=setting, method=method, variant=variant, options=given, seed=seed)
            rows.append(about | summaries[cell])
            if question == "methods":
                about = dict(setting=setting, method=method, seed=seed)
                curves += [about | point for point in curve(args.work / name_of(cell))]
    name = "quick" if args.quick else "results"
    if not args.quick:
        rows += [row for row in read_csv(out / "results.csv") if row["question"] not in asked]
        rows.sort(key=lambda row: QUESTIONS.index(row["question"]))  # a stable sort: the order inside a question stays
        if curves:
            write_csv(out / "curves.csv", curves)
        if "cost" in asked:
            write_csv(out / "cost.csv", cost(METHODS, prepare("easy", args.work)[1]))
    if rows:
        write_csv(out / f"{name}.csv", rows)
        rows = read_csv(out / f"{name}.csv")  # the tables say what the file says
    text = report(rows, [] if args.quick else read_csv(out / "cost.csv"), TOKENS)
    files.write_text(out / ("quick.md" if args.quick else "tables.md"), text)
    if not args.quick:
        figures.draw(rows, read_csv(out / "curves.csv"), out)
    failed = len({cell for _, cell, _ in wanted}) - len(summaries)
    if failed:
        print(f"{failed} cells failed", file=sys.stderr)
    return 1 if failed else 0


def stop(number: int, _) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    sys.exit(main())
