"""Several processes, started by torchrun: how they split a step, and how they put the results together.

Every process holds the whole rollout. The processes split the sampling, the verifying and the micro-batches of the
update. Everything between these (advantages, weights, denominators, dynamic sampling, metrics) each process computes
for itself, on the whole batch and from the same numbers. So the methods know of no other process, no mean is taken over
one process alone, and the result does not depend on the number of processes, except for rounding.

    data parallel (the default)   every process holds the model; gradients are summed once per optimizer step
    --fsdp                        FSDP2: every process holds a part of each weight, its gradient and its optimizer state

Without torchrun there is one process. It takes the same path through the code, and these functions do nothing.
"""

import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
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


def all_reduce_dict(numbers: dict[str, float]) -> dict[str, float]:
    """The same names, each with the sum over the processes."""
    values = torch.tensor(list(numbers.values()), dtype=torch.float64)
    all_reduce(values)
    return dict(zip(numbers, values.tolist(), strict=True))


def all_reduce_gradients(model) -> None:
    """Makes every .grad the sum over the processes. All of them have gradients for the same parameters."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]  # none if no row had an advantage
    if is_sharded(model):
        for gradient in gradients:
            gradient.mul_(world_size())  # because FSDP has taken the mean
    elif world_size() > 1:
        for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
            work.wait()


# --- FSDP2 ------------------------------------------------------------------------------------------------------------


def is_sharded(model) -> bool:
    return hasattr(model, "unshard")


def shard(model, device: torch.device) -> None:
    """Leaves this process with a part of each weight. A layer's weights are gathered when the layer runs, the rest
    (embeddings, head) with the root."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world_size(),))
    for module in list(model.modules()):
        if type(module).__name__ in (model._no_split_modules or []):  # the layers, as transformers names them
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.run_as_forward = types.MethodType(lambda self, function, *args: function(self, *args), model)
    register_fsdp_forward_method(model, "run_as_forward")


def bind(function: Callable, model) -> Callable:
    """function(model, ...) as a function of its other arguments. On a sharded model it runs like a forward pass: with
    the weights outside the layers gathered and FSDP's hooks in place. The function may use any part of the model."""
    if is_sharded(model):
        return partial(model.run_as_forward, function)
    return partial(function, model)


@contextmanager
def unsharded(model) -> Iterator[None]:
    """All weights in every process while the block runs. For a rollout: they are gathered once, not for every token."""
    if not is_sharded(model):
        yield
        return
    model.run_as_forward(lambda _: None)  # FSDP treats the first module that runs as the root: it must be the model
    parts = [module for module in model.modules() if is_sharded(module)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    # A backward pass gathers weights in advance, and which ones depends on what ran last. In a process without prompts,
    # the rollout has run no layer. It would gather other weights than the other processes, and all would wait for ever.
    # So every process runs the model itself last.
    model.run_as_forward(lambda _: None)
    for part in parts:
        part.set_reshard_after_forward(part is not model, recurse=False)
        part.reshard()


def full_tensor(value: Any) -> Any:
    """A sharded tensor put together from all its parts (every process must call this); anything else as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def full_weights(model) -> dict[str, Tensor]:
    """The state dict of the whole model; of a sharded one on the CPU of process 0. A tied weight is in it once."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights = model.state_dict()
    if is_sharded(model):
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    unique_names = {name for name, _ in model.named_parameters()}
    all_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied_names = all_names - unique_names  # loading ties them again
    return {name: weight for name, weight in weights.items() if name not in tied_names}


def full_optimizer_state(optimizer) -> dict:
    """The optimizer's state dict, the same for any number of processes, sharded or not. Only process 0 keeps the
    tensors, because it writes them."""
    state = optimizer.state_dict()
    full = {}
    for i, values in state["state"].items():
        gathered = {name: full_tensor(value) for name, value in values.items()}  # of one parameter at a time
        full[i] = {name: value.cpu() for name, value in gathered.items()} if rank() == 0 else {}
    return {**state, "state": full}


def load_optimizer_state(optimizer, state: dict) -> None:
    """Restores what full_optimizer_state gave, sharded in the same way as the parameters. Keeps none of its tensors:
    they may be a mapped file."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    restored: dict[int, dict[str, torch.Tensor]] = {}
    for i, values in state["state"].items():
        p = parameters[i]
        restored[i] = {}
        for name, value in values.items():
            own_value = value.to(p.device, copy=True)
            if isinstance(p, DTensor) and value.shape == p.shape:
                own_value = distribute_tensor(own_value, p.device_mesh, p.placements)
            restored[i][name] = own_value
    optimizer.load_state_dict({**state, "state": restored})
