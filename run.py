"""What every run needs around its method: options, model and data, the run folder, metrics, progress.

A script extends `RunConfig` with its own options and loops over `Run.steps()`:

    cfg = parse(Config, __doc__)
    with Run(cfg) as run:
        for _ in run.steps():             # evaluates before the first and after the last step
            rollout = run.sample()        # prompts -> completions
            run.verify(rollout)           # completions -> rewards
            ...                           # the method: rewards -> advantages -> objective
            metrics = run.update(rollout, objective, reduction, advantages)
            run.log(rollout, metrics)

A run leaves in runs/<name>/: config.json, metrics.jsonl (a line a step, the same bytes for the same seed on a CPU),
timing.jsonl (seconds a step), completions.jsonl, eval.jsonl, the trained model in model/, and curves.png.
Exit status: 0 done; 2 the options or the input are wrong, and nothing was written; 130 Ctrl-C, with everything saved.
"""

import argparse
import dataclasses
import json
import math
import os
import random
import sys
import time
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

import common
import tiny
import verifier
from common import Rollout


def fail(message: str):
    """Ends the program with one line on stderr and exit status 2: for what the user can put right."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# --- options ----------------------------------------------------------------------------------------------------------


def option(default, help: str, above: float | None = None, at_least: float | None = None):
    """A field of a config: its default, the text that --help shows, and the bounds that `parse` checks."""
    return dataclasses.field(default=default, metadata={"help": help, "bounds": dict(above=above, at_least=at_least)})


@dataclass
class RunConfig:
    model: str | None = option(None, "hub name or local folder; without it: the tiny base, <out>/tiny-base")
    dataset: str = option("arithmetic", "arithmetic (built in), or a JSON Lines file of question and answer")
    out: str = option("runs", "folder that holds all runs")
    name: str | None = option(None, "folder of this run inside <out>; default: <method>-1, -2, ...")
    seed: int = option(0, "decides the order of the prompts and every sample", at_least=0)
    steps: int = option(60, "rollout-and-update steps", at_least=0)

    n_prompts: int = option(32, "Q, prompts a step", at_least=1)
    group_size: int = option(8, "G, completions a prompt", at_least=2)
    rollout_rows: int = option(1024, "completions sampled at a time: memory, not results", at_least=1)
    max_new_tokens: int | None = option(None, "longest completion; 64 for arithmetic, else 512", at_least=1)
    temperature: float = option(1.0, "of sampling, and so of every log-prob and entropy", above=0)

    lr: float | None = option(None, "AdamW's; 2e-4 for a model below 10M parameters, else 1e-6", above=0)
    warmup_steps: int = option(5, "optimizer steps over which the learning rate rises linearly", at_least=0)
    max_grad_norm: float = option(1.0, "the gradient is scaled down to this norm", above=0)
    minibatches: int = option(1, "optimizer steps a rollout, each on its share of the rows", at_least=1)
    token_budget: int | None = option(None, "tokens of a micro-batch, with padding; 2048, on a GPU 16384", at_least=1)

    eval_rows: int = option(256, "held-out problems to evaluate on; 0: no evaluation", at_least=0)
    eval_k: int = option(8, "completions a problem for mean@k and pass@k", at_least=1)
    log_completions: int = option(4, "completions a step to keep in completions.jsonl", at_least=0)


def parse(config_class: type, doc: str, argv: list[str] | None = None):
    """The command line as a `config_class`. What is unknown or out of bounds ends the program with status 2."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=formatter, allow_abbrev=False)
    parser.error = fail
    inherited = {f.name for f in dataclasses.fields(RunConfig)}
    sections = {False: parser.add_argument_group("this method"), True: parser.add_argument_group("every run")}
    for f in dataclasses.fields(config_class):
        kind = typing.get_type_hints(config_class)[f.name]
        shown = "" if f.default is None else f" [{f.default}]"
        keywords = dict(default=f.default, help=f.metadata["help"] + shown)
        if typing.get_origin(kind) is Literal:
            keywords["choices"] = typing.get_args(kind)
        elif kind is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        else:
            keywords["type"] = bounded(next(iter(typing.get_args(kind)), kind), **f.metadata["bounds"])
            keywords["metavar"] = "X"
        sections[f.name in inherited].add_argument("--" + f.name.replace("_", "-"), **keywords)
    return config_class(**vars(parser.parse_args(argv)))


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


