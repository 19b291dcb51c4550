"""EGSW, Entropy-Guided Sequence Weighting (arXiv 2503.22456v2), on top of GRPO.

    python egsw.py                                  the tiny model and task: a few minutes on a laptop, no network
    python egsw.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k
    python egsw.py --help

Completions of one prompt compete for a fixed sum of weight: those with a high advantage, or written where the policy
was uncertain (high entropy H), get more of the gradient.

    raw_it = exp((A_it + alpha H_it) / P)
    w_it   = raw_it / sum_j raw_jt                              a softmax over the prompt's group, with temperature P
    grad J = 1/G sum_i 1/|o_i| sum_t w_it [A_it + beta (pi_ref/pi - 1)] grad log pi(o_it)

step-wise, the softmax runs at each position t over the rows that still have a token there; trajectory-wise, each row
has one weight, from the mean entropy of its tokens. The weights are constants: no gradient flows through them.

Deviations from the paper, and why:
 1. The weights are multiplied by the number of rows in the softmax, so that they average one: P -> infinity then gives
    GRPO back exactly, and a learning rate carries over. --no-mean-one gives the paper's, which sum to one.
 2. The gradient above is that of a first update. Several updates a rollout (--minibatches) are clipped as in GRPO: w
    multiplies the whole clipped per-token objective, the KL term included.
 3. alpha and P are this project's choice: the paper finds them sensitive, and its values could not be checked. Nor
    could its treatment of the KL term; beta is 0 unless --kl-coef is given.
 4. The mean is over all tokens of the step. The paper's, over each completion and then over completions, is --reduction
    sequence. Advantages sum to zero over a group, weighted advantages to more; and a credit of c on each token, divided
    by |o_i|, is in expectation the gradient of a reward of c/|o_i|: it pays for being short. On tasks where guessing is
    possible that ended in guesses (experiments/RESULTS.md).
 5. The weights take any advantage: --advantage grpo, dr_grpo or rloo, as in grpo.py.
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
    advantage: Literal["grpo", "dr_grpo", "rloo"] = option("grpo", "baseline and scale of the advantage")
    alpha: float = option(0.5, "weight of the entropy against the advantage", at_least=0)
    weight_temperature: float = option(2.0, "P, temperature of the softmax; large: all weights equal", above=0)
    step_wise: bool = option(True, "a softmax at each position; otherwise one weight a completion")
    mean_one: bool = option(True, "weights average one; otherwise they sum to one, as in the paper")
    clip_low: float = option(0.2, "the ratio is clipped at 1 - clip_low", above=0)
    clip_high: float = option(0.2, "the ratio is clipped at 1 + clip_high", above=0)
    kl_coef: float = option(0.0, "beta, the weight of the KL to the starting model", at_least=0)
    reduction: Literal["sequence", "token", "constant"] = option("token", "how the loss is averaged")


def advantages(rewards: Tensor, group: Tensor, kind: str = "grpo", eps: float = 1e-6) -> Tensor:
    """Group-relative advantages. rewards [B], group [B] (any integers; rows of a prompt share one) -> [B].

    kind: "grpo" (r - mean) / (std + eps); "dr_grpo" r - mean; "rloo" r - mean of the others. A group whose rewards are
    all equal gets exactly 0.
    """
    result = torch.zeros_like(rewards)
    for g in group.unique():
        r = rewards[group == g]
        if r.max() > r.min():
            centred = r - r.mean()
            scale = {"grpo": 1 / (r.std(correction=0) + eps), "dr_grpo": 1.0, "rloo": len(r) / (len(r) - 1)}[kind]
            result[group == g] = centred * scale
    return result


def weights(
    advantages: Tensor,
    entropy: Tensor,
    mask: Tensor,
    group: Tensor,
    alpha: float = 0.5,
    temperature: float = 2.0,
    step_wise: bool = True,
    mean_one: bool = True,
) -> Tensor:
    """EGSW's weights, [B, T], 0 where mask is 0; multiply each token's loss by them, without a gradient through them.

    advantages: [B] or [B, T]; entropy: [B, T], nats; mask: [B, T]; group: [B]. ValueError unless temperature > 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    A = advantages if advantages.dim() == 2 else advantages[:, None]
    value, counts = (A + alpha * entropy).detach().float(), mask > 0  # [B, T], and which of them the softmax sees
    if not step_wise:
        value = ((value * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(mask)
        counts = torch.ones_like(counts)
    result = torch.zeros_like(value)
    for g in group.unique():
        rows = group == g
        v = value[rows].masked_fill(~counts[rows], -torch.inf)  # [G, T]
        w = ((v - v.amax(0)) / temperature).softmax(0)  # the maximum goes first: no temperature is too small
        result[rows] = w * counts[rows].sum(0) if mean_one else w
    return torch.where(mask > 0, result, 0.0)


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
    clip_high: float = 0.2,
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
            rollout = run.sample()
            run.verify(rollout)
            A = advantages(rollout.rewards, rollout.group, cfg.advantage)  # [B]
            shape = cfg.alpha, cfg.weight_temperature, cfg.step_wise, cfg.mean_one
            W = weights(A, rollout.entropy, rollout.mask, rollout.group, *shape)  # [B, T]
            ref = run.reference_logprobs(rollout) if cfg.kl_coef > 0 else None  # [B, T]

            def objective(logprobs, old_logprobs, rows):  # of one micro-batch: [b, T], [b, T], [b]
                mask, clip = rollout.mask[rows], (cfg.clip_low, cfg.clip_high)
                kl = None if ref is None else k3(logprobs, ref[rows])
                metrics = clip_fractions((logprobs - old_logprobs).exp(), A[rows], *clip)
                if kl is not None:
                    metrics["kl"] = kl
                return W[rows] * loss(logprobs, old_logprobs, A[rows], mask, *clip, kl, cfg.kl_coef), metrics

            metrics = run.update(rollout, objective, cfg.reduction, active=A if ref is None else None)
            run.log(rollout, metrics)


if __name__ == "__main__":
    main()
