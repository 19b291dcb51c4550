"""The picture of credit for one method alone, on a small group that is made by hand: docs/credit_<method>.png.

    python experiments/credit_one.py

Credit is what multiplies grad log pi of a token on the first update: token_advantages of the method's script, at its
default options. credit.py draws the same for completions of a model.
"""

import importlib
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch


class Row(NamedTuple):
    """A completion."""

    right: bool
    tokens: list[tuple[str, float]]  # text, and the entropy there in nats

    def outcome(self) -> str:
        return "right" if self.right else "wrong"


QUESTION = "7-2+4?"
GROUP = [
    Row(True, [("7-2=5", 0.6), ("5+4=9", 0.2), ("∎", 0.1)]),
    Row(False, [("8", 0.8), ("∎", 0.1)]),
    Row(True, [("9", 0.4), ("∎", 0.1)]),
    Row(False, [("7-2=6", 0.6), ("6+4=10", 0.2), ("∎", 0.1)]),
]
METHODS = {"grpo": "GRPO", "dapo": "DAPO", "egsw": "EGSW", "gtpo": "GTPO", "grpo_s": "GRPO-S"}
# DAPO needs a limit for the completions. With this one, the completions of three tokens lose half a point of reward.
OPTIONS = {"dapo": {"max_new_tokens": 4, "overlong_cache": 0.5}}

ORANGE, WHITE, BLUE, INK, GREY = "#f08030", "#ffffff", "#4a94e0", "#16181d", "#5b616b"
LIMIT = 2.0  # credit at which the colours end
LABEL, CELL, LINE, BAR = 0.75, 1.05, 0.62, 0.2  # inches: width of the outcome and of a token, heights


def credit(method: str, rows: list[Row]) -> list[list[float]]:
    """The credit of every token of these completions of one prompt."""
    T = max(len(row.tokens) for row in rows)
    entropy = torch.zeros(len(rows), T)
    mask = torch.zeros(len(rows), T)
    for i, row in enumerate(rows):
        n = len(row.tokens)
        entropy[i, :n] = torch.tensor([H for _, H in row.tokens])
        mask[i, :n] = 1.0
    rewards = torch.tensor([float(row.right) for row in rows])
    group = torch.zeros(len(rows), dtype=torch.long)
    script = importlib.import_module(method)
    A = script.token_advantages(rewards, entropy, mask, group, **OPTIONS.get(method, {}))  # [B, T]
    return [A[i, : len(row.tokens)].tolist() for i, row in enumerate(rows)]


def signed(x: float) -> str:
    """A number with its sign and two digits. Zero has no sign."""
    return f"{x:+.2f}" if abs(x) >= 0.005 else "0"


def numbers_of(method: str) -> str:
    """All numbers of the picture, as text."""
    return "; ".join(" ".join(signed(x) for x in row) for row in credit(method, GROUP))


def draw(method: str, path: Path) -> None:
    """Writes the PNG: a line for each completion, a cell for each token, and the token's entropy as a bar below it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    colours = LinearSegmentedColormap.from_list("credit", [ORANGE, WHITE, BLUE])
    scale = Normalize(-LIMIT, LIMIT, clip=True)
    top = 0.62
    width = LABEL + 3 * CELL + 0.3
    height = top + len(GROUP) * (LINE + BAR) + 0.45
    figure = pyplot.figure(figsize=(width, height), dpi=150, facecolor=WHITE)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))  # one unit is one inch
    axes.axis("off")

    def write(x: float, y: float, text: str, size: float = 9, **how) -> None:
        axes.text(x, y, text, fontsize=size, va="center", **{"color": INK, **how})

    def box(x: float, y: float, width: float, height: float, colour, edge="none") -> None:
        axes.add_patch(pyplot.Rectangle((x, y), width, height, facecolor=colour, edgecolor=edge, linewidth=0.8))

    write(0.15, 0.22, f"{METHODS[method]}: credit of each token", 11, weight="bold")
    write(0.15, 0.45, f"four completions of {QUESTION}   (answer 9)", 8.5, color=GREY)
    y = top
    for row, numbers in zip(GROUP, credit(method, GROUP), strict=True):
        write(0.15, y + LINE / 2, "✓ right" if row.right else "✗ wrong")
        for t, ((text, H), number) in enumerate(zip(row.tokens, numbers, strict=True)):
            x = 0.15 + LABEL + t * CELL
            box(x, y, CELL - 0.04, LINE - 0.06, colours(scale(number)), edge="#c4c8ce")
            write(x + CELL / 2, y + 0.17, text, 10, ha="center", family="DejaVu Sans Mono")
            write(x + CELL / 2, y + 0.4, signed(number).replace("-", "−"), 9, ha="center")
            box(x, y + LINE - 0.02, H * (CELL - 0.04), 0.05, GREY)  # one nat is as long as the cell is wide
            write(x + H * (CELL - 0.04) + 0.04, y + LINE + 0.01, f"{H:g}", 6.5, color=GREY)
        y += LINE + BAR
    write(0.15, y + 0.08, "blue: made more probable   orange: less probable", 8, color=GREY)
    write(0.15, y + 0.26, "grey bar: entropy of the policy there, nats   ∎ end", 8, color=GREY)
    # The numbers go into the file too, so that a test can tell whether the picture is stale.
    figure.savefig(path, metadata={"Software": None, "Comment": numbers_of(method)})
    pyplot.close(figure)


def main() -> None:
    for method in METHODS:
        draw(method, ROOT / "docs" / f"credit_{method}.png")


if __name__ == "__main__":
    main()
