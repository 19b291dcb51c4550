"""float32 products on a CPU by oneDNN, a part of torch, instead of MKL.

MKL uses AVX-512 on Intel's processors only, oneDNN also on AMD's. There the products of a real model take half the
time, forward and backward. With AVX2, both are equally fast. torch itself takes oneDNN for bf16 and int8 only.
"""

import torch
from torch import Tensor, nn

SMALLEST = 2**20  # multiplications; for fewer, the call of oneDNN takes longer than the product


def can_multiply(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is there for x [..., K] times weight [D, K], and the product is large enough to gain."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() * len(weight) >= SMALLEST
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias by oneDNN, without gradients. x [..., K], weight [D, K], bias [D] -> [..., D]"""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Product(torch.autograd.Function):
    """The same with gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        g_rows = g.flatten(0, -2)  # [N, D]
        x_rows = x.flatten(0, -2)  # [N, K]
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(g, weight.T) if needs_x else None,
            product(g_rows.T, x_rows.T) if needs_weight else None,
            g_rows.sum(0) if needs_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear, by oneDNN where it can."""
    if can_multiply(x, weight):
        return Product.apply(x, weight, bias)
    return nn.functional.linear(x, weight, bias)


class OneDnnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def use(model: nn.Module) -> None:
    """Makes oneDNN compute the linear layers of this model."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDnnLinear
