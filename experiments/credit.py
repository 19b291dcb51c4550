"""A picture of credit: one group of completions, every token coloured by what each of the five methods gives it.

    python experiments/credit.py                      the tiny base: runs/credit.png and runs/credit.html
    python experiments/credit.py --model path/to/model --dataset rows.jsonl --out runs/after
    python experiments/credit.py && cp runs/credit.png assets/          made the README's picture

Credit is what multiplies grad log pi of a token on the first update, before the mean over tokens: token_advantages of
each script, at its default options, over the batch that the first step of a run samples. The picture shows one prompt,
the first one whose completions are nearest to half right. Blue pushes a token up, orange pushes it down, and all panels
share one scale. The bar below a token is the entropy of the policy there. The PNG wraps long completions and says what
it cuts. The page is one file that loads nothing; it has all of it, with the numbers on hover, tap or keyboard focus.

Exit status: 0 done; 2 the options or the input are wrong, or no prompt has both right and wrong completions.
"""

import argparse
import dataclasses
import io
import json
import os
import sys
import textwrap
import warnings
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dapo
import egsw
import grpo
import grpo_s
import gtpo
import verifier
from common import Rollout
from harness import data, tiny
from harness.options import RunConfig, add_option, bounded, fail, resolve_defaults
from harness.trainer import Trainer

# The options of a run that decide what is sampled.
SAMPLING = [
    "model", "trust_remote_code", "dataset", "dataset_config", "train_split", "question_column", "answer_column",
    "system", "prompt_template", "max_prompt_tokens",
    "n_prompts", "group_size", "max_new_tokens", "temperature", "seed",
]  # fmt: skip
SCRIPTS = {"GRPO": grpo, "DAPO": dapo, "EGSW": egsw, "GTPO": gtpo, "GRPO-S": grpo_s}
READING = {
    "GRPO": "A_i: one number a completion",
    "DAPO": "A_i, less for completions close to the length limit",
    "EGSW": "w_it A_i: at each position, weight moves to right completions and to uncertain tokens",
    "GTPO": "A_it: uncertain tokens of right answers gain, sure ones of wrong answers lose, each against its position",
    "GRPO-S": "A_i: as GTPO, with the mean entropy of a completion",
}
MEANS = {"sequence": "each completion's tokens, then completions", "token": "all tokens", "constant": "a constant"}


def parse(argv: list[str] | None) -> tuple[RunConfig, argparse.Namespace]:
    """The options of a run, and those of this script. A wrong option ends the program with status 2."""
    title, usage = __doc__.split("\n\n")[0], "%(prog)s [options]"
    parser = argparse.ArgumentParser(description=title, usage=usage, allow_abbrev=False)
    parser.error = fail
    number = dict(type=bounded(int, at_least=1), metavar="INT")
    parser.add_argument("--out", default="runs/credit", help="where to write, without .png and .html [%(default)s]")
    parser.add_argument("--rows", default=6, help="completions in the PNG, at most [%(default)s]", **number)
    parser.add_argument("--lines", default=2, help="lines of each in the PNG, at most [%(default)s]", **number)
    for f in dataclasses.fields(RunConfig):
        if f.name in SAMPLING:
            add_option(parser, f, f.type)
    args = parser.parse_args(argv)
    return RunConfig(**{name: getattr(args, name) for name in SAMPLING}, eval_rows=0), args


# --- the numbers ------------------------------------------------------------------------------------------------------


def sample(cfg: RunConfig) -> tuple[Rollout, object]:
    """What the first step of a run with these options samples and verifies, and the tokenizer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = cfg.model or str(tiny.base(Path("runs/tiny-base")))
    model, tokenizer = data.load_model(source, device, cfg.trust_remote_code)
    resolve_defaults(cfg, sum(p.numel() for p in model.parameters()), on_gpu=device.type == "cuda")
    problems, _ = data.load_problems(cfg)
    trainer = Trainer(cfg, model, tokenizer, data.encode(cfg, model, tokenizer, problems), source)
    return trainer.verify(trainer.sample()), tokenizer


def token_credit(rollout: Rollout, max_new_tokens: int) -> dict[str, Tensor]:
    """Each method's credit of every token, at its script's defaults: {name: [B, T]}, 0 where the mask is 0."""
    credit = {}
    for name, script in SCRIPTS.items():
        options = {"max_new_tokens": max_new_tokens} if script is dapo else {}
        credit[name] = script.token_advantages(rollout.rewards, rollout.entropy, rollout.mask, rollout.group, **options)
    return credit


def choose(rewards: Tensor, group: Tensor) -> int | None:
    """The first group whose share of right completions is nearest to a half; None if none has both. Two [B]."""
    distance = {int(g): abs(float(rewards[group == g].mean()) - 0.5) for g in group.unique()}
    nearest = min(distance, key=distance.get)
    return nearest if distance[nearest] < 0.5 else None


def visible(text: str, is_eos: bool) -> str:
    """A token's text as a cell shows it: signs for the end, newlines, tabs and blanks; no control characters."""
    if is_eos:
        return "∎"
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else "�" for c in text.strip(" ") or "␣")


