"""main() of each method: one step on a fixed rollout, and the gradient that reaches the optimizer. It must be that of
plain loops over the full logits, with the defaults and with every option changed in turn."""

from dataclasses import fields
from types import SimpleNamespace

import plain
import pytest
import torch
from helpers import METHODS, T, call, naive_score, rollout_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import concatenate
from harness import trainer

SIZE = {"n_prompts": 4, "group_size": 4, "max_new_tokens": T, "steps": 1, "eval_rows": 0}

# One value of each option that is not its default.
CHANGES = {
    "grpo": dict(temperature=[0.7], minibatches=[2], max_grad_norm=[0.01],  # the same code for every method
                 advantage=["dr_grpo", "rloo"], clip_low=[0.05], clip_high=[0.05], kl_coef=[0.3],
                 reduction=["token", "constant"]),
    "dapo": dict(minibatches=[1, 3], max_rounds=[1, 2], overlong_cache=[0.0, 0.6], overlong_filter=[True],
                 clip_low=[0.05], clip_high=[0.05], reduction=["sequence", "constant"]),
    "egsw": dict(advantage=["dr_grpo", "rloo"], alpha=[0.0, 2.0], weight_temperature=[0.5], step_wise=[False],
                 mean_one=[False], clip_low=[0.05], clip_high=[0.05], kl_coef=[0.3],
                 reduction=["sequence", "constant"]),
    "gtpo": dict(alpha1=[0.4], alpha2=[0.0, 0.7], entropy_baseline=["row", "matrix"], entropy_mean=["geometric"],
                 compare_over=["batch"], normalize_over=["outcome"], entropy_min=[0.4], entropy_max=[0.6],
                 overlong_gamma=[0.75], clip_low=[0.05], clip_high=[0.05], reduction=["sequence", "constant"]),
    "grpo_s": dict(beta1=[0.4], beta2=[0.0, 0.7], entropy_mean=["geometric"], entropy_min=[0.7],
                   ratio_mean=["arithmetic"], clip_low=[0.001], clip_high=[0.001], reduction=["token", "constant"]),
    "forking": dict(rho=[0.5, 1.0], clip_low=[0.05], clip_high=[0.05], reduction=["sequence"]),
    "cov": dict(variant=["kl"], share=[0.05], lower=[0.5], upper=[0.5], penalty=[3.0],
                clip_low=[0.05], clip_high=[0.05], reduction=["sequence"]),
    "entropy_advantage": dict(alpha=[2.0], kappa=[8.0], clip_low=[0.05], clip_high=[0.05],
                              reduction=["sequence"]),
    "quantile": dict(quantile=[0.2, 1.0], clip_low=[0.01], clip_high=[0.05], reduction=["sequence"]),
    "cispo": dict(clip_high=[0.05], reduction=["sequence"]),
}  # fmt: skip
# What a case is compared with, so that old log-probs differ and a gradient keeps its size.
BASE = dict(minibatches=4, max_grad_norm=1e9)
NEEDED = {
    **{
        ("egsw", option): dict(kl_coef=0.3)  # the weights multiply the KL too
        for option in ("advantage", "alpha", "weight_temperature", "step_wise", "mean_one")
    },
    ("cov", "penalty"): dict(variant="kl"),
    ("quantile", "clip_low"): dict(quantile=1.0),
    ("forking", "clip_low"): dict(rho=1.0),
}  # so that the option acts
CASES = [(name, option, value) for name in METHODS for option, values in CHANGES[name].items() for value in values]


# --- the fixed rollouts -----------------------------------------------------------------------------------------------


def fixed_rollouts(model, tokenizer):
    """Three rollouts of four prompts. Rewards and entropies are made up; groups have one or both outcomes."""
    outcomes = [
        [[1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]],
        [[0, 0, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]],
        [[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 0], [1, 1, 1, 1]],
    ]
    rng = torch.Generator().manual_seed(5)
    rollouts = []
    for seed, rewards in enumerate(outcomes):
        rollout = rollout_of(model, tokenizer, Q=4, seed=seed)
        rollout.rewards = torch.tensor(rewards).flatten().float()
        rollout.entropy = torch.rand(rollout.mask.shape, generator=rng) * rollout.mask
        rollout.entropy[3, 0] = 0.0  # so that a floor is needed
        rollout.records = [{"question": "", "answer": "", "completion": "", "verdict": "wrong"}] * len(rollout)
        rollouts.append(rollout)
    return rollouts


