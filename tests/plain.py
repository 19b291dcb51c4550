"""The methods once more, in plain loops over rows and tokens, with Python's own floats: slow, and easy to check
against the papers. The tests compare the methods with them.

rewards, group: [B]; entropy H, mask: [B, T] tensors, of which a row's first n places are its tokens. Results are lists.
"""

import math


def n_tokens(mask, i):
    return int(mask[i].sum())


def mates(group, i):
    """The rows of i's group, i among them."""
    return [j for j in range(len(group)) if int(group[j]) == int(group[i])]


def is_mixed(rewards, group, i):
    """Whether i's group has right and wrong rows."""
    outcomes = {float(rewards[j]) > 0.5 for j in mates(group, i)}
    return len(outcomes) == 2


def mean_and_std(values):
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))


# --- advantages: [B][T], 0 for padding --------------------------------------------------------------------------------


def spread(values, mask):
    """[B] -> [B][T], 0 for padding."""
    return [[values[i] * float(m) for m in mask[i]] for i in range(len(values))]


def grpo_advantages(rewards, group, advantage="grpo", eps=1e-6):
    result = []
    for i in range(len(rewards)):
        r = [float(rewards[j]) for j in mates(group, i)]
        mean, std = mean_and_std(r)
        own = float(rewards[i])
        if max(r) == min(r):
            result.append(0.0)
        elif advantage == "grpo":
            result.append((own - mean) / (std + eps))
        elif advantage == "dr_grpo":
            result.append(own - mean)
        else:  # rloo
            result.append(own - (sum(r) - own) / (len(r) - 1))
    return result


def dapo_punishment(lengths, max_length, cache):
    result = []
    for n in lengths:
        if n <= max_length - cache:
            result.append(0.0)
        elif n <= max_length:
            result.append((max_length - cache - n) / cache)
        else:
            result.append(-1.0)
    return result


def dapo_advantages(rewards, mask, group, max_length, cache, eps=1e-6):
    punishment = dapo_punishment([n_tokens(mask, i) for i in range(len(rewards))], max_length, cache)
    result = []
    for i in range(len(rewards)):
        r = [float(rewards[j]) + punishment[j] for j in mates(group, i)]
        mean, std = mean_and_std(r)
        result.append((float(rewards[i]) + punishment[i] - mean) / (std + eps) if is_mixed(rewards, group, i) else 0.0)
    return result


def egsw_weights(A, H, mask, group, alpha, P, step_wise, mean_one):
    """A: [B]."""
    B, T = mask.shape
    result = [[0.0] * T for _ in range(B)]
    for i in range(B):
        for t in range(n_tokens(mask, i)):
            competing = [j for j in mates(group, i) if mask[j, t] or not step_wise]

            def raw(j, t=t):
                n = n_tokens(mask, j)
                h = float(H[j, t]) if step_wise else sum(float(H[j, s]) for s in range(n)) / n
                return math.exp((float(A[j]) + alpha * h) / P)

            weight = raw(i) / sum(raw(j) for j in competing)
            result[i][t] = weight * len(competing) if mean_one else weight
    return result


def gtpo_punishment(rewards, lengths, group, gamma):
    result = [0.0] * len(rewards)
    for i in range(len(rewards)):
        rows = mates(group, i)
        right = [j for j in rows if rewards[j] > 0.5]
        fraction = len(right) / len(rows)
        if fraction <= 1 - gamma:
            continue
        is_punished = rewards[i] > 0.5 if fraction > 0.5 else rewards[i] <= 0.5
        if not is_punished:
            continue
        measured = [lengths[j] for j in (right if fraction >= gamma else rows)]
        L = max((min(measured) + max(measured)) / 2, sum(measured) / len(measured))
        result[i] = -0.5 * min(max((lengths[i] - L) / L, 0.0), 1.0)
    return result


def gtpo_shaped(
    rewards, H, mask, group, alpha1, alpha2, entropy_baseline, entropy_mean, compare_over,
    h_min=0.0, h_max=math.inf, punishment=None,
):  # fmt: skip
    """r+ and r- of every token (Eq. 2 and 3), two [B][T]."""
    B, T = mask.shape
    plus = [[0.0] * T for _ in range(B)]
    minus = [[0.0] * T for _ in range(B)]

    def value(k, s):  # H, or for wrong rows 1/H
        h = min(max(float(H[k, s]), h_min), h_max)
        return h if rewards[k] > 0.5 else 1 / h

    for i in range(B):
        if not is_mixed(rewards, group, i):
            continue
        for t in range(n_tokens(mask, i)):
            pool = []
            for k in range(B):
                same_outcome = (rewards[k] > 0.5) == (rewards[i] > 0.5)
                in_set = compare_over == "batch" or int(group[k]) == int(group[i])
                if not (same_outcome and in_set and is_mixed(rewards, group, k)):
                    continue
                for s in range(n_tokens(mask, k)):
                    if {"column": s == t, "row": k == i, "matrix": True}[entropy_baseline]:
                        pool.append(value(k, s))
            if entropy_mean == "arithmetic":
                centre = sum(pool) / len(pool)
            else:
                centre = math.exp(sum(math.log(v) for v in pool) / len(pool))
            p = punishment[i] if punishment else 0.0
            if rewards[i] > 0.5:
                plus[i][t] = alpha1 * (float(rewards[i]) + p) + alpha2 * value(i, t) / centre
            else:
                minus[i][t] = -alpha1 + alpha1 * p - alpha2 * value(i, t) / centre
    return plus, minus


