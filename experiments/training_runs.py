"""The runs of compare.py: each is a script with a setting, its options and a seed.

All runs of a setting start from the same base, and all runs of a seed draw the same prompts. A run ends after TOKENS
sampled completion tokens, including those that dynamic sampling throws away, and leaves its folder in --work. A
finished run is repeated only if its options, its setting or the defaults of its script have changed. On the same kind
of CPU, a second run gives the same numbers.

Each run is a process with one thread. It is forked from a server that has imported torch and transformers already,
because importing them takes a third as long as a run.
"""

import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import common
import grpo
from harness import data, files, tiny
from harness.model import load_model, stop_ids
from tasks import arithmetic, countdown, word_problems

TOKENS = 450_000  # completion tokens of a run: what 60 steps of GRPO sample on `easy`
TRAIN_ROWS = 4096  # chains of a setting with terms of its own
LARGE = dict(hidden_size=192, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=3, head_dim=32,
             intermediate_size=576)  # fmt: skip
# recipe: what the warm start changes in RECIPE of arithmetic.py or countdown.py. terms: of the chains to train on
# and to evaluate on. options: of the scripts.
SETTINGS: dict[str, dict[str, Any]] = {
    "countdown": dict(recipe={}, options=dict(max_new_tokens=24, lr=6e-4, eval_k=64)),
    "countdown-large": dict(recipe=dict(lr=2e-3), shape=LARGE, options=dict(max_new_tokens=24, lr=3e-4, eval_k=64)),
    "easy": dict(recipe={}, terms=None, options=dict(max_new_tokens=64, eval_k=32)),
    "trap": dict(recipe=dict(guess=0.5), terms=None, options=dict(max_new_tokens=64, eval_k=32)),
    "long": dict(recipe={}, terms=(6, 8), options=dict(max_new_tokens=96, eval_k=32)),
    "word_problems": dict(recipe={}, options=dict(
        n_prompts=8, max_new_tokens=word_problems.MAX_NEW_TOKENS, lr=1e-5, eval_rows=300, eval_k=16, stop_tokens=40_000,
    )),
}  # fmt: skip
EVAL_ROWS = 256
SCORED_SAMPLES = 8  # per problem, for the entropy by kind of token
SCORED_WORD_PROBLEMS = 64


class PlannedRun(NamedTuple):
    setting: str
    method: str  # the module of its script
    options: tuple  # pairs (name, value) that are neither the script's defaults nor the setting's
    seed: int


# --- what a run is ----------------------------------------------------------------------------------------------------


def task_of(setting: str) -> Any:
    """The module of the task."""
    name = setting.split("-")[0]
    return {"countdown": countdown, "word_problems": word_problems}.get(name, arithmetic)


@functools.cache
def defaults(method: str) -> dict:
    """The defaults of a script's options."""
    return {field.name: field.default for field in dataclasses.fields(importlib.import_module(method).Config)}


def planned_run(setting: str, method: str, options: dict, seed: int) -> PlannedRun:
    """Two runs are equal if they do the same, also if one of them is given an option that is the default anyway."""
    usual = {**defaults(method), **SETTINGS[setting]["options"]}
    changed = {name: value for name, value in options.items() if usual[name] != value}
    return PlannedRun(setting, method, tuple(sorted(changed.items())), seed)


def name_of(run: PlannedRun) -> str:
    options = [f"{name}={value}" for name, value in run.options]
    return "-".join([run.setting, run.method, *options, f"seed={run.seed}"])


def config_of(run: PlannedRun) -> dict:
    """All options of the run's script, except where its inputs and outputs are."""
    fixed = {"eval_rows": EVAL_ROWS, "seed": run.seed, "stop_tokens": TOKENS}
    return {**defaults(run.method), **fixed, **SETTINGS[run.setting]["options"], **dict(run.options)}


def identity(run: PlannedRun) -> dict:
    """Everything that decides the run's result, except the code. It is stored with the result."""
    setting = SETTINGS[run.setting]
    recipe = {**task_of(run.setting).RECIPE, **setting["recipe"]}
    model = {**tiny.MODEL, **setting.get("shape", {})}
    if run.setting == "word_problems":
        model = {"package": word_problems.PACKAGE}
    found = {"method": run.method, "recipe": recipe, "model": model, "terms": setting.get("terms"),
             "rows": TRAIN_ROWS, "config": config_of(run)}  # fmt: skip
    return json.loads(json.dumps(found))


