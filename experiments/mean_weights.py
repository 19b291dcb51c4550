"""The mean weight that EGSW gives the tokens of right and of wrong completions, for the base model of Countdown.

    python experiments/mean_weights.py [FOLDER]        FOLDER: of base and data, runs/countdown if not given

plan.py's controls multiply GRPO's advantages by these two numbers. Groups that are all right or all wrong do not
count, because they have no advantage.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent))

from training_runs import sample_countdown

import egsw
from tasks import countdown

N_PROMPTS = 512
GROUP_SIZE = 8


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/countdown")
    rows = countdown.questions(N_PROMPTS, 1, held_out=False)
    rollout, completions = sample_countdown(str(countdown.base(folder / "base")), rows, GROUP_SIZE)
    for i, tokens in enumerate(completions):
        rollout.rewards[i] = countdown.reward("".join(tokens), rows[int(rollout.group[i])])
    A = egsw.advantages(rollout.rewards, rollout.group)  # [B]
    for alpha in (0.0, 0.5):
        W = egsw.weights(A, rollout.entropy, rollout.mask, rollout.group, alpha=alpha)  # [B, T]
        means = []
        for outcome in (A > 0, A < 0):
            means.append(float(W[outcome].sum() / rollout.mask[outcome].sum()))
        print(f"alpha {alpha}: right {means[0]:.2f}, wrong {means[1]:.2f}")


if __name__ == "__main__":
    main()
