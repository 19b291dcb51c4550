"""What compare.py measures: its questions, as data.

In each setting, the rows of a question's tables are compared with the first one. A run that several rows ask for runs
once.
"""

import itertools
from typing import Any, NamedTuple

from training_runs import TOKENS

COUNTDOWN = "countdown"
WORD_PROBLEMS = "word_problems"
ARITHMETIC = ["easy", "trap", "long"]
METHODS = ["grpo", "dapo", "egsw", "gtpo", "grpo_s"]
NEIGHBOURS = ["more.forking", "more.cov", "more.entropy_advantage", "more.quantile", "more.cispo"]


class TableRow(NamedTuple):
    setting: str  # of SETTINGS in training_runs.py
    method: str  # the module of its script
    options: dict[str, Any]


class Question(NamedTuple):
    seeds: int
    rows: list[TableRow]


def product(settings: list[str], methods: list[str], options: list[dict]) -> list[TableRow]:
    """A row for each setting, method and set of options, in this order."""
    return [TableRow(*row) for row in itertools.product(settings, methods, options)]


def grid(**values: list) -> list[dict]:
    """Every combination of these values, as options."""
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def on_countdown(method: str, *options: dict) -> list[TableRow]:
    return product([COUNTDOWN], [method], list(options))


DEFAULTS: dict = {}
TOKEN_MEAN = dict(reduction="token")
FOUR_UPDATES = dict(reduction="token", minibatches=4)  # as most methods of more/ take them
# Evaluations on the way, for the frontier. The learning rate of SLOW fits four updates per rollout on Countdown.
OFTEN = dict(eval_every=27)
TWICE = dict(eval_every=54)
SLOW = dict(lr=2e-4, eval_every=54)
FAST = dict(lr=1.2e-3, eval_every=54)
LONGER = dict(stop_tokens=2 * TOKENS, eval_every=108)
# The mean weights that EGSW gives right and wrong completions of the Countdown base: mean_weights.py measures them.
MATCHED = dict(right_scale=1.8, wrong_scale=0.65)

# Readings of GTPO's equations.
READINGS = [
    {}, dict(normalize_over="outcome"), dict(entropy_baseline="row"), dict(entropy_baseline="matrix"),
    dict(entropy_baseline="row", entropy_mean="geometric"),
    dict(alpha2=0.0), dict(alpha2=0.05), dict(alpha2=0.2), dict(alpha2=0.5), dict(alpha1=0.9, alpha2=0.1),
]  # fmt: skip
BATCH = [dict(compare_over="batch") | reading for reading in READINGS]
GROUP = [dict(compare_over="group") | reading for reading in READINGS]

# The advantages that EGSW can weigh, each with the mean of its paper.
FORMS = [
    dict(advantage="grpo", reduction="token"), dict(advantage="grpo", reduction="sequence"),
    dict(advantage="rloo", reduction="sequence"), dict(advantage="dr_grpo", reduction="constant"),
]  # fmt: skip
WEIGHTS = grid(step_wise=[True, False], mean_one=[True, False])


def of_more(setting: str, of_grpo: dict, of_the_rest: dict) -> list[TableRow]:
    """GRPO, GRPO with four updates, and the methods of more/. GRPO's options are those of other questions, so that its
    runs are shared."""
    return [
        TableRow(setting, "grpo", of_grpo),
        TableRow(setting, "grpo", FOUR_UPDATES | of_the_rest),
        *product([setting], NEIGHBOURS, [of_the_rest]),
        TableRow(setting, "more.cov", dict(variant="kl") | of_the_rest),
    ]


def with_sgd(setting: str) -> list[TableRow]:
    rates = [dict(optimizer="sgd", lr=lr) for lr in (0.03, 0.1, 0.3)]
    # Weights whose sum is one over a group of 8 give an eighth of the gradient.
    sum_one = [dict(mean_one=False) | options for options in (DEFAULTS, rates[1], dict(optimizer="sgd", lr=0.8))]
    found = []
    for method in METHODS:
        found += product([setting], [method], [DEFAULTS, *rates, *(sum_one if method == "egsw" else [])])
    return found


