"""Measures what the methods do on Countdown and on arithmetic, and what their options change.

    python experiments/compare.py --quick           the methods on countdown and easy, 3 seeds: runs/compare/quick.md
    python experiments/compare.py                   everything: the files of experiments/data and the figures
    python experiments/compare.py --only parts gtpo these questions; the other rows of the data stay
    python experiments/compare.py --only methods --settings long --seeds 5 10   only these settings, and seeds 5 to 9
    python experiments/tables.py parts gtpo         prints the tables

plan.py lists the questions, training_runs.py runs what they ask for, and tables.py and figures.py show the data.

Exit status: 0 done; 1 some runs failed: they are named, and the rest is written; 2 wrong options; 130, 143 stopped.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(ROOT))

import figures
import training_runs
from cost import cost
from data_files import read_rows, write_rows
from plan import METHODS, QUESTIONS
from tables import report

from harness import files
from harness.options import bounded, fail


def variant_of(options: dict) -> str:
    """The options of a row of the plan, as the tables name them."""
    return " ".join(f"{name}={value}" for name, value in options.items() if name != "eval_every")


def key(row: dict) -> tuple:
    """What a row is about."""
    return row["question"], row["setting"], row["method"], row["variant"] or "", row["seed"]


def update(path: Path, new: list[dict]) -> list[dict]:
    """Puts the rows into a file, in the place of those about the same. In the order of the plan, then by seed."""
    replaced = {key(row) for row in new}
    rows = [*new, *(row for row in read_rows(path) if key(row) not in replaced)]
    places: dict[tuple, int] = {}
    for question, (_, planned) in QUESTIONS.items():
        for setting, method, options in planned:
            places[question, setting, method, variant_of(options)] = len(places)
    rows = [row for row in rows if key(row)[:4] in places]  # the plan may have changed
    rows.sort(key=lambda row: (places[key(row)[:4]], row["seed"]))  # a stable sort
    if rows:
        write_rows(path, rows)
    return read_rows(path)


def main(argv: list[str] | None = None, out: Path = HERE) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail  # type: ignore[method-assign, assignment]
    positive = bounded(int, at_least=1)
    parser.add_argument("--quick", action="store_true", help="the methods on countdown and easy, 3 seeds")
    questions = [*QUESTIONS, "cost"]
    parser.add_argument("--only", nargs="+", choices=questions, metavar="QUESTION", help=", ".join(questions))
    settings = list(training_runs.SETTINGS)
    parser.add_argument("--settings", nargs="+", choices=settings, metavar="SETTING", help=", ".join(settings))
    parser.add_argument("--seeds", nargs=2, type=int, metavar=("FIRST", "STOP"), help="seeds FIRST to STOP - 1")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count(), metavar="N", help="runs at a time [cores]")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "compare", help="folder of the runs")
    args = parser.parse_args(argv)
    if args.quick and (args.only or args.settings):
        fail("--quick chooses questions and settings itself: give no --only and no --settings")
    if args.seeds and not 0 <= args.seeds[0] < args.seeds[1]:
        fail(f"--seeds {args.seeds[0]} {args.seeds[1]}: give a first seed and a larger number to stop at")
    try:
        args.work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--work {args.work}: {error.strerror}")

    asked = ["methods"] if args.quick else args.only or questions
    settings = ["countdown", "easy"] if args.quick else args.settings or settings
    wanted = []  # (question, run, options as the question names them)
    for question, (n_seeds, planned) in QUESTIONS.items():
        if question not in asked:
            continue
        seeds = range(*args.seeds) if args.seeds else range(3 if args.quick else n_seeds)
        for setting, method, options in planned:
            if setting in settings:
                for seed in seeds:
                    wanted.append((question, training_runs.planned_run(setting, method, options, seed), options))
    unique_runs = list(dict.fromkeys(run for _, run, _ in wanted))
    summaries = training_runs.execute_all(unique_runs, args.work, args.jobs)

    rows = []
    curves = []
    evaluations = []
    for question, run, options in wanted:
        if run not in summaries:
            continue
        folder = args.work / training_runs.name_of(run)
        about = {"question": question, "setting": run.setting, "method": run.method, "variant": variant_of(options)}
        about["seed"] = run.seed
        rows.append({**about, "options": " ".join(training_runs.command_line(run.options)), **summaries[run]})
        if question in ("methods", "real"):
            n_tokens = training_runs.config_of(run)["stop_tokens"]
            n_points = 30 if question == "methods" else 10  # of `real`, a point is the mean of some four steps
            curves += [{**about, **point} for point in training_runs.curve(folder, n_tokens, n_points)]
        if "eval_every" in options:
            evaluations += [{**about, **point} for point in training_runs.trajectory(folder)]
    if args.quick:
        rows = update(args.work / "quick.csv.gz", rows)
        files.write_text(args.work / "quick.md", report(rows, [], []))
        print(args.work / "quick.md")
    else:
        data = out / "data"
        data.mkdir(exist_ok=True)
        rows = update(data / "results.csv.gz", rows)
        curves = update(data / "curves.csv.gz", curves)
        evaluations = update(data / "frontier.csv.gz", evaluations)
        if "cost" in asked:
            write_rows(data / "cost.csv.gz", cost(METHODS, training_runs.prepare("easy", args.work)[1]))
        figures.draw(rows, curves, evaluations, out)
    failed = len(unique_runs) - len(summaries)
    if failed:
        print(f"{failed} runs failed", file=sys.stderr)
    return 1 if failed else 0


def stop(number: int, _) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    sys.exit(main())
