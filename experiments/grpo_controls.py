"""GRPO with changes that need no entropy, or that use it in the plainest way: what EGSW is compared with.

    python experiments/grpo_controls.py --wrong-scale 0.3 [options of grpo.py]
    python experiments/grpo_controls.py --help

--right-scale and --wrong-scale multiply the advantages of right and of wrong completions: EGSW also gives right ones
more weight. --hard-power h multiplies the advantages of a group by ((1 - p) / p)^(h / 2), where p is the share of its
right completions: EGSW also gives hard prompts more weight. --entropy-bonus adds the entropy of the policy at every
token to the objective, with this factor.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import common
import grpo
from harness.options import keywords, option, parse
from harness.run import Run


@dataclass
class Config(grpo.Config):
    right_scale: float = option(1.0, "factor of the advantages of right completions", at_least=0)
    wrong_scale: float = option(1.0, "factor of the advantages of wrong completions", at_least=0)
    hard_power: float = option(0.0, "h; above 0, prompts with few right completions count more", at_least=0)
    entropy_bonus: float = option(0.0, "weight of the policy's entropy in the objective", at_least=0)


def token_advantages(
    rewards: Tensor, entropy: Tensor, mask: Tensor, group: Tensor,
    advantage: str = "grpo", right_scale: float = 1.0, wrong_scale: float = 1.0, hard_power: float = 0.0,
) -> Tensor:  # fmt: skip
    """GRPO's advantage of every token times the factors of its outcome and of its group: [B, T], 0 where mask is 0."""
    right = rewards > 0.5
    scale = torch.where(right, right_scale, wrong_scale)  # [B]
    for g in group.unique():
        rows = group == g
        p = right[rows].float().mean()
        if 0 < p < 1:
            scale[rows] *= ((1 - p) / p) ** (hard_power / 2)
    return (grpo.advantages(rewards, group, advantage) * scale)[:, None] * mask


def main() -> None:
    cfg = parse(Config, __doc__)
    clip = {"clip_low": cfg.clip_low, "clip_high": cfg.clip_high}
    with Run(cfg) as run:
        options = keywords(cfg, token_advantages)
        for _ in run.steps():
            rollout = run.verify(run.sample())
            A = token_advantages(rollout.rewards, rollout.entropy, rollout.mask, rollout.group, **options)  # [B, T]
            skip_zero = None if cfg.entropy_bonus > 0 else A  # the bonus acts on every completion
            for minibatch in run.minibatches(rollout, cfg.reduction, skip_zero):
                for batch in minibatch:
                    ratio = (batch.logprobs - batch.old_logprobs).exp()  # [b, T]
                    per_token = grpo.loss(ratio, A[batch.rows], batch.mask, **clip)  # [b, T]
                    if cfg.entropy_bonus > 0:
                        _, entropy = common.token_logprobs(
                            run.model, rollout.prompt_ids[batch.rows], rollout.prompt_lengths[batch.rows],
                            rollout.completion_ids[batch.rows], batch.mask, cfg.temperature, with_entropy=True,
                        )  # [b, T] with gradient  # fmt: skip
                        per_token = per_token - cfg.entropy_bonus * entropy
                    (per_token * batch.loss_weights).sum().backward()
                    run.record(batch, per_token)
                run.optimizer_step()
            run.log(rollout)


if __name__ == "__main__":
    main()
