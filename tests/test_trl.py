"""EGSW, GTPO and GRPO-S in the real TRL, with the toy model: its losses and gradients are those of the scripts. And the
methods that TRL has too: its GRPO, DAPO, CISPO and 80/20 rule."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("trl", minversion="1.16")

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from helpers import ROOT
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import common
import dapo
import grpo
import grpo_s
from integrations.methods import SCRIPTS, token_advantages
from integrations.trl_trainer import SETTINGS, EntropyGRPOTrainer, trl_reward
from more import cispo, forking
from tasks import arithmetic
from verifier import math_reward

pytestmark = pytest.mark.slow
REDUCTIONS = {"grpo": "sequence", "dapo": "token", "dr_grpo": "constant", "cispo": "token"}  # TRL's loss_type: ours

# Every option of each method, none at its default: a mix-up of two would show.
OPTIONS = {
    "egsw": dict(advantage="rloo", alpha=1.0, weight_temperature=0.7, step_wise=False, mean_one=False),
    "gtpo": dict(
        alpha1=0.9, alpha2=0.3, entropy_baseline="matrix", entropy_mean="geometric", compare_over="batch",
        normalize_over="outcome", entropy_min=0.01, entropy_max=0.5, overlong_gamma=0.75,
    ),
    "grpo_s": dict(beta1=0.9, beta2=0.3, entropy_mean="geometric", entropy_min=0.01),
}  # fmt: skip


def reward(completions, answer, **_):
    return [math_reward(c, a) for c, a in zip(completions, answer, strict=True)]


def token_loss(method, options, batch, new, old, rows, limits):
    """The loss of the tokens of these rows [b, T], from the script's own functions. limits: those of the clip."""
    script = SCRIPTS[method]
    A = script.token_advantages(batch.rewards, batch.entropy, batch.mask, batch.group, **options)[rows]
    if method == "grpo_s":
        ratio = grpo_s.sequence_ratio(new, old, batch.mask[rows])
    else:
        ratio = (new - old).exp()
    return script.loss(ratio, A, batch.mask[rows], **limits)


def recorder(base, ours):
    """A subclass of a trainer that computes everything a second time, and notes what it finds.

    `ours(batch, new, old, rows, limits)` returns the loss of these rows' tokens, [b, T]; `batch` is the generation
    batch of all processes. Noted are `losses`, of each micro-batch, and `gradients`, of each optimizer step, both as
    pairs (TRL's, ours). Log-probs are common.token_logprobs'; TRL's are the ids, masks, rewards and entropies alone.
    """

    class Recorder(base):
        def __init__(self, *args, **keywords):
            super().__init__(*args, **keywords)
            self.losses, self.gradients, self.rows, self.entropy = [], [], [], None
            self.add_callback(BeforeStep(self))

        def _calculate_rewards(self, *args):
            self.all_rewards = super()._calculate_rewards(*args)
            return self.all_rewards

        def _get_per_token_logps_and_entropies(self, *args, **keywords):
            result = super()._get_per_token_logps_and_entropies(*args, **keywords)
            if not torch.is_grad_enabled() and result[1] is not None:
                self.entropy = result[1]
            return result

        def _generate_and_score_completions(self, inputs):
            out = super()._generate_and_score_completions(inputs)
            n = len(out["prompt_ids"])
            out["row"] = torch.arange(n) + n * self.accelerator.process_index  # TRL shuffles it along with the rest
            extra = {} if self.entropy is None else {"entropy": self.entropy}
            parts = gather_object([{k: v for k, v in (out | extra).items() if v.dim() > 0}])
            width = max(self.max_completion_length, *(part["completion_ids"].shape[1] for part in parts))

            def rows_of(key, mask):  # of all processes, without padding
                return [x[m > 0] for part in parts for x, m in zip(part[key], part[mask], strict=True)]

            def padded(rows):  # [B, T], T the longest completion allowed, as in a Rollout
                return torch.stack([torch.nn.functional.pad(x, (0, width - len(x))) for x in rows])

            prompts, completions = rows_of("prompt_ids", "prompt_mask"), rows_of("completion_ids", "completion_mask")
            self.batch = SimpleNamespace(
                prompt_ids=pad_sequence(prompts, batch_first=True),
                prompt_lengths=torch.tensor([len(x) for x in prompts]),
                completion_ids=padded(completions),
                mask=padded([torch.ones(len(x)) for x in completions]),
                rewards=self.all_rewards[:, 0],
                group=torch.arange(len(prompts)) // self.num_generations,
                local=[part["advantages"] for part in parts],  # of each process
            )
            with torch.no_grad():
                self.batch.logprobs, self.batch.entropy = self.score(torch.arange(len(prompts)), with_entropy=True)
            if extra:
                # Compared here, and then TRL's are taken: GTPO divides by entropies and so magnifies their rounding.
                theirs = padded(rows_of("entropy", "completion_mask"))
                torch.testing.assert_close(theirs, self.batch.entropy, atol=2e-5, rtol=0)
                self.batch.entropy = theirs
            return out

        def score(self, rows, with_entropy=False):
            inputs = (getattr(self.batch, k)[rows] for k in ("prompt_ids", "prompt_lengths", "completion_ids", "mask"))
            return common.token_logprobs(self.model, *inputs, self.temperature, with_entropy)

        def our_loss(self, rows):
            """The share of these rows in the loss of an optimizer step, with a gradient."""
            new, _ = self.score(rows)
            steps = self.args.steps_per_generation // self.args.gradient_accumulation_steps
            old = new.detach() if steps == 1 else self.batch.logprobs[rows]
            limits = dict(clip_low=self.epsilon_low, clip_high=self.epsilon_high)
            per_token = ours(self.batch, new, old, rows, limits)
            if self.beta:  # while there is one rollout, the policy that wrote it is the reference
                per_token = per_token + self.beta * grpo.k3(new, self.batch.logprobs[rows]) * self.batch.mask[rows]
            weights = common.loss_weights(self.batch.mask, REDUCTIONS[self.loss_type])[rows]
            return steps * (per_token * weights).sum()  # weights are those of the generation batch: TRL's average step

        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            self.rows.append(inputs["row"])
            with torch.no_grad():  # DDP will average over processes
                self.losses.append((float(loss), self.accelerator.num_processes * float(self.our_loss(inputs["row"]))))
            return loss

    class BeforeStep(TrainerCallback):
        def __init__(self, trainer):
            self.trainer = trainer

        def on_pre_optimizer_step(self, *_, **__):
            t = self.trainer
            rows, t.rows = torch.cat(gather_object(t.rows)), []
            parameters = list(t.model.parameters())
            ours = torch.autograd.grad(t.our_loss(rows), parameters)
            t.gradients.append([torch.cat([g.flatten() for g in x]) for x in ([p.grad for p in parameters], ours)])

    return Recorder


