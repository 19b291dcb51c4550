"""DAPO, Decoupled clip and Dynamic sAmpling Policy Optimization (arXiv 2503.14476): the baseline of the GTPO paper.

    python dapo.py                                  the tiny model and task: about a minute, no network
    python dapo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k
    python dapo.py --help

DAPO is GRPO with six changes:

    A_i  = (r_i + p_i - mean(r + p)) / std(r + p)     mean and std over the G completions of the prompt          (Eq. 9)
    J    = 1/sum_i |o_i| sum_i sum_t min(w_it A_i, clip(w_it, 1-eps_low, 1+eps_high) A_i)                        (Eq. 8)
    0 < number of right completions < G               or else the prompt is replaced by another one             (Eq. 11)
    p_i  = 0                                          for |o_i| <= L_max - L_cache                              (Eq. 13)
         = (L_max - L_cache - |o_i|) / L_cache        up to L_max
         = -1                                         beyond L_max

 - Clip higher: eps_high 0.28 > eps_low 0.2 leaves unlikely tokens more room to grow.
 - Token mean: every token of an optimizer step counts the same, so a long completion counts more than a short one.
 - Dynamic sampling (Eq. 11): prompts whose completions are all right or all wrong teach nothing and are replaced.
 - Soft overlong punishment p (Eq. 13). L_max is max_new_tokens; L_cache is the zone before it.
 - No KL.
 - Several updates per rollout (--minibatches). Clipping matters only then.

Deviations from the paper, and why:
 1. Dynamic sampling stops after --max-rounds rounds. Then the step continues with the groups that it has, and the
    metrics say how many. Late in training nearly every group is all right, and the paper's loop would hardly end.
 2. Only the verifier decides whether a group is all right or all wrong, because a difference in length punishment says
    nothing about correctness. Such a group is replaced, and if it remains, its advantage is 0.
 3. 4 updates per rollout instead of the paper's 16: a rollout of the default run is 32 times smaller than the paper's.
 4. --overlong-filter leaves completions that were cut off at the limit out of the loss. It is the paper's alternative
    to the punishment.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common import Rollout, clip_fractions, concatenate
from harness.options import RunConfig, keywords, option, parse
from harness.run import Run


@dataclass
class Config(RunConfig):
    minibatches: int = option(4, "optimizer steps per rollout, each on its part of the rows", at_least=1)
    max_rounds: int = option(3, "rounds of dynamic sampling per step, at most; 1: no new prompts", at_least=1)
    overlong_cache: float = option(0.2, "L_cache as a share of max_new_tokens; 0: no punishment", at_least=0, at_most=1)
    overlong_filter: bool = option(False, "leave completions that were cut off at the limit out of the loss")
    clip_low: float = option(0.2, "the ratio is clipped at 1 - clip_low", above=0)
    clip_high: float = option(0.28, "the ratio is clipped at 1 + clip_high", above=0)
    reduction: Literal["sequence", "token", "constant"] = option("token", "how the loss is averaged")


def overlong_punishment(lengths: Tensor, max_new_tokens: int, overlong_cache: float) -> Tensor:
    """What is added to the reward (Eq. 13): [B], 0 to -1. lengths [B] and max_new_tokens (L_max), in tokens;
    overlong_cache: L_cache as a share of L_max, so all is divided by L_max here."""
    return ((1 - overlong_cache - lengths / max_new_tokens) / max(overlong_cache, 1e-9)).clamp(-1, 0)


def outcomes_differ(rewards: Tensor, group: Tensor) -> Tensor:
    """Which rows are in a group whose rewards differ (Eq. 11). rewards [B], group [B] -> bool [B]."""
    result = torch.zeros_like(group, dtype=torch.bool)
    for g in group.unique():
        rows = group == g
        result[rows] = rewards[rows].max() > rewards[rows].min()
    return result


def dynamic_sampling(run: Run, n_prompts: int, max_rounds: int) -> tuple[Rollout, Rollout, int]:
    """Samples and verifies until the rewards of n_prompts groups differ, but at most max_rounds times.

    Returns the first n_prompts of these groups (fewer if there are no more), all that was sampled, and the rounds.
    """
    all_sampled = run.verify(run.sample())
    n_rounds = 1
    while True:
        useful = all_sampled.select(outcomes_differ(all_sampled.rewards, all_sampled.group))
        groups = useful.group.unique()
        if len(groups) >= n_prompts or n_rounds == max_rounds:
            return useful.select(torch.isin(useful.group, groups[:n_prompts])), all_sampled, n_rounds
        all_sampled = concatenate([all_sampled, run.verify(run.sample())])
        n_rounds += 1


def advantages(rewards: Tensor, group: Tensor, punishment: Tensor, eps: float = 1e-6) -> Tensor:
    """Group-relative advantages of reward + punishment (Eq. 9). rewards, group, punishment: [B] -> [B].

    A group whose rewards are all equal gets exactly 0, whatever the punishment.
    """
    result = torch.zeros_like(rewards)
    for g in group.unique():
        rows = group == g
        r = rewards[rows]
        if r.max() > r.min():
            r = r + punishment[rows].to(r.dtype)
            result[rows] = (r - r.mean()) / (r.std(correction=0) + eps)  # Eq. 9
    return result


def token_advantages(
    rewards: Tensor, entropy: Tensor, mask: Tensor, group: Tensor,
    max_new_tokens: int, overlong_cache: float = 0.2,
) -> Tensor:  # fmt: skip
    """The advantage of every token: [B, T], 0 where mask is 0. It multiplies grad log pi until the policy moves.

    rewards, group: [B]; entropy (nats), mask: [B, T]; max_new_tokens in tokens, overlong_cache as a share of it. Every
    method has this function. DAPO does not use entropy.
    """
    punishment = overlong_punishment(mask.sum(1), max_new_tokens, overlong_cache)  # [B]
    return advantages(rewards, group, punishment)[:, None] * mask


def loss(ratio: Tensor, advantages: Tensor, mask: Tensor, clip_low: float = 0.2, clip_high: float = 0.28) -> Tensor:
    """The negated, clipped objective of every token, before the mean is taken: [B, T], 0 where mask is 0.

    ratio: [B, T]; advantages: [B] or [B, T]; mask: [B, T]. Gradients flow through ratio.
    """
    A = advantages if advantages.dim() == 2 else advantages[:, None]
    objective = torch.min(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)  # Eq. 8
    return -objective * mask


def main() -> None:
    cfg = parse(Config, __doc__)
    clip = {"clip_low": cfg.clip_low, "clip_high": cfg.clip_high}
    with Run(cfg) as run:
        options = keywords(cfg, token_advantages)
        for _ in run.steps():
            rollout, all_sampled, n_rounds = dynamic_sampling(run, cfg.n_prompts, cfg.max_rounds)
            A = token_advantages(rollout.rewards, rollout.entropy, rollout.mask, rollout.group, **options)  # [B, T]
            if cfg.overlong_filter:
                A = A[rollout.finished]
                rollout = rollout.select(rollout.finished)
            for minibatch in run.minibatches(rollout, cfg.reduction, skip_zero=A):  # an optimizer step on each
                for batch in minibatch:  # a micro-batch of b rows; taking the next one runs the model on it
                    # In the first minibatch the policy has not moved: the ratio is 1, and the clip does nothing.
                    ratio = (batch.logprobs - batch.old_logprobs).exp()  # [b, T]
                    per_token = loss(ratio, A[batch.rows], batch.mask, **clip)  # [b, T]
                    metrics = clip_fractions(ratio, A[batch.rows], **clip)  # two [b, T]
                    (per_token * batch.loss_weights).sum().backward()  # loss_weights turn this sum into the mean
                    run.record(batch, per_token, **metrics)
                run.optimizer_step()
            n_groups = len(rollout.group.unique())
            run.log(all_sampled, {"dynamic_sampling/rounds": n_rounds, "dynamic_sampling/groups": n_groups})


if __name__ == "__main__":
    main()
