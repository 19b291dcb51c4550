"""Seconds and peak memory of a step of each method, relative to GRPO, for compare.py. Each measurement is a process.

    python experiments/cost.py METHOD BASE [option ...]     one measurement, as a line of JSON

A step lasts from the end of one log line to the end of the next: sampling, verifying, the method's own functions, the
update and the log.
"""

import importlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness import run
from harness.options import fail

ROUNDS, STEPS = 5, 12
ONE_UPDATE = ["--minibatches", "1", "--max-rounds", "1"]  # without what makes DAPO's step larger than the others'


def measure(method: str, base: str, options: list[str]) -> None:
    """Prints a script's seconds per step, its seconds in the method's own functions, and its peak MiB. Needs its own
    process.

    At a learning rate of nearly 0 every method samples the same completions (DAPO the same and then more).
    """
    phases, ends, log = [], [], run.Run.log

    def timed(self, rollout, more=None):
        phases.append(sum(self.seconds.values()))  # sample, verify and update of this step
        began = time.perf_counter()
        log(self, rollout, more)
        ends.append(time.perf_counter())
        phases[-1] += ends[-1] - began

    run.Run.log = timed
    with tempfile.TemporaryDirectory() as out:
        sys.argv = [f"{method}.py", "--model", base, "--out", out, "--eval-rows", "0", "--lr", "1e-12", *options]
        importlib.import_module(method).main()
    steps = [end - begin for begin, end in itertools.pairwise(ends)]
    own = [step - phase for step, phase in zip(steps, phases[1:], strict=True)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    print(json.dumps(dict(seconds=statistics.median(steps), own=statistics.median(own), mib=peak)))


def cost(methods: list[str], base: str) -> list[dict]:
    """Rows of cost.csv.gz, on one thread: medians of ROUNDS processes, and the median, lowest and highest ratio to
    GRPO's process of the same round."""
    contenders, found = {method: (method, []) for method in methods}, {}
    contenders["dapo, one update, one round"] = "dapo", ONE_UPDATE
    for _ in range(ROUNDS):
        for label, (method, options) in contenders.items():
            command = [sys.executable, __file__, method, base, "--steps", str(STEPS), *options]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                fail(f"measuring {method}: {done.stderr.strip()[-300:]}")
            found.setdefault(label, []).append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for label, runs in found.items():
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(runs, found["grpo"], strict=True)]
        median = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        memory = median["mib"] / statistics.median(r["mib"] for r in found["grpo"])
        rows.append({
            "method": label, "seconds a step": median["seconds"], "over GRPO's": statistics.median(ratios),
            "lowest": min(ratios), "highest": max(ratios), "own functions ms": 1000 * median["own"],
            "peak MiB": median["mib"], "MiB over GRPO's": memory,
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    measure(*sys.argv[1:3], sys.argv[3:])
