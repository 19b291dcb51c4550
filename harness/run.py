"""What every run needs around its method: the run folder, checkpoints, metrics, evaluation, progress.

A script extends `options.RunConfig` with its own options and loops over `Run.steps()`:

    cfg = parse(Config, __doc__)
    with Run(cfg) as run:
        for _ in run.steps():             # evaluates before the first and after the last step
            rollout = run.sample()        # prompts -> completions
            run.verify(rollout)           # completions -> rewards
            ...                           # the method: rewards -> advantages -> objective
            metrics = run.update(rollout, objective, reduction, advantages)
            run.log(rollout, metrics)

A run leaves in runs/<name>/: config.json; metrics.jsonl, a line a step, the same bytes for the same seed on a CPU;
timing.jsonl, seconds a step; completions.jsonl; eval.json, eval.csv and eval_completions.jsonl; the trained model in
model/; checkpoint-N/, from which --resume goes on; curves.png.

`torchrun --nproc-per-node N` runs the same loop in N processes (distributed.py). Every process holds the whole rollout
and takes every decision alike; what they split is in sample, verify and update. Process 0 writes.

Exit status: 0 done; 1 stopped by itself (disk full, updates that are not finite, another process lost); 2 the options
or the input are wrong, and nothing was written; 130 Ctrl-C, 143 SIGTERM, both after the step in hand, with everything
saved.
"""

import csv
import dataclasses
import errno
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import common
import data
import distributed
import evaluation
import files
import tiny
import verifier
from common import Rollout
from options import RunConfig, fail

BAD_STEPS = 3  # so many in a row with updates that are not finite end the run


