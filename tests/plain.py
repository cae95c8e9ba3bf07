"""The layers that all parts are made of, written again: float64, no module, one sample and one head a time.

`w` is a state dict in float64, `at` where in it the layer stands.
"""
import math

import torch


def weights(module):
    return {name: value.double() for name, value in module.state_dict().items()}


def linear(x, w, at):
    return x @ w[at + ".weight"].T + w[at + ".bias"]


def norm(x, w, at, eps):
    away = x - x.mean(-1, keepdim=True)
    return away / torch.sqrt((away ** 2).mean(-1, keepdim=True) + eps) * w[at + ".weight"] + w[at + ".bias"]


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def quick_gelu(x):
    return x / (1 + torch.exp(-1.702 * x))


def softmax(x):
    e = torch.exp(x - x.max(-1, keepdim=True).values)
    return e / e.sum(-1, keepdim=True)


def attention(x, w, at, heads, seen=None):
    """Vaswani et al., 2017; a key that is not seen is left out, as if it were not there."""
    q, k, v = linear(x, w, at + "qkv").chunk(3, -1)
    c, out = x.shape[-1] // heads, torch.zeros_like(x)
    for b in range(len(x)):
        keys = torch.ones(x.shape[1], dtype=torch.bool) if seen is None else seen[b]
        for h in range(heads):
            part = slice(h * c, (h + 1) * c)
            out[b, :, part] = softmax(q[b, :, part] @ k[b, keys, part].T / math.sqrt(c)) @ v[b, keys, part]
    return linear(out, w, at + "proj")


def bert(x, w, layers, heads, seen=None, at=""):
    """BERT's layers: each norm comes after the residual sum."""
    for i in range(layers):
        x = norm(x + attention(x, w, f"{at}{i}.", heads, seen), w, f"{at}{i}.norm1", 1e-12)
        x = norm(x + linear(gelu(linear(x, w, f"{at}{i}.fc1")), w, f"{at}{i}.fc2"), w, f"{at}{i}.norm2",
                 1e-12)
    return x


def pre_norm(x, w, layers, heads, seen=None, at="", eps=1e-12, activation=gelu):
    """Layers whose norm comes before each branch, and none after the last."""
    for i in range(layers):
        x = x + attention(norm(x, w, f"{at}{i}.norm1", eps), w, f"{at}{i}.", heads, seen)
        inside = activation(linear(norm(x, w, f"{at}{i}.norm2", eps), w, f"{at}{i}.fc1"))
        x = x + linear(inside, w, f"{at}{i}.fc2")
    return x


def clip(x, w, layers, heads, at=""):
    """CLIP's layers."""
    return pre_norm(x, w, layers, heads, at=at, eps=1e-5, activation=quick_gelu)


def sines(T, g, width):
    """(T*g*g, width): sine and cosine of frame, then of row, then of column, at width // 6 frequencies."""
    waves, rows = width // 6, []
    for t in range(T):
        for y in range(g):
            for x in range(g):
                row = [f(n / 100 ** (i / waves))
                       for n in (t, y, x) for f in (math.sin, math.cos) for i in range(waves)]
                rows.append(row + [0.0] * (width - len(row)))
    return torch.tensor(rows, dtype=torch.float64)
