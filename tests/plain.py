"""The layers that all parts are made of, written again: float64, no module, one sample and one head a time.

`w` is a state dict in float64, `at` where in it the layer stands.
"""
import itertools
import math

import torch
import torch.nn.functional as F


def near(ours, plainly, atol=1e-9):
    torch.testing.assert_close(ours, plainly.to(ours.dtype), atol=atol, rtol=1e-6)


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


def attend(q, k, v, heads, seen=None):
    """Vaswani et al., 2017; a key that is not seen is left out, as if it were not there."""
    c, out = q.shape[-1] // heads, torch.zeros_like(q)
    for b in range(len(q)):
        keys = torch.ones(q.shape[1], dtype=torch.bool) if seen is None else seen[b]
        for h in range(heads):
            part = slice(h * c, (h + 1) * c)
            out[b, :, part] = softmax(q[b, :, part] @ k[b, keys, part].T / math.sqrt(c)) @ v[b, keys, part]
    return out


def attention(x, w, at, heads, seen=None):
    return linear(attend(*linear(x, w, at + "qkv").chunk(3, -1), heads, seen), w, at + "proj")


def bert(x, w, layers, heads, seen=None, at=""):
    """BERT's layers: each norm comes after the residual sum."""
    for i in range(layers):
        x = norm(x + attention(x, w, f"{at}{i}.", heads, seen), w, f"{at}{i}.norm1", 1e-12)
        x = norm(x + linear(gelu(linear(x, w, f"{at}{i}.fc1")), w, f"{at}{i}.fc2"), w, f"{at}{i}.norm2",
                 1e-12)
    return x


def pre_norm(x, w, layers, heads, seen=None, at="", eps=1e-12):
    """Layers whose norm comes before each branch, and none after the last."""
    for i in range(layers):
        x = x + attention(norm(x, w, f"{at}{i}.norm1", eps), w, f"{at}{i}.", heads, seen)
        inside = gelu(linear(norm(x, w, f"{at}{i}.norm2", eps), w, f"{at}{i}.fc1"))
        x = x + linear(inside, w, f"{at}{i}.fc2")
    return x


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


# The networks as published, under the published names of their tensors.


def over_channels(x, w, at):
    return norm(x.permute(0, 2, 3, 1), w, at, 1e-6).permute(0, 3, 1, 2)


def pointwise(x, w, at):
    """The two linear layers of both blocks, times gamma: (N, C, H, W)."""
    x = norm(x.permute(0, 2, 3, 1), w, at + "norm", 1e-6)
    x = linear(gelu(linear(x, w, at + "pwconv1")), w, at + "pwconv2")
    return (w[at + "gamma"] * x).permute(0, 3, 1, 2)


def conv_encoder(x, w, at, kernel):
    y = F.conv2d(x, w[at + "dwconv.weight"], w[at + "dwconv.bias"], padding=(kernel - 1) // 2,
                 groups=x.shape[1])
    return x + pointwise(y, w, at)


