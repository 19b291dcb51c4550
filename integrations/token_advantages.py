"""The advantages of EGSW, GTPO and GRPO-S, from the functions of their scripts and an instance of their Config.

What the trainers of other libraries, and experiments/credit.py, ask of a method in one call.
"""

from dataclasses import fields
from typing import get_args

from torch import Tensor

import egsw
import grpo_s
import gtpo
from options import RunConfig

SCRIPTS = {"egsw": egsw, "gtpo": gtpo, "grpo_s": grpo_s}
# Options that a script hands to its loss: here they are the trainer's own, in its own words.
LOSS_OPTIONS = {"clip_low", "clip_high", "kl_coef", "reduction", "ratio", *(f.name for f in fields(RunConfig))}


def config(method: str, options: dict):
    """The script's Config with these options. ValueError for one that it does not have, or a word that is no choice."""
    Config = SCRIPTS[method].Config
    own = {f.name: f.type for f in fields(Config) if f.name not in LOSS_OPTIONS}
    wrong = [k for k, v in options.items() if k not in own or (isinstance(v, str) and v not in get_args(own[k]))]
    if wrong:
        raise ValueError(f"{method} has the options {own}; wrong: {', '.join(wrong)}")
    return Config(**options)


def advantages(cfg, rewards: Tensor, entropy: Tensor, mask: Tensor, group: Tensor) -> Tensor:
    """Advantages [B, T], 0 where the mask is 0. cfg: a method's Config; rewards, group: [B]; entropy, mask: [B, T].

    EGSW's weights W are constants and never negative, so its W * loss(A) is loss(W * A).
    """
    if isinstance(cfg, egsw.Config):
        A, how = egsw.advantages(rewards, group, cfg.advantage), (cfg.step_wise, cfg.mean_one)
        return A[:, None] * egsw.weights(A, entropy, mask, group, cfg.alpha, cfg.weight_temperature, *how)
    if isinstance(cfg, grpo_s.Config):
        shaped = grpo_s.shaped_rewards(rewards, entropy, mask, group, cfg.beta1, cfg.beta2, cfg.mean, cfg.entropy_min)
        return grpo_s.advantages(shaped, rewards, group)[:, None] * mask
    gamma, how = cfg.overlong_gamma, (cfg.compare, cfg.mean, cfg.scope, cfg.entropy_min, cfg.entropy_max)
    extra = None if gamma is None else gtpo.overlong_punishment(rewards, mask.sum(1), group, gamma)  # [B]
    shaped = gtpo.shaped_rewards(rewards, entropy, mask, group, cfg.alpha1, cfg.alpha2, *how, extra)
    return gtpo.advantages(*shaped, rewards, mask, group, cfg.scope, cfg.normalize)
