"""Times and memory of the parts, in one run of four minutes on two cores.

    python tests/benchmark.py [--device cuda] [--only NAME]

A time is the median of several repeats; what is compared is timed in turn, A B A B, so that a machine whose
speed drifts does not decide. Memory is that of a process of its own (CPU) or PyTorch's peak (CUDA).
"""
import argparse
import importlib.util
import json
import multiprocessing
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evilm
import pretrain
from evilm import Config, EViLM, FastRetrieval, WordPiece
from toy_data import Batches, ClipCaptions, Manifest, make_loader

PRESETS = {"toy": (Config.toy(), 16, 5), "paper": (Config.paper(), 1, 3)}       # clips a step, repeats
WORDS = 12                      # of a caption
SIDE = 288                      # pixels of the clips that the loader is timed on, 16 frames


def machine_of(device):
    return evilm.set_up(pretrain.parse(["--device", device]))


def median_times(device, *works, repeats=5):
    """Median seconds of each work, timed in turn after one turn that is not counted."""
    seconds = [[] for _ in works]
    for turn in range(repeats + 1):
        for work, found in zip(works, seconds):
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                found.append(time.perf_counter() - began)
    return [statistics.median(found) for found in seconds]


def in_own_process(work, *inputs):
    """What `work(*inputs, queue)` puts in the queue, computed in a fresh process, whose memory is its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=work, args=(*inputs, queue))
    process.start()
    found = queue.get()
    process.join()
    return found


def peak_memory():
    """MB that this process has had at most. On Linux ru_maxrss would count the parent's as well."""
    if Path("/proc/self/status").exists():
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def vocabulary():
    return WordPiece([*evilm.SPECIAL, *map(chr, range(ord("a"), ord("z") + 1))])


def make_samples(config, clips, words=WORDS):
    """Samples of noise, as `ClipCaptions` makes them."""
    caption = " ".join(chr(ord("a") + i % 26) for i in range(words))
    frames = torch.randint(0, 256, (clips, config.frames, 3, config.size, config.size), dtype=torch.uint8)
    return [{"caption": caption, "mismatched": caption, "epoch": 0, "index": i, "frames": frames[i],
             "numbers": torch.arange(config.frames), "broken": []} for i in range(clips)]


def make_batch(config, clips, device, words=WORDS):
    """A random batch as pretrain.py's loader makes it, on the device, with labels."""
    batch = pretrain.PretrainBatch(vocabulary(), config, pretrain.OBJECTIVES, 0)(
        make_samples(config, clips, words))
    batch["labels"] = torch.randint(config.codes, batch["masked_patches"].shape)
    batch["frames"] = batch["frames"].float() / 255
    return {name: value.to(device) for name, value in batch.items() if torch.is_tensor(value)}


def training_step(model, batch, machine):
    optimizer = evilm.make_optimizer(model, 1e-4, 0.01, machine.device)

    def step():
        with machine.autocast():
            loss, _ = evilm.pretraining_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def forward_pass(model, batch, machine):
    def forward():
        with torch.no_grad(), machine.autocast():
            video, text = model.encode_video(batch["frames"]), model.encode_text(batch["ids"], batch["mask"])
            model.match(video, text, batch["mask"])
    return forward


# ---------------------------------------------------------------------- against other compositions of layers