def noise(shape, seed, scale):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients_of_main(name, options, rollouts, toy, toy_data, tmp_path, monkeypatch, off_policy):
    """What each optimizer step of main() gets, as one vector each; the weights do not move in between.

    off_policy: the old log-probs are moved away from the policy's, so that ratios differ from 1 and clipping acts.
    """
    left = list(rollouts)
    steps = []
    score = trainer.Trainer.score

    def moved_score(self, model, rollout, plans):
        logprobs = score(self, model, rollout, plans)
        return (logprobs + noise(logprobs.shape, 1, 0.15)) * rollout.mask if off_policy else logprobs

    def capture(optimizer, *_):
        parameters = optimizer.param_groups[0]["params"]  # without a gradient, if no row of a part has one
        steps.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]))

    def reference_logprobs(self, rollout):
        return (rollout.logprobs + noise(rollout.mask.shape, 2, 0.4)) * rollout.mask

    monkeypatch.setattr(trainer.Trainer, "sample", lambda self: left.pop(0))
    monkeypatch.setattr(trainer.Trainer, "verify", lambda self, rollout: rollout)
    monkeypatch.setattr(trainer.Trainer, "score", moved_score)
    monkeypatch.setattr(trainer.Trainer, "reference_logprobs", reference_logprobs)
    monkeypatch.setattr(torch.optim.AdamW, "step", capture)
    flags = []
    for option, value in (SIZE | options).items():
        flag = option.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", str(value)]
    call(monkeypatch, name, "--model", str(toy), "--dataset", str(toy_data), "--out", str(tmp_path), *flags)
    return steps


# --- the same in plain loops ------------------------------------------------------------------------------------------


def dapo_batch(rollouts, n_prompts, max_rounds):
    """The groups that dynamic sampling takes, as (rollout, row indices of the group)."""
    found = []
    for rollout in rollouts[:max_rounds]:
        for g in rollout.group.unique():
            rows = (rollout.group == g).nonzero().squeeze(1).tolist()
            if plain.is_mixed(rollout.rewards, rollout.group, rows[0]):
                found.append((rollout, rows))
        if len(found) >= n_prompts:
            break
    return found[:n_prompts]


def plain_advantages(name, o, r):
    """[B][T]; EGSW's are without its weights."""
    if name in ("grpo", "egsw", "cov", "cispo"):
        return plain.spread(plain.grpo_advantages(r.rewards, r.group, getattr(o, "advantage", "grpo")), r.mask)
    if name == "dapo":
        A = plain.dapo_advantages(r.rewards, r.mask, r.group, T, o.overlong_cache * T)
        return plain.spread(A, r.mask)
    if name == "gtpo":
        lengths = [plain.n_tokens(r.mask, i) for i in range(len(r.rewards))]
        extra = o.overlong_gamma and plain.gtpo_punishment(r.rewards, lengths, r.group, o.overlong_gamma)
        shaped = plain.gtpo_shaped(
            r.rewards, r.entropy, r.mask, r.group, o.alpha1, o.alpha2, o.entropy_baseline, o.entropy_mean,
            o.compare_over, o.entropy_min, o.entropy_max, extra,
        )  # fmt: skip
        return plain.gtpo_advantages(*shaped, r.rewards, r.mask, r.group, o.compare_over, o.normalize_over)
    if name == "forking":
        A = plain.spread(plain.grpo_advantages(r.rewards, r.group), r.mask)
        kept = plain.forking_tokens(r.entropy, A, o.rho)
        return [[a * k for a, k in zip(*rows, strict=True)] for rows in zip(A, kept, strict=True)]
    if name == "entropy_advantage":
        A = plain.grpo_advantages(r.rewards, r.group)
        return plain.shaped_by_entropy(A, r.entropy, r.mask, o.alpha, o.kappa)
    if name == "quantile":
        return plain.spread(plain.quantile_advantages(r.rewards, r.group, o.quantile), r.mask)
    shaped = plain.grpo_s_shaped(r.rewards, r.entropy, r.mask, r.group, o.beta1, o.beta2, o.entropy_mean, o.entropy_min)
    return plain.spread(plain.grpo_s_advantages(shaped, r.rewards, r.group), r.mask)


def plain_objective(name, o, w, logprob, A, chosen):
    """What a token adds to the objective, without a KL to the starting model. w, logprob: scalar tensors."""
    if name == "cispo":
        return min(w.item(), 1 + o.clip_high) * A * logprob
    if name == "cov" and o.variant == "kl":
        return w * A - o.penalty * chosen * w.log().abs()
    return 0 * w if chosen else plain.clipped(w, A, o.clip_low, o.clip_high)


def defaults(name):
    return {field.name: field.default for field in fields(METHODS[name].Config)}


