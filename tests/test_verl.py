"""The plugin for verl against verl itself: its registries, configuration, compute_advantage, loss and trainer."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("verl")
pytest.importorskip("transfer_queue")

import numpy as np
import torch
from helpers import ROOT, SCRIPTS, batch, random_logprobs
from hydra import compose, initialize_config_module
from tensordict import TensorDict
from verl import DataProto
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.losses import ppo_loss

import grpo_s
from common import loss_weights
from integrations import verl_plugin

pytestmark = pytest.mark.slow
METHODS = ["egsw", "gtpo", "grpo_s"]
REDUCTIONS = {"seq-mean-token-mean": "sequence", "token-mean": "token", "seq-mean-token-sum-norm": "constant"}


def configure(*overrides):
    """verl's own configuration, as its command line composes it."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=list(overrides))


def shuffled(seed=0, padding=2):
    """A batch as verl holds it: string uids, rows of a prompt apart, columns that no row uses, an int64 mask."""
    rewards, group, mask, entropy = batch(seed)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    wide = [torch.nn.functional.pad(x[order], (0, padding)) for x in (mask, entropy)]
    uids = np.array([f"uid-{'cab'[g]}" for g in group[order]], dtype=object)
    return rewards[order], uids, wide[0].long(), wide[1], order


def in_verl(method, rewards, uids, mask, entropy, *overrides):
    """Advantages [B, T] by verl's compute_advantage, the reward at each completion's last token as verl has it."""
    token_rewards = torch.zeros(mask.shape)
    token_rewards[torch.arange(len(mask)), (mask.sum(1) - 1).clamp(min=0)] = rewards
    data = DataProto.from_single_dict({"token_level_rewards": token_rewards, "response_mask": mask, "uid": uids})
    config = configure(f"algorithm.adv_estimator={method}", *overrides).algorithm
    token = verl_plugin.ENTROPY.set(entropy)
    try:
        result = compute_advantage(data, config.adv_estimator, num_repeat=4, config=config).batch
    finally:
        verl_plugin.ENTROPY.reset(token)
    torch.testing.assert_close(result["returns"], result["advantages"])
    return result["advantages"]


def ours(method, rewards, group, mask, entropy, **options):
    """Advantages [B, T] by the script's own function."""
    return SCRIPTS[method].token_advantages(rewards, entropy, mask, group, **options)


def test_the_trainers_are_in_verls_registry():
    for mode in ("sync", "colocate_async", "separate_async"):
        trainer = get_trainer_cls(f"entropy_{mode}")
        assert issubclass(trainer, get_trainer_cls(mode)) and trainer is not get_trainer_cls(mode)


def test_import_verl_alone_loads_the_plugin_that_the_environment_names():
    """As in verl's workers, which import nothing of this repository themselves."""
    code = "import verl; from verl.trainer.ppo.core_algos import get_policy_loss_fn as f; print(f('grpo_s').__module__)"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "VERL_USE_EXTERNAL_MODULES": "integrations.verl_plugin"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "integrations.verl_plugin", done.stderr


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(3))
def test_interleaved_string_uids_give_the_scripts_advantages(method, seed):
    rewards, group, mask, entropy = batch(seed)
    rewards[group == seed] = 1.0  # a group with one outcome
    expected = ours(method, rewards, group, mask, entropy)
    _, uids, m, H, order = shuffled(seed)
    got = in_verl(method, rewards[order], uids, m, H)
    torch.testing.assert_close(got[:, : mask.shape[1]], expected[order], atol=1e-6, rtol=1e-6)
    assert (got[m == 0] == 0).all() and (got[group[order] == seed] == 0).all()
    assert got.isfinite().all() and got.abs().sum() > 0


@pytest.mark.parametrize("method", METHODS)
def test_rows_without_a_token_change_nothing(method):
    """verl fills a batch up with such rows under a uid of their own; rollout correction empties rows of real groups."""
    r, uids, m, H, _ = shuffled(1)
    expected = in_verl(method, r, uids, m, H)
    extra = np.array([uids[0], "pad", "pad"], dtype=object)
    zeros = [torch.cat([x, torch.zeros(3, *x.shape[1:], dtype=x.dtype)]) for x in (r, m, H)]
    got = in_verl(method, zeros[0], np.concatenate([uids, extra]), *zeros[1:])
    torch.testing.assert_close(got, torch.cat([expected, torch.zeros(3, m.shape[1])]))


