"""CISPO, Clipped IS-weight Policy Optimization (MiniMax-M1, arXiv 2506.13585).

    python -m more.cispo                            the tiny model and task: about a minute, no network
    python -m more.cispo --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k
    python -m more.cispo --help

With several updates per rollout, the clip of PPO stops the gradient of every token whose probability has grown or
shrunk too much. Often these are unlikely tokens, such as the forks of a text. CISPO clips the weight of the gradient
instead, so every token keeps one. sg: no gradient flows through it.

    A_i  = (r_i - mean(r)) / (std(r) + eps)           mean and std over the G completions of the prompt
    w_it = pi(o_it) / pi_old(o_it)                    ratio of a token: the policy now over the policy that sampled
    J    = 1/sum_i |o_i| sum_i sum_t sg(min(w_it, 1 + eps_high)) A_i log pi(o_it)                          (Eq. 4, 5)

It uses no entropy. It is here as the contrast to the clips of the other methods. With one update per rollout w is
1, and the gradient is that of GRPO with the mean over tokens.

Deviations from the paper, and where other implementations differ:
 1. The weight has no lower bound. The paper's formula has one, but its runs set it so low that it never acts.
 2. The weight is at most 5 (--clip-high 4). The paper tunes this bound and does not name it; 5 is what TRL recommends,
    after ScaleRL (arXiv 2510.13786). TRL's epsilon_high is the bound itself, 1 + clip_high. verl has a lower bound too,
    and takes both from its PPO clip, 0.8 and 1.2 by default.
 3. 4 updates per rollout (--minibatches) instead of the paper's 16, as in dapo.py. No dynamic sampling, and no
    punishment of long completions.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from harness.options import RunConfig, keywords, option, parse
from harness.run import Run


@dataclass
class Config(RunConfig):
    minibatches: int = option(4, "optimizer steps per rollout, each on its part of the rows", at_least=1)
    clip_high: float = option(4.0, "a token's weight is at most 1 + clip_high", above=0)
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


def token_advantages(rewards: Tensor, entropy: Tensor, mask: Tensor, group: Tensor) -> Tensor:
    """The advantage of every token: [B, T], 0 where mask is 0. It multiplies grad log pi until the policy moves.

    rewards, group: [B]; entropy (nats), mask: [B, T]. Every method has this function. CISPO does not use entropy.
    """
    return advantages(rewards, group)[:, None] * mask


def loss(ratio: Tensor, advantages: Tensor, mask: Tensor, logprobs: Tensor, clip_high: float = 4.0) -> Tensor:
    """The negated objective of every token, before the mean is taken: [B, T], 0 where mask is 0.

    ratio, logprobs: [B, T]; advantages: [B] or [B, T]; mask: [B, T]. Gradients flow through logprobs, not ratio.
    """
    A = advantages if advantages.dim() == 2 else advantages[:, None]
    objective = ratio.detach().clamp(max=1 + clip_high) * A * logprobs
    return -objective * mask


def main() -> None:
    cfg = parse(Config, __doc__)
    with Run(cfg) as run:
        options = keywords(cfg, token_advantages)
        for _ in run.steps():
            rollout = run.verify(run.sample())  # prompts -> completions -> rewards
            A = token_advantages(rollout.rewards, rollout.entropy, rollout.mask, rollout.group, **options)  # [B, T]
            for minibatch in run.minibatches(rollout, cfg.reduction, skip_zero=A):  # an optimizer step on each
                for batch in minibatch:  # a micro-batch of b rows; taking the next one runs the model on it
                    # In the first minibatch the policy has not moved: the ratio is 1, and the clip does nothing.
                    ratio = (batch.logprobs - batch.old_logprobs).exp()  # [b, T]
                    per_token = loss(ratio, A[batch.rows], batch.mask, batch.logprobs, cfg.clip_high)  # [b, T]
                    metrics = {"clip_ratio/high": (ratio > 1 + cfg.clip_high).float()}  # [b, T] they keep a gradient
                    (per_token * batch.loss_weights).sum().backward()  # loss_weights turn this sum into the mean
                    run.record(batch, per_token, **metrics)
                run.optimizer_step()
            run.log(rollout)


if __name__ == "__main__":
    main()
