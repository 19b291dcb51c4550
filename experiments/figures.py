"""Draws the figures from the files of experiments/data.

    python experiments/figures.py       draws them again

learning_curves.png: reward, entropy and length against the tokens sampled, a row of panels a setting; lines are means
over seeds, bands span from the lowest seed to the highest. pass_at_k.png: pass@k before and after training. real_*.png:
the same of the real model. parts.png: mean@64 and pass@64 of EGSW's options and of controls. frontier.png: mean@64
against pass@64 over learning rates and lengths of training, also of the methods of more/. egsw_grid.png: EGSW's mean@32
on arithmetic over P and alpha. Small dots are seeds.
"""

import statistics
from pathlib import Path

from data_files import DATA, read_rows
from tables import FRONTIERS, frontier_points, frontier_rows, largest_k, lines_of, method_of

COLOURS = {
    "grpo": "#4c72b0", "dapo": "#dd8452", "egsw": "#55a868", "gtpo": "#c44e52", "grpo_s": "#8172b3",
    "egsw step_wise=False": "#1f6b3a", "forking": "#937860", "cov": "#da8bc3", "entropy_advantage": "#8c8c8c",
    "quantile": "#ccb974", "cispo": "#64b5cd", "cov variant=kl": "#8c4c7c",
    "grpo reduction=token minibatches=4": "#26487a",
}  # fmt: skip


