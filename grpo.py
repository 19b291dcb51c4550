"""GRPO, Group Relative Policy Optimization (Shao et al., DeepSeekMath, arXiv 2402.03300).

    python grpo.py                                  the tiny model and task: a few minutes on a laptop, no network
    python grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k
    python grpo.py --help

For each prompt, G completions o_i are sampled from the current policy and verified: r_i is 1 or 0.

    A_i = (r_i - mean(r)) / (std(r) + eps)                      mean and std over the G completions of the prompt
    J   = 1/G sum_i 1/|o_i| sum_t [ min(w A_i, clip(w, 1-eps_low, 1+eps_high) A_i) - beta k3 ]             (Eq. 3)
    w   = pi(o_it) / pi_old(o_it),   k3 = ref/pi - log(ref/pi) - 1  with ref/pi = pi_ref(o_it) / pi(o_it)   (Eq. 4)

Deviations from the paper, and why:
 1. beta is 0 unless --kl-coef is given: with a verifier as the reward there is no reward model to over-optimise, and
    the reference model costs memory and time. It is loaded only when beta > 0.
 2. std is the population's (divided by G), as in GTPO's analysis; TRL and verl divide by G - 1, which scales all
    advantages alike.
 3. --advantage dr_grpo leaves out the division by std (Dr. GRPO, arXiv 2503.20783; give --reduction constant with it,
    which replaces 1/|o_i|); rloo compares with the mean of the *other* completions (RLOO, arXiv 2402.14740).
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
    clip_low: float = option(0.2, "the ratio is clipped at 1 - clip_low", above=0)
    clip_high: float = option(0.2, "the ratio is clipped at 1 + clip_high", above=0)
    kl_coef: float = option(0.0, "beta, the weight of the KL to the starting model", at_least=0)
    reduction: Literal["sequence", "token", "constant"] = option("sequence", "how the loss is averaged")


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
            ref = run.reference_logprobs(rollout) if cfg.kl_coef > 0 else None  # [B, T]

            def objective(logprobs, old_logprobs, rows):  # of one micro-batch: [b, T], [b, T], [b]
                mask, clip = rollout.mask[rows], (cfg.clip_low, cfg.clip_high)
                kl = None if ref is None else k3(logprobs, ref[rows])
                metrics = clip_fractions((logprobs - old_logprobs).exp(), A[rows], *clip)
                if kl is not None:
                    metrics["kl"] = kl
                return loss(logprobs, old_logprobs, A[rows], mask, *clip, kl, cfg.kl_coef), metrics

            metrics = run.update(rollout, objective, cfg.reduction, active=A if ref is None else None)
            run.log(rollout, metrics)


if __name__ == "__main__":
    main()