def gtpo_advantages(plus, minus, rewards, mask, group, compare_over, normalize_over, eps=1e-6):
    """Eq. 4."""
    B, T = mask.shape
    result = [[0.0] * T for _ in range(B)]
    for i in range(B):
        if not is_mixed(rewards, group, i):
            continue
        shaped = plus if rewards[i] > 0.5 else minus
        pool = []
        for k in range(B):
            in_set = compare_over == "batch" or int(group[k]) == int(group[i])
            counts = normalize_over == "all" or (rewards[k] > 0.5) == (rewards[i] > 0.5)
            if in_set and counts and is_mixed(rewards, group, k):
                pool += [shaped[k][s] for s in range(n_tokens(mask, k))]
        mean, std = mean_and_std(pool)
        if max(pool) > min(pool):
            for t in range(n_tokens(mask, i)):
                result[i][t] = (shaped[i][t] - mean) / (std + eps)
    return result


def grpo_s_shaped(rewards, H, mask, group, beta1, beta2, entropy_mean, h_min):
    """The shaped reward of every completion (Eq. 6)."""

    def mean_entropy(i):
        h = [float(H[i, t]) for t in range(n_tokens(mask, i))]
        if entropy_mean == "geometric":
            return math.exp(sum(math.log(max(v, h_min)) for v in h) / len(h))
        return max(sum(h) / len(h), h_min)

    result = []
    for i in range(len(rewards)):
        same = [j for j in mates(group, i) if (rewards[j] > 0.5) == (rewards[i] > 0.5)]
        if rewards[i] > 0.5:
            share = mean_entropy(i) / sum(mean_entropy(j) for j in same)
            result.append(beta1 * float(rewards[i]) + beta2 * share * len(same))
        else:
            share = (1 / mean_entropy(i)) / sum(1 / mean_entropy(j) for j in same)
            result.append(-beta1 - beta2 * share * len(same))
    return result


def grpo_s_advantages(shaped, rewards, group, eps=1e-6):
    result = []
    for i in range(len(rewards)):
        mean, std = mean_and_std([shaped[j] for j in mates(group, i)])
        result.append((shaped[i] - mean) / (std + eps) if is_mixed(rewards, group, i) else 0.0)
    return result


def forking_tokens(H, A, rho):
    """[B][T]: at most the share rho of the tokens with an advantage has a higher entropy than a token that is kept."""
    counted = [float(h) for h_row, a_row in zip(H, A, strict=True) for h, a in zip(h_row, a_row, strict=True) if a]

    def is_kept(h, a):
        n_higher = sum(other > float(h) for other in counted)
        return bool(a) and n_higher <= rho * (len(counted) - 1)

    return [[is_kept(h, a) for h, a in zip(h_row, a_row, strict=True)] for h_row, a_row in zip(H, A, strict=True)]


def shaped_by_entropy(A, H, mask, alpha, kappa):
    """A: [B]."""
    return [[(a + min(alpha * float(h), abs(a) / kappa)) * float(m) for h, m in zip(h_row, m_row, strict=True)]
            for a, h_row, m_row in zip(A, H, mask, strict=True)]  # fmt: skip


def quantile_advantages(rewards, group, K, eps=1e-6):
    result = []
    for i in range(len(rewards)):
        r = [float(rewards[j]) for j in mates(group, i)]
        baseline = min(x for x in r if sum(y <= x for y in r) / len(r) >= K)
        _, std = mean_and_std(r)
        result.append((float(rewards[i]) - baseline) / (std + eps) if max(r) > min(r) else 0.0)
    return result


def cov_chosen(A, logprobs, uniforms, variant, share, lower, upper):
    """[B][T]. A: [B][T], 0 for padding."""
    B, T = logprobs.shape
    counted = [(i, t) for i in range(B) for t in range(T) if A[i][t]]
    result = [[False] * T for _ in range(B)]
    if not counted:
        return result
    mean_A = sum(A[i][t] for i, t in counted) / len(counted)
    mean_logprob = sum(float(logprobs[i, t]) for i, t in counted) / len(counted)
    cov = {(i, t): (A[i][t] - mean_A) * (float(logprobs[i, t]) - mean_logprob) for i, t in counted}
    if variant == "kl":
        ranked = sorted(counted, key=lambda token: -cov[token])
    else:
        candidates = [token for token in counted if lower < cov[token] < upper]
        ranked = sorted(candidates, key=lambda token: -float(uniforms[token]))
    for i, t in ranked[: max(1, int(share * len(counted)))]:
        result[i][t] = True
    return result


# --- the loss ---------------------------------------------------------------------------------------------------------


def clipped(w, A, low, high):
    """min(w A, clip(w, 1 - low, 1 + high) A), for w a scalar tensor."""
    clipped_w = min(max(w.item(), 1 - low), 1 + high)
    if w.item() * A <= clipped_w * A:
        return w * A
    return w.detach() * 0 + clipped_w * A


def reduced(per_token, mask, reduction):
    """The mean that --reduction names. per_token: [n][T], only its real tokens are used."""
    n, T = mask.shape
    rows = [[per_token[i][t] for t in range(n_tokens(mask, i))] for i in range(n)]
    if reduction == "sequence":
        return sum(sum(row) / len(row) for row in rows) / n
    if reduction == "token":
        return sum(sum(row) for row in rows) / sum(len(row) for row in rows)
    return sum(sum(row) for row in rows) / (n * T)