@pytest.mark.parametrize("method, keys", [
    ("egsw", dict(advantage="rloo", alpha=2.0, weight_temperature=0.7, step_wise=False, mean_one=False)),
    ("gtpo", dict(alpha1=0.9, alpha2=0.2, entropy_baseline="row", entropy_mean="geometric", entropy_min=0.5,
                  entropy_max=1.0)),
    ("gtpo", dict(compare_over="batch", normalize_over="outcome", overlong_gamma=0.75)),
    ("grpo_s", dict(beta1=0.9, beta2=0.2, entropy_mean="geometric", entropy_min=0.5)),
])  # fmt: skip
def test_every_configuration_key_reaches_the_function(method, keys):
    """With all keys the result is the script's with these values; left out one at a time, it is another."""
    r, uids, m, H, _ = shuffled(3, padding=0)
    mask, group = m.float(), torch.from_numpy(np.unique(uids.astype(str), return_inverse=True)[1])
    expected = ours(method, r, group, mask, H, **keys)
    settings = {key: f"+algorithm.{method}.{key}={value}" for key, value in keys.items()}
    torch.testing.assert_close(in_verl(method, r, uids, m, H, *settings.values()), expected, atol=1e-6, rtol=1e-6)
    for key in keys:
        rest = [setting for other, setting in settings.items() if other != key]
        assert not torch.allclose(in_verl(method, r, uids, m, H, *rest), expected, atol=1e-6), key


@pytest.mark.parametrize("method", METHODS)
def test_unknown_keys_and_missing_entropies_are_errors(method):
    r, uids, m, H, _ = shuffled()
    with pytest.raises(ValueError, match="wrong: aplha"):
        in_verl(method, r, uids, m, H, f"+algorithm.{method}.aplha=1")
    with pytest.raises(ValueError, match=rf"{method}: no entropies.*trainer_mode=entropy_sync"):
        in_verl(method, r, uids, m, None)


def actor(loss_mode, loss_agg_mode, low=0.2, high=0.28):
    """verl's dataclass for the actor, made of its composed configuration as a worker makes it."""
    at = "actor_rollout_ref.actor"
    config = configure(
        f"{at}.policy_loss.loss_mode={loss_mode}", f"{at}.loss_agg_mode={loss_agg_mode}",
        f"{at}.clip_ratio_low={low}", f"{at}.clip_ratio_high={high}", f"{at}.ppo_micro_batch_size_per_gpu=4",
    )  # fmt: skip
    return omega_conf_to_dataclass(config.actor_rollout_ref.actor)


def nested(values, lengths):
    return torch.nested.as_nested_tensor([v[:n] for v, n in zip(values, lengths, strict=True)], layout=torch.jagged)


def worker_loss(config, new, old, A, mask, rows, **more):
    """The loss of these rows by verl's ppo_loss, from jagged rows with prompts of 2 tokens, as a worker gets them."""
    n = mask.sum(1).long()[rows]
    zeros = torch.zeros(len(rows), 2, dtype=new.dtype)
    # log-probs sit one place before their token
    output = nested(torch.cat([zeros[:, :1], new[rows], zeros[:, :1]], 1), n + 2)
    given = {"old_log_probs": old, "advantages": A, "response_mask": mask, "responses": mask.long(), **more}
    fields = {key: nested(x[rows], n) for key, x in given.items()} | {"prompts": nested(zeros.long(), [2] * len(rows))}
    data = TensorDict(fields, batch_size=len(rows))
    step = {"dp_size": 1, "batch_num_tokens": int(mask.sum()), "global_batch_size": len(mask)}
    for key, value in step.items():
        tu.assign_non_tensor_data(data, key, value)
    return ppo_loss(config, {"log_probs": output}, data)


def script_loss(name, new, old, rewards, group, mask, entropy, reduction):
    """The scalar loss from the script's own functions."""
    method = name.removesuffix("_arithmetic")
    A = ours(method, rewards, group, mask, entropy)
    ratio = (new - old).exp()
    if method == "grpo_s":
        ratio = grpo_s.sequence_ratio(new, old, mask, "geometric" if name == method else "arithmetic")
    per_token = SCRIPTS[method].loss(ratio, A, mask, 0.2, 0.28)
    return (per_token * loss_weights(mask, reduction)).sum()


