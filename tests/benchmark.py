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
from evilm import Config, EViLM, WordPiece
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


def measure_alone(preset, device, queue):
    """In a process of its own: seconds and GiB of a training step."""
    machine = machine_of(device)
    config, clips = PRESETS[preset]
    batch, model = make_batch(config, clips, machine.device), EViLM(config).to(machine.device)
    seconds, = median_times(machine.device, training_step(model, batch, machine), repeats=5)
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
    print("\ntraining step (all three objectives, labels given)")
    for preset, (_, clips) in PRESETS.items():
        seconds, memory, name = in_own_process(measure_alone, preset, args.device)
        print(f"  {preset:<6} {clips:>3} clips {1000 * seconds:8.0f} ms {clips / seconds:8.1f} clips/s "
              f"{memory:6.2f} GiB   ({name})")


def loader(args, machine):
    print("\nthe loader alone: synthetic GIFs, 4 of 12 frames at 128x128, words encoded, masks drawn")
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
    print(f"\nretrieval of {clips:,} captions among {clips:,} clips, toy preset (4.4)\n"
          f"  fast {seconds:.2f} s; joint {joint:.0f} s ({queries} captions timed), "
          f"{joint / seconds:.0f} times that")


def main():
    parts = {part.__name__: part for part in (presets, loader, manifest, retrieval)}
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
