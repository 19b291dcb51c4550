"""Several processes, started by torchrun: how they split a step, and how they put the results together.

Every process holds the whole rollout. The processes split the sampling, the verifying and the micro-batches of the
update. Every process does all other work (advantages, weights, denominators, dynamic sampling, metrics) itself, on the
whole batch and from the same numbers. So the methods know of no other process, no mean is taken over one process alone,
and the result does not depend on the number of processes, except for rounding.

Every process holds the model, and gradients are summed once per optimizer step (data parallel). Without torchrun there
is one process. It takes the same path through the code, and these functions do nothing.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common import TENSOR_FIELDS, Rollout, concatenate
from harness.options import fail


def start() -> torch.device:
    """Joins the other processes, if torchrun started this one. Returns the device to work on."""
    cuda = torch.cuda.is_available()
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        n_gpus = torch.cuda.device_count()
        n_processes = int(os.environ["LOCAL_WORLD_SIZE"])
        if cuda and n_processes > n_gpus:
            fail(f"torchrun --nproc-per-node {n_processes}: this machine has {n_gpus} GPUs, and each process needs one")
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # The time limit is for a process that hangs. One that dies is noticed at once.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - only process 0 prints
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def finish() -> None:
    """Waits until all processes are done, then leaves: a process that leaves early looks like one that has died."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def peer_lost(error: BaseException) -> bool:
    """Whether this error means that another process has died. gloo raises a plain RuntimeError."""
    if not dist.is_initialized():
        return False
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "peer" in text))


def rank() -> int:
    """The number of this process. Only process 0 writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def main_first() -> Iterator[None]:
    """Process 0 runs the block before the others do, so that they find what it has built."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and world_size() > 1:
        dist.barrier()


# --- splitting, and putting together ----------------------------------------------------------------------------------


def my_slice(n: int) -> slice:
    """This process's part of n things. The parts of all processes follow each other."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def all_gather(value: Any) -> list:
    """The `value` of every process, in the order of the processes. Any object; its tensors must be on the CPU."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def gather_rollout(part: Rollout | None, device: torch.device) -> Rollout:
    """The whole Rollout on every process, from the part that each has sampled (None: it had nothing to sample)."""
    if world_size() == 1 and part is not None:
        return part
    if part is not None:
        part = replace(part, **{name: getattr(part, name).cpu() for name in TENSOR_FIELDS})
    whole = concatenate([part for part in all_gather(part) if part is not None])
    return replace(whole, **{name: getattr(whole, name).to(device) for name in TENSOR_FIELDS})


def all_reduce(tensor: Tensor) -> None:
    """Adds up the tensor over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)


def all_reduce_gradients(model) -> None:
    """Makes every .grad the sum over the processes. A process without rows has no gradients: it adds zeros. A parameter
    without gradient in all processes stays without, so the optimizer passes over it."""
    if world_size() == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    has_gradient = torch.tensor([float(p.grad is not None) for p in parameters], device=model.device)
    all_reduce(has_gradient)
    works = []
    for p, n_processes in zip(parameters, has_gradient.tolist(), strict=True):
        if n_processes > 0:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            works.append(dist.all_reduce(p.grad, async_op=True))
    for work in works:
        work.wait()
