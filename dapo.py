"""DAPO, Decoupled clip and Dynamic sAmpling Policy Optimization (arXiv 2503.14476): the baseline of the GTPO paper.

    python dapo.py                                  the tiny model and task: a few minutes on a laptop, no network
    python dapo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k
    python dapo.py --help

GRPO with four changes:

    J   = 1/sum_i |o_i| sum_i sum_t min(w A_i, clip(w, 1-eps_low, 1+eps_high) A_i)                        (Eq. 8, 12)

 - clip-higher: eps_high 0.28 > eps_low 0.2 leaves unlikely tokens more room to grow;
 - token mean: every token of the step counts the same, so long completions count for more than short ones;
 - dynamic sampling: prompts whose completions are all right or all wrong teach nothing and are replaced     (Eq. 11)
 - soft overlong punishment, added to the reward; L_max is max_new_tokens, L_cache the zone before it:       (Eq. 13)
        0 for |y| <= L_max - L_cache;   (L_max - L_cache - |y|) / L_cache up to L_max;   -1 beyond
and several updates a rollout (--minibatches), which is where clipping starts to act.

Deviations from the paper, and why:
 1. Dynamic sampling stops after --max-rounds rounds; the step then goes on with the groups it has, and the metrics say
    how many. Late in training nearly every group is all right, and the paper's loop would hardly end.
 2. Whether a group is all right is asked of the verifier alone: a difference in length punishment is no information
    about correctness, so such a group is dropped and would have advantage 0.
 3. 4 updates a rollout, where the paper has 16: a rollout of the default run is 64 times smaller than the paper's.
 4. --overlong-filter leaves completions cut off at the limit out of the loss, the alternative to the punishment.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common import Rollout, clip_fractions, concatenate
from options import RunConfig, option, parse
from run import Run


@dataclass
class Config(RunConfig):
    minibatches: int = option(4, "optimizer steps a rollout, each on its share of the rows", at_least=1)
    max_rounds: int = option(3, "rounds of dynamic sampling a step, at most; 1: no new prompts", at_least=1)
    overlong_cache: float = option(0.2, "L_cache as a share of max_new_tokens; 0: no punishment", at_least=0)
    overlong_filter: bool = option(False, "leave completions cut off at the limit out of the loss")
    clip_low: float = option(0.2, "the ratio is clipped at 1 - clip_low", above=0)
    clip_high: float = option(0.28, "the ratio is clipped at 1 + clip_high", above=0)
    kl_coef: float = option(0.0, "beta, the weight of the KL to the starting model", at_least=0)
    reduction: Literal["sequence", "token", "constant"] = option("token", "how the loss is averaged")


def overlong_punishment(lengths: Tensor, max_length: int, cache: float) -> Tensor:
    """Eq. 13, to add to the reward. lengths [B], max_length, cache (0: no soft zone), in tokens -> [B], 0 to -1."""
    return ((max_length - cache - lengths) / max(cache, 1e-9)).clamp(-1, 0)


def informative(rewards: Tensor, group: Tensor) -> Tensor:
    """Which rows belong to a group with different rewards (Eq. 11). rewards [B], group [B] -> bool [B]."""
    result = torch.zeros_like(group, dtype=torch.bool)
    for g in group.unique():
        result[group == g] = rewards[group == g].max() > rewards[group == g].min()
    return result


def dynamic_sampling(run: Run, n_prompts: int, max_rounds: int) -> tuple[Rollout, Rollout, int]:
    """Samples and verifies until n_prompts groups are informative, max_rounds times at most.

    Returns the first n_prompts informative groups (fewer if there are no more), all that was sampled, and the rounds.
    """
    sampled, useful = [], 0
    while len(sampled) < max_rounds and useful < n_prompts:
        sampled.append(run.verify(run.sample()))
        kept = informative(sampled[-1].rewards, sampled[-1].group)
        useful += len(sampled[-1].group[kept].unique())
    everything = concatenate(sampled)
    rollout = everything.select(informative(everything.rewards, everything.group))
    first = torch.isin(rollout.group, rollout.group.unique()[:n_prompts])
    return rollout.select(first), everything, len(sampled)


def advantages(rewards: Tensor, group: Tensor, punishment: Tensor, eps: float = 1e-6) -> Tensor:
    """Group-relative advantages of reward + punishment. rewards, group, punishment: [B] -> [B].

    A group whose rewards are all equal gets exactly 0, whatever the punishment.
    """
    result = torch.zeros_like(rewards)
    for g in group.unique():
        r = rewards[group == g]
        if r.max() > r.min():
            r = r + punishment[group == g]
            result[group == g] = (r - r.mean()) / (r.std(correction=0) + eps)
    return result


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's estimate of KL(pi || pi_ref) at each token, in nats, never negative. Two [B, T] -> [B, T]."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1


def loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
) -> Tensor:
    """The negated objective of every token before the mean is taken: [B, T], 0 where mask is 0.

    logprobs, old_logprobs, mask, kl: [B, T]; advantages: [B] or [B, T]. Gradients flow through logprobs and kl.
    """
    A = advantages if advantages.dim() == 2 else advantages[:, None]
    ratio = (logprobs - old_logprobs).exp()
    objective = torch.min(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)
    if kl is not None:
        objective = objective - kl_coef * kl
    return -objective * mask


def main() -> None:
    cfg = parse(Config, __doc__)
    with Run(cfg) as run:
        for _ in run.steps():
            rollout, sampled, rounds = dynamic_sampling(run, cfg.n_prompts, cfg.max_rounds)
            cache = cfg.overlong_cache * cfg.max_new_tokens
            punishment = overlong_punishment(rollout.lengths(), cfg.max_new_tokens, cache)  # [B]
            A = advantages(rollout.rewards, rollout.group, punishment)  # [B]
            if cfg.overlong_filter:
                A, rollout = A[rollout.finished], rollout.select(rollout.finished)
            ref = run.reference_logprobs(rollout) if cfg.kl_coef > 0 else None  # [B, T]

            def objective(logprobs, old_logprobs, rows):  # of one micro-batch: [b, T], [b, T], [b]
                mask, clip = rollout.mask[rows], (cfg.clip_low, cfg.clip_high)
                kl = None if ref is None else k3(logprobs, ref[rows])
                metrics = clip_fractions((logprobs - old_logprobs).exp(), A[rows], *clip)
                if kl is not None:
                    metrics["kl"] = kl
                return loss(logprobs, old_logprobs, A[rows], mask, *clip, kl, cfg.kl_coef), metrics

            metrics = run.update(rollout, objective, cfg.reduction, active=A if ref is None else None)
            metrics |= {"dynamic_sampling/rounds": rounds, "dynamic_sampling/groups": len(rollout.group.unique())}
            run.log(sampled, metrics)


if __name__ == "__main__":
    main()
