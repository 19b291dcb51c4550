"""One step of RL training: sample, verify, minibatches, optimizer_step. The loop in every script calls these.

The update is cut into pieces in this order:

    rollout -> minibatches (--minibatches; each is one optimizer step)
            -> unique completions (equal completions of a prompt are scored once)
            -> a part for each process
            -> micro-batches (--token-budget; what fits into memory at once)

Only --minibatches changes the result. The other cuts change it by rounding alone, because the loss of every token is
divided by counts of its whole minibatch.
"""

import functools
import itertools
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import common
from common import Rollout, concatenate
from harness import cuda_graphs, decoder, distributed, rewards
from harness.model import adapters_off, load_policy, new_optimizer, stop_ids
from harness.options import RunConfig


@dataclass
class MicroBatch:
    """b rows of the rollout with what a loss needs. Row i of it is row `rows[i]` of the rollout."""

    rows: Tensor  # [b]
    mask: Tensor  # [b, T]
    logprobs: Tensor  # [b, T] of the policy as it is now, with gradient
    old_logprobs: Tensor  # [b, T] of the policy that sampled, without gradient
    loss_weights: Tensor  # [b, T] sum(loss * loss_weights) over the whole minibatch is the mean that --reduction names


@dataclass
class Plan:
    """A micro-batch before the model runs on it: see plan_microbatches. The log-probs of `rows` are those of
    scored_rows[unique_index]."""

    scored_rows: Tensor  # [u] rows with different completions
    rows: Tensor  # [b] all rows that have one of these completions
    unique_index: Tensor  # [b] for each of `rows`, which of scored_rows has its completion


@dataclass
class Mean:
    """A mean that is not divided yet."""

    over: str  # what it is divided by: "minibatches", "tokens" or "scored tokens"
    sum: float = 0.0


