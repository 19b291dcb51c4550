"""EGSW, GTPO and GRPO-S in TRL's GRPOTrainer. TRL samples and updates; the advantages are the scripts'.

    args = GRPOConfig("out", num_generations=8, **SETTINGS["gtpo"])  # with this repository on PYTHONPATH
    EntropyGRPOTrainer(model, reward, args, dataset, method="gtpo", method_options={"alpha2": 0.2}).train()

TRL's advantages are replaced right after generation, while groups are whole. The entropies cost one more forward pass.
EGSW's weights are a factor of its advantages. So they do not multiply a KL, which TRL adds to the loss later.

The first loss is checked: it must use these advantages. Another version of TRL, a patch or a subclass might not.
"""

import warnings
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
import trl
from trl import GRPOTrainer

from integrations.methods import token_advantages

TESTED = "1.16"  # version of TRL
COMMON = dict(epsilon=0.2, use_bias_correction_kl=False)  # TRL's default gives the KL another gradient
SETTINGS = {  # for GRPOConfig: with these TRL's loss is that of the script, at the script's own defaults
    "egsw": COMMON | dict(loss_type="dapo", importance_sampling_level="token", epsilon_high=0.2),
    "gtpo": COMMON | dict(loss_type="dapo", importance_sampling_level="token", epsilon_high=0.28),
    "grpo_s": COMMON | dict(loss_type="grpo", importance_sampling_level="sequence", epsilon_high=0.28),
}


def trl_reward(function: Callable[[str, dict], float]) -> Callable[..., list[float]]:
    """TRL's form of a --reward function (completion, row) -> float. The row has the columns of the data set."""

    def reward(prompts: list, completions: list, completion_ids: list, **columns: Any) -> list[float]:
        rewards = []
        for i, completion in enumerate(completions):
            text = completion if isinstance(completion, str) else completion[-1]["content"]  # of a chat: its last turn
            row = {name: values[i] for name, values in columns.items() if isinstance(values, list)}
            rewards.append(float(function(text, row)))
        return rewards

    reward.__name__ = getattr(function, "__name__", "reward")  # TRL logs under this name
    return reward


class EntropyGRPOTrainer(GRPOTrainer):
    """GRPOTrainer with a method's advantages. method_options: those of its script. ValueError for what it cannot do."""

    def __init__(self, *args, method: str, method_options: dict | None = None, **keywords):
        super().__init__(*args, **keywords)
        needed = {
            "scale_rewards": "group",
            "importance_sampling_level": SETTINGS[method]["importance_sampling_level"],
            "multi_objective_aggregation": "sum_then_normalize",
        }
        if method == "egsw":
            needed["beta"] = 0.0
        wrong = [name for name, value in needed.items() if getattr(self.args, name) != value]
        if wrong:
            raise ValueError(f"{method} in TRL needs {needed}; wrong: {', '.join(wrong)}")
        self.token_advantages = token_advantages(method, method_options or {})
        self._loss_is_checked = False
        if not trl.__version__.startswith(TESTED):
            warnings.warn(f"tested with TRL {TESTED}, and this is {trl.__version__}: compare its losses", stacklevel=2)

    def _calculate_rewards(self, *args):
        rewards_per_function = super()._calculate_rewards(*args)  # [B, functions], of all processes; NaN: no reward
        rewards = (rewards_per_function * self.reward_weights.to(rewards_per_function.device)).nansum(1)
        self._rewards = rewards.masked_fill(rewards_per_function.isnan().all(1), torch.nan)  # [B]
        return rewards_per_function

    @torch.no_grad()
    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        b, T = out["completion_ids"].shape
        mask = (out["completion_mask"] * out.get("tool_mask", 1)).float()  # [b, T] of this process
        entropy = self._entropy(out)  # [b, T]

        mask = self._gathered(mask)  # [B, T] of all processes
        entropy = self._gathered(entropy)
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        group = torch.arange(len(mask), device=mask.device) // group_size  # [B] TRL keeps a prompt's rows together
        kept = mask.any(1) & ~self._rewards.isnan()  # a row that is masked out, or has no reward, belongs to no group
        A = torch.zeros_like(mask)  # [B, T]
        A[kept] = self.token_advantages(self._rewards[kept], entropy[kept], mask[kept], group[kept])
        first_row = self.accelerator.process_index * b
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["advantages/std"].append(A[mask > 0].std(correction=0).item())
        self._advantages = A[first_row : first_row + b, :T]
        out["advantages"] = self._advantages
        return out

    def compute_loss(self, model, inputs, *args, **keywords):
        if self._loss_is_checked or not model.training:
            return super().compute_loss(model, inputs, *args, **keywords)
        A = inputs["advantages"].detach().requires_grad_()  # to see whether the loss depends on them
        loss = super().compute_loss(model, {**inputs, "advantages": A}, *args, **keywords)
        self._check_loss(loss, A, inputs["completion_mask"] * inputs.get("tool_mask", 1) > 0)
        return loss

    def _check_loss(self, loss: torch.Tensor, A: torch.Tensor, mask: torch.Tensor) -> None:
        """RuntimeError unless A are rows of the advantages that were computed here, and the loss depends on them."""
        is_ours = A.dim() == 2 and all(bool((row == self._advantages).all(1).any()) for row in A)
        (gradient,) = torch.autograd.grad(loss, A, retain_graph=True, allow_unused=True)
        is_used = is_ours and gradient is not None and bool(gradient[mask].any())
        if mask.any() and not is_used:
            raise RuntimeError(f"the loss does not use the advantages of {type(self).__name__}: a patch of TRL, "
                               f"or another version than {TESTED}, has gone around them")  # fmt: skip
        self._loss_is_checked = bool(mask.any())  # without a token there is nothing to see

    def _entropy(self, out: dict) -> torch.Tensor:
        """The entropy of every completion token, nats. [b, T]"""
        score = self._get_per_token_logps_and_entropies
        ids = torch.cat([out["prompt_ids"], out["completion_ids"]], 1)
        attention = torch.cat([out["prompt_mask"], out["completion_mask"]], 1)
        T = out["completion_ids"].shape[1]
        images = {name: out[name] for name in signature(score).parameters if name in out}
        batch_size = self.args.per_device_train_batch_size
        return score(self.model, ids, attention, T, batch_size, compute_entropy=True, **images)[1].float()

    def _gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.gather(self.accelerator.pad_across_processes(tensor, 1))