def plain_gradients(name, options, rollouts, model, off_policy):
    """The gradient of each optimizer step, in float64."""
    o = SimpleNamespace(**defaults(name) | options)
    if name == "dapo":
        groups = dapo_batch(rollouts, SIZE["n_prompts"], o.max_rounds)
        r = concatenate([rollout.select(torch.tensor(rows)) for rollout, rows in groups])
    else:
        r = rollouts[0].select(torch.arange(16))
    A = plain_advantages(name, o, r)
    W = [[1.0] * T for _ in A]
    if name == "egsw":
        per_row = [A[i][0] for i in range(len(A))]
        W = plain.egsw_weights(
            per_row, r.entropy, r.mask, r.group, o.alpha, o.weight_temperature, o.step_wise, o.mean_one
        )
    chosen = [[False] * T for _ in A]
    if name == "cov":
        uniforms = torch.rand(r.mask.shape, generator=torch.Generator().manual_seed(0))
        chosen = plain.cov_chosen(A, r.logprobs, uniforms, o.variant, o.share, o.lower, o.upper)
    if name == "dapo" and o.overlong_filter:
        kept = r.finished.nonzero().squeeze(1)
        A = [A[i] for i in kept.tolist()]
        r = r.select(kept)

    reference = (r.logprobs + noise(r.mask.shape, 2, 0.4)) * r.mask
    steps = []
    for minibatch, rows in enumerate(torch.arange(len(r)).tensor_split(o.minibatches)):
        part = r.select(rows)
        model.zero_grad()
        logprobs, _ = naive_score(model, part, o.temperature)
        old = logprobs.detach()
        if off_policy and minibatch > 0:  # the rows of the first minibatch are scored once
            old = old + noise(r.mask.shape, 1, 0.15)[rows]
        per_token = []
        for k, i in enumerate(rows.tolist()):
            n = plain.n_tokens(part.mask, k)
            log_ratio = [logprobs[k, t] - old[k, t] for t in range(n)]
            if name != "grpo_s":
                ratio = [x.exp() for x in log_ratio]
            elif o.ratio_mean == "geometric":
                ratio = [(sum(log_ratio) / n).exp()] * n
            else:
                ratio = [sum(x.exp() for x in log_ratio) / n] * n
            row = []
            for t in range(n):
                objective = plain_objective(name, o, ratio[t], logprobs[k, t], A[i][t], chosen[i][t])
                if getattr(o, "kl_coef", 0):
                    x = reference[i, t] - logprobs[k, t]
                    objective = objective - o.kl_coef * (x.exp() - x - 1)
                row.append(-W[i][t] * objective)
            per_token.append(row)
        plain.reduced(per_token, part.mask, o.reduction).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        steps.append(gradient * min(1.0, o.max_grad_norm / max(1e-12, float(gradient.norm()))))
    return steps


# --- the comparison ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rollouts(toy):
    return fixed_rollouts(AutoModelForCausalLM.from_pretrained(toy), AutoTokenizer.from_pretrained(toy))


@pytest.fixture(scope="module")
def expected_gradients(toy, rollouts):
    """plain_gradients(name, options, off_policy). The same ones are computed once."""
    model = AutoModelForCausalLM.from_pretrained(toy).double()
    known = {}

    def gradients(name, options, off_policy):
        key = (name, *sorted(options.items()), off_policy)
        if key not in known:
            known[key] = plain_gradients(name, options, rollouts, model, off_policy)
        return known[key]

    return gradients


@pytest.fixture()
def compared(rollouts, expected_gradients, toy, toy_data, tmp_path, monkeypatch):
    """A function that runs main() with options and compares. Returns the plain gradients."""

    def compare(name, options, off_policy):
        got = gradients_of_main(name, options, rollouts, toy, toy_data, tmp_path, monkeypatch, off_policy)
        expected = expected_gradients(name, options, off_policy)
        for a, b in zip(got, expected, strict=True):
            difference = (a.double() - b).norm()
            assert difference < 2e-4 * b.norm() + 1e-6  # a part whose completions are all equal has gradient 0
        return expected

    return compare


@pytest.mark.parametrize("name", METHODS)
def test_with_its_defaults_main_takes_the_gradient_of_the_formula(name, compared):
    steps = compared(name, {}, off_policy=False)
    assert len(steps) == defaults(name)["minibatches"] and any(gradient.norm() > 0 for gradient in steps)


@pytest.mark.parametrize("name", METHODS)
def test_main_takes_its_advantages_from_token_advantages(name, rollouts, toy, toy_data, tmp_path, monkeypatch):
    monkeypatch.setattr(METHODS[name], "token_advantages", lambda rewards, entropy, mask, group, **options: 0 * mask)
    steps = gradients_of_main(name, {}, rollouts, toy, toy_data, tmp_path, monkeypatch, off_policy=False)
    assert steps and not any(gradient.any() for gradient in steps)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "option", "value"), CASES)
def test_every_option_changes_the_gradient_as_the_formula_says(name, option, value, compared, expected_gradients):
    base = {} if option == "minibatches" else BASE | NEEDED.get((name, option), {})
    if name == "cov":
        base |= dict(share=0.2, lower=0.0)  # it chooses among many tokens
    options = base | {option: value}
    off_policy = options.get("minibatches", 1) > 1
    changed = compared(name, options, off_policy)
    before = expected_gradients(name, base, off_policy)
    differs = [(a - b).norm() > 1e-3 * b.norm() for a, b in zip(changed, before, strict=False)]
    assert len(changed) != len(before) or any(differs), "the option changes nothing"
