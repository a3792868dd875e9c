"""The objective by autograd through the whole vocabulary, in float64: the reference of the tests.

Written from OBJECTIVE.md (table of variants and the rules below it), without a line of the
product's code. Slow and large on purpose.
"""

from __future__ import annotations

import torch

ALPHA = 30.0
FLOOR = 1e-4
EPS = 1e-9


def head(state, name, x):
    """Linear ReLU Linear Sigmoid from a state dict."""
    a = torch.relu(x @ state[f"{name}.mlp.0.weight"].T + state[f"{name}.mlp.0.bias"])
    return torch.sigmoid(a @ state[f"{name}.mlp.2.weight"].T + state[f"{name}.mlp.2.bias"])[:, 0]


def features(z, t):
    """max p, entropy, variance of p, top-5 sum of softmax(z/T)."""
    log_p = torch.log_softmax(z / t[:, None], -1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    top = p.sort(dim=-1, descending=True, stable=True).values[:, :5].sum(-1)
    return torch.stack((p.amax(-1), entropy, p.var(-1, correction=1), top), -1)


def arg_max(z):
    """The first of the stable descending order."""
    return z.sort(dim=-1, descending=True, stable=True).indices[:, 0]


def token_losses(z, y, t, p, variant):
    """L_T and L_P [m] of given T and P [m], weights detached; and the hard nucleus' verdict."""
    t = t.clamp_min(FLOOR)
    t_t = t.clamp_min(1e-2) if variant in ("nll", "hf") else t
    t_p = t.clamp_min(1e-2) if variant == "nll" else t

    def pick(x):
        return x.gather(-1, y[:, None])[:, 0]

    base = pick(torch.softmax(z, -1)).detach()
    log_p = pick(torch.log_softmax(z / t_t[:, None], -1))
    w_t = {"nll": torch.ones_like(base), "megatron": log_p.exp().detach(), "hf": base}
    loss_t = -w_t[variant] * log_p if variant != "paper" else torch.zeros_like(base)

    def in_order(temperature):
        order = z.sort(dim=-1, descending=True, stable=True).indices
        log_q = torch.log_softmax(z / temperature[:, None], -1).gather(-1, order)
        return log_q, log_q.exp().cumsum(-1), (order == y[:, None])

    log_q, c, is_label = in_order(t_p)
    log_m = -ALPHA * torch.relu(c - p[:, None])
    q, m = log_q.exp(), log_m.exp()
    total = (q * m).sum(-1)
    at_label = (torch.where(is_label, log_q + log_m, 0.0)).sum(-1)
    if variant == "nll":
        loss_p = -(at_label - total.log())
    else:
        loss_p = -base * torch.log(at_label.exp() / (total + EPS) + EPS)

    log_q, c, is_label = in_order(t)
    ahead = ((c - log_q.exp()) * is_label).sum(-1)
    first = is_label[:, 0]
    outside = (ahead >= p) & ~first & (p < 1)
    nll = -(log_q * is_label).sum(-1)
    return loss_t, loss_p, nll.detach(), outside


def objective(state, z, h, y, sample, spared, variant, *, enhanced=True, heads="both"):
    """Loss as the caller's optimizer sees it before the division, and what goes with it.

    ``state`` holds float64 leaves; ``spared`` is the random half of the drop, bool [m].
    """
    t = (
        2 * head(state, "temp_head", h)
        if heads != "top-p"
        else torch.ones(len(h), dtype=torch.float64)
    )
    t = t.clamp_min(FLOOR)
    t_in = t.detach() if variant == "hf" else t
    p = torch.ones_like(t)
    if heads != "temperature":
        columns = [h, t_in[:, None]] + ([features(z, t_in)] if enhanced else [])
        p = head(state, "top_p_head", torch.cat(columns, -1))
    loss_t, loss_p, nll, outside = token_losses(z, y, t, p, variant)
    keep = (arg_max(z) != y) | spared
    if heads == "top-p":
        loss_t = torch.zeros_like(loss_t)
    if heads == "temperature" and variant != "paper":
        loss_p = torch.zeros_like(loss_p)
    if variant == "hf":
        total_t, total_p = 0.0, 0.0
        for s in sample.unique():
            mine = sample == s
            total_t = total_t + (loss_t * keep)[mine].sum() / max(1, int(keep[mine].sum()))
            total_p = total_p + loss_p[mine].mean()
    else:
        total_t, total_p = (loss_t * keep).sum(), (loss_p * keep).sum()
    return {
        "temperature_loss": total_t,
        "top_p_loss": total_p,
        "keep": keep,
        "nll": nll,
        "outside": outside,
        "t": t.detach(),
        "p": p.detach(),
        "token_losses": (loss_t.detach(), loss_p.detach()),
    }
