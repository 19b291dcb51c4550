"""Warnings about a run that cannot learn well, each with the option that helps."""

from typing import Any


def find(history: list[dict[str, Any]]) -> dict[str, str]:
    """What is wrong after the last of these steps, as {name: line}. history: the metrics of all steps so far.

    An earlier warning is in the metrics of its step as warning/<name>. The same warning is not given twice.
    """
    first = history[0]
    last = history[-1]
    found = {}
    if last["completions/clipped_ratio"] > 0.3:
        share = last["completions/clipped_ratio"]
        found["cut_off"] = f"{share:.0%} of the completions were cut off; a larger --max-new-tokens gives them room"
    if len(history) >= 3 and all(metrics["frac_reward_zero_std"] == 1 for metrics in history[-3:]):
        found["no_signal"] = (
            "no group had different rewards in three steps, so nothing is learned; the problems are too hard or too "
            "easy (--dataset), or --group-size is too small"
        )
    if last["reward/parse_failed"] > 0.5:
        share = last["reward/parse_failed"]
        found["unreadable"] = (
            f"{share:.0%} of the completions state no readable answer; --system or --prompt-template can ask for the "
            "answer in \\boxed{}"
        )
    if last["entropy"] < 0.01 * first["entropy"]:
        found["no_entropy"] = (
            f"the entropy has fallen from {first['entropy']:.2g} to {last['entropy']:.2g} nats, so samples hardly "
            "differ; a smaller --lr or fewer --steps keep more of it"
        )
    given = {name.removeprefix("warning/") for metrics in history for name in metrics if name.startswith("warning/")}
    return {name: line for name, line in found.items() if name not in given}
