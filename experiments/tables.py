"""Prints the tables of the questions, as Markdown, from the files of experiments/data. RESULTS.md quotes some of them.

    python experiments/tables.py                all of them
    python experiments/tables.py parts gtpo     those of these questions

A number is a mean over n seeds with its 95% t-interval. Runs of one seed share their base and their prompts, so two
runs are compared seed by seed: the mean of the differences with its t-interval, and in how many seeds the difference is
positive. A * says that the difference stays significant (5%) after Holm's correction over all comparisons of the
question, in all of its settings and in both columns.
"""

import argparse
import statistics

from data_files import DATA, read_rows
from scipy import stats

NOTE = (
    "Means over n seeds with 95% t-intervals. Differences are taken seed by seed; * marks those that stay significant "
    "(5%) after Holm's correction over all comparisons of the question."
)
LEVELS = (0.2, 0.22, 0.24, 0.26)  # of mean@64, in the table of the frontier
FRONTIERS = {"frontier": "the five methods", "neighbours": "the methods of more/"}  # the questions, and what is in them


# --- numbers ----------------------------------------------------------------------------------------------------------


def interval(values: list[float], digits: int = 3, sign: str = "") -> str:
    """Mean and half the width of its 95% t-interval. One value has no interval."""
    mean = statistics.fmean(values)
    shown = f"{round(mean, digits) + 0.0:{sign}.{digits}f}"  # + 0.0: no "-0.000"
    if len(values) == 1:
        return shown
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{shown} ± {half:.{digits}f}"


def p_value(differences: list[float]) -> float:
    """Two-sided p of a t-test that the mean of the differences is 0. Without any spread: 1 if all are 0, else 0."""
    if len(differences) < 2:
        return 1.0
    if statistics.stdev(differences) == 0:
        return float(differences[0] == 0)
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: list[float]) -> list[bool]:
    """Which of these tests stay significant at 5% after Holm's correction."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    significant = [False] * len(p_values)
    for rank, i in enumerate(order):
        if p_values[i] > 0.05 / (len(p_values) - rank):
            break
        significant[i] = True
    return significant


def by_seed(rows: list[dict], reference: list[dict], name: str) -> list[float]:
    """The differences between runs of the same seed."""
    of_reference = {row["seed"]: row[name] for row in reference}
    return [row[name] - of_reference[row["seed"]] for row in rows if row["seed"] in of_reference]


def first_time(values: list[float | None], scale: float = 1) -> str:
    """Steps or tokens until something happened. It may not have happened in every run."""
    reached = [value / scale for value in values if value is not None]
    if not reached:
        return "never"
    return interval(reached, 0) + (f" ({len(reached)} of {len(values)} runs)" if len(reached) < len(values) else "")


# --- tables -----------------------------------------------------------------------------------------------------------


def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *lines)) + "\n"


def report(rows: list[dict], evaluations: list[dict], costs: list[dict]) -> str:
    """The tables of all questions that have rows."""
    text = NOTE + "\n\n"
    for question in dict.fromkeys(row["question"] for row in rows):
        text += tables([row for row in rows if row["question"] == question], question)
        if question in FRONTIERS and evaluations:
            text += frontier_table(evaluations, question)
    if costs:
        lines = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in costs]
        text += "### cost, easy\n\n" + markdown(list(costs[0]), lines)
    return text


def name_of(row: dict) -> str:
    """The name of a row's line, such as `egsw P=4.0`."""
    method = row["method"].removeprefix("more.")
    return f"{method} {row['variant'] or ''}".replace("weight_temperature", "P").strip()


