"""What every method shares, in the order in which data flows: rollouts, sampling, log-probs, means.

    sample           prompts -> Rollout: completions with their mask, log-probs and entropy
    token_logprobs   log-probs (and entropy) of given completions, with gradients
    loss_weights     factors that turn a plain sum over tokens into the mean that a method wants
    clip_fractions   which tokens get no gradient, because the ratio was clipped

This file knows no method, no reward, no data set and no other process. harness/decoder.py runs the model: its decoder,
key-value cache and head. Log-probs and entropies are in nats, at the sampling temperature. Letters in the shapes:

    Q prompts, G completions of each, B = Q * G rows: the completions of a rollout
    P prompt tokens, T completion tokens, N tokens of some rows
    b rows of a part of the rollout: a micro-batch, or in `sample` those that are not finished
    n nodes: the sequences that `sample` runs through the decoder; D hidden size; V vocabulary
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from harness import decoder

# How many logits go through softmax, entropy and sampling at a time. They and their copies fit the processor's cache.
CACHED_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}
# Finished sequences leave the batch once they are more than 10% of it. Not at once, because removing copies the rest.
COMPACT_BELOW = 0.9


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


# --- sampling: the next token -----------------------------------------------------------------------------------------


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
    probable token. The head's product runs on large chunks of nodes, because it reads the whole weight each time. The
    rest runs on small parts of a chunk.
    """
    V = len(model.get_output_embeddings().weight)
    chunk_size = max(1, decoder.CHUNK_ELEMENTS[hidden.device.type] // V)  # nodes
    part_size = max(1, CACHED_ELEMENTS[hidden.device.type] // V)  # nodes
    parts = []
    for h, u in zip(hidden.split(chunk_size), uniforms.split(chunk_size), strict=True):
        logits = decoder.head_logits(model, h, temperature)
        for z, uniform in zip(logits.split(part_size), u.split(part_size), strict=True):
            log_p = z.log_softmax(-1)
            p = log_p.exp()
            entropy = -(log_p.clamp(min=-1e30).mul_(p)).sum(-1)  # log p may be -inf, and 0 * -inf would be NaN
            token = log_p.argmax(-1, keepdim=True).expand_as(uniform) if greedy else inverse_cdf(p, uniform)
            parts.append((token, log_p.gather(1, token), entropy))
        del logits, z  # before the next chunk
    tokens, logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(logprobs), torch.cat(entropies)


# --- sampling ---------------------------------------------------------------------------------------------------------


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


def choose_children(node: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Groups rows by (node, token): each pair is a child of that node, and a node of the next token.

    node, token [b] of each row -> parent and token of each child, two [children]; and the child of each row [b].
    If rows of node 0 drew 5, 7 and 5, and the row of node 1 drew 5, the children are (0, 5), (0, 7) and (1, 5):

        choose_children([0, 0, 0, 1], [5, 7, 5, 5]) -> [0, 0, 1], [5, 7, 5], [0, 1, 0, 2]
    """
    pair, child = (node * 2**32 + token).unique(return_inverse=True)  # sorted; token ids are below 2**32
    return pair // 2**32, pair % 2**32, child


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
    lengths = rollout.prompt_lengths[::group_size]  # [n] prompt tokens of each node

    with decoder.autocast(model.device), torch.inference_mode():
        cache = decoder.growing_cache(model)
        prompt_ids = rollout.prompt_ids[::group_size]
        hidden, attention = decoder.prefill(model, cache, prompt_ids, lengths)  # [n, D], [n, P]
        P = attention.shape[1]
        attention = torch.nn.functional.pad(attention, (0, T), value=1)  # [n, P + T]
        for t in range(T):
            # 1) Draw the next token of every unfinished row from the distribution of its node.
            sibling = rows % group_size  # [b] index in the group; rows of one node are different siblings
            draws = uniforms.new_zeros(len(hidden), group_size).index_put((node, sibling), uniforms[rows, t])  # [n, G]
            tokens, logprobs, entropy = next_token(model, hidden, draws, temperature, greedy)
            token = tokens[node, sibling]  # [b]
            rollout.completion_ids[rows, t] = token
            rollout.logprobs[rows, t] = logprobs[node, sibling]
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
            # 3) The children are the next batch, each with a copy of its parent's cache.
            parent, new_ids, child = choose_children(node, token)
            node_was_split = (parent[1:] == parent[:-1]).any()  # children are sorted by parent
            if len(parent) < COMPACT_BELOW * len(hidden) or node_was_split:
                cache.reorder_cache(parent)
                attention = attention[parent]
                lengths = lengths[parent]
                node = child
            else:  # No node has two children: every child can stay in its parent's place, without a copy.
                new_ids = torch.zeros_like(lengths).index_put((parent,), new_ids)  # 0 for nodes without rows
            # 4) Run the decoder on the new tokens.
            seen = attention[:, : P + t + 1]
            hidden = decoder.hidden_states(model, cache, new_ids[:, None], seen, (lengths + t)[:, None])[:, -1]
    return rollout


# --- log-probs and entropy --------------------------------------------------------------------------------------------


def hidden_of_whole_rows(model, prompt_ids: Tensor, prompt_lengths: Tensor, completion_ids: Tensor, mask: Tensor):
    """The hidden state before each completion token [B, T', D]; T': the longest completion. The decoder runs on rows of
    prompt, completion and padding. It needs no attention mask, because causal attention never looks at the padding on
    the right, and without a mask the fast kernels can run."""
    n_tokens = mask.sum(1).long()
    column = torch.arange(int((prompt_lengths + n_tokens).max()), device=mask.device)  # [L]
    t = column - prompt_lengths[:, None]  # [B, L] position in the completion; negative inside the prompt
    from_prompt = prompt_ids[:, column.clamp(max=prompt_ids.shape[1] - 1)]  # [B, L]
    from_completion = completion_ids.gather(1, t.clamp(0, completion_ids.shape[1] - 1))  # [B, L]
    ids = torch.where(t < 0, from_prompt, from_completion)  # [B, L]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [B, L, D]
    before = prompt_lengths[:, None] - 1 + torch.arange(int(n_tokens.max()), device=mask.device)  # [B, T']
    before = before.clamp(max=len(column) - 1)[:, :, None].expand(-1, -1, hidden.shape[2])
    return hidden.gather(1, before)


def hidden_on_shared_prompts(
    model, prompt_ids: Tensor, prompt_lengths: Tensor, completion_ids: Tensor, mask: Tensor, prompt: Tensor, Q: int
):
    """The same as hidden_of_whole_rows, but the decoder runs once on each of Q prompts, and then on the completions,
    which look back at the keys and values of their prompt. Gradients flow through these. prompt [B]: the number of each
    row's prompt."""
    index = torch.arange(len(prompt), device=prompt.device)
    one_row = index.new_zeros(Q).index_put((prompt,), index)  # [Q] a row of each prompt, no matter which
    cache = decoder.new_cache(model)
    last, attention = decoder.prefill(model, cache, prompt_ids[one_row], prompt_lengths[one_row])
    cache.reorder_cache(prompt)  # a copy for each row
    T = int(mask.sum(1).max())
    if T <= 1:
        return last[prompt, None]
    attention = torch.cat([attention[prompt], attention.new_ones(len(prompt), T - 1)], 1)  # [B, P + T' - 1]
    positions = prompt_lengths[:, None] + torch.arange(T - 1, device=mask.device)
    after = decoder.hidden_states(model, cache, completion_ids[:, : T - 1], attention, positions)  # [B, T' - 1, D]
    return torch.cat([last[prompt, None], after], 1)


def token_logprobs(
    model, prompt_ids: Tensor, prompt_lengths: Tensor, completion_ids: Tensor, mask: Tensor,
    temperature: float = 1.0, with_entropy: bool = False, group: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Log-prob of every completion token and, if wanted, the entropy of its distribution (else None): two [B, T] with
    gradients, 0 where mask is 0. Training needs no entropy here, because the sampler has given it: rollout.entropy.

    prompt_ids [B, P] and completion_ids [B, T], right-padded; prompt_lengths [B], tokens; mask [B, T], without holes.
    group [B], if given: rows with the same number have the same prompt, and the decoder runs once on each prompt where
    the model allows it (PrefixGrouper, arXiv 2506.05433). The head runs on completion tokens alone.
    """
    completion_ids = torch.where(mask > 0, completion_ids, 0)  # the padding may hold any number
    row, t = mask.nonzero(as_tuple=True)  # [N] the real completion tokens; first, because a GPU waits for their number
    rows = (model, prompt_ids, prompt_lengths, completion_ids, mask)
    numbers, prompt = (group if group is not None else torch.arange(len(mask))).unique(return_inverse=True)
    if len(numbers) < len(mask) and decoder.shares_prompts(model):
        hidden = hidden_on_shared_prompts(*rows, prompt, len(numbers))  # [B, T', D]
    else:
        hidden = hidden_of_whole_rows(*rows)  # [B, T', D]
    targets = completion_ids[row, t]
    logprobs, entropy = decoder.head_logprobs(model, hidden[row, t], targets, temperature, with_entropy)  # [N]
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