def draw(rows: list[dict], curves: list[dict], evaluations: list[dict], out: Path) -> None:
    """Writes the figures for which there are rows. Without matplotlib it writes none."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    def save(figure, name: str) -> None:
        figure.savefig(out / name, dpi=110)
        pyplot.close(figure)

    of_question: dict[str, list[dict]] = {}
    for row in rows:
        of_question.setdefault(row["question"], []).append(row)
    for question, prefix in (("methods", ""), ("real", "real_")):
        of_curves = [point for point in curves if point["question"] == question]
        if of_curves:
            save(learning_curves(pyplot, of_curves), f"{prefix}learning_curves.png")
        if question in of_question:
            save(pass_at_k(pyplot, of_question[question]), f"{prefix}pass_at_k.png")
    if "parts" in of_question:
        save(parts(pyplot, of_question["parts"]), "parts.png")
    if any(row["question"] in FRONTIERS for row in evaluations):
        save(frontier(pyplot, evaluations), "frontier.png")
    if "egsw" in of_question:
        save(egsw_grid(pyplot, of_question["egsw"]), "egsw_grid.png")


def distinct(rows: list[dict], key: str) -> list:
    return list(dict.fromkeys(row[key] for row in rows))


def learning_curves(pyplot, curves: list[dict]):
    settings = distinct(curves, "setting")
    names = ("reward", "entropy", "length")
    size = dict(figsize=(12, 2.8 * len(settings)), layout="constrained", squeeze=False)
    figure, panels = pyplot.subplots(len(settings), len(names), **size)
    for setting, row_of_panels in zip(settings, panels, strict=True):
        for name, axis in zip(names, row_of_panels, strict=True):
            for method in distinct(curves, "method"):
                values: dict[int, list[float]] = {}  # one per seed, by tokens
                for point in curves:
                    if (point["setting"], point["method"]) == (setting, method):
                        values.setdefault(point["tokens"], []).append(point[name])
                x = [tokens / 1000 for tokens in values]
                means = [statistics.fmean(some) for some in values.values()]
                axis.plot(x, means, color=COLOURS[method], label=method)
                low = [min(some) for some in values.values()]
                high = [max(some) for some in values.values()]
                axis.fill_between(x, low, high, color=COLOURS[method], alpha=0.15, linewidth=0)
            axis.set(title=f"{setting}: {name}", xlabel="1,000 tokens sampled")
    panels[0][0].legend()
    return figure


def pass_at_k(pyplot, rows: list[dict]):
    settings = lines_of(rows)
    size = dict(figsize=(4.2 * len(settings), 3.6), layout="constrained", squeeze=False)
    figure, panels = pyplot.subplots(1, len(settings), **size)
    for (setting, lines), axis in zip(settings.items(), panels[0], strict=True):
        first = next(iter(lines.values()))
        ks = [int(name.rpartition("@")[2]) for name, value in first[0].items()
              if name.startswith("after pass@") and value is not None]  # fmt: skip
        before = [statistics.fmean(row[f"before pass@{k}"] for row in first) for k in ks]
        axis.plot(ks, before, "--", color="grey", label="before")
        for name, some in lines.items():
            means = [statistics.fmean(row[f"after pass@{k}"] for row in some) for k in ks]
            axis.plot(ks, means, color=COLOURS[name], label=name)
            for row in some:
                axis.plot(ks, [row[f"after pass@{k}"] for k in ks], ".", color=COLOURS[name], markersize=2)
        axis.set_xscale("log", base=2)
        axis.set(title=setting, xlabel="k", ylabel="pass@k", xticks=ks, xticklabels=ks)
    panels[0][0].legend()
    return figure


def parts(pyplot, rows: list[dict]):
    lines = next(iter(lines_of(rows).values()))
    k = largest_k(rows[0])
    size = dict(figsize=(11, 0.32 * len(lines) + 1), layout="constrained", sharey=True)
    figure, panels = pyplot.subplots(1, 2, **size)
    for metric, axis in zip((f"mean@{k}", f"pass@{k}"), panels, strict=True):
        for place, (name, some) in enumerate(lines.items()):
            colour = COLOURS.get(name.split()[0], "black")
            values = [row[f"after {metric}"] for row in some]
            axis.plot(values, [place] * len(values), ".", color=colour, markersize=4)
            axis.plot(statistics.fmean(values), place, "|", color=colour, markersize=16)
        before = statistics.fmean(row[f"before {metric}"] for row in rows)
        axis.axvline(before, linestyle="--", color="grey", linewidth=1)
        after = [row[f"after {metric}"] for row in rows]
        shown = [before, *(value for value in after if value > before / 3)]  # without the runs that collapsed
        margin = 0.05 * (max(shown) - min(shown))
        axis.set(title=metric, xlabel="dashed: before training")
        axis.set_xlim(min(shown) - margin, max(shown) + margin)
    panels[0].set(yticks=range(len(lines)), yticklabels=list(lines))
    panels[0].invert_yaxis()
    return figure


def frontier(pyplot, evaluations: list[dict]):
    """The five methods on the left, the methods of more/ on the right. A line joins the evaluations of one learning
    rate, from the first to the last; the base is the black cross."""
    questions = [question for question in FRONTIERS if frontier_rows(evaluations, question)]
    size = dict(figsize=(7 * len(questions), 5.5), layout="constrained", sharex=True, sharey=True, squeeze=False)
    figure, panels = pyplot.subplots(1, len(questions), **size)
    for question, axis in zip(questions, panels[0], strict=True):
        rows = frontier_rows(evaluations, question)
        for method, points in frontier_points(evaluations, question).items():
            colour = COLOURS[method]
            for row in rows:
                if method_of(row) == method and row["evaluation"] > 0:
                    axis.plot(row["mean@64"], row["pass@64"], ".", color=colour, markersize=2, alpha=0.5)
            for i, variant in enumerate(distinct(points, "variant")):
                some = [point for point in points if point["variant"] == variant]
                x = [point["mean@64"] for point in some]
                y = [point["pass@64"] for point in some]
                axis.plot(x, y, "-o", color=colour, markersize=5, linewidth=1, label=method if i == 0 else None)
        before = [row for row in rows if row["evaluation"] == 0]
        x = statistics.fmean(row["mean@64"] for row in before)
        y = statistics.fmean(row["pass@64"] for row in before)
        axis.plot(x, y, "x", color="black", markersize=9, label="before")
        axis.set(xlabel="mean@64", ylabel="pass@64", title=f"countdown: {FRONTIERS[question]}")
        axis.legend(loc="lower right")
    return figure


def egsw_grid(pyplot, rows: list[dict]):
    grids: dict[str, dict[tuple[str, str], list[float]]] = {}  # by panel, then by alpha and P
    for row in rows:
        options = dict(part.split("=") for part in row["variant"].split())
        values = grids.setdefault(f"{row['setting']}, mean over {options['reduction']}s", {})
        values.setdefault((options["alpha"], options["weight_temperature"]), []).append(row["after mean@32"])
    figure, panels = pyplot.subplots(1, len(grids), figsize=(4 * len(grids), 3.2), layout="constrained", squeeze=False)
    for (title, values), axis in zip(grids.items(), panels[0], strict=True):
        alphas = sorted({alpha for alpha, _ in values}, key=float)
        temperatures = sorted({P for _, P in values}, key=float)
        cells = [[statistics.fmean(values.get((a, P), [float("nan")])) for P in temperatures] for a in alphas]
        axis.imshow(cells, aspect="auto", cmap="viridis", vmin=0, vmax=1)
        for i in range(len(alphas)):
            for j in range(len(temperatures)):
                colour = "white" if cells[i][j] < 0.6 else "black"
                axis.text(j, i, f"{cells[i][j]:.3f}", ha="center", va="center", color=colour)
        axis.set(xticks=range(len(temperatures)), xticklabels=temperatures, xlabel="P")
        axis.set(yticks=range(len(alphas)), yticklabels=alphas, ylabel="alpha", title=f"{title}: mean@32")
    return figure


if __name__ == "__main__":
    draw(*(read_rows(DATA / f"{name}.csv.gz") for name in ("results", "curves", "frontier")), out=DATA.parent)
