"""Sampling with fixed shapes, for CUDA graphs (--cuda-graphs): the same samples as common.sample.

Every row has its own line, from the first token to the last, in a cache of full size. Because nothing changes shape, a
decoding step can be captured once as a CUDA graph and then replayed, which saves launching its kernels one by one.
"""

import torch
from torch import Tensor

import common
from common import Rollout
from harness import decoder


def supported(model) -> bool:
    """Whether the model can decode with fixed shapes: only with full attention in every layer, computed by torch."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    full_attention = all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    return model.config._attn_implementation == "sdpa" and full_attention


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
    greedy = uniforms is None
    uniforms = torch.zeros_like(rollout.mask) if uniforms is None else uniforms.to(model.device)  # [B, T]
    eos = torch.tensor(eos_ids, device=model.device)

    with decoder.autocast(model.device), torch.inference_mode():
        B = len(rollout)
        prompt_cache = decoder.growing_cache(model)
        prompt_ids = rollout.prompt_ids[::group_size]
        last, attention = decoder.prefill(model, prompt_cache, prompt_ids, rollout.prompt_lengths[::group_size])
        P = attention.shape[1]
        hidden = last[rollout.group]  # [B, D]
        cache = decoder.keys_like_values(StaticCache)(config=model.config, max_cache_len=P + T)
        for i, layer in enumerate(prompt_cache.layers):
            cache.update(layer.keys[rollout.group], layer.values[rollout.group], i)
        visible = torch.zeros(B, 1, 1, P + T, dtype=torch.bool, device=model.device)
        visible[:, 0, 0, :P] = attention[rollout.group] > 0
        t = torch.zeros(1, dtype=torch.long, device=model.device)  # a tensor: a graph runs no Python

        def step() -> None:
            """Draws token t of every row, writes it down, and runs the decoder on it. All of it in place."""
            uniform = uniforms.index_select(1, t)
            # token, logprob [B, 1]; entropy [B]
            token, logprob, entropy = common.next_token(model, hidden, uniform, temperature, greedy)
            alive = (~rollout.finished).float()[:, None]
            rollout.completion_ids.index_copy_(1, t, token)
            rollout.mask.index_copy_(1, t, alive)
            rollout.logprobs.index_copy_(1, t, logprob * alive)
            rollout.entropy.index_copy_(1, t, entropy[:, None] * alive)
            rollout.finished.logical_or_(torch.isin(token[:, 0], eos))
            visible.index_fill_(3, P + t, True)
            positions = (rollout.prompt_lengths + t)[:, None]
            hidden.copy_(decoder.hidden_states(model, cache, token, visible, positions)[:, -1])
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
