"""EGSW, Entropy-Guided Sequence Weighting (arXiv 2503.22456v2), on top of GRPO.

    python egsw.py                                  the tiny model and task: about a minute, no network
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
    ratio is clipped as in GRPO. w is never negative, so to multiply A by it is to multiply the whole clipped objective
    of a token: w min(r A, clip(r) A) = min(r w A, clip(r) w A). It multiplies the KL term too.
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
from harness.options import RunConfig, keywords, option, parse
from harness.run import Run


@dataclass
class Config(RunConfig):
    advantage: Literal["grpo", "dr_grpo", "rloo"] = option("grpo", "baseline and scale of the advantage")
    alpha: float = option(0.5, "factor of the entropy, which is added to the advantage", at_least=0)
    weight_temperature: float = option(2.0, "P, temperature of the softmax; large: all weights equal", above=0)
    step_wise: bool = option(True, "one softmax per position; otherwise one weight per completion")
    mean_one: bool = option(True, "the mean of the weights is one; otherwise their sum is one, as in the paper")
    clip_low: float = option(0.2, "the ratio is clipped at 1 - clip_low", above=0)
    clip_high: float = option(0.2, "the ratio is clipped at 1 + clip_high", above=0)
    kl_coef: float = option(0.0, "beta, the weight of the KL to the starting model", at_least=0)
    reduction: Literal["sequence", "token", "constant"] = option("token", "how the loss is averaged")


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


def weights(
    advantages: Tensor, entropy: Tensor, mask: Tensor, group: Tensor,
    alpha: float = 0.5, weight_temperature: float = 2.0, step_wise: bool = True, mean_one: bool = True,
) -> Tensor:  # fmt: skip
    """EGSW's weights: [B, T], never negative, 0 where mask is 0. They carry no gradient.

    advantages: [B] or [B, T]; entropy (nats), mask: [B, T]; group: [B]. ValueError unless weight_temperature is above 0
    and finite.
    """
    if not 0 < weight_temperature < float("inf"):
        raise ValueError(f"weight_temperature must be above 0 and finite, not {weight_temperature}")
    A = advantages if advantages.dim() == 2 else advantages[:, None]
    competes = mask > 0  # [B, T] the softmax at t is over the rows that have a token there
    score = torch.where(competes, A + alpha * entropy, 0.0).detach().float()  # [B, T] padding may hold NaN
    if not step_wise:  # a row has one score, the mean over its tokens, and all rows of the group are in one softmax
        score = (score.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).float().expand_as(mask)
        competes = torch.ones_like(competes)
    W = torch.zeros_like(mask, dtype=torch.float32)
    for g in group.unique():
        rows = group == g
        logits = score[rows].masked_fill(~competes[rows], -torch.inf)  # [G, T]
        logits = logits - logits.amax(0)  # does not change the softmax, and the division cannot overflow
        W[rows] = (logits / weight_temperature).softmax(0)  # raw_it / sum_j raw_jt
        if mean_one:
            W[rows] *= competes[rows].sum(0)
    return torch.where(mask > 0, W, 0.0)  # at a position where no row has a token, the softmax gave NaN


def token_advantages(
    rewards: Tensor, entropy: Tensor, mask: Tensor, group: Tensor,
    advantage: str = "grpo",
    alpha: float = 0.5, weight_temperature: float = 2.0, step_wise: bool = True, mean_one: bool = True,
) -> Tensor:  # fmt: skip
    """The weighted advantage of every token: [B, T], 0 where mask is 0. It multiplies grad log pi until the policy
    moves.

    rewards, group: [B]; entropy (nats), mask: [B, T]; the options are those of Config.
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
        options = keywords(cfg, token_advantages)
        for _ in run.steps():
            rollout = run.verify(run.sample())  # prompts -> completions -> rewards
            A = token_advantages(rollout.rewards, rollout.entropy, rollout.mask, rollout.group, **options)  # [B, T]
            ref_logprobs = run.reference_logprobs(rollout) if with_kl else None  # [B, T]
            group_A = advantages(rollout.rewards, rollout.group, cfg.advantage)  # [B]
            W = weights(group_A, rollout.entropy, rollout.mask, rollout.group, **keywords(cfg, weights))  # [B, T]
            skip_zero = None if with_kl else A  # with a KL, rows whose advantage is 0 have a gradient too
            for minibatch in run.minibatches(rollout, cfg.reduction, skip_zero):  # an optimizer step on each
                for batch in minibatch:  # a micro-batch of b rows; taking the next one runs the model on it
                    # In the first minibatch the policy has not moved: the ratio is 1, and the clip does nothing.
                    ratio = (batch.logprobs - batch.old_logprobs).exp()  # [b, T]
                    per_token = loss(ratio, A[batch.rows], batch.mask, **clip)  # [b, T]
                    metrics = clip_fractions(ratio, A[batch.rows], **clip)  # two [b, T]
                    if ref_logprobs is not None:
                        kl = k3(batch.logprobs, ref_logprobs[batch.rows])  # [b, T]
                        per_token = per_token + cfg.kl_coef * W[batch.rows] * kl  # the weights multiply the KL too
                        metrics["kl"] = kl
                    (per_token * batch.loss_weights).sum().backward()  # loss_weights turn this sum into the mean
                    run.record(batch, per_token, **metrics)
                run.optimizer_step()
            run.log(rollout)


if __name__ == "__main__":
    main()
