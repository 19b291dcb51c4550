"""Sampling with fixed shapes, for CUDA graphs (--cuda-graphs): the same samples as common.sample.

Every row has its own line, from the first token to the last, in a cache of full size. Because nothing changes shape, a
decoding step can be captured once as a CUDA graph and then replayed, which saves launching its kernels one by one.
"""

import torch
from torch import Tensor

import common
from common import Rollout


def supported(model) -> bool:
    """Whether the model can decode with fixed shapes: not with sliding windows, and only with torch's own attention."""
    from transformers import DynamicCache

    sliding = any(getattr(layer, "is_sliding", False) for layer in DynamicCache(config=model.config).layers)
    return model.config._attn_implementation == "sdpa" and not sliding


@torch.no_grad()
def sample(
    model,
    prompts: list[list[int]],
    group_size: int,
    max_new_tokens: int,
    eos_ids: list[int],
    uniforms: Tensor | None,
    temperature: float = 1.0,
) -> Rollout:
    """common.sample with fixed shapes, and common.sample itself where the model does not support them."""
    if not supported(model):
        return common.sample(model, prompts, group_size, max_new_tokens, eos_ids, uniforms, temperature)
    from transformers import StaticCache

    model.eval()
    T = max_new_tokens
    rollout = common.empty_rollout(prompts, group_size, T, model.device)
    uniforms = None if uniforms is None else uniforms.to(model.device)
    eos = torch.tensor(eos_ids, device=model.device)

    with common.autocast(model.device), torch.inference_mode():
        prefilled, attention, hidden = common.prefill(model, prompts, T)
        B = len(rollout)
        P = attention.shape[1] - T
        row_index = torch.arange(B, device=model.device)
        hidden = hidden[rollout.group]  # [B, D]
        cache = StaticCache(config=model.config, max_cache_len=P + T)
        for i, layer in enumerate(prefilled.layers):
            cache.update(layer.keys[rollout.group], layer.values[rollout.group], i)
        visible = torch.zeros(B, 1, 1, P + T, dtype=torch.bool, device=model.device)
        visible[:, 0, 0, :P] = attention[rollout.group, :P] > 0
        t = torch.zeros(1, dtype=torch.long, device=model.device)  # a tensor: a graph runs no Python

        def step() -> None:
            """Draws token t of every row, writes it down, and runs the decoder on it. All of it in place."""
            uniform = None if uniforms is None else uniforms.index_select(1, t).squeeze(1)
            token, logprob, entropy = common.next_token(model, hidden, row_index, uniform, temperature)
            alive = (~rollout.finished).float()
            rollout.completion_ids.index_copy_(1, t, token[:, None])
            rollout.mask.index_copy_(1, t, alive[:, None])
            rollout.logprobs.index_copy_(1, t, (logprob * alive)[:, None])
            rollout.entropy.index_copy_(1, t, (entropy * alive)[:, None])
            rollout.finished.logical_or_(torch.isin(token, eos))
            visible.index_fill_(3, P + t, True)
            positions = (rollout.prompt_lengths + t)[:, None]
            hidden.copy_(common.last_hidden(model, cache, token[:, None], visible, positions))
            t.add_(1)

        step()  # not captured: it also fills autocast's cache of bf16 weights, which the graph then reads
        advance = step
        if model.device.type == "cuda" and T > 1:
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                step()
            advance = graph.replay
        for n in range(1, T):
            if n % 16 == 0 and bool(rollout.finished.all()):  # not at every step: it waits for the GPU
                break
            advance()
    return rollout