@functools.lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n problems in this pass through them: a new one every time."""
    return random.Random(f"{seed}-{epoch}").sample(range(n), n)


class Trainer:
    """A model in training, and one step after the other. It writes no files.

    problems: {"question", "answer", "row", "prompt_ids"}, to train on. base_name: the checkpoint that the run started
    from; the KL is measured to it.
    """

    def __init__(self, cfg: RunConfig, model, tokenizer, problems: list[dict], base_name: str):
        self.cfg = cfg
        self.model = model
        self.tokenizer = tokenizer
        self.problems = problems
        self.base_name = base_name
        self.device: torch.device = model.device
        self.eos_ids = stop_ids(model, tokenizer)
        self.grade = rewards.load(cfg.reward)
        self.optimizer = new_optimizer(cfg, model)
        self.start_schedule(optimizer_steps_done=0)
        self.reference_model: Any = None  # the KL is measured to it; loaded when it is first needed
        self.sampling_rng = torch.Generator().manual_seed(cfg.seed)  # decides every sampled token
        self.n_prompts_drawn = 0
        self.n_tokens_sampled = 0  # of completions
        self.bad_steps = 0  # steps in a row in which an optimizer step was skipped
        self.seconds: dict[str, float] = {}  # of each phase of this step
        self.update_start = 0.0  # when this step's update began
        self.sampled_logprobs = torch.zeros(0)  # [B, T] of this step's rollout
        self.minibatch_counts: dict[str, float] = {}  # of minibatches (1), tokens, tokens in rows that are scored
        self.minibatch_sums: dict[str, Mean] = {}  # of each metric
        self.step_counts: dict[str, float] = {}  # the same two of the step, without minibatches that were skipped
        self.step_sums: dict[str, Mean] = {}
        self.grad_norms: list[float] = []  # of the optimizer steps of this step that were not skipped
        self.n_skipped = 0  # optimizer steps of this step that were skipped

    def start_schedule(self, optimizer_steps_done: int) -> None:
        """The learning rate rises to --lr over the first --warmup-steps optimizer steps of the run."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.cfg.lr
            group["initial_lr"] = self.cfg.lr  # a checkpoint may hold another
        warmup = max(1, self.cfg.warmup_steps)
        self.scheduler = LambdaLR(
            self.optimizer, lambda n: min(1.0, (n + 1) / warmup), last_epoch=optimizer_steps_done - 1
        )

    def sample(self) -> Rollout:
        """Completions of the next n_prompts training problems, group_size of each."""
        start = time.perf_counter()
        cfg = self.cfg
        problems = []
        for position in range(self.n_prompts_drawn, self.n_prompts_drawn + cfg.n_prompts):
            epoch, position_in_epoch = divmod(position, len(self.problems))
            order = epoch_order(len(self.problems), cfg.seed, epoch)
            problems.append(self.problems[order[position_in_epoch]])
        self.n_prompts_drawn += cfg.n_prompts
        uniforms = torch.rand(cfg.n_prompts * cfg.group_size, cfg.max_new_tokens, generator=self.sampling_rng)
        rollout = self.generate(problems, cfg.group_size, uniforms)
        self.n_tokens_sampled += int(rollout.mask.sum())
        self.add_seconds("sample", start)
        return rollout

    def generate(self, problems: list[dict], group_size: int, uniforms: Tensor | None) -> Rollout:
        """Completions of these problems, group_size of each, decoded; their rewards are still 0. uniforms: [B, T], or
        None for the most probable tokens. Each process samples for some of the problems and gets what others sampled.
        """
        cfg = self.cfg
        sampler = cuda_graphs.sample if cfg.cuda_graphs else common.sample
        my_problems = distributed.my_slice(len(problems))
        prompts_at_a_time = max(1, cfg.rollout_rows // group_size)
        parts = []
        for start in range(my_problems.start, my_problems.stop, prompts_at_a_time):
            stop = min(start + prompts_at_a_time, my_problems.stop)
            prompts = [problem["prompt_ids"] for problem in problems[start:stop]]
            part_uniforms = None if uniforms is None else uniforms[start * group_size : stop * group_size]
            limits = (group_size, cfg.max_new_tokens, self.eos_ids)
            parts.append(sampler(self.model, prompts, *limits, part_uniforms, cfg.temperature))
        rollout = distributed.gather_rollout(concatenate(parts) if parts else None, self.device)
        lengths = rollout.completion_lengths().long().tolist()
        ids = [row[:length] for row, length in zip(rollout.completion_ids.tolist(), lengths, strict=True)]
        completions = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        for group, completion in zip(rollout.group.tolist(), completions, strict=True):
            record = {name: problems[group].get(name, "") for name in ("question", "answer", "row", "thinking")}
            rollout.records.append({**record, "completion": completion})
        return rollout

    def verify(self, rollout: Rollout) -> Rollout:
        """Fills in the rewards, and adds the verdicts to the records. The verifier's reward is 1 for a right answer and
        0 otherwise. RewardError, in every process, if a --reward function fails in one."""
        start = time.perf_counter()
        my_texts = rollout.records[distributed.my_slice(len(rollout))]
        my_grades: list[tuple[float, str]] | rewards.RewardError
        try:
            my_grades = [self.grade(text) for text in my_texts]
        except rewards.RewardError as error:
            my_grades = error
        grades: list[tuple[float, str]] = []
        for part in distributed.all_gather(my_grades):
            if isinstance(part, rewards.RewardError):
                raise part
            grades += part
        rollout.rewards = torch.tensor([reward for reward, _ in grades], device=self.device)
        for text, (_, verdict) in zip(rollout.records, grades, strict=True):
            text["verdict"] = verdict
        self.add_seconds("verify", start)
        return rollout

    def reference_logprobs(self, rollout: Rollout) -> Tensor:
        """Log-probs [B, T] of the completions under the model that the run started from: with LoRA the same model
        without its adapters, else a second model, which is loaded at the first call."""
        plans = self.plan(rollout, torch.arange(len(rollout), device=self.device))
        if self.cfg.lora_rank:
            with adapters_off(self.model):
                logprobs = self.score(self.model, rollout, plans)
        else:
            if self.reference_model is None:
                model, _ = load_policy(self.cfg, self.base_name, self.device)
                self.reference_model = model.requires_grad_(False)
            logprobs = self.score(self.reference_model, rollout, plans)
        distributed.all_reduce(logprobs)  # one process has scored a row, the others have zeros there
        return logprobs

    def plan(self, rollout: Rollout, rows: Tensor) -> list[Plan]:
        return plan_microbatches(rollout, rows, self.cfg.token_budget, decoder.shares_prompts(self.model))

    @torch.no_grad()
    def score(self, model, rollout: Rollout, plans: list[Plan]) -> Tensor:
        """Log-probs of the rows in these micro-batches, 0 for other rows: [B, T], without gradient."""
        logprobs = torch.zeros_like(rollout.mask)
        for plan in plans:
            logprobs[plan.rows] = self.logprobs_of(model, rollout, plan)
        return logprobs

    def logprobs_of(self, model, rollout: Rollout, plan: Plan) -> Tensor:
        """Log-probs of the rows of one micro-batch. [b, T]"""
        u = plan.scored_rows
        with decoder.autocast(self.device):
            logprobs, _ = common.token_logprobs(
                model, rollout.prompt_ids[u], rollout.prompt_lengths[u], rollout.completion_ids[u], rollout.mask[u],
                self.cfg.temperature, group=rollout.group[u],
            )  # fmt: skip
        return logprobs[plan.unique_index]

    def minibatches(
        self, rollout: Rollout, reduction: str, skip_zero: Tensor | None = None
    ) -> Iterator[Iterator[MicroBatch]]:
        """Yields the minibatches of a step's update, --minibatches of them, for one optimizer step each; each yields
        its micro-batches. The caller calls backward() for every micro-batch, then optimizer_step() for the minibatch.

        reduction: see common.loss_weights. skip_zero: [B] or [B, T], such as the advantages. A row of zeros has no
        gradient, so it is not scored, but its tokens count in the mean. None: every row is scored.
        """
        self.update_start = time.perf_counter()
        self.sampled_logprobs = rollout.logprobs
        self.step_counts = {}
        self.step_sums = {}
        self.grad_norms = []
        self.n_skipped = 0
        all_rows = torch.arange(len(rollout), device=self.device)
        is_scored = torch.ones_like(all_rows, dtype=torch.bool)  # [B]
        if skip_zero is not None:
            is_scored = skip_zero.ne(0) if skip_zero.dim() == 1 else skip_zero.ne(0).any(1)
        minibatches = [rows for rows in all_rows.tensor_split(self.cfg.minibatches) if len(rows)]
        plans = [self.plan(rollout, rows[is_scored[rows]]) for rows in minibatches]
        # The policy that sampled is the policy as it is now, until the first optimizer step. Rows of the first
        # minibatch get their old log-probs when they are scored with gradients. All later rows are scored here.
        later_plans = [plan for plans_of_minibatch in plans[1:] for plan in plans_of_minibatch]
        old_logprobs = self.score(self.model, rollout, later_plans)  # [B, T]

        self.model.train()
        for i, rows in enumerate(minibatches):
            loss_weights = torch.zeros_like(rollout.mask)  # [B, T]
            loss_weights[rows] = common.loss_weights(rollout.mask[rows], reduction)
            n_tokens = float(rollout.mask[rows].sum())
            n_scored_tokens = float(rollout.mask[rows[is_scored[rows]]].sum())
            self.minibatch_counts = {"minibatches": 1.0, "tokens": n_tokens, "scored tokens": n_scored_tokens}
            self.minibatch_sums = {}
            yield self.microbatches(rollout, plans[i], loss_weights, None if i == 0 else old_logprobs)

    def microbatches(
        self, rollout: Rollout, plans: list[Plan], loss_weights: Tensor, old_logprobs: Tensor | None
    ) -> Iterator[MicroBatch]:
        """Runs the model on one micro-batch after the other, and yields it. old_logprobs None: the policy has not moved
        yet, so the old log-probs are the new ones."""
        for plan in plans:
            rows = plan.rows
            logprobs = self.logprobs_of(self.model, rollout, plan)
            old = logprobs.detach() if old_logprobs is None else old_logprobs[rows]
            yield MicroBatch(rows, rollout.mask[rows], logprobs, old, loss_weights[rows])

    def record(self, batch: MicroBatch, loss: Tensor, **metrics: Tensor) -> None:
        """Adds a micro-batch to the step's metrics: the loss of each token, [b, T], and tensors [b, T] or [b, 1]
        whose mean over all tokens is logged."""
        gap = (batch.old_logprobs - self.sampled_logprobs[batch.rows]).abs()  # [b, T] two ways to compute the same
        over = {"loss": "minibatches", "sampling_logp_difference": "scored tokens"}
        sums = {
            "loss": (loss.detach() * batch.loss_weights).sum(),
            "sampling_logp_difference": (gap * batch.mask).sum(),
        }
        for name, value in metrics.items():
            over[name] = "tokens"
            sums[name] = (value.detach() * batch.mask).sum()
        numbers = torch.stack(list(sums.values())).tolist()  # one wait for the GPU, not one for each
        for name, number in zip(sums, numbers, strict=True):
            self.minibatch_sums.setdefault(name, Mean(over[name])).sum += number

    def optimizer_step(self) -> None:
        """Steps on the gradient of the minibatch, after clipping its norm. If loss or gradient is not finite, it skips
        the step, and leaves the minibatch out of the metrics: the weights are still good."""
        totals: dict[str, Mean] = {}
        for sums in distributed.all_gather(self.minibatch_sums):  # a process without rows has none
            for name, part in sums.items():
                totals.setdefault(name, Mean(part.over)).sum += part.sum
        distributed.all_reduce_gradients(self.model)
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.max_grad_norm))
        loss = totals["loss"].sum if totals else 0.0  # without a row that has a gradient there is no loss
        if math.isfinite(norm) and math.isfinite(loss):
            self.optimizer.step()
            self.scheduler.step()
            self.grad_norms.append(norm)
            for what, count in self.minibatch_counts.items():
                self.step_counts[what] = self.step_counts.get(what, 0.0) + count
            for name, total in totals.items():
                self.step_sums.setdefault(name, Mean(total.over)).sum += total.sum
        else:
            self.n_skipped += 1
        self.optimizer.zero_grad(set_to_none=True)  # sampling does not need this memory

    def metrics_of_update(self) -> dict[str, float]:
        """The metrics of a step's update, without the optimizer steps that were skipped."""
        means = {name: mean.sum / max(1.0, self.step_counts[mean.over]) for name, mean in self.step_sums.items()}
        return {
            "loss": 0.0,  # if no row had a gradient
            **means,
            "skipped_updates": self.n_skipped,
            "grad_norm": sum(self.grad_norms) / max(1, len(self.grad_norms)),
            "lr": float(self.scheduler.get_last_lr()[0]),
        }

    def add_seconds(self, phase: str, start: float) -> None:
        """Adds the time since `start` to the seconds of a phase."""
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.perf_counter() - start, 4)


