"""Times and memory of the parts, in one run: `python tests/benchmark.py [--device cuda] [--only NAME]`.

Each time is the median of several repeats; what is compared is timed in turn, A B A B, so that a machine
whose speed drifts does not decide. Memory is that of a process of its own (CPU) or the most that PyTorch
allocated (CUDA).
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

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evilm
import pretrain
import toy_data
from evilm import Config, EViLM, SemanticTokenizer, WordPiece
from toy_data import Batches, ClipCaptions, Manifest

PRESETS = {"toy": (Config.toy(), 32), "paper": (Config.paper(), 4)}     # and how many clips a timed step has


def machine_of(device):
    return evilm.set_up(pretrain.parse(["--device", device]))


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
    """A random batch as pretrain.py's loader makes it, on the device, with labels."""
    vocab = [*evilm.SPECIAL, *map(chr, range(ord("a"), ord("z") + 1))]
    caption = " ".join(vocab[len(evilm.SPECIAL) + i % 26] for i in range(words))
    frames = torch.randint(0, 256, (clips, config.frames, 3, config.size, config.size), dtype=torch.uint8)
    samples = [{"caption": caption, "mismatched": caption, "epoch": 0, "index": i, "frames": frames[i],
                "numbers": torch.arange(config.frames), "broken": []} for i in range(clips)]
    batch = pretrain.PretrainBatch(WordPiece(vocab), config, pretrain.OBJECTIVES, 0)(samples)
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


def measure_alone(preset, kind, device, queue):
    """In a process of its own: seconds and GiB of one kind of work."""
    machine = machine_of(device)
    config, clips = PRESETS[preset]
    batch, model = make_batch(config, clips, machine.device), EViLM(config).to(machine.device)
    work = {"forward": forward_pass, "training step": training_step}[kind](model, batch, machine)
    seconds, = median_times(machine.device, work, repeats=5)
    on_cuda, most = machine.device.type == "cuda", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = torch.cuda.max_memory_allocated() / 2**30 if on_cuda else most / 2**20
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
    print("\nforward pass and training step (all three objectives, labels given)")
    for preset, (_, clips) in PRESETS.items():
        for kind in ("forward", "training step"):
            seconds, memory, name = in_own_process(measure_alone, preset, kind, args.device)
            print(f"  {preset:<6} {kind:<14} {clips:>3} clips {1000 * seconds:8.0f} ms "
                  f"{clips / seconds:8.1f} clips/s {memory:6.2f} GiB   ({name})")


def loader(args, machine):
    print("\nthe loader alone: synthetic GIFs, 4 of 12 frames of 64x64, words encoded, masks drawn")
    with tempfile.TemporaryDirectory() as folder:
        toy_data.render(f"{folder}/set", 640)
        train = toy_data.open_splits(f"{folder}/set")["train"]
        wordpiece = WordPiece.from_captions(row["caption"] for row in train)
        config = replace(Config.toy(), vocab_size=len(wordpiece))
        clips = ClipCaptions(train, config.frames, config.size, 0, train=True)
        collate = pretrain.PretrainBatch(wordpiece, config, pretrain.OBJECTIVES, 0)
        for workers in (0, 1, 2):
            batches = iter(toy_data.make_loader(clips, Batches(len(clips), 32, 0, 70), collate, workers))
            for _ in range(10):
                next(batches)
            began = time.perf_counter()
            count = sum(len(batch["frames"]) for batch in batches)
            print(f"  {workers} workers {count / (time.perf_counter() - began):8.0f} clips/s")


def growth(args, machine):
    print("\ngrowth of a training step, toy preset (ms)")
    toy = replace(Config.toy(), max_words=64)
    rows = {"frames (16 clips)": [(replace(toy, frames=n), 16, 12, n) for n in (1, 2, 4, 8, 16)],
            "clips": [(toy, n, 12, n) for n in (8, 16, 32, 64)],
            "words (32 clips)": [(toy, 32, n, n) for n in (4, 8, 16, 32, 60)]}
    for name, cases in rows.items():
        works = [training_step(EViLM(config).to(machine.device),
                               make_batch(config, clips, machine.device, words), machine)
                 for config, clips, words, _ in cases]
        times = median_times(machine.device, *works, repeats=5)
        print(f"  {name:<18}" + "  ".join(f"{n}: {1000 * t:.0f}" for (*_, n), t in zip(cases, times)))


def tokenizer(args, machine):
    print("\nthe tokenizer's part of a training step: labels online, and offline")
    for preset, (config, clips) in PRESETS.items():
        batch, model = make_batch(config, clips, machine.device), EViLM(config).to(machine.device)
        labels = SemanticTokenizer(config).to(machine.device).eval()
        step, cost = training_step(model, batch, machine), evilm.multiply_adds(config)

        def online():
            with machine.autocast():
                labels.tokenize(batch["frames"])
            step()
        seconds, without = median_times(machine.device, online, step, repeats=5)
        print(f"  {preset:<6} online {1 - without / seconds:6.1%} of {1000 * seconds:.0f} ms, offline 0% of "
              f"{1000 * without:.0f} ms   (by multiply-adds of a forward pass: "
              f"{cost['tokenizer'] / (cost['tokenizer'] + cost['model']):.0%})")


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
        seconds, grown, row_memory = in_own_process(open_manifest, path)
        print(f"  opened in {seconds:.2f} s, {grown:.0f} MB more memory at most, {row_memory:+.0f} MB after "
              "10,000 rows read")


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
def retrieval(args, machine, clips=1000, queries=20):
    model = evilm.FastRetrieval(EViLM(Config.toy())).eval().to(machine.device)
    batch = make_batch(Config.toy(), clips, machine.device)
    frames, text = batch["frames"].split(50), (batch["ids"], batch["mask"])
    video = torch.cat([model.model.encode_video(part) for part in frames])
    words, mask = model.model.encode_text(*(x[:queries] for x in text)), text[1][:queries]

    def fast():
        videos = torch.cat([model.embed_video(part) for part in frames])
        evilm.rank_of_truth(model.embed_text(*text) @ videos.t(), torch.arange(clips, device=machine.device))

    seconds, encoding, scoring = median_times(
        machine.device, fast, lambda: [model.model.encode_video(part) for part in frames],
        lambda: evilm.joint_scores(model.model, video, words, mask), repeats=3)
    joint = encoding + scoring * clips / queries
    print(f"\nretrieval of {clips:,} captions among {clips:,} clips, toy preset (4.4)\n  fast {seconds:.2f} s; "
          f"joint {joint:.0f} s ({queries} captions timed), {joint / seconds:.0f} times that")


def main():
    parts = {part.__name__: part for part in (presets, loader, growth, tokenizer, layout, manifest,
                                              retrieval)}
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--only", choices=list(parts), help="one part alone (default: all)")
    args = parser.parse_args()
    machine = machine_of(args.device)
    print(f"{machine}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, part in parts.items():
        if args.only in (None, name):
            part(args, machine)


if __name__ == "__main__":
    main()
