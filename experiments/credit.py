"""A picture of credit: one group of completions, and what each of the five methods gives every token of it.

    python experiments/credit.py                      the tiny base on arithmetic: runs/credit.png
    python experiments/credit.py --countdown          the base of tasks/countdown.py on its task
    python experiments/credit.py --word-problems runs/word_problems   a real model: the base of tasks/word_problems.py
    python experiments/credit.py --explorer           the page to play with, with these two tasks: runs/credit.html
    python experiments/credit.py --explorer --model path/to/model --dataset rows.jsonl --out runs/after

These made the files of this repository:

    python experiments/credit.py --countdown --out assets/credit_countdown
    python experiments/credit.py --explorer --word-problems runs/word_problems --group-size 6 --out docs/explorer

Credit is what multiplies grad log pi of a token on the first update, before the mean over tokens: token_advantages of
each script, at its default options, over the batch that the first step of a run samples. Blue pushes a token up, orange
pushes it down, and all methods share one scale. The bar below a token is the entropy of the policy there, and a fork
is a token of at least FORK nats.

The PNG shows one prompt, the first one whose completions are nearest to half right. It wraps long completions and says
what it cuts. With --explorer the page docs/explorer.html is filled with two prompts instead: that one and a harder one.
The page is one file that loads nothing. It computes the credit itself, for the options that its reader chooses.

Exit status: 0 done; 2 the options or the input are wrong, or no prompt has both right and wrong completions.
"""

import argparse
import dataclasses
import importlib.util
import inspect
import io
import json
import os
import sys
import textwrap
import typing
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
from harness import data, files
from harness.model import load_model
from harness.options import RunConfig, add_option, bounded, fail, resolve_defaults
from harness.rewards import RewardError
from harness.trainer import Trainer
from tasks import arithmetic, countdown, word_problems

EXPLORER = ROOT / "docs" / "explorer.html"
BEGIN = '<script type="application/json" id="content">'  # the content follows, up to the end of this element

# The options of a run that decide what is sampled.
SAMPLING = [
    "model", "trust_remote_code", "dataset", "splits", "question_column", "answer_column", "reward", "system",
    "prompt_template", "max_prompt_tokens", "n_prompts", "group_size", "max_new_tokens", "temperature", "seed",
]  # fmt: skip
SCRIPTS = {"GRPO": grpo, "DAPO": dapo, "EGSW": egsw, "GTPO": gtpo, "GRPO-S": grpo_s}
# Not from a data set, so that the page holds no rows of one.
WORD_PROBLEMS = {
    "A baker made 84 rolls and put them into 7 bags, the same number into each. How many rolls are in a bag?": "12",
    "Lena has 53 stamps. She gives 18 of them to her brother. How many stamps does she have left?": "35",
    "A train has 6 coaches with 45 seats each. How many seats does the train have?": "270",
    "There are 27 sheep and 16 goats on a farm. How many animals are on the farm?": "43",
    "Omar read 38 pages on Monday and 25 pages on Tuesday. How many more pages did he read on Monday?": "13",
    "A box holds 9 pencils. How many boxes are needed for 72 pencils?": "8",
    "A shop had 64 lamps. It sold some of them, and now it has 29. How many lamps did it sell?": "35",
    "Mia pays 4 dollars for each of 13 tickets. How much does she pay?": "52",
}
FORK = 0.35  # nats. A token of at least this entropy is called a fork; to choose by a fair coin has 0.69.


def parse(argv: list[str] | None) -> tuple[RunConfig, argparse.Namespace]:
    """The options of a run, and those of this script. A wrong option ends the program with status 2."""
    title, usage = __doc__.split("\n\n")[0], "%(prog)s [options]"
    parser = argparse.ArgumentParser(description=title, usage=usage, allow_abbrev=False)
    parser.error = fail
    number = dict(type=bounded(int, at_least=1), metavar="INT")
    parser.add_argument("--out", default="runs/credit", help="where to write, without .png or .html [%(default)s]")
    parser.add_argument("--explorer", action="store_true", help="write the page to play with instead of the PNG")
    parser.add_argument("--countdown", action="store_true", help="show Countdown; its base is built if it is missing")
    parser.add_argument(
        "--word-problems", type=Path, metavar="FOLDER", help="show what tasks/word_problems.py has made"
    )
    parser.add_argument("--rows", default=6, help="completions in the PNG, at most [%(default)s]", **number)
    parser.add_argument("--lines", default=2, help="lines of each in the PNG, at most [%(default)s]", **number)
    for f in dataclasses.fields(RunConfig):
        if f.name in SAMPLING:
            add_option(parser, f, f.type)
    args = parser.parse_args(argv)
    if (args.countdown or args.word_problems) and (args.model or args.dataset != "arithmetic"):
        flag = "--countdown" if args.countdown else "--word-problems"
        fail(f"{flag} has a model and a data set of its own: leave out --model and --dataset, or {flag}")
    if args.countdown and args.word_problems and not args.explorer:
        fail("--countdown --word-problems: a picture shows one task; give one of them, or --explorer")
    if args.word_problems and not (args.word_problems / "base").is_dir():
        fail(f"--word-problems {args.word_problems}: no base in it; make it with tasks/word_problems.py --out")
    return RunConfig(**{name: getattr(args, name) for name in SAMPLING}, eval_rows=0), args