def picture(rollout: Rollout, g: int, tokenizer, cfg: RunConfig) -> dict:
    """Everything that is drawn of group g, which the page holds as JSON. Nats; right completions first."""
    methods = token_credit(rollout, cfg.max_new_tokens)
    rows = (rollout.group == g).nonzero().squeeze(1)
    rows = rows[rollout.rewards[rows].argsort(descending=True, stable=True)].tolist()
    drawn = []
    for i in rows:
        n, ended = int(rollout.mask[i].sum()), bool(rollout.finished[i])
        # one id at a time, so that each token has its own text: a character of several tokens shows as �
        text = [tokenizer.decode([k], skip_special_tokens=False) for k in rollout.completion_ids[i, :n].tolist()]
        numbers = {"logprob": rollout.logprobs[i, :n], "entropy": rollout.entropy[i, :n]}
        drawn.append({
            "right": bool(rollout.rewards[i] > 0.5),
            "text": text,
            "shown": [visible(token, ended and t == n - 1) for t, token in enumerate(text)],
            **{name: [round(x, 4) for x in values.tolist()] for name, values in numbers.items()},
            "credit": {name: [round(x, 4) for x in A[i, :n].tolist()] for name, A in methods.items()},
        })  # fmt: skip
    sizes = {name: float(A[rows].abs().max()) for name, A in methods.items()}
    return {
        "question": rollout.texts[rows[0]]["question"],
        "answer": verifier.gold_answer(rollout.texts[rows[0]]["answer"]),
        "model": cfg.model or "the tiny base",
        "dataset": cfg.dataset,
        "prompt": f"prompt {g + 1} of {int(rollout.group.max()) + 1}",
        "methods": [
            {"name": name, "reading": READING[name], "mean": MEANS[script.Config().reduction]}
            for name, script in SCRIPTS.items()
        ],
        # The scale ends at twice GRPO's credit: darker than GRPO is more, paler is less. Some tokens of GTPO have ten
        # times GRPO's credit. If the scale went that far, all other tokens would look white.
        "limit": round(2 * sizes["GRPO"], 1),
        "largest": round(max(sizes.values()), 1),
        "max_entropy": max(max(row["entropy"]) for row in drawn),
        "rows": drawn,
    }


# --- the page ---------------------------------------------------------------------------------------------------------


def page(content: dict) -> str:
    """One HTML file. The content goes in as JSON without any "<", and the page's script writes it as text only."""
    template = (Path(__file__).parent / "credit.html").read_text(encoding="utf-8")
    return template.replace("{{content}}", json.dumps(content).replace("<", "\\u003c"))


# --- the PNG ----------------------------------------------------------------------------------------------------------

# The colours of the page's light scheme. Black text is readable on all colours between them.
ORANGE, WHITE, BLUE, INK, GREY = "#f08030", "#ffffff", "#4a94e0", "#16181d", "#5b616b"
CHARACTER, PADDING, LINE, LABEL, MARGIN = 0.075, 0.05, 7.0, 0.78, 0.15  # inches; LINE is where completions wrap
FONTS = ["DejaVu Sans Mono", "DejaVu Sans"]  # matplotlib brings both; the second has glyphs that the first lacks
DPI, CELL, BAR, GAP = 150, 0.165, 0.075, 0.02  # heights of a token, of its entropy bar, and between lines, in inches


