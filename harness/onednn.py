"""float32 products on a CPU by oneDNN, a part of torch, instead of MKL.

MKL uses AVX-512 on Intel's processors only, oneDNN also on AMD's. There the products of a real model take half the
time, forward and backward. With AVX2, both are equally fast. torch itself takes oneDNN for bf16 and int8 only.
"""

import torch
from torch import Tensor, nn

SMALLEST = 2**20  # multiplications; for fewer, the call of oneDNN takes longer than the product


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, without gradients. x [..., K], weight [D, K], bias [D] -> [..., D]"""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class LinearFunction(torch.autograd.Function):
    """The same with gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        g_rows = g.flatten(0, -2)  # [N, D]
        x_rows = x.flatten(0, -2)  # [N, K]
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            linear(g, weight.T) if needs_x else None,
            linear(g_rows.T, x_rows.T) if needs_weight else None,
            g_rows.sum(0) if needs_bias else None,
        )


class OneDnnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        float32_on_cpu = x.dtype == self.weight.dtype == torch.float32 and x.device.type == "cpu"
        if float32_on_cpu and x.numel() * self.out_features >= SMALLEST and not torch.is_autocast_enabled("cpu"):
            return LinearFunction.apply(x, self.weight, self.bias)
        return super().forward(x)


def use(model: nn.Module) -> None:
    """Makes oneDNN compute the linear layers of this model, where torch has it."""
    if torch.backends.mkldnn.is_available():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDnnLinear
