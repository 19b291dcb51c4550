"""How a run ends before its last step.

| what happens | exit status | what is saved |
|---|---|---|
| Ctrl-C (SIGINT) | 130 | everything, after the current step |
| SIGTERM | 143 | everything, after the current step |
| a closed terminal (SIGHUP) | 129 | everything, after the current step |
| SIGUSR1, which batch systems send before their limit | 128 + its number | everything, after the current step |
| a second signal, at least a second later | as the first | what was saved before |
| updates that are not finite, three steps in a row | 1 | everything: the weights are still good |
| another process of torchrun has died | 1 | what was saved before |
| the disk is full | 1 | what was saved before |
| a GPU is out of memory | 1 | what was saved before |
| wrong options or input | 2 | nothing: the run has not begun |
| the --reward function has failed | 2 | what was saved before |
"""

import errno
import os
import signal
import sys
import time
from pathlib import Path

import torch

from harness import distributed, files
from harness.options import fail
from harness.rewards import RewardError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


class Signals:
    """Between catch() and release(), the first signal only sets `status`, the exit status that it asks for. The run
    looks at it after each step. A second signal raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.status = 0  # 0: there was no signal
        self.time = 0.0  # of the first signal

    def catch(self) -> None:
        self.handlers = {}
        for number in SIGNALS:
            under_nohup = number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
            if not under_nohup:
                self.handlers[number] = signal.signal(number, self.handle)

    def release(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame) -> None:
        if not self.status:
            self.status = 128 + number
            self.time = time.monotonic()
            if distributed.rank() == 0:
                print("\nstopping after this step; a second signal stops at once", file=sys.stderr)
        elif time.monotonic() - self.time > 1:  # within a second it is the same Ctrl-C, sent on by torchrun
            raise KeyboardInterrupt


def end_with_one_line(error: BaseException, folder: Path, step: int, signal_status: int) -> None:
    """Ends the program with one line and the exit status of the table above, if the error is in it. Otherwise does
    nothing, so that the error goes on."""
    way_out = "no checkpoint was written yet (--save-every)"
    if files.checkpoints(folder):
        way_out = f"go on with --resume {folder}"
    if distributed.peer_lost(error):
        print(f"error: process {distributed.rank()} lost another one in step {step}; {way_out}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)  # not sys.exit: what is left of the process group might wait for the lost process
    if isinstance(error, RewardError):
        message, details = error.args
        fail(f"{message}; {way_out}", details)
    if isinstance(error, KeyboardInterrupt):
        print(f"stopped in step {step}; {folder} holds what was saved before it", file=sys.stderr)
        raise SystemExit(signal_status or 130) from None
    if getattr(error, "errno", None) in DISK_FULL or "no space left" in str(error).lower():  # safetensors has no errno
        print(f"error: the disk of {folder} is full: make room; {way_out}", file=sys.stderr)
        raise SystemExit(1) from None
    if isinstance(error, torch.OutOfMemoryError):
        print(f"error: out of GPU memory in step {step}: give a smaller --rollout-rows or --token-budget, or "
              f"--gradient-checkpointing; {way_out}", file=sys.stderr)  # fmt: skip
        raise SystemExit(1) from None