def trained(cls, toy, out, steps_per_rollout=1, reward=reward, **keywords):
    """A trainer of `cls` after two optimizer steps of two micro-batches each, on two-term problems."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(toy), AutoTokenizer.from_pretrained(toy)
    rows = [{"prompt": p["question"], "answer": p["answer"]} for p in arithmetic.problems(40, 0, False, 2, 2)]
    ours = {k: keywords.pop(k) for k in ("method", "method_options") if k in keywords}
    settings = dict(
        output_dir=str(out), per_device_train_batch_size=16, gradient_accumulation_steps=2,
        steps_per_generation=2 * steps_per_rollout, num_generations=4, max_completion_length=12, max_steps=2,
        learning_rate=0.005, max_grad_norm=0, lr_scheduler_type="constant", bf16=False, use_cpu=True,
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    args = GRPOConfig(**settings | keywords)
    trainer = cls(model, reward, args, Dataset.from_list(rows), processing_class=tokenizer, **ours)
    trainer.train()
    return trainer


def check(trainer, n_losses=4):
    assert len(trainer.losses) == n_losses and len(trainer.gradients) == 2
    for theirs, ours in trainer.losses:
        assert theirs == pytest.approx(ours, rel=3e-6, abs=1e-6)
    for theirs, ours in trainer.gradients:
        assert theirs.norm() > 1e-3
        assert (theirs - ours).norm() < 1e-5 * ours.norm()


@pytest.mark.parametrize("options", ["defaults", "every option"])
@pytest.mark.parametrize("method", SCRIPTS)
def test_losses_and_gradients_are_ours(method, options, toy, tmp_path):
    """In micro-batches of two optimizer steps on one rollout, so that the second is off-policy and clipped."""
    more = dict(method=method, **SETTINGS[method])
    if options == "every option":
        more |= dict(method_options=OPTIONS[method], temperature=0.7, beta=0.0 if method == "egsw" else 0.1)
    cls = recorder(EntropyGRPOTrainer, partial(token_loss, method, more.get("method_options", {})))
    trainer = trained(cls, toy, tmp_path, steps_per_rollout=2, **more)
    check(trainer)
    assert trainer.state.log_history[1]["clip_ratio/region_mean"] > 0.01
    A = trainer.batch.local[0]
    std = A[trainer.batch.mask[:, : A.shape[1]] > 0].std(correction=0)
    assert trainer.state.log_history[0]["advantages/std"] == pytest.approx(float(std), rel=1e-5)


def test_a_reward_function_of_ones_own_sees_completion_and_row(toy, tmp_path, monkeypatch):
    """With a version of TRL that was not tested, which is a warning."""
    monkeypatch.setattr("trl.__version__", "9.0.0")
    seen = []

    def short(completion, row):
        seen.append((completion, row))
        return 1 / (1 + len(completion))

    with pytest.warns(UserWarning, match=r"tested with TRL 1\.16, and this is 9\.0\.0"):
        trainer = trained(
            EntropyGRPOTrainer, toy, tmp_path, reward=trl_reward(short), method="gtpo", **SETTINGS["gtpo"]
        )
    assert "rewards/short/mean" in trainer.state.log_history[0]
    for completion, row in seen:
        assert isinstance(completion, str) and set(row) == {"answer"}


@pytest.mark.parametrize("loss_type", REDUCTIONS)
def test_trls_own_losses_are_ours(loss_type, toy, tmp_path):
    """Plain GRPOTrainer and grpo.py, dapo.py or more/cispo.py, given the same advantages. These differ in the std and
    its epsilon. TRL's epsilon_high for CISPO is the limit itself."""
    script, scale = dapo if loss_type == "dapo" else grpo, "none" if loss_type == "dr_grpo" else "group"

    def ours(batch, new, old, rows, limits):
        A = torch.cat(batch.local)[rows]
        if loss_type == "cispo":
            return cispo.loss((new - old).exp(), A, batch.mask[rows], new, clip_high=limits["clip_high"] - 1)
        return script.loss((new - old).exp(), A, batch.mask[rows], **limits)

    epsilon_high = {"dapo": 0.28, "cispo": 1.05}.get(loss_type, 0.2)
    more = dict(loss_type=loss_type, scale_rewards=scale, epsilon_high=epsilon_high)
    more |= dict(beta=0.1, use_bias_correction_kl=False) if loss_type == "grpo" else {}
    trainer = trained(recorder(GRPOTrainer, ours), toy, tmp_path, steps_per_rollout=2, **more)
    check(trainer)
    r, group = trainer.batch.rewards, trainer.batch.group
    expected = grpo.advantages(r, group, "dr_grpo")
    if scale == "group":
        expected = expected / (r.view(-1, 4).std(1).repeat_interleave(4) + 1e-4)
    torch.testing.assert_close(torch.cat(trainer.batch.local), expected)


