"""One step of RL training: sample, verify, minibatches, optimizer_step. The loop in every script calls these.

    rollout = trainer.verify(trainer.sample())                      prompts -> completions -> rewards
    ...                                                             the method: rewards -> advantages
    for minibatch in trainer.minibatches(rollout, reduction, A):    one optimizer step each
        for batch in minibatch:                                     some rows, scored by the policy as it is now
            ...                                                     the method's loss, and its backward()
        trainer.optimizer_step()

The update is cut into pieces in this order:

    rollout -> minibatches (--minibatches; each is one optimizer step)
            -> unique completions (equal completions of a prompt are scored once)
            -> a part for each process
            -> micro-batches (--token-budget; what fits into memory at once)

Only --minibatches changes the result. The other cuts change it by rounding alone, because the loss of every token is
divided by counts of its whole minibatch.
"""

import functools
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import common
from common import Rollout, concatenate
from harness import cuda_graphs, distributed, lora, rewards
from harness.model import load_policy, new_optimizer, stop_ids
from harness.options import RunConfig


@dataclass
class Batch:
    """A micro-batch: b rows of the rollout with what a loss needs. Row i of it is row `rows[i]` of the rollout."""

    rows: Tensor  # [b]
    mask: Tensor  # [b, T]
    logprobs: Tensor  # [b, T] of the policy as it is now, with gradient
    old_logprobs: Tensor  # [b, T] of the policy that sampled; with one minibatch the same numbers as logprobs
    sampled_logprobs: Tensor  # [b, T] the same, as the sampler computed them
    loss_weights: Tensor  # [b, T] sum(loss * loss_weights) over the whole minibatch is the mean that --reduction names


# --- how an update is cut into pieces ---------------------------------------------------------------------------------


@dataclass
class PlannedBatch:
    """Rows of the rollout that are scored together. Their log-probs are those of scored_rows[place]."""

    scored_rows: Tensor  # [u] rows with different completions
    rows: Tensor  # [b] all rows that have one of these completions
    place: Tensor  # [b] the place of each row's completion in scored_rows