def draw(path: Path, content: dict, max_rows: int, max_lines: int) -> None:
    """Writes the PNG: at most max_rows completions, of both outcomes, and max_lines lines of each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from PIL import Image

    colour = LinearSegmentedColormap.from_list("credit", [ORANGE, WHITE, BLUE])
    limit, entropy = content["limit"], content["max_entropy"]
    scale = Normalize(-limit, limit, clip=True)
    right, wrong = ([row for row in content["rows"] if row["right"] is side] for side in (True, False))
    n_right = min(len(right), max(max_rows - len(wrong), (max_rows + 1) // 2))
    rows = right[:n_right] + wrong[: max_rows - n_right]

    def layout(row: dict) -> list[tuple[float, int, float, str]]:  # x, line, width and text of each token
        x, line, cells = 0.0, 0, []
        for text in row["shown"]:
            text = text if len(text) <= 14 else text[:13] + "…"
            width = len(text) * CHARACTER + PADDING
            if x and x + width > LINE:
                x, line = 0.0, line + 1
            if line == max_lines:
                break
            cells.append((x, line, width, text))
            x += width
        return cells

    cells = [layout(row) for row in rows]
    heights = [(row[-1][1] + 1) * (CELL + BAR + GAP) + 0.04 for row in cells]
    wide = max(6.2, max(x + width for row in cells for x, _, width, _ in row)) + LABEL + 0.55 + 2 * MARGIN
    top, panel = 1.32, 0.36 + sum(heights)
    tall = top + panel * len(content["methods"]) + 0.12
    figure = pyplot.figure(figsize=(wide, tall), dpi=DPI, facecolor=WHITE)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, wide), ylim=(tall, 0))  # one unit is one inch
    axes.axis("off")

    def write(x, y, text, size=8.5, **how):  # parse_math: a token may hold dollar signs
        axes.text(x, y, text, fontsize=size, va="center", parse_math=False, **{"color": INK, **how})

    def box(x, y, width, height, face):
        axes.add_patch(pyplot.Rectangle((x, y), width, height, facecolor=face, edgecolor="none", antialiased=False))

    def short(text):
        return textwrap.shorten(text, int(wide * 11), placeholder=" …")

    count = f"{len(right)} of {len(content['rows'])} completions right"
    drawn = f", {len(rows)} drawn" if len(rows) < len(content["rows"]) else ""
    write(MARGIN, 0.2, "Credit: what multiplies the gradient of each token's log-prob", 12, weight="bold")
    write(MARGIN, 0.44, short(f"{content['question']}   (answer: {content['answer']})"), 9)
    where = f"{count}{drawn}; {content['prompt']} of {content['dataset']}; {content['model']}"
    write(MARGIN, 0.63, short(where), 8.5, color=GREY)
    steps, bar = 90, 1.8
    for k in range(steps):
        box(MARGIN + 0.75 + k * bar / steps, 0.8, bar / steps * 1.05, 0.16, colour(k / (steps - 1)))
    for x, text in ((0, f"−{limit:g}"), (0.5, "0"), (1, f"+{limit:g}")):
        write(MARGIN + 0.75 + x * bar, 1.06, text, 8, ha="center")
    write(MARGIN, 0.88, "credit", 8.5)
    write(MARGIN + 0.75 + bar + 0.12, 0.88, f"largest {content['largest']:.1f}", 8, color=GREY)
    x = MARGIN + 3.75
    box(x, 0.95 - BAR, 0.125, BAR, GREY)
    box(x, 0.95, 0.125, 1 / DPI, GREY)
    write(x + 0.2, 0.88, f"entropy, full height {entropy:.2g} nats", 8.5)
    write(x, 1.06, "⏎ newline   ␣ blank   ∎ end of sequence", 8.5)

    y = top
    for method in content["methods"]:
        axes.plot([MARGIN, wide - MARGIN], [y - 0.08] * 2, color="#d5d8dd", linewidth=0.8)
        write(MARGIN, y + 0.1, method["name"], 10.5, weight="bold")
        write(MARGIN + LABEL, y + 0.1, method["reading"], 8.5, color=GREY)
        write(wide - MARGIN, y + 0.1, "mean", 8, color=GREY, ha="right")
        y += 0.26
        for row, places, height in zip(rows, cells, heights, strict=True):
            values, n = row["credit"][method["name"]], len(row["shown"])
            write(MARGIN, y + CELL / 2, "✓ right" if row["right"] else "✗ wrong")
            write(wide - MARGIN, y + CELL / 2, f"{sum(values) / n:+.2f}".replace("-", "−"), ha="right")
            for (x, line, width, text), value, h in zip(places, values, row["entropy"], strict=False):
                x, at = MARGIN + LABEL + x, y + line * (CELL + BAR + GAP)
                box(x, at, width - 0.012, CELL, colour(scale(value)))
                write(x + width / 2 - 0.006, at + CELL / 2, text, ha="center", family=FONTS)
                box(x, at + CELL + BAR, width - 0.012, 1 / DPI, "#c4c8ce")
                box(x, at + CELL + BAR * (1 - h / entropy), width - 0.012, BAR * h / entropy, GREY)
            if n > len(places):
                x, line, width, _ = places[-1]
                at = y + line * (CELL + BAR + GAP) + CELL / 2
                write(MARGIN + LABEL + x + width + 0.04, at, f"+{n - len(places)}", 7.5, color=GREY)
            y += height
        y += 0.1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # it is drawn as a box, and the page has the text
        figure.savefig(buffer := io.BytesIO())
    pyplot.close(figure)
    small = Image.open(buffer).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)  # a third of the bytes
    small.save(path)


def main(argv: list[str] | None = None) -> None:
    cfg, args = parse(argv)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        fail("the picture is drawn with matplotlib: pip install matplotlib")
    out = Path(args.out)
    out = out.with_suffix("") if out.suffix in (".png", ".html") else out
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(out.parent, os.W_OK):
            raise PermissionError("not writable")
    except OSError as error:
        fail(f"--out {args.out}: {error.strerror or error}")
    rollout, tokenizer = sample(cfg)
    g = choose(rollout.rewards, rollout.group)
    if g is None:
        right = int((rollout.rewards > 0.5).sum())
        fail(f"no prompt has both outcomes, {right} of {len(rollout)} completions are right: every credit is 0. "
             "Give more --n-prompts, a larger --group-size or another --seed")  # fmt: skip
    content = picture(rollout, g, tokenizer, cfg)
    png, html = (out.with_name(out.name + suffix) for suffix in (".png", ".html"))
    draw(png, content, args.rows, args.lines)
    html.write_text(page(content), encoding="utf-8")
    print(f"{png} and {html}")


if __name__ == "__main__":
    main()
