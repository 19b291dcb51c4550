"""GRPO-S, sequence-level entropy-weighted GRPO (arXiv 2508.04349, the GTPO paper; equation numbers of v5).

    python grpo_s.py                                the tiny model and task: a few minutes on a laptop, no network
    python grpo_s.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k
    python grpo_s.py --help

GTPO's idea on the level of completions: each has one reward, shaped by its mean entropy H_i, and one probability ratio.
O+ and O- are the n right and m wrong completions of a prompt.

    r_i   =  beta1 r_i + beta2 n H_i / sum_{k in O+} H_k                     in O+                               (6)
    r_j   = -beta1     - beta2 m (1/H_j) / sum_{k in O-} (1/H_k)             in O-
    A_i   = (r_i - mean(r)) / std(r)                                         over the G completions of the prompt
    J     = 1/G sum_i min(w_i A_i, clip(w_i, 1-eps_low, 1+eps_high) A_i)                                         (7)
    w_i   = the mean over t of pi(o_it) / pi_old(o_it), arithmetic (8) or geometric (Algorithm 1)

Deviations from the paper, and readings where it is open:
 1. The ratio is geometric, exp(mean_t(log pi - log pi_old)), as in Algorithm 1; --ratio arithmetic is Eq. 8.
 2. Groups that are all right or all wrong have advantage 0: their shaped rewards differ by entropy alone, and dividing
    such small differences by their own std would turn noise into a full-strength gradient.
 3. H_i has a floor (--entropy-min), for it is divided by. --mean geometric is the robust form of section 2.4.1; there
    each token's entropy has the floor, for its logarithm is taken.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common import clip_fractions
from options import RunConfig, option, parse
from run import Run


@dataclass
class Config(RunConfig):
    beta1: float = option(1.0, "weight of the verifier's reward", at_least=0)
    beta2: float = option(0.1, "weight of the entropy's share", at_least=0)
    mean: Literal["arithmetic", "geometric"] = option("arithmetic", "mean of a completion's token entropies")
    entropy_min: float = option(1e-3, "floor of that mean, nats; if geometric, of each token's entropy", above=0)
    ratio: Literal["geometric", "arithmetic"] = option("geometric", "mean of a completion's token ratios")
    clip_low: float = option(0.2, "the ratio is clipped at 1 - clip_low", above=0)
    clip_high: float = option(0.28, "the ratio is clipped at 1 + clip_high", above=0)
    kl_coef: float = option(0.0, "beta, the weight of the KL to the starting model", at_least=0)
    reduction: Literal["sequence", "token", "constant"] = option("sequence", "how the loss is averaged")


def shaped_rewards(
    rewards: Tensor,
    entropy: Tensor,
    mask: Tensor,
    group: Tensor,
    beta1: float = 1.0,
    beta2: float = 0.1,
    mean: str = "arithmetic",
    entropy_min: float = 1e-3,
) -> Tensor:
    """Eq. 6: the shaped reward of every completion. rewards, group: [B]; entropy (nats), mask: [B, T] -> [B]."""
    right, result = rewards > 0.5, torch.zeros_like(rewards)
    if mean == "geometric":
        H = ((entropy.clamp(min=entropy_min).log() * mask).sum(1) / mask.sum(1)).exp()  # [B]
    else:
        H = ((entropy * mask).sum(1) / mask.sum(1)).clamp(min=entropy_min)
    for g in group.unique():
        ok, bad = (group == g) & right, (group == g) & ~right
        result[ok] = beta1 * rewards[ok] + beta2 * H[ok] / H[ok].mean()
        result[bad] = -beta1 - beta2 * (1 / H[bad]) / (1 / H[bad]).mean()
    return result


def advantages(shaped: Tensor, rewards: Tensor, group: Tensor, eps: float = 1e-6) -> Tensor:
    """Group-relative advantages of the shaped rewards. shaped, rewards, group: [B] -> [B].

    A group with one outcome, all right or all wrong, gets exactly 0, whatever its entropies.
    """
    result = torch.zeros_like(shaped)
    for g in group.unique():
        r = shaped[group == g]
        if 0 < (rewards[group == g] > 0.5).sum() < len(r):
            result[group == g] = (r - r.mean()) / (r.std(correction=0) + eps)
    return result


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, mean: str = "geometric") -> Tensor:
    """One probability ratio a completion: the mean of its tokens' ratios (Eq. 8, or geometric). Three [B, T] -> [B]."""
    log_ratio, n = (logprobs - old_logprobs) * mask, mask.sum(1).clamp(min=1)
    return (log_ratio.sum(1) / n).exp() if mean == "geometric" else (log_ratio.exp() * mask).sum(1) / n


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
    ratio: str = "geometric",
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
) -> Tensor:
    """The negated objective (7), the same at every token of a completion: [B, T], 0 where mask is 0.

    logprobs, old_logprobs, mask, kl: [B, T]; advantages: [B]. Gradients flow through logprobs and kl.
    """
    A = advantages[:, None]
    w = sequence_ratio(logprobs, old_logprobs, mask, ratio)[:, None]  # [B, 1]
    objective = torch.min(w * A, w.clamp(1 - clip_low, 1 + clip_high) * A)
    if kl is not None:
        objective = objective - kl_coef * kl
    return -objective * mask


def main() -> None:
    cfg = parse(Config, __doc__)
    with Run(cfg) as run:
        for _ in run.steps():
            rollout = run.sample()
            run.verify(rollout)
            rewards, mask, group = rollout.rewards, rollout.mask, rollout.group
            shaping = cfg.beta1, cfg.beta2, cfg.mean, cfg.entropy_min
            shaped = shaped_rewards(rewards, rollout.entropy, mask, group, *shaping)  # [B]
            A = advantages(shaped, rewards, group)  # [B]
            ref = run.reference_logprobs(rollout) if cfg.kl_coef > 0 else None  # [B, T]

            def objective(logprobs, old_logprobs, rows):  # of one micro-batch: [b, T], [b, T], [b]
                mask, clip = rollout.mask[rows], (cfg.clip_low, cfg.clip_high)
                kl = None if ref is None else k3(logprobs, ref[rows])
                w = sequence_ratio(logprobs, old_logprobs, mask, cfg.ratio)[:, None]
                metrics = clip_fractions(w, A[rows], *clip)
                if kl is not None:
                    metrics["kl"] = kl
                return loss(logprobs, old_logprobs, A[rows], mask, *clip, cfg.ratio, kl, cfg.kl_coef), metrics

            metrics = run.update(rollout, objective, cfg.reduction, active=A if ref is None else None)
            run.log(rollout, metrics)


if __name__ == "__main__":
    main()