def countdown_config(cfg: RunConfig) -> RunConfig:
    """The same options for Countdown. Builds its base and data in runs/countdown if they are missing."""
    options = countdown.prepare(Path("runs/countdown"))
    given = dict(zip(options[::2], options[1::2], strict=True))
    return dataclasses.replace(
        cfg, model=given["--model"], dataset=given["--dataset"], reward=given["--reward"],
        max_new_tokens=cfg.max_new_tokens or int(given["--max-new-tokens"]),
    )  # fmt: skip


def word_problems_config(cfg: RunConfig, folder: Path) -> RunConfig:
    """The same options for WORD_PROBLEMS and the base that tasks/word_problems.py has made in this folder."""
    rows = folder / "credit.jsonl"
    files.write_text(rows, "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in WORD_PROBLEMS.items()))
    return dataclasses.replace(
        cfg, model=str(folder / "base"), dataset=str(rows), n_prompts=len(WORD_PROBLEMS), system=word_problems.SYSTEM,
        max_new_tokens=cfg.max_new_tokens or word_problems.MAX_NEW_TOKENS,
    )  # fmt: skip


def chosen_tasks(cfg: RunConfig, args: argparse.Namespace) -> dict[str, RunConfig]:
    """The tasks to show, by name: one, or several on the page."""
    if cfg.model is not None or cfg.dataset != "arithmetic":
        return {Path(cfg.dataset).name: cfg}
    tasks = {}
    if args.countdown or args.explorer:
        tasks["Countdown"] = countdown_config(cfg)
    if args.explorer or not (args.countdown or args.word_problems):
        tasks["arithmetic"] = cfg
    if args.word_problems:
        tasks["word problems"] = word_problems_config(cfg, args.word_problems)
    return tasks


# --- the numbers ------------------------------------------------------------------------------------------------------


def sample(cfg: RunConfig) -> tuple[Rollout, object]:
    """What the first step of a run with these options samples and verifies, and the tokenizer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = cfg.model or str(arithmetic.base(Path("runs/tiny-base")))
    model, tokenizer = load_model(source, device, cfg.trust_remote_code)
    resolve_defaults(cfg, sum(p.numel() for p in model.parameters()), on_gpu=device.type == "cuda")
    problems, _ = data.load_problems(cfg)
    trainer = Trainer(cfg, model, tokenizer, data.encode(cfg, model, tokenizer, problems), source)
    try:
        return trainer.verify(trainer.sample()), tokenizer
    except RewardError as error:
        message, details = error.args
        fail(message, details=details)


def token_credit(rollout: Rollout, max_new_tokens: int) -> dict[str, Tensor]:
    """Each method's credit of every token, at its script's defaults: {name: [B, T]}, 0 where the mask is 0."""
    credit = {}
    for name, script in SCRIPTS.items():
        options = {"max_new_tokens": max_new_tokens} if script is dapo else {}
        credit[name] = script.token_advantages(rollout.rewards, rollout.entropy, rollout.mask, rollout.group, **options)
    return credit


def choose(rewards: Tensor, group: Tensor, share: float = 0.5, without: int | None = None) -> int | None:
    """The first group, other than `without`, whose share of right completions is nearest to this one. None if no other
    group has both right and wrong ones. rewards, group: [B]."""
    right = (rewards > 0.5).float()
    shares = {int(g): float(right[group == g].mean()) for g in group.unique()}
    distance = {g: abs(s - share) for g, s in shares.items() if 0 < s < 1 and g != without}
    return min(distance, key=distance.__getitem__, default=None)


def choose_or_fail(rollout: Rollout) -> int:
    g = choose(rollout.rewards, rollout.group)
    if g is None:
        right = int((rollout.rewards > 0.5).sum())
        fail(f"no prompt has both outcomes, {right} of {len(rollout)} completions are right: every credit is 0. "
             "Give more --n-prompts, a larger --group-size or another --seed")  # fmt: skip
    return g


def visible(text: str, is_eos: bool) -> str:
    """A token's text as a cell shows it: signs for the end, newlines, tabs and blanks; no control characters."""
    if is_eos:
        return "∎"
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else "�" for c in text.strip(" ") or "␣")


