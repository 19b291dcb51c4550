"""GRPO, Group Relative Policy Optimization (Shao et al., DeepSeekMath, arXiv 2402.03300).

    python grpo.py                                  the tiny model and task: about a minute, no network
    python grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k
    python grpo.py --help

The policy samples G completions o_1 ... o_G of each prompt. A verifier gives each a reward r_i: 1 if right, 0 if wrong.

    A_i  = (r_i - mean(r)) / (std(r) + eps)           mean and std over the G completions of the prompt
    w_it = pi(o_it) / pi_old(o_it)                    ratio of a token: the policy now over the policy that sampled
    k_it = pi_ref/pi - log(pi_ref/pi) - 1             estimate of the KL to the starting model pi_ref, at o_it  (Eq. 4)
    J    = 1/G sum_i 1/|o_i| sum_t [ min(w_it A_i, clip(w_it, 1-eps_low, 1+eps_high) A_i) - beta k_it ]         (Eq. 3)

Deviations from the paper, and why:
 1. beta is 0 unless --kl-coef is given. The reward comes from a verifier, so there is no reward model to exploit, and
    the reference model costs memory and time. It is loaded only if beta is above 0.
 2. std is that of the population (it divides by G), as in GTPO's analysis. TRL and verl divide by G - 1, which scales
    all advantages by the same factor.
 3. --advantage dr_grpo does not divide by std (Dr. GRPO, arXiv 2503.20783; use it with --reduction constant, which
    replaces 1/|o_i|). --advantage rloo compares with the mean of the *other* completions (RLOO, arXiv 2402.14740).
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
    advantage: Literal["grpo", "dr_grpo", "rloo"] = option("grpo", "baseline and scale of the advantage")
    clip_low: float = option(0.2, "the ratio is clipped at 1 - clip_low", above=0)
    clip_high: float = option(0.2, "the ratio is clipped at 1 + clip_high", above=0)
    kl_coef: float = option(0.0, "beta, the weight of the KL to the starting model", at_least=0)
    reduction: Literal["sequence", "token", "constant"] = option("sequence", "how the loss is averaged")


def advantages(rewards: Tensor, group: Tensor, advantage: str = "grpo", eps: float = 1e-6) -> Tensor:
    """Group-relative advantages. rewards [B] float, group [B] (any integers; rows of a prompt share one) -> [B].

    advantage: "grpo" (r - mean) / (std + eps); "dr_grpo" r - mean; "rloo" r - mean of the others. A group whose rewards
    are all equal gets exactly 0. ValueError for another word.
    """
    result = torch.zeros_like(rewards)
    for g in group.unique():
        rows = group == g
        r = rewards[rows]
        if r.max() > r.min():
            centred = r - r.mean()
            if advantage == "grpo":
                result[rows] = centred / (r.std(correction=0) + eps)
            elif advantage == "dr_grpo":
                result[rows] = centred
            elif advantage == "rloo":
                result[rows] = centred * (len(r) / (len(r) - 1))  # equals r - mean of the others
            else:
                raise ValueError(f"advantage must be 'grpo', 'dr_grpo' or 'rloo', not {advantage!r}")
    return result


def token_advantages(
    rewards: Tensor, entropy: Tensor, mask: Tensor, group: Tensor,
    advantage: str = "grpo",
) -> Tensor:  # fmt: skip
    """The advantage of every token: [B, T], 0 where mask is 0. It multiplies grad log pi until the policy moves.

    rewards, group: [B]; entropy (nats), mask: [B, T]. Every method has this function. GRPO does not use entropy.
    """
    return advantages(rewards, group, advantage)[:, None] * mask


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's estimate of KL(pi || pi_ref) at each token, in nats, never negative. Two [B, T] -> [B, T]."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1  # GRPO's Eq. 4


def loss(ratio: Tensor, advantages: Tensor, mask: Tensor, clip_low: float = 0.2, clip_high: float = 0.2) -> Tensor:
    """The negated, clipped objective of every token, before the mean is taken: [B, T], 0 where mask is 0.

    ratio: [B, T]; advantages: [B] or [B, T]; mask: [B, T]. Gradients flow through ratio.
    """
    A = advantages if advantages.dim() == 2 else advantages[:, None]
    objective = torch.min(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)  # GRPO's Eq. 3
    return -objective * mask


def main() -> None:
    cfg = parse(Config, __doc__)
    clip = {"clip_low": cfg.clip_low, "clip_high": cfg.clip_high}
    with_kl = cfg.kl_coef > 0
    with Run(cfg) as run:
        options = keywords(cfg, token_advantages)
        for _ in run.steps():
            rollout = run.verify(run.sample())  # prompts -> completions -> rewards
            A = token_advantages(rollout.rewards, rollout.entropy, rollout.mask, rollout.group, **options)  # [B, T]
            ref_logprobs = run.reference_logprobs(rollout) if with_kl else None  # [B, T]
            skip_zero = None if with_kl else A  # with a KL, rows whose advantage is 0 have a gradient too
            for minibatch in run.minibatches(rollout, cfg.reduction, skip_zero):  # an optimizer step on each
                for batch in minibatch:  # a micro-batch of b rows; taking the next one runs the model on it
                    # In the first minibatch the policy has not moved: the ratio is 1, and the clip does nothing.
                    ratio = (batch.logprobs - batch.old_logprobs).exp()  # [b, T]
                    per_token = loss(ratio, A[batch.rows], batch.mask, **clip)  # [b, T]
                    metrics = clip_fractions(ratio, A[batch.rows], **clip)  # two [b, T]
                    if ref_logprobs is not None:
                        kl = k3(batch.logprobs, ref_logprobs[batch.rows])  # [b, T]
                        per_token = per_token + cfg.kl_coef * kl * batch.mask
                        metrics["kl"] = kl
                    (per_token * batch.loss_weights).sum().backward()  # loss_weights turn this sum into the mean
                    run.record(batch, per_token, **metrics)
                run.optimizer_step()
            run.log(rollout)


if __name__ == "__main__":
    main()