QUESTIONS = {
    "methods": Question(10, product([COUNTDOWN], METHODS, [OFTEN]) + product(ARITHMETIC, METHODS, [DEFAULTS])),
    "real": Question(3, product([WORD_PROBLEMS], METHODS, [DEFAULTS])),
    "real_alpha": Question(3, [
        TableRow(WORD_PROBLEMS, "grpo", DEFAULTS), *product([WORD_PROBLEMS], ["egsw"], [DEFAULTS, dict(alpha=0.0)]),
    ]),
    "real_halfway": Question(3, product([WORD_PROBLEMS], METHODS, [dict(stop_tokens=20_000)])),
    "real_rates": Question(1, product([WORD_PROBLEMS], ["grpo"], [dict(lr=lr) for lr in (3e-6, 1e-5, 3e-5)])),
    "frontier": Question(3, [
        *product([COUNTDOWN], METHODS, [OFTEN, SLOW, FAST, LONGER]),
        *on_countdown("egsw", *(dict(step_wise=False) | options for options in (OFTEN, SLOW, FAST))),
    ]),
    "parts": Question(5, [
        *on_countdown("grpo", OFTEN),
        *on_countdown("egsw", OFTEN, dict(alpha=0.0), dict(alpha=2.0)),
        *on_countdown("egsw", *grid(weight_temperature=[0.5, 1.0, 4.0, 8.0])),
        *on_countdown("egsw", dict(step_wise=False), dict(step_wise=False, alpha=0.0)),
        *on_countdown("grpo", TOKEN_MEAN, TOKEN_MEAN | dict(lr=3e-4)),
        *on_countdown("grpo_controls", TOKEN_MEAN | MATCHED),
        *on_countdown("grpo_controls", TOKEN_MEAN | dict(wrong_scale=0.5), TOKEN_MEAN | dict(wrong_scale=0.0)),
        *on_countdown("grpo_controls", TOKEN_MEAN | dict(right_scale=0.0)),
        *on_countdown("grpo_controls", TOKEN_MEAN | dict(hard_power=0.5), TOKEN_MEAN | dict(hard_power=0.5) | MATCHED),
        *on_countdown("grpo_controls", *(TOKEN_MEAN | dict(entropy_bonus=bonus) for bonus in (0.01, 0.03, 0.1))),
    ]),
    "gtpo_terms": Question(5, on_countdown(
        "gtpo", OFTEN, dict(alpha2=0.0), dict(alpha2=0.5), dict(alpha2=1.0), dict(entropy_min=0.1),
        dict(compare_over="batch"), dict(compare_over="batch", alpha2=0.0),
    )),
    "grpo_s_terms": Question(5, on_countdown(
        "grpo_s", OFTEN, dict(beta2=0.0), dict(beta2=0.5), dict(beta2=1.0), dict(entropy_min=0.1),
    )),
    "size": Question(3, [
        *product(["countdown-large"], METHODS, [DEFAULTS]),
        *product(["countdown-large"], ["grpo_controls"], [TOKEN_MEAN | MATCHED, TOKEN_MEAN | dict(wrong_scale=0.0)]),
    ]),
    "sgd": Question(3, with_sgd("easy") + with_sgd("long")),
    "neighbours": Question(5, [
        *of_more(COUNTDOWN, OFTEN, TWICE),
        *of_more(COUNTDOWN, SLOW, SLOW),
        *(row for setting in ARITHMETIC for row in of_more(setting, DEFAULTS, DEFAULTS)),
    ]),
    "neighbour_options": Question(5, [  # each method's own option: its default first, and two more values
        *on_countdown("grpo", FOUR_UPDATES | SLOW, TOKEN_MEAN | dict(minibatches=1) | SLOW),
        *on_countdown("more.forking", *(dict(rho=rho) | SLOW for rho in (0.2, 0.1, 0.5))),
        *on_countdown("more.cov", *(dict(share=share) | SLOW for share in (2e-4, 0.01, 0.05))),
        *on_countdown("more.cov", *(dict(variant="kl", share=share) | SLOW for share in (2e-4, 0.01, 0.05))),
        *on_countdown("more.entropy_advantage", *(dict(alpha=alpha) | SLOW for alpha in (0.4, 0.1, 1.6))),
        *on_countdown("more.quantile", *(dict(quantile=quantile) | SLOW for quantile in (0.4, 0.2, 0.6))),
        *on_countdown("more.cispo", *(dict(clip_high=clip_high) | SLOW for clip_high in (4.0, 0.28, 1.0))),
    ]),
    "gtpo": Question(3, [
        *product(ARITHMETIC, ["gtpo"], BATCH),
        *product(["easy", "long"], ["gtpo"], GROUP),
        TableRow("trap", "gtpo", dict(compare_over="group")),
    ]),
    "egsw": Question(3, [  # the runs that end in short guesses take many steps, so they cost most
        *product(["easy"], ["egsw"], grid(
            reduction=["token", "sequence"], weight_temperature=[1.0, 2.0, 4.0, 8.0], alpha=[0.0, 0.1, 0.5, 1.0],
        )),
        *product(["trap"], ["egsw"], grid(
            reduction=["token", "sequence"], weight_temperature=[2.0, 4.0, 8.0], alpha=[0.0, 0.5],
        )),
        *product(["long"], ["egsw"], grid(
            reduction=["token"], weight_temperature=[1.0, 2.0, 4.0, 8.0], alpha=[0.0, 0.5],
        )),
    ]),
    "egsw_forms": Question(3, [
        *product(["easy"], ["grpo"], FORMS),
        *product(["easy"], ["egsw"], [form | weights for form in FORMS for weights in WEIGHTS]),
    ]),
    "grpo_s": Question(3, product(
        ["easy"], ["grpo_s"], grid(minibatches=[1, 4, 16], ratio_mean=["geometric", "arithmetic"]),
    )),
    # The defaults of the scripts differ in more than the method. These two questions remove one difference at a time.
    "updates": Question(3, [
        row
        for setting in ("easy", "long")
        for updates in (1, 4)
        for row in product([setting], METHODS, [dict(minibatches=updates)])
    ]),
    "reduction": Question(3, product(
        ARITHMETIC, ["grpo", "egsw", "grpo_s"], grid(reduction=["sequence", "token", "constant"]),
    )),
}  # fmt: skip
