"""A pretended GPU, for machines without one: tensors that say they are on cuda:0 and keep their numbers on the CPU.

    with pretended_gpu(folder) as gpu: ...   # inside, the harness runs "on cuda:0"
    gpu.syncs        # Counter: how often the host would have waited for the GPU, by (line, reason)
    gpu.peak         # bytes of all tensors on the GPU, at the moment when they were most

Real are the program, autograd, and CUDA's autocast, which CPU builds of torch contain. Checked is what a GPU would
refuse: tensors of both devices in one operation, and in a CUDA graph anything that waits for the GPU or computes on the
CPU. A captured graph is a tape: capturing writes into no tensor, and replaying repeats the operations on the same
memory, so a number that Python has put in stays what it was. Not here: kernels, their rounding, streams, time.
"""

import ctypes
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

ROOT = Path(__file__).parent.parent
# The autograd engine asks CUDA for the current stream. CPU builds have no answer; this gives them one, and takes it
# away. torch has made its hooks already and keeps the address, so others are put into their place.
ENGINE = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
struct Hooks final : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::kCUDA> {
  at::Stream getStream(at::Device) const noexcept override { return at::Stream(at::Stream::DEFAULT, {at::kCUDA, 0}); }
};
extern "C" void pretend(bool on) {
  static Guard guard;
  c10::impl::registerDeviceGuard(c10::kCUDA, on ? &guard : nullptr);
  void* hooks = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  on ? new (hooks) Hooks : new (hooks) at::CUDAHooksInterface;
}
"""
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
           "repeat_interleave"}  # fmt: skip


class GpuTensor(torch.Tensor):
    """A tensor that says it is on cuda:0. `numbers` is the tensor on the CPU that holds what is in it."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    __torch_dispatch__ = classmethod(lambda *_: pytest.fail("a pretended tensor is used where no GPU is pretended"))

    @staticmethod
    def __new__(cls, numbers, gpu):
        layout = dict(strides=numbers.stride(), storage_offset=numbers.storage_offset(), dtype=numbers.dtype)
        self = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, device="cuda:0", **layout)
        self.numbers = numbers
        self.gpu = gpu
        gpu.count_user(numbers.untyped_storage(), 1)
        return self

    def __del__(self):
        self.gpu.count_user(self.numbers.untyped_storage(), -1)

    def tolist(self):
        return self.cpu().tolist()


class Graph:
    """Stands for torch.cuda.CUDAGraph: the operations of the captured step, in order."""

    def __init__(self):
        self.tape: list[tuple] = []  # (operation, arguments, keywords, tensor for the result or None: it is written)

    def replay(self) -> None:
        for operation, args, kwargs, result in self.tape:
            new_result = operation(*args, **kwargs)
            if result is not None:
                result.copy_(new_result)


class ByTheCpu(torch.autograd.Function):
    """An operation with the CPU's own forward and backward, where torch would take another way on a GPU."""

    @staticmethod
    def forward(ctx, gpu, operation, options, *tensors):
        ctx.gpu, ctx.operation, ctx.options = gpu, operation, options
        ctx.save_for_backward(*tensors)
        return gpu.compute(operation, tensors, options)

    @staticmethod
    def backward(ctx, gradient):
        def gradients(gradient, *tensors, **options):
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in tensors]
                return torch.autograd.grad(ctx.operation(*leaves, **options), leaves, gradient)

        return None, None, None, *ctx.gpu.compute(gradients, (gradient, *ctx.saved_tensors), ctx.options)


