"""Measures what the methods do on Countdown and on arithmetic, and what their options change.

    python experiments/compare.py --quick           the methods on `countdown` and `easy`, 3 seeds: quick.csv, quick.md
    python experiments/compare.py                   everything: the CSV files, tables.md and the figures
    python experiments/compare.py --only parts gtpo these questions; the other rows of results.csv stay
    python experiments/compare.py --only methods --settings long --seeds 5 10   only these settings, and seeds 5 to 9

cells.py says what a cell is and how it runs; tables.py and figures.py say what is made of results.csv.

Exit status: 0 done; 1 some cells failed: they are named, and the rest is written; 2 wrong options; 130, 143 stopped.
"""

import argparse
import csv
import io
import itertools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(ROOT))

import cells
import figures
from cells import SETTINGS, new_cell, run_cells
from cost import cost
from tables import report

from harness import files
from harness.options import bounded, fail

METHODS = ("grpo", "dapo", "egsw", "gtpo", "grpo_s")
NEIGHBOURS = ("more.forking", "more.cov", "more.entropy_advantage", "more.quantile", "more.cispo")
ARITHMETIC = ("easy", "trap", "long")
OFTEN = dict(eval_every=27)  # evaluates a Countdown run four times on its way
TWICE = dict(eval_every=54)
SLOWLY = dict(lr=2e-4) | TWICE  # a learning rate that fits four updates per rollout on Countdown
# The weights that EGSW gives right and wrong completions of the Countdown base on average: scale.py measures them.
MATCHED = dict(right_scale=1.8, wrong_scale=0.65)
SEEDS = dict(methods=10, frontier=3, parts=5, gtpo_terms=5, grpo_s_terms=5, size=3, sgd=3, neighbours=5,
             neighbour_options=5, gtpo=3, egsw=3, egsw_forms=3, grpo_s=3, updates=3, reduction=3)  # fmt: skip
QUESTIONS = (*SEEDS, "cost")

# Each neighbour's own option: its default, and two more values.
NEIGHBOUR_OPTIONS: list[tuple[str, dict]] = [
    *(("more.forking", dict(rho=rho)) for rho in (0.2, 0.1, 0.5)),
    *(("more.cov", dict(share=share)) for share in (2e-4, 0.01, 0.05)),
    *(("more.cov", dict(kind="kl", share=share)) for share in (2e-4, 0.01, 0.05)),
    *(("more.entropy_advantage", dict(alpha=alpha)) for alpha in (0.4, 0.1, 1.6)),
    *(("more.quantile", dict(quantile=quantile)) for quantile in (0.4, 0.2, 0.6)),
    *(("more.cispo", dict(clip_high=clip_high)) for clip_high in (4.0, 0.28, 1.0)),
]

Line = tuple[str, str, dict]  # of a table: setting, method, options


# --- the plan ---------------------------------------------------------------------------------------------------------