def finished(run: PlannedRun, work: Path) -> dict | None:
    """The summary of a run, if it has ended with the same identity as now."""
    try:
        stored = json.loads((work / name_of(run) / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    now = identity(run)
    # An option that is newer than the result was, in effect, at its default. One that is gone decides nothing.
    config = stored["identity"]["config"]
    stored["identity"]["config"] = {name: config.get(name, default) for name, default in now["config"].items()}
    return stored["summary"] if stored["identity"] == now else None


def prepare(name: str, work: Path) -> list[str]:
    """A setting's base and data, as options of a script. Makes them if they are missing."""
    setting = SETTINGS[name]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that the base is the same on every number of cores
    if name.startswith("countdown"):
        options = countdown.prepare(work / name, setting["recipe"], setting.get("shape"))
    elif name == "word_problems":
        folder = os.environ.get("ENTROPY_RL_DATA")
        source = [f"{folder}/svamp/{split}.jsonl" for split in ("train", "test")] if folder else ["ChilleD/SVAMP", None]
        options = word_problems.prepare(work / name, None, *source, setting["recipe"])
    else:
        base_name = "-".join(["base", *(f"{key}={value}" for key, value in setting["recipe"].items())])
        options = ["--model", str(arithmetic.base(work / base_name, setting["recipe"]))]
        if setting["terms"]:
            for flag, n, held_out in (("--dataset", TRAIN_ROWS, False), ("--eval-dataset", EVAL_ROWS, True)):
                path = work / f"{name}{'-held-out' if held_out else ''}.jsonl"
                rows = arithmetic.problems(n, 0, held_out, *setting["terms"])
                files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
                options += [flag, str(path)]
    torch.set_num_threads(threads)
    return options


def command_line(options) -> list[str]:
    """Pairs of name and value, as arguments of a script."""
    result = []
    for name, value in options:
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            result.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            result += [f"--{flag}", str(value)]
    return result


# --- running them -----------------------------------------------------------------------------------------------------


def execute(run: PlannedRun, work: Path, inputs: list[str]) -> None:
    """Runs the script from its beginning, in this process. Writes summary.json, and what is printed to <run>.log."""
    torch.set_num_threads(1)
    folder = work / name_of(run)
    shutil.rmtree(folder, ignore_errors=True)
    options = {"eval_rows": EVAL_ROWS, "stop_tokens": TOKENS, **SETTINGS[run.setting]["options"], **dict(run.options)}
    fixed = {"out": work, "name": folder.name, "steps": 1_000_000, "seed": run.seed}
    script = importlib.import_module(run.method)
    sys.argv = [str(script.__file__), *inputs, *command_line([*fixed.items(), *options.items()])]
    with (
        open(work / f"{folder.name}.log", "w") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        script.main()
        summary = summarise(folder)
        entropies = {countdown: countdown_entropies, word_problems: word_problem_entropies}.get(task_of(run.setting))
        base = inputs[inputs.index("--model") + 1]
        for when, model_folder in (("before", base), ("after", str(folder / "model"))):
            if entropies:
                found = entropies(inputs, model_folder)
                summary |= {f"{when} {key}": value for key, value in found.items()}
        if run.setting.startswith("countdown"):
            summary["after solutions found"] = solutions_found(folder)
    for large in (folder / "model", *folder.glob("checkpoint-*")):
        shutil.rmtree(large)
    for large in folder.glob("*completions.jsonl"):
        large.unlink()
    stored = {"identity": identity(run), "summary": summary}
    files.write_text(folder / "summary.json", json.dumps(stored, indent=1) + "\n")


def start(run: PlannedRun, work: Path, inputs: list[str]):
    """Starts a run in a process of its own."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_runs", "transformers.models.qwen3", "datasets", "grpo"])
    process = context.Process(target=execute, args=(run, work, inputs))
    process.start()
    return process


def execute_all(runs: list[PlannedRun], work: Path, jobs: int) -> dict[PlannedRun, dict]:
    """Executes the runs that are not finished, `jobs` at a time. Returns the summaries; a run that failed has none."""
    summaries = {run: finished(run, work) for run in runs}
    waiting = [run for run, summary in summaries.items() if summary is None]
    print(f"{len(summaries)} runs, {len(summaries) - len(waiting)} of them finished before", flush=True)
    inputs = {setting: prepare(setting, work) for setting in dict.fromkeys(run.setting for run in waiting)}
    total = len(waiting)
    running: dict[PlannedRun, tuple] = {}
    done = 0
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running[run] = start(run, work, inputs[run.setting]), time.monotonic()
            time.sleep(0.05)
            for run, (process, began) in list(running.items()):
                if process.is_alive():
                    continue
                del running[run]
                done += 1
                summary = finished(run, work)
                if summary is None:
                    log = work / f"{name_of(run)}.log"
                    print(f"{name_of(run)}: FAILED (exit status {process.exitcode}); see {log}", file=sys.stderr)
                    continue
                summaries[run] = summary
                k = SETTINGS[run.setting]["options"]["eval_k"]
                print(f"[{done}/{total}] {name_of(run)}: mean@{k} {summary[f'before mean@{k}']:.3f} -> "
                      f"{summary[f'after mean@{k}']:.3f}, pass@{k} {summary[f'after pass@{k}']:.3f}, "
                      f"{summary['steps']} steps, {time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
    finally:
        for process, _ in running.values():  # the next time the run starts again, so it need not end well
            process.kill()
            process.join()
    return {run: summary for run, summary in summaries.items() if summary}


# --- what a run says --------------------------------------------------------------------------------------------------


def running_mean(values: list[float], width: int) -> list[float]:
    """Means of each `width` values in a row, from the first `width` on."""
    return [statistics.fmean(values[i : i + width]) for i in range(len(values) - width + 1)]


def tokens_so_far(folder: Path) -> list[int]:
    """The completion tokens that were sampled up to the end of each step."""
    return list(itertools.accumulate(record["tokens"] for record in files.read_lines(folder / "timing.jsonl")))


def summarise(folder: Path) -> dict:
    """The numbers of a run folder that data/results.csv.gz holds.

    steps to 0.8: the first step at which the mean reward of the last 5 is 0.8 or more (None: never); tokens to 0.8:
    completion tokens sampled until then. mean reward: over all tokens of training, the area under the curve of the
    reward. Entropies, in nats, are means over a tenth of the steps: the first tenth, the lowest, and the last. rebound:
    the last over the lowest of those before it; above 1 the entropy has risen again.
    """
    metrics = files.read_lines(folder / "metrics.jsonl")
    tokens = tokens_so_far(folder)
    step_tokens = [after - before for before, after in zip([0, *tokens], tokens, strict=False)]
    rewards = [step["reward"] for step in metrics]
    reached = next((i + 5 for i, reward in enumerate(running_mean(rewards, 5)) if reward >= 0.8), None)
    width = max(1, len(metrics) // 10)
    entropy = running_mean([step["entropy"] for step in metrics], width)
    summary = {
        "steps": len(metrics),
        "tokens": tokens[-1],
        "steps to 0.8": reached,
        "tokens to 0.8": None if reached is None else tokens[reached - 1],
        "mean reward": sum(r * n for r, n in zip(rewards, step_tokens, strict=True)) / tokens[-1],
        "entropy first": entropy[0],
        "entropy lowest": min(entropy),
        "entropy last": entropy[-1],
        "rebound": entropy[-1] / max(min(entropy[:-width] or entropy), 1e-9),
        "skipped updates": sum(step["skipped_updates"] for step in metrics),
    }
    evaluations = json.loads((folder / "eval.json").read_text())
    for when, result in (("before", evaluations[0]), ("after", evaluations[-1])):
        numbers = {key: value for key, value in result.items() if key != "step" and not key.endswith("_ci")}
        summary |= {f"{when} {key}": value for key, value in numbers.items()}
    return summary


def sample_countdown(model_folder: str, rows: list[dict], group_size: int) -> tuple[common.Rollout, list[list[str]]]:
    """Completions of these Countdown questions, group_size of each, as a Rollout and as the texts of their tokens. The
    same every time."""
    model, tokenizer = load_model(model_folder, torch.device("cpu"))
    prompts = tokenizer([row["question"] for row in rows])["input_ids"]
    return sample(model, tokenizer, prompts, group_size, countdown.MAX_NEW_TOKENS)


def countdown_entropies(inputs: list[str], model_folder: str) -> dict[str, float]:
    """Mean entropy, in nats, at the tokens of Countdown completions at which the model chooses a number or an operator,
    and elsewhere: at results of arithmetic, copied totals, the end."""
    rollout, completions = sample_countdown(
        model_folder, countdown.questions(EVAL_ROWS, 0, held_out=True), SCORED_SAMPLES
    )
    kinds = []
    for tokens in completions:
        choices = countdown.choice_positions("".join(tokens))  # one character is one token
        kinds.append(["at choices" if i in choices else "elsewhere" for i in range(len(tokens))])
    return entropy_by_kind(rollout, kinds)


def word_problem_entropies(inputs: list[str], model_folder: str) -> dict[str, float]:
    """Mean entropy, in nats, at each kind of word_problems.token_kinds, on the first problems to evaluate on."""
    given = dict(zip(inputs[::2], inputs[1::2], strict=True))
    max_new_tokens = word_problems.MAX_NEW_TOKENS
    cfg = grpo.Config(dataset=given["--eval-dataset"], system=given["--system"], max_new_tokens=max_new_tokens)
    model, tokenizer = load_model(model_folder, torch.device("cpu"))
    problems = data.training_problems(cfg)[:SCORED_WORD_PROBLEMS]
    prompts = [problem["prompt_ids"] for problem in data.encode(cfg, model, tokenizer, problems)]
    rollout, completions = sample(model, tokenizer, prompts, SCORED_SAMPLES, max_new_tokens)
    return entropy_by_kind(rollout, [word_problems.token_kinds(tokens) for tokens in completions])


def sample(
    model, tokenizer, prompts: list[list[int]], group_size: int, max_new_tokens: int
) -> tuple[common.Rollout, list[list[str]]]:
    """Completions as a Rollout and as the texts of their tokens."""
    uniforms = torch.rand(len(prompts) * group_size, max_new_tokens, generator=torch.Generator().manual_seed(0))
    rollout = common.sample(model, prompts, group_size, max_new_tokens, stop_ids(model, tokenizer), uniforms)
    completions = []
    for ids, length in zip(rollout.completion_ids.tolist(), rollout.completion_lengths().long(), strict=True):
        completions.append([tokenizer.decode([token], skip_special_tokens=True) for token in ids[:length]])
    return rollout, completions


def entropy_by_kind(rollout: common.Rollout, kinds: list[list[str]]) -> dict[str, float]:
    """kinds: of the tokens of each completion."""
    values: dict[str, list[float]] = {}
    for kinds_of_row, entropies in zip(kinds, rollout.entropy.tolist(), strict=True):
        for name, entropy in zip(kinds_of_row, entropies, strict=False):  # entropies: also those behind the end
            values.setdefault(f"entropy {name}", []).append(entropy)
    return {name: statistics.fmean(some) for name, some in values.items()}


def solutions_found(folder: Path) -> float:
    """The mean over Countdown problems of the share of their solutions that the samples of the last evaluation have
    found."""
    records = files.read_lines(folder / "eval_completions.jsonl")
    last_step = records[-1]["step"]
    found: dict[str, set[str]] = {}
    for record in records:
        if record["step"] == last_step and not record.get("greedy"):
            right = found.setdefault(record["question"], set())
            if record["reward"] > 0.5:
                right.add(record["completion"])
    shares = []
    for question, right in found.items():
        numbers, target = countdown.parse(question)
        solutions = {chain for chain, total in countdown.chains(numbers) if total == target}
        shares.append(len(right & solutions) / len(solutions))
    return statistics.fmean(shares)


def trajectory(folder: Path) -> list[dict]:
    """Every evaluation of a run, with the tokens that were sampled until then."""
    tokens = [0, *tokens_so_far(folder)]
    points = []
    for number, result in enumerate(json.loads((folder / "eval.json").read_text())):
        numbers = {key: value for key, value in result.items() if not key.endswith("_ci")}
        points.append({"evaluation": number, "tokens": tokens[result["step"]], **numbers})
    return points


def curve(folder: Path, n_tokens: int, n_points: int = 30) -> list[dict]:
    """Reward, entropy (nats) and length (tokens) of a run's steps, at n_points equal numbers of sampled tokens."""
    metrics = files.read_lines(folder / "metrics.jsonl")
    tokens = tokens_so_far(folder)
    names = dict(reward="reward", entropy="entropy", length="completions/mean_length")
    points = []
    i = 0
    for point in range(1, n_points + 1):
        at = n_tokens * point // n_points
        first = i
        while i < len(tokens) - 1 and tokens[i] < at:
            i += 1
        some = metrics[first : i + 1]  # from the step that reached the last point to the one that reaches this point
        means = {name: statistics.fmean(step[key] for step in some) for name, key in names.items()}
        points.append({"tokens": at, **means})
    return points