def unique_completions(rollout: Rollout, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with different completions, one for each: representatives [u], and for each of rows [n] the place of its
    completion among them [n].

    Equal completions of one prompt have equal log-probs, so scoring one of them is enough. They are common where the
    policy is sure. To do without this, return rows and torch.arange(len(rows)).

    Example: rows 7, 8 and 9 of one prompt read "5", "4" and "5" -> representatives [8, 7], places [1, 0, 1].
    """
    tokens = torch.where(rollout.mask[rows] > 0, rollout.completion_ids[rows], -1)  # [n, T] padding must not count
    keys = torch.cat([rollout.group[rows, None], tokens], 1)  # [n, 1 + T]
    _, place = keys.unique(dim=0, return_inverse=True)  # sorted by prompt, then by tokens
    n_unique = int(place.max()) + 1
    index = torch.arange(len(rows), device=rows.device)
    first = torch.full((n_unique,), len(rows), device=rows.device).scatter_reduce(0, place, index, "amin")  # [u]
    return rows[first], place


def deal(lengths: Tensor, n_processes: int) -> list[Tensor]:
    """Deals rows to processes like cards, the longest first, so that each gets long and short ones. lengths [n], tokens
    -> the indices of each process's rows, longest first.

    Example: deal([5, 9, 7], 2) -> [[1, 0], [2]]: process 0 gets the rows of 9 and 5 tokens, process 1 that of 7.
    """
    longest_first = lengths.argsort(descending=True, stable=True)
    return [longest_first[process::n_processes] for process in range(n_processes)]


def microbatches(lengths: Tensor, token_budget: int) -> list[Tensor]:
    """Cuts rows into micro-batches. Rows are sorted by length, so that there is little padding; each micro-batch takes
    as many as keep rows x longest within the budget, and at least one. lengths [n], tokens -> indices of each.

    Example: microbatches([4, 9, 5], token_budget=10) -> [[1], [2, 0]]: 1 x 9 tokens, then 2 x 5.
    """
    longest_first = lengths.argsort(descending=True, stable=True)
    sorted_lengths = lengths[longest_first].tolist()
    batches = []
    start = 0
    while start < len(lengths):
        n_rows = max(1, int(token_budget // sorted_lengths[start]))
        batches.append(longest_first[start : start + n_rows])
        start += n_rows
    return batches


def plan_microbatches(rollout: Rollout, rows: Tensor, token_budget: int) -> list[PlannedBatch]:
    """This process's micro-batches of these rows."""
    if len(rows) == 0:
        return []
    representatives, place = unique_completions(rollout, rows)
    lengths = (rollout.prompt_lengths + rollout.completion_lengths())[representatives]  # [u] tokens
    mine = deal(lengths, distributed.world_size())[distributed.rank()]
    plan = []
    for batch in microbatches(lengths[mine], token_budget):
        unique_batch = mine[batch]
        place_in_batch = torch.full_like(representatives, -1)  # [u] -1: not in this batch
        place_in_batch[unique_batch] = torch.arange(len(unique_batch), device=rows.device)
        place_of_row = place_in_batch[place]  # [n]
        in_batch = place_of_row >= 0  # [n]
        plan.append(PlannedBatch(representatives[unique_batch], rows[in_batch], place_of_row[in_batch]))
    return plan


# --- the step ---------------------------------------------------------------------------------------------------------


@dataclass
class Sums:
    """Sums over the tokens of one minibatch, or of all minibatches of a step, from which metrics are computed."""

    values: dict[str, float] = field(default_factory=dict)  # by the name of the metric
    tokens: float = 0.0
    scored_tokens: float = 0.0  # in rows that have a gradient

    def add(self, name: str, value: float) -> None:
        self.values[name] = self.values.get(name, 0.0) + value


@functools.lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n problems in this pass through them: a new one every time."""
    return random.Random(f"{seed}-{epoch}").sample(range(n), n)


class Trainer:
    """A model in training, and one step after the other. It writes no files.

    problems: {"question", "answer", "row", "prompt_ids"}, to train on. source: the checkpoint that the run started
    from; the KL is measured to it.
    """

    def __init__(self, cfg: RunConfig, model, tokenizer, problems: list[dict], source: str):
        self.cfg = cfg
        self.model = model
        self.tokenizer = tokenizer
        self.problems = problems
        self.source = source
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
        self.minibatch_sums = Sums()
        self.step_sums = Sums()
        self.grad_norms: list[float] = []  # of the optimizer steps of this step that were not skipped
        self.update_metrics: dict[str, float] = {}  # of this step

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
            epoch, place = divmod(position, len(self.problems))
            order = epoch_order(len(self.problems), cfg.seed, epoch)
            problems.append(self.problems[order[place]])
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
            part = sampler(
                self.model, prompts, group_size, cfg.max_new_tokens, self.eos_ids, part_uniforms, cfg.temperature
            )
            parts.append(part)
        rollout = distributed.gather_rollout(concatenate(parts) if parts else None, self.device)
        lengths = rollout.completion_lengths().long().tolist()
        ids = [row[:length] for row, length in zip(rollout.completion_ids.tolist(), lengths, strict=True)]
        completions = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        for group, completion in zip(rollout.group.tolist(), completions, strict=True):
            problem = problems[group]
            text = {name: problem[name] for name in ("question", "answer", "row")}
            rollout.texts.append({**text, "completion": completion})
        return rollout

    def verify(self, rollout: Rollout) -> Rollout:
        """Fills in the rewards, and adds the verdicts to the texts. The verifier's reward is 1 for a right answer and 0
        otherwise. RewardError, in every process, if a --reward function fails in one."""
        start = time.perf_counter()
        my_texts = rollout.texts[distributed.my_slice(len(rollout))]
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
        for text, (_, verdict) in zip(rollout.texts, grades, strict=True):
            text["verdict"] = verdict
        self.add_seconds("verify", start)
        return rollout

    def reference_logprobs(self, rollout: Rollout) -> Tensor:
        """Log-probs [B, T] of the completions under the model that the run started from: with LoRA the same model
        without its adapters, else a second model, which is loaded at the first call."""
        all_rows = torch.arange(len(rollout), device=self.device)
        plan = plan_microbatches(rollout, all_rows, self.cfg.token_budget)
        if self.cfg.lora_rank:
            with lora.adapters_off(self.model):
                logprobs = self.score(self.model, rollout, plan)
        else:
            if self.reference_model is None:
                model, _ = load_policy(self.cfg, self.source, self.device)
                self.reference_model = model.requires_grad_(False)
            logprobs = self.score(self.reference_model, rollout, plan)
        distributed.all_reduce(logprobs)  # one process has scored a row, the others have zeros there
        return logprobs

    @torch.no_grad()
    def score(self, model, rollout: Rollout, plan: list[PlannedBatch]) -> Tensor:
        """Log-probs of the rows in these micro-batches, 0 for other rows: [B, T], without gradient."""
        logprobs = torch.zeros_like(rollout.mask)
        for planned in plan:
            logprobs[planned.rows] = self.score_batch(model, rollout, planned)
        return logprobs

    def score_batch(self, model, rollout: Rollout, planned: PlannedBatch) -> Tensor:
        """Log-probs of the rows of one micro-batch. [b, T]"""
        u = planned.scored_rows
        with common.autocast(self.device):
            logprobs, _ = common.token_logprobs(
                model, rollout.prompt_ids[u], rollout.prompt_lengths[u], rollout.completion_ids[u], rollout.mask[u],
                self.cfg.temperature,
            )  # fmt: skip
        return logprobs[planned.place]

    def minibatches(self, rollout: Rollout, reduction: str, active: Tensor | None = None) -> Iterator[Iterator[Batch]]:
        """Yields the parts of a step's update, --minibatches of them, for one optimizer step each; each part yields its
        micro-batches. The caller calls backward() for every micro-batch, and then optimizer_step() for the part.

        reduction: see common.loss_weights. active: [B] or [B, T], such as the advantages: zero where there is no
        gradient. A row of zeros is not scored, but its tokens count in the mean. None: every row has a gradient.
        """
        start = time.perf_counter()
        all_rows = torch.arange(len(rollout), device=self.device)
        has_gradient = torch.ones_like(all_rows, dtype=torch.bool)  # [B]
        if active is not None:
            has_gradient = active.ne(0) if active.dim() == 1 else active.ne(0).any(1)
        parts = [rows for rows in all_rows.tensor_split(self.cfg.minibatches) if len(rows)]
        plans = [plan_microbatches(rollout, rows[has_gradient[rows]], self.cfg.token_budget) for rows in parts]
        old_logprobs = None  # [B, T]
        if len(parts) > 1:  # later parts meet a policy that has moved; score them now, cut into the same micro-batches
            old_logprobs = self.score(self.model, rollout, [batch for plan in plans for batch in plan])

        self.model.train()
        self.step_sums = Sums()
        self.grad_norms = []
        for rows, plan in zip(parts, plans, strict=True):
            n_tokens = float(rollout.mask[rows].sum())
            n_scored_tokens = float(rollout.mask[rows[has_gradient[rows]]].sum())
            self.minibatch_sums = Sums(tokens=n_tokens, scored_tokens=n_scored_tokens)
            weights = torch.zeros_like(rollout.mask)  # [B, T]
            weights[rows] = common.loss_weights(rollout.mask[rows], reduction)
            yield self.batches(rollout, plan, weights, old_logprobs)
        self.update_metrics = self.metrics_of_update(len(parts))
        self.bad_steps = self.bad_steps + 1 if self.update_metrics["skipped_updates"] else 0
        self.add_seconds("update", start)

    def batches(
        self, rollout: Rollout, plan: list[PlannedBatch], loss_weights: Tensor, old_logprobs: Tensor | None
    ) -> Iterator[Batch]:
        """Scores one micro-batch after the other and yields it. old_logprobs None: the policy has not moved yet."""
        for planned in plan:
            rows = planned.rows
            logprobs = self.score_batch(self.model, rollout, planned)
            old = logprobs.detach() if old_logprobs is None else old_logprobs[rows]
            yield Batch(rows, rollout.mask[rows], logprobs, old, rollout.logprobs[rows], loss_weights[rows])

    def record(self, batch: Batch, loss: Tensor, **metrics: Tensor) -> None:
        """Adds a micro-batch to the step's metrics: the loss of each token, [b, T], and tensors [b, T] or [b, 1]
        whose mean over all tokens is logged."""
        gap = (batch.old_logprobs - batch.sampled_logprobs).abs()
        values = {"sampling_logp_difference": gap, **metrics}
        sums = {name: (value.detach() * batch.mask).sum() for name, value in values.items()}
        sums["loss"] = (loss.detach() * batch.loss_weights).sum()
        numbers = torch.stack(list(sums.values())).tolist()  # one wait for the GPU, not one for each
        for name, number in zip(sums, numbers, strict=True):
            self.minibatch_sums.add(name, number)

    def optimizer_step(self) -> None:
        """Steps on the gradient of the minibatch, after clipping its norm. If loss or gradient is not finite, it skips
        the step, and leaves the minibatch out of the metrics: the weights are still good."""
        values = distributed.sum_by_name(self.minibatch_sums.values)
        distributed.all_reduce_gradients(self.model)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.max_grad_norm)
        norm = float(grad_norm)
        if math.isfinite(norm) and math.isfinite(values.get("loss", 0.0)):
            self.optimizer.step()
            self.scheduler.step()
            self.grad_norms.append(norm)
            self.step_sums.tokens += self.minibatch_sums.tokens
            self.step_sums.scored_tokens += self.minibatch_sums.scored_tokens
            for name, value in values.items():
                self.step_sums.add(name, value)
        self.optimizer.zero_grad(set_to_none=True)  # sampling does not need this memory

    def metrics_of_update(self, n_minibatches: int) -> dict[str, float]:
        """The metrics of this step's update, without the optimizer steps that were skipped."""
        n_steps = len(self.grad_norms)
        means = {}
        for name, value in self.step_sums.values.items():
            if name == "loss":
                means[name] = value / n_steps
            elif name == "sampling_logp_difference":
                means[name] = value / max(1.0, self.step_sums.scored_tokens)
            else:
                means[name] = value / max(1.0, self.step_sums.tokens)
        return {
            "loss": 0.0,  # if no row had a gradient
            **means,
            "skipped_updates": n_minibatches - n_steps,
            "grad_norm": sum(self.grad_norms) / max(1, n_steps),
            "lr": float(self.scheduler.get_last_lr()[0]),
        }

    def add_seconds(self, phase: str, start: float) -> None:
        """Adds the time since `start` to the seconds of a phase."""
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.perf_counter() - start, 4)
