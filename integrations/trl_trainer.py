"""EGSW, GTPO and GRPO-S in TRL's GRPOTrainer (TRL 1.16): TRL samples and updates, the functions of the scripts weigh.

    args = GRPOConfig("out", num_generations=8, **SETTINGS["gtpo"])  # with this repository on PYTHONPATH
    EntropyGRPOTrainer(model, reward, args, dataset, method="gtpo", method_options={"alpha2": 0.2}).train()

TRL's advantages are replaced right after generation, while groups are whole; the entropies take one more forward pass.
EGSW's weights W are never negative, so W * loss(A) is loss(W * A). That leaves out a KL, which TRL adds without W.
"""

from inspect import signature
from typing import get_args

import torch
from torch import Tensor
from trl import GRPOTrainer

import egsw
import grpo_s
import gtpo

SCRIPTS = {"egsw": egsw, "gtpo": gtpo, "grpo_s": grpo_s}
COMMON = dict(epsilon=0.2, use_bias_correction_kl=False)  # TRL's default gives the KL another gradient
SETTINGS = {  # for GRPOConfig: with these TRL's loss is that of the script, by the script's own defaults
    "egsw": COMMON | dict(loss_type="grpo", importance_sampling_level="token", epsilon_high=0.2),
    "gtpo": COMMON | dict(loss_type="dapo", importance_sampling_level="token", epsilon_high=0.28),
    "grpo_s": COMMON | dict(loss_type="grpo", importance_sampling_level="sequence", epsilon_high=0.28),
}


def advantages(cfg, rewards: Tensor, entropy: Tensor, mask: Tensor, group: Tensor) -> Tensor:
    """A method's, as TRL is to use them. cfg: its Config; rewards, group: [B]; entropy, mask: [B, T] -> [B, T or 1]."""
    if isinstance(cfg, egsw.Config):
        A, how = egsw.advantages(rewards, group, cfg.advantage)[:, None], (cfg.step_wise, cfg.mean_one)
        return A * egsw.weights(A, entropy, mask, group, cfg.alpha, cfg.weight_temperature, *how)
    if isinstance(cfg, grpo_s.Config):
        shaped = grpo_s.shaped_rewards(rewards, entropy, mask, group, cfg.beta1, cfg.beta2, cfg.mean, cfg.entropy_min)
        return grpo_s.advantages(shaped, rewards, group)[:, None]
    gamma, how = cfg.overlong_gamma, (cfg.compare, cfg.mean, cfg.scope, cfg.entropy_min, cfg.entropy_max)
    extra = None if gamma is None else gtpo.overlong_punishment(rewards, mask.sum(1), group, gamma)  # [B]
    shaped = gtpo.shaped_rewards(rewards, entropy, mask, group, cfg.alpha1, cfg.alpha2, *how, extra)
    return gtpo.advantages(*shaped, rewards, mask, group, cfg.scope, cfg.normalize)


class EntropyGRPOTrainer(GRPOTrainer):
    """GRPOTrainer with a method's advantages; method_options are its script's. ValueError for what it cannot honour."""

    def __init__(self, *args, method: str, method_options: dict | None = None, **keywords):
        super().__init__(*args, **keywords)
        Config, options = SCRIPTS[method].Config, method_options or {}
        trls = ("clip_low", "clip_high", "kl_coef", "reduction", "ratio")  # GRPOConfig has these, in other words
        own = {name: hint for name, hint in Config.__annotations__.items() if name not in trls}
        bad = [k for k, v in options.items() if k not in own or (isinstance(v, str) and v not in get_args(own[k]))]
        need = {"scale_rewards": "group", "importance_sampling_level": SETTINGS[method]["importance_sampling_level"]}
        need |= {"multi_objective_aggregation": "sum_then_normalize"} | ({"beta": 0.0} if method == "egsw" else {})
        bad += [name for name, value in need.items() if getattr(self.args, name) != value]
        if bad:
            raise ValueError(f"{method} in TRL needs {need}, and options of {own}; wrong: {', '.join(bad)}")
        self.method_config = Config(**options)

    def _calculate_rewards(self, *args):
        each = super()._calculate_rewards(*args)  # [B, functions], of all processes; NaN: no reward
        rewards = (each * self.reward_weights.to(each.device)).nansum(1)
        self._rewards = rewards.masked_fill(each.isnan().all(1), torch.nan)  # [B]
        return each

    @torch.no_grad()
    def _generate_and_score_completions(self, inputs):
        out, score = super()._generate_and_score_completions(inputs), self._get_per_token_logps_and_entropies
        (b, T), images = out["completion_ids"].shape, {k: out[k] for k in signature(score).parameters if k in out}
        ids, attend = (torch.cat([out["prompt_" + k], out["completion_" + k]], 1) for k in ("ids", "mask"))
        entropy = score(self.model, ids, attend, T, self.args.per_device_train_batch_size, True, **images)[1].float()
        mask = (out["completion_mask"] * out.get("tool_mask", 1)).float()  # [b, T], and [B, T] from all processes:
        entropy, mask = (self.accelerator.gather(self.accelerator.pad_across_processes(x, 1)) for x in (entropy, mask))
        G = self.num_generations if self.model.training else self.num_generations_eval
        group = torch.arange(len(mask), device=mask.device) // G  # [B] TRL keeps a prompt's rows together
        kept = mask.any(1) & ~self._rewards.isnan()  # a row masked out, or without a reward, belongs to no group
        A = torch.zeros_like(mask)  # [B, T]
        A[kept] = advantages(self.method_config, *(x[kept] for x in (self._rewards, entropy, mask, group)))
        out["advantages"] = A[self.accelerator.process_index * b :][:b, :T]
        return out