@pytest.mark.parametrize("name", [*METHODS, "grpo_s_arithmetic"])
@pytest.mark.parametrize("agg", REDUCTIONS)
def test_verls_loss_and_gradient_over_micro_batches_are_the_scripts(name, agg):
    rewards, group, mask, entropy = batch(4)
    mask[0] = 1.0  # the longest row fills the width, which "constant" divides by
    entropy[0] = 0.5
    new, old = random_logprobs(mask)
    expected = script_loss(name, new, old, rewards, group, mask, entropy, REDUCTIONS[agg])
    (grad,) = torch.autograd.grad(expected, new)

    A = ours(name.removesuffix("_arithmetic"), rewards, group, mask, entropy)
    config, total = actor(name, agg), torch.zeros(())
    if agg == "seq-mean-token-sum-norm":  # of a micro-batch verl would take its own width
        object.__setattr__(config, "loss_scale_factor", mask.shape[1])
    for rows in torch.arange(len(mask)).split(5):
        loss, metrics = worker_loss(config, new, old, A, mask, rows)
        total = total + loss
        assert 0 <= metrics["actor/pg_clipfrac"].aggregate() <= 1
    (got,) = torch.autograd.grad(total, new)
    assert abs(float(total - expected)) < 1e-6
    torch.testing.assert_close(got, grad, atol=1e-6, rtol=1e-5)


def test_clip_bounds_and_fraction_are_those_of_the_configuration():
    new, old, mask = torch.tensor([[0.5, 0.5]]), torch.zeros(1, 2), torch.ones(1, 2)  # the ratio is 1.65
    for high, expected, fraction in ((0.1, 1.1, 1.0), (0.4, 1.4, 1.0), (0.9, np.exp(0.5), 0.0)):
        loss, metrics = worker_loss(actor("gtpo", "token-mean", high=high), new, old, mask, mask, torch.arange(1))
        assert float(loss) == pytest.approx(-expected)
        assert metrics["actor/pg_clipfrac"].aggregate() == fraction


def test_a_wrong_token_that_became_likely_has_no_second_clip():
    """verl's vanilla loss stops at clip_ratio_c = 3 times the advantage; the papers' do not."""
    new, old, mask = torch.full((1, 1), 2.0), torch.zeros(1, 1), torch.ones(1, 1)
    loss = {name: float(worker_loss(actor(name, "token-mean"), new, old, -mask, mask, torch.arange(1))[0])
            for name in ("vanilla", "gtpo", "egsw", "grpo_s")}  # fmt: skip
    assert loss == pytest.approx({"vanilla": 3.0, "gtpo": np.exp(2), "egsw": np.exp(2), "grpo_s": np.exp(2)}, rel=1e-6)


def test_bf16_log_probs_are_averaged_in_float32():
    """verl's engines may give bf16, in which the 300 small differences of a completion would be lost."""
    T = 300
    old, mask = torch.full((1, T), -3.0, dtype=torch.bfloat16), torch.ones(1, T)
    new = old.clone()
    new[0, 0] = -2.0  # the mean difference is 1/300
    loss, _ = worker_loss(actor("grpo_s", "token-mean"), new, old, mask, mask, torch.arange(1))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(-np.exp(1 / T), abs=1e-6)


def test_rollout_correction_weights_multiply_the_loss():
    rewards, group, mask, entropy = batch(5)
    new, old = random_logprobs(mask)
    A, rows = ours("gtpo", rewards, group, mask, entropy), torch.arange(len(mask))
    plain, _ = worker_loss(actor("gtpo", "token-mean"), new, old, A, mask, rows)
    half, _ = worker_loss(actor("gtpo", "token-mean"), new, old, A, mask, rows, rollout_is_weights=0.5 * mask)
    assert float(half) == pytest.approx(0.5 * float(plain), abs=1e-7)


@pytest.fixture(scope="module")
def queue():
    """verl's TransferQueue, the real one, on a local Ray."""
    ray, tq = pytest.importorskip("ray"), pytest.importorskip("transfer_queue")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # or Ray writes a token into the home directory
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    config = configure("transfer_queue.backend.SimpleStorage.num_data_storage_units=1").transfer_queue
    tq.init(config)
    yield tq
    tq.close()
    ray.shutdown()


class Actor:
    """Stands for verl's workers: scores with given numbers, and notes what it was asked."""

    def __init__(self, queue, entropy, lengths):
        self.queue, self.entropy, self.lengths = queue, entropy, lengths

    def compute_log_prob(self, batch):
        self.asked = dict(batch.extra_info)
        prompt = torch.zeros(len(self.entropy), 1)
        values = nested(torch.cat([prompt, self.entropy, prompt], 1), self.lengths + 2)
        fields = TensorDict({"entropy": values, "log_probs": -values}, batch_size=len(self.entropy))
        return self.queue.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)


