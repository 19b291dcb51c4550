"""Running a transformers model in parts: the decoder with its key-value cache, and the head on its own.

common.py builds sampling and log-probs from these. A reader of the methods can skip them: they are here because models
keep their caches in different ways, and because all logits of a batch would not fit into memory.

Letters in the shapes: n sequences or tokens, k new tokens of each, Q prompts, P prompt tokens, N tokens; D hidden size,
V vocabulary.
"""

import functools
import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# How many logits (tokens x vocabulary) exist at a time. Large matrix products are faster, above all on a GPU.
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}
# Products with smaller weights are not worth a call of oneDNN.
ONEDNN_ELEMENTS = 2**18
# The key-value cache of `sample` gets memory for this many new tokens at a time. More costs a small model time, because
# the system hands out new memory page by page.
ROOM = 16


def autocast(device: torch.device) -> AbstractContextManager:
    """bf16 arithmetic on a GPU, float32 elsewhere. The weights stay float32: at a learning rate of 1e-6 a step of AdamW
    is smaller than half the distance between two bf16 numbers, so most bf16 weights would not move."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


# --- matrix products on a CPU -----------------------------------------------------------------------------------------


@functools.cache
def has_onednn() -> bool:
    """Whether oneDNN, which is a part of torch, may be faster than MKL, which torch uses for products in float32: MKL
    leaves half of AVX-512 unused on processors that are not Intel's. Its operator is not a public one of torch."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class OneDNNProduct(torch.autograd.Function):
    """x [..., D], weight [V, D], bias [V] or None -> x W^T + b [..., V], float32 on a CPU."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        rows = g.flatten(0, -2)
        d_x = linear(g, weight.t()) if ctx.needs_input_grad[0] else None
        d_weight = linear(rows.t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        d_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return d_x, d_weight, d_bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear, by oneDNN where that is faster."""
    is_float32 = x.dtype == weight.dtype == torch.float32
    if x.device.type == "cpu" and is_float32 and weight.numel() >= ONEDNN_ELEMENTS and has_onednn():
        return OneDNNProduct.apply(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


class Linear(torch.nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def use_onednn(model) -> None:
    """From here on, the model's linear layers call `linear`. Its weights and their names stay the same."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Linear


# --- the decoder and its key-value cache ------------------------------------------------------------------------------


@functools.cache
def keys_like_values(cache_class):
    """This class of cache, holding keys in the type of the values. Under autocast, rotary embeddings leave the keys in
    float32 and the values in bf16: a StaticCache cannot hold both, and other caches would grow by half."""

    class Cache(cache_class):  # type: ignore[misc, valid-type]
        def update(self, keys, values, *args, **options):
            return super().update(keys.to(values.dtype), values, *args, **options)

    return Cache


@functools.cache
def growing_layer():
    """A class that holds what transformers' DynamicLayer holds, in buffers with room for the next tokens. DynamicLayer
    copies all keys and values for every new token: a third of the time at 100 tokens, and more later."""
    from transformers.cache_utils import DynamicLayer

    def with_room(tensor: Tensor) -> Tensor:
        """A buffer that begins with this tensor. [n, heads, tokens, d] -> [n, heads, tokens + ROOM, d]"""
        n, heads, tokens, d = tensor.shape
        buffer = tensor.new_empty(n, heads, tokens + ROOM, d)
        buffer[:, :, :tokens] = tensor
        return buffer

    class GrowingLayer(DynamicLayer):
        key_buffer: Any = None  # Tensor, once it is needed
        value_buffer: Any = None

        def update(self, key_states, value_states, *args, **options):
            if self.key_buffer is None:  # the next rows may be others, so it is too early for buffers
                self.key_buffer, self.value_buffer = super().update(key_states, value_states)
                return self.keys, self.values
            start = self.get_seq_length()
            end = start + key_states.shape[2]
            if end > self.key_buffer.shape[2]:
                self.key_buffer = with_room(self.keys)  # type: ignore[arg-type]
                self.value_buffer = with_room(self.values)  # type: ignore[arg-type]
            self.key_buffer[:, :, start:end] = key_states
            self.value_buffer[:, :, start:end] = value_states
            self.keys = self.key_buffer[:, :, :end]
            self.values = self.value_buffer[:, :, :end]
            return self.keys, self.values

        def reorder_cache(self, beam_idx):
            super().reorder_cache(beam_idx)  # copies the tokens of these rows, without the room
            self.key_buffer = None
            self.value_buffer = None

    return GrowingLayer


def new_cache(model):
    """An empty key-value cache, through which gradients flow."""
    from transformers import DynamicCache

    return keys_like_values(DynamicCache)(config=model.config)


def growing_cache(model):
    """An empty key-value cache for decoding without gradients. Its full-attention layers grow in place. Others, such as
    sliding windows and linear attention, stay as transformers made them, because they hold a fixed number of states."""
    from transformers.cache_utils import DynamicLayer

    cache = new_cache(model)
    cache.layers = [growing_layer()() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@functools.cache
def cache_argument(decoder_class) -> str:
    """What forward() calls its cache: since transformers 5.24 `cache` instead of `past_key_values`."""
    return "cache" if "cache" in inspect.signature(decoder_class.forward).parameters else "past_key_values"


def hidden_states(model, cache, ids: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
    """The decoder's last hidden states [n, k, D] of the new tokens ids [n, k]; the cache grows by them.
    attention [n, all tokens so far], 0 on padding; positions [n, k]."""
    inputs = {"input_ids": ids, "attention_mask": attention, "position_ids": positions, "use_cache": True}
    inputs[cache_argument(model.base_model.__class__)] = cache
    return model.base_model(**inputs).last_hidden_state


def prefill(model, cache, prompt_ids: Tensor, prompt_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Fills an empty cache with prompts [Q, P] of these lengths [Q]. It moves their padding to the left, so that all
    end in the same column. Returns their last hidden states [Q, D], and their attention [Q, P], 0 on padding."""
    P = int(prompt_lengths.max())
    positions = torch.arange(P, device=prompt_ids.device) - (P - prompt_lengths[:, None])  # [Q, P] negative on padding
    attention = (positions >= 0).long()
    positions = positions.clamp(min=0)
    ids = prompt_ids.gather(1, positions)
    return hidden_states(model, cache, ids, attention, positions)[:, -1], attention


def shares_prompts(model) -> bool:
    """Whether a prompt can run once for all its completions, with gradients: the model keeps keys and values alone.
    Linear attention overwrites its state in place, and gradient checkpointing turns the cache off."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    layers = DynamicCache(config=model.config).layers
    keeps_all = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    return keeps_all and not checkpointing


# --- the head: from hidden states to log-probs ------------------------------------------------------------------------


def head_factors(model) -> tuple[float, float | None]:
    """What some model families do after their head: a scale (Cohere's logit_scale, Granite's 1 / logits_scaling), then
    a soft cap (Gemma-2's final_logit_softcapping; None if there is none)."""
    config = model.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return scale, getattr(config, "final_logit_softcapping", None)


def logits_and_slope(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None, temperature: float
) -> tuple[Tensor, Tensor | None]:
    """Logits after scale, soft cap and temperature, float32 [N, V]; and the slope of the soft cap there, if any [N, V].
    hidden [N, D], weight [V, D], bias [V] or None."""
    z = linear(hidden, weight, bias).float()
    slope = None
    if scale != 1.0:
        z.mul_(scale)
    if cap:
        z.div_(cap).tanh_()
        slope = z.square().neg_().add_(1)
        z.mul_(cap)
    if temperature != 1.0:
        z.div_(temperature)
    return z, slope


def head_logits(model, hidden: Tensor, temperature: float = 1.0) -> Tensor:
    """Logits divided by the temperature, float32 [N, V], from the decoder's last hidden states [N, D]."""
    head = model.get_output_embeddings()
    return logits_and_slope(hidden, head.weight, getattr(head, "bias", None), *head_factors(model), temperature)[0]


class HeadLogprobs(torch.autograd.Function):
    """hidden [N, D], targets [N] -> log-prob of each target, and entropy (None if not wanted): two [N], differentiable.

        log p = z - logsumexp(z)            z: the logits, after scale, soft cap and temperature
        H     = -sum_v p log p
        dL/dz = g (onehot - p) - g_H p (log p + H)                  g, g_H: gradients of the log-prob and of the entropy

    weight [V, D], bias [V] or None. Works on chunks of tokens, and computes their logits again in the backward pass. So
    only a few chunks of logits exist at a time, and never tokens x vocabulary.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, cap, temperature, with_entropy):
        ctx.set_materialize_grads(False)  # an unused output has the gradient None, which costs nothing
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.factors = (scale, cap, temperature)
        size = max(1, CHUNK_ELEMENTS[device] // len(weight))  # tokens
        ctx.chunks = [slice(start, start + size) for start in range(0, len(hidden), size)]
        logprob = torch.empty(len(hidden), device=hidden.device)
        logsumexp = torch.empty_like(logprob)
        entropy = torch.empty_like(logprob) if with_entropy else None
        with torch.autocast(device, enabled=False):
            weight_lowp = weight.to(ctx.dtype)
            bias_lowp = None if bias is None else bias.to(ctx.dtype)
            for chunk in ctx.chunks:
                z, _ = logits_and_slope(hidden[chunk].to(ctx.dtype), weight_lowp, bias_lowp, *ctx.factors)
                logsumexp[chunk] = z.logsumexp(-1)
                logprob[chunk] = z.gather(1, targets[chunk, None]).squeeze(1) - logsumexp[chunk]
                if entropy is not None:
                    log_p = z.sub_(logsumexp[chunk, None])
                    p = log_p.exp()
                    log_p.clamp_(min=-1e30)  # log p may be -inf, and 0 * -inf would be NaN
                    entropy[chunk] = -torch.einsum("nv,nv->n", p, log_p)
        ctx.save_for_backward(hidden, weight, bias, targets, logsumexp, entropy)
        return logprob, entropy

    @staticmethod
    def backward(ctx, g_logprob, g_entropy):
        hidden, weight, bias, targets, logsumexp, entropy = ctx.saved_tensors
        scale, _, temperature = ctx.factors
        d_hidden = torch.zeros_like(hidden)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # None: the head is frozen
        d_bias = None if bias is None else torch.zeros_like(bias)
        g_logprob = torch.zeros_like(logsumexp) if g_logprob is None else g_logprob
        weight_lowp = weight.to(ctx.dtype)
        bias_lowp = None if bias is None else bias.to(ctx.dtype)
        for chunk in ctx.chunks:
            h = hidden[chunk].to(ctx.dtype)
            g = g_logprob[chunk, None]
            z, slope = logits_and_slope(h, weight_lowp, bias_lowp, *ctx.factors)
            log_p = z.sub_(logsumexp[chunk, None])
            if g_entropy is None:
                dz = log_p.exp_().mul_(-g)  # -g p
            else:
                p = log_p.exp()
                log_p_plus_H = log_p.clamp_(min=-1e30).add_(entropy[chunk, None])
                dz = log_p_plus_H.mul_(g_entropy[chunk, None]).add_(g).mul_(p).neg_()  # -p (g + g_H (log p + H))
            dz.scatter_add_(1, targets[chunk, None], g)  # g onehot
            # Back through temperature, soft cap and scale: from z to y = hidden W^T + b.
            dy = dz if scale == temperature else dz.mul_(scale / temperature)
            if slope is not None:
                dy.mul_(slope)
            dy = dy.to(ctx.dtype)
            d_hidden[chunk] = linear(dy, weight_lowp.t()).to(d_hidden.dtype)
            if d_weight is not None and ctx.dtype == d_weight.dtype:
                d_weight.addmm_(dy.T, h)  # without a second tensor of this size; it needs equal types
            elif d_weight is not None:
                d_weight += dy.T @ h
            if d_bias is not None:
                d_bias += dy.sum(0)
        return d_hidden, d_weight, d_bias, None, None, None, None, None


def head_logprobs(
    model, hidden: Tensor, targets: Tensor, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each target [N] and, if wanted, the entropy of its distribution [N], from the decoder's last hidden
    states [N, D]. Differentiable."""
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    return HeadLogprobs.apply(hidden, head.weight, bias, targets, *head_factors(model), temperature, with_entropy)