def test_trls_top_entropy_quantile_is_our_forking(toy, tmp_path):
    """With one micro-batch per step, so that TRL too takes the threshold over the whole step."""
    found = {}

    class Noting(GRPOTrainer):
        def get_high_entropy_mask(self, entropies, mask, threshold):
            found["entropy"] = entropies  # in TRL's order of the rows; rounding decides among equal entropies
            return super().get_high_entropy_mask(entropies, mask, threshold)

    def ours(batch, new, old, rows, limits):
        entropy = torch.zeros_like(batch.mask)
        entropy[rows, : found["entropy"].shape[1]] = found["entropy"]
        kept = forking.token_advantages(batch.rewards, entropy, batch.mask, batch.group, rho=0.2) != 0
        assert 0.2 * batch.mask.sum() <= kept.sum() + 1 < 0.4 * batch.mask.sum()
        A = torch.cat(batch.local)[:, None] * kept
        return forking.loss((new - old).exp(), A[rows], batch.mask[rows], **limits)

    def alternating(completions, **_):  # all groups are mixed: TRL counts the tokens of the others too
        return [float(i % 2) for i in range(len(completions))]

    one = dict(per_device_train_batch_size=32, gradient_accumulation_steps=1, steps_per_generation=1)
    more = dict(loss_type="dapo", epsilon_high=0.28, top_entropy_quantile=0.2, reward=alternating)
    check(trained(recorder(Noting, ours), toy, tmp_path, **one, **more), n_losses=2)


def test_settings_are_the_scripts_defaults():
    for method, script in SCRIPTS.items():
        default, given = script.Config(), SETTINGS[method]
        assert REDUCTIONS[given["loss_type"]] == default.reduction
        assert (given["epsilon"], given["epsilon_high"]) == (default.clip_low, default.clip_high)


