"""Clip-Cov and KL-Cov (The Entropy Mechanism of RL for Reasoning Language Models, arXiv 2505.22617).

    python -m more.cov --variant clip                  the tiny model and task: about a minute, no network
    python -m more.cov --variant kl --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k
    python -m more.cov --help

An update lowers the entropy of the policy by about the covariance of log-probs and advantages, and a few tokens make
up most of it. These are kept from moving as far as the others.

    cov_it = (log pi_old(o_it) - mean(log pi_old)) (A_i - mean(A))         both means over all tokens of the step
    w_it   = pi(o_it) / pi_old(o_it)

    --variant clip: of the tokens with lower < cov < upper, a random choice, the share k of all tokens, has no gradient
    J = 1/sum_i |o_i| sum over the other tokens of min(w_it A_i, clip(w_it, 1-eps_low, 1+eps_high) A_i)

    --variant kl: the share k of the tokens with the highest cov has a penalty for leaving the policy that sampled
    J = 1/sum_i |o_i| sum_i sum_t [ w_it A_i - beta |log w_it| if chosen ]

A log-prob is at most 0, so it can be far below the mean but not far above it. A high covariance therefore belongs to
an unlikely token of a wrong completion: pushed down, it would become even less likely.

Deviations from the paper, and where other implementations differ:
 1. The tokens are chosen once per step, among all of its tokens, before the first update. So this is log pi_old
    and the paper has log pi; these are equal then. verl and the paper's code choose anew in each micro-batch, with the
    policy as it is then. Their Clip-Cov passes over tokens that the ratio clip has stopped; here there are none yet.
 2. The gradient of |log w| is the sign of log w. It is 0 until the policy moves, so with one update per rollout KL-Cov
    does nothing at all. Hence 4 updates (--minibatches). |log w| is the paper's code for KL(pi_old || pi).
 3. Groups that are all right or all wrong have advantage 0, and their tokens are in no mean and never chosen. DAPO's
    dynamic sampling would remove such groups from the batch. verl counts them, and its KL-Cov may choose them.
 4. k is 2e-4, as in the paper for Clip-Cov and, on a 32B model, for KL-Cov (2e-3 on a 7B model). In the paper's code
    of KL-Cov it is a percentage. At least one token is chosen: a step of the default run has some 6,000 tokens, so
    k = 2e-4 is one token, and --share 0.01 shows more.
 5. The ratio is clipped at 0 and 2 (--clip-low, --clip-high), as in the paper's runs of Clip-Cov. KL-Cov has no clip.
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
    variant: Literal["clip", "kl"] = option("clip", "Clip-Cov or KL-Cov")
    share: float = option(2e-4, "k, the share of all tokens that is chosen", above=0, at_most=1)
    lower: float = option(1.0, "--variant clip: smallest covariance of a token that may be chosen")
    upper: float = option(5.0, "--variant clip: largest covariance of a token that may be chosen")
    penalty: float = option(1.0, "--variant kl: beta, the weight of the penalty", at_least=0)
    clip_low: float = option(1.0, "--variant clip: the ratio is clipped at 1 - clip_low", above=0)
    clip_high: float = option(1.0, "--variant clip: the ratio is clipped at 1 + clip_high", above=0)
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
    """The advantage of every token: [B, T], 0 where mask is 0. With Clip-Cov, chosen_tokens() then lose theirs.

    rewards, group: [B]; entropy (nats), mask: [B, T]. Every method has this function. These do not use entropy.
    """
    return advantages(rewards, group)[:, None] * mask


def chosen_tokens(
    advantages: Tensor, logprobs: Tensor, uniforms: Tensor,
    variant: str = "clip", share: float = 2e-4, lower: float = 1.0, upper: float = 5.0,
) -> Tensor:  # fmt: skip
    """The tokens that are kept from moving: bool [B, T]. Those with advantage 0, such as padding, are never among them.

    advantages, logprobs (of the policy that sampled): [B, T] of the whole step; uniforms: [B, T] random numbers, which
    decide the choice of Clip-Cov. KeyError for another variant than "clip" and "kl".
    """
    candidates = advantages != 0
    n_tokens = max(1, int(candidates.sum()))
    cov = (logprobs - (logprobs * candidates).sum() / n_tokens) * (advantages - advantages.sum() / n_tokens)  # [B, T]
    if variant == "clip":
        candidates = candidates & (cov > lower) & (cov < upper)
    score = torch.where(candidates, {"clip": uniforms, "kl": cov}[variant], -torch.inf)
    highest_first = score.flatten().sort(descending=True, stable=True).indices
    chosen = torch.zeros(candidates.shape, dtype=torch.bool, device=candidates.device)
    chosen.view(-1)[highest_first[: max(1, int(share * n_tokens))]] = True
    return chosen & candidates


def loss(
    ratio: Tensor, advantages: Tensor, mask: Tensor, chosen: Tensor, variant: str = "clip",
    clip_low: float = 1.0, clip_high: float = 1.0, penalty: float = 1.0,
) -> Tensor:  # fmt: skip
    """The negated objective of every token, before the mean is taken: [B, T], 0 where mask is 0.

    ratio, chosen: [B, T]; advantages: [B] or [B, T]; mask: [B, T]. Gradients flow through ratio.
    """
    A = advantages if advantages.dim() == 2 else advantages[:, None]
    if variant == "clip":
        objective = torch.min(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A) * ~chosen
    else:
        objective = ratio * A - penalty * torch.where(chosen, ratio, 1.0).log().abs()
    return -objective * mask


def main() -> None:
    cfg = parse(Config, __doc__)
    clip = {"clip_low": cfg.clip_low, "clip_high": cfg.clip_high}
    with Run(cfg) as run:
        options = keywords(cfg, token_advantages)
        for _ in run.steps():
            rollout = run.verify(run.sample())  # prompts -> completions -> rewards
            A = token_advantages(rollout.rewards, rollout.entropy, rollout.mask, rollout.group, **options)  # [B, T]
            uniforms = torch.rand(A.shape, generator=run.sampling_rng).to(A.device)  # [B, T] the same in all processes
            chosen = chosen_tokens(
                A, rollout.logprobs, uniforms, cfg.variant, cfg.share, cfg.lower, cfg.upper
            )  # [B, T]
            for minibatch in run.minibatches(rollout, cfg.reduction, skip_zero=A):  # an optimizer step on each
                for batch in minibatch:  # a micro-batch of b rows; taking the next one runs the model on it
                    # In the first minibatch the policy has not moved: the ratio is 1, and the clip does nothing.
                    ratio = (batch.logprobs - batch.old_logprobs).exp()  # [b, T]
                    per_token = loss(
                        ratio, A[batch.rows], batch.mask, chosen[batch.rows], cfg.variant, **clip, penalty=cfg.penalty
                    )  # [b, T]
                    metrics = {"chosen": chosen[batch.rows].float()}  # [b, T]
                    if cfg.variant == "clip":
                        metrics |= clip_fractions(ratio, A[batch.rows], **clip)  # two [b, T]
                    (per_token * batch.loss_weights).sum().backward()  # loss_weights turn this sum into the mean
                    run.record(batch, per_token, **metrics)
                run.optimizer_step()
            run.log(rollout)


if __name__ == "__main__":
    main()
