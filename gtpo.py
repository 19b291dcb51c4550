"""GTPO, Group Token Policy Optimization (arXiv 2508.04349; equation numbers of v5). Not the GTPO of arXiv 2508.03772.

    python gtpo.py                                  the tiny model and task: about a minute, no network
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
(--entropy-baseline column). With row it is the mean over the tokens of the same completion, with matrix over all tokens
of the outcome.

Deviations from the paper, and readings where it is open:
 1. R+ holds the shaped rewards r+ of all tokens, so it includes the zeros of O-, and R- likewise. The other reading
    takes only the tokens of O+ (--normalize-over outcome). But all right tokens have nearly the same reward, so to
    subtract their own mean removes the difference between right and wrong, and only the entropy term is left. Then half
    of the tokens of right completions are pushed down. An example with alpha2 = 0:

        token                 r+    r-    over all tokens    over the outcome
        of a right one         1     0    +1                 0
        of a wrong one         0    -1    -1                 0

 2. Groups that are all right or all wrong are in no set, and their advantage is 0. DAPO's dynamic sampling, which the
    paper uses, removes such groups from the batch.
 3. The paper clips "entropy at 0.2 and 0.28". 0.2 and 0.28 are DAPO's limits for the ratio, so here they limit the
    ratio, not the entropy. H has a floor (--entropy-min), because it is divided by, and a ceiling with --entropy-max.
 4. All sets stay inside the prompt's own group, so an easy prompt is not compared with a hard one. The paper's runs
    compared over the whole batch (--compare-over batch), which learned less on hard prompts (experiments/RESULTS.md).
 5. --entropy-mean geometric is the robust form of section 2.4.1; --overlong-gamma adds the length punishment of
    appendix C.
 6. In wrong completions 1/H lowers confident tokens most. The caption of the first figure of v6 (ICML 2026), read
    literally, lowers high-entropy tokens instead. The equations decide here.
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
    alpha1: float = option(1.0, "weight of the verifier's reward", at_least=0)
    alpha2: float = option(0.1, "weight of the entropy term", at_least=0)
    entropy_baseline: Literal["column", "row", "matrix"] = option("column", "tokens whose mean entropy divides H")
    entropy_mean: Literal["arithmetic", "geometric"] = option("arithmetic", "the kind of this mean")
    compare_over: Literal["group", "batch"] = option("group", "compare within the group, or in the whole batch")
    normalize_over: Literal["all", "outcome"] = option("all", "Eq. 4 over all tokens, or over those of one outcome")
    entropy_min: float = option(1e-3, "floor of the entropy, nats", above=0)
    entropy_max: float = option(1e3, "ceiling of the entropy, nats", above=0)
    overlong_gamma: float | None = option(None, "gamma1 of the overlong punishment, e.g. 0.75", above=0.5, at_most=1)
    clip_low: float = option(0.2, "the ratio is clipped at 1 - clip_low", above=0)
    clip_high: float = option(0.28, "the ratio is clipped at 1 + clip_high", above=0)
    reduction: Literal["sequence", "token", "constant"] = option("token", "how the loss is averaged")


def overlong_punishment(rewards: Tensor, lengths: Tensor, group: Tensor, overlong_gamma: float) -> Tensor:
    """Group Relative Overlong Punishment (appendix C), to add to the reward. Three [B] -> [B], from 0 to -1/2.

    Punishes long completions: none if the fraction of right ones is 1 - overlong_gamma or less; otherwise the right
    ones if that fraction is above 1/2, else the wrong ones. Long means longer than L, the larger of mid-range and mean
    of the lengths: of the right completions if the fraction is overlong_gamma or more, else of the whole group.
    """
    right = rewards > 0.5
    lengths = lengths.float()
    result = torch.zeros_like(lengths)
    for g in group.unique():
        rows = group == g
        fraction_right = right[rows].float().mean()
        if fraction_right > 1 - overlong_gamma:
            punished = rows & right if fraction_right > 0.5 else rows & ~right
            measured = rows & right if fraction_right >= overlong_gamma else rows
            length = lengths[measured]
            L = torch.max((length.min() + length.max()) / 2, length.mean())
            result[punished] = -0.5 * ((lengths[punished] - L) / L.clamp(min=1)).clamp(0, 1)
    return result


def comparison_sets(rewards: Tensor, mask: Tensor, group: Tensor, compare_over: str) -> list[Tensor]:
    """The sets of rows that are compared, each bool [B]. compare_over "group": one set per group whose tokens have both
    outcomes; "batch": one set of all these groups; KeyError for another word. Rows without a token are in none.
    """
    has_tokens = (mask > 0).any(1)
    groups = [(group == g) & has_tokens for g in group.unique()]
    mixed = [rows for rows in groups if 0 < (rewards[rows] > 0.5).sum() < rows.sum()]
    together = [torch.stack(mixed).any(0)] if mixed else []
    return {"group": mixed, "batch": together}[compare_over]


def relative_to_mean(values: Tensor, mask: Tensor, entropy_baseline: str, entropy_mean: str) -> Tensor:
    """Each value divided by the mean of the tokens that it is compared with, 0 where mask is 0. Two [n, T], the rows of
    one outcome -> [n, T]. KeyError for another word than those of --entropy-baseline and --entropy-mean."""
    dims = {"column": (0,), "row": (1,), "matrix": (0, 1)}[entropy_baseline]
    n_tokens = mask.sum(dims, keepdim=True).clamp(min=1)
    arithmetic = values / ((values * mask).sum(dims, keepdim=True) / n_tokens)
    geometric = (values.log() - (values.log() * mask).sum(dims, keepdim=True) / n_tokens).exp()
    ratio = {"arithmetic": arithmetic, "geometric": geometric}[entropy_mean]  # [n, T]
    return torch.where(mask > 0, ratio, 0.0)  # in a column without a token it was 0 / 0


def shaped_rewards(
    rewards: Tensor, entropy: Tensor, mask: Tensor, group: Tensor, punishment: Tensor,
    alpha1: float = 1.0, alpha2: float = 0.1, entropy_baseline: str = "column", entropy_mean: str = "arithmetic",
    compare_over: str = "group", entropy_min: float = 1e-3, entropy_max: float = 1e3,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """r+ (Eq. 2) and r- (Eq. 3) of every token: two [B, T], 0 for the other outcome, padding and one-outcome groups.
    No gradient flows through the entropy.

    rewards, group, punishment: [B]; entropy (nats), mask: [B, T].
    """
    mask = mask.float()
    reward_of_right = (rewards + punishment).float()
    H = torch.where(mask > 0, entropy.detach().float(), 1.0).clamp(entropy_min, entropy_max)  # padding may hold NaN
    reward_plus = torch.zeros_like(H)
    reward_minus = torch.zeros_like(H)
    for rows in comparison_sets(rewards, mask, group, compare_over):
        right = rows & (rewards > 0.5)
        bonus = relative_to_mean(H[right], mask[right], entropy_baseline, entropy_mean)
        reward_plus[right] = alpha1 * reward_of_right[right, None] + alpha2 * bonus  # (2)

        wrong = rows & (rewards <= 0.5)
        penalty = relative_to_mean(1 / H[wrong], mask[wrong], entropy_baseline, entropy_mean)
        reward_minus[wrong] = alpha1 * (punishment - 1).float()[wrong, None] - alpha2 * penalty  # (3)
    return reward_plus * mask, reward_minus * mask


def standardized(shaped: Tensor, mask: Tensor, pool: Tensor, eps: float = 1e-6) -> Tensor:
    """Shaped rewards [B, T], minus the mean and divided by the std of the tokens in the pool of rows, bool [B]; 0 if
    the pool's are all equal."""
    R = shaped[pool][mask[pool] > 0]  # [tokens of the pool]
    return (shaped - R.mean()) / (R.std(correction=0) + eps) if R.max() > R.min() else torch.zeros_like(shaped)  # (4)