def rows_of(rollout: Rollout, g: int) -> list[int]:
    """The rows of group g, right ones first."""
    rows = (rollout.group == g).nonzero().squeeze(1)
    return rows[rollout.rewards[rows].argsort(descending=True, stable=True)].tolist()


def prompt_content(rollout: Rollout, g: int, tokenizer) -> dict:
    """The prompt of group g and its completions, right ones first, with the numbers of their tokens. Nats."""
    completions = []
    for i in rows_of(rollout, g):
        n, ended = int(rollout.mask[i].sum()), bool(rollout.finished[i])
        # one id at a time, so that each token has its own text: a character of several tokens shows as �
        text = [tokenizer.decode([k], skip_special_tokens=False) for k in rollout.completion_ids[i, :n].tolist()]
        completions.append({
            "reward": float(rollout.rewards[i]),
            "text": text,
            "shown": [visible(token, ended and t == n - 1) for t, token in enumerate(text)],
            "logprob": [round(x, 4) for x in rollout.logprobs[i, :n].tolist()],
            "entropy": [round(x, 4) for x in rollout.entropy[i, :n].tolist()],
        })  # fmt: skip
    row = rollout.records[rows_of(rollout, g)[0]]
    return {
        "question": row["question"],
        "answer": verifier.gold_answer(row["answer"]) if row.get("answer") else None,
        "rows": completions,
    }


def picture(rollout: Rollout, g: int, tokenizer, cfg: RunConfig) -> dict:
    """Everything that the PNG shows of group g."""
    content = prompt_content(rollout, g, tokenizer)
    methods = token_credit(rollout, cfg.max_new_tokens)
    rows = rows_of(rollout, g)
    for row, i in zip(content["rows"], rows, strict=True):
        n = len(row["text"])
        row["credit"] = {name: [round(x, 4) for x in A[i, :n].tolist()] for name, A in methods.items()}
    sizes = {name: float(A[rows].abs().max()) for name, A in methods.items()}
    return {
        **content,
        "prompt": f"prompt {g + 1} of {int(rollout.group.max()) + 1}",
        # The scale ends at twice GRPO's credit: darker than GRPO is more, paler is less. Some tokens of GTPO have ten
        # times GRPO's credit. If the scale went that far, all other tokens would look white.
        "limit": round(2 * sizes["GRPO"], 1),
        "largest": round(max(sizes.values()), 1),
        "max_entropy": max(max(row["entropy"]) for row in content["rows"]),
    }


# --- the page ---------------------------------------------------------------------------------------------------------


def task_content(cfg: RunConfig) -> dict:
    """Two prompts of a task's first batch for the page: the one nearest to half right, and a harder one."""
    rollout, tokenizer = sample(cfg)
    first = choose_or_fail(rollout)
    harder = choose(rollout.rewards, rollout.group, share=0.2, without=first)
    groups = [first] if harder is None else [first, harder]
    return {
        "max_new_tokens": cfg.max_new_tokens,
        "groups": [prompt_content(rollout, g, tokenizer) for g in groups],
    }


def method_options() -> dict[str, list[dict]]:
    """For each script, the options that its token_advantages takes: in this order, with default, help and choices."""
    options = {}
    for script in SCRIPTS.values():
        fields = {field.name: field for field in dataclasses.fields(script.Config)}
        names = list(inspect.signature(script.token_advantages).parameters)[4:]  # after rewards, entropy, mask, group
        options[script.__name__] = [
            {
                "name": name,
                "default": fields[name].default,
                "help": fields[name].metadata["help"],
                # the words of a Literal; another type has no arguments that are text
                "choices": [word for word in typing.get_args(fields[name].type) if isinstance(word, str)],
            }
            for name in names
        ]
    return options


def page(tasks: list[dict]) -> str:
    """docs/explorer.html with this content in place of its own. The content goes in as JSON without any "<", and the
    page's script writes it as text only."""
    content = {"tasks": tasks, "options": method_options(), "fork": FORK}
    text = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    before, begin, rest = EXPLORER.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition("</script>")
    return before + begin + text + end + after


# --- the PNG ----------------------------------------------------------------------------------------------------------

