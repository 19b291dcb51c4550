"""What every method shares, in the order in which data flows: sampling, log-probs and entropy, the update, evaluation.

    sample           prompts -> Rollout: completions with their mask, log-probs and entropy
    token_logprobs   log-prob and entropy of given completions, without ever holding tokens x vocabulary
    update           one or several optimizer steps on a Rollout, for any per-token objective
    evaluate         greedy accuracy, mean@k, pass@k

Nothing here knows a method, a reward or a data set. Shapes: Q prompts, G completions a prompt, B = Q * G rows,
T completion tokens, D hidden size, V vocabulary. Log-probs and entropies are in nats, at the sampling temperature.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

# Logits are computed for so many elements (tokens x vocabulary) at a time: 64 MiB of float32, or 512 MiB on a GPU,
# which needs larger products to be busy.
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}


@dataclass
class Rollout:
    """B completions. Padded places of `completion_ids` hold any id; only `mask` says what is real."""

    prompt_ids: Tensor  # [B, P] right-padded
    prompt_lengths: Tensor  # [B]
    completion_ids: Tensor  # [B, T] right-padded; T is max_new_tokens
    mask: Tensor  # [B, T] 1.0 up to and including EOS, else 0.0
    logprobs: Tensor  # [B, T] of the sampled tokens, as they were sampled
    entropy: Tensor  # [B, T] of the sampling distribution, over the whole vocabulary
    finished: Tensor  # [B] True: ended by EOS; False: cut off at max_new_tokens
    group: Tensor  # [B] rows of one prompt share a number
    rewards: Tensor  # [B] filled in by the caller
    texts: list[dict]  # B times {"question", "answer", "completion", ...}, filled in by the caller

    def __len__(self) -> int:
        return len(self.group)

    def lengths(self) -> Tensor:
        """Completion tokens of each row, EOS included. [B]"""
        return self.mask.sum(1)

    def select(self, rows: Tensor) -> "Rollout":
        """The Rollout of these rows (indices, or a boolean mask over B)."""
        rows = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
        tensors = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "texts"}
        return Rollout(**tensors, texts=[self.texts[i] for i in rows.tolist()] if self.texts else [])


def concatenate(rollouts: list[Rollout]) -> Rollout:
    """One Rollout of several with the same T; group numbers are shifted so that they stay distinct."""
    width, shift, parts = max(r.prompt_ids.shape[1] for r in rollouts), 0, []
    for r in rollouts:
        prompt_ids = torch.nn.functional.pad(r.prompt_ids, (0, width - r.prompt_ids.shape[1]))
        parts.append(replace(r, prompt_ids=prompt_ids, group=r.group + shift))
        shift = int(parts[-1].group.max()) + 1
    tensors = {f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Rollout) if f.name != "texts"}
    return Rollout(**tensors, texts=[text for p in parts for text in p.texts])


def autocast(device: torch.device):
    """bf16 arithmetic on a GPU, plain float32 elsewhere. The weights stay float32: at a learning rate of 1e-6 an AdamW
    step is smaller than half of bf16's spacing, and pure bf16 weights would not move."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


# --- the head ---------------------------------------------------------------------------------------------------------


def head_factors(model) -> tuple[float, float | None]:
    """What some families do to the head's output: a factor (Cohere's logit_scale, Granite's 1 / logits_scaling), then
    a soft cap (Gemma-2's final_logit_softcapping; None for none)."""
    config = model.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return scale, getattr(config, "final_logit_softcapping", None)


def head_logits(model, hidden: Tensor, temperature: float = 1.0) -> Tensor:
    """Logits over temperature, [N, V] in float32, from the decoder's hidden states [N, D]."""
    logits, (scale, cap) = model.get_output_embeddings()(hidden).float(), head_factors(model)
    logits = logits * scale if scale != 1.0 else logits
    logits = torch.tanh(logits / cap) * cap if cap else logits
    return logits / temperature if temperature != 1.0 else logits


@torch.no_grad()
def check_head(model) -> None:
    """Raises ValueError unless head_logits(decoder's hidden states) equals the model's own logits: the log-probs below
    run the two apart, and some family may do something in between that is not known here."""
    model.eval()
    ids = torch.arange(8, device=model.device).remainder(model.config.get_text_config().vocab_size)[None]
    with autocast(model.device):
        expected = model(input_ids=ids, use_cache=False).logits[0].float()
        got = head_logits(model, model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0])
    if got.shape != expected.shape or not torch.allclose(got, expected, rtol=1e-3, atol=1e-3):
        raise ValueError(f"the logits of {type(model).__name__} are not head(hidden states): it is not supported")


