"""A run: the training steps of harness/trainer.py, with a folder, logs, evaluation and checkpoints.

Every script has this loop:

    cfg = parse(Config, __doc__)
    with Run(cfg) as run:
        for _ in run.steps():                     # evaluates before the first and after the last step
            rollout = run.verify(run.sample())    # prompts -> completions -> rewards
            ...                                   # the method: rewards -> advantages -> loss -> optimizer_step
            run.log(rollout)

A run leaves in runs/<name>/: config.json; metrics.jsonl, one line per step, on a CPU the same bytes for the same seed;
timing.jsonl, the seconds of each step; completions.jsonl; eval.json, eval.csv and eval_completions.jsonl; the trained
model in model/, with LoRA also adapter/; with --eval-every, in best/, that of the step with the highest mean@k;
checkpoint-N/, from which --resume goes on; curves.png.

`torchrun --nproc-per-node N` runs the same loop in N processes (harness/distributed.py). Every process makes the same
decisions; process 0 writes. How a run can end before its last step:

| what happens | exit status | what is saved |
|---|---|---|
| Ctrl-C (SIGINT) | 130 | everything, after the current step |
| SIGTERM | 143 | everything, after the current step |
| a closed terminal (SIGHUP) | 129 | everything, after the current step |
| SIGUSR1, which batch systems send before their limit | 128 + its number | everything, after the current step |
| a second signal, at least a second later | as the first | what was saved before |
| updates that are not finite, three steps in a row | 1 | everything: the weights are still good |
| another process of torchrun has died | 1 | what was saved before |
| the disk is full | 1 | what was saved before |
| a GPU is out of memory | 1 | what was saved before |
| wrong options or input | 2 | nothing: the run has not begun |
| the --reward function has failed | 2 | what was saved before |
"""

import csv
import dataclasses
import errno
import io
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from common import Rollout
from harness import data, distributed, files, reporting, rewards
from harness.model import describe_size, load_policy, save_adapters, save_merged
from harness.options import RunConfig, check_options, fail, first_line, resolve_defaults
from harness.trainer import Trainer
from tasks import arithmetic

MAX_BAD_STEPS = 3  # this many steps in a row with a skipped update end the run
N_LOGGED_COMPLETIONS = 4  # of each step, in completions.jsonl
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


