"""Times and memory of the parts, in one run: `python tests/benchmark.py [--device cuda] [--only NAME]`.

Each time is the median of several repeats; what is compared is timed in turn, A B A B, so that a machine
whose speed drifts does not decide. Memory is that of a process of its own (CPU) or what PyTorch allocated at
most (CUDA).
"""
import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evilm
import finetune
import pretrain
import toy_data
from evilm import Config, EViLM, SemanticTokenizer
from toy_data import Batches, ClipCaptions, Manifest

PRESETS = {"toy": (Config.toy(), 32), "paper": (Config.paper(), 4)}     # and how many clips a timed step has


def median_times(device, *works, repeats=7):
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


def make_batch(config, clips, device, words=12):
    """A random batch as pretrain.py's loader makes it, with codes."""
    samples = [{"caption": "", "mismatched": "", "epoch": 0, "index": i, "frames":
                torch.randint(0, 256, (config.frames, 3, config.size, config.size), dtype=torch.uint8),
                "numbers": torch.arange(config.frames), "broken": []} for i in range(clips)]
    words_of = lambda text, most: [2, *range(5, 5 + words), 3]      # stands for WordPiece.encode
    wordpiece = type("Words", (), {"encode": staticmethod(words_of)})
    batch = pretrain.PretrainBatch(wordpiece, config, tuple(pretrain.LOSSES), 0)(samples)
    batch["codes"] = torch.randint(config.codes, batch["cells"].shape)
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


