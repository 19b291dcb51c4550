"""Fills the page docs/explorer.html: completions, and what each of the five methods gives every token of them.

    python experiments/credit.py              the tiny bases on Countdown and on arithmetic: runs/credit.html
    python experiments/credit.py --word-problems runs/word_problems   and the real model of tasks/word_problems.py
    python experiments/credit.py --model path/to/model --dataset rows.jsonl   your model instead

This made the page of the repository:

    python experiments/credit.py --word-problems runs/word_problems --group-size 6 --out docs/explorer.html

Credit is what multiplies grad log pi of a token on the first update, before the mean over tokens: token_advantages of
each script, over the batch that the first step of a run samples. Of that batch the page shows two prompts: the first
one whose completions are nearest to half right, and a harder one. It is one file that loads nothing, and it computes
the credit itself, for the options that its reader chooses.

Exit status: 0 done; 2 the options or the input are wrong, or no prompt has both right and wrong completions.
"""

import argparse
import dataclasses
import inspect
import json
import os
import sys
import typing
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
from harness.options import RunConfig, add_option, fail, resolve_defaults
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
SCRIPTS = [grpo, dapo, egsw, gtpo, grpo_s]
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
    title = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(description=title, usage="%(prog)s [options]", allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--out", type=Path, default=Path("runs/credit.html"), help="the page to write [%(default)s]")
    parser.add_argument(
        "--word-problems", type=Path, metavar="FOLDER", help="also show what tasks/word_problems.py has made"
    )
    for f in dataclasses.fields(RunConfig):
        if f.name in SAMPLING:
            add_option(parser, f, f.type)
    args = parser.parse_args(argv)
    if args.word_problems and (args.model or args.dataset != "arithmetic"):
        fail("--word-problems has a model and a data set of its own: leave out --model and --dataset")
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


def chosen_tasks(cfg: RunConfig, word_problems_folder: Path | None) -> dict[str, RunConfig]:
    """The tasks to show, by name."""
    if cfg.model is not None or cfg.dataset != "arithmetic":
        return {Path(cfg.dataset).name: cfg}
    tasks = {"Countdown": countdown_config(cfg), "arithmetic": cfg}
    if word_problems_folder:
        tasks["word problems"] = word_problems_config(cfg, word_problems_folder)
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


def choose(rewards: Tensor, group: Tensor, share: float = 0.5, without: int | None = None) -> int | None:
    """The first group, other than `without`, whose share of right completions is nearest to this one. None if no other
    group has both right and wrong ones. rewards, group: [B]."""
    right = (rewards > 0.5).float()
    shares = {int(g): float(right[group == g].mean()) for g in group.unique()}
    distance = {g: abs(s - share) for g, s in shares.items() if 0 < s < 1 and g != without}
    return min(distance, key=distance.__getitem__, default=None)


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


# --- the page ---------------------------------------------------------------------------------------------------------


def task_content(cfg: RunConfig) -> dict:
    """Two prompts of a task's first batch for the page: the one nearest to half right, and a harder one."""
    rollout, tokenizer = sample(cfg)
    first = choose(rollout.rewards, rollout.group)
    if first is None:
        right = int((rollout.rewards > 0.5).sum())
        fail(f"no prompt has both outcomes, {right} of {len(rollout)} completions are right: every credit is 0. "
             "Give more --n-prompts, a larger --group-size or another --seed")  # fmt: skip
    harder = choose(rollout.rewards, rollout.group, share=0.2, without=first)
    groups = [first] if harder is None else [first, harder]
    return {
        "max_new_tokens": cfg.max_new_tokens,
        "groups": [prompt_content(rollout, g, tokenizer) for g in groups],
    }


def method_options() -> dict[str, list[dict]]:
    """For each script, the options that its token_advantages takes: in this order, with default, help and choices."""
    options = {}
    for script in SCRIPTS:
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


def main(argv: list[str] | None = None) -> None:
    cfg, args = parse(argv)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(args.out.parent, os.W_OK):
            raise PermissionError("not writable")
    except OSError as error:
        fail(f"--out {args.out}: {error.strerror or error}")
    models = {"Countdown": "the tiny base", "arithmetic": "the tiny base", "word problems": "SmolLM2-135M-Instruct"}
    contents = []
    for name, task_cfg in chosen_tasks(cfg, args.word_problems).items():
        contents.append({"task": name, "model": models.get(name, args.model), **task_content(task_cfg)})
    args.out.write_text(page(contents), encoding="utf-8")
    print(args.out)


if __name__ == "__main__":
    main()