class PlainEncoder(nn.Module):
    """EdgeNeXt as it is usually laid out: maps contiguous as (N, C, H, W), a copy at each Linear or norm."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        for downsample, stage in zip(self.encoder.downsample_layers, self.encoder.stages):
            for layer in (*downsample, *stage):
                x = layer(x).contiguous()
        return self.encoder.norm(x)


class PlainTransformer(nn.TransformerEncoder):
    def __init__(self, width, heads, layers, pre_norm, dropout):
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, F.gelu, 1e-12, batch_first=True,
                                           norm_first=pre_norm)
        super().__init__(layer, layers, enable_nested_tensor=False)

    def forward(self, x, mask=None):
        return super().forward(x, src_key_padding_mask=None if mask is None else ~mask)


class HuggingFaceBert(nn.Module):
    def __init__(self, c):
        from transformers import BertConfig, BertModel
        super().__init__()
        self.bert = BertModel(BertConfig(
            hidden_size=c.text_width, num_hidden_layers=c.text_layers, num_attention_heads=c.text_heads,
            intermediate_size=4 * c.text_width, vocab_size=c.vocab_rows), add_pooling_layer=False)

    def forward(self, x, mask):
        return self.bert(inputs_embeds=x, attention_mask=mask).last_hidden_state


def compositions(config, device):
    """{name: the model, or the same sizes made of other layers}; timm and transformers where installed."""
    def with_parts(**parts):
        model = EViLM(config)
        for name, part in parts.items():
            setattr(model, name, part)
        return model.to(device)

    c = config
    decoder = PlainTransformer(c.width, c.decoder_heads, c.decoder_layers, c.decoder_pre_norm, c.dropout)
    found = {"ours": with_parts(), "torch.nn": with_parts(
        video_encoder=PlainEncoder(EViLM(c).video_encoder), decoder=decoder,
        text_encoder=PlainTransformer(c.text_width, c.text_heads, c.text_layers, False, c.dropout))}
    if c.preset == "paper" and all(map(importlib.util.find_spec, ("timm", "transformers"))):
        import timm
        encoder = timm.create_model("edgenext_small", num_classes=0, global_pool="")
        found["timm, transformers"] = with_parts(video_encoder=encoder, text_encoder=HuggingFaceBert(c),
                                                 decoder=decoder)
    return found


def models(args, machine):
    print("\nforward pass and training step, three objectives, labels given; the same sizes made of other "
          "layers: their time over ours")
    for preset, (config, clips, repeats) in PRESETS.items():
        models, batch = compositions(config, machine.device), make_batch(config, clips, machine.device)
        for bf16 in (False, True):
            here = replace(machine, bf16=bf16)
            if bf16 and machine.device.type == "cpu":
                repeats = 1                     # some processors compute bf16 ten times slower than fp32
            for kind, work in (("forward", forward_pass), ("step", training_step)):
                times = median_times(machine.device, *(work(model, batch, here) for model in models.values()),
                                     repeats=repeats)
                others = "  ".join(f"{name} {t / times[0]:.2f}"
                                   for name, t in zip([*models][1:], times[1:]))
                print(f"  {preset:<6}{'bf16' if bf16 else 'fp32'} {kind:<8}{clips:>3} clips "
                      f"{1000 * times[0]:7.0f} ms {clips / times[0]:7.1f} clips/s   {others}")


def growth(args, machine):
    print("\ngrowth of a training step, toy preset, ms")
    toy = replace(Config.toy(), max_words=64)
    cases = {"frames (8 clips)": [(replace(toy, frames=n), 8, WORDS, n) for n in (1, 2, 4, 8, 16)],
             "clips": [(toy, n, WORDS, n) for n in (4, 8, 16, 32, 64)],
             "words (16 clips)": [(toy, 16, n, n) for n in (4, 8, 16, 32, 60)]}
    for name, rows in cases.items():
        works = [training_step(EViLM(config).to(machine.device),
                               make_batch(config, clips, machine.device, words), machine)
                 for config, clips, words, _ in rows]
        times = median_times(machine.device, *works, repeats=3)
        print(f"  {name:<18}" + "  ".join(f"{n}: {1000 * t:.0f}" for (*_, n), t in zip(rows, times)))


def largest(args, machine):
    """On CUDA: steps of the paper preset with more and more clips, until they do not fit."""
    print("\npaper preset, training step, bf16")
    try:
        for clips in (32, 64, 128, 256, 512, 1024):
            torch.cuda.reset_peak_memory_stats()
            step = training_step(EViLM(Config.paper()).to(machine.device),
                                 make_batch(Config.paper(), clips, machine.device), machine)
            seconds, = median_times(machine.device, step, repeats=3)
            print(f"  {clips:>5} clips {clips / seconds:7.0f} clips/s "
                  f"{torch.cuda.max_memory_allocated() / 2**30:6.1f} GiB")
    except torch.OutOfMemoryError:
        print(f"  {clips:>5} clips do not fit")


def memory(args, machine):
    """The paper preset's memory a clip in training: what the backward pass keeps, in bf16."""
    def kept(clips):
        batch, storages = make_batch(config, clips, machine.device), {}

        def keep(x):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), bf16.autocast():
            loss, _ = evilm.pretraining_loss(model, batch)
        return sum(storages.values()), loss             # the loss holds what is counted

    config, bf16 = Config.paper(), replace(machine, bf16=True)
    model = EViLM(config).to(machine.device)
    a_clip = (kept(3)[0] - kept(2)[0]) / 2**20
    print(f"\nmemory of the paper preset: {a_clip:.0f} MiB a clip in a pre-training step, bf16; so "
          f"{a_clip * 3312 / 8 / 2 / 1024:.0f} GiB on each of 8 GPUs for 3,312 clips with --accumulate 2")


