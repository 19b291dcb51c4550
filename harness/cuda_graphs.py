"""The two places where speed is worth less readable code; common.py calls each in one line, and tests compare each
with the plain way: the log-probs of a large vocabulary, and decoding with fixed shapes for CUDA graphs."""

import torch
from torch import Tensor


class HeadLogprobs(torch.autograd.Function):
    """hidden [N, D], targets [N] -> log-prob of the targets and entropy, two [N], both differentiable.

    Works on chunks of tokens and computes their logits again in the backward pass, so that one chunk's logits (and
    what is made of them in place) are all that ever exists of tokens x vocabulary. Autograd's checkpoint does the same
    with several such buffers a chunk, and a fresh weight gradient for each.

        log p = z - logsumexp(z),   H = -sum_v p log p
        d/dz  = g_logp (onehot - p) - g_H p (log p + H)          chained through temperature, soft cap and scale
    """

    @staticmethod
    def logits(ctx, hidden, weight, bias):  # [n, V] in float32 over temperature, and the slope of the soft cap
        z = torch.nn.functional.linear(hidden, weight, bias).float()
        z = z.mul_(ctx.scale) if ctx.scale != 1.0 else z
        slope = None
        if ctx.cap:
            z.div_(ctx.cap).tanh_()
            slope = 1 - z * z
            z.mul_(ctx.cap)
        return z.div_(ctx.temperature) if ctx.temperature != 1.0 else z, slope

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, scale, cap, chunk):
        ctx.set_materialize_grads(False)  # no gradient for the entropy means no work for it
        ctx.temperature, ctx.scale, ctx.cap, ctx.chunk = temperature, scale, cap, chunk
        kind = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        N = len(hidden)
        logp, entropy, norm = (torch.empty(N, device=hidden.device) for _ in range(3))
        with torch.autocast(kind, enabled=False):
            low, low_bias = weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
            for part in (slice(i, i + chunk) for i in range(0, N, chunk)):
                z, _ = HeadLogprobs.logits(ctx, hidden[part].to(ctx.dtype), low, low_bias)
                norm[part] = z.logsumexp(-1)
                logp[part] = z.gather(1, targets[part, None]).squeeze(1) - norm[part]
                z.sub_(norm[part, None])
                entropy[part] = -torch.einsum("nv,nv->n", z.exp(), z.clamp_(min=-1e30))  # 0 log 0 is 0
        ctx.save_for_backward(hidden, weight, bias, targets, norm, entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, g_logp, g_entropy):
        hidden, weight, bias, targets, norm, entropy = ctx.saved_tensors
        d_hidden, d_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        d_bias = None if bias is None else torch.zeros_like(bias)
        g_logp = torch.zeros_like(norm) if g_logp is None else g_logp
        low, low_bias = weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
        for part in (slice(i, i + ctx.chunk) for i in range(0, len(hidden), ctx.chunk)):
            h, g = hidden[part].to(ctx.dtype), g_logp[part, None]
            z, slope = HeadLogprobs.logits(ctx, h, low, low_bias)
            z.sub_(norm[part, None])  # log p
            if g_entropy is None:
                z.exp_().mul_(-g)
            else:
                p = z.exp()
                z.clamp_(min=-1e30).add_(entropy[part, None]).mul_(g_entropy[part, None]).add_(g).mul_(p).neg_()
            z.scatter_add_(1, targets[part, None], g)
            z = z.mul_(ctx.scale / ctx.temperature) if ctx.scale != ctx.temperature else z
            z = (z if slope is None else z.mul_(slope)).to(ctx.dtype)
            d_hidden[part] = (z @ low).to(d_hidden.dtype)
            if ctx.dtype == d_weight.dtype:
                d_weight.addmm_(z.T, h)
            else:
                d_weight += z.T @ h
            if bias is not None:
                d_bias += z.sum(0)
        return d_hidden, d_weight, d_bias, None, None, None, None, None


def decode_fixed(model, r, hidden: Tensor, prefilled, attend: Tensor, uniforms, eos: Tensor, draw) -> None:
    """common.sample's loop with one line a row and a cache of full size. Nothing changes shape, so on a GPU a step is
    captured as a CUDA graph and replayed, which saves the launches that decoding otherwise waits for. Fills in `r`.

    r: a common.Rollout with zeros; hidden: [Q, D] of the last prompt token; prefilled: the prompts' cache;
    attend: [Q, P]; draw(model, hidden, node, uniforms) -> token, log-prob, entropy.
    """
    from transformers import StaticCache

    (B, T), P = r.mask.shape, attend.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=P + T)
    for i, layer in enumerate(prefilled.layers):
        cache.update(layer.keys[r.group], layer.values[r.group], i)
    visible = torch.zeros(B, 1, 1, P + T, dtype=torch.bool, device=attend.device)
    visible[:, 0, 0, :P] = attend[r.group] > 0
    hidden, t = hidden[r.group], torch.zeros(1, dtype=torch.long, device=attend.device)
    every = torch.arange(B, device=attend.device)

    def step() -> None:
        uniform = None if uniforms is None else uniforms.index_select(1, t).squeeze(1)
        token, logprob, entropy = draw(model, hidden, every, uniform)
        alive = (~r.finished).float()
        r.completion_ids.index_copy_(1, t, token[:, None])
        r.mask.index_copy_(1, t, alive[:, None])
        r.logprobs.index_copy_(1, t, (logprob * alive)[:, None])
        r.entropy.index_copy_(1, t, (entropy * alive)[:, None])
        r.finished.logical_or_(torch.isin(token, eos))
        visible.index_fill_(3, P + t, True)
        output = model.base_model(
            input_ids=token[:, None], attention_mask=visible, position_ids=(r.prompt_lengths + t)[:, None],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        hidden.copy_(output.last_hidden_state[:, -1])
        t.add_(1)

    step()  # outside the graph: it also fills autocast's cache of bf16 weights, which the graph then reads
    advance = step
    if attend.is_cuda and T > 1:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            step()
        advance = graph.replay
    for n in range(1, T):
        if n % 16 == 0 and bool(r.finished.all()):  # seldom, because asking waits for the GPU
            break
        advance()