def product(**values: list) -> list[dict]:
    """Every combination of these options."""
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def plan(question: str) -> Iterator[Line]:
    """The lines of a question's tables. In each setting, the others are compared with the first one."""
    if question == "methods":
        for method in METHODS:
            yield "countdown", method, OFTEN
            for setting in ARITHMETIC:
                yield setting, method, {}
    if question == "frontier":
        for method in METHODS:
            yield "countdown", method, OFTEN
            for lr in (2e-4, 1.2e-3):
                yield "countdown", method, dict(lr=lr, eval_every=54)
            yield "countdown", method, dict(stop_tokens=2 * cells.TOKENS, eval_every=108)
        for options in (OFTEN, dict(lr=2e-4, eval_every=54), dict(lr=1.2e-3, eval_every=54)):
            yield "countdown", "egsw", dict(step_wise=False) | options
    if question == "parts":
        yield "countdown", "grpo", OFTEN
        yield "countdown", "egsw", OFTEN
        for alpha in (0.0, 2.0):
            yield "countdown", "egsw", dict(alpha=alpha)
        for P in (0.5, 1.0, 4.0, 8.0):
            yield "countdown", "egsw", dict(weight_temperature=P)
        yield "countdown", "egsw", dict(step_wise=False)
        yield "countdown", "egsw", dict(step_wise=False, alpha=0.0)
        yield "countdown", "grpo", dict(reduction="token")
        yield "countdown", "grpo", dict(reduction="token", lr=3e-4)
        yield "countdown", "controls", dict(reduction="token") | MATCHED
        for wrong_scale in (0.5, 0.0):
            yield "countdown", "controls", dict(reduction="token", wrong_scale=wrong_scale)
        yield "countdown", "controls", dict(reduction="token", right_scale=0.0)
        yield "countdown", "controls", dict(reduction="token", hard_power=0.5)
        yield "countdown", "controls", dict(reduction="token", hard_power=0.5) | MATCHED
        for entropy_bonus in (0.01, 0.03, 0.1):
            yield "countdown", "controls", dict(reduction="token", entropy_bonus=entropy_bonus)
    if question == "gtpo_terms":
        yield "countdown", "gtpo", OFTEN
        for alpha2 in (0.0, 0.5, 1.0):
            yield "countdown", "gtpo", dict(alpha2=alpha2)
        yield "countdown", "gtpo", dict(entropy_min=0.1)
        yield "countdown", "gtpo", dict(scope="batch")
        yield "countdown", "gtpo", dict(scope="batch", alpha2=0.0)
    if question == "grpo_s_terms":
        yield "countdown", "grpo_s", OFTEN
        for beta2 in (0.0, 0.5, 1.0):
            yield "countdown", "grpo_s", dict(beta2=beta2)
        yield "countdown", "grpo_s", dict(entropy_min=0.1)
    if question == "size":
        for method in METHODS:
            yield "countdown-large", method, {}
        yield "countdown-large", "controls", dict(reduction="token") | MATCHED
        yield "countdown-large", "controls", dict(reduction="token", wrong_scale=0.0)
    if question == "sgd":
        for setting, method in itertools.product(("easy", "long"), METHODS):
            yield setting, method, {}
            for lr in (0.03, 0.1, 0.3):
                yield setting, method, dict(optimizer="sgd", lr=lr)
            if method == "egsw":  # weights whose sum is one over a group of 8: an eighth of the gradient
                yield setting, method, dict(mean_one=False)
                for lr in (0.1, 0.8):
                    yield setting, method, dict(mean_one=False, optimizer="sgd", lr=lr)
    if question == "neighbours":  # most of them take four updates per rollout, so GRPO with four is a reference too
        four_updates = dict(reduction="token", minibatches=4)
        # By setting: the options of GRPO, which are those of other questions so that cells are shared, and of the rest.
        groups = [("countdown", OFTEN, TWICE), ("countdown", SLOWLY, SLOWLY)]
        groups += [(setting, {}, {}) for setting in ARITHMETIC]
        for setting, options_of_grpo, options in groups:
            yield setting, "grpo", options_of_grpo
            yield setting, "grpo", four_updates | options
            for method in NEIGHBOURS:
                yield setting, method, options
            yield setting, "more.cov", dict(kind="kl") | options
    if question == "neighbour_options":
        for minibatches in (4, 1):
            yield "countdown", "grpo", dict(reduction="token", minibatches=minibatches) | SLOWLY
        for method, options in NEIGHBOUR_OPTIONS:
            yield "countdown", method, options | SLOWLY
    if question == "gtpo":
        readings = [{}, dict(normalize="own"), dict(compare="row"), dict(compare="matrix"),
                    dict(compare="row", mean="geometric"), dict(alpha2=0.0), dict(alpha2=0.05), dict(alpha2=0.2),
                    dict(alpha2=0.5), dict(alpha1=0.9, alpha2=0.1)]  # fmt: skip
        for setting, reading in itertools.product(ARITHMETIC, readings):
            yield setting, "gtpo", dict(scope="batch") | reading
        for setting, reading in itertools.product(("easy", "long"), readings):
            yield setting, "gtpo", dict(scope="group") | reading
        yield "trap", "gtpo", dict(scope="group")
    if question == "egsw":
        # The cells that end in short guesses take many steps, so they cost most.
        means = ["token", "sequence"]
        for options in product(reduction=means, weight_temperature=[1.0, 2.0, 4.0, 8.0], alpha=[0.0, 0.1, 0.5, 1.0]):
            yield "easy", "egsw", options
        for options in product(reduction=means, weight_temperature=[2.0, 4.0, 8.0], alpha=[0.0, 0.5]):
            yield "trap", "egsw", options
        for options in product(reduction=["token"], weight_temperature=[1.0, 2.0, 4.0, 8.0], alpha=[0.0, 0.5]):
            yield "long", "egsw", options
    if question == "egsw_forms":
        pairs = [("grpo", "token"), ("grpo", "sequence"), ("rloo", "sequence"), ("dr_grpo", "constant")]
        kinds = [dict(advantage=advantage, reduction=reduction) for advantage, reduction in pairs]
        for kind in kinds:
            yield "easy", "grpo", kind
        for kind, form in itertools.product(kinds, product(step_wise=[True, False], mean_one=[True, False])):
            yield "easy", "egsw", kind | form
    if question == "grpo_s":
        for options in product(minibatches=[1, 4, 16], ratio=["geometric", "arithmetic"]):
            yield "easy", "grpo_s", options
    # The defaults of the scripts differ in more than the method. These questions remove one difference at a time.
    if question == "updates":
        for options, method, setting in itertools.product(product(minibatches=[1, 4]), METHODS, ("easy", "long")):
            yield setting, method, options
    if question == "reduction":
        reductions = product(reduction=["sequence", "token", "constant"])
        for method, setting, options in itertools.product(("grpo", "egsw", "grpo_s"), ARITHMETIC, reductions):
            yield setting, method, options