# -------------------------------------------------------------------------------------------- clips and lines


def write_clips(folder, count=8, frames=16):
    """The same clips in each format, and of each a manifest that names every clip eight times."""
    folder, found = Path(folder), {}
    formats = ["gif", "webp", "jpg", "npy", *["mp4"] * bool(shutil.which("ffmpeg"))]
    generator = np.random.default_rng(0)
    for kind in formats:
        (folder / kind).mkdir()
    for i in range(count):
        noise = generator.integers(0, 256, (frames, 18, 18, 3), dtype=np.uint8)     # blurred when enlarged
        images = [Image.fromarray(x).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for x in noise]
        for kind in ("gif", "webp"):
            images[0].save(folder / kind / f"{i}.{kind}", save_all=True, append_images=images[1:])
        np.save(folder / "npy" / f"{i}.npy", np.stack([np.asarray(image) for image in images]))
        (folder / "jpg" / f"{i}.jpg").mkdir()
        for number, image in enumerate(images):
            image.save(folder / "jpg" / f"{i}.jpg" / f"{number:05d}.jpg", quality=90)
        if "mp4" in formats:
            images = folder / "jpg" / f"{i}.jpg" / "%05d.jpg"
            subprocess.run(["ffmpeg", "-v", "error", "-i", images, "-pix_fmt", "yuv420p",
                            folder / "mp4" / f"{i}.mp4"], check=True)
    for kind in formats:
        lines = [{"video": f"{i}.{kind}", "caption": f"a b {chr(ord('c') + i)}"} for i in range(count)]
        (folder / kind / "train.jsonl").write_text("\n".join(map(json.dumps, 8 * lines)))
        found[kind] = Manifest(folder / kind / "train.jsonl", ("video", "caption"))
    return found


def batches_of(manifest, config, clips, steps, workers):
    dataset = ClipCaptions(manifest, config.frames, config.size, 0, train=True, augment=True)
    collate = pretrain.PretrainBatch(vocabulary(), config, pretrain.OBJECTIVES, 0)
    return make_loader(dataset, Batches(len(dataset), clips, 0, steps), collate, workers)


def loader(args, machine):
    config = Config.paper()
    print(f"\nthe loader with one worker, paper preset: 4 of 16 frames of {SIDE}x{SIDE}, clips/s")
    collate = pretrain.PretrainBatch(vocabulary(), config, pretrain.OBJECTIVES, 0)
    samples = make_samples(config, 64)
    with tempfile.TemporaryDirectory() as folder:
        sets = write_clips(folder)
        for kind, manifest in sets.items():
            batches = iter(batches_of(manifest, config, 8, 5 if kind == "mp4" else 15, 1))
            next(batches)                               # the worker has started
            began, count = time.perf_counter(), sum(len(batch["frames"]) for batch in batches)
            print(f"  {kind:<5}{count / (time.perf_counter() - began):8.0f}")
        if machine.device.type == "cuda":
            waiting(sets["jpg"], machine, args)
    seconds, = median_times(machine.device, lambda: collate(samples))
    print(f"  collating and masking: {1000 * seconds / len(samples):.2f} ms a clip")