class Run(Trainer):
    """A Trainer with a folder, logs, evaluation and checkpoints."""

    def __init__(self, cfg: RunConfig):
        reporting.guard_streams()
        device = distributed.start()
        self.is_main = distributed.rank() == 0
        torch.manual_seed(cfg.seed)
        try:  # signals are not caught yet, and loading may take minutes: Ctrl-C ends it without a traceback
            rewards.load(cfg.reward)  # fails if it cannot be used, before anything is loaded or written
            check_options(cfg)
            checkpoint = files.last_checkpoint(Path(cfg.resume)) if cfg.resume else None
            problems, eval_problems = data.load_problems(cfg)
            with distributed.main_first():
                source = cfg.model or str(arithmetic.base(Path(cfg.out) / "tiny-base"))
            model, tokenizer = load_policy(cfg, source, device, checkpoint)
            resolve_defaults(cfg, sum(p.numel() for p in model.parameters()), on_gpu=device.type == "cuda")
            problems = data.encode(cfg, model, tokenizer, problems)
            self.eval_problems = data.encode(cfg, model, tokenizer, eval_problems)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        super().__init__(cfg, model, tokenizer, problems, source)
        print(describe_size(model, self.optimizer))

        self.step = 0
        self.saved_step = -1  # of the last checkpoint
        self.evaluations: list[dict] = []
        self.history: list[dict] = []  # the metrics of every step
        self.signals = Signals()
        self.exit_status = 0  # not 0: the run stops after this step, because of a signal or of bad steps
        self.progress: Any = None  # the bar of tqdm
        folder = Path(cfg.resume) if cfg.resume else None
        if self.is_main and folder is None:
            folder = files.new_folder(Path(cfg.out), cfg.name)
        self.folder: Path = distributed.all_gather(folder)[0]
        stored = {"method": Path(sys.argv[0]).stem, **dataclasses.asdict(cfg), "resume": None, "eval_only": False}
        try:
            self.track = reporting.tracker(cfg.track if self.is_main else "none", self.folder, stored)
        except SystemExit:
            if not cfg.resume:
                shutil.rmtree(self.folder)
            raise
        if checkpoint:
            self.restore(checkpoint)
        if self.is_main:
            files.write_text(self.folder / "config.json", json.dumps(stored, indent=2) + "\n")

    def __enter__(self) -> "Run":
        self.signals.catch()
        return self

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None, traceback) -> None:
        self.signals.release()
        if error is None or (error_type is SystemExit and self.exit_status):  # all processes come here together
            distributed.finish()
        else:
            end_with_one_line(error, self.folder, self.step, self.signals.status)

    def steps(self) -> Iterator[int]:
        """Yields the number of each step. Evaluates before the first and after the last one, then saves and reports."""
        cfg = self.cfg
        if cfg.eval_only or not self.evaluations:
            self.evaluate()
        if cfg.eval_only:
            self.report()
            return
        self.exit_status = self.signal_of_any_process()
        stop_tokens = cfg.stop_tokens or math.inf
        with reporting.progress_bar(self.folder.name, "step", total=cfg.steps, initial=self.step) as self.progress:
            while not self.exit_status and self.step < cfg.steps and self.n_tokens_sampled < stop_tokens:
                self.step += 1
                with reporting.token_bar(f"step {self.step}", self.model):
                    yield self.step
                self.exit_status = self.signal_of_any_process()
                is_last = self.step >= cfg.steps
                if cfg.eval_every and self.step % cfg.eval_every == 0 and not is_last:
                    self.evaluate()
                if self.bad_steps >= MAX_BAD_STEPS:
                    self.exit_status = 1
                    self.say(f"\nerror: {self.bad_steps} steps in a row had updates that were not finite and were "
                             "skipped; a smaller --lr may help")  # fmt: skip
                if cfg.save_every and self.step % cfg.save_every == 0 and not is_last:
                    self.save()
        self.save()
        if self.exit_status:
            self.say(f"saved in {self.folder} after step {self.step}; go on with --resume {self.folder}")
            raise SystemExit(self.exit_status)
        if self.evaluations and self.evaluations[-1]["step"] < self.step:
            self.evaluate()
        if self.is_main:
            files.write_folder(self.folder / "model", self.write_model)
            if cfg.lora_rank:
                files.write_folder(self.folder / "adapter", lambda folder: save_adapters(self.model, folder))
        self.report()

    def signal_of_any_process(self) -> int:
        """The exit status that a signal has asked for. A signal may have reached only some of the processes."""
        return max(distributed.all_gather(self.signals.status))

    # --- what is logged

    def log(self, rollout: Rollout, method_metrics: dict[str, float] | None = None) -> None:
        """Writes this step's metrics (of the rollout, of the update, of the method), seconds and completions."""
        self.add_seconds("update", self.update_start)
        update_metrics = self.metrics_of_update()
        self.bad_steps = self.bad_steps + 1 if update_metrics["skipped_updates"] else 0
        rewards = torch.stack([rollout.rewards[rollout.group == group] for group in rollout.group.unique()])  # [Q, G]
        n_tokens = rollout.mask.sum()
        verdicts = [text["verdict"] for text in rollout.records]
        metrics = {
            "step": self.step,
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std(1, correction=0).mean()),
            "frac_reward_zero_std": float((rewards.amax(1) == rewards.amin(1)).float().mean()),
            "reward/parse_failed": verdicts.count("parse_failed") / len(rollout),
            "entropy": float(rollout.entropy.sum() / n_tokens),
            "completions/mean_length": float(rollout.completion_lengths().mean()),
            "completions/clipped_ratio": float((~rollout.finished).float().mean()),
            **update_metrics,
            **(method_metrics or {}),
        }
        self.history.append(metrics)
        for name, warning in reporting.warnings(self.history).items():
            metrics[f"warning/{name}"] = 1.0
            self.say(f"\nwarning: {warning}")
        timing = {"step": self.step, "tokens": int(n_tokens), **self.seconds}
        self.seconds = {}
        if self.device.type == "cuda":
            timing["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        stride = max(1, len(rollout) // N_LOGGED_COMPLETIONS)  # spread over the prompts
        self.append("timing.jsonl", timing)
        self.append("completions.jsonl", *self.completion_rows(rollout, stride)[:N_LOGGED_COMPLETIONS])
        self.append("metrics.jsonl", metrics)
        self.track(metrics)
        shown = {"reward": "reward", "entropy": "entropy", "length": "completions/mean_length"}
        self.progress.set_postfix({label: f"{metrics[name]:.3g}" for label, name in shown.items()}, refresh=False)
        self.progress.update()

    def evaluate(self) -> None:
        """Evaluates on the held-out problems, with the same random numbers every time."""
        k = self.cfg.eval_k
        if not self.eval_problems:
            return
        eval_rng = torch.Generator().manual_seed(self.cfg.seed)
        uniforms = torch.rand(len(self.eval_problems) * k, self.cfg.max_new_tokens, generator=eval_rng)
        with reporting.token_bar("evaluation", self.model):
            greedy = self.verify(self.generate(self.eval_problems, 1, uniforms=None))
            sampled = self.verify(self.generate(self.eval_problems, k, uniforms))
        self.seconds = {}  # of training alone
        result = {"step": self.step, **reporting.evaluate(greedy, sampled, k)}
        if self.cfg.reward:
            result["reward"] = float(sampled.rewards.mean())  # mean@k only says how many are above 0.5
        earlier = [other for other in self.evaluations if other["step"] != self.step]
        self.evaluations = [*earlier, result]
        if not self.is_main:
            return
        files.write_text(self.folder / "eval.json", json.dumps(self.evaluations, indent=1) + "\n")
        text = io.StringIO()
        table = csv.DictWriter(text, reporting.metric_names(self.evaluations), extrasaction="ignore")
        table.writeheader()
        table.writerows(self.evaluations)
        files.write_text(self.folder / "eval.csv", text.getvalue())
        greedy_records = [{**record, "greedy": True} for record in self.completion_rows(greedy)]
        self.append("eval_completions.jsonl", *greedy_records, *self.completion_rows(sampled))
        if self.cfg.eval_every and reporting.best_of(self.evaluations) is result:
            files.write_folder(self.folder / "best", self.write_model)

    def report(self) -> None:
        """Prints the closing table and draws curves.png."""
        reporting.print_table(self.evaluations, mark_best=self.cfg.eval_every > 0)
        print(f"\nin {self.folder}")
        if self.is_main:
            reporting.plot(self.folder)

    def completion_rows(self, rollout: Rollout, stride: int = 1) -> list[dict]:
        """What completions.jsonl says about every stride-th completion."""
        rewards = rollout.rewards.tolist()
        finished = rollout.finished.tolist()
        records = []
        for i in range(0, len(rollout), stride):
            text = {name: value for name, value in rollout.records[i].items() if name not in ("row", "thinking")}
            records.append({"step": self.step, **text, "reward": rewards[i], "truncated": not finished[i]})
        return records

    def append(self, name: str, *records: dict) -> None:
        """Appends records to a JSON Lines file. It is opened and closed each time, so what is logged is on disk."""
        if self.is_main:
            with open(self.folder / name, "a") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)

    def say(self, line: str) -> None:
        if self.is_main:
            print(line, file=sys.stderr)

    # --- checkpoints

    def save(self) -> None:
        """Writes checkpoint-<step>, and only then deletes older ones: at any moment there is a whole one."""
        if self.saved_step == self.step:
            return
        self.saved_step = self.step
        state = {
            "optimizer": self.optimizer.state_dict(),
            "optimizer_steps": self.scheduler.last_epoch,
            "sampling_rng": self.sampling_rng.get_state(),
            "n_prompts_drawn": self.n_prompts_drawn,
            "n_tokens_sampled": self.n_tokens_sampled,
            "bad_steps": self.bad_steps,
            "step": self.step,
        }
        checkpoint = self.folder / f"checkpoint-{self.step}"

        def write(folder: Path) -> None:
            if self.cfg.lora_rank:
                save_adapters(self.model, folder)
            else:
                self.write_model(folder)
            torch.save(state, folder / "state.pt")

        if self.is_main:
            files.write_folder(checkpoint, write)
            for other in files.checkpoints(self.folder).values():
                if other != checkpoint:
                    shutil.rmtree(other)

    def write_model(self, folder: Path) -> None:
        """Writes model (with its adapters merged) and tokenizer into a folder."""
        if self.cfg.lora_rank:
            save_merged(self.model, folder)
        else:
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def restore(self, checkpoint: Path) -> None:
        """Sets everything but the model, which is loaded already, and removes what was logged after the checkpoint."""
        try:  # weights_only: tensors and numbers, no pickled code
            state = torch.load(checkpoint / "state.pt", weights_only=True, map_location="cpu")
        except Exception as error:  # of any class: the file may be missing or damaged
            fail(f"--resume {self.folder}: {checkpoint.name}/state.pt cannot be read: {first_line(error)}")
        self.optimizer.load_state_dict(state["optimizer"])
        self.start_schedule(state["optimizer_steps"])
        self.sampling_rng.set_state(state["sampling_rng"])
        self.n_prompts_drawn = state["n_prompts_drawn"]
        self.n_tokens_sampled = state["n_tokens_sampled"]
        self.bad_steps = state["bad_steps"]
        self.step = state["step"]
        self.saved_step = self.step
        if (self.folder / "eval.json").exists():
            self.evaluations = reporting.read_evaluations(self.folder, self.step)
        if self.is_main:
            files.cut_back(self.folder, self.step)
            if (self.folder / "metrics.jsonl").exists():
                self.history = files.read_lines(self.folder / "metrics.jsonl")


