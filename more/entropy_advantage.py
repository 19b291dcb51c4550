"""Entropy-based advantage shaping (Reasoning with Exploration, arXiv 2506.14758).

    python -m more.entropy_advantage                the tiny model and task: about a minute, no network
    python -m more.entropy_advantage --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k
    python -m more.entropy_advantage --help

Tokens at which the policy was uncertain get a larger advantage, whether the completion is right or wrong: right ones
are pushed up more, wrong ones are pushed down less. H is the entropy at the token; no gradient flows through it.

    A_i  = (r_i - mean(r)) / (std(r) + eps)           mean and std over the G completions of the prompt
    A_it = A_i + min(alpha H_it, |A_i| / kappa)
    J    = 1/sum_i |o_i| sum_i sum_t min(w_it A_it, clip(w_it, 1-eps_low, 1+eps_high) A_it)

With kappa above 1, the term is smaller than |A_i|, so no advantage changes its sign. EGSW, its relative, also adds
alpha H to A, but inside a softmax over the completions, and the result is a weight of A.

Deviations from the paper, and readings where it is open:
 1. H is that of the policy that sampled, computed once. The paper's is that of the policy as it is now. They are equal
    until the policy moves, so with one update per rollout (--minibatches) there is no difference.
 2. alpha 0.4 and kappa 2 are the paper's for GRPO (0.1 and 2 for PPO), as a summary of it gives them. We could not
    check them against the full text. Another project that compares with the method takes kappa 1 (arXiv 2509.25133).
 3. The paper's GRPO has the higher clip and the token mean of DAPO; so has this one. The rest is GRPO.
 4. The term is never negative, so shaped advantages do not sum to zero over a group. --reduction sequence would turn
    the surplus into a bonus for short completions: see deviation 4 of egsw.py.
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
    alpha: float = option(0.4, "factor of the entropy", at_least=0)
    kappa: float = option(2.0, "the entropy term is at most |A| / kappa", above=0)
    clip_low: float = option(0.2, "the ratio is clipped at 1 - clip_low", above=0)
    clip_high: float = option(0.28, "the ratio is clipped at 1 + clip_high", above=0)
    reduction: Literal["sequence", "token", "constant"] = option("token", "how the loss is averaged")


def advantages(rewards: Tensor, group: Tensor, eps: float = 1e-6) -> Tensor:
    """Group-relative advantages. rewards [B] float, group [B] (any integers; rows of a prompt share one) -> [B].

    (r - mean) / (std + eps). A group whose rewards are all equal gets exactly 0.
    """
    result = torch.zeros_like(rewards)
    for g in group.unique():
        rows = group == g
        r = rewards[rows]
        if r.max() > r.min():
            centred = r - r.mean()
            result[rows] = centred / (r.std(correction=0) + eps)
    return result


def token_advantages(
    rewards: Tensor, entropy: Tensor, mask: Tensor, group: Tensor,
    advantage: str = "grpo", alpha: float = 0.4, kappa: float = 2.0,
) -> Tensor:  # fmt: skip
    """The shaped advantage of every token: [B, T], 0 where mask is 0. It multiplies grad log pi until the policy moves.

    rewards, group: [B]; entropy (nats), mask: [B, T]; the options are those of Config. Carries no gradient.
    """
    A = advantages(rewards, group)[:, None]  # [B, 1]
    shaped = A + torch.min(alpha * entropy.detach(), A.abs() / kappa)  # [B, T]
    return torch.where(mask > 0, shaped, 0.0)  # padding may hold NaN


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
