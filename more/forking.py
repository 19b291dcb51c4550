"""The 80/20 rule: only forking tokens learn (arXiv 2506.01939). A baseline of the GTPO paper, on top of DAPO.

    python -m more.forking                          the tiny model and task: about a minute, no network
    python -m more.forking --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k
    python -m more.forking --help

Where the policy is uncertain, a text can go on in several ways: these tokens are its forks. Only the share rho of the
step's tokens with the highest entropy H gets a gradient. The loss is DAPO's:

    A_i = (r_i - mean(r)) / (std(r) + eps)            mean and std over the G completions of the prompt
    m_it = 1 if H_it >= tau, else 0                   tau: a share rho of the step's tokens has this entropy or more
    J    = 1/sum_i |o_i| sum_i sum_t m_it min(w_it A_i, clip(w_it, 1-eps_low, 1+eps_high) A_i)

The sum over |o_i| counts all tokens, those without a gradient too. m_it is 0 or 1, so it can multiply the advantage.

Deviations from the paper, and where other implementations differ:
 1. tau is that of the whole step, before its first update, with the entropy of the policy that sampled. TRL's
    top_entropy_quantile takes it anew in each micro-batch, from the policy as it is then.
 2. Groups that are all right or all wrong are not replaced by new prompts (DAPO's dynamic sampling). Their tokens are
    left out when tau is computed, as if they had been replaced. TRL counts them.
 3. Tokens with exactly the entropy tau are all kept, so a little more than the share rho can be. The first tokens of
    the completions of one prompt have equal entropies.
 4. There is no punishment of long completions, and 4 updates per rollout (--minibatches), as in dapo.py.
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
    rho: float = option(0.2, "share of the tokens that get a gradient: the most uncertain", above=0, at_most=1)
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


def forking_tokens(entropy: Tensor, mask: Tensor, rho: float = 0.2) -> Tensor:
    """The share rho of the tokens with the highest entropy: bool [B, T]. Tokens that tie with the last one are in it.

    entropy, mask: [B, T]; only tokens whose mask is not 0 are counted.
    """
    counted = mask != 0
    H = entropy[counted].sort(descending=True).values
    if len(H) == 0:
        return counted
    tau = H[int(rho * (len(H) - 1))]  # torch.quantile gives the same set, but it takes at most 2^24 tokens
    return counted & (entropy >= tau)


def token_advantages(
    rewards: Tensor, entropy: Tensor, mask: Tensor, group: Tensor,
    advantage: str = "grpo", rho: float = 0.2,
) -> Tensor:  # fmt: skip
    """The advantage of every token: [B, T], 0 where mask is 0 and where the entropy is low. It multiplies grad log pi
    until the policy moves.

    rewards, group: [B]; entropy (nats), mask: [B, T]; the options are those of Config. Divide the loss by all tokens.
    """
    A = advantages(rewards, group)[:, None] * mask  # [B, T]
    return A * forking_tokens(entropy, A, rho)  # A is 0 in padding and in groups whose rewards are equal


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