def in_the_queue(queue, seed, method, mode="entropy_sync", *overrides):
    """A trainer of verl with stand-in workers, a rolled-out batch in the queue, and the batch itself."""
    r, uids, m, H, _ = shuffled(seed, padding=0)
    n = m.sum(1)
    scores = torch.zeros(m.shape)
    scores[torch.arange(len(m)), n - 1] = r
    given = {"response_mask": m, "responses": m, "rm_scores": scores, "rollout_log_probs": -H}
    fields = TensorDict({key: nested(x, n) for key, x in given.items()}, batch_size=len(m))
    tu.assign_non_tensor_stack(fields, "uid", list(uids))
    keys, partition = [f"{uid}_{i}_0" for i, uid in enumerate(uids)], f"{seed}-{method}-{mode}"
    meta = queue.kv_batch_put(keys=keys, partition_id=partition, fields=fields, tags=[{} for _ in keys])
    config = configure(f"algorithm.adv_estimator={method}", f"trainer.v1.trainer_mode={mode}", *overrides)
    trainer = get_trainer_cls(mode)(config)
    trainer.actor_rollout_wg = Actor(queue, H, n)
    return trainer, meta, (r, uids, m, H)


def advantages_in(queue, meta):
    """The advantages that a trainer has put into the queue: [B, T]."""
    fields = queue.kv_batch_get(meta.keys, meta.partition_id, select_fields=["advantages"])
    return fields["advantages"].to_padded_tensor(0.0)


@pytest.mark.parametrize("method", METHODS)
def test_the_trainer_hands_entropies_over(queue, method):
    """verl's own methods, old log-probs and then advantages, through its queue."""
    temperature = "actor_rollout_ref.rollout.temperature=0.8"
    trainer, meta, (r, uids, m, H) = in_the_queue(queue, 6, method, "entropy_sync", temperature)
    metrics = {}
    meta = trainer._compute_old_log_prob(meta, metrics)
    meta = trainer._compute_advantage(meta, metrics)
    group = torch.from_numpy(np.unique(uids.astype(str), return_inverse=True)[1])
    expected = ours(method, r, group, m.float(), H)
    longest = int(m.sum(1).max())
    torch.testing.assert_close(advantages_in(queue, meta), expected[:, :longest], atol=1e-6, rtol=1e-6)
    assert trainer.actor_rollout_wg.asked["calculate_entropy"] is True
    assert trainer.actor_rollout_wg.asked["temperature"] == 0.8
    assert verl_plugin.ENTROPY.get() is None  # nothing is left over for the next batch
    assert metrics["advantages/std"] == pytest.approx(float(expected[m > 0].std(correction=0)), abs=1e-6)


def test_advantages_of_another_estimator_are_refused(queue, monkeypatch):
    """As if a patch of verl computed them without asking its registry."""
    trainer, meta, _ = in_the_queue(queue, 10, "gtpo")
    meta = trainer._compute_old_log_prob(meta, {})
    monkeypatch.setattr(get_trainer_cls("sync"), "_compute_advantage", lambda self, batch, metrics: batch)
    with pytest.raises(RuntimeError, match="without the estimator gtpo"):
        trainer._compute_advantage(meta, {})


@pytest.mark.parametrize("mode, overrides, told", [
    ("sync", [], "trainer_mode=entropy_sync"),  # verl's own trainer
    # it takes the sampler's log-probs, so that nothing computes an entropy
    ("entropy_sync", ["algorithm.rollout_correction.bypass_mode=true"], "bypass_mode"),
])  # fmt: skip
def test_a_pass_without_entropies_is_refused(mode, overrides, told, queue):
    trainer, meta, _ = in_the_queue(queue, 7, "gtpo", mode, *overrides)
    meta = trainer._compute_old_log_prob(meta, {})
    with pytest.raises(ValueError, match=told):
        trainer._compute_advantage(meta, {})


def test_the_trainer_does_not_disturb_other_estimators(queue):
    """grpo, which needs no entropies, gives the same with either trainer."""
    results = []
    for mode in ("sync", "entropy_sync"):
        trainer, meta, _ = in_the_queue(queue, 9, "grpo", mode)
        meta = trainer._compute_advantage(trainer._compute_old_log_prob(meta, {}), {})
        results.append(advantages_in(queue, meta))
    assert torch.equal(*results)


@pytest.mark.parametrize(("mode", "buffer"), [("sync", ReplayBuffer), ("colocate_async", ReplayBufferAsync)])
def test_the_trainer_keeps_its_modes_replay_buffer(mode, buffer):
    """verl chooses it by the name of the mode, and takes any name that it does not know for an asynchronous one."""
    trainer = get_trainer_cls(f"entropy_{mode}")(configure(f"trainer.v1.trainer_mode=entropy_{mode}"))
    assert trainer.trainer_mode == mode
    assert type(trainer.replay_buffer) is buffer
