"""The options that every run has, and the command line made of them and of a method's own."""

import argparse
import dataclasses
import json
import math
import os
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


def fail(message: str):
    """Ends the program with one line on stderr and exit status 2: for what the user can put right."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes, which all come here, one line is enough
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def option(default, help: str, above: float | None = None, at_least: float | None = None):
    """A field of a config: its default, the text that --help shows, and the bounds that `parse` checks."""
    return dataclasses.field(default=default, metadata={"help": help, "bounds": dict(above=above, at_least=at_least)})


@dataclass
class RunConfig:
    model: str | None = option(None, "hub name or local folder; without it: the tiny base, <out>/tiny-base")
    trust_remote_code: bool = option(False, "run code that the checkpoint brings along")
    gradient_checkpointing: bool = option(False, "compute activations twice to hold fewer of them")
    fsdp: bool = option(False, "under torchrun: split weights, gradients and AdamW over the GPUs (FSDP2)")
    dataset: str = option("arithmetic", "arithmetic (built in), a hub name, a JSON/JSONL/Parquet file, a saved folder")
    dataset_config: str | None = option(None, "the hub data set's configuration; without it: main, or its first")
    train_split: str = option("train", "split to train on")
    eval_dataset: str | None = option(
        None, "data set to evaluate on; without it: --dataset's eval split, or rows held out"
    )
    eval_split: str = option("test", "split to evaluate on")
    question_column: str | None = option(None, "without it: question, problem or prompt")
    answer_column: str | None = option(None, "without it: answer, reward_model or solution")
    system: str = option(
        "Reason step by step, and put your final answer within \\boxed{}.", "system turn of a chat; '': none"
    )
    prompt_template: str = option("Question: {question}\nAnswer:", "prompt of a model without a chat template")
    max_prompt_tokens: int = option(1024, "longer prompts are dropped", at_least=1)

    n_prompts: int = option(32, "Q, prompts a step", at_least=1)
    group_size: int = option(8, "G, completions a prompt", at_least=2)
    max_new_tokens: int | None = option(None, "longest completion; without it: 64 for arithmetic, else 512", at_least=1)
    temperature: float = option(1.0, "of sampling, and so of every log-prob and entropy", above=0)
    cuda_graphs: bool = option(False, "decode with fixed shapes and CUDA graphs; written without a GPU, not measured")
    rollout_rows: int = option(1024, "completions sampled at a time: memory, not results", at_least=1)

    steps: int = option(60, "rollout-and-update steps", at_least=0)
    stop_tokens: int | None = option(None, "end earlier, once so many completion tokens were sampled", at_least=1)
    lr: float | None = option(None, "AdamW's; without it: 2e-4 below 10M parameters, else 1e-6", above=0)
    warmup_steps: int = option(5, "optimizer steps over which the learning rate rises linearly", at_least=0)
    max_grad_norm: float = option(1.0, "the gradient is scaled down to this norm", above=0)
    minibatches: int = option(1, "optimizer steps a rollout, each on its share of the rows", at_least=1)
    token_budget: int | None = option(None, "tokens of a micro-batch; without it: 2048, on a GPU 16384", at_least=1)

    eval_rows: int = option(256, "held-out problems to evaluate on; 0: no evaluation", at_least=0)
    eval_k: int = option(8, "completions a problem for mean@k and pass@k", at_least=1)
    eval_every: int = option(0, "evaluate also every so many steps; 0: before and after", at_least=0)
    eval_only: bool = option(False, "evaluate the model and stop")

    seed: int = option(0, "decides the order of the prompts and every sample", at_least=0)
    out: str = option("runs", "folder that holds all runs")
    name: str | None = option(None, "folder of this run inside <out>; without it: <method>-1, -2, ...")
    save_every: int = option(0, "checkpoint every so many steps; 0: at the end", at_least=0)
    resume: str | None = option(None, "folder of a run to go on with, by its own options and what else is given")
    log_completions: int = option(4, "completions a step to keep in completions.jsonl", at_least=0)
    track: Literal["none", "tensorboard", "wandb", "trackio"] = option("none", "where else the metrics go")
    save_plots: bool = option(True, "draw curves.png at the end, if matplotlib is installed")


# The option that opens each section of --help.
SECTIONS = dict(model="model and data", n_prompts="rollouts", steps="updates", eval_rows="evaluation", seed="files")


def parse(config_class: type, doc: str, argv: list[str] | None = None):
    """The command line as a `config_class`. What is unknown or out of bounds ends the program with status 2."""
    # Of the docstring the title is enough here: the equations are for who opens the file.
    about = dict(description=doc.split("\n\n")[0], usage="%(prog)s [options]")
    parser = argparse.ArgumentParser(**about, allow_abbrev=False)
    parser.error = fail
    fields, hints = dataclasses.fields(config_class), typing.get_type_hints(config_class)
    shared = {f.name for f in dataclasses.fields(RunConfig)}
    section = parser.add_argument_group("this method")
    for f in sorted(fields, key=lambda f: f.name in shared):  # the method's own first
        if f.name in SECTIONS:
            section = parser.add_argument_group(SECTIONS[f.name])
        section.add_argument("--" + f.name.replace("_", "-"), **keywords(f, hints[f.name]))
    args = parser.parse_args(argv)
    if args.resume:  # the run's own options, then once more what the command line says
        try:
            stored = json.loads((Path(args.resume) / "config.json").read_text())
        except (OSError, ValueError) as error:
            fail(f"--resume {args.resume}: no readable config.json in it ({error})")
        if stored.pop("method", None) != (method := Path(sys.argv[0]).stem):
            fail(f"--resume {args.resume}: it is not a run of {method}.py")
        if unknown := stored.keys() - vars(args).keys():
            fail(f"--resume {args.resume}: its config.json has options that {method}.py lacks: {', '.join(unknown)}")
        parser.set_defaults(**stored)
        args = parser.parse_args(argv)
    return config_class(**vars(args))


def keywords(field: dataclasses.Field, hint: type) -> dict:
    """What argparse's add_argument is to know of a field with this type hint."""
    shown = "" if field.default is None else f" [{field.default!r}]".replace("%", "%%")
    known = dict(default=field.default, help=field.metadata["help"] + shown)
    if typing.get_origin(hint) is Literal:
        return known | dict(choices=typing.get_args(hint))
    if hint is bool:
        return known | dict(action=argparse.BooleanOptionalAction)
    kind = next(iter(typing.get_args(hint)), hint)
    return known | dict(type=bounded(kind, **field.metadata["bounds"]), metavar=kind.__name__.upper())


def bounded(kind: type, above: float | None, at_least: float | None):
    """A converter from text for argparse that refuses numbers out of bounds."""

    def convert(text: str):
        value = kind(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be a finite number, not {text}")
        if above is not None and not value > above:
            raise argparse.ArgumentTypeError(f"must be above {above}, not {text}")
        if at_least is not None and not value >= at_least:
            raise argparse.ArgumentTypeError(f"must be at least {at_least}, not {text}")
        return value

    convert.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return convert