# --- model and data ---------------------------------------------------------------------------------------------------


def load_checkpoint(path: str, device: torch.device):
    """A causal LM in float32 and its tokenizer, from the hub or a local folder; safetensors only, no remote code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True).to(device)
        common.check_head(model)
    except Exception as error:  # of any class: OSError, SafetensorError, JSONDecodeError ...
        fail(f"--model {path} cannot be used: {(str(error).strip() or repr(error)).splitlines()[0]}")
    return model, tokenizer


def stop_ids(model, tokenizer) -> list[int]:
    """The ids that end a completion: the tokenizer's EOS and those of the model's generation_config."""
    ids = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}
    if not ids:
        fail("--model: neither its tokenizer nor its generation_config names an end-of-sequence token")
    return sorted(ids)


def estimate_memory(cfg: RunConfig, model, prompt_length: int) -> dict[str, int]:
    """Bytes that the parts of a run will hold at once, roughly. The last two follow each other and do not add up."""
    config, gpu = model.config.get_text_config(), model.device.type == "cuda"
    D, layers, V = config.hidden_size, config.num_hidden_layers, config.vocab_size
    heads = config.num_attention_heads
    kv = (getattr(config, "num_key_value_heads", None) or heads) * (getattr(config, "head_dim", None) or D // heads)
    size = 2 if gpu else 4  # bytes of an activation
    weights = 4 * sum(p.numel() for p in model.parameters())
    rows = min(cfg.rollout_rows, max(cfg.n_prompts * cfg.group_size, cfg.eval_rows * cfg.eval_k))
    cache = rows * (prompt_length + cfg.max_new_tokens) * 2 * layers * kv * size
    # Kept for the backward pass: about 34 D values a token and layer (Korthikanti et al., arXiv 2205.05198, without the
    # attention matrix). Then two float32 buffers of the head's chunk, and the gradient of its weight.
    chunk = max(common.CHUNK_ELEMENTS[model.device.type], V)
    update = cfg.token_budget * layers * 34 * D * size // 2 + 2 * 4 * chunk + 4 * V * D
    return {
        "weights, gradients, AdamW": 4 * weights + (weights // 2 if gpu else 0),
        "rollout": cache + 4 * rows * V * 4,
        "update": update,
    }


def check_memory(cfg: RunConfig, model, prompt_length: int) -> None:
    """Prints one line with the estimate, and refuses what cannot fit on the GPU."""
    parts = estimate_memory(cfg, model, prompt_length)
    n = sum(p.numel() for p in model.parameters())
    listed = ", ".join(f"{name} {size / 2**30:.2g}" for name, size in parts.items())
    print(f"{n:,} parameters on {model.device.type}; memory estimated in GiB: {listed}")
    if model.device.type == "cuda":
        fixed, rollout, update = parts.values()
        free = torch.cuda.mem_get_info()[0] + fixed // 4  # the weights are there already
        for needed, way_out in ((fixed, "a smaller --model"), (fixed + rollout, "a smaller --rollout-rows"),
                                (fixed + update, "a smaller --token-budget")):  # fmt: skip
            if needed > free:
                fail(f"about {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free: choose {way_out}")


def load_rows(cfg: RunConfig) -> tuple[list[dict], list[dict]]:
    """Rows {"question", "answer"} to train on and to evaluate on, without a question in common."""
    if cfg.dataset == "arithmetic":
        train = tiny.problems(8192, cfg.seed, held_out=False)
        return train, tiny.problems(cfg.eval_rows, 0, held_out=True)
    path = Path(cfg.dataset)
    if not path.is_file():
        fail(f"--dataset {cfg.dataset}: neither 'arithmetic' nor a file")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({"question": str(row["question"]), "answer": str(row["answer"])})
        except (ValueError, KeyError, TypeError):
            fail(f"--dataset {path}, line {number}: not a JSON object with 'question' and 'answer'")
    rows = list({row["question"]: row for row in rows}.values())  # a question once: the two sides stay disjoint
    good = [row for row in rows if verifier.verifiable(row["answer"])]
    if len(good) < len(rows):
        print(f"--dataset: {len(rows) - len(good)} of {len(rows)} rows dropped, their answers cannot be verified")
    if len(good) < cfg.eval_rows + 1:
        fail(f"--dataset {path}: {len(good)} usable rows are too few beside --eval-rows {cfg.eval_rows}")
    random.Random(0).shuffle(good)
    return good[cfg.eval_rows :], good[: cfg.eval_rows]


def prompt_ids(tokenizer, question: str) -> list[int]:
    """The question as the model is asked it: one user turn of its chat template, or the bare text and a line end."""
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    return tokenizer(question + "\n", return_dict=False)["input_ids"]


# --- the run ----------------------------------------------------------------------------------------------------------


class Run:
    """Everything that lives as long as a run: model, optimizer, data and the files that it writes."""

    def __init__(self, cfg: RunConfig):
        self.cfg = cfg
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        out = Path(cfg.out)
        try:
            out.mkdir(parents=True, exist_ok=True)
            if not os.access(out, os.W_OK):
                raise PermissionError("not writable")
        except OSError as error:
            fail(f"--out {out}: {error.strerror or error}")
        if cfg.name and (out / cfg.name).exists():
            fail(f"--name {cfg.name}: {out / cfg.name} exists already; choose another name or remove it")

        torch.manual_seed(cfg.seed)
        self.source = cfg.model or str(tiny.base(out / "tiny-base"))
        self.model, self.tokenizer = load_checkpoint(self.source, self.device)
        # The defaults that depend on what is trained, and where; config.json holds what came of them.
        small = sum(p.numel() for p in self.model.parameters()) < 10_000_000
        cfg.lr = cfg.lr or (2e-4 if small else 1e-6)
        cfg.max_new_tokens = cfg.max_new_tokens or (64 if cfg.dataset == "arithmetic" else 512)
        cfg.token_budget = cfg.token_budget or (16384 if self.device.type == "cuda" else 2048)
        self.eos_ids = stop_ids(self.model, self.tokenizer)
        self.train_rows, self.eval_rows = load_rows(cfg)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", math.inf)
        for row in self.train_rows + self.eval_rows:
            row["prompt_ids"] = prompt_ids(self.tokenizer, row["question"])
            if len(row["prompt_ids"]) + cfg.max_new_tokens > limit:
                fail(f"--max-new-tokens {cfg.max_new_tokens}: with a prompt of {len(row['prompt_ids'])} tokens it "
                     f"exceeds the model's {limit} positions ({row['question'][:60]!r})")  # fmt: skip

        check_memory(cfg, self.model, max(len(row["prompt_ids"]) for row in self.train_rows))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=cfg.lr, weight_decay=0.0, fused=True)
        warmup = max(1, cfg.warmup_steps)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: min(1.0, (n + 1) / warmup))
        self.uniforms = torch.Generator().manual_seed(cfg.seed)  # decides every sampled token
        self.position = 0  # training prompts drawn so far
        self.step = 0
        self.seconds: dict[str, float] = {}
        self.evaluations: list[dict] = []
        self.reference = None

        self.folder = new_folder(out, cfg.name)
        (self.folder / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is KeyboardInterrupt:
            self.save()
            print(f"interrupted at step {self.step}; metrics and model are in {self.folder}", file=sys.stderr)
            raise SystemExit(130)

    def steps(self):
        """Yields the number of each step; evaluates before the first and after the last, then saves and reports."""
        self.evaluate()
        with tqdm(total=self.cfg.steps, desc=self.folder.name, unit="step") as self.bar:
            while self.step < self.cfg.steps:
                self.step += 1
                yield self.step
        self.save()
        if self.cfg.steps:
            self.evaluate()
        self.report()

    # sample, verify, update, log

    def generate(self, rows: list[dict], group_size: int, uniforms: Tensor | None) -> Rollout:
        """Completions of these data rows, decoded, rewards still 0. uniforms None: the most probable tokens."""
        prompts, per_batch, parts = [row["prompt_ids"] for row in rows], max(1, self.cfg.rollout_rows // group_size), []
        for i in range(0, len(rows), per_batch):
            some = None if uniforms is None else uniforms[i * group_size : (i + per_batch) * group_size]
            shape = group_size, self.cfg.max_new_tokens
            batch = prompts[i : i + per_batch]
            parts.append(common.sample(self.model, batch, *shape, self.eos_ids, some, self.cfg.temperature))
        rollout = common.concatenate(parts)
        kept = zip(rollout.completion_ids.tolist(), rollout.lengths().long().tolist(), strict=True)
        texts = self.tokenizer.batch_decode([ids[:n] for ids, n in kept], skip_special_tokens=True)
        rollout.texts = [
            {"question": row["question"], "answer": row["answer"], "completion": text}
            for text, row in zip(texts, (row for row in rows for _ in range(group_size)), strict=True)
        ]
        return rollout

    def sample(self) -> Rollout:
        """Completions of the next n_prompts training prompts, group_size each."""
        start = time.perf_counter()
        rows, n = [], len(self.train_rows)
        for i in range(self.position, self.position + self.cfg.n_prompts):
            order = list(range(n))
            random.Random(f"{self.cfg.seed}-{i // n}").shuffle(order)  # a new order each time through the data
            rows.append(self.train_rows[order[i % n]])
        self.position += self.cfg.n_prompts
        shape = (len(rows) * self.cfg.group_size, self.cfg.max_new_tokens)
        rollout = self.generate(rows, self.cfg.group_size, torch.rand(shape, generator=self.uniforms))
        self.clock("sample", start)
        return rollout

    def verify(self, rollout: Rollout) -> Rollout:
        """Fills in the rewards: 1 for a right answer, else 0."""
        start = time.perf_counter()
        rewards = []
        for text in rollout.texts:
            reward, text["verdict"] = verifier.grade(text["completion"], text["answer"])
            rewards.append(reward)
        rollout.rewards = torch.tensor(rewards, device=self.device)
        self.clock("verify", start)
        return rollout

    def reference_logprobs(self, rollout: Rollout) -> Tensor:
        """Log-probs [B, T] of the completions under the model that the run started from, loaded at the first call."""
        if self.reference is None:
            self.reference = load_checkpoint(self.source, self.device)[0].requires_grad_(False)
        return common.score(self.reference, rollout, self.cfg.temperature, self.cfg.token_budget)[0]

    def update(self, rollout: Rollout, objective, reduction: str, active: Tensor | None) -> dict[str, float]:
        """common.update with this run's model, optimizer and options."""
        start, cfg = time.perf_counter(), self.cfg
        metrics = common.update(
            self.model, self.optimizer, self.scheduler, rollout, objective, reduction, active, cfg.temperature,
            cfg.minibatches, cfg.token_budget, cfg.max_grad_norm,
        )  # fmt: skip
        self.clock("update", start)
        return metrics

    def log(self, rollout: Rollout, metrics: dict[str, float]) -> None:
        """Adds the rollout's own metrics to these and writes the step's line, its completions and its seconds."""
        rewards = torch.stack([rollout.rewards[rollout.group == g] for g in rollout.group.unique()])  # [Q, G]
        tokens = rollout.mask.sum()
        metrics = {
            "step": self.step,
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std(1, correction=0).mean()),
            "frac_reward_zero_std": float((rewards.amax(1) == rewards.amin(1)).float().mean()),
            "reward/parse_failed": sum(t["verdict"] == "parse_failed" for t in rollout.texts) / len(rollout),
            "reward/timeout": sum(t["verdict"] == "timeout" for t in rollout.texts) / len(rollout),
            "entropy": float(rollout.entropy.sum() / tokens),
            "completions/mean_length": float(rollout.lengths().mean()),
            "completions/clipped_ratio": float((~rollout.finished).float().mean()),
            **metrics,
        }
        self.append("metrics.jsonl", metrics)
        self.append("timing.jsonl", {"step": self.step, "tokens": int(tokens), **self.seconds})
        self.seconds = {}
        stride = max(1, len(rollout) // max(1, self.cfg.log_completions))  # spread over the prompts
        for i in range(0, len(rollout), stride)[: self.cfg.log_completions]:
            record = {"reward": float(rollout.rewards[i]), "truncated": not bool(rollout.finished[i])}
            self.append("completions.jsonl", {"step": self.step, **rollout.texts[i], **record})
        shown = dict(reward="reward", entropy="entropy", length="completions/mean_length")
        self.bar.set_postfix({label: f"{metrics[key]:.3g}" for label, key in shown.items()}, refresh=False)
        self.bar.update()

    # evaluation, files

    def evaluate(self) -> None:
        """Evaluates on the held-out problems, with the same random numbers every time, and writes eval.jsonl."""
        if not self.eval_rows:
            return
        numbers = torch.Generator().manual_seed(self.cfg.seed)

        def generate(group_size: int, greedy: bool) -> Rollout:
            shape = (len(self.eval_rows) * group_size, self.cfg.max_new_tokens)
            uniforms = None if greedy else torch.rand(shape, generator=numbers)
            return self.verify(self.generate(self.eval_rows, group_size, uniforms))

        result = common.evaluate(generate, self.cfg.eval_k)
        self.seconds = {}
        self.evaluations.append({"step": self.step, **result})
        self.append("eval.jsonl", self.evaluations[-1])

    def clock(self, phase: str, start: float) -> None:
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.perf_counter() - start, 4)

    def append(self, file: str, record: dict) -> None:
        with open(self.folder / file, "a") as f:  # opened each time: what is logged is on disk
            f.write(json.dumps(record) + "\n")

    def save(self) -> None:
        """Writes model and tokenizer beside model/, then renames: the folder is whole or not there."""
        self.model.eval()

        def write(folder: Path) -> None:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

        tiny.write_folder(self.folder / "model", write)

    def report(self) -> None:
        """Prints the closing table and draws curves.png, where matplotlib is installed."""
        names = [k for k in (self.evaluations or [{}])[0] if k != "step"]
        for row in [["", *(f"step {e['step']}" for e in self.evaluations)]] + [
            [name, *(f"{e[name]:.3f}" for e in self.evaluations)] for name in names
        ]:
            print("".join(cell.ljust(14) if i == 0 else cell.rjust(10) for i, cell in enumerate(row)))
        print(f"\nsaved in {self.folder}")
        plot(self.folder)


def new_folder(out: Path, name: str | None) -> Path:
    """<out>/<name>, or for no name the first free of <out>/<script>-1, -2, ..."""
    stem, number = Path(sys.argv[0]).stem or "run", 1
    while True:
        folder = out / (name or f"{stem}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            if name:
                fail(f"--name {name}: {folder} exists already; choose another name or remove it")
            number += 1


def plot(folder: Path) -> None:
    """Draws reward, entropy and length over the steps of metrics.jsonl into curves.png."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    rows = [json.loads(line) for line in lines]
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3), layout="constrained")
    for axis, key in zip(axes, ("reward", "entropy", "completions/mean_length"), strict=True):
        axis.plot([row["step"] for row in rows], [row[key] for row in rows])
        axis.set(title=key, xlabel="step")
    figure.savefig(folder / "curves.png", dpi=120)
    pyplot.close(figure)
