"""Draws the figures from results.csv and curves.csv, for compare.py.

learning_curves.png: reward, entropy and length against the tokens sampled, a row of panels a setting; lines are means
over seeds, bands span from the lowest seed to the highest. pass_at_k.png: pass@k before and after training.
egsw_grid.png: EGSW's mean@k after training over P and alpha, by setting and reduction.
"""

import statistics
from pathlib import Path

COLOURS = {"grpo": "#4c72b0", "dapo": "#dd8452", "egsw": "#55a868", "gtpo": "#c44e52", "grpo_s": "#8172b3"}


def draw(rows: list[dict], curves: list[dict], out: Path) -> None:
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

    if curves:
        save(learning_curves(pyplot, curves), "learning_curves.png")
    if methods := [row for row in rows if row["question"] == "methods"]:
        save(pass_at_k(pyplot, methods), "pass_at_k.png")
    if grid := [row for row in rows if row["question"] == "egsw"]:
        save(egsw_grid(pyplot, grid), "egsw_grid.png")


def distinct(rows: list[dict], key: str) -> list:
    return list(dict.fromkeys(row[key] for row in rows))


def learning_curves(pyplot, curves: list[dict]):
    settings, names = distinct(curves, "setting"), ("reward", "entropy", "length")
    size = dict(figsize=(12, 2.8 * len(settings)), layout="constrained", squeeze=False)
    figure, panels = pyplot.subplots(len(settings), len(names), **size)
    for setting, line in zip(settings, panels, strict=True):
        for name, axis in zip(names, line, strict=True):
            for method in distinct(curves, "method"):
                points: dict[int, list[float]] = {}  # tokens -> one value per seed
                for row in curves:
                    if (row["setting"], row["method"]) == (setting, method):
                        points.setdefault(row["tokens"], []).append(row[name])
                x = [tokens / 1000 for tokens in points]
                axis.plot(x, [statistics.fmean(v) for v in points.values()], color=COLOURS[method], label=method)
                low, high = ([f(v) for v in points.values()] for f in (min, max))
                axis.fill_between(x, low, high, color=COLOURS[method], alpha=0.15, linewidth=0)
            axis.set(title=f"{setting}: {name}", xlabel="1,000 tokens sampled")
    panels[0][0].legend()
    return figure


def pass_at_k(pyplot, rows: list[dict]):
    settings = distinct(rows, "setting")
    size = dict(figsize=(4.2 * len(settings), 3.4), layout="constrained", squeeze=False)
    figure, panels = pyplot.subplots(1, len(settings), **size)
    names = [key.removeprefix("after ") for key in rows[0] if key.startswith("after pass@")]
    ks = [int(name.rpartition("@")[2]) for name in names]
    for setting, axis in zip(settings, panels[0], strict=True):
        here = [row for row in rows if row["setting"] == setting]
        lines = {m: ("after", [r for r in here if r["method"] == m], COLOURS[m]) for m in distinct(here, "method")}
        for label, (when, some, colour) in {"before": ("before", here, "grey"), **lines}.items():
            means = [statistics.fmean(row[f"{when} {name}"] for row in some) for name in names]
            axis.plot(ks, means, "--" if when == "before" else "-", marker=".", color=colour, label=label)
        axis.set_xscale("log", base=2)
        axis.set(title=setting, xlabel="k", ylabel="pass@k", xticks=ks, xticklabels=ks)
    panels[0][0].legend()
    return figure


def egsw_grid(pyplot, rows: list[dict]):
    mean = next(key for key in rows[0] if key.startswith("after mean@"))
    grids: dict[str, dict[tuple[str, str], list[float]]] = {}  # by panel, then by alpha and P
    for row in rows:
        shape = dict(part.split("=") for part in row["variant"].split())
        values = grids.setdefault(f"{row['setting']}, mean over {shape['reduction']}s", {})
        values.setdefault((shape["alpha"], shape["weight_temperature"]), []).append(row[mean])
    figure, panels = pyplot.subplots(1, len(grids), figsize=(4 * len(grids), 3.2), layout="constrained", squeeze=False)
    for (title, values), axis in zip(grids.items(), panels[0], strict=True):
        alphas, temperatures = (sorted({key[i] for key in values}, key=float) for i in (0, 1))
        cells = [[statistics.fmean(values.get((a, p), [float("nan")])) for p in temperatures] for a in alphas]
        axis.imshow(cells, aspect="auto", cmap="viridis", vmin=0, vmax=1)
        for i, j in ((i, j) for i in range(len(alphas)) for j in range(len(temperatures))):
            colour = "white" if cells[i][j] < 0.6 else "black"
            axis.text(j, i, f"{cells[i][j]:.3f}", ha="center", va="center", color=colour)
        axis.set(xticks=range(len(temperatures)), xticklabels=temperatures, xlabel="P")
        axis.set(yticks=range(len(alphas)), yticklabels=alphas, ylabel="alpha", title=f"{title}: {mean[6:]}")
    return figure
