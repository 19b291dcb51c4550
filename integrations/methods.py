"""The advantages of EGSW, GTPO and GRPO-S, from the functions of their scripts and an instance of their Config.

What the trainers of other libraries, and experiments/credit.py, ask of a method in one call.
"""

from argparse import ArgumentTypeError
from dataclasses import Field, fields
from typing import get_args

from torch import Tensor

import egsw
import grpo_s
import gtpo
from options import RunConfig, bounded

SCRIPTS = {"egsw": egsw, "gtpo": gtpo, "grpo_s": grpo_s}
# Options that a script hands to its loss: here they are the trainer's own, in its own words.
LOSS_OPTIONS = {"clip_low", "clip_high", "kl_coef", "reduction", "ratio", *(f.name for f in fields(RunConfig))}


def config(method: str, options: dict):
    """The script's Config with these options. ValueError for one that it does not have or that has no such value."""
    Config = SCRIPTS[method].Config
    own = {f.name: f for f in fields(Config) if f.name not in LOSS_OPTIONS}
    if wrong := [name for name, value in options.items() if name not in own or not allowed(own[name], value)]:
        raise ValueError(f"{method} has the options {', '.join(own)}, as in its --help; wrong: {', '.join(wrong)}")
    return Config(**options)


def allowed(field: Field, value) -> bool:
    """Whether the script's command line would take this value."""
    if isinstance(value, str) or value is None:
        return value in get_args(field.type) or value is field.default
    try:
        bounded(float, **field.metadata["bounds"])(value)
    except (ArgumentTypeError, TypeError, ValueError):
        return False
    return True


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