def training_step(model, batch, machine):
    optimizer = evilm.make_optimizer(model, 1e-4, 0.01, machine.device)

    def step():
        with machine.autocast():
            predicted = pretrain.masked_pass(model, batch, tuple(pretrain.LOSSES))
        sum(pretrain.LOSSES[name](*found) for name, found in predicted.items()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def forward_pass(model, batch, machine):
    def forward():
        with torch.no_grad(), machine.autocast():
            video = model.encode_video(pretrain.scale(batch["frames"]))
            model.match(video, model.encode_text(batch["ids"][:, 0], batch["mask"][:, 0]),
                        batch["mask"][:, 0])
    return forward


def measure_alone(preset, kind, device, queue):
    """In a process of its own: seconds and GiB of one kind of work."""
    machine = evilm.set_up(device)
    config, clips = PRESETS[preset]
    batch, model = make_batch(config, clips, machine.device), EViLM(config).to(machine.device)
    work = {"forward": forward_pass, "training step": training_step}[kind](model, batch, machine)
    seconds, = median_times(machine.device, work, repeats=5)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if machine.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**30
    queue.put((seconds, memory, str(machine)))


def in_own_process(work, *inputs):
    """What `work(*inputs, queue)` puts in the queue, computed in a fresh process, whose memory is its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=work, args=(*inputs, queue))
    process.start()
    found = queue.get()
    process.join()
    return found


def presets(args, machine):
    print("\nforward pass and training step (all three objectives, codes kept)")
    for preset, (config, clips) in PRESETS.items():
        for kind in ("forward", "training step"):
            seconds, memory, name = in_own_process(measure_alone, preset, kind, args.device)
            print(f"  {preset:<6} {kind:<14} {clips:>3} clips {1000 * seconds:8.0f} ms "
                  f"{clips / seconds:8.1f} clips/s {memory:6.2f} GiB   ({name})")


def loader(args, machine):
    print("\nthe loader alone: synthetic GIFs, 4 of 12 frames of 64x64, words encoded, masks drawn")
    with tempfile.TemporaryDirectory() as folder:
        toy_data.render(f"{folder}/set", 640)
        splits, _ = toy_data.open_splits(f"{folder}/set")
        wordpiece = evilm.WordPiece.from_captions(row["caption"] for row in splits["train"])
        config = replace(Config.toy(), words=len(wordpiece))
        clips = ClipCaptions(splits["train"], config.frames, config.size, 0, train=True)
        collate = pretrain.PretrainBatch(wordpiece, config, tuple(pretrain.LOSSES), 0)
        for workers in (0, 1, 2):
            batches = iter(torch.utils.data.DataLoader(clips, batch_sampler=Batches(len(clips), 32, 0, 70),
                                                       collate_fn=collate, num_workers=workers))
            for _ in range(10):
                next(batches)
            began = time.perf_counter()
            count = sum(len(batch["frames"]) for batch in batches)
            print(f"  {workers} workers {count / (time.perf_counter() - began):8.0f} clips/s")


def growth(args, machine):
    print("\ngrowth of a training step, toy preset (ms)")
    toy = Config.toy()
    rows = {"frames (16 clips)": [(replace(toy, frames=n), 16, 12, n) for n in (1, 2, 4, 8, 16)],
            "clips": [(toy, n, 12, n) for n in (8, 16, 32, 64)],
            "words (32 clips)": [(toy, 32, n, n) for n in (4, 8, 16, 32, 60)]}
    for name, cases in rows.items():
        works = [training_step(EViLM(config).to(machine.device),
                               make_batch(config, clips, machine.device, words), machine)
                 for config, clips, words, _ in cases]
        times = median_times(machine.device, *works, repeats=5)
        print(f"  {name:<18}" + "  ".join(f"{n}: {1000 * t:.0f}" for (*_, n), t in zip(cases, times)))


def tokenizer_share(args, machine):
    print("\nthe tokenizer's share of a training step: codes online, and kept")
    for preset, (config, clips) in PRESETS.items():
        batch, model = make_batch(config, clips, machine.device), EViLM(config).to(machine.device)
        tokenizer = SemanticTokenizer(config).to(machine.device).eval()
        step = training_step(model, batch, machine)

        def online():
            with machine.autocast():
                tokenizer.tokenize(pretrain.scale(batch["frames"]))
            step()
        with_tokenizer, without = median_times(machine.device, online, step, repeats=5)
        print(f"  {preset:<6} online {1 - without / with_tokenizer:6.1%} of {1000 * with_tokenizer:.0f} ms, "
              f"kept 0% of {1000 * without:.0f} ms   (by multiply-adds of a forward pass: "
              f"{share_of_work(config):.0%})")


def share_of_work(config):
    cost = evilm.multiply_adds(config)
    return cost["tokenizer"] / (cost["tokenizer"] + cost["model"])


def straightforward(encoder, x):
    """The same network laid out as usual: maps contiguous as (N, C, H, W), two copies a Linear or norm."""
    for downsample, stage in zip(encoder.downsample_layers, encoder.stages):
        for layer in (*downsample, *stage):
            x = layer(x).contiguous()
    return encoder.norm(x).contiguous()


def layout(args, machine):
    print("\nthe visual encoder, straightforward layout / ours (above 1: ours is faster)")
    for preset, (config, clips) in PRESETS.items():
        encoder = EViLM(config).video_encoder.to(machine.device)
        frames = torch.rand(clips * config.frames, 3, config.size, config.size, device=machine.device)
        for bf16 in (False, True):
            here = replace(machine, bf16=bf16)

            def infer(network):
                with torch.no_grad(), here.autocast():
                    network(frames)

            def train(network):
                with here.autocast():
                    loss = network(frames).float().mean()
                loss.backward()
            for kind, work in (("inference", infer), ("training", train)):
                usual, ours = median_times(machine.device,
                                           lambda: work(lambda x: straightforward(encoder, x)),
                                           lambda: work(encoder), repeats=9)
                print(f"  {preset:<6} {'bf16' if bf16 else 'fp32'} {kind:<10} {1000 * usual:8.1f} / "
                      f"{1000 * ours:8.1f} ms  = {usual / ours:.2f}")


def manifest(args, machine):
    lines = 2_500_000
    print(f"\na manifest of {lines:,} lines")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.jsonl"
        with open(path, "w") as file:
            for i in range(lines):
                file.write(json.dumps({"video": f"clips/{i:07d}.mp4",
                                       "caption": f"a red circle of kind {i} moves left"}) + "\n")
        for name in ("first", "again"):
            seconds, grown, row_memory = in_own_process(open_manifest, path)
            print(f"  opened {name:<10} {seconds:6.2f} s, {grown:6.0f} MB more memory at most, "
                  f"{row_memory:+.0f} MB after 10,000 rows read")


def open_manifest(path, queue):
    def most():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    before, began = most(), time.perf_counter()
    rows = Manifest(path, ("video", "caption"))
    seconds, opened = time.perf_counter() - began, most()
    for i in range(0, len(rows), len(rows) // 10_000):
        rows[i]
    queue.put((seconds, opened - before, most() - opened))


@torch.no_grad()
def retrieval(args, machine, clips=1000, queries=20, words=12):
    """Fast retrieval (4.4) of 1,000 captions among 1,000 clips beside joint scoring of the same, on made-up
    pixels and words; then ranking among a million vectors that are kept on disk."""
    config = Config.toy()
    model = evilm.FastRetrieval(EViLM(config)).eval().to(machine.device)
    frames = torch.randint(0, 256, (clips, config.frames, 3, config.size, config.size), dtype=torch.uint8)
    ids = torch.randint(5, config.words, (clips, words), device=machine.device)
    mask = torch.ones_like(ids, dtype=torch.bool)

    def fast():
        vectors = finetune.embed_clips(model, frames, machine)
        texts = torch.cat([model.embed_text(*part).cpu() for part in zip(ids.split(500), mask.split(500))])
        evilm.ranks_by_cosine(texts, vectors, torch.arange(clips))

    def joint():
        video = pretrain.encode_videos(model.model, frames, machine)
        text = model.model.encode_text(ids[:queries], mask[:queries])
        for t, m in zip(text, mask):
            for part in video.split(200):
                model.model.match(part, t.expand(len(part), -1, -1), m.expand(len(part), -1))
    seconds = median_times(machine.device, fast, joint, repeats=3)
    whole = seconds[1] * clips / queries
    print(f"\nretrieval of {clips:,} captions among {clips:,} clips, toy preset, vectors and scores\n"
          f"  fast {seconds[0]:.2f} s; joint {whole:.0f} s ({queries} captions timed, times "
          f"{clips // queries}): {whole / seconds[0]:.0f} times as long")
    seconds, memory = in_own_process(rank_a_million)
    print(f"  1,000 queries ranked among 1,000,000 vectors of {config.width} on disk: {seconds:.1f} s, "
          f"{memory:.2f} GiB in all")


def rank_a_million(queue, count=1_000_000):
    width = Config.toy().width
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        stored = np.lib.format.open_memmap(file.name, "w+", np.float32, (count, width))
        for start in range(0, count, 50_000):
            stored[start:start + 50_000] = torch.nn.functional.normalize(torch.randn(50_000, width), dim=1)
        stored.flush()
        vectors = np.load(file.name, mmap_mode="r")
        began = time.perf_counter()
        queries = torch.nn.functional.normalize(torch.randn(1000, width), dim=1)
        evilm.ranks_by_cosine(queries, vectors, torch.randint(count, (1000,)))
        queue.put((time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))


def main():
    parts = {part.__name__: part for part in (presets, loader, growth, tokenizer_share, layout, manifest,
                                              retrieval)}
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"],
                        help="default: auto")
    parser.add_argument("--only", choices=list(parts), help="one part alone (default: all)")
    args = parser.parse_args()
    machine = evilm.set_up(args.device)
    print(f"{machine}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, part in parts.items():
        if args.only in (None, name):
            part(args, machine)


if __name__ == "__main__":
    main()