# --- how an update is cut into pieces ---------------------------------------------------------------------------------


def unique_completions(rollout: Rollout, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with different completions, one for each: representatives [u], and for each of rows [n] the index of its
    completion among them [n].

    Equal completions of one prompt have equal log-probs, so scoring one of them is enough. They are common where the
    policy is sure.

    Example: rows 7, 8 and 9 of one prompt read "5", "4" and "5" -> representatives [8, 7], indices [1, 0, 1].
    """
    tokens = torch.where(rollout.mask[rows] > 0, rollout.completion_ids[rows], -1)  # [n, T] padding must not count
    keys = torch.cat([rollout.group[rows, None], tokens], 1)  # [n, 1 + T]
    _, unique_index = keys.unique(dim=0, return_inverse=True)  # sorted by prompt, then by tokens
    n_unique = int(unique_index.max()) + 1
    index = torch.arange(len(rows), device=rows.device)
    first = torch.full((n_unique,), len(rows), device=rows.device).scatter_reduce(0, unique_index, index, "amin")  # [u]
    return rows[first], unique_index


@dataclass
class Completion:
    """What the model must run to score a completion."""

    index: int
    prompt: int  # completions with the same number share one run of their prompt
    prompt_tokens: int
    tokens: int


def in_order_of_length(completions: list[Completion]) -> list[Completion]:
    """The longest first, so that the rows of a micro-batch need little padding. Completions of a prompt stay together,
    where the longest of them belongs."""
    longest: dict[int, int] = {}
    for c in completions:
        longest[c.prompt] = max(longest.get(c.prompt, 0), c.prompt_tokens + c.tokens)
    return sorted(completions, key=lambda c: (-longest[c.prompt], c.prompt, -c.tokens))


def share_of_process(completions: list[Completion], process: int, n_processes: int) -> list[Completion]:
    """A stretch of the list for each process, with about the same number of tokens. So most prompts stay in one."""
    previous = [-1, *(c.prompt for c in completions)]  # the prompt of the completion before
    costs = [c.tokens + c.prompt_tokens * (c.prompt != p) for c, p in zip(completions, previous, strict=False)]
    ends = list(itertools.accumulate(costs))
    return [c for c, end in zip(completions, ends, strict=True) if (end * n_processes - 1) // ends[-1] == process]


def cost(completions: list[Completion]) -> int:
    """Tokens that the model runs on: each prompt once, and each completion, both padded to the longest."""
    n_prompts = len({c.prompt for c in completions})
    return n_prompts * max(c.prompt_tokens for c in completions) + len(completions) * max(c.tokens for c in completions)


def cut(completions: list[Completion], token_budget: int) -> list[list[Completion]]:
    """Stretches of the list that cost at most token_budget tokens each, or hold a single completion."""
    parts: list[list[Completion]] = []
    for c in completions:
        if parts and cost([*parts[-1], c]) <= token_budget:
            parts[-1].append(c)
        else:
            parts.append([c])
    return parts


def plan_microbatches(rollout: Rollout, rows: Tensor, token_budget: int, share_prompts: bool) -> list[Plan]:
    """This process's micro-batches of these rows. share_prompts: the model runs a prompt once for all its completions
    in a micro-batch; otherwise it runs prompt and completion of every row."""
    if len(rows) == 0:
        return []
    unique_rows, unique_index = unique_completions(rollout, rows)
    completions = []
    groups = rollout.group[unique_rows].tolist()
    prompt_tokens = rollout.prompt_lengths[unique_rows].tolist()
    tokens = rollout.completion_lengths()[unique_rows].long().tolist()
    for index, group in enumerate(groups):
        prompt = group if share_prompts else index
        completions.append(Completion(index, prompt, prompt_tokens[index], tokens[index]))
    mine = share_of_process(in_order_of_length(completions), distributed.rank(), distributed.world_size())

    plans = []
    for part in cut(mine, token_budget):
        indices = torch.tensor([c.index for c in part], device=rows.device)  # [u] of the part's completions
        index_in_part = torch.full_like(unique_rows, -1)  # -1: not in this part
        index_in_part[indices] = torch.arange(len(part), device=rows.device)
        index_of_row = index_in_part[unique_index]  # [n]
        in_part = index_of_row >= 0
        plans.append(Plan(unique_rows[indices], rows[in_part], index_of_row[in_part]))
    return plans
