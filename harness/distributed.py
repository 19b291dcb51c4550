"""Several processes, started by torchrun: how a step is split over them, and put together again.

Every process holds the whole rollout. Sampling, verifying and the micro-batches of the update are split; all that lies
between them (advantages, weights, denominators, dynamic sampling, metrics) each process computes for itself on the
whole batch, from the same numbers. So the methods know nothing of processes, and no mean is one of a process: the
result does not depend on how many there are, but for rounding.

    data parallel (the default)   every process holds the model; gradients are summed once an optimizer step
    --fsdp                        FSDP2: every process holds a part of each weight, of its gradient and of AdamW's state

Without torchrun all of it does nothing: one process, and the same path through the code.
"""

import os
import sys
import types
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from options import fail


def start() -> torch.device:
    """Joins the other processes, if torchrun started this one. Returns the device to work on."""
    cuda = torch.cuda.is_available()
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        here, wanted = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
        if cuda and wanted > here:
            fail(f"torchrun --nproc-per-node {wanted}: there are {here} GPUs here, and each process needs its own")
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # The limit is for a process that hangs; one that dies is noticed at once.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what is printed, is printed once
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def finish() -> None:
    """Leaves the others, once all of them are done: a process that is gone early looks like one that has died."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def lost(error: BaseException | None) -> bool:
    """Whether an error says that another process is gone."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "peer" in text))


def rank() -> int:
    """The number of this process; 0 alone writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def main_first():
    """Process 0 runs the block before the others do: what it has built they find."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and world() > 1:
        dist.barrier()


# --- splitting and putting together -----------------------------------------------------------------------------------


def mine(n: int) -> slice:
    """This process's consecutive share of n things."""
    return slice(n * rank() // world(), n * (rank() + 1) // world())


def gather(part) -> list:
    """Every process's `part` (any object, its tensors on the CPU), in the order of the processes."""
    parts = [part] * world()
    if world() > 1:
        dist.all_gather_object(parts, part)
    return parts


def add_up(*tensors: Tensor) -> None:
    """Adds up each tensor over the processes, in place."""
    if world() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def total(numbers: dict[str, float]) -> dict[str, float]:
    """The same names, each with the sum over the processes."""
    values = torch.tensor(list(numbers.values()), dtype=torch.float64)
    add_up(values)
    return dict(zip(numbers, values.tolist(), strict=True))


def add_up_gradients(model) -> None:
    """Makes every .grad the sum over the processes. All of them have gradients for the same parameters."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]  # none at all if no row had an advantage
    if is_sharded(model):
        for gradient in gradients:
            gradient.mul_(world())  # FSDP has taken the mean
    elif world() > 1:
        for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
            work.wait()


# --- FSDP2 ------------------------------------------------------------------------------------------------------------


def is_sharded(model) -> bool:
    return hasattr(model, "unshard")


def shard(model, device: torch.device) -> None:
    """Leaves this process a part of each weight. A layer is gathered when it is needed, the rest with the root."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world(),))
    for module in list(model.modules()):
        if type(module).__name__ in (model._no_split_modules or []):  # the layers, as transformers names them
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.within = types.MethodType(lambda self, function, *args: function(self, *args), model)
    register_fsdp_forward_method(model, "within")


def call(model, function, *args):
    """function(model, *args) for functions that use parts of the model rather than its forward: with the weights
    outside the layers gathered, and FSDP's hooks around it."""
    return model.within(function, *args) if is_sharded(model) else function(model, *args)


@contextmanager
def gathered(model):
    """All weights in every process for the length of a rollout: gathered once, and not for every token."""
    if not is_sharded(model):
        yield
        return
    model.within(lambda _: None)  # the root must come first, or each layer takes itself for one
    parts = [m for m in model.modules() if is_sharded(m)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in parts:
        part.set_reshard_after_forward(part is not model, recurse=False)
        part.reshard()


def whole(value):
    """A tensor of all its parts (every process must call this), and anything else as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def whole_weights(model) -> dict[str, Tensor] | None:
    """The state dict of a sharded model, on the CPU of process 0; None for one that is not sharded."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if not is_sharded(model):
        return None
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    once = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once  # loading ties them again
    return {name: weight for name, weight in weights.items() if name not in tied}


def whole_state(optimizer) -> dict:
    """The optimizer's state dict, the same for any number of processes, sharded or not; without tensors but in
    process 0, which writes it."""
    state, parts = optimizer.state_dict(), {}
    for i, values in state["state"].items():
        together = {k: whole(v) for k, v in values.items()}  # one parameter's at a time
        parts[i] = {k: v.cpu() for k, v in together.items()} if rank() == 0 else {}
    return {**state, "state": parts}


def load_state(optimizer, state: dict) -> None:
    """Restores `whole_state`, sharded as the parameters are."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, values in state["state"].items():
        p = parameters[i]
        for k, v in values.items():
            if isinstance(p, DTensor) and v.shape == p.shape:
                values[k] = distribute_tensor(v.to(p.device), p.device_mesh, p.placements)
    optimizer.load_state_dict(state)