class PretendedGpu(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.syncs: Counter = Counter()
        self.users: Counter = Counter()  # tensors of each storage, by its address
        self.bytes = 0  # of all tensors
        self.peak = 0
        self.graph: Graph | None = None  # that is being captured

    def count_user(self, storage, change: int) -> None:
        before = self.users[storage.data_ptr()]
        self.users[storage.data_ptr()] = before + change
        if before == 0 or before + change == 0:
            self.bytes += change * storage.nbytes()
            self.peak = max(self.peak, self.bytes)

    def wait(self, reason: str) -> None:
        """The host waits for the GPU."""
        if self.graph is not None:
            raise RuntimeError(f"not permitted while a CUDA graph is captured: {reason}")
        frame = sys._getframe(1)
        while frame and Path(frame.f_code.co_filename).parent not in (ROOT, ROOT / "harness"):
            frame = frame.f_back
        line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "elsewhere"
        self.syncs[line, reason] += 1

    @contextmanager
    def capture(self, graph: Graph) -> Iterator[None]:
        self.graph = graph
        yield
        self.graph = None

    def check_indexing(self, name: str, tensor, indices, values=None) -> None:
        """Refuses what CUDA refuses in tensor[indices] and tensor[indices] = values, and counts where it waits."""
        masks = [index for index in indices if index is not None and index.dtype == torch.bool]
        scalar_from_cpu = values is not None and not isinstance(values, GpuTensor)
        if not isinstance(tensor, GpuTensor) or (scalar_from_cpu and values.dim()):
            raise RuntimeError(f"{name}: tensors on cuda:0 and on the CPU")
        if scalar_from_cpu and len(indices) == len(masks) == 1:
            return  # x[mask] = 0 becomes masked_fill
        for _ in masks:
            self.wait("boolean mask")
        if scalar_from_cpu:
            self.wait("scalar from the host")

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = operation._schema.name.rpartition("::")[2]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        from_cpu = [x for x in tensors if not isinstance(x, GpuTensor)]
        device = torch.device(kwargs["device"]).type if kwargs.get("device") else None
        if len(from_cpu) == len(tensors) and device != "cuda":
            if self.graph is not None:
                raise RuntimeError(f"the CPU computes while a CUDA graph is captured: {name}")
            return operation(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), "CompositeImplicitAutograd"):
            with self:
                return operation.decompose(*args, **kwargs)
        to_gpu = device in (None, "cuda")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            self.check_indexing(name, *args[:3])
        elif name in ("_to_copy", "copy_"):
            to_gpu = isinstance(args[0], GpuTensor) if device is None else to_gpu
            source = args[1] if name == "copy_" else args[0]
            if to_gpu != isinstance(source, GpuTensor) and source.numel() > 0:
                self.wait("copy to the GPU" if to_gpu else "copy to the CPU")
        elif name in WAITING:
            self.wait(name)
        elif from_cpu:
            takes_scalars = torch.Tag.pointwise in operation.tags or name in ("fill_", "masked_fill", "masked_fill_")
            if not takes_scalars or any(x.dim() for x in from_cpu):
                raise RuntimeError(f"{name}: tensors on cuda:0 and on the CPU")
        if device:
            kwargs["device"] = torch.device("cpu")
        if to_gpu:
            return self.compute(operation, args, kwargs, operation._schema)
        return operation(*tree_map_only(GpuTensor, lambda x: x.numbers, args), **kwargs)

    def compute(self, operation: Callable, args, kwargs, schema=None):
        """Computes on the numbers, or puts the operation on the tape. The result is on the GPU."""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, GpuTensor)]
        cpu_args, cpu_kwargs = tree_map_only(GpuTensor, lambda x: x.numbers, (args, kwargs))
        writes = schema is not None and schema.is_mutable
        is_view = schema is not None and any(x.alias_info and not x.alias_info.is_write for x in schema.returns)
        with _disable_current_modes():
            result = None if writes and self.graph is not None else operation(*cpu_args, **cpu_kwargs)
        if self.graph is not None and not is_view:
            self.graph.tape.append((operation, cpu_args, cpu_kwargs, None if writes else result))
        if writes:
            return args[0] if schema.returns else None
        # A view of an ordinary tensor is an ordinary tensor, in inference mode too.
        ordinary = is_view and not any(x.is_inference() for x in tensors)
        with torch.inference_mode(torch.is_inference_mode_enabled() and not ordinary):
            return tree_map_only(torch.Tensor, lambda x: GpuTensor(x, self), result)


@contextmanager
def pretended_gpu(folder: Path) -> Iterator[PretendedGpu]:
    """folder: holds the compiled engine, which is used again. Skips the test where it cannot work."""
    library = folder / "pretended-gpu.so"
    if torch.version.cuda or not shutil.which("g++"):
        pytest.skip("the pretended GPU needs g++, and a build of torch without CUDA")
    if not library.exists():
        command = ["g++", "-std=c++20", "-shared", "-fPIC", "-x", "c++", "-", f"-I{torch.__path__[0]}/include"]
        command += [f"-L{torch.__path__[0]}/lib", "-lc10", "-ltorch_cpu", "-o", str(library)]
        subprocess.run(command, input=ENGINE, text=True, check=True)

    gpu = PretendedGpu()
    attention, silu = functional.scaled_dot_product_attention, functional.silu
    save, save_pretrained = torch.save, PreTrainedModel.save_pretrained

    def attention_on_gpu(*tensors, **options):
        if not isinstance(tensors[0], GpuTensor):
            return attention(*tensors, **options)
        if torch.is_autocast_enabled("cuda"):
            tensors = [x.to(torch.get_autocast_dtype("cuda")) for x in tensors]
        return ByTheCpu.apply(gpu, attention, options, *tensors)

    def silu_on_gpu(x, inplace=False):
        return ByTheCpu.apply(gpu, silu, {}, x) if isinstance(x, GpuTensor) else silu(x)

    def save_from_gpu(value, *args):
        return save(tree_map_only(GpuTensor, lambda x: x.cpu(), value), *args)

    def save_pretrained_from_gpu(model, path, state_dict=None, **options):
        weights = state_dict or dict(model.named_parameters())
        weights = {name: p.detach().cpu() for name, p in weights.items()}
        return save_pretrained(model, path, state_dict=weights, **options)

    answers = {"is_available": True, "device_count": 1, "current_device": 0, "_lazy_init": None,
               "is_bf16_supported": True, "mem_get_info": (2**36, 2**36), "reset_peak_memory_stats": None}  # fmt: skip
    cuda = {name: lambda *_, answer=answer: answer for name, answer in answers.items()}
    cuda |= {"max_memory_allocated": lambda *_: gpu.peak, "synchronize": lambda *_: gpu.wait("synchronize")}
    lift = torch._C._set_only_lift_cpu_tensors  # so that torch.tensor(..., device="cuda") can be seen
    switches = [ctypes.CDLL(str(library)).pretend, lift, torch.__future__.set_swap_module_params_on_conversion]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**cuda, "CUDAGraph": Graph, "graph": gpu.capture}.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(functional, "scaled_dot_product_attention", attention_on_gpu)
        patch.setattr(functional, "silu", silu_on_gpu)
        patch.setattr(torch, "save", save_from_gpu)
        patch.setattr(PreTrainedModel, "save_pretrained", save_pretrained_from_gpu)
        try:
            for switch in switches:
                switch(True)
            with torch.autograd.set_multithreading_enabled(False), gpu:
                yield gpu
        finally:
            for switch in switches:
                switch(False)
