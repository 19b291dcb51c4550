"""QAE, Quantile Advantage Estimation (arXiv 2509.22611).

    python -m more.quantile                         the tiny model and task: about a minute, no network
    python -m more.quantile --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k
    python -m more.quantile --help

The baseline of a reward is the K-quantile of its group, in place of the mean. The rest is DAPO's loss:

    F(x) = share of the G completions of the prompt whose reward is at most x
    b    = the smallest x with F(x) >= K
    A_i  = (r_i - b) / (std(r) + eps)
    J    = 1/sum_i |o_i| sum_i sum_t min(w_it A_i, clip(w_it, 1-eps_low, 1+eps_high) A_i)

If a share p of the completions is right, b is 0 for p <= 1 - K and 1 for p > 1 - K. So on a hard prompt only the right
completions learn, and on an easy one only the wrong ones. All others have advantage 0. An example with K = 0.4:

    right of 8          4     5
    b                   0     1
    A of a right one   +2     0
    A of a wrong one    0    -2.07

It does not use the entropy, but it aims at it: the paper traces both the collapse and the explosion of the entropy to
the mean as a baseline.

Deviations from the paper, and where its code differs:
 1. b is the paper's quantile, which is a reward that occurs. The paper's code calls torch.quantile, which interpolates:
    with 5 of 8 right and K = 0.4 its b is 0.8, so the wrong ones get -1.65 and the right ones +0.41.
 2. Groups that are all right or all wrong are not replaced by new prompts (DAPO's dynamic sampling); their advantage
    is 0. There is no punishment of long completions, and 4 updates per rollout (--minibatches), as in dapo.py.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common import clip_fractions
from harness.options import RunConfig, keywords, option, parse
from harness.run import Run


@dataclass
class Config(RunConfig):
    minibatches: int = option(4, "optimizer steps per rollout, each on its part of the rows", at_least=1)
    quantile: float = option(0.4, "K; a larger K learns less from right completions", above=0, at_most=1)
    clip_low: float = option(0.2, "the ratio is clipped at 1 - clip_low", above=0)
    clip_high: float = option(0.28, "the ratio is clipped at 1 + clip_high", above=0)
    reduction: Literal["sequence", "token", "constant"] = option("token", "how the loss is averaged")


def advantages(rewards: Tensor, group: Tensor, quantile: float = 0.4, eps: float = 1e-6) -> Tensor:
    """Group-relative advantages. rewards [B] float, group [B] (any integers; rows of a prompt share one) -> [B].

    (r - quantile of the group) / (std + eps). A group whose rewards are all equal gets exactly 0.
    """
    result = torch.zeros_like(rewards)
    for g in group.unique():
        rows = group == g
        r = rewards[rows]
        if r.max() > r.min():
            share_up_to = (r <= r[:, None]).to(r.dtype).mean(1)  # [G] F(r_i)
            baseline = r[share_up_to >= quantile].min()
            result[rows] = (r - baseline) / (r.std(correction=0) + eps)
    return result


def token_advantages(
    rewards: Tensor, entropy: Tensor, mask: Tensor, group: Tensor,
    quantile: float = 0.4,
) -> Tensor:  # fmt: skip
    """The advantage of every token: [B, T], 0 where mask is 0. It multiplies grad log pi until the policy moves.

    rewards, group: [B]; entropy (nats), mask: [B, T]. Every method has this function. QAE does not use entropy.
    """
    return advantages(rewards, group, quantile)[:, None] * mask


def loss(ratio: Tensor, advantages: Tensor, mask: Tensor, clip_low: float = 0.2, clip_high: float = 0.28) -> Tensor:
    """The negated, clipped objective of every token, before the mean is taken: [B, T], 0 where mask is 0.

    ratio: [B, T]; advantages: [B] or [B, T]; mask: [B, T]. Gradients flow through ratio.
    """
    A = advantages if advantages.dim() == 2 else advantages[:, None]
    objective = torch.min(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)
    return -objective * mask


def main() -> None:
    cfg = parse(Config, __doc__)
    clip = {"clip_low": cfg.clip_low, "clip_high": cfg.clip_high}
    with Run(cfg) as run:
        options = keywords(cfg, token_advantages)
        for _ in run.steps():
            rollout = run.verify(run.sample())  # prompts -> completions -> rewards
            A = token_advantages(rollout.rewards, rollout.entropy, rollout.mask, rollout.group, **options)  # [B, T]
            for minibatch in run.minibatches(rollout, cfg.reduction, skip_zero=A):  # an optimizer step on each
                for batch in minibatch:  # a micro-batch of b rows; taking the next one runs the model on it
                    # In the first minibatch the policy has not moved: the ratio is 1, and the clip does nothing.
                    ratio = (batch.logprobs - batch.old_logprobs).exp()  # [b, T]
                    per_token = loss(ratio, A[batch.rows], batch.mask, **clip)  # [b, T]
                    metrics = clip_fractions(ratio, A[batch.rows], **clip)  # two [b, T]
                    (per_token * batch.loss_weights).sum().backward()  # loss_weights turn this sum into the mean
                    run.record(batch, per_token, **metrics)
                run.optimizer_step()
            run.log(rollout)


if __name__ == "__main__":
    main()
