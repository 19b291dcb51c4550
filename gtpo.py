"""GTPO, Group Token Policy Optimization (arXiv 2508.04349; equation numbers of v5). Not the GTPO of arXiv 2508.03772.

    python gtpo.py                                  the tiny model and task: a few minutes on a laptop, no network
    python gtpo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k
    python gtpo.py --help

Each token gets a reward of its own, shaped by the policy's entropy H there: uncertain tokens of right answers (O+) earn
more, confident tokens of wrong answers (O-) are punished harder. d_t, h_t: rows of O+, O- with a token at t.

    r+_it =  alpha1 r_i + alpha2 d_t H_it / sum_{k in O+} H_kt               in O+, 0 in O-                      (2)
    r-_jt = -alpha1     - alpha2 h_t (1/H_jt) / sum_{k in O-} (1/H_kt)       in O-, 0 in O+                      (3)
    A+    = (r+ - mean(R+)) / std(R+),   A- = (r- - mean(R-)) / std(R-)                                          (4)
    J     = 1/sum_k |o_k| [ sum over tokens of O+ of min(w A+, clip(w) A+), and of O- with A- ]                  (5)

The share times its count is an entropy over the mean entropy of a comparison set, which --compare names: the tokens at
the same position (column, Eq. 2 and 3), of the same completion (row), or all of the outcome (matrix).

Deviations from the paper, and readings where it is open:
 1. R+ holds the shaped reward of every token, with the zeros of O-, and R- likewise (--normalize all). Then alpha2 = 0
    is GRPO on the token level, which the paper's own analysis assumes. --normalize own takes R+ over O+ alone, as some
    read Eq. 4: half of the tokens of right answers are then pushed down, and alpha2 = 0 leaves no signal at all.
 2. Groups that are all right or all wrong are left out of every set and have advantage 0, as DAPO's dynamic sampling
    would have left them out of the batch.
 3. The paper clips "entropy at 0.2 and 0.28", the numbers of DAPO's ratio clip: here they clip the ratio. H has a floor
    (--entropy-min) before it is divided by, and a ceiling if --entropy-max is given.
 4. All sets stay inside the prompt's own group, so that an easy prompt is no baseline for a hard one. The paper's runs
    compared over the whole batch: --scope batch, which learned less on hard ones (experiments/RESULTS.md).
 5. --mean geometric is the robust form of section 2.4.1; --overlong-gamma adds the length punishment of appendix C.
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
    alpha1: float = option(1.0, "weight of the verifier's reward", at_least=0)
    alpha2: float = option(0.1, "weight of the entropy's share", at_least=0)
    compare: Literal["column", "row", "matrix"] = option("column", "the tokens that an entropy is compared with")
    mean: Literal["arithmetic", "geometric"] = option("arithmetic", "their mean")
    scope: Literal["group", "batch"] = option("group", "all sets span the prompt's own group, or the batch")
    normalize: Literal["all", "own"] = option("all", "Eq. 4 over all tokens, or over the outcome's own")
    entropy_min: float = option(1e-3, "floor of the entropy, nats", above=0)
    entropy_max: float = option(1e3, "ceiling of the entropy, nats", above=0)
    overlong_gamma: float | None = option(None, "gamma1 of the overlong punishment, e.g. 0.75", above=0.5)
    clip_low: float = option(0.2, "the ratio is clipped at 1 - clip_low", above=0)
    clip_high: float = option(0.28, "the ratio is clipped at 1 + clip_high", above=0)
    kl_coef: float = option(0.0, "beta, the weight of the KL to the starting model", at_least=0)
    reduction: Literal["sequence", "token", "constant"] = option("token", "how the loss is averaged")


def overlong_punishment(rewards: Tensor, lengths: Tensor, group: Tensor, gamma: float) -> Tensor:
    """Group Relative Overlong Punishment (appendix C), to add to the reward. Three [B] -> [B], between 0 and -1/2.

    With a share of right answers of gamma or more, the long ones among the right are punished; of 1 - gamma or less,
    none; between, the long ones of the majority. Long is against L, the larger of mid-range and mean of the lengths.
    """
    right, result = rewards > 0.5, torch.zeros_like(rewards)
    for g in group.unique():
        rows = group == g
        share = right[rows].float().mean()
        if share <= 1 - gamma:
            continue
        punished = rows & right if share > 0.5 else rows & ~right
        among = lengths[rows & right if share >= gamma else rows].float()
        L = torch.max((among.min() + among.max()) / 2, among.mean())
        result[punished] = -0.5 * ((lengths[punished] - L) / L).clamp(0, 1)
    return result


def comparison_sets(rewards: Tensor, group: Tensor, scope: str) -> list[Tensor]:
    """The rows, bool [B], that are compared with each other: each group with both outcomes, or all those together."""
    groups = [group == g for g in group.unique()]
    both = [rows for rows in groups if 0 < (rewards[rows] > 0.5).sum() < rows.sum()]
    return [torch.stack(both).any(0)] if both and scope == "batch" else both


def share(values: Tensor, mask: Tensor, compare: str, mean: str) -> Tensor:
    """Each value over the mean of its comparison set, 0 where mask is 0. Two [n, T] -> [n, T]."""
    dims = {"column": (0,), "row": (1,), "matrix": (0, 1)}[compare]
    values = values.log() if mean == "geometric" else values
    centre = (values * mask).sum(dims, keepdim=True) / mask.sum(dims, keepdim=True).clamp(min=1)
    # where: a column without a token has centre 0
    return torch.where(mask > 0, (values - centre).exp() if mean == "geometric" else values / centre, 0.0)


def shaped_rewards(
    rewards: Tensor,
    entropy: Tensor,
    mask: Tensor,
    group: Tensor,
    alpha1: float = 1.0,
    alpha2: float = 0.1,
    compare: str = "column",
    mean: str = "arithmetic",
    scope: str = "group",
    entropy_min: float = 1e-3,
    entropy_max: float = 1e3,
    punishment: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """r+ (Eq. 2) and r- (Eq. 3) of every token: two [B, T], 0 for the other outcome, padding and one-outcome groups.

    rewards, group, punishment: [B]; entropy, mask: [B, T]; entropies in nats.
    """
    right, H = rewards > 0.5, entropy.clamp(entropy_min, entropy_max)
    extra = torch.zeros_like(rewards) if punishment is None else punishment
    plus, minus = torch.zeros_like(mask), torch.zeros_like(mask)
    for rows in comparison_sets(rewards, group, scope):
        ok, bad = rows & right, rows & ~right
        plus[ok] = alpha1 * (rewards + extra)[ok, None] + alpha2 * share(H[ok], mask[ok], compare, mean)
        minus[bad] = alpha1 * (extra - 1)[bad, None] - alpha2 * share(1 / H[bad], mask[bad], compare, mean)
    return plus * mask, minus * mask


def advantages(
    plus: Tensor,
    minus: Tensor,
    rewards: Tensor,
    mask: Tensor,
    group: Tensor,
    scope: str = "group",
    normalize: str = "all",
    eps: float = 1e-6,
) -> Tensor:
    """Eq. 4: A+ for tokens of right completions and A- for those of wrong ones, from shaped_rewards. [B, T]

    normalize: "all" takes mean and std over every token of the comparison set, "own" over the outcome's own. Groups
    with one outcome get exactly 0.
    """
    right, result = rewards > 0.5, torch.zeros_like(mask)
    for rows in comparison_sets(rewards, group, scope):
        for outcome, shaped in ((rows & right, plus), (rows & ~right, minus)):
            over = outcome if normalize == "own" else rows
            R = shaped[over][mask[over] > 0]
            if R.max() > R.min():
                result[outcome] = (shaped[outcome] - R.mean()) / (R.std(correction=0) + eps)
    return result * mask


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
    clip_high: float = 0.28,
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
            rewards, mask, group = rollout.rewards, rollout.mask, rollout.group
            punishment = None
            if cfg.overlong_gamma is not None:
                punishment = overlong_punishment(rewards, rollout.lengths(), group, cfg.overlong_gamma)  # [B]
            shaped = shaped_rewards(
                rewards, rollout.entropy, mask, group, cfg.alpha1, cfg.alpha2, cfg.compare, cfg.mean, cfg.scope,
                cfg.entropy_min, cfg.entropy_max, punishment,
            )  # fmt: skip
            A = advantages(*shaped, rewards, mask, group, cfg.scope, cfg.normalize)  # [B, T]
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
