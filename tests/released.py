"""Keys and shapes of the checkpoints that others published, {key: shape}, and files made of them."""
import json

import torch


def layer(shapes, at, *shape, bias=True):
    shapes[at + ".weight"] = shape
    if bias:
        shapes[at + ".bias"] = shape[:1]


def edgenext_small():
    """The authors' release, with its head."""
    shapes, before = {}, 3
    for i, (depth, dim, kernel, scale) in enumerate([(3, 48, 3, 0), (3, 96, 5, 2), (9, 160, 7, 3),
                                                     (3, 304, 9, 4)]):
        convolution, norm = (0, 1) if i == 0 else (1, 0)
        layer(shapes, f"downsample_layers.{i}.{convolution}", dim, before, *((4, 4) if i == 0 else (2, 2)))
        layer(shapes, f"downsample_layers.{i}.{norm}", dim if i == 0 else before)
        for j in range(depth):
            at = f"stages.{i}.{j}."
            shapes[at + "gamma"] = (dim,)
            layer(shapes, at + "norm", dim)
            layer(shapes, at + "pwconv1", 4 * dim, dim)
            layer(shapes, at + "pwconv2", dim, 4 * dim)
            if i == 0 or j < depth - 1:
                layer(shapes, at + "dwconv", dim, 1, kernel, kernel)
                continue
            shapes[at + "gamma_xca"], shapes[at + "xca.temperature"] = (dim,), (8, 1, 1)
            layer(shapes, at + "norm_xca", dim)
            layer(shapes, at + "xca.qkv", 3 * dim, dim)
            layer(shapes, at + "xca.proj", dim, dim)
            for k in range(scale - 1):
                layer(shapes, f"{at}convs.{k}", -(-dim // scale), 1, 3, 3)
            if i == 1:
                layer(shapes, at + "pos_embd.token_projection", dim, 64, 1, 1)
        before = dim
    layer(shapes, "norm", 304)
    layer(shapes, "head", 1000, 304)
    return shapes


def bert_miniature(width=128, layers=12, words=30522):
    """BERT of 12 layers, 128 wide, with the heads of its pretraining."""
    shapes, e = {}, "bert.embeddings."
    for name, rows in (("word", words), ("position", 512), ("token_type", 2)):
        layer(shapes, f"{e}{name}_embeddings", rows, width, bias=False)
    layer(shapes, e + "LayerNorm", width)
    for i in range(layers):
        at = f"bert.encoder.layer.{i}."
        for name in ("query", "key", "value"):
            layer(shapes, f"{at}attention.self.{name}", width, width)
        layer(shapes, at + "attention.output.dense", width, width)
        layer(shapes, at + "attention.output.LayerNorm", width)
        layer(shapes, at + "intermediate.dense", 4 * width, width)
        layer(shapes, at + "output.dense", width, 4 * width)
        layer(shapes, at + "output.LayerNorm", width)
    layer(shapes, "bert.pooler.dense", width, width)
    shapes["cls.predictions.bias"] = (words,)
    layer(shapes, "cls.predictions.transform.dense", width, width)
    layer(shapes, "cls.predictions.transform.LayerNorm", width)
    layer(shapes, "cls.predictions.decoder", words, width)
    layer(shapes, "cls.seq_relationship", 2, width)
    return shapes


def clip_openai(width=768, layers=12):
    """CLIP ViT-B/32's visual tower under its authors' names."""
    shapes = {"visual.class_embedding": (width,), "visual.positional_embedding": (50, width),
              "visual.proj": (width, 512)}
    layer(shapes, "visual.conv1", width, 3, 32, 32, bias=False)
    layer(shapes, "visual.ln_pre", width)
    for i in range(layers):
        at = f"visual.transformer.resblocks.{i}."
        shapes[at + "attn.in_proj_weight"] = (3 * width, width)
        shapes[at + "attn.in_proj_bias"] = (3 * width,)
        layer(shapes, at + "attn.out_proj", width, width)
        layer(shapes, at + "ln_1", width)
        layer(shapes, at + "mlp.c_fc", 4 * width, width)
        layer(shapes, at + "mlp.c_proj", width, 4 * width)
        layer(shapes, at + "ln_2", width)
    layer(shapes, "visual.ln_post", width)
    return shapes


def clip_hugging_face(width=768, layers=12):
    """The same tower under Hugging Face's names, less the `vision_model.` before them in a file."""
    shapes = {"embeddings.class_embedding": (width,)}
    layer(shapes, "embeddings.patch_embedding", width, 3, 32, 32, bias=False)
    layer(shapes, "embeddings.position_embedding", 50, width, bias=False)
    layer(shapes, "pre_layrnorm", width)
    for i in range(layers):
        at = f"encoder.layers.{i}."
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            layer(shapes, f"{at}self_attn.{name}", width, width)
        layer(shapes, at + "layer_norm1", width)
        layer(shapes, at + "mlp.fc1", 4 * width, width)
        layer(shapes, at + "mlp.fc2", width, 4 * width)
        layer(shapes, at + "layer_norm2", width)
    layer(shapes, "post_layernorm", width)
    return shapes


def video_swin_tiny(dim=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24)):
    """Video Swin-T of Kinetics-400, with windows of 8x7x7, less the `backbone.` before its keys in a file."""
    shapes = {}
    layer(shapes, "patch_embed.proj", dim, 3, 2, 4, 4)
    layer(shapes, "patch_embed.norm", dim)
    for i, (depth, head) in enumerate(zip(depths, heads)):
        width = dim << i
        for j in range(depth):
            at = f"layers.{i}.blocks.{j}."
            layer(shapes, at + "norm1", width)
            shapes[at + "attn.relative_position_bias_table"] = (15 * 13 * 13, head)
            shapes[at + "attn.relative_position_index"] = (8 * 7 * 7, 8 * 7 * 7)
            layer(shapes, at + "attn.qkv", 3 * width, width)
            layer(shapes, at + "attn.proj", width, width)
            layer(shapes, at + "norm2", width)
            layer(shapes, at + "mlp.fc1", 4 * width, width)
            layer(shapes, at + "mlp.fc2", width, 4 * width)
        if i < 3:
            layer(shapes, f"layers.{i}.downsample.reduction", 2 * width, 4 * width, bias=False)
            layer(shapes, f"layers.{i}.downsample.norm", 4 * width)
    layer(shapes, "norm", 8 * dim)
    return shapes


def write_safetensors(tensors, path):
    """A .safetensors file, as its description says."""
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, x in tensors.items():
        begin, end = end, end + x.nbytes
        header[name] = {"dtype": kinds[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
    header = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for x in tensors.values():
            file.write(x.contiguous().flatten().view(torch.uint8).numpy().tobytes())


def random_weights(shapes, kind=torch.float32):
    """No two tensors alike; tokens stay unlike each other through all layers, or no mistake would show."""
    pool = torch.randn(4_000_000)       # drawing 88 million numbers apart would take a second
    weights = {}
    for i, (name, shape) in enumerate(shapes.items()):
        size = torch.Size(shape).numel()
        numbers = pool[(9973 * i) % (len(pool) - size):][:size].view(shape)
        if len(shape) > 1 and size > max(shape) and "embedding" not in name:
            numbers = 0.7 * numbers / (size / shape[0]) ** 0.5
        elif name.endswith(("norm.weight", "Norm.weight", "gamma", "temperature")):
            numbers = 1.5 + 0.5 * numbers
        else:
            numbers = 0.2 * numbers if name.endswith("bias") else numbers
        weights[name] = numbers.to(kind)
    return weights
