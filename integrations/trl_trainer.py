"""EGSW, GTPO and GRPO-S in TRL's GRPOTrainer (TRL 1.16): TRL samples and updates, the functions of the scripts weigh.

    args = GRPOConfig("out", num_generations=8, **SETTINGS["gtpo"])  # with this repository on PYTHONPATH
    EntropyGRPOTrainer(model, reward, args, dataset, method="gtpo", method_options={"alpha2": 0.2}).train()

TRL's advantages are replaced right after generation, while groups are whole; the entropies take one more forward pass.
EGSW's weights enter as a factor of its advantages. That leaves out a KL, which TRL adds without them.
"""

from inspect import signature

import torch
from trl import GRPOTrainer

from integrations.token_advantages import advantages, config

COMMON = dict(epsilon=0.2, use_bias_correction_kl=False)  # TRL's default gives the KL another gradient
SETTINGS = {  # for GRPOConfig: with these TRL's loss is that of the script, by the script's own defaults
    "egsw": COMMON | dict(loss_type="dapo", importance_sampling_level="token", epsilon_high=0.2),
    "gtpo": COMMON | dict(loss_type="dapo", importance_sampling_level="token", epsilon_high=0.28),
    "grpo_s": COMMON | dict(loss_type="grpo", importance_sampling_level="sequence", epsilon_high=0.28),
}


class EntropyGRPOTrainer(GRPOTrainer):
    """GRPOTrainer with a method's advantages; method_options are its script's. ValueError for what it cannot honour."""

    def __init__(self, *args, method: str, method_options: dict | None = None, **keywords):
        super().__init__(*args, **keywords)
        need = {"scale_rewards": "group", "importance_sampling_level": SETTINGS[method]["importance_sampling_level"]}
        need |= {"multi_objective_aggregation": "sum_then_normalize"} | ({"beta": 0.0} if method == "egsw" else {})
        if wrong := [name for name, value in need.items() if getattr(self.args, name) != value]:
            raise ValueError(f"{method} in TRL needs {need}; wrong: {', '.join(wrong)}")
        self.method_config = config(method, method_options or {})

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