# The colours of the page's light scheme.
ORANGE, WHITE, BLUE, INK, GREY = "#d8600c", "#f0efec", "#1763b8", "#1b1d22", "#62666f"
FORK_COLOUR, FORK_PALE, BAR_COLOUR, RULE = "#6d3bbd", "#ece3fb", "#b4b7be", "#e3e1dc"
FONTS = ["DejaVu Sans Mono", "DejaVu Sans"]  # matplotlib brings both; the second has glyphs that the first lacks
DPI = 150
# Sizes in inches. A completion is wrapped at WIDEST.
CHARACTER, PADDING, WIDEST, LABEL, MARGIN, TOP = 0.078, 0.055, 8.2, 1.05, 0.2, 1.3
GLYPH, BAR, CREDIT, GAP = 0.17, 0.21, 0.115, 0.13  # heights of a token, of its entropy bar, of a credit, of a gap


def rows_to_draw(content: dict, max_rows: int) -> tuple[list[dict], list[dict]]:
    """At most max_rows completions, right and wrong ones, about half of each if there are enough."""
    right = [row for row in content["rows"] if row["reward"] > 0.5]
    wrong = [row for row in content["rows"] if row["reward"] <= 0.5]
    n_right = min(len(right), max(max_rows - len(wrong), (max_rows + 1) // 2))
    return right[:n_right], wrong[: max_rows - n_right]


def shorten(token: str) -> str:
    return token if len(token) <= 14 else token[:13] + "…"


def layout(tokens: list[str], max_lines: int) -> list[tuple[int, float, float]]:
    """Where the tokens of a completion are drawn: (line, x, width) of each, as far as max_lines lines go."""
    places = []
    line, x = 0, 0.0
    for token in tokens:
        width = len(shorten(token)) * CHARACTER + PADDING
        if x and x + width > WIDEST:
            line, x = line + 1, 0.0
        if line == max_lines:
            break
        places.append((line, x, width))
        x += width
    return places


def draw(path: Path, content: dict, max_rows: int, max_lines: int) -> None:
    """Writes the PNG: at most max_rows completions, of both outcomes, and max_lines lines of each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from PIL import Image

    right, wrong = rows_to_draw(content, max_rows)
    rows = right + wrong
    places = [layout(row["shown"], max_lines) for row in rows]
    width = LABEL + max(x + cell for tokens in places for _, x, cell in tokens)
    line_height = GLYPH + BAR + len(SCRIPTS) * CREDIT + GAP
    heights = [(tokens[-1][0] + 1) * line_height for tokens in places]
    side_by_side = 2 * width + 2 * MARGIN < WIDEST + LABEL  # short completions: right ones left, wrong ones right
    corners = []  # x and y where each completion begins
    x, y = MARGIN, TOP
    for k, height in enumerate(heights):
        if side_by_side and k == len(right):
            x, y = width + 3 * MARGIN, TOP
        corners.append((x, y))
        y += height
    tall = max(y + height for (_, y), height in zip(corners, heights, strict=True))
    wide = max(x + width + MARGIN, 7.0)

    figure = pyplot.figure(figsize=(wide, tall), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, wide), ylim=(tall, 0))  # one unit is one inch
    axes.axis("off")
    colour = LinearSegmentedColormap.from_list("credit", [ORANGE, WHITE, BLUE])
    scale = Normalize(-content["limit"], content["limit"], clip=True)

    def write(x, y, text, size=8.5, **how):  # parse_math: a token may hold dollar signs
        axes.text(x, y, text, fontsize=size, va="center", parse_math=False, **{"color": INK, **how})

    def box(x, y, width, height, face):
        axes.add_patch(pyplot.Rectangle((x, y), width, height, facecolor=face, edgecolor="none", antialiased=False))

    def draw_header() -> None:
        n_right = sum(row["reward"] > 0.5 for row in content["rows"])
        drawn = f", {len(rows)} drawn" if len(rows) < len(content["rows"]) else ""
        count = f"{n_right} of {len(content['rows'])} completions right{drawn}"
        where = f"{count}; {content['prompt']} of {content['task']}; {content['model']}"
        characters = int((wide - 2 * MARGIN) * 12)
        answer = f"   (answer: {content['answer']})" if content["answer"] else ""
        write(MARGIN, 0.22, "Credit: what multiplies the gradient of each token's log-prob", 12, weight="bold")
        write(MARGIN, 0.47, textwrap.shorten(content["question"] + answer, characters, placeholder=" …"), 9.5)
        write(MARGIN, 0.66, textwrap.shorten(where, characters, placeholder=" …"), color=GREY)
        steps, bar, start = 90, 1.4, MARGIN + 0.3
        for k in range(steps):
            box(start + k * bar / steps, 0.84, bar / steps * 1.05, 0.13, colour(k / (steps - 1)))
        write(MARGIN, 0.905, f"−{content['limit']:g}", 8)
        write(start + bar + 0.08, 0.905, f"+{content['limit']:g}  credit, largest {content['largest']:.1f}", 8)
        write(MARGIN, 1.1, "⏎ newline   ␣ blank   ∎ end of sequence", 8, color=GREY)
        x = MARGIN + 3.9
        box(x, 0.84, 0.13, 0.13, FORK_COLOUR)
        write(x + 0.2, 0.905, f"fork: entropy of at least {FORK:g} nats", 8)
        box(x, 1.1, 0.13, 0.06, BAR_COLOUR)
        write(x + 0.2, 1.1, f"entropy, full height {content['max_entropy']:.2g} nats", 8)

    def draw_completion(row: dict, places: list[tuple[int, float, float]], left: float, top: float) -> None:
        axes.plot([left, left + width], [top - 0.04] * 2, color=RULE, linewidth=0.8)
        is_right = row["reward"] > 0.5
        write(left, top + GLYPH / 2, "✓ right" if is_right else "✗ wrong", 8.5, weight="bold")
        for k, (name, values) in enumerate(row["credit"].items()):
            y = top + GLYPH + BAR + (k + 0.5) * CREDIT
            mean = f"{sum(values) / len(values):+.2f}".replace("-", "−")
            write(left, y, name, 7)
            write(left + LABEL - 0.12, y, mean, 7, ha="right", color=GREY)
        for t, (line, x, cell) in enumerate(places):
            at = left + LABEL + x
            y = top + line * line_height
            h = row["entropy"][t]
            is_fork = h >= FORK
            if is_fork:
                box(at, y, cell - 0.012, GLYPH, FORK_PALE)
            how = {"weight": "bold", "color": FORK_COLOUR} if is_fork else {}
            write(at + cell / 2 - 0.006, y + GLYPH / 2, shorten(row["shown"][t]), 8.5, ha="center", family=FONTS, **how)
            bar = (BAR - 0.05) * h / content["max_entropy"]
            box(at, y + GLYPH + BAR - 0.02 - bar, cell - 0.012, bar, FORK_COLOUR if is_fork else BAR_COLOUR)
            box(at, y + GLYPH + BAR - 0.02, cell, 1 / DPI, RULE)
            for k, values in enumerate(row["credit"].values()):
                box(at, y + GLYPH + BAR + k * CREDIT, cell - 0.012, CREDIT - 0.012, colour(scale(values[t])))
        if len(row["shown"]) > len(places):
            line, x, cell = places[-1]
            y = top + line * line_height + GLYPH / 2
            write(left + LABEL + x + cell, y, f"+{len(row['shown']) - len(places)}", 7, color=GREY)

    draw_header()
    for row, tokens, (x, y) in zip(rows, places, corners, strict=True):
        draw_completion(row, tokens, x, y)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # it is drawn as a box, and the page has the text
        figure.savefig(buffer := io.BytesIO())
    pyplot.close(figure)
    small = Image.open(buffer).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)  # a third of the bytes
    small.save(path)


def main(argv: list[str] | None = None) -> None:
    cfg, args = parse(argv)
    if not args.explorer and not importlib.util.find_spec("matplotlib"):
        fail("the picture is drawn with matplotlib: pip install matplotlib")
    suffix = ".html" if args.explorer else ".png"
    out = Path(args.out)
    out = out.with_suffix(suffix) if out.suffix in (".png", ".html") else out.with_name(out.name + suffix)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(out.parent, os.W_OK):
            raise PermissionError("not writable")
    except OSError as error:
        fail(f"--out {args.out}: {error.strerror or error}")
    tasks = chosen_tasks(cfg, args)
    models = {"Countdown": "the tiny base", "arithmetic": "the tiny base", "word problems": "SmolLM2-135M-Instruct"}
    if args.explorer:
        contents = []
        for name, cfg in tasks.items():
            contents.append({"task": name, "model": models.get(name, args.model), **task_content(cfg)})
        out.write_text(page(contents), encoding="utf-8")
    else:
        [(name, cfg)] = tasks.items()
        rollout, tokenizer = sample(cfg)
        content = picture(rollout, choose_or_fail(rollout), tokenizer, cfg)
        draw(out, {"task": name, "model": models.get(name, args.model), **content}, args.rows, args.lines)
    print(out)


if __name__ == "__main__":
    main()
