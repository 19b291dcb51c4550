"""EGSW, GTPO and GRPO-S in verl: advantage estimators, policy losses, trainers.

    PYTHONPATH=<this repository> VERL_USE_EXTERNAL_MODULES=integrations.verl_plugin python -m verl.trainer.main_ppo ...

The functions are those of egsw.py, gtpo.py and grpo_s.py. Their options go below the method's name, for example
+algorithm.egsw.alpha=0.7. integrations/README.md has a whole command line, all keys and the limits.

verl scores each rollout at the sampling temperature and stores the entropies (nats), but it gives them to no estimator.
The trainers entropy_sync, entropy_colocate_async and entropy_separate_async are verl's own, and also do that.
"""

import warnings
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from importlib.metadata import version

import numpy as np
import torch
import transfer_queue
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_adv_est, register_policy_loss
from verl.trainer.ppo.v1 import get_trainer_cls, register_trainer

import egsw
import grpo_s
import gtpo
from integrations.methods import SCRIPTS, token_advantages

TESTED = "0.9.1"  # version of verl
ENTROPY: ContextVar[Tensor | None] = ContextVar("entropy", default=None)  # [B, T] of the batch that is being computed
STD: ContextVar[float | None] = ContextVar("std", default=None)  # of the advantages that an estimator has computed
NO_ENTROPY = """{}: no entropies. Set trainer.v1.trainer_mode=entropy_sync (or entropy_colocate_async, or
entropy_separate_async), and not algorithm.rollout_correction.bypass_mode, which skips the pass that computes them."""


def estimator(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """verl's form of an estimator: advantages and returns, here the same, two [B, T], 0 where response_mask is 0.

    token_level_rewards, response_mask: [B, T]; index: [B], any strings, one a prompt, in any order. A completion is
    right if its rewards sum to more than 0.5. ValueError if the entropies are missing, or for an unknown key.
    """

    def estimate(token_level_rewards, response_mask, index, config, **_):
        entropy = ENTROPY.get()
        if entropy is None:
            raise ValueError(NO_ENTROPY.format(name))
        compute = token_advantages(name, config.get(name) or {})
        rewards = token_level_rewards.sum(1)
        mask = response_mask.float()
        group = torch.from_numpy(np.unique(index.astype(str), return_inverse=True)[1]).to(mask.device)
        rows = response_mask.any(1)  # verl fills batches up with rows that have no token
        result = torch.zeros_like(entropy)
        result[rows] = compute(rewards[rows], entropy[rows], mask[rows], group[rows])
        STD.set(float(result[mask > 0].std(correction=0)))
        return result, result

    return estimate


def token_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """The probability ratio of every token. [b, T]"""
    return (logprobs - old_logprobs).exp()


def policy_loss(
    ratio_of: Callable[..., Tensor], loss: Callable[..., Tensor]
) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """verl's form of a policy loss: [b, T] tensors -> the scalar to differentiate, and metrics. It has no dual clip,
    because the papers have none; verl's "vanilla" has one."""

    def compute(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights=None):
        mask = response_mask.float()
        A = advantages.float()
        ratio = ratio_of(log_prob.float(), old_log_prob.float(), mask)  # in float32, because verl may give bf16
        per_token = loss(ratio, A, mask, config.clip_ratio_low, config.clip_ratio_high)
        clipped = (per_token != -ratio * A * mask).float()
        metrics = {"actor/pg_clipfrac": float((clipped * mask).sum() / mask.sum().clamp(min=1))}
        if rollout_is_weights is not None:
            per_token = per_token * rollout_is_weights
        return agg_loss(per_token, mask, loss_agg_mode, **config.global_batch_info), metrics

    return compute


def entropy_trainer(mode: str) -> type:
    """verl's trainer of this mode. While it computes advantages, ENTROPY holds the entropies that verl has stored. It
    checks that verl has called the estimator, and logs the standard deviation of the advantages."""

    class EntropyTrainer(get_trainer_cls(mode)):
        def __init__(self, config):
            config.trainer.v1.trainer_mode = mode  # by this name verl chooses its replay buffer
            self.estimator_name = config.algorithm.adv_estimator
            super().__init__(config)

        def _compute_advantage(self, batch, metrics):
            data = transfer_queue.kv_batch_get(batch.keys, batch.partition_id, select_fields=["entropy"])
            token = ENTROPY.set(data["entropy"].to_padded_tensor(0.0).float() if len(data.keys()) else None)
            STD.set(None)
            try:
                result = super()._compute_advantage(batch, metrics)
            finally:
                ENTROPY.reset(token)
            if self.estimator_name in SCRIPTS:
                if STD.get() is None:
                    raise RuntimeError(f"verl has computed advantages without the estimator {self.estimator_name}")
                metrics["advantages/std"] = STD.get()
            return result

    return EntropyTrainer


if version("verl") != TESTED:
    warnings.warn(f"tested with verl {TESTED}, and this is {version('verl')}: compare its losses", stacklevel=1)
for name in SCRIPTS:
    register_adv_est(name)(estimator(name))
register_policy_loss("egsw")(policy_loss(token_ratio, egsw.loss))
register_policy_loss("gtpo")(policy_loss(token_ratio, gtpo.loss))
register_policy_loss("grpo_s")(policy_loss(grpo_s.sequence_ratio, grpo_s.loss))
register_policy_loss("grpo_s_arithmetic")(
    policy_loss(partial(grpo_s.sequence_ratio, ratio_mean="arithmetic"), grpo_s.loss)
)
for mode in ("sync", "colocate_async", "separate_async"):
    register_trainer(f"entropy_{mode}")(entropy_trainer(mode))