# --- how a run ends before its last step ------------------------------------------------------------------------------


class Signals:
    """Between catch() and release(), the first signal only sets `status`, the exit status that it asks for. The run
    looks at it after each step. A second signal raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.status = 0  # 0: there was no signal
        self.time = 0.0  # of the first signal

    def catch(self) -> None:
        self.handlers = {}
        for number in SIGNALS:
            under_nohup = number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
            if not under_nohup:
                self.handlers[number] = signal.signal(number, self.handle)

    def release(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame) -> None:
        if not self.status:
            self.status = 128 + number
            self.time = time.monotonic()
            if distributed.rank() == 0:
                print("\nstopping after this step; a second signal stops at once", file=sys.stderr)
        elif time.monotonic() - self.time > 1:  # within a second it is the same Ctrl-C, sent on by torchrun
            raise KeyboardInterrupt


def end_with_one_line(error: BaseException, folder: Path, step: int, signal_status: int) -> None:
    """Ends the program with one line and the exit status of the table above, if the error is in it. Otherwise does
    nothing, so that the error goes on."""
    way_out = "no checkpoint was written yet (--save-every)"
    if files.checkpoints(folder):
        way_out = f"go on with --resume {folder}"
    if distributed.peer_lost(error):
        print(f"error: process {distributed.rank()} lost another one in step {step}; {way_out}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)  # not sys.exit: what is left of the process group might wait for the lost process
    if isinstance(error, rewards.RewardError):
        message, details = error.args
        fail(f"{message}; {way_out}", details)
    if isinstance(error, KeyboardInterrupt):
        print(f"stopped in step {step}; {folder} holds what was saved before it", file=sys.stderr)
        raise SystemExit(signal_status or 130) from None
    if getattr(error, "errno", None) in DISK_FULL or "no space left" in str(error).lower():  # safetensors has no errno
        print(f"error: the disk of {folder} is full: make room; {way_out}", file=sys.stderr)
        raise SystemExit(1) from None
    if isinstance(error, torch.OutOfMemoryError):
        print(f"error: out of GPU memory in step {step}: give a smaller --rollout-rows or --token-budget, or "
              f"--gradient-checkpointing; {way_out}", file=sys.stderr)  # fmt: skip
        raise SystemExit(1) from None
