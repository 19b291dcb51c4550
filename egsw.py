"""EGSW, Entropy-Guided Sequence Weighting (arXiv 2503.22456v2), on top of GRPO.

    python egsw.py                                  the tiny model and task: about a minute on a laptop, no network
    python egsw.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k
    python egsw.py --help

The completions of a prompt share a fixed total weight. A completion gets more of it if its advantage A is high, or if
the policy was uncertain when it wrote it (high entropy H). The weights multiply GRPO's loss: a larger weight makes a
push stronger, up or down. For completion i of G, with |o_i| tokens, token t, and the starting model pi_ref:

    raw_it = exp((A_it + alpha H_it) / P)
    w_it   = raw_it / sum_j raw_jt                          a softmax over the prompt's completions j, temperature P
    grad J = 1/G sum_i 1/|o_i| sum_t w_it [A_it + beta (pi_ref/pi - 1)] grad log pi(o_it)

Step-wise (the default here), there is one softmax at each position t, over the completions that have a token there.
Trajectory-wise, each completion has one weight, from its advantage and the mean entropy of its tokens. The weights are
constants: no gradient flows through them.

Deviations from the paper, and why:
 1. The weights are multiplied by the number of completions in the softmax, so their mean is one. Then a very large P
    gives GRPO (with the same --reduction), and GRPO's learning rate fits. --no-mean-one gives the paper's weights,
    whose sum is one.
 2. The gradient above holds as long as the policy has not moved. With several updates per rollout (--minibatches), the
    ratio is clipped as in GRPO, and w multiplies the whole clipped objective of a token, with its KL term.
 3. alpha and P are this project's choice. The paper calls them sensitive, but we could not confirm its values. We could
    not confirm its treatment of the KL either. beta is 0 unless --kl-coef is given.
 4. The mean is over all tokens of the optimizer step. The paper takes the mean of each completion first (--reduction
    sequence), and that pays for being short. Advantages sum to zero over a group, but weighted advantages do not,
    because the right completions have the larger weights. The surplus is like a bonus for every completion, and divided
    by |o_i| it is larger for short ones. An example with one weight per completion, P = 2 and alpha = 0:

        completion           A      w      w A  =  A + bonus    bonus / |o_i|
        right, 40 tokens    +1   1.46    +1.46  = +1 +  0.46    0.012
        wrong, 10 tokens    -1   0.54    -0.54  = -1 +  0.46    0.046

    With the mean over tokens, the bonus is the same for all completions, and has no effect on average. On tasks where
    the model can guess, --reduction sequence ended in short guesses (experiments/RESULTS.md).
 5. The weights work with any advantage: --advantage grpo, dr_grpo or rloo, as in grpo.py.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common import clip_fractions
from harness.options import RunConfig, option, parse
from harness.run import Run


@dataclass
class Config(RunConfig):
    advantage: Literal["grpo", "dr_grpo", "rloo"] = option("grpo", "baseline and scale of the advantage")
    alpha: float = option(0.5, "factor of the entropy, beside the advantage", at_least=0)
    weight_temperature: float = option(2.0, "P, temperature of the softmax; large: all weights equal", above=0)
    step_wise: bool = option(True, "one softmax per position; otherwise one weight per completion")
    mean_one: bool = option(True, "the mean of the weights is one; otherwise their sum is one, as in the paper")
    clip_low: float = option(0.2, "the ratio is clipped at 1 - clip_low", above=0)
    clip_high: float = option(0.2, "the ratio is clipped at 1 + clip_high", above=0)
    kl_coef: float = option(0.0, "beta, the weight of the KL to the starting model", at_least=0)
    reduction: Literal["sequence", "token", "constant"] = option("token", "how the loss is averaged")


def advantages(rewards: Tensor, group: Tensor, kind: str = "grpo", eps: float = 1e-6) -> Tensor:
    """Group-relative advantages. rewards [B] float, group [B] (any integers; rows of a prompt share one) -> [B].

    kind: "grpo" (r - mean) / (std + eps); "dr_grpo" r - mean; "rloo" r - mean of the others. A group whose rewards are
    all equal gets exactly 0. ValueError for another kind.
    """
    result = torch.zeros_like(rewards)
    for g in group.unique():
        rows = group == g
        r = rewards[rows]
        if r.max() > r.min():
            centred = r - r.mean()
            if kind == "grpo":
                result[rows] = centred * (1 / (r.std(correction=0) + eps))
            elif kind == "dr_grpo":
                result[rows] = centred
            elif kind == "rloo":
                result[rows] = centred * (len(r) / (len(r) - 1))  # equals r - mean of the others
            else:
                raise ValueError(f"kind must be 'grpo', 'dr_grpo' or 'rloo', not {kind!r}")
    return result


def weights(
    advantages: Tensor, entropy: Tensor, mask: Tensor, group: Tensor,
    alpha: float = 0.5, temperature: float = 2.0, step_wise: bool = True, mean_one: bool = True,
) -> Tensor:  # fmt: skip
    """EGSW's weights: [B, T], 0 where mask is 0. Multiply the loss of each token by them; they carry no gradient.

    advantages: [B] or [B, T]; entropy (nats), mask: [B, T]; group: [B]. ValueError unless temperature is above 0
    and finite.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0 and finite, not {temperature}")
    A = advantages if advantages.dim() == 2 else advantages[:, None]
    score = torch.where(mask > 0, A + alpha * entropy, 0.0).detach().float()  # [B, T] padding may hold NaN
    if not step_wise:  # a row has one score: the mean over its tokens
        score = ((score * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).float()  # [B, 1]
    competing = mask > 0 if step_wise else torch.ones_like(mask, dtype=torch.bool)  # [B, T] who is in each softmax
    result = torch.zeros_like(mask, dtype=torch.float32)
    for g in group.unique():
        rows = group == g
        x = torch.where(competing[rows], score[rows], -torch.inf)  # [G, T]
        x = x - x.amax(0)  # does not change the softmax, and the division cannot overflow
        w = (x / temperature).softmax(0)  # raw_it / sum_j raw_jt
        if mean_one:
            w = w * competing[rows].sum(0)
        result[rows] = w
    return torch.where(mask > 0, result, 0.0)  # at a position where no row has a token, the softmax gave NaN


def token_advantages(
    rewards: Tensor, entropy: Tensor, mask: Tensor, group: Tensor, advantage: str = "grpo",
    alpha: float = 0.5, weight_temperature: float = 2.0, step_wise: bool = True, mean_one: bool = True,
) -> Tensor:  # fmt: skip
    """The weighted advantage of every token: [B, T], 0 where mask is 0. It multiplies grad log pi until the policy
    moves.

    rewards, group: [B]; entropy (nats), mask: [B, T]; the options are those of Config. With kl_coef 0 it gives the
    gradient of main(), which needs the weights apart because they multiply the KL term too.
    """
    A = advantages(rewards, group, advantage)  # [B]
    return A[:, None] * weights(A, entropy, mask, group, alpha, weight_temperature, step_wise, mean_one)


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
        for _ in run.steps():
            rollout = run.verify(run.sample())  # prompts -> completions -> rewards
            A = advantages(rollout.rewards, rollout.group, cfg.advantage)  # [B]
            W = weights(
                A, rollout.entropy, rollout.mask, rollout.group,
                alpha=cfg.alpha, temperature=cfg.weight_temperature, step_wise=cfg.step_wise, mean_one=cfg.mean_one,
            )  # [B, T]  # fmt: skip
            ref_logprobs = run.reference_logprobs(rollout) if with_kl else None  # [B, T]
            active = None if with_kl else A  # without a KL, rows with advantage 0 have no gradient: they are not scored
            for minibatch in run.minibatches(rollout, cfg.reduction, active):  # an optimizer step on each
                for batch in minibatch:  # b rows, scored by the policy as it is now
                    ratio = (batch.logprobs - batch.old_logprobs).exp()  # [b, T]
                    per_token = loss(ratio, A[batch.rows], batch.mask, **clip)  # [b, T]
                    metrics = clip_fractions(ratio, A[batch.rows], **clip)  # two [b, T]
                    if ref_logprobs is not None:
                        kl = k3(batch.logprobs, ref_logprobs[batch.rows])  # [b, T]
                        per_token = per_token + cfg.kl_coef * kl * batch.mask
                        metrics["kl"] = kl
                    per_token = W[batch.rows] * per_token  # W multiplies the KL term too
                    (per_token * batch.loss_weights).sum().backward()  # loss_weights turn this sum into the mean
                    run.record(batch, per_token, **metrics)
                run.optimizer_step()
            run.log(rollout)


if __name__ == "__main__":
    main()
