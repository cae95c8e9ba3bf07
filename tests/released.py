"""Keys and shapes of the checkpoints that others published, {key: shape}, and files made of them."""
import json

import torch


def add(shapes, at, modules, bias=True):
    """The weight and the bias of each of `modules`, {name: the weight's shape}, under the name `at`."""
    for name, shape in modules.items():
        shapes[f"{at}{name}.weight"] = shape
        if bias:
            shapes[f"{at}{name}.bias"] = shape[:1]


def edgenext_small():
    """The authors' release, with its head."""
    shapes, before = {}, 3
    for i, (depth, dim, kernel, scale) in enumerate([(3, 48, 3, 0), (3, 96, 5, 2), (9, 160, 7, 3),
                                                     (3, 304, 9, 4)]):
        add(shapes, f"downsample_layers.{i}.", {"0": (dim, 3, 4, 4), "1": (dim,)} if i == 0
            else {"0": (before,), "1": (dim, before, 2, 2)})
        for j in range(depth):
            at = f"stages.{i}.{j}."
            shapes[at + "gamma"] = (dim,)
            add(shapes, at, {"norm": (dim,), "pwconv1": (4 * dim, dim), "pwconv2": (dim, 4 * dim)})
            if i == 0 or j < depth - 1:
                add(shapes, at, {"dwconv": (dim, 1, kernel, kernel)})
                continue
            shapes[at + "gamma_xca"], shapes[at + "xca.temperature"] = (dim,), (8, 1, 1)
            add(shapes, at, {"norm_xca": (dim,), "xca.qkv": (3 * dim, dim), "xca.proj": (dim, dim)})
            add(shapes, at, {f"convs.{k}": (-(-dim // scale), 1, 3, 3) for k in range(scale - 1)})
            if i == 1:
                add(shapes, at, {"pos_embd.token_projection": (dim, 64, 1, 1)})
        before = dim
    add(shapes, "", {"norm": (304,), "head": (1000, 304)})
    return shapes


def bert_miniature(width=128, layers=12, words=30522):
    """BERT of 12 layers, 128 wide, with the heads of its pretraining."""
    shapes, e = {}, "bert.embeddings."
    add(shapes, e, {"word_embeddings": (words, width), "position_embeddings": (512, width),
                    "token_type_embeddings": (2, width)}, bias=False)
    add(shapes, e, {"LayerNorm": (width,)})
    for i in range(layers):
        add(shapes, f"bert.encoder.layer.{i}.", {
            "attention.self.query": (width, width), "attention.self.key": (width, width),
            "attention.self.value": (width, width), "attention.output.dense": (width, width),
            "attention.output.LayerNorm": (width,), "intermediate.dense": (4 * width, width),
            "output.dense": (width, 4 * width), "output.LayerNorm": (width,)})
    add(shapes, "bert.", {"pooler.dense": (width, width)})
    shapes["cls.predictions.bias"] = (words,)
    add(shapes, "cls.", {
        "predictions.transform.dense": (width, width), "predictions.transform.LayerNorm": (width,),
        "predictions.decoder": (words, width), "seq_relationship": (2, width)})
    return shapes


def clip_openai(width=768, layers=12):
    """CLIP ViT-B/32's visual tower under its authors' names."""
    shapes = {"visual.class_embedding": (width,), "visual.positional_embedding": (50, width),
              "visual.proj": (width, 512)}
    add(shapes, "visual.", {"conv1": (width, 3, 32, 32)}, bias=False)
    add(shapes, "visual.", {"ln_pre": (width,)})
    for i in range(layers):
        at = f"visual.transformer.resblocks.{i}."
        shapes[at + "attn.in_proj_weight"] = (3 * width, width)
        shapes[at + "attn.in_proj_bias"] = (3 * width,)
        add(shapes, at, {"attn.out_proj": (width, width), "ln_1": (width,), "mlp.c_fc": (4 * width, width),
                         "mlp.c_proj": (width, 4 * width), "ln_2": (width,)})
    add(shapes, "visual.", {"ln_post": (width,)})
    return shapes


def in_hugging_faces_names(weights):
    """CLIP's visual tower as Hugging Face names it, where q, k and v lie apart."""
    names = {"visual.class": "embeddings.class", "visual.positional_embedding":
             "embeddings.position_embedding.weight", "visual.conv1": "embeddings.patch_embedding",
             "visual.ln_pre": "pre_layrnorm", "visual.ln_post": "post_layernorm",
             "visual.transformer.resblocks": "encoder.layers", "attn.": "self_attn.", "ln_": "layer_norm",
             "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    renamed = {}
    for name, x in weights.items():
        for openais, theirs in names.items():
            name = name.replace(openais, theirs)
        if "in_proj_" in name:
            renamed |= {name.replace("in_proj_", f"{part}_proj."): y for part, y in zip("qkv", x.chunk(3))}
        elif name != "visual.proj":
            renamed[name] = x
    return {f"vision_model.{name}": x for name, x in renamed.items()}


def video_swin_tiny(dim=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24)):
    """Video Swin-T of Kinetics-400, with windows of 8x7x7, less the `backbone.` before its keys in a file."""
    shapes = {}
    add(shapes, "patch_embed.", {"proj": (dim, 3, 2, 4, 4), "norm": (dim,)})
    for i, (depth, head) in enumerate(zip(depths, heads)):
        width = dim << i
        for j in range(depth):
            at = f"layers.{i}.blocks.{j}."
            add(shapes, at, {"norm1": (width,)})
            shapes[at + "attn.relative_position_bias_table"] = (15 * 13 * 13, head)
            shapes[at + "attn.relative_position_index"] = (8 * 7 * 7, 8 * 7 * 7)
            add(shapes, at, {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "norm2": (width,),
                             "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)})
        if i < 3:
            add(shapes, f"layers.{i}.downsample.", {"reduction": (2 * width, 4 * width)}, bias=False)
            add(shapes, f"layers.{i}.downsample.", {"norm": (4 * width,)})
    add(shapes, "", {"norm": (8 * dim,)})
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