def with_own_advantages(change):
    """As if a subclass or a patch computed TRL's advantages after all."""

    class OwnAdvantages(EntropyGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            out = super()._generate_and_score_completions(inputs)
            return out | {"advantages": change(out["advantages"])}

    return OwnAdvantages


class LossWithout(EntropyGRPOTrainer):
    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, inputs | {"advantages": self._rewards[: len(inputs["advantages"])]})


@pytest.mark.parametrize("bypass", [
    with_own_advantages(lambda A: A[:, 0]), with_own_advantages(lambda A: A + 1), LossWithout,
])  # fmt: skip
def test_a_loss_that_goes_around_the_advantages_is_refused(bypass, toy, tmp_path):
    with pytest.raises(RuntimeError, match="the loss does not use the advantages"):
        trained(bypass, toy, tmp_path, method="gtpo", **SETTINGS["gtpo"])


@pytest.mark.parametrize("method", SCRIPTS)
def test_masked_and_unscored_rows_leave_no_trace(method, toy, tmp_path):
    """Truncated rows that TRL masks out, and rows for which the reward is None, belong to no group and get 0."""

    def some(completions, answer, **_):
        return [None if i % 5 == 2 else r for i, r in enumerate(reward(completions, answer))]

    cls = recorder(EntropyGRPOTrainer, partial(token_loss, method, {}))
    more = dict(method=method, mask_truncated_completions=True, max_completion_length=8, **SETTINGS[method])
    trainer = trained(cls, toy, tmp_path, reward=some, steps_per_rollout=2, **more)
    batch, A = trainer.batch, trainer.batch.local[0]
    masked, unscored = ~batch.mask.any(1), batch.rewards.isnan()
    kept = ~masked & ~unscored
    assert masked.any() and unscored.any() and (unscored & ~masked).any()
    assert A.isfinite().all() and (A[~kept] == 0).all() and (A[kept] != 0).any()
    fields = (getattr(batch, k)[kept] for k in ("rewards", "entropy", "mask", "group"))
    torch.testing.assert_close(A[kept], SCRIPTS[method].token_advantages(*fields)[:, : A.shape[1]])


@pytest.mark.parametrize("method, name, value", [
    ("grpo_s", "importance_sampling_level", "token"), ("egsw", "beta", 0.1), ("gtpo", "scale_rewards", "none"),
    ("gtpo", "multi_objective_aggregation", "normalize_then_sum"),
])  # fmt: skip
def test_settings_of_another_method_are_refused(method, name, value, toy, tmp_path):
    with pytest.raises(ValueError, match=f"wrong: {name}$"):
        trained(EntropyGRPOTrainer, toy, tmp_path, method=method, **SETTINGS[method] | {name: value})


@pytest.mark.parametrize("method, name, value", [
    ("gtpo", "alpha", 1.0), ("gtpo", "reduction", "sequence"), ("grpo_s", "lr", 1.0),
    ("grpo_s", "entropy_mean", "geometrical"), ("gtpo", "entropy_min", 0), ("gtpo", "alpha2", -0.1),
])  # fmt: skip
def test_wrong_options_of_a_method_are_refused(method, name, value):
    with pytest.raises(ValueError, match=f"wrong: {name}$"):
        token_advantages(method, {name: value})


def worker(toy, out):
    """What each process of the test below runs: 14 of the 28 rows, so that the fourth of seven groups spans both. The
    second process stops at 8 tokens, so that their paddings differ."""
    rank, found = int(os.environ["RANK"]), {}
    for method in SCRIPTS:
        cls = recorder(EntropyGRPOTrainer, partial(token_loss, method, {}))
        more = dict(per_device_train_batch_size=7, max_completion_length=(12, 8)[rank], learning_rate=0.001)
        trainer = trained(cls, toy, out, method=method, **SETTINGS[method], **more)
        check(trainer)
        found[method] = dict(local=trainer.batch.local, rewards=trainer.batch.rewards)
    torch.save(found, Path(out) / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # DDP still holds the process group. Its threads can abort an interpreter that ends (pytorch/pytorch#190489).
    os._exit(0)


def test_groups_may_span_processes(toy, tmp_path):
    """Losses of the micro-batches of two processes, and DDP's gradient, are ours for the whole batch."""
    script = tmp_path / "worker.py"
    script.write_text(
        f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]!r}\n"
        f"import test_trl; test_trl.worker({str(toy)!r}, {str(tmp_path)!r})\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for method in SCRIPTS:
        assert torch.equal(first[method]["rewards"], second[method]["rewards"])
        assert [tuple(A.shape) for A in first[method]["local"]] == [(14, 12), (14, 8)]