class Run:
    """Everything that lives as long as a run: model, optimizer, data and the files that it writes."""

    def __init__(self, cfg: RunConfig):
        self.cfg, out = cfg, Path(cfg.out)
        self.device = distributed.start()
        self.writes = distributed.rank() == 0
        if cfg.fsdp and "LOCAL_RANK" not in os.environ:
            fail("--fsdp: it splits the model over several processes; start them with torchrun --nproc-per-node N")
        try:
            out.mkdir(parents=True, exist_ok=True)
            if not os.access(out, os.W_OK):
                raise PermissionError("not writable")
        except OSError as error:
            fail(f"--out {out}: {error.strerror or error}")
        if cfg.eval_only and not cfg.eval_rows:
            fail("--eval-only with --eval-rows 0: there is nothing to evaluate on")
        if cfg.name and Path(cfg.name).name != cfg.name:
            fail(f"--name {cfg.name}: it is the name of one folder in --out {cfg.out}, and no path")
        if cfg.name and not cfg.resume and (out / cfg.name).exists():
            fail(f"--name {cfg.name}: {out / cfg.name} exists already; choose another, or --resume it")
        if cfg.track != "none" and not importlib.util.find_spec(cfg.track):
            fail(f"--track {cfg.track}: the package {cfg.track} is not installed")
        checkpoint = files.last_checkpoint(Path(cfg.resume)) if cfg.resume else None

        torch.manual_seed(cfg.seed)
        try:
            rows = data.load_rows(cfg)
            with distributed.main_first():
                self.source = cfg.model or str(tiny.base(out / "tiny-base"))
            self.model, self.tokenizer = self.load(str(checkpoint or self.source))
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        self.eos_ids = data.stop_ids(self.model, self.tokenizer)
        # The defaults that depend on what is trained, and where; config.json holds what came of them.
        small = sum(p.numel() for p in self.model.parameters()) < 10_000_000
        cfg.lr = cfg.lr or (2e-4 if small else 1e-6)
        cfg.max_new_tokens = data.longest_completion(cfg)
        cfg.token_budget = cfg.token_budget or (16384 if self.device.type == "cuda" else 2048)
        self.train_rows, self.eval_rows = (data.encode(cfg, self.model, self.tokenizer, side) for side in rows)
        data.check_memory(cfg, self.model, max(len(row["prompt_ids"]) for row in self.train_rows))

        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=cfg.lr, weight_decay=0.0, fused=True)
        self.schedule(0)
        self.uniforms = torch.Generator().manual_seed(cfg.seed)  # decides every sampled token
        self.step = self.bad_steps = 0
        self.position = self.tokens = 0  # training prompts drawn and completion tokens sampled so far
        self.epoch, self.order = -1, []  # the order of the training rows, this time through them
        self.seconds: dict[str, float] = {}
        self.evaluations: list[dict] = []
        self.reference = None
        self.asked = self.stop = 0  # the exit status that a signal asked for, and once all processes know of it
        self.asked_at = 0.0
        self.saved = -1  # the step of the last checkpoint

        folder = (Path(cfg.resume) if cfg.resume else files.new_folder(out, cfg.name)) if self.writes else None
        self.folder = distributed.gather(folder)[0]
        if checkpoint:
            self.restore(checkpoint)
        stored = {"method": Path(sys.argv[0]).stem, **dataclasses.asdict(cfg), "resume": None, "eval_only": False}
        if self.writes:
            files.write_text(self.folder / "config.json", json.dumps(stored, indent=2) + "\n")
        self.track = files.tracker(cfg.track if self.writes else "none", self.folder, stored)

    def schedule(self, updates: int) -> None:
        """Warm-up to --lr, from where it is after so many optimizer steps."""
        for group in self.optimizer.param_groups:  # a checkpoint's may have been another
            group["lr"] = group["initial_lr"] = self.cfg.lr
        warmup = max(1, self.cfg.warmup_steps)
        self.scheduler = LambdaLR(self.optimizer, lambda n: min(1.0, (n + 1) / warmup), last_epoch=updates - 1)

    def load(self, source: str):
        device = torch.device("cpu") if self.cfg.fsdp else self.device  # the whole model need not fit on a GPU
        model, tokenizer = data.load_model(source, device, self.cfg.trust_remote_code, self.cfg.gradient_checkpointing)
        if self.cfg.fsdp:
            distributed.shard(model, self.device)
        return model, tokenizer

    def __enter__(self):
        self.handlers = {s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def on_signal(self, number: int, _) -> None:
        if self.asked and time.monotonic() - self.asked_at > 1:  # the second time: at once
            raise KeyboardInterrupt
        if not self.asked:  # torchrun sends on what the terminal has sent already
            self.say("\nstopping after this step; once more stops at once")
            self.asked, self.asked_at = 128 + number, time.monotonic()

    def __exit__(self, kind, error, _):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if kind is None or (kind is SystemExit and self.stop):  # all processes come here
            return distributed.finish()
        if distributed.lost(error):
            found = any(self.folder.glob("checkpoint-*"))
            way = f"go on with --resume {self.folder}" if found else "no checkpoint was written yet (--save-every)"
            print(f"error: process {distributed.rank()} lost another one in step {self.step}; {way}", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)  # at once: what is left of the process group might wait for the lost one
        if kind is KeyboardInterrupt:
            print(f"stopped in step {self.step}; {self.folder} holds what was saved before it", file=sys.stderr)
            raise SystemExit(self.stop or 130) from None
        if error and (getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT) or "o space left" in str(error)):
            print(f"error: the disk of {self.folder} is full; make room, then --resume {self.folder}", file=sys.stderr)
            raise SystemExit(1) from None

    def steps(self):
        """Yields the number of each step; evaluates before the first and after the last, then saves and reports."""
        cfg = self.cfg
        if cfg.eval_only or not self.evaluations:
            self.evaluate()
        if cfg.eval_only:
            return self.report()
        self.stop = max(distributed.gather(self.asked))  # some of the processes may have had no signal
        from tqdm import tqdm

        shown = dict(desc=self.folder.name, unit="step", disable=not self.writes)
        with tqdm(total=cfg.steps, initial=self.step, **shown) as self.bar:
            while not self.stop and self.step < cfg.steps and self.tokens < (cfg.stop_tokens or math.inf):
                self.step += 1
                yield self.step
                self.stop = max(distributed.gather(self.asked))
                if cfg.eval_every and self.step % cfg.eval_every == 0 and self.step < cfg.steps:
                    self.evaluate()
                if self.bad_steps >= BAD_STEPS:
                    self.stop = 1
                    self.say(f"\nerror: {self.bad_steps} steps in a row had updates that were not finite, and were "
                             "skipped; a smaller --lr may help")  # fmt: skip
                if cfg.save_every and self.step % cfg.save_every == 0 and self.step < cfg.steps:
                    self.save()
        self.save()
        if self.stop:
            self.say(f"saved in {self.folder} after step {self.step}; go on with --resume {self.folder}")
            raise SystemExit(self.stop)
        if self.evaluations and self.evaluations[-1]["step"] < self.step:
            self.evaluate()
        self.write_model(self.folder / "model")
        return self.report()

    # --- sample, verify, update, log

    def generate(self, rows: list[dict], group_size: int, uniforms: Tensor | None) -> Rollout:
        """Completions of these data rows, decoded, rewards still 0. uniforms None: the most probable tokens.

        Each process samples for some of the prompts, and gets what the others have sampled.
        """
        cfg, share, parts = self.cfg, distributed.mine(len(rows)), []
        per_batch = max(1, cfg.rollout_rows // group_size)
        with distributed.gathered(self.model):
            for i in range(share.start, share.stop, per_batch):
                some = slice(i, min(i + per_batch, share.stop))
                prompts = [row["prompt_ids"] for row in rows[some]]
                numbers = None if uniforms is None else uniforms[some.start * group_size : some.stop * group_size]
                parts.append(common.sample(
                    self.model, prompts, group_size, cfg.max_new_tokens, self.eos_ids, numbers, cfg.temperature,
                    fixed=cfg.cuda_graphs,
                ))  # fmt: skip
        rollout = common.gather(common.concatenate(parts) if parts else None, self.device)
        rollout.texts = data.texts(self.tokenizer, rollout, rows)
        return rollout

    def sample(self) -> Rollout:
        """Completions of the next n_prompts training prompts, group_size each."""
        start = time.perf_counter()
        rows, n = [], len(self.train_rows)
        for i in range(self.position, self.position + self.cfg.n_prompts):
            if self.epoch != i // n:  # a new order each time through the data
                self.epoch = i // n
                self.order = data.order(n, self.cfg.seed, self.epoch)
            rows.append(self.train_rows[self.order[i % n]])
        self.position += self.cfg.n_prompts
        shape = (len(rows) * self.cfg.group_size, self.cfg.max_new_tokens)
        rollout = self.generate(rows, self.cfg.group_size, torch.rand(shape, generator=self.uniforms))
        self.tokens += int(rollout.mask.sum())
        self.clock("sample", start)
        return rollout

    def verify(self, rollout: Rollout) -> Rollout:
        """Fills in the rewards: 1 for a right answer, else 0."""
        start, share = time.perf_counter(), rollout.texts[distributed.mine(len(rollout))]
        grades = distributed.gather([verifier.grade(text["completion"], text["answer"]) for text in share])
        rewards, verdicts = zip(*(grade for part in grades for grade in part), strict=True)
        rollout.rewards = torch.tensor(rewards, device=self.device)
        for text, verdict in zip(rollout.texts, verdicts, strict=True):
            text["verdict"] = verdict
        self.clock("verify", start)
        return rollout

    def reference_logprobs(self, rollout: Rollout) -> Tensor:
        """Log-probs [B, T] of the completions under the model that the run started from, loaded at the first call."""
        if self.reference is None:
            self.reference = self.load(self.source)[0].requires_grad_(False)
        return common.score(self.reference, rollout, self.cfg.temperature, self.cfg.token_budget)[0]

    def update(self, rollout: Rollout, objective, reduction: str, active: Tensor | None) -> dict[str, float]:
        """common.update with this run's model, optimizer and options."""
        start, cfg = time.perf_counter(), self.cfg
        metrics = common.update(
            self.model, self.optimizer, self.scheduler, rollout, objective, reduction, active, cfg.temperature,
            cfg.minibatches, cfg.token_budget, cfg.max_grad_norm,
        )  # fmt: skip
        self.bad_steps = self.bad_steps + 1 if metrics["skipped_updates"] else 0
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
        timing = {"step": self.step, "tokens": int(tokens), **self.seconds}
        if self.device.type == "cuda":
            timing["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.seconds = {}
        self.append("timing.jsonl", timing)
        stride = max(1, len(rollout) // max(1, self.cfg.log_completions))  # spread over the prompts
        self.append("completions.jsonl", *self.records(rollout, stride)[: self.cfg.log_completions])
        self.append("metrics.jsonl", metrics)
        self.track(metrics)
        shown = dict(reward="reward", entropy="entropy", length="completions/mean_length")
        self.bar.set_postfix({label: f"{metrics[key]:.3g}" for label, key in shown.items()}, refresh=False)
        self.bar.update()

    def evaluate(self) -> None:
        """Evaluates on the held-out problems, with the same random numbers every time."""
        rows, k = self.eval_rows, self.cfg.eval_k
        if not rows:
            return
        same = torch.Generator().manual_seed(self.cfg.seed)
        uniforms = torch.rand(len(rows) * k, self.cfg.max_new_tokens, generator=same)
        greedy, sampled = self.verify(self.generate(rows, 1, None)), self.verify(self.generate(rows, k, uniforms))
        self.seconds = {}
        result = {"step": self.step, **evaluation.evaluate(greedy, sampled, k)}
        self.evaluations = [e for e in self.evaluations if e["step"] != self.step] + [result]
        if not self.writes:
            return
        files.write_text(self.folder / "eval.json", json.dumps(self.evaluations, indent=1) + "\n")
        with open(self.folder / "eval.csv", "w", newline="") as f:
            table = csv.DictWriter(f, evaluation.names(self.evaluations), extrasaction="ignore")
            table.writeheader()
            table.writerows(self.evaluations)
        answers = [{**r, "greedy": True} for r in self.records(greedy)] + self.records(sampled)
        self.append("eval_completions.jsonl", *answers)

    # --- files

    def clock(self, phase: str, start: float) -> None:
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.perf_counter() - start, 4)

    def records(self, rollout: Rollout, stride: int = 1) -> list[dict]:
        """What people read of every stride-th completion."""
        rewards, finished = rollout.rewards.tolist(), rollout.finished.tolist()
        return [
            {"step": self.step, **rollout.texts[i], "reward": rewards[i], "truncated": not finished[i]}
            for i in range(0, len(rollout), stride)
        ]

    def say(self, line: str) -> None:
        if self.writes:
            print(line, file=sys.stderr)

    def append(self, file: str, *records: dict) -> None:
        if not self.writes:
            return
        with open(self.folder / file, "a") as f:  # opened each time: what is logged is on disk
            f.writelines(json.dumps(record) + "\n" for record in records)

    def write_model(self, path: Path, extra: Callable[[Path], None] = lambda folder: None) -> None:
        """Writes model, tokenizer and what `extra` adds beside `path`, and renames it."""
        weights = distributed.whole_weights(self.model)  # of FSDP's parts, which every process must help with

        def write(folder: Path) -> None:
            self.model.save_pretrained(folder, state_dict=weights)
            self.tokenizer.save_pretrained(folder)
            extra(folder)

        if self.writes:
            files.write_folder(path, write)

    def save(self) -> None:
        """Writes checkpoint-<step>, and only then deletes older ones: at any moment there is a whole one."""
        if self.saved == self.step:
            return
        self.saved, target = self.step, self.folder / f"checkpoint-{self.step}"
        state = {
            "optimizer": distributed.whole_state(self.optimizer),
            "updates": self.scheduler.last_epoch,
            "uniforms": self.uniforms.get_state(),
            "position": self.position,
            "tokens": self.tokens,
            "bad_steps": self.bad_steps,
            "step": self.step,
        }
        self.write_model(target, lambda folder: torch.save(state, folder / "state.pt"))
        for old in self.folder.glob("checkpoint-*") if self.writes else ():
            if old != target:
                shutil.rmtree(old)

    def restore(self, checkpoint: Path) -> None:
        """Sets everything but the model, which is loaded already, and cuts the logs off after the checkpoint's step."""
        state = torch.load(checkpoint / "state.pt", weights_only=True)  # tensors and numbers; no pickled code
        distributed.load_state(self.optimizer, state["optimizer"])
        self.schedule(state["updates"])
        self.uniforms.set_state(state["uniforms"])
        for name in ("position", "tokens", "step", "bad_steps"):
            setattr(self, name, state[name])
        self.saved = self.step
        if self.writes:
            files.cut_back(self.folder, self.step)
        if (self.folder / "eval.json").exists():
            stored = json.loads((self.folder / "eval.json").read_text())
            self.evaluations = [e for e in stored if e["step"] <= self.step]

    def report(self) -> None:
        """Prints the closing table, an evaluation a line, and draws curves.png."""
        names = evaluation.names(self.evaluations)
        print("".join(n.rjust(11) for n in names))
        for e in self.evaluations:
            print("".join((f"{e[n]:.4g}" if n in e else "").rjust(11) for n in names))
        for e in self.evaluations[-1:]:
            intervals = (f"{n} {e[n + '_ci'][0]:.3f} to {e[n + '_ci'][1]:.3f}" for n in names if n + "_ci" in e)
            print("95% intervals of the last line:", ", ".join(intervals))
        print(f"\nin {self.folder}")
        if self.cfg.save_plots and self.writes:
            files.plot(self.folder)
