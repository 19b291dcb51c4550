"""What every method shares, in the order in which data flows: rollouts, the model's head, sampling, log-probs, means.

    sample           prompts -> Rollout: completions with their mask, log-probs and entropy
    token_logprobs   log-probs (and entropy) of given completions, with gradients
    loss_weights     factors that turn a plain sum over tokens into the mean that a method wants
    clip_fractions   which tokens get no gradient, because the ratio was clipped

This file knows no method, no reward, no data set and no other process. It needs torch and transformers only. Shapes:
Q prompts, G completions of each, B = Q * G rows, P prompt tokens, T completion tokens, D hidden size, V vocabulary;
N tokens, n nodes, b of the rows. Log-probs and entropies are in nats, at the sampling temperature.
"""

import functools
import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}  # logits (tokens x vocabulary) at a time; a GPU wants large products
COMPACT_BELOW = 0.9  # if a smaller share of the batch is still needed, the rest is removed; moving the cache costs time


@dataclass
class Rollout:
    """B completions. The padding of `completion_ids` may hold any id: `mask` alone says which tokens are real."""

    prompt_ids: Tensor  # [B, P] right-padded
    prompt_lengths: Tensor  # [B] tokens
    completion_ids: Tensor  # [B, T] right-padded; T is max_new_tokens
    mask: Tensor  # [B, T] 1.0 up to and including EOS, else 0.0
    logprobs: Tensor  # [B, T] log-prob of each token when it was sampled
    entropy: Tensor  # [B, T] entropy of the distribution that the token was drawn from, over the whole vocabulary
    finished: Tensor  # [B] True: ended by EOS; False: cut off at T
    group: Tensor  # [B] index of the row's prompt
    rewards: Tensor  # [B] zeros until the caller fills them in
    texts: list[dict]  # B times {"question", "answer", "completion", ...}; empty until the caller fills it in

    def __len__(self) -> int:
        return len(self.group)

    def completion_lengths(self) -> Tensor:
        """Tokens of each completion, EOS included. [B]"""
        return self.mask.sum(1)

    def select(self, rows: Tensor) -> "Rollout":
        """The Rollout of these rows: indices, or a boolean mask over B."""
        if rows.dtype == torch.bool:
            rows = rows.nonzero().squeeze(1)
        tensors = {name: getattr(self, name)[rows] for name in TENSOR_FIELDS}
        return Rollout(**tensors, texts=[self.texts[i] for i in rows.tolist()] if self.texts else [])


TENSOR_FIELDS = [field.name for field in fields(Rollout) if field.name != "texts"]


def concatenate(rollouts: list[Rollout]) -> Rollout:
    """One Rollout of several with the same T. Group numbers are shifted, so that different prompts stay different."""
    width = max(rollout.prompt_ids.shape[1] for rollout in rollouts)
    parts: list[Rollout] = []
    for rollout in rollouts:
        prompt_ids = torch.nn.functional.pad(rollout.prompt_ids, (0, width - rollout.prompt_ids.shape[1]))
        first_group = int(parts[-1].group.max()) + 1 if parts else 0
        parts.append(replace(rollout, prompt_ids=prompt_ids, group=rollout.group + first_group))
    tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in TENSOR_FIELDS}
    return Rollout(**tensors, texts=[text for part in parts for text in part.texts])


