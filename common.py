"""What every method shares, in the order in which data flows: sampling, log-probs and entropy, the update.

    sample           prompts -> Rollout: completions with their mask, log-probs and entropy
    token_logprobs   log-prob and entropy of given completions, without ever holding tokens x vocabulary
    update           one or several optimizer steps on a Rollout, for any per-token objective

Nothing here knows a method, a reward or a data set. Shapes: Q prompts, G completions a prompt, B = Q * G rows,
T completion tokens, D hidden size, V vocabulary. Log-probs and entropies are in nats, at the sampling temperature.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

import distributed
import fast

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

    def to(self, device: torch.device | str) -> "Rollout":
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "texts"})

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


def gather(rollout: Rollout | None, device: torch.device) -> Rollout:
    """The whole Rollout, on every process, of each one's part (None: nothing)."""
    if distributed.world() == 1:
        return rollout
    parts = distributed.gather(rollout and rollout.to("cpu"))
    return concatenate([part for part in parts if part]).to(device)


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


def draw(model, hidden: Tensor, node: Tensor, uniforms: Tensor | None, temperature: float):
    """The next token of each row, its log-prob, and the entropy of the distribution it came from, three [b].

    hidden: [n, D] last hidden state of each node; node: [b] each row's; uniforms: [b], or None for the most probable.
    """
    logp = head_logits(model, hidden, temperature).log_softmax(-1)  # [n, V]
    probs = logp.exp()
    token = logp.argmax(-1)[node] if uniforms is None else pick(probs, node, uniforms)
    return token, logp[node, token], torch.special.entr(probs).sum(-1)[node]


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
    fixed: bool = False,
) -> Rollout:
    """Samples `group_size` completions of every prompt, straight from the model's distribution at `temperature`: its
    generation_config (top-k, top-p, penalties) is ignored, because what is sampled must be what the loss models.

    prompts: Q lists of token ids. uniforms: [Q * group_size, max_new_tokens] in [0, 1), which decide every token; None
    takes the most probable token instead.

    Completions of one prompt that have been the same so far share one node: one line in the batch and in the cache.
    A node is split when its rows draw different tokens and leaves when its rows have ended, so the batch grows from Q
    prompts to the distinct unfinished completions, which are few where the policy is sure. Nodes without rows stay
    until they are more than 1 - drop_below of the batch, for moving the cache costs time.

    fixed: fast.decode_fixed instead, the same samples from fixed shapes, where the model's attention allows it.
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
        sliding = any(layer.is_sliding for layer in cache.layers)
        if fixed and model.config._attn_implementation == "sdpa" and not sliding:
            fast.decode_fixed(
                model, r, hidden, cache, attend[:, :P], uniforms, eos, partial(draw, temperature=temperature)
            )
            return r
        for t in range(T):
            uniform = None if uniforms is None else uniforms[rows, t]
            token, r.logprobs[rows, t], r.entropy[rows, t] = draw(model, hidden, node, uniform, temperature)
            r.completion_ids[rows, t] = token
            r.mask[rows, t] = 1.0
            ended = torch.isin(token, eos)
            r.finished[rows[ended]] = True
            rows, node, token = rows[~ended], node[~ended], token[~ended]
            if len(rows) == 0 or t == T - 1:
                break
            n, V = len(hidden), int(token.max()) + 1
            edges, edge = (node * V + token).unique(return_inverse=True)  # distinct (node, token), sorted
            parents, tokens = edges // V, edges % V
            if len(edges) < drop_below * n or (parents[1:] == parents[:-1]).any():
                cache.batch_select_indices(parents)
                attend, lengths, node = attend[parents], lengths[parents], edge
            else:
                tokens = torch.zeros(n, dtype=torch.long, device=device).index_put((parents,), tokens)
            hidden = decode(tokens[:, None], attend[:, : P + t + 1], (lengths + t)[:, None])
    return r


# --- log-probs and entropy --------------------------------------------------------------------------------------------


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
    logprobs, entropy = fast.HeadLogprobs.apply(
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
    """This process's micro-batches of these rows, as (distinct [u], rows [b], line [b]). Completions of one prompt that
    are the same, common where the policy is sure, are scored once: rows[i]'s log-probs are those of distinct[line[i]].

    Every process gets as many micro-batches, for FSDP's have to work in step: some end with one that has no rows."""
    if len(rows) == 0:
        return []
    tokens = torch.where(rollout.mask[rows] > 0, rollout.completion_ids[rows], -1)
    _, kind = torch.cat([rollout.group[rows, None], tokens], 1).unique(dim=0, return_inverse=True)  # [n]
    first = torch.full((int(kind.max()) + 1,), len(rows), device=rows.device)
    first = first.scatter_reduce(0, kind, torch.arange(len(rows), device=rows.device), "amin")  # a row of each kind
    plan, lengths = [], (rollout.prompt_lengths + rollout.lengths())[rows[first]]  # [u]
    order, world = lengths.argsort(descending=True, stable=True), distributed.world()
    hands = [order[i::world] for i in range(world)]  # dealt like cards: to each process long ones and short ones
    batches = [[hand[some] for some in microbatches(lengths[hand], token_budget)] for hand in hands]
    for kinds in batches[distributed.rank()]:
        line = torch.full_like(first, -1)
        line[kinds] = torch.arange(len(kinds), device=rows.device)
        here = line[kind] >= 0
        plan.append((rows[first[kinds]], rows[here], line[kind][here]))
    nothing = (rows[first[order[-1:]]], rows[:0], rows[:0])
    return plan + [nothing] * (max(map(len, batches)) - len(plan))