def advantages(
    reward_plus: Tensor, reward_minus: Tensor, rewards: Tensor, mask: Tensor, group: Tensor,
    compare_over: str = "group", normalize_over: str = "all",
) -> Tensor:  # fmt: skip
    """A+ for tokens of right completions and A- for those of wrong ones (Eq. 4), from shaped_rewards: [B, T].

    reward_plus, reward_minus, mask: [B, T]; rewards, group: [B]. normalize_over: "all" takes mean and std over all
    tokens of the set, "outcome" over those of the outcome alone; KeyError for another word. Groups with one outcome get
    exactly 0.
    """
    result = torch.zeros_like(reward_plus)
    for rows in comparison_sets(rewards, mask, group, compare_over):
        right = rows & (rewards > 0.5)
        wrong = rows & (rewards <= 0.5)
        pool_plus, pool_minus = {"all": (rows, rows), "outcome": (right, wrong)}[normalize_over]
        result[right] = standardized(reward_plus, mask, pool_plus)[right]  # A+
        result[wrong] = standardized(reward_minus, mask, pool_minus)[wrong]  # A-
    return result * mask


def token_advantages(
    rewards: Tensor, entropy: Tensor, mask: Tensor, group: Tensor,
    alpha1: float = 1.0, alpha2: float = 0.1, entropy_baseline: str = "column", entropy_mean: str = "arithmetic",
    compare_over: str = "group", normalize_over: str = "all", entropy_min: float = 1e-3, entropy_max: float = 1e3,
    overlong_gamma: float | None = None,
) -> Tensor:  # fmt: skip
    """The advantage of every token: [B, T], 0 where mask is 0. It multiplies grad log pi until the policy moves.

    rewards, group: [B]; entropy (nats), mask: [B, T]; the options are those of Config.
    """
    punishment = overlong_punishment(rewards, mask.sum(1), group, overlong_gamma) if overlong_gamma else 0 * rewards
    reward_plus, reward_minus = shaped_rewards(
        rewards, entropy, mask, group, punishment, alpha1, alpha2, entropy_baseline, entropy_mean, compare_over,
        entropy_min, entropy_max,
    )  # two [B, T]  # fmt: skip
    return advantages(reward_plus, reward_minus, rewards, mask, group, compare_over, normalize_over)


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