def waiting(manifest, machine, args, clips=64, steps=20):
    """Training on data in memory and from disk: clips/s, and the share of the time that the GPU waits."""
    config = Config.paper()
    model, batch = EViLM(config).to(machine.device), make_batch(config, clips, machine.device)
    step = training_step(model, batch, machine)
    in_memory, = median_times(machine.device, step)
    flags = pretrain.parse(["--device", args.device])
    evilm.set_up(flags)                                 # sets the workers of a run
    workers = flags.workers
    loader, waited = iter(batches_of(manifest, config, clips, steps + 2, workers)), 0.0
    for number in range(steps + 2):
        if number == 2:
            torch.cuda.synchronize()
            began, waited = time.perf_counter(), 0.0
        asked = time.perf_counter()
        frames = next(loader)["frames"]
        waited += time.perf_counter() - asked
        batch["frames"] = frames.to(machine.device, non_blocking=True).float() / 255
        step()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    print(f"  training, {clips} clips a step: in memory {clips / in_memory:.0f} clips/s, from JPEG folders "
          f"with {workers} workers {clips * steps / seconds:.0f}, waiting {waited / seconds:.0%} of the time")


def manifest(args, machine, lines=2_500_000):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.jsonl"
        with open(path, "w") as file:
            file.writelines(f'{{"video": "{i:07d}.mp4", "caption": "a red circle of kind {i} moves left"}}\n'
                            for i in range(lines))
        seconds, grown = in_own_process(open_manifest, path)
        print(f"\na manifest of {lines:,} lines: opened in {seconds:.1f} s, {grown:.0f} MB")


def open_manifest(path, queue):
    before, began = peak_memory(), time.perf_counter()
    rows = Manifest(path, ("video", "caption"))
    seconds = time.perf_counter() - began
    for i in range(0, len(rows), len(rows) // 10_000):
        rows[i]
    queue.put((seconds, peak_memory() - before))


# -------------------------------------------------------------------------------------------------- retrieval


@torch.no_grad()
def retrieval(args, machine, clips=1000, queries=10):
    model = FastRetrieval(EViLM(Config.toy())).eval().to(machine.device)
    batch = make_batch(Config.toy(), clips, machine.device)
    frames, text = batch["frames"].split(50), (batch["ids"], batch["mask"])
    video = torch.cat([model.model.encode_video(part) for part in frames])
    words, mask = model.model.encode_text(*(x[:queries] for x in text)), text[1][:queries]

    def fast():
        videos = torch.cat([model.embed_video(part) for part in frames])
        evilm.rank_of_truth(model.embed_text(*text) @ videos.t(), torch.arange(clips, device=machine.device))

    seconds, encoding, scoring = median_times(
        machine.device, fast, lambda: [model.model.encode_video(part) for part in frames],
        lambda: evilm.joint_scores(model.model, video, words, mask), repeats=1)
    joint = encoding + scoring * clips / queries
    print(f"\nretrieval of {clips:,} captions among {clips:,} clips, toy preset (4.4): fast {seconds:.1f} s, "
          f"joint {joint:.0f} s ({queries} captions timed), {joint / seconds:.0f} times that")


def million(args, machine):
    seconds, grown = in_own_process(rank_a_million, args.device)
    print(f"\n1,000 captions ranked among 1,000,000 videos' vectors: {seconds:.0f} s, {grown / 1024:.1f} GB")


def rank_a_million(device, queue, captions=1000, videos=1_000_000, part=10_000):
    machine, model = machine_of(device), FastRetrieval(EViLM(Config.toy())).eval()
    model.to(machine.device).embed_video = lambda vectors: vectors              # computed before
    rows = [{"video": str(i), "caption": "a b c"} for i in range(videos)]
    found = ({"frames": torch.randint(256, (part, Config.toy().width), dtype=torch.uint8), "broken": [],
              "whole": torch.ones(part, dtype=torch.bool), "rows": rows[i:i + part]}
             for i in range(0, videos, part))
    before, began = peak_memory(), time.perf_counter()
    run = SimpleNamespace(name_broken=lambda *_: None)
    evilm.score_retrieval(model, rows[:captions], found, vocabulary(), machine, run)
    queue.put((time.perf_counter() - began, peak_memory() - before))


def main():
    parts = models, growth, memory, largest, loader, manifest, retrieval, million
    parts = {part.__name__: part for part in parts}
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--only", choices=list(parts), help="one part alone (default: all)")
    args = parser.parse_args()
    machine = machine_of(args.device)
    print(f"{machine}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    if machine.device.type != "cuda":
        del parts["largest"]
    for name, part in parts.items():
        if args.only in (None, name):
            part(args, machine)


if __name__ == "__main__":
    main()