def score_batch(model, r: Rollout, distinct: Tensor, line: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """token_logprobs of one of the plan's micro-batches. Two [b, T]."""
    inputs = (x[distinct] for x in (r.prompt_ids, r.prompt_lengths, r.completion_ids, r.mask))
    with autocast(model.device):
        logprobs, entropy = distributed.call(model, token_logprobs, *inputs, temperature)
    return logprobs[line], entropy[line]


@torch.no_grad()
def score(model, rollout: Rollout, temperature: float, token_budget: int) -> tuple[Tensor, Tensor]:
    """token_logprobs of a whole Rollout, without gradients, in micro-batches, on every process. Two [B, T]."""
    logprobs, entropy = torch.zeros_like(rollout.mask), torch.zeros_like(rollout.mask)
    everything = torch.arange(len(rollout), device=rollout.mask.device)
    for distinct, rows, line in scoring_plan(rollout, everything, token_budget):
        logprobs[rows], entropy[rows] = score_batch(model, rollout, distinct, line, temperature)
    distributed.add_up(logprobs, entropy)  # each row stands in one process, and is 0 in the others
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

    An update whose loss or gradient is not finite is skipped, counted as "skipped_updates", and left out of the other
    metrics: the weights are still good. With several processes each calls this with the whole rollout.
    """
    sums: dict[str, float] = {}  # over the updates that were made
    norms, made = [], torch.zeros_like(rollout.rewards, dtype=torch.bool)  # made: [B], the rows of these updates
    everything = torch.arange(len(rollout), device=rollout.mask.device)
    shares = [rows for rows in everything.tensor_split(minibatches) if len(rows)]
    active = torch.ones_like(rollout.rewards) if active is None else active
    scored = (active if active.dim() == 2 else active[:, None]).ne(0).any(1)
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
        here: dict[str, float] = {}
        for distinct, rows, line in plan:
            logprobs, _ = score_batch(model, rollout, distinct, line, temperature)
            if len(plans) == 1:
                old[rows] = logprobs.detach()
            per_token, extra = objective(logprobs, old[rows], rows)
            loss = (per_token * weights[rows]).sum()
            loss.backward()
            gap = (old[rows] - rollout.logprobs[rows]).abs()
            for name, value in {"sampling_logp_difference": gap, **extra}.items():
                here[name] = here.get(name, 0.0) + float((value.detach() * rollout.mask[rows]).sum())
            here["loss"] = here.get("loss", 0.0) + float(loss.detach())
        here = distributed.total(here)
        distributed.add_up_gradients(model)
        norm = float(distributed.whole(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)))
        if math.isfinite(norm) and math.isfinite(here.get("loss", 0.0)):
            optimizer.step()
            scheduler.step()
            norms.append(norm)
            made[share] = True
            for name, value in here.items():
                sums[name] = sums.get(name, 0.0) + value
        optimizer.zero_grad(set_to_none=True)  # no need for this memory while sampling

    tokens, of_scored = (max(1.0, float(rollout.mask[rows].sum())) for rows in (made, made & scored))
    per = {"loss": len(norms), "sampling_logp_difference": of_scored}
    metrics = {k: v / per.get(k, tokens) for k, v in sums.items()}
    metrics["skipped_updates"] = len(plans) - len(norms)
    return {"loss": 0.0, **metrics, "grad_norm": sum(norms) / max(1, len(norms)), "lr": scheduler.get_last_lr()[0]}