# --- sampling ---------------------------------------------------------------------------------------------------------


def pick(probs: Tensor, node: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF sampling: probs [n, V], node [b] (each row's line of probs), uniforms [b] in [0, 1) -> token ids [b].

    Each row has its own number, so that a sample does not depend on the other rows in the batch. (On CUDA, cumsum is
    not deterministic to the last bit.)
    """
    cdf = probs.cumsum(-1)[node]
    # `right` skips tokens of probability zero; scaling by the last entry absorbs the rounding of the sum.
    threshold = uniforms[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, threshold, right=True).squeeze(1).clamp(max=probs.shape[1] - 1)


@torch.no_grad()
def sample(
    model,
    prompts: list[list[int]],
    group_size: int,
    max_new_tokens: int,
    eos_ids: list[int],
    uniforms: Tensor | None,
    temperature: float = 1.0,
    drop_below: float = 0.9,
    fixed: bool | None = None,
) -> Rollout:
    """Samples `group_size` completions of every prompt, straight from the model's distribution at `temperature`: its
    generation_config (top-k, top-p, penalties) is ignored, because what is sampled must be what the loss models.

    prompts: Q lists of token ids. uniforms: [Q * group_size, max_new_tokens] in [0, 1), which decide every token; None
    takes the most probable token instead.

    Completions of one prompt that have been the same so far share one node: one line in the batch and in the cache.
    A node is split when its rows draw different tokens and leaves when its rows have ended, so the batch grows from Q
    prompts to the distinct unfinished completions, which are few where the policy is sure. Nodes without rows stay
    until they are more than 1 - drop_below of the batch, for moving the cache costs time.

    fixed: decode_fixed instead, the same samples from fixed shapes; None: on a GPU, where the model allows it.
    """
    model.eval()  # also because gradient checkpointing in train mode turns the cache off without a word
    device, Q, B, T = model.device, len(prompts), len(prompts) * group_size, max_new_tokens
    lengths = torch.tensor([len(p) for p in prompts], device=device)  # [n] prompt tokens of each node
    P = int(lengths.max())
    padded = [[0] * (P - len(p)) + p for p in prompts]  # left, so that every row's next token stands in the same column
    attend = torch.ones(Q, P + T, dtype=torch.long, device=device)  # [n, P + T] 0 on left padding
    attend[:, :P] = torch.arange(P, device=device) >= P - lengths[:, None]
    uniforms = None if uniforms is None else uniforms.to(device)
    eos = torch.tensor(eos_ids, device=device)
    rows = torch.arange(B, device=device)  # [b] the unfinished rows
    node = rows // group_size  # [b] the node of each of them, n nodes in all
    r = Rollout(
        prompt_ids=torch.tensor([p + [0] * (P - len(p)) for p in prompts], device=device)[node],
        prompt_lengths=lengths[node],
        completion_ids=torch.zeros(B, T, dtype=torch.long, device=device),
        mask=torch.zeros(B, T, device=device),
        logprobs=torch.zeros(B, T, device=device),
        entropy=torch.zeros(B, T, device=device),
        finished=torch.zeros(B, dtype=torch.bool, device=device),
        group=node,
        rewards=torch.zeros(B, device=device),
        texts=[],
    )

    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)

    def decode(ids, attend, positions):  # new tokens [n, k] -> the last one's hidden state [n, D]
        output = model.base_model(
            input_ids=ids, attention_mask=attend, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return output.last_hidden_state[:, -1]

    with autocast(device), torch.inference_mode():  # the tensors above are ordinary ones, and stay so
        positions = (attend[:, :P].cumsum(1) - 1).clamp(min=0)
        hidden = decode(torch.tensor(padded, device=device), attend[:, :P], positions)
        if fixed is None:
            plain = model.config._attn_implementation == "sdpa" and not any(layer.is_sliding for layer in cache.layers)
            fixed = device.type == "cuda" and plain
        if fixed:
            decode_fixed(model, r, hidden, cache, attend[:, :P], uniforms, eos, temperature)
            return r
        for t in range(T):
            logp = head_logits(model, hidden, temperature).log_softmax(-1)  # [n, V]
            probs, n = logp.exp(), len(logp)
            token = logp.argmax(-1)[node] if uniforms is None else pick(probs, node, uniforms[rows, t])  # [b]
            r.completion_ids[rows, t] = token
            r.mask[rows, t] = 1.0
            r.logprobs[rows, t] = logp[node, token]
            r.entropy[rows, t] = torch.special.entr(probs).sum(-1)[node]
            ended = torch.isin(token, eos)
            r.finished[rows[ended]] = True
            rows, node, token = rows[~ended], node[~ended], token[~ended]
            if len(rows) == 0 or t == T - 1:
                break
            edges, edge = (node * logp.shape[1] + token).unique(return_inverse=True)  # distinct (node, token), sorted
            parents, tokens = edges // logp.shape[1], edges % logp.shape[1]
            if len(edges) < drop_below * n or (parents[1:] == parents[:-1]).any():
                cache.batch_select_indices(parents)
                attend, lengths, node = attend[parents], lengths[parents], edge
            else:
                tokens = torch.zeros(n, dtype=torch.long, device=device).index_put((parents,), tokens)
            hidden = decode(tokens[:, None], attend[:, : P + t + 1], (lengths + t)[:, None])
    return r


def decode_fixed(
    model, r: Rollout, hidden: Tensor, prefilled, attend: Tensor, uniforms, eos: Tensor, temperature
) -> None:
    """`sample`'s loop with one line a row and a cache of full size: nothing changes its shape, so on a GPU one step is
    captured as a CUDA graph and replayed, which saves the launches that decoding is otherwise made of. Fills in `r`.

    hidden: [Q, D] of the last prompt token; prefilled: the prompts' cache; attend: [Q, P].
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
        logp = head_logits(model, hidden, temperature).log_softmax(-1)  # [B, V]
        probs = logp.exp()
        token = logp.argmax(-1) if uniforms is None else pick(probs, every, uniforms.index_select(1, t).squeeze(1))
        alive = (~r.finished).float()
        r.completion_ids.index_copy_(1, t, token[:, None])
        r.mask.index_copy_(1, t, alive[:, None])
        r.logprobs.index_copy_(1, t, logp.gather(1, token[:, None]) * alive[:, None])
        r.entropy.index_copy_(1, t, (torch.special.entr(probs).sum(-1) * alive)[:, None])
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


# --- log-probs and entropy --------------------------------------------------------------------------------------------


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
        z = torch.nn.functional.linear(hidden, weight, bias).float().mul_(ctx.scale)
        slope = None
        if ctx.cap:
            z.div_(ctx.cap).tanh_()
            slope = 1 - z * z
            z.mul_(ctx.cap)
        return z.div_(ctx.temperature), slope

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
            z.scatter_add_(1, targets[part, None], g).mul_(ctx.scale / ctx.temperature)
            z = (z if slope is None else z.mul_(slope)).to(ctx.dtype)
            d_hidden[part] = (z @ low).to(d_hidden.dtype)
            if ctx.dtype == d_weight.dtype:
                d_weight.addmm_(z.T, h)
            else:
                d_weight += z.T @ h
            if bias is not None:
                d_bias += z.sum(0)
        return d_hidden, d_weight, d_bias, None, None, None, None, None


def token_logprobs(
    model,
    prompt_ids: Tensor,
    prompt_lengths: Tensor,
    completion_ids: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of every completion token, and entropy of the distribution it came from: two [B, T], 0 where mask is 0.

    Both carry gradients. The decoder runs once on right-padded rows without an attention mask (causal attention makes
    that exact for real tokens, and keeps the fused kernels); the head runs on the real completion tokens alone.
    """
    T, P = completion_ids.shape[1], prompt_ids.shape[1]
    length = int((prompt_lengths + mask.sum(1)).max())
    column = torch.arange(length, device=mask.device)  # [L]
    offset = column - prompt_lengths[:, None]  # [B, L] place in the completion; negative inside the prompt
    ids = torch.where(
        offset < 0, prompt_ids[:, column.clamp(max=P - 1)], completion_ids.gather(1, offset.clamp(0, T - 1))
    )
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [B, L, D]

    row, t = mask.nonzero(as_tuple=True)  # [N] the real tokens; the one at t is predicted from the place before it
    head = model.get_output_embeddings()
    chunk = chunk_tokens or max(1, CHUNK_ELEMENTS[mask.device.type] // head.weight.shape[0])
    logprobs, entropy = HeadLogprobs.apply(
        hidden[row, prompt_lengths[row] + t - 1], head.weight, getattr(head, "bias", None), completion_ids[row, t],
        temperature, *head_factors(model), chunk,
    )  # fmt: skip
    zeros = torch.zeros_like(mask)
    return zeros.index_put((row, t), logprobs), zeros.index_put((row, t), entropy)


def microbatches(lengths: Tensor, token_budget: int) -> list[Tensor]:
    """Row indices [b] of each micro-batch: rows sorted by length, so that little is padding, and as many of them as
    keep rows x longest within `token_budget` (one row at least). lengths: [B] in tokens, prompt and completion."""
    batches, order, sizes = [], lengths.argsort(descending=True, stable=True), lengths.tolist()
    start, rows = 0, order.tolist()
    while start < len(rows):
        n = max(1, int(token_budget // sizes[rows[start]]))
        batches.append(order[start : start + n])
        start += n
    return batches


def scoring_plan(rollout: Rollout, rows: Tensor, token_budget: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Micro-batches of these rows as (distinct [u], rows [b], line [b]). Completions of one prompt that are the same,
    common where the policy is sure, are scored once: rows[i]'s log-probs are those of distinct[line[i]]."""
    if len(rows) == 0:
        return []
    tokens = torch.where(rollout.mask[rows] > 0, rollout.completion_ids[rows], -1)
    _, kind = torch.cat([rollout.group[rows, None], tokens], 1).unique(dim=0, return_inverse=True)  # [n]
    first = torch.full((int(kind.max()) + 1,), len(rows), device=rows.device)
    first = first.scatter_reduce(0, kind, torch.arange(len(rows), device=rows.device), "amin")  # a row of each kind
    plan, lengths = [], (rollout.prompt_lengths + rollout.lengths())[rows]
    for kinds in microbatches(lengths[first], token_budget):
        line = torch.full_like(first, -1)
        line[kinds] = torch.arange(len(kinds), device=rows.device)
        here = line[kind] >= 0
        plan.append((rows[first[kinds]], rows[here], line[kind][here]))
    return plan


def score_batch(model, r: Rollout, distinct: Tensor, line: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """token_logprobs of one of the plan's micro-batches. Two [b, T]."""
    inputs = (x[distinct] for x in (r.prompt_ids, r.prompt_lengths, r.completion_ids, r.mask))
    with autocast(model.device):
        logprobs, entropy = token_logprobs(model, *inputs, temperature)
    return logprobs[line], entropy[line]


@torch.no_grad()
def score(model, rollout: Rollout, temperature: float, token_budget: int) -> tuple[Tensor, Tensor]:
    """token_logprobs of a whole Rollout, without gradients, in micro-batches. Two [B, T]."""
    logprobs, entropy = torch.zeros_like(rollout.mask), torch.zeros_like(rollout.mask)
    everything = torch.arange(len(rollout), device=rollout.mask.device)
    for distinct, rows, line in scoring_plan(rollout, everything, token_budget):
        logprobs[rows], entropy[rows] = score_batch(model, rollout, distinct, line, temperature)
    return logprobs, entropy


# --- the update -------------------------------------------------------------------------------------------------------


def loss_weights(mask: Tensor, reduction: str) -> Tensor:
    """What each token's loss is multiplied by, so that a plain sum over the step is the wanted mean. [B, T]

    sequence: the mean over rows of each row's token mean (GRPO). token: the mean over all tokens (DAPO).
    constant: the sum over tokens, divided by B * T (Dr. GRPO). The counts are those of the whole optimizer step, never
    of a micro-batch: the gradient does not depend on how the step is cut up.
    """
    if reduction == "sequence":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / max(1, len(mask))
    if reduction == "token":
        return mask / mask.sum().clamp(min=1)
    if reduction == "constant":
        return mask / max(1, mask.numel())
    raise ValueError(f"reduction must be 'sequence', 'token' or 'constant', not {reduction!r}")


def clip_fractions(ratio: Tensor, advantages: Tensor, low: float, high: float) -> dict[str, Tensor]:
    """1.0 where the clip cuts the gradient off: the ratio has already moved past the bound in the direction that the
    advantage asks for. ratio [b, T], advantages [b] or [b, T] -> two [b, T]."""
    advantages = advantages if advantages.dim() == 2 else advantages[:, None]
    cut_low = (ratio < 1 - low) & (advantages < 0)
    cut_high = (ratio > 1 + high) & (advantages > 0)
    return {"clip_ratio/low": cut_low.float(), "clip_ratio/high": cut_high.float()}


def update(
    model,
    optimizer,
    scheduler,
    rollout: Rollout,
    objective: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]],
    reduction: str,
    active: Tensor | None,
    temperature: float,
    minibatches: int = 1,
    token_budget: int = 2048,
    max_grad_norm: float = 1.0,
) -> dict[str, float]:
    """Takes `minibatches` optimizer steps on the rollout, each on its own share of the rows. Returns metrics.

    objective(logprobs [b, T], old_logprobs [b, T], rows [b]) returns the loss of each token, [b, T], and any metrics as
    [b, T] tensors (their mean over all tokens is logged). `rows` index the rollout. old_logprobs are those of the
    policy that sampled: with one minibatch the log-probs themselves, detached, so the ratio is exactly 1.
    active: [B] or [B, T], not zero where the objective can have a gradient, such as the advantages; None: everywhere.
    Rows that are zero throughout are not scored, but do count in the means.
    """
    sums: dict[str, float] = {}
    norms = []
    everything = torch.arange(len(rollout), device=rollout.mask.device)
    shares = [rows for rows in everything.chunk(minibatches) if len(rows)]
    scored = torch.ones_like(rollout.finished) if active is None else (active != 0).view(len(rollout), -1).any(1)
    plans = [scoring_plan(rollout, share[scored[share]], token_budget) for share in shares]
    old = torch.zeros_like(rollout.mask)
    if len(plans) > 1:  # later minibatches meet a policy that has moved, so score all of them now, in the same layout
        with torch.no_grad():
            for distinct, rows, line in (batch for plan in plans for batch in plan):
                old[rows], _ = score_batch(model, rollout, distinct, line, temperature)

    model.train()
    for share, plan in zip(shares, plans, strict=True):
        weights = torch.zeros_like(rollout.mask)
        weights[share] = loss_weights(rollout.mask[share], reduction)
        for distinct, rows, line in plan:
            logprobs, _ = score_batch(model, rollout, distinct, line, temperature)
            if len(plans) == 1:
                old[rows] = logprobs.detach()
            per_token, extra = objective(logprobs, old[rows], rows)
            loss = (per_token * weights[rows]).sum()
            loss.backward()
            gap = (old[rows] - rollout.logprobs[rows]).abs()
            for name, value in {"sampling_logp_difference": gap, **extra}.items():
                sums[name] = sums.get(name, 0.0) + float((value.detach() * rollout.mask[rows]).sum())
            sums["loss"] = sums.get("loss", 0.0) + float(loss.detach())
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)  # no need for this memory while sampling

    per = {"loss": max(1, len(plans)), "sampling_logp_difference": max(1.0, float(rollout.mask[scored].sum()))}
    metrics = {k: v / per.get(k, max(1.0, float(rollout.mask.sum()))) for k, v in sums.items()}
    return {"loss": 0.0, **metrics, "grad_norm": sum(norms) / max(1, len(norms)), "lr": scheduler.get_last_lr()[0]}


# --- evaluation -------------------------------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n completions, c of them correct, drawn without replacement, hold a correct one: the
    unbiased estimator of pass@k (Chen et al., arXiv 2107.03374)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(generate: Callable[[int, bool], Rollout], k: int) -> dict[str, float]:
    """Accuracy on one set of problems. generate(group_size, greedy) returns their completions with rewards filled in.

    greedy: share of problems whose most probable completion is right. mean@k: share of right ones among k samples.
    pass@j for j = 1, 2, 4 ... k. truncated: share cut off at the limit. length: mean, in tokens.
    """
    greedy, sampled = generate(1, True), generate(k, False)
    correct = (sampled.rewards > 0.5).view(-1, k).sum(1).tolist()
    result = {"greedy": float((greedy.rewards > 0.5).float().mean()), f"mean@{k}": sum(correct) / (k * len(correct))}
    for j in [2**i for i in range(k.bit_length()) if 2**i <= k]:
        result[f"pass@{j}"] = sum(pass_at_k(k, c, j) for c in correct) / len(correct)
    result["truncated"] = float((~sampled.finished).float().mean())
    result["length"] = float(sampled.lengths().mean())
    return result