def variant_of(options: dict) -> str:
    """The options of a line, as the tables name them."""
    return " ".join(f"{name}={value}" for name, value in options.items() if name != "eval_every")


# --- files ------------------------------------------------------------------------------------------------------------


def read_csv(path: Path) -> list[dict]:
    """Rows of a CSV file, with numbers as numbers and empty fields as None. No file: no rows."""

    def value(text: str):
        for convert in (int, float):
            try:
                return convert(text)
            except ValueError:
                pass
        return text or None

    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [
            {name: (text if name in ("variant", "options") else value(text)) for name, text in row.items()}
            for row in csv.DictReader(file)
        ]


def write_csv(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    table.writeheader()
    for row in rows:
        table.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in row.items()})
    files.write_text(path, text.getvalue())


def key(row: dict) -> tuple:
    """What a row is about."""
    return row["question"], row["setting"], row["method"], row["variant"] or "", row["seed"]


def update(path: Path, new: list[dict]) -> list[dict]:
    """Puts the rows into a CSV file, in the place of those about the same. In the order of the plan, then by seed."""
    replaced = {key(row) for row in new}
    rows = [*new, *(row for row in read_csv(path) if key(row) not in replaced)]
    order = [(question, setting, method, variant_of(options)) for question in SEEDS for setting, method, options in
             plan(question)]  # fmt: skip
    places = {place: i for i, place in enumerate(order)}
    rows = [row for row in rows if key(row)[:4] in places]  # the plan may have changed
    rows.sort(key=lambda row: (places[key(row)[:4]], row["seed"]))  # a stable sort
    if rows:
        write_csv(path, rows)
    return read_csv(path)


def main(argv: list[str] | None = None, out: Path = HERE) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail  # type: ignore[method-assign, assignment]
    positive = bounded(int, at_least=1)
    parser.add_argument("--quick", action="store_true", help="the methods on countdown and easy, 3 seeds")
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, metavar="QUESTION", help=", ".join(QUESTIONS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, metavar="SETTING", help=", ".join(SETTINGS))
    parser.add_argument("--seeds", nargs=2, type=int, metavar=("FIRST", "STOP"), help="seeds FIRST to STOP - 1")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count(), metavar="N", help="cells at a time [cores]")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "compare", help="folder of the cells")
    args = parser.parse_args(argv)
    if args.quick and (args.only or args.settings):
        fail("--quick chooses questions and settings itself: give no --only and no --settings")
    if args.seeds and not 0 <= args.seeds[0] < args.seeds[1]:
        fail(f"--seeds {args.seeds[0]} {args.seeds[1]}: give a first seed and a larger number to stop at")
    try:
        args.work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--work {args.work}: {error.strerror}")

    asked = ["methods"] if args.quick else args.only or list(QUESTIONS)
    settings = ["countdown", "easy"] if args.quick else args.settings or list(SETTINGS)
    wanted = []  # (question, cell, options as the question names them)
    for question in SEEDS:
        if question not in asked:
            continue
        seeds = range(*args.seeds) if args.seeds else range(3 if args.quick else SEEDS[question])
        for setting, method, options in plan(question):
            if setting in settings:
                wanted += [(question, new_cell(setting, method, options, seed), options) for seed in seeds]
    unique_cells = list(dict.fromkeys(cell for _, cell, _ in wanted))
    summaries = run_cells(unique_cells, args.work, args.jobs)

    rows = []
    curves = []
    evaluations = []
    for question, cell, options in wanted:
        if cell not in summaries:
            continue
        folder = args.work / cells.name_of(cell)
        about = {"question": question, "setting": cell.setting, "method": cell.method, "variant": variant_of(options)}
        about["seed"] = cell.seed
        rows.append({**about, "options": " ".join(cells.command_line(cell.options)), **summaries[cell]})
        if question == "methods":
            curves += [{**about, **point} for point in cells.curve(folder)]
        if "eval_every" in options:
            evaluations += [{**about, **point} for point in cells.trajectory(folder)]
    if args.quick:
        rows = update(out / "quick.csv", rows)
        files.write_text(out / "quick.md", report(rows, [], []))
    else:
        rows = update(out / "results.csv", rows)
        curves = update(out / "curves.csv", curves)
        evaluations = update(out / "frontier.csv", evaluations)
        if "cost" in asked:
            write_csv(out / "cost.csv", cost(METHODS, cells.prepare("easy", args.work)[1]))
        files.write_text(out / "tables.md", report(rows, evaluations, read_csv(out / "cost.csv")))
        figures.draw(rows, curves, evaluations, out)
    failed = len(unique_cells) - len(summaries)
    if failed:
        print(f"{failed} cells failed", file=sys.stderr)
    return 1 if failed else 0


def stop(number: int, _) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    sys.exit(main())
