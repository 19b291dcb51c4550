"""GTPO, Group Token Policy Optimization (arXiv 2508.04349; equation numbers of v5). Not the GTPO of arXiv 2508.03772.

    python gtpo.py                                  the tiny model and task: about a minute on a laptop, no network
    python gtpo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k
    python gtpo.py --help

Each token gets a reward of its own, shaped by the policy's entropy H at that token. Uncertain tokens of right
completions (O+) earn more; confident tokens of wrong completions (O-) lose more. d_t and h_t are the numbers of
completions in O+ and in O- that have a token at position t.

    r+_it =  alpha1 r_i + alpha2 d_t H_it / sum_{k in O+} H_kt              in O+, and 0 in O-                       (2)
    r-_jt = -alpha1     - alpha2 h_t (1/H_jt) / sum_{k in O-} (1/H_kt)      in O-, and 0 in O+                       (3)
    A+_it = (r+_it - mean(R+)) / std(R+)                                    in O+                                    (4)
    A-_jt = (r-_jt - mean(R-)) / std(R-)                                    in O-                                    (4)
    J     = 1/sum_k |o_k| sum over tokens of min(w A, clip(w, 1-eps_low, 1+eps_high) A)     A: A+ in O+, A- in O-    (5)

d_t H_it / sum_k H_kt is H_it divided by the mean of H over a set of tokens, here those of the same position and outcome
(--compare column). --compare row takes the tokens of the same completion instead, and matrix all tokens of the outcome.

Deviations from the paper, and readings where it is open:
 1. R+ holds the shaped rewards r+ of all tokens, so it includes the zeros of O-, and R- likewise (--normalize all). The
    other reading takes only the tokens of O+ (--normalize own). But all right tokens have nearly the same reward, so to
    subtract their own mean removes the difference between right and wrong, and only the entropy term is left. Then half
    of the tokens of right completions are pushed down. An example with alpha2 = 0:

        token                 r+    r-    advantage with all    with own
        of a right one         1     0    +1                    0
        of a wrong one         0    -1    -1                    0

 2. Groups that are all right or all wrong are in no set, and their advantage is 0. DAPO's dynamic sampling, which the
    paper uses, removes such groups from the batch.
 3. The paper clips "entropy at 0.2 and 0.28". These are the numbers of DAPO's ratio clip, and here they clip the ratio.
    H has a floor (--entropy-min), because it is divided by, and a ceiling if --entropy-max is given.
 4. All sets stay inside the prompt's own group, so an easy prompt is not compared with a hard one. The paper's runs
    compared over the whole batch (--scope batch), which learned less on hard prompts (experiments/RESULTS.md).
 5. --mean geometric is the robust form of section 2.4.1; --overlong-gamma adds the length punishment of appendix C.
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
    alpha1: float = option(1.0, "weight of the verifier's reward", at_least=0)
    alpha2: float = option(0.1, "weight of the entropy term", at_least=0)
    compare: Literal["column", "row", "matrix"] = option("column", "the tokens that an entropy is compared with")
    mean: Literal["arithmetic", "geometric"] = option("arithmetic", "the mean of their entropies")
    scope: Literal["group", "batch"] = option("group", "all sets span the prompt's own group, or the batch")
    normalize: Literal["all", "own"] = option("all", "Eq. 4 over all tokens, or over those of the outcome alone")
    entropy_min: float = option(1e-3, "floor of the entropy, nats", above=0)
    entropy_max: float = option(1e3, "ceiling of the entropy, nats", above=0)
    overlong_gamma: float | None = option(None, "gamma1 of the overlong punishment, e.g. 0.75", above=0.5, at_most=1)
    clip_low: float = option(0.2, "the ratio is clipped at 1 - clip_low", above=0)
    clip_high: float = option(0.28, "the ratio is clipped at 1 + clip_high", above=0)
    reduction: Literal["sequence", "token", "constant"] = option("token", "how the loss is averaged")


def overlong_punishment(rewards: Tensor, lengths: Tensor, group: Tensor, gamma: float) -> Tensor:
    """Group Relative Overlong Punishment (appendix C), to add to the reward. Three [B] -> [B], from 0 to -1/2.

    Punishes long completions: none if the fraction of right ones is 1 - gamma or less; otherwise the right ones if that
    fraction is above 1/2, else the wrong ones. Long means longer than L, the larger of mid-range and mean of the
    lengths: of the right completions if the fraction is gamma or more, else of the whole group.
    """
    right = rewards > 0.5
    lengths = lengths.float()
    result = torch.zeros_like(lengths)
    for g in group.unique():
        rows = group == g
        fraction_right = right[rows].float().mean()
        if fraction_right <= 1 - gamma:
            continue
        punished = rows & right if fraction_right > 0.5 else rows & ~right
        measured = rows & right if fraction_right >= gamma else rows
        length = lengths[measured]
        L = torch.max((length.min() + length.max()) / 2, length.mean())
        result[punished] = -0.5 * ((lengths[punished] - L) / L.clamp(min=1)).clamp(0, 1)
    return result


def comparison_sets(rewards: Tensor, mask: Tensor, group: Tensor, scope: str) -> list[Tensor]:
    """The sets of rows that are compared, each bool [B]. Scope "group": one set per group whose tokens have both
    outcomes. Scope "batch": one set of all these groups. Rows without a token are in none. KeyError for another scope.
    """
    has_tokens = (mask > 0).any(1)
    groups = [(group == g) & has_tokens for g in group.unique()]
    mixed = [rows for rows in groups if 0 < (rewards[rows] > 0.5).sum() < rows.sum()]
    together = [torch.stack(mixed).any(0)] if mixed else []
    return {"group": mixed, "batch": together}[scope]


def over_mean(values: Tensor, mask: Tensor, compare: str, mean: str) -> Tensor:
    """Each value divided by the mean of the tokens that it is compared with, 0 where mask is 0. Two [n, T], the rows of
    one outcome -> [n, T]. KeyError for another word than those of --compare and --mean."""
    dims = {"column": (0,), "row": (1,), "matrix": (0, 1)}[compare]
    n_tokens = mask.sum(dims, keepdim=True).clamp(min=1)
    arithmetic = values / ((values * mask).sum(dims, keepdim=True) / n_tokens)
    geometric = (values.log() - (values.log() * mask).sum(dims, keepdim=True) / n_tokens).exp()
    ratio = {"arithmetic": arithmetic, "geometric": geometric}[mean]  # [n, T]
    return torch.where(mask > 0, ratio, 0.0)  # in a column without a token it was 0 / 0


def shaped_rewards(
    rewards: Tensor, entropy: Tensor, mask: Tensor, group: Tensor, alpha1: float = 1.0, alpha2: float = 0.1,
    compare: str = "column", mean: str = "arithmetic", scope: str = "group",
    entropy_min: float = 1e-3, entropy_max: float = 1e3, punishment: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """r+ (Eq. 2) and r- (Eq. 3) of every token: two [B, T], 0 for the other outcome, padding and one-outcome groups.
    No gradient flows through the entropy.

    rewards, group, punishment: [B]; entropy (nats), mask: [B, T].
    """
    rewards = rewards.float()
    mask = mask.float()
    H = torch.where(mask > 0, entropy.detach().float(), 1.0).clamp(entropy_min, entropy_max)  # padding may hold NaN
    punishment = torch.zeros_like(rewards) if punishment is None else punishment
    reward_plus = torch.zeros_like(mask)
    reward_minus = torch.zeros_like(mask)
    for rows in comparison_sets(rewards, mask, group, scope):
        right = rows & (rewards > 0.5)
        bonus = over_mean(H[right], mask[right], compare, mean)
        reward_plus[right] = alpha1 * (rewards + punishment)[right, None] + alpha2 * bonus  # (2)

        wrong = rows & (rewards <= 0.5)
        penalty = over_mean(1 / H[wrong], mask[wrong], compare, mean)
        reward_minus[wrong] = alpha1 * (punishment - 1)[wrong, None] - alpha2 * penalty  # (3)
    return reward_plus * mask, reward_minus * mask


def advantages(
    reward_plus: Tensor, reward_minus: Tensor, rewards: Tensor, mask: Tensor, group: Tensor,
    scope: str = "group", normalize: str = "all", eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """A+ for tokens of right completions and A- for those of wrong ones (Eq. 4), from shaped_rewards: [B, T].

    reward_plus, reward_minus, mask: [B, T]; rewards, group: [B]. normalize: "all" takes mean and std over all tokens of
    the set, "own" over those of the outcome alone; KeyError for another word. Groups with one outcome get exactly 0.
    """
    result = torch.zeros_like(reward_plus)
    for rows in comparison_sets(rewards, mask, group, scope):
        for outcome, shaped in ((rewards > 0.5, reward_plus), (rewards <= 0.5, reward_minus)):
            pool = {"all": rows, "own": rows & outcome}[normalize]
            R = shaped[pool][mask[pool] > 0]  # [tokens of the pool]
            if R.max() > R.min():
                result[rows & outcome] = (shaped[rows & outcome] - R.mean()) / (R.std(correction=0) + eps)  # (4)
    return result * mask


def token_advantages(
    rewards: Tensor, entropy: Tensor, mask: Tensor, group: Tensor, alpha1: float = 1.0, alpha2: float = 0.1,
    compare: str = "column", mean: str = "arithmetic", scope: str = "group", normalize: str = "all",
    entropy_min: float = 1e-3, entropy_max: float = 1e3, overlong_gamma: float | None = None,
) -> Tensor:  # fmt: skip
    """The advantage of every token: [B, T], 0 where mask is 0. It multiplies grad log pi until the policy moves.

    rewards, group: [B]; entropy (nats), mask: [B, T]; the options are those of Config.
    """
    punishment = overlong_punishment(rewards, mask.sum(1), group, overlong_gamma) if overlong_gamma else None  # [B]
    reward_plus, reward_minus = shaped_rewards(
        rewards, entropy, mask, group, alpha1, alpha2, compare, mean, scope, entropy_min, entropy_max, punishment
    )  # [B, T]
    return advantages(reward_plus, reward_minus, rewards, mask, group, scope, normalize)


def loss(ratio: Tensor, advantages: Tensor, mask: Tensor, clip_low: float = 0.2, clip_high: float = 0.28) -> Tensor:
    """The negated, clipped objective of every token, before the mean is taken: [B, T], 0 where mask is 0.

    ratio: [B, T]; advantages: [B] or [B, T]; mask: [B, T]. Gradients flow through ratio.
    """
    A = advantages if advantages.dim() == 2 else advantages[:, None]
    objective = torch.min(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)  # (5)
    return -objective * mask


def main() -> None:
    cfg = parse(Config, __doc__)
    clip = {"clip_low": cfg.clip_low, "clip_high": cfg.clip_high}
    with Run(cfg) as run:
        for _ in run.steps():
            rollout = run.verify(run.sample())  # prompts -> completions -> rewards
            A = token_advantages(
                rollout.rewards, rollout.entropy, rollout.mask, rollout.group,
                alpha1=cfg.alpha1, alpha2=cfg.alpha2, compare=cfg.compare, mean=cfg.mean, scope=cfg.scope,
                normalize=cfg.normalize, entropy_min=cfg.entropy_min, entropy_max=cfg.entropy_max,
                overlong_gamma=cfg.overlong_gamma,
            )  # [B, T]  # fmt: skip
            for minibatch in run.minibatches(rollout, cfg.reduction, active=A):  # an optimizer step on each
                for batch in minibatch:  # b rows, scored by the policy as it is now
                    ratio = (batch.logprobs - batch.old_logprobs).exp()  # [b, T]
                    per_token = loss(ratio, A[batch.rows], batch.mask, **clip)  # [b, T]
                    metrics = clip_fractions(ratio, A[batch.rows], **clip)  # two [b, T]
                    (per_token * batch.loss_weights).sum().backward()  # loss_weights turn this sum into the mean
                    run.record(batch, per_token, **metrics)
                run.optimizer_step()
            run.log(rollout)


if __name__ == "__main__":
    main()