def fourier(H, W, waves=32):
    """The release's PositionalEncodingFourier: (2 * waves, H, W), rows first, sine and cosine by turns."""
    ones = torch.ones(H, W, dtype=torch.float64)
    down, right = ones.cumsum(0), ones.cumsum(1)
    down, right = (2 * math.pi * down / (down[-1:] + 1e-6)), (2 * math.pi * right / (right[:, -1:] + 1e-6))
    channels = []
    for coordinate in (down, right):
        for i in range(waves):
            angle = coordinate / 10000 ** (2 * (i // 2) / waves)
            channels.append(angle.cos() if i % 2 else angle.sin())
    return torch.stack(channels)


def sdta_encoder(x, w, at, scales, heads, positions):
    N, C, H, W = x.shape
    width = math.ceil(C / scales)
    parts = x.split(width, 1)
    done = []
    for i in range(scales - 1):
        part = parts[i] if i == 0 else parts[i] + done[-1]
        done.append(F.conv2d(part, w[f"{at}convs.{i}.weight"], w[f"{at}convs.{i}.bias"], padding=1,
                             groups=width))
    y = torch.cat([*done, parts[scales - 1]], 1)
    if positions:
        y = y + F.conv2d(fourier(H, W)[None], w[at + "pos_embd.token_projection.weight"],
                         w[at + "pos_embd.token_projection.bias"])
    y = y.flatten(2).transpose(1, 2)                                                        # (N, patches, C)
    qkv, attended, c = linear(norm(y, w, at + "norm_xca", 1e-6), w, at + "xca.qkv"), [], C // heads
    for n in range(N):
        channels = []
        for h in range(heads):
            # each (c, patches)
            q, k, v = (qkv[n, :, which * C + h * c:which * C + (h + 1) * c].T for which in range(3))
            q, k = (m / m.norm(dim=1, keepdim=True) for m in (q, k))
            channels.append(softmax(q @ k.T * w[at + "xca.temperature"][h]) @ v)
        attended.append(torch.cat(channels).T)
    y = y + w[at + "gamma_xca"] * linear(torch.stack(attended), w, at + "xca.proj")
    return x + pointwise(y.transpose(1, 2).reshape(N, C, H, W), w, at)


def edgenext(x, w, depths, kernels, scales, heads):
    for i, depth in enumerate(depths):
        at = f"downsample_layers.{i}."
        if i == 0:
            x = over_channels(F.conv2d(x, w[at + "0.weight"], w[at + "0.bias"], stride=4), w, at + "1")
        else:
            x = F.conv2d(over_channels(x, w, at + "0"), w[at + "1.weight"], w[at + "1.bias"], stride=2)
        for j in range(depth):
            at = f"stages.{i}.{j}."
            x = (sdta_encoder(x, w, at, scales[i], heads, positions=i == 1) if i > 0 and j == depth - 1
                 else conv_encoder(x, w, at, kernels[i]))
    return over_channels(x, w, "norm")


def published_bert(ids, w, heads, seen, at="bert."):
    """BERT (Devlin et al., 2019) on the rows of one segment: ids (B, L) -> (B, L, width)."""
    e = at + "embeddings."
    x = w[e + "word_embeddings.weight"][ids] + w[e + "position_embeddings.weight"][:ids.shape[1]]
    x = norm(x + w[e + "token_type_embeddings.weight"][0], w, e + "LayerNorm", 1e-12)
    layer = 0
    while f"{at}encoder.layer.{layer}.output.dense.weight" in w:
        a = f"{at}encoder.layer.{layer}."
        q, k, v = (linear(x, w, f"{a}attention.self.{part}") for part in ("query", "key", "value"))
        x = norm(x + linear(attend(q, k, v, heads, seen), w, a + "attention.output.dense"), w,
                 a + "attention.output.LayerNorm", 1e-12)
        inside = gelu(linear(x, w, a + "intermediate.dense"))
        x = norm(x + linear(inside, w, a + "output.dense"), w, a + "output.LayerNorm", 1e-12)
        layer += 1
    return x


def tokens_of_patches(x, kernel, cls, positions):
    """CLS, then 32x32 patches row by row, and their positions: (N, 3, H, W) -> (N, 1 + patches, width)."""
    rows = []
    for image in x:
        patches = [(kernel * image[:, y:y + 32, c:c + 32]).sum((1, 2, 3))
                 for y in range(0, image.shape[1], 32) for c in range(0, image.shape[2], 32)]
        rows.append(torch.stack([cls, *patches]) + positions)
    return torch.stack(rows)


def clip_openai(x, w, heads, positions, at="visual."):
    """CLIP's vision transformer under its authors' names, up to the last block."""
    x = tokens_of_patches(x, w[at + "conv1.weight"], w[at + "class_embedding"], positions)
    x, layer = norm(x, w, at + "ln_pre", 1e-5), 0
    while f"{at}transformer.resblocks.{layer}.ln_1.weight" in w:
        a = f"{at}transformer.resblocks.{layer}."
        packed = norm(x, w, a + "ln_1", 1e-5) @ w[a + "attn.in_proj_weight"].T + w[a + "attn.in_proj_bias"]
        x = x + linear(attend(*packed.chunk(3, -1), heads), w, a + "attn.out_proj")
        inside = quick_gelu(linear(norm(x, w, a + "ln_2", 1e-5), w, a + "mlp.c_fc"))
        x = x + linear(inside, w, a + "mlp.c_proj")
        layer += 1
    return x


def swin_attention(x, w, at, heads, window, shifted):
    """Liu et al., "Video Swin Transformer", 2022, without windows: all patches (B, T, H, W, C) at once. A
    pair counts where it lies in one window of the padded, shifted grid and does not meet across its ends."""
    sides, C = x.shape[1:4], x.shape[-1]
    small = [min(n, m) for n, m in zip(sides, window)]
    shift = [m // 2 if shifted and n > m else 0 for n, m in zip(sides, window)]
    padded = [m * math.ceil(n / m) for n, m in zip(sides, small)]
    y = torch.zeros(len(x), *padded, C, dtype=x.dtype)
    y[:, :sides[0], :sides[1], :sides[2]] = x
    groups, group, place = {}, [], []
    for patch in itertools.product(*map(range, padded)):
        moved = [(p - s) % n for p, s, n in zip(patch, shift, padded)]
        meets = tuple((m // k, p < s) for m, k, p, s in zip(moved, small, patch, shift))
        group.append(groups.setdefault(meets, len(groups)))
        t, r, c = (m % k for m, k in zip(moved, small))
        number = (t * small[1] + r) * small[2] + c      # in its window; in the release it means a whole one's
        place.append([number // (window[1] * window[2]), number // window[2] % window[1], number % window[2]])
    t, r, c = (torch.tensor(place)[:, None] - torch.tensor(place) + torch.tensor(window) - 1).unbind(-1)
    bias = w[at + "relative_position_bias_table"][(t * (2 * window[1] - 1) + r) * (2 * window[2] - 1) + c]
    bias[torch.tensor(group)[:, None] != torch.tensor(group)] = -math.inf
    q, k, v = linear(y.flatten(1, 3), w, at + "qkv").chunk(3, -1)
    out, c = torch.empty_like(q), C // heads
    for b, h in itertools.product(range(len(x)), range(heads)):
        part = slice(h * c, (h + 1) * c)
        scores = q[b, :, part] @ k[b, :, part].T / math.sqrt(c) + bias[..., h]
        out[b, :, part] = softmax(scores) @ v[b, :, part]
    return linear(out, w, at + "proj").view_as(y)[:, :sides[0], :sides[1], :sides[2]]


def video_swin(x, w, depths, heads, window):
    """(B, T, 3, H, W) -> (B, T, H/32, W/32, C): a patch is of a frame and the next; none follows the last."""
    kernel, rows = w["patch_embed.proj.weight"], []
    for t in range(x.shape[1]):
        after = x[:, t + 1] if t + 1 < x.shape[1] else torch.zeros_like(x[:, t])
        row = F.conv2d(x[:, t], kernel[:, :, 0], stride=4) + F.conv2d(after, kernel[:, :, 1], stride=4)
        rows.append(row.permute(0, 2, 3, 1) + w["patch_embed.proj.bias"])
    x = norm(torch.stack(rows, 1), w, "patch_embed.norm", 1e-5)
    for i, depth in enumerate(depths):
        for j in range(depth):
            at = f"layers.{i}.blocks.{j}."
            x = x + swin_attention(norm(x, w, at + "norm1", 1e-5), w, at + "attn.", heads[i], window, j % 2)
            inside = gelu(linear(norm(x, w, at + "norm2", 1e-5), w, at + "mlp.fc1"))
            x = x + linear(inside, w, at + "mlp.fc2")
        if i < len(depths) - 1:
            at = f"layers.{i}.downsample."
            four = [x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
            x = norm(torch.cat(four, -1), w, at + "norm", 1e-5) @ w[at + "reduction.weight"].T
    return norm(x, w, "norm", 1e-5)


def bicubic(s, g):
    """(g, s): how much each of s samples counts for each of g, Keys's kernel of a = -0.75, edges repeated."""
    def kernel(d):
        d, a = abs(d), -0.75
        return ((a + 2) * d ** 3 - (a + 3) * d ** 2 + 1 if d <= 1
                else a * (d ** 3 - 5 * d ** 2 + 8 * d - 4) if d < 2 else 0.0)

    weights = torch.zeros(g, s, dtype=torch.float64)
    for i in range(g):
        centre = (i + 0.5) * s / g - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            weights[i, min(s - 1, max(0, j))] += kernel(centre - j)
    return weights


def assert_trained_alike(one, two):
    """Two runs' weights agree to rounding. A bias of all keys changes no softmax: its gradient is rounding
    alone, of which AdamW makes whole steps, so it is left out."""
    assert one.keys() == two.keys()
    for name in one:
        ours, theirs = one[name], two[name]
        if name.endswith("qkv.bias") and "xca" not in name:
            ours, theirs = (torch.cat([bias.chunk(3)[0], bias.chunk(3)[2]]) for bias in (ours, theirs))
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=2e-4)
