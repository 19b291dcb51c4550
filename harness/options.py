"""The options that every run has, and the command line that is built from them and from a method's own options."""

import argparse
import dataclasses
import importlib.util
import inspect
import json
import math
import os
import sys
import typing
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

C = TypeVar("C")


def fail(message: str, details: str = "") -> NoReturn:
    """Ends the program with one line on stderr and exit status 2: for mistakes that the user can correct. details, such
    as the traceback of the user's own code, follow the line."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # all processes of a torchrun come here; one line is enough
        print(f"error: {' '.join(message.split())}\n{details}".rstrip(), file=sys.stderr)
    raise SystemExit(2)


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    error = error.__cause__ or error  # `datasets` wraps the error that says what is wrong
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def option(
    default: Any, help: str, above: float | None = None, at_least: float | None = None, at_most: float | None = None
) -> Any:
    """A field of a config: its default, its text in --help, and the bounds that `parse` checks."""
    bounds = {"above": above, "at_least": at_least, "at_most": at_most}
    return dataclasses.field(default=default, metadata={"help": help, "bounds": bounds})


@dataclass
class RunConfig:
    """lr, max_new_tokens and token_budget are None until `resolve_defaults` fills them in."""

    model: str | None = option(None, "hub name or local folder; if not given: the tiny base")
    trust_remote_code: bool = option(False, "run code that comes with the checkpoint")
    gradient_checkpointing: bool = option(False, "less memory, more time: compute activations twice")
    lora_rank: int = option(0, "train LoRA adapters of this rank on all linear layers; 0: the whole model", at_least=0)
    dataset: str = option(
        "arithmetic", "arithmetic (built in), a hub name (NAME or NAME:CONFIGURATION), a JSON/JSONL/Parquet file, "
        "a saved folder"
    )  # fmt: skip
    eval_dataset: str | None = option(
        None, "data set to evaluate on; if not given: the second split of --dataset, or rows held out"
    )
    splits: str = option("train,test", "the splits to train and to evaluate on")
    question_column: str | None = option(None, "if not given: question, problem or prompt")
    answer_column: str | None = option(None, "if not given: answer, reward_model or solution")
    system: str | None = option(
        None, "system turn of a chat that has none; '': none; if not given: 'Reason step by step, and put your final "
        "answer within \\boxed{}.', if the tokenizer knows these words"
    )  # fmt: skip
    prompt_template: str = option("Question: {question}\nAnswer:", "prompt of a model without a chat template")
    reward: str | None = option(
        None, "FILE.py:FUNCTION, a reward of your own (completion, row) -> float; above 0.5 counts as right in gtpo, "
        "grpo_s and the evaluation; if not given: the math verifier"
    )  # fmt: skip
    max_prompt_tokens: int = option(1024, "longer prompts are dropped", at_least=1)

    n_prompts: int = option(32, "Q, prompts per step", at_least=1)
    group_size: int = option(8, "G, completions per prompt", at_least=2)
    max_new_tokens: int = option(None, "longest completion; if not given: 64 for arithmetic, else 512", at_least=1)
    temperature: float = option(1.0, "of sampling, and so of every log-prob and entropy", at_least=1e-3)
    cuda_graphs: bool = option(False, "sample with fixed shapes and CUDA graphs")
    rollout_rows: int = option(1024, "completions sampled at a time; changes memory, not results", at_least=1)

    steps: int = option(60, "rollout-and-update steps", at_least=0)
    stop_tokens: int | None = option(None, "end earlier, after this many sampled completion tokens", at_least=1)
    optimizer: Literal["adamw", "sgd"] = option("adamw", "sgd (without momentum) keeps no state: it needs less memory")
    lr: float = option(
        None, "if not given: 2e-4 below 10M parameters, 1e-5 below 300M, else 1e-6; sgd: 0.1; LoRA: ten times that",
        above=0,
    )  # fmt: skip
    warmup_steps: int = option(5, "optimizer steps over which the learning rate rises linearly", at_least=0)
    max_grad_norm: float = option(1.0, "a larger gradient is scaled down to this norm", above=0)
    minibatches: int = option(1, "optimizer steps per rollout, each on its part of the rows", at_least=1)
    token_budget: int = option(None, "tokens of a micro-batch; if not given: 2048, on a GPU 8192", at_least=1)

    eval_rows: int = option(256, "held-out problems to evaluate on; 0: no evaluation", at_least=0)
    eval_k: int = option(8, "completions per problem for mean@k and pass@k", at_least=1)
    eval_every: int = option(0, "evaluate also after every N steps; 0: only before and after the run", at_least=0)
    eval_only: bool = option(False, "evaluate the model and stop")

    seed: int = option(0, "decides the order of the prompts and every sample", at_least=0, at_most=2**63 - 1)
    out: str = option("runs", "folder that holds all runs")
    name: str | None = option(None, "folder of this run inside <out>; if not given: <method>-1, -2, ...")
    save_every: int = option(0, "write a checkpoint after every N steps; 0: only at the end", at_least=0)
    resume: str | None = option(None, "run folder to continue; its stored options apply unless given again")
    track: Literal["none", "tensorboard", "wandb", "trackio"] = option("none", "where else the metrics go")


# What a run keeps when it is resumed: its checkpoints hold the state of this optimizer, for these weights.
FIXED_ON_RESUME = ("optimizer", "lora_rank")

# The first option of each section of --help.
SECTIONS = {
    "model": "model and data",
    "n_prompts": "rollouts",
    "steps": "updates",
    "eval_rows": "evaluation",
    "seed": "files",
}


def parse(config_class: type[C], doc: str | None, argv: list[str] | None = None) -> C:
    """The command line as a `config_class`. An unknown or impossible option ends the program with status 2."""
    # Only the title of the docstring: the equations are for people who open the file.
    title = (doc or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(description=title, usage="%(prog)s [options]", allow_abbrev=False)
    parser.error = fail  # type: ignore[method-assign, assignment]
    hints = typing.get_type_hints(config_class)
    shared_names = {field.name for field in dataclasses.fields(RunConfig)}
    fields = dataclasses.fields(config_class)  # type: ignore[arg-type]
    section = parser.add_argument_group("this method")
    for field in sorted(fields, key=lambda field: field.name in shared_names):  # the method's own options come first
        if field.name in SECTIONS:
            section = parser.add_argument_group(SECTIONS[field.name])
        add_option(section, field, hints[field.name])
    args = parser.parse_args(argv)
    if args.resume:  # the run's stored options become the defaults; what the command line gives still wins
        parser.set_defaults(**stored_options(args.resume, vars(args).keys()))
        args = parser.parse_args(argv)
        args.out = str(Path(args.resume).parent)  # the stored one may be relative to another folder
        for name in FIXED_ON_RESUME:
            stored = parser.get_default(name)
            if getattr(args, name) != stored:
                flag = "--" + name.replace("_", "-")
                fail(f"{flag} {getattr(args, name)}: the run {args.resume} has {stored}, and a run cannot change it")
    return config_class(**vars(args))


def keywords(cfg: Any, function: Callable) -> dict[str, Any]:
    """The options of a config that are also arguments of the function, by their common names."""
    return {name: getattr(cfg, name) for name in inspect.signature(function).parameters if hasattr(cfg, name)}


def stored_options(folder: str, known: Collection[str]) -> dict:
    """The options in the config.json of a run folder. Fails if it is not a run of this script."""
    script = Path(sys.argv[0]).stem
    try:
        stored = dict(json.loads((Path(folder) / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        fail(f"--resume {folder}: no readable config.json in it ({error})")
    if stored.pop("method", None) != script:
        fail(f"--resume {folder}: it is not a run of {script}.py")
    unknown = stored.keys() - set(known)  # of another version; one that was off can be ignored
    in_use = sorted(name for name in unknown if stored[name])
    if in_use:
        fail(f"--resume {folder}: its config.json has options that {script}.py lacks: {', '.join(in_use)}")
    return {name: value for name, value in stored.items() if name in known}


def add_option(parser, field: dataclasses.Field, hint: Any) -> None:
    """Adds a config field to an argparse parser (or section) as the option --its-name."""
    flag = "--" + field.name.replace("_", "-")
    shown_default = "" if field.default is None else f" [{field.default!r}]".replace("%", "%%")
    help = field.metadata["help"] + shown_default
    if typing.get_origin(hint) is Literal:
        parser.add_argument(flag, default=field.default, help=help, choices=typing.get_args(hint))
    elif hint is bool:
        parser.add_argument(flag, default=field.default, help=help, action=argparse.BooleanOptionalAction)
    else:
        value_type = next(iter(typing.get_args(hint)), hint)  # of `int | None`: int
        convert = bounded(value_type, **field.metadata["bounds"])
        parser.add_argument(flag, default=field.default, help=help, type=convert, metavar=value_type.__name__.upper())


def bounded(
    value_type: type, above: float | None = None, at_least: float | None = None, at_most: float | None = None
) -> Callable[[str], Any]:
    """A converter for argparse, from text to a value. It refuses numbers that are out of bounds or not finite."""

    def convert(text: str) -> Any:
        value = value_type(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be a finite number, not {text}")
        if above is not None and not value > above:
            raise argparse.ArgumentTypeError(f"must be above {above}, not {text}")
        if at_least is not None and not value >= at_least:
            raise argparse.ArgumentTypeError(f"must be at least {at_least}, not {text}")
        if at_most is not None and not value <= at_most:
            raise argparse.ArgumentTypeError(f"must be at most {at_most}, not {text}")
        return value

    convert.__name__ = value_type.__name__  # argparse shows this name when the text is not a number
    return convert


def check_options(cfg: RunConfig) -> None:
    """Refuses what is wrong before anything is loaded. Makes the folder --out if all is well."""
    out = Path(cfg.resume or cfg.out)
    if cfg.eval_only and not cfg.eval_rows:
        fail("--eval-only with --eval-rows 0: there is nothing to evaluate on")
    if cfg.name and Path(cfg.name).name != cfg.name:
        fail(f"--name {cfg.name}: it must be the name of a folder in --out {cfg.out}, not a path")
    if cfg.lora_rank and not importlib.util.find_spec("peft"):
        fail(f"--lora-rank {cfg.lora_rank}: it needs the package peft, which is not installed (pip install peft)")
    if cfg.track != "none" and not importlib.util.find_spec(cfg.track):
        fail(f"--track {cfg.track}: it needs the package {cfg.track}, which is not installed (pip install {cfg.track})")
    try:
        if cfg.name and not cfg.resume and (out / cfg.name).exists():
            fail(f"--name {cfg.name}: {out / cfg.name} exists already; choose another, or --resume it")
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError("not writable")
    except OSError as error:  # also if the name is too long
        name = f", --name {cfg.name}" if cfg.name else ""
        fail(f"--out {out}{name}: {error.strerror or error}; give a folder that can be written to")


def default_lr(cfg: RunConfig, n_parameters: int) -> float:
    """The learning rate if --lr is not given. docs/running.md says which of these were measured."""
    if cfg.optimizer == "sgd":
        lr = 0.1
    elif n_parameters < 10_000_000:
        lr = 2e-4
    elif n_parameters < 300_000_000:
        lr = 1e-5
    else:
        lr = 1e-6
    return 10 * lr if cfg.lora_rank else lr


def resolve_defaults(cfg: RunConfig, n_parameters: int, on_gpu: bool) -> None:
    """Fills in, in place, the defaults that depend on the model, the data set and the machine."""
    if cfg.lr is None:
        cfg.lr = default_lr(cfg, n_parameters)
    if cfg.max_new_tokens is None:
        cfg.max_new_tokens = 64 if cfg.dataset == "arithmetic" else 512
    if cfg.token_budget is None:
        cfg.token_budget = 8192 if on_gpu else 2048
