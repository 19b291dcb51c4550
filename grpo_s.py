"""GRPO-S, sequence-level entropy-weighted GRPO (arXiv 2508.04349, the GTPO paper; equation numbers of v5).

    python grpo_s.py                                the tiny model and task: about a minute, no network
    python grpo_s.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k
    python grpo_s.py --help

The idea of GTPO on the level of completions: each has one reward, shaped by its mean entropy H_i, and one probability
ratio. O+ are the n right and O- the m wrong completions of a prompt.

    s_i  =  beta1 r_i + beta2 n H_i / sum_{k in O+} H_k                     in O+: the shaped reward                 (6)
    s_j  = -beta1     - beta2 m (1/H_j) / sum_{k in O-} (1/H_k)             in O-                                    (6)
    A_i  = (s_i - mean(s)) / std(s)                                         over the G completions of the prompt
    J    = 1/G sum_i min(w_i A_i, clip(w_i, 1-eps_low, 1+eps_high) A_i)                                              (7)
    w_i  = 1/|o_i| sum_t pi(o_it) / pi_old(o_it)                            the arithmetic mean of the ratios        (8)
    w_i  = exp(1/|o_i| sum_t (log pi(o_it) - log pi_old(o_it)))             the geometric mean             (Algorithm 1)

Deviations from the paper, and readings where it is open:
 1. The ratio is geometric, as in Algorithm 1. --ratio-mean arithmetic is Eq. 8.
 2. Groups that are all right or all wrong have advantage 0. Their shaped rewards differ only by entropy, and to divide
    such small differences by their own std would turn noise into a gradient of full strength.
 3. H_i has a floor (--entropy-min), because it is divided by. --entropy-mean geometric is the robust form of section
    2.4.1; with it each token's entropy has the floor, because its logarithm is taken.
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
    beta1: float = option(1.0, "weight of the verifier's reward", at_least=0)
    beta2: float = option(0.1, "weight of the entropy term", at_least=0)
    entropy_mean: Literal["arithmetic", "geometric"] = option("arithmetic", "mean of a completion's token entropies")
    entropy_min: float = option(1e-3, "floor of that mean, nats; if geometric, of each token's entropy", above=0)
    ratio_mean: Literal["geometric", "arithmetic"] = option("geometric", "mean of a completion's token ratios")
    clip_low: float = option(0.2, "the ratio is clipped at 1 - clip_low", above=0)
    clip_high: float = option(0.28, "the ratio is clipped at 1 + clip_high", above=0)
    reduction: Literal["sequence", "token", "constant"] = option("sequence", "how the loss is averaged")


def shaped_rewards(
    rewards: Tensor, entropy: Tensor, mask: Tensor, group: Tensor,
    beta1: float = 1.0, beta2: float = 0.1, entropy_mean: str = "arithmetic", entropy_min: float = 1e-3,
) -> Tensor:  # fmt: skip
    """The shaped reward of every completion (Eq. 6). rewards, group: [B]; entropy (nats), mask: [B, T] -> [B].

    A completion without a token has no entropy: it gets beta1 r or -beta1 alone, and is in no mean. No gradient flows
    through the entropy. KeyError for another mean than arithmetic and geometric.
    """
    entropy = torch.where(mask > 0, entropy.detach(), 1.0)  # padding may hold NaN
    n_tokens = mask.sum(1)
    arithmetic = ((entropy * mask).sum(1) / n_tokens.clamp(min=1)).clamp(min=entropy_min)
    geometric = ((entropy.clamp(min=entropy_min).log() * mask).sum(1) / n_tokens.clamp(min=1)).exp()
    H = {"arithmetic": arithmetic, "geometric": geometric}[entropy_mean]  # [B]
    result = torch.where(rewards > 0.5, beta1 * rewards, -beta1)
    for g in group.unique():
        rows = (group == g) & (n_tokens > 0)
        # Without a right row, the mean of H[right] is NaN. But then result[right] is empty, and nothing becomes NaN.
        right = rows & (rewards > 0.5)
        result[right] += beta2 * H[right] / H[right].mean()  # (6)
        wrong = rows & (rewards <= 0.5)
        result[wrong] -= beta2 * (1 / H[wrong]) / (1 / H[wrong]).mean()  # (6)
    return result


def advantages(shaped: Tensor, rewards: Tensor, group: Tensor, eps: float = 1e-6) -> Tensor:
    """Group-relative advantages of the shaped rewards. shaped, rewards, group: [B] -> [B].

    A group with one outcome, all right or all wrong, gets exactly 0, whatever its entropies.
    """
    result = torch.zeros_like(shaped)
    for g in group.unique():
        rows = group == g
        s = shaped[rows]
        if 0 < (rewards[rows] > 0.5).sum() < len(s):
            result[rows] = (s - s.mean()) / (s.std(correction=0) + eps)
    return result


def token_advantages(
    rewards: Tensor, entropy: Tensor, mask: Tensor, group: Tensor,
    beta1: float = 1.0, beta2: float = 0.1, entropy_mean: str = "arithmetic", entropy_min: float = 1e-3,
) -> Tensor:  # fmt: skip
    """The advantage of every token, the same in a completion: [B, T], 0 where mask is 0. It multiplies grad log pi
    until the policy moves.

    rewards, group: [B]; entropy (nats), mask: [B, T]; the options are those of Config.
    """
    shaped = shaped_rewards(rewards, entropy, mask, group, beta1, beta2, entropy_mean, entropy_min)  # [B]
    return advantages(shaped, rewards, group)[:, None] * mask


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, ratio_mean: str = "geometric") -> Tensor:
    """One probability ratio per completion, the mean of its tokens' ratios. logprobs, old_logprobs, mask: [B, T] ->
    [B, 1]

    ratio_mean: "geometric" (Algorithm 1) or "arithmetic" (Eq. 8); KeyError for another.
    """
    log_ratio = (logprobs - old_logprobs) * mask
    n_tokens = mask.sum(1, keepdim=True).clamp(min=1)
    geometric = (log_ratio.sum(1, keepdim=True) / n_tokens).exp()
    arithmetic = (log_ratio.exp() * mask).sum(1, keepdim=True) / n_tokens
    return {"geometric": geometric, "arithmetic": arithmetic}[ratio_mean]


def loss(ratio: Tensor, advantages: Tensor, mask: Tensor, clip_low: float = 0.2, clip_high: float = 0.28) -> Tensor:
    """The negated, clipped objective (7), the same at every token of a completion: [B, T], 0 where mask is 0.

    ratio: [B, 1]; advantages: [B] or [B, T]; mask: [B, T]. Gradients flow through ratio.
    """
    A = advantages if advantages.dim() == 2 else advantages[:, None]
    objective = torch.min(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)  # (7)
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
                    ratio = sequence_ratio(batch.logprobs, batch.old_logprobs, batch.mask, cfg.ratio_mean)  # [b, 1]
                    per_token = loss(ratio, A[batch.rows], batch.mask, **clip)  # [b, T]
                    metrics = clip_fractions(ratio, A[batch.rows], **clip)  # two [b, T]
                    (per_token * batch.loss_weights).sum().backward()  # loss_weights turn this sum into the mean
                    run.record(batch, per_token, **metrics)
                run.optimizer_step()
            run.log(rollout)


if __name__ == "__main__":
    main()