def lines_of(rows: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """The rows by setting and by line of its table."""
    settings: dict[str, dict[str, list[dict]]] = {}
    for row in rows:
        settings.setdefault(row["setting"], {}).setdefault(name_of(row), []).append(row)
    return settings


def largest_k(row: dict) -> int:
    """The k of a row's mean@k."""
    return max(int(name.rpartition("@")[2]) for name, value in row.items() if "mean@" in name and value is not None)


def tables(rows: list[dict], question: str) -> str:
    """A question's tables, from its rows: mean@k in all settings if there are several, then each setting by itself."""
    settings = lines_of(rows)
    text = ""
    if len(settings) > 1:
        names = dict.fromkeys(name for lines in settings.values() for name in lines)
        first = [next(iter(lines.values())) for lines in settings.values()]  # all lines start from the same base
        before = [statistics.fmean(row[f"before mean@{largest_k(row)}"] for row in some) for some in first]
        cells = [["before", *(f"{mean:.3f}" for mean in before)]]
        for name in names:
            found = [lines.get(name, []) for lines in settings.values()]
            means = [interval([row[f"after mean@{largest_k(row)}"] for row in some]) if some else "" for some in found]
            cells.append([name, *means])
        text += f"### {question}: mean@k\n\n" + markdown(["run", *settings], cells)

    comparisons = []  # (setting, name of the line, metric) of every difference in the tables
    for setting, lines in settings.items():
        reference, *others = lines
        k = largest_k(lines[reference][0])
        comparisons += [(setting, name, metric) for name in others for metric in (f"mean@{k}", f"pass@{k}")]
    p_values = []
    for setting, name, metric in comparisons:
        reference = next(iter(settings[setting].values()))
        p_values.append(p_value(by_seed(settings[setting][name], reference, f"after {metric}")))
    significant = {which for which, survives in zip(comparisons, holm(p_values), strict=True) if survives}

    for setting, lines in settings.items():
        text += f"### {question}, {setting}\n\n" + comparison_table(setting, lines, significant)
        if question in ("methods", "real"):
            text += pass_table(lines) + entropy_table(lines)
    return text


def comparison_table(setting: str, lines: dict[str, list[dict]], significant: set[tuple]) -> str:
    """mean@k and pass@k of each line, and its differences from the first line."""
    reference = next(iter(lines))
    k = largest_k(lines[reference][0])
    header = ["run", "n"]
    for metric in (f"mean@{k}", f"pass@{k}"):
        header += [metric, f"against {reference}", "higher in"]
    header += ["length", "last entropy"]
    cells = []
    for name, rows in lines.items():
        line = [name, str(len(rows))]
        for metric in (f"mean@{k}", f"pass@{k}"):
            line.append(interval([row[f"after {metric}"] for row in rows]))
            differences = by_seed(rows, lines[reference], f"after {metric}")
            if name == reference or not differences:
                line += ["", ""]
                continue
            star = " *" if (setting, name, metric) in significant else ""
            line.append(interval(differences, sign="+") + star)
            line.append(f"{sum(d > 0 for d in differences)} of {len(differences)}")
        line.append(interval([row["after length"] for row in rows], 1))
        line.append(interval([row["entropy last"] for row in rows]))
        cells.append(line)
    return markdown(header, cells)


def pass_table(lines: dict[str, list[dict]]) -> str:
    """pass@k before and after, for each line."""
    first = next(iter(lines.values()))
    names = [name for name, value in first[0].items() if name.startswith("after pass@") and value is not None]
    ks = [name.removeprefix("after ") for name in names]
    cells = [["before", *(f"{statistics.fmean(row[f'before {k}'] for row in first):.3f}" for k in ks)]]
    for name, rows in lines.items():
        cells.append([name, *(f"{statistics.fmean(row[f'after {k}'] for row in rows):.3f}" for k in ks)])
    return markdown(["run", *ks], cells)


def entropy_table(lines: dict[str, list[dict]]) -> str:
    """Speed of learning and entropy, for each line. On Countdown and on word problems also by kind of token."""
    first = next(iter(lines.values()))[0]
    kinds = [name.removeprefix("after ") for name, value in first.items()
             if name.startswith("after entropy") and value is not None]  # fmt: skip
    header = ["run", "first entropy", "lowest", "last", "rebound", *(name.removeprefix("entropy ") for name in kinds)]
    names = ["entropy first", "entropy lowest", "entropy last", "rebound", *(f"after {name}" for name in kinds)]
    if first.get("after solutions found") is not None:
        header.append("solutions found")
        names.append("after solutions found")
    header.append("reward over all tokens" if kinds else "1,000 tokens to 0.8")
    cells = []
    for run, rows in lines.items():
        shown = [run]
        for name in names:
            values = [row[name] for row in rows if row.get(name) is not None]
            shown.append(interval(values, 2 if name == "rebound" else 3))
        if kinds:
            shown.append(interval([row["mean reward"] for row in rows]))
        else:
            shown.append(first_time([row["tokens to 0.8"] for row in rows], 1000))
        cells.append(shown)
    text = markdown(header, cells)
    if kinds:
        before = [f"{first[f'before {name}']:.3f} nats {name.removeprefix('entropy ')}" for name in kinds]
        text += f"Before training, the entropy is {', '.join(before[:-1])} and {before[-1]}.\n\n"
    return text


def method_of(row: dict) -> str:
    """The name of a row's line without its learning rate and its length of training."""
    return " ".join(part for part in name_of(row).split() if not part.startswith(("lr=", "stop_tokens=")))


def frontier_rows(evaluations: list[dict], question: str) -> list[dict]:
    """The evaluations on Countdown of one question, with those before training."""
    return [row for row in evaluations if row["question"] == question and row["setting"] == "countdown"]


def frontier_points(evaluations: list[dict], question: str) -> dict[str, list[dict]]:
    """By method: a point for each learning rate, length of training and evaluation on the way, with the means over
    seeds of mean@64 and pass@64."""
    groups: dict[str, dict[tuple, list[dict]]] = {}
    for row in frontier_rows(evaluations, question):
        if row["evaluation"] > 0:
            of_method = groups.setdefault(method_of(row), {})
            of_method.setdefault((row["variant"], row["evaluation"]), []).append(row)
    points: dict[str, list[dict]] = {}
    for method, found in groups.items():
        points[method] = []
        for (variant, number), rows in found.items():
            means = {metric: statistics.fmean(row[metric] for row in rows) for metric in ("mean@64", "pass@64")}
            points[method].append({"variant": variant, "evaluation": number, **means})
    return points


def frontier_table(evaluations: list[dict], question: str) -> str:
    """The highest pass@64 of each method among its points that reach a level of mean@64."""
    cells = []
    for method, points in frontier_points(evaluations, question).items():
        line = [method, str(len(points))]
        for level in LEVELS:
            reached = [point["pass@64"] for point in points if point["mean@64"] >= level]
            line.append(f"{max(reached):.3f}" if reached else "not reached")
        cells.append(line)
    header = ["method", "points", *(f"mean@64 of {level} or more" for level in LEVELS)]
    return f"### {question}, countdown: the highest pass@64 at\n\n" + markdown(header, cells)


def main() -> None:
    rows = read_rows(DATA / "results.csv.gz")
    questions = [*dict.fromkeys(row["question"] for row in rows), "cost"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=", ".join(questions))
    asked = parser.parse_args().questions or questions
    if unknown := set(asked) - set(questions):
        parser.error(f"there is no question {', '.join(sorted(unknown))}; there are {', '.join(questions)}")
    rows = [row for row in rows if row["question"] in asked]
    costs = read_rows(DATA / "cost.csv.gz") if "cost" in asked else []
    print(report(rows, read_rows(DATA / "frontier.csv.gz"), costs), end="")


if __name__ == "__main__":
    main()