def autocast(device: torch.device) -> AbstractContextManager:
    """bf16 arithmetic on a GPU, float32 elsewhere. The weights stay float32: at a learning rate of 1e-6 a step of AdamW
    is smaller than half the distance between two bf16 numbers, so most bf16 weights would not move."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


# --- the head: from hidden states to logits ---------------------------------------------------------------------------


def head_factors(model) -> tuple[float, float | None]:
    """What some model families do after their head: a scale (Cohere's logit_scale, Granite's 1 / logits_scaling), then
    a soft cap (Gemma-2's final_logit_softcapping; None if there is none)."""
    config = model.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return scale, getattr(config, "final_logit_softcapping", None)


def head_logits(model, hidden: Tensor, temperature: float = 1.0) -> Tensor:
    """Logits divided by the temperature, float32 [N, V], from the decoder's last hidden states [N, D]."""
    head = model.get_output_embeddings()
    return HeadLogprobs.logits(hidden, head.weight, getattr(head, "bias", None), *head_factors(model), temperature)[0]


# --- sampling ---------------------------------------------------------------------------------------------------------


def inverse_cdf(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds a random number in [0, 1).
    probs [n, V], which it overwrites; uniforms [n, G] -> token ids [n, G]: G draws from each line of probs. Each draw
    has a number of its own, so a sample does not depend on the others."""
    cdf = probs.cumsum_(-1)  # on CUDA, cumsum can change in its last bit, so a run may not repeat exactly
    threshold = uniforms * cdf[:, -1:]  # the last entry is 1, except for rounding
    # right=True never takes a token of probability 0
    return torch.searchsorted(cdf, threshold, right=True).clamp(max=probs.shape[1] - 1)


def next_token(model, hidden: Tensor, uniforms: Tensor, temperature: float, greedy: bool) -> tuple[Tensor, ...]:
    """G draws of each node's next token [n, G], their log-probs [n, G], and the entropy of the node's distribution [n].

    hidden [n, D], last hidden state of each node (see `sample`); uniforms [n, G]; greedy: all draws are the most
    probable token. Works on chunks of nodes, so at most two float32 tensors of chunk x vocabulary exist at a time.
    """
    size = max(1, CHUNK_ELEMENTS[hidden.device.type] // len(model.get_output_embeddings().weight))  # nodes
    parts = []
    for h, u in zip(hidden.split(size), uniforms.split(size), strict=True):
        logprobs = head_logits(model, h, temperature).log_softmax(-1)
        token = logprobs.argmax(-1, keepdim=True).expand_as(u) if greedy else inverse_cdf(logprobs.exp(), u)
        logprob = logprobs.gather(1, token)
        entropy = torch.special.entr(logprobs.exp_()).sum(-1)  # entr(p) = -p log p
        parts.append((token, logprob, entropy))
        del logprobs  # before the next chunk
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def empty_rollout(prompts: list[list[int]], group_size: int, max_new_tokens: int, device: torch.device) -> Rollout:
    """The Rollout of these prompts before the first token is sampled: all of it is padding."""
    B = len(prompts) * group_size
    group = torch.arange(B, device=device) // group_size
    P = max(len(prompt) for prompt in prompts)
    prompt_ids = torch.tensor([prompt + [0] * (P - len(prompt)) for prompt in prompts], device=device)
    return Rollout(
        prompt_ids=prompt_ids[group],
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts], device=device)[group],
        completion_ids=torch.zeros(B, max_new_tokens, dtype=torch.long, device=device),
        mask=torch.zeros(B, max_new_tokens, device=device),
        logprobs=torch.zeros(B, max_new_tokens, device=device),
        entropy=torch.zeros(B, max_new_tokens, device=device),
        finished=torch.zeros(B, dtype=torch.bool, device=device),
        group=group,
        rewards=torch.zeros(B, device=device),
        texts=[],
    )


@functools.cache
def keys_like_values(cache_class):
    """This class of cache, holding keys in the type of the values. Under autocast, rotary embeddings leave the keys in
    float32 beside bf16 values: a StaticCache cannot hold both, and other caches would grow by half."""

    class Cache(cache_class):  # type: ignore[misc, valid-type]
        def update(self, keys, values, *args, **options):
            return super().update(keys.to(values.dtype), values, *args, **options)

    return Cache


def prefill(model, prompts: list[list[int]], max_new_tokens: int):
    """Runs the decoder on the prompts, padded on the left, so that all end in the same column. Returns their key-value
    cache, the attention mask [Q, P + T] (0 on padding, 1 on all tokens to come), and the last hidden state [Q, D]."""
    from transformers import DynamicCache

    cache = keys_like_values(DynamicCache)(config=model.config)
    P = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (P - len(prompt)) + prompt for prompt in prompts], device=model.device)
    is_token = [[0] * (P - len(prompt)) + [1] * (len(prompt) + max_new_tokens) for prompt in prompts]
    attention = torch.tensor(is_token, device=model.device)
    positions = (attention[:, :P].cumsum(1) - 1).clamp(min=0)
    return cache, attention, last_hidden(model, cache, ids, attention[:, :P], positions)


def last_hidden(model, cache, ids: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
    """Hidden state [n, D] after the new tokens ids [n, k]; the cache grows by them. attention [n, tokens so far]."""
    inputs = {"input_ids": ids, "attention_mask": attention, "position_ids": positions, "use_cache": True}
    inputs[cache_argument(model.base_model.__class__)] = cache
    return model.base_model(**inputs).last_hidden_state[:, -1]


@functools.cache
def cache_argument(decoder_class) -> str:
    """What forward() calls its cache: since transformers 5.24 `cache` instead of `past_key_values`."""
    return "cache" if "cache" in inspect.signature(decoder_class.forward).parameters else "past_key_values"


@torch.no_grad()
def sample(
    model, prompts: list[list[int]], group_size: int, max_new_tokens: int, eos_ids: list[int],
    uniforms: Tensor | None, temperature: float = 1.0,
) -> Rollout:  # fmt: skip
    """Samples `group_size` completions of every prompt from the model's distribution at `temperature`. It ignores the
    model's generation_config (top-k, top-p, penalties), because the loss must use the distribution that was sampled.

    prompts: Q lists of token ids. uniforms: [Q * group_size, max_new_tokens], random numbers in [0, 1) that decide
    every token; None takes the most probable token instead.

    A row is a completion; a node is one sequence of the batch that the decoder runs. Rows of one prompt share a node
    while they have drawn the same tokens. So the batch starts with Q nodes and grows to the number of different
    unfinished completions, which is small where the policy is sure.
    """
    model.eval()  # in training mode, gradient checkpointing would silently turn the cache off
    T = max_new_tokens
    rollout = empty_rollout(prompts, group_size, T, model.device)  # outside inference_mode: autograd will need it
    greedy = uniforms is None
    uniforms = torch.zeros_like(rollout.mask) if uniforms is None else uniforms.to(model.device)  # [B, T]
    eos = torch.tensor(eos_ids, device=model.device)
    rows = torch.arange(len(rollout), device=model.device)  # [b] the unfinished rows
    node = rollout.group  # [b] the node of each unfinished row
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)  # [n] prompt tokens of each node

    with autocast(model.device), torch.inference_mode():
        cache, attention, hidden = prefill(model, prompts, T)
        P = attention.shape[1] - T
        for t in range(T):
            # 1) Draw the next token of every unfinished row from the distribution of its node.
            place = rows % group_size  # [b] of each row in its group; rows of one node have different places
            draws = uniforms.new_zeros(len(hidden), group_size).index_put((node, place), uniforms[rows, t])  # [n, G]
            tokens, logprobs, entropy = next_token(model, hidden, draws, temperature, greedy)
            token = tokens[node, place]  # [b]
            rollout.completion_ids[rows, t] = token
            rollout.logprobs[rows, t] = logprobs[node, place]
            rollout.entropy[rows, t] = entropy[node]
            rollout.mask[:, t].index_fill_(0, rows, 1.0)  # the EOS is a real token too
            # 2) Rows that drew an EOS have ended.
            ended = torch.isin(token, eos)
            rollout.finished[rows] = ended
            alive = (~ended).nonzero().squeeze(1)  # indices: each use of a boolean mask would wait for the GPU
            rows = rows[alive]
            node = node[alive]
            token = token[alive]
            if len(rows) == 0 or t == T - 1:
                break
            # 3) Group the rows by (node, token): each pair is one child node, a line of the next batch. If rows of node
            #    0 drew 5, 5 and 7, and the row of node 1 drew 5, the children are (0, 5), (0, 7) and (1, 5).
            pair, child = (node * 2**32 + token).unique(return_inverse=True)  # token ids are below 2**32
            parent = pair // 2**32  # [children]
            child_token = pair % 2**32  # [children]
            node_was_split = (parent[1:] == parent[:-1]).any()  # pairs are sorted, so children of a node are adjacent
            if len(pair) < COMPACT_BELOW * len(hidden) or node_was_split:
                # Each child takes its parent's line of the cache. Nodes without unfinished rows fall out.
                cache.reorder_cache(parent)
                attention = attention[parent]
                lengths = lengths[parent]
                node = child
                new_ids = child_token
            else:
                # No node has two children, so every line stays where it is. A node without rows gets token 0.
                new_ids = torch.zeros_like(lengths).index_put((parent,), child_token)
            # 4) Run the decoder on the new tokens.
            hidden = last_hidden(model, cache, new_ids[:, None], attention[:, : P + t + 1], (lengths + t)[:, None])
    return rollout


# --- log-probs and entropy --------------------------------------------------------------------------------------------


class HeadLogprobs(torch.autograd.Function):
    """hidden [N, D], targets [N] -> log-prob of each target, and entropy (None if not wanted): two [N], differentiable.

        log p = z - logsumexp(z)            z: the logits, after scale, soft cap and temperature
        H     = -sum_v p log p
        dL/dz = g (onehot - p) - g_H p (log p + H)                  g, g_H: gradients of the log-prob and of the entropy

    weight [V, D], bias [V] or None. Works on chunks of tokens, and computes their logits again in the backward pass. So
    only a few chunks of logits exist at a time, and never tokens x vocabulary.
    """

    @staticmethod
    def logits(hidden, weight, bias, scale, cap, temperature):  # z [n, V] in float32; slope of the soft cap, if any
        z = torch.nn.functional.linear(hidden, weight, bias).float()
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
                z, _ = HeadLogprobs.logits(hidden[chunk].to(ctx.dtype), weight_lowp, bias_lowp, *ctx.factors)
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
            z, slope = HeadLogprobs.logits(h, weight_lowp, bias_lowp, *ctx.factors)
            z.sub_(logsumexp[chunk, None])  # now log p
            if g_entropy is None:
                z.exp_().mul_(-g)  # now -g p
            else:
                p = z.exp()
                z.clamp_(min=-1e30).add_(entropy[chunk, None])
                z.mul_(g_entropy[chunk, None]).add_(g).mul_(p).neg_()  # now -p (g + g_H (log p + H))
            # z is now dL/dz: at the target, g is added
            z.scatter_add_(1, targets[chunk, None], g)
            # z is now dL/d(hidden W^T + b): back through temperature, soft cap and scale
            if scale != temperature:
                z.mul_(scale / temperature)
            if slope is not None:
                z.mul_(slope)
            z = z.to(ctx.dtype)
            d_hidden[chunk] = (z @ weight_lowp).to(d_hidden.dtype)  # dz W
            # d_weight += dz^T hidden; addmm_ adds in place, but needs equal types
            if d_weight is not None and ctx.dtype == d_weight.dtype:
                d_weight.addmm_(z.T, h)
            elif d_weight is not None:
                d_weight += z.T @ h
            if d_bias is not None:
                d_bias += z.sum(0)
        return d_hidden, d_weight, d_bias, None, None, None, None, None


def token_logprobs(
    model, prompt_ids: Tensor, prompt_lengths: Tensor, completion_ids: Tensor, mask: Tensor,
    temperature: float = 1.0, with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Log-prob of every completion token and, if wanted, the entropy of its distribution (else None): two [B, T] with
    gradients, 0 where mask is 0. Training needs no entropy here, because the sampler has given it: rollout.entropy.

    prompt_ids [B, P] and completion_ids [B, T], right-padded; prompt_lengths [B], tokens; mask [B, T]. The decoder runs
    once on rows of prompt, completion and padding. It needs no attention mask, because causal attention never looks at
    the padding on the right, and without a mask the fast kernels can run. The head runs on completion tokens alone.
    """
    longest = int((prompt_lengths + mask.sum(1)).max())
    column = torch.arange(longest, device=mask.device)  # [L]
    place = column - prompt_lengths[:, None]  # [B, L] in the completion; negative inside the prompt
    from_prompt = prompt_ids[:, column.clamp(max=prompt_ids.shape[1] - 1)]  # [B, L]
    from_completion = completion_ids.gather(1, place.clamp(0, completion_ids.shape[1] - 1))  # [B, L]
    ids = torch.where(place < 0, from_prompt, from_completion)  # [B, L]
    all_hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [B, L, D]
    row, t = mask.nonzero(as_tuple=True)  # [N] the real completion tokens
    hidden = all_hidden[row, prompt_lengths[row] + t - 1]  # [N, D] the place before a token predicts it
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    logprobs, entropy = HeadLogprobs.apply(
        hidden, head.weight, bias, completion_ids[row, t], *head_factors(model), temperature, with_entropy
    )
    zeros = torch.zeros(mask.shape, device=mask.device)
    logprobs = zeros.index_put((row, t), logprobs)
    return logprobs, None if entropy is None else zeros.index_put((row, t), entropy)


# --- the loss ---------------------------------------------------------------------------------------------------------


def loss_weights(mask: Tensor, reduction: str) -> Tensor:
    """The factor of each token's loss that turns a plain sum over all tokens into the mean that is wanted. [B, T]

    sequence: the mean over rows of each row's mean over tokens (GRPO). token: the mean over all tokens (DAPO).
    constant: the sum over tokens, divided by B * T (Dr. GRPO). ValueError for another word. mask [B, T] holds all rows
    of an optimizer step, so the gradient does not depend on how the step is cut into micro-batches.
    """
    if reduction == "sequence":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / max(1, len(mask))
    if reduction == "token":
        return mask / mask.sum().clamp(min=1)
    if reduction == "constant":
        return mask / max(1, mask.numel())
    raise ValueError(f"reduction must be 'sequence', 'token' or 'constant', not {reduction!r}")


def clip_fractions(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> dict[str, Tensor]:
    """1.0 where the clip stops the gradient, because the ratio has passed its bound: upward with a positive advantage,
    downward with a negative one. ratio [b, T] or [b, 1]; advantages [b] or [b, T] -> two of the wider shape."""
    advantages = advantages if advantages.dim() == 2 else advantages[:, None]
    cut_low = (ratio < 1 - clip_low) & (advantages < 0)
    cut_high = (ratio > 1 + clip_high) & (advantages > 0)
    return {"clip_ratio/low": cut_low.float(), "clip_ratio/high": cut_high.float()}
