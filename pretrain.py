"""Stage 2: video-language pretraining (3.4), L = L_MLM + L_VTM + L_MVM. The main job.

    python pretrain.py                                  the toy preset on the synthetic set, on what there is
    python pretrain.py --device cuda --preset paper --data data/webvid
    torchrun --nproc-per-node=2 pretrain.py             over processes; several nodes: torchrun's own flags

First trains the video encoder (on pictures) and the tokenizer, if they are missing. Leaves in --out: last.pt
(go on with --resume), best.pt (highest mean val accuracy), metrics.jsonl, curves.png, masked.png,
retrieval.png.
"""
import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import train_encoder
import train_tokenizer
from evilm import (EViLM, InputError, Run, SemanticTokenizer, as_typed, block_mask, checkpoint_path,
                   common_flags, config_of, configure, is_ours, load, load_published, make_optimizer,
                   mask_frames, mask_words, mlm_loss, mvm_loss, prefetch, random_mask, rank_of_truth,
                   read_torch, run_script, same_set, save, set_up, vtm_loss, vtm_targets)
from toy_data import BrokenClip, DataError, open_split, pictures, read_clip, spans, tags
from train_tokenizer import (batches_left, between_evaluations, captions_of, clips_of, encode_padded,
                             evaluation_loader, make_loader, make_vocabulary, open_clips, pad, read_lines,
                             scale)

LOSSES = {"vtm": vtm_loss, "mlm": mlm_loss, "mvm": mvm_loss}
FUNCTION_WORDS = set("a an the is are there that and then while on at in of to with it".split())


def parse(argv=None):
    parser = common_flags(__doc__, stage="")
    parser.add_argument("--tokenizer", default="runs/tokenizer", metavar="PATH|none", help="run or "
                        "checkpoint of train_tokenizer.py; trained first where there is none; none: no MVM "
                        "(default: runs/tokenizer)")
    parser.add_argument("--objectives", default="vtm,mlm,mvm", metavar="LIST", help="which losses of Eq. "
                        "(8), Table 5's switches; one that is off masks nothing (default: vtm,mlm,mvm)")
    parser.add_argument("--init-video", default="auto", metavar="PATH|none", help="what the video encoder "
                        "starts from: run or checkpoint of train_encoder.py, trained first where there is "
                        "none, or published EdgeNeXt-Small, a torch file or .safetensors, for --preset "
                        "paper; none: from nothing (default: runs/encoder in the toy preset if the set says "
                        "what its pictures show, as the synthetic one does, else none)")
    parser.add_argument("--init-text", metavar="FILE", help="published BERT of 12 layers, 128 wide, that the "
                        "language encoder starts from, its words in BERT's vocab.txt, named by --vocab "
                        "(default: none)")
    parser.add_argument("--codes", default="auto", choices=["auto", "kept", "online"], help="MVM's labels: "
                        "kept, computed once for every source frame and saved beside the tokenizer, or "
                        "online; auto: kept where frames are not augmented and clips are seen three times or "
                        "more (default: auto)")
    parser.add_argument("--keep-at", default="", metavar="SHARES", help="leave checkpoints at these shares "
                        "of the run, e.g. 0.2,0.4 (default: none)")
    parser.add_argument("--out", default="runs/pretrain", metavar="DIR", help="the run's folder (default: "
                        "runs/pretrain)")
    args = parser.parse_args(argv)
    args.objectives = tuple(name for name in args.objectives.split(",") if name)
    if not args.objectives or set(args.objectives) - set(LOSSES):
        raise InputError(f"--objectives {','.join(args.objectives)}: a list of some of {','.join(LOSSES)}")
    if args.init_text and not args.vocab:
        raise InputError(f"--init-text {args.init_text}: its rows are told apart by BERT's words; name its "
                         "vocab.txt with --vocab")
    if args.tokenizer == "none":
        args.objectives = tuple(name for name in args.objectives if name != "mvm")
    try:
        args.keep_at = [float(share) for share in args.keep_at.split(",") if share]
    except ValueError:
        raise InputError(f"--keep-at {args.keep_at}: shares of the run, such as 0.2,0.4") from None
    return args


# --------------------------------------------------------------------------------------------- masked batches


class PretrainBatch:
    """Makes a batch of samples and masks it; all masks of a sample follow from (seed, epoch, index).

    Frames (B, T, 3, H, W) uint8 travel whole. Texts are (B, 2, L): [:, 0] the matched captions, [:, 1] the
    mismatched: `ids` whole, `masked` with words masked, `mask` True where a word is; `words` (B, L) are the
    matched captions' words to predict. `cells` (B, T, g, g) are to be masked. What stays on the CPU is
    NumPy's, so that no step waits for the device: `rows` (B,) and `numbers` (B, T), where frames come from,
    and `counts` (3,), the pairs, words and cells that the losses are means over.
    """
    mismatched = True

    def __init__(self, wordpiece, config, objectives, seed):
        self.wordpiece, self.config, self.objectives, self.seed = wordpiece, config, objectives, seed

    def __call__(self, samples):
        c = self.config
        texts = [self.wordpiece.encode(s[name], c.max_words)
                 for s in samples for name in ("caption", "mismatched")]
        ids, mask = (x.view(len(samples), 2, -1) for x in pad(texts, max(map(len, texts))))
        masked, chosen = ids.clone(), torch.zeros_like(mask)
        cells = torch.zeros(len(samples), c.frames, c.grid, c.grid, dtype=torch.bool)
        draw_cells = block_mask if c.blocks else random_mask
        for i, sample in enumerate(samples):
            entropy = np.random.SeedSequence([self.seed, sample["epoch"], sample["index"], 1])
            generator = torch.Generator().manual_seed(int(entropy.generate_state(1)[0]))
            if "mvm" in self.objectives:
                cells[i] = draw_cells(c.frames, c.grid, c.mask_ratio, generator)
            if "mlm" in self.objectives:        # in both captions, or a [MASK] would tell which pair is right
                for j in range(2):
                    masked[i, j], chosen[i, j] = mask_words(ids[i, j], c.words, generator, c.word_ratio)
        return {"frames": torch.stack([s["frames"] for s in samples]), "ids": ids, "masked": masked,
                "mask": mask, "words": chosen[:, 0], "cells": cells,
                "rows": np.array([s["index"] for s in samples]),
                "numbers": np.stack([s["numbers"] for s in samples]),
                "counts": np.array([2 * len(samples), int(chosen[:, 0].sum()), int(cells.sum())]),
                "captions": [s["caption"] for s in samples],
                "broken": [line for s in samples for line in s["broken"]]}


def masked_pass(model, batch, objectives):
    """One masked pass (3.2, 3.4) -> {objective: (logits, targets)}; the batch's `codes` (B, T, g, g) label
    MVM."""
    frames = scale(batch["frames"])
    if "mvm" in objectives:
        frames = mask_frames(frames, batch["cells"])
    vtm, mlm, mvm = model(frames, batch["masked"][:, 0], batch["mask"][:, 0],
                          words=batch["words"] if "mlm" in objectives else None,
                          cells=batch["cells"].flatten(1) if "mvm" in objectives else None,
                          mismatched=(batch["masked"][:, 1], batch["mask"][:, 1])
                          if "vtm" in objectives else None)
    predicted = {}
    if vtm is not None:
        predicted["vtm"] = vtm, vtm_targets(vtm)
    if mlm is not None:
        predicted["mlm"] = mlm, batch["ids"][:, 0][batch["words"]]
    if mvm is not None:
        predicted["mvm"] = mvm, batch["codes"][batch["cells"]]
    return predicted


# ----------------------------------------------------------------------------------------- the stages before


def stage_flags(args, folder):
    """The flags of an earlier stage that this run trains first, its folder being `folder`."""
    flags = ["--data", args.data, "--preset", args.preset, "--device", args.device, "--precision",
             args.precision, "--workers", str(args.workers), "--seed", str(args.seed), "--out", str(folder)]
    flags += ["--max-steps", str(args.max_steps)] * bool(args.max_steps)
    flags += ["--vocab", args.vocab] * bool(args.vocab)
    flags += ["--vocab-captions", args.vocab_captions] * bool(args.vocab_captions)
    flags += [flag for change in args.config for flag in ("--config", change)]
    flags += ["--compile"] * args.compile + ["--strict"] * args.strict
    return flags + ["--resume"] * (folder / "last.pt").exists()


def is_trained(folder):
    """Whether a run's folder holds a model that was trained to its end; a run that was broken off, none."""
    metrics = folder / "metrics.jsonl"
    return (folder / "best.pt").exists() and (not metrics.exists() or
                                              '"split": "test"' in metrics.read_text())


def train_first(stage, folder, args, machine):
    """Trains an earlier stage, a module of its own, where its run's folder holds no trained model."""
    if not is_trained(folder):
        machine.say(f"no trained {stage.__name__.removeprefix('train_')} in {folder}: training it first "
                    f"(python {stage.__name__}.py)")
        stage.train(stage.parse(stage_flags(args, folder)), machine)


def shows_pictures(config, manifest):
    """Whether there are tags for a video encoder to start from, and no published weights of its size."""
    return config.preset == "toy" and any(map(tags, islice(manifest, 100)))


def names_file(path):
    """Whether --init-video names a file; else it is a run's folder, which may still have to be made."""
    return Path(path).suffix != "" and not Path(path).is_dir()


def open_encoder(args, machine):
    """Trains the video encoder that --init-video names, where it names a folder that holds none."""
    if args.init_video != "none" and not names_file(args.init_video) and not args.resume:
        train_first(train_encoder, Path(args.init_video), args, machine)


def open_tokenizer(args, config, wordpiece, machine):
    """The tokenizer that --tokenizer names, in evaluation mode, and its run's folder; it is trained where
    there is none. (None, None) without MVM."""
    if "mvm" not in args.objectives:
        return None, None
    path = checkpoint_path(args.tokenizer)
    named = args.tokenizer.endswith(".pt")
    if named and not path.exists():
        raise InputError(f"--tokenizer {path}: there is no such checkpoint")
    if not named:
        train_first(train_tokenizer, path.parent, args, machine)
    checkpoint = load(path, "tokenizer")
    for what, theirs, ours in (("preset", checkpoint["config"]["preset"], config.preset),
                               ("frame size", checkpoint["config"]["size"], config.size),
                               ("vocabulary", checkpoint["vocab"], wordpiece.vocab)):
        if theirs != ours:
            raise InputError(f"--tokenizer {path} was trained with another {what}: train one for this run "
                             "(train_tokenizer.py --out DIR) and name it, or --tokenizer none")
    tokenizer = SemanticTokenizer(config_of(checkpoint)).to(machine.device)
    tokenizer.load_state_dict(checkpoint["model"])
    return tokenizer.eval().requires_grad_(False), path.parent


class Labels:
    """MVM's labels of a batch, (B, T, g, g): from the tokenizer online, or looked up where kept (3.3).

    `starts` (rows,) is where a row's clip begins in `codes` (source frames of all clips, g, g).
    """

    def __init__(self, tokenizer, machine, starts=None, codes=None):
        self.tokenizer, self.machine, self.starts, self.codes = tokenizer, machine, starts, codes

    def __call__(self, batch):
        if self.tokenizer is None:
            return None
        if self.codes is None:
            with self.machine.autocast():
                return self.tokenizer.tokenize(scale(batch["frames"]))          # the unmasked frames
        frames = self.starts[batch["rows"], None] + batch["numbers"]
        return torch.from_numpy(self.codes[frames].astype(np.int64)).to(self.machine.device)


class WholeClips(Dataset):
    """All source frames of each video of `ClipCaptions`, once: (F, 3, size, size) uint8; none if it is
    broken. What is decoded and kept in memory here, training has from there."""

    def __init__(self, clips):
        self.clips, self.manifest = clips, clips.manifest
        _, self.first_rows, self.numbers = np.unique(self.manifest.videos, return_index=True,
                                                     return_inverse=True)

    def __len__(self):
        return len(self.first_rows)

    def path(self, i):
        return self.manifest.video_path(self.manifest[self.first_rows[i]])

    def __getitem__(self, i):
        try:
            return torch.from_numpy(self.clips.whole(self.path(i))).permute(0, 3, 1, 2)
        except BrokenClip:
            return torch.empty(0, 3, self.clips.size, self.clips.size, dtype=torch.uint8)


def digest_of(model):
    """The SHA-1 of a model's weights, to which more can be added."""
    digest = hashlib.sha1()
    for weight in model.state_dict().values():
        digest.update(weight.cpu().numpy().tobytes())
    return digest


def keep_codes(tokenizer, folder, samples, args, machine):
    """The codes of every source frame of every clip, computed once -> (starts, codes) of Labels.

    They are saved beside the tokenizer under a name that follows from its weights and the clips, and found
    again.
    """
    clips = WholeClips(samples)
    identity = digest_of(tokenizer)
    for path in (clips.path(i) for i in range(len(clips))):
        identity.update(f"{path} {path.stat().st_size if path.exists() else 0}".encode())
    path = folder / f"codes-{identity.hexdigest()[:12]}.npz"
    machine.first(lambda: path.exists() or compute_codes(tokenizer, path, clips, args, machine))
    kept = np.load(path, allow_pickle=False)
    return kept["starts"][clips.numbers], kept["codes"]


def compute_codes(tokenizer, path, clips, args, machine):
    """Writes `codes` (frames of all clips, g, g) and `starts`, where each clip's frames begin."""
    g = tokenizer.config.grid
    codes, lengths = [np.empty((0, g, g), np.int16)], [0]
    loader = DataLoader(clips, batch_size=20, collate_fn=list, num_workers=args.workers)
    for some in tqdm(loader, desc="MVM labels, kept", unit="clip", unit_scale=20, leave=False):
        with machine.autocast():
            found = [tokenizer.tokenize(scale(part.to(machine.device))[None])[0]
                     for part in torch.cat(some).split(256)]
        codes += [part.to(torch.int16).cpu().numpy() for part in found]
        lengths += map(len, some)
    draft = path.with_suffix(".part.npz")
    np.savez(draft, codes=np.concatenate(codes), starts=np.cumsum(lengths)[:-1])
    os.replace(draft, path)


# ------------------------------------------------------------------------------------------------- evaluation


def percent(part, whole):
    return float(part / whole) if whole else math.nan


@torch.no_grad()
def evaluate(model, loader, labels, wordpiece, objectives, machine):
    """Held-out accuracies of the three objectives beside what needs no understanding; shares are 0 to 1.

    Matching sees whole inputs; words are masked under whole frames, cells under whole words. `mlm_other` is
    MLM with another clip's frames, `mlm_content` MLM on words that are not function words. Beside MVM: the
    majority code, the commonest code among the frame's visible cells, the same cell's code in the nearest
    frame where it is visible.
    """
    model.eval()
    sums, truths = Counter(), {"mlm": [], "mvm": []}
    content = torch.tensor([word not in FUNCTION_WORDS for word in wordpiece.vocab], device=machine.device)
    for batch, _ in prefetch(loader, machine.device):
        B, frames, codes, mask = len(batch["frames"]), scale(batch["frames"]), labels(batch), batch["mask"]
        with machine.autocast():
            video = model.encode_video(frames)
            if "vtm" in objectives:
                for pair, sign in ((0, 1), (1, -1)):
                    text = model.encode_text(batch["ids"][:, pair], mask[:, pair])
                    sums["vtm"] += int((sign * model.match(video, text, mask[:, pair]) > 0).sum())
                    sums["pairs"] += B
            if "mlm" in objectives:
                text, words = model.encode_text(batch["masked"][:, 0], mask[:, 0]), batch["words"]
                truth = batch["ids"][:, 0][words]
                truths["mlm"].append(truth)
                for name, seen in (("mlm", video), ("mlm_other", video.roll(1, 0))):
                    h_text = model.fuse(seen, text, mask[:, 0])[1]
                    right = model.mlm_head(h_text[words])[:, :len(wordpiece)].argmax(-1) == truth
                    sums[name] += int(right.sum())
                    sums[name + "_content"] += int((right & content[truth]).sum())
                sums["content"] += int(content[truth].sum())
            if "mvm" in objectives:
                cells = batch["cells"]
                video = model.encode_video(mask_frames(frames, cells))
                text = model.encode_text(batch["ids"][:, 0], mask[:, 0])
                h_video = model.fuse(video, text, mask[:, 0])[2]
                truth = codes[cells]
                truths["mvm"].append(truth)
                sums["mvm"] += int((model.mvm_head(h_video[cells.flatten(1)]).argmax(-1) == truth).sum())
                for name, guess in copied_codes(codes.cpu(), cells.cpu()).items():
                    sums[name] += int((guess == truth.cpu()).sum())
                sums["distinct"] += sum(len(frame.unique()) for frame in codes.flatten(0, 1))
                sums["frames"] += B * codes.shape[1]
    model.train()
    for name, found in truths.items():      # the best constant guess, on these very cells and words
        found = torch.cat(found).cpu() if found else torch.zeros(0, dtype=torch.long)
        counts = machine.total(torch.bincount(found, minlength=max(model.config.words, model.config.codes)))
        sums[name + "_majority"], sums[name + "_all"] = int(counts.max()) / machine.world, len(found)
    # Each score and what it is a share of; all processes add up the same list, whatever they have seen.
    whole = {"vtm": "pairs", "mlm": "mlm_all", "mlm_majority": "mlm_all", "mlm_other": "mlm_all",
             "mlm_content": "content", "mlm_other_content": "content", "mvm": "mvm_all",
             "mvm_majority": "mvm_all", "mvm_mode": "mvm_all", "mvm_copy": "mvm_all", "distinct": "frames"}
    names = sorted({*whole, *whole.values()})
    sums = dict(zip(names, machine.total([float(sums[name]) for name in names]).tolist()))
    return {name: sums[name] / sums[of] for name, of in whole.items() if sums[of]}


def copied_codes(codes, cells):
    """What copying answers for masked cells: {"mvm_mode", "mvm_copy"}, each (masked,). Both (B, T, g, g)."""
    B, T, g, _ = codes.shape
    mode, copy = torch.empty_like(codes), torch.empty_like(codes)
    for b in range(B):
        for t in range(T):
            visible = codes[b, t][~cells[b, t]]
            mode[b, t] = copy[b, t] = visible.mode().values if len(visible) else -1
            for other in sorted(set(range(T)) - {t}, key=lambda other: -abs(other - t)):    # the nearest last
                copy[b, t] = torch.where(cells[b, other], copy[b, t], codes[b, other])
    return {"mvm_mode": mode[cells], "mvm_copy": copy[cells]}


# ----------------------------------------------------------------------------------- zero-shot evaluation (4)


def read_frames(path, config):
    """The middle frames of a clip, uint8 (T, 3, size, size). Raises BrokenClip."""
    frames, _ = read_clip(path, lambda count: spans(count, config.frames), config.size)
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def name_broken(lines, what_became):
    """As Run.note, where there is no run."""
    for line in lines:
        tqdm.write(f"broken clip, {what_became}: {line}")


def read_videos(manifest, rows, config, encode=lambda frames: frames, note=name_broken, part=50):
    """The rows' clips, `part` of them encoded at a time, so that no more frames are held than `encode` keeps.

    encode: middle frames, uint8 (n, T, 3, H, W) -> (n, ...); they stay as they are without it.
    -> (what it gives for all clips, the rows whose clips are whole). Raises DataError where none is.
    """
    rows, encoded, whole = list(rows), [], []
    for start in range(0, len(rows), part):
        frames = []
        for row in rows[start:start + part]:
            try:
                frames.append(read_frames(manifest.video_path(row), config))
            except BrokenClip as error:
                note([str(error)], "left out")
                continue
            whole.append(row)
        if frames:
            encoded.append(encode(torch.stack(frames)))
    if not whole:
        raise DataError(f"{manifest.path}: none of its clips can be read")
    return torch.cat(encoded), whole


def read_each_video(manifest, rows, config, encode, note):
    """The videos that rows name, each read once however many name it, as read_videos does.

    -> (what `encode` gives for all V, {name: its place among them}, the rows whose clips are whole).
    """
    named = {row["video"]: row for row in rows}.values()
    encoded, videos = read_videos(manifest, named, config, encode, note)
    place = {row["video"]: i for i, row in enumerate(videos)}
    return encoded, place, [row for row in rows if row["video"] in place]


def encode_videos(model, frames, machine):
    """e^V of many clips: frames uint8 (n, T, 3, H, W) -> (n, N, D)."""
    with machine.autocast():
        return torch.cat([model.encode_video(scale(part.to(machine.device))) for part in frames.split(50)])


def encode_captions(model, captions, wordpiece, machine):
    """e^L of many captions -> (n, L, D), mask (n, L)."""
    ids, mask = encode_padded(wordpiece, captions, model.config.max_words)
    ids, mask = ids.to(machine.device), mask.to(machine.device)
    with machine.autocast():
        return model.encode_text(ids, mask), mask


def recalls(ranks):
    """R@1, R@5, R@10 and the median of ranks (Q,), 1 best."""
    return {**{f"r{k}": percent((ranks <= k).sum(), len(ranks)) for k in (1, 5, 10)},
            "median_rank": float(ranks.float().quantile(0.5))}


class Ranking(NamedTuple):
    """What a retrieval found: the rows that asked, the ranks (Q,) of their videos, the names of all V videos,
    and `scores(q)` (V,) of a row's number."""
    rows: list
    ranks: torch.Tensor
    names: list
    scores: Callable


@torch.no_grad()
def score_retrieval(model, manifest, wordpiece, machine, most=1000, note=name_broken):
    """Text-to-video retrieval by joint scoring: every caption with every video of the split.

    -> (r1, r5, r10, median_rank; and apart for combinations never seen in training), the Ranking.
    """
    model.eval()
    spread = np.linspace(0, len(manifest) - 1, min(most, len(manifest))).astype(int)
    rows = [manifest[i] for i in spread.tolist()]       # of all videos, where captions of one lie together
    video, place, rows = read_each_video(manifest, rows, model.config,
                                         lambda frames: encode_videos(model, frames, machine), note)
    text, mask = encode_captions(model, [row["caption"] for row in rows], wordpiece, machine)
    scores = []
    for t, m in tqdm(zip(text, mask), desc="joint scoring", total=len(text), unit="caption", leave=False):
        length = int(m.sum())
        with machine.autocast():
            scores.append(torch.cat([model.match(part, t[:length].expand(len(part), -1, -1),
                                                 m[:length].expand(len(part), -1))
                                     for part in video.split(200)]))
    scores = torch.stack(scores).cpu()
    ranks = rank_of_truth(scores, torch.tensor([place[row["video"]] for row in rows]))
    found = recalls(ranks)
    unseen = torch.tensor([bool(row.get("unseen")) for row in rows])
    found |= {f"r{k}_unseen": percent((ranks[unseen] <= k).sum(), unseen.sum())
              for k in (1, 10)} if unseen.any() else {}
    return found, Ranking(rows, ranks, list(place), lambda q: scores[q])


@torch.no_grad()
def score_choices(model, manifest, wordpiece, machine, most=1000, note=name_broken):
    """Multiple choice without training for it: the option whose caption fits best; a tie is wrong.

    -> {"mc": accuracy, "mc_unseen", and "mc_NAME" for each attribute NAME that the options differ in}.
    """
    model.eval()
    videos, rows = read_videos(manifest, [manifest[i] for i in range(len(manifest))[:most]], model.config,
                               lambda frames: encode_videos(model, frames, machine), note)
    right, asked = Counter(), Counter()
    for video, row in zip(videos, rows):
        text, mask = encode_captions(model, row["options"], wordpiece, machine)
        with machine.autocast():
            scores = model.match(video.expand(len(text), -1, -1), text, mask)[None].cpu()
        hit = int(rank_of_truth(scores, torch.tensor([row["answer"]]))) == 1
        changed = row.get("changed", [])
        for name in ["mc", *["mc_unseen"] * bool(row.get("unseen")), *(f"mc_{name}" for name in changed)]:
            right[name] += hit
            asked[name] += 1
    return {name: right[name] / asked[name] for name in asked}


# --------------------------------------------------------------------------------------------------- pictures


def draw_curves(run, objectives, path):
    """Accuracies on val over the steps, beside what copying gets, and the training losses."""
    metrics = [line for line in run.metrics() if line["split"] == "val"]
    names = {"vtm": "matching", "mlm": "masked words", "mvm": "masked cells"}

    def series(name):
        return [(line["step"], line[name]) for line in metrics if name in line]

    panels = []
    for objective in objectives:
        baselines = {"vtm": {"chance": 0.5}}.get(objective) or {
            key.removeprefix(objective + "_"): metrics[-1][key] for key in metrics[-1]
            if key in ("mlm_majority", "mlm_other", "mvm_majority", "mvm_mode", "mvm_copy")
            and key.startswith(objective)}
        panels.append((f"{names[objective]}, val", {objective: series(objective)}, baselines, True))
    panels.append(("losses, training", {name: series(f"loss_{name}") for name in objectives}, {}, False))
    pictures.curves(panels, path, "Pretraining (3.4)")


@torch.no_grad()
def draw_masked(model, loader, labels, machine, path, clips=6):
    """Frames, what the model saw, and the codes it predicts for what it did not see."""
    batch = next(prefetch(loader, machine.device))[0]
    frames, codes, cells = scale(batch["frames"]), labels(batch), batch["cells"]
    with machine.autocast():
        video = model.encode_video(mask_frames(frames, cells))
        text = model.encode_text(batch["ids"][:, 0], batch["mask"][:, 0])
        guess = model.mvm_head(model.fuse(video, text, batch["mask"][:, 0])[2]).argmax(-1).view_as(codes)
    pictures.masked([{"frames": batch["frames"][i].permute(0, 2, 3, 1).cpu().numpy(),
                      "mask": cells[i].cpu().numpy(), "true": codes[i].cpu().numpy(),
                      "predicted": guess[i].cpu().numpy(), "caption": batch["captions"][i]}
                     for i in range(0, len(codes), -(-len(codes) // clips))],
                    path, "Masked video modeling: predicted codes of masked cells")


def draw_retrieval(ranking, manifest, config, path, queries=8, shown=5,
                   title="Zero-shot text-to-video retrieval, joint scoring"):
    """Queries over the range of ranks, each with the clips that fit it best."""
    rows, ranks, names, scores_of = ranking
    entries = []
    for q in ranks.argsort()[torch.linspace(0, len(ranks) - 1, min(queries, len(ranks))).long()].tolist():
        scores, places = scores_of(q).topk(min(shown, len(names)))
        best = [names[v] for v in places.tolist()]
        frames = [read_frames(manifest.video_path({"video": name}), config) for name in best]
        found = [(clip.permute(0, 2, 3, 1).numpy(), score, name == rows[q]["video"], "")
                 for clip, score, name in zip(frames, scores.tolist(), best)]
        entries.append({"caption": rows[q]["caption"], "rank": int(ranks[q]), "found": found})
    pictures.retrieval(entries, path, title)


# --------------------------------------------------------------------------------------------------- training


def train(args, machine):
    """Pretrains as the flags say, from nothing or from where it was; evaluates best.pt on the test split."""
    config = configure(args)
    splits = open_clips(args, machine)
    wordpiece, config = make_vocabulary(args, config, captions_of(splits["train"]), machine)
    if args.init_video == "auto":
        args.init_video = "runs/encoder" if shows_pictures(config, splits["train"]) else "none"
    rehearse(config, wordpiece, args)
    open_encoder(args, machine)
    tokenizer, folder = open_tokenizer(args, config, wordpiece, machine)
    if tokenizer is not None:
        config = replace(config, codes=tokenizer.config.codes)
    clips = clips_of(splits["train"], config, args, train=True, mismatched=True)
    online = Labels(tokenizer, machine)
    labels = label_source(online, folder, clips, config, args, machine)
    torch.manual_seed(args.seed)
    model = EViLM(config).to(machine.device)
    for report in [] if args.resume else fill_encoders(model, wordpiece, args):
        machine.say(report)
    if args.init_video == "none":
        start_from_nothing(model, splits["train"], args, machine)
    for name in set(LOSSES) - set(args.objectives):             # a head without a loss gets no gradient
        getattr(model, f"{name}_head").requires_grad_(False)
    model.pooler.requires_grad_("vtm" in args.objectives)
    video_lr = 1.0 if args.init_video == "none" else config.video_lr
    optimizer = make_optimizer(model, args.lr, config.weight_decay, machine.device, video_lr)
    run = Run(args, "pretrain", config, wordpiece.vocab, ("objectives", "tokenizer", "init_video",
              "init_text"), machine)
    run.start(model, optimizer, args.resume)

    batches = batches_left(clips, run, args, machine)
    look = between_evaluations(run.steps)
    keep = {max(1, round(share * run.steps)): share for share in args.keep_at}
    collate = PretrainBatch(wordpiece, config, args.objectives, args.seed)
    held_out = evaluation_loader(splits["val"], collate, config, args, machine)
    wrapped = machine.wrap(model, args.compile)

    machine.say(f"pretraining on {'+'.join(args.objectives)}: {len(clips):,} clips, {run.steps:,} steps of "
                f"{batches.batch_size} clips, {machine}")
    sums = run.state.setdefault("sums", torch.zeros(len(args.objectives))).to(machine.device)
    for batch in run.steps_of(make_loader(clips, batches, collate, args, machine)):
        run.set_learning_rate(args.lr, config.warmup)
        if tokenizer is not None:
            batch["codes"] = labels(batch)
        losses = learn(wrapped, batch, config, args, machine)
        run.optimise(losses)
        run.state["sums"] = sums = sums + losses
        if run.step in keep and machine.main:
            save(run.checkpoint(), run.folder / f"at-{keep[run.step]:g}.pt")
        if run.step % look == 0 or run.step == run.steps:
            since = (run.step - 1) % look + 1
            scores = evaluate(model, held_out, online, wordpiece, args.objectives, machine)
            trained = machine.total(sums) / since
            run.log(split="val", **scores,
                    **{f"loss_{name}": float(x) for name, x in zip(args.objectives, trained)})
            run.save_best(sum(scores[name] for name in args.objectives) / len(args.objectives))
            machine.say(f"step {run.step:,}, val: "
                        + ", ".join(f"{name} {scores[name]:.1%}" for name in args.objectives))
            run.state["sums"] = sums = torch.zeros_like(sums)
            run.save_last()
    run.end_of_steps()
    if machine.main:
        finish(model, run, splits, online, collate, args, machine.alone())


def learn(model, batch, config, args, machine):
    """The gradients of Eq. (8) on a batch, in parts (--accumulate) -> this process's share of each loss."""
    counts = dict(zip(LOSSES, machine.total(batch.pop("counts").tolist()).tolist()))
    losses = torch.zeros(len(args.objectives), device=machine.device)
    for part, sync in machine.parts(model, batch, args.accumulate):
        with sync:
            with machine.autocast():
                predicted = masked_pass(model, part, args.objectives)
            # Each loss is a sum over the count of the whole batch; processes average, hence the factor.
            shares = [LOSSES[name](*predicted[name], counts[name]) * machine.world
                      for name in args.objectives]
            weights = [config.mvm_weight if name == "mvm" else 1.0 for name in args.objectives]
            sum(weight * share for weight, share in zip(weights, shares)).backward()        # Eq. (8)
        losses += torch.stack(shares).detach() / machine.world
    return losses


def rehearse(config, wordpiece, args):
    """Fills encoders without numbers: a file that does not fit is told of before a tokenizer is trained."""
    if (args.init_video != "none" or args.init_text) and not args.resume:
        with torch.device("meta"):
            model = EViLM(config)
        fill_encoders(model, wordpiece, args)


def fill_encoders(model, wordpiece, args):
    """The weights that --init-video and --init-text name -> reports of what was filled."""
    reports = []
    if args.init_video != "none":
        reports.append(fill_video(model, args.init_video))
    if args.init_text:
        model.vocab = wordpiece.vocab
        reports.append(load_published(model, args.init_text, read_lines("--vocab", args.vocab)))
    return reports


def fill_video(model, path):
    """Weights of the video encoder, train_encoder.py's or published ones -> a report of what was filled."""
    if names_file(path) and (Path(path).suffix == ".safetensors" or not is_ours(read_torch(Path(path)))):
        return load_published(model.video_encoder, path)
    path = checkpoint_path(path)
    if path.exists():               # else it is still to be trained
        copy_video(model, load(path, "encoder"), f"--init-video {path}")
    return f"video encoder: starts from {path}"


@torch.no_grad()
def copy_video(model, checkpoint, named):
    """The video encoder of a checkpoint of train_encoder.py; `named` by this flag, for a message."""
    found, prefix = checkpoint["model"], "video_encoder."
    wanted = model.video_encoder.state_dict(prefix=prefix)
    if any(name not in found or found[name].shape != weight.shape for name, weight in wanted.items()):
        raise InputError(f"{named}: an encoder of other sizes than this run's; train one for it "
                         "(train_encoder.py --out DIR) and name it")
    for name, weight in wanted.items():
        weight.copy_(found[name])


def start_from_nothing(model, manifest, args, machine, clips=64):
    """`EdgeNeXt.start` on the first training clips, the same on all processes."""
    if not args.resume:
        frames, _ = read_videos(manifest, [manifest[i] for i in range(len(manifest))[:clips]], model.config)
        model.video_encoder.start(scale(frames.to(machine.device)))


def label_source(online, folder, clips, config, args, machine):
    """Labels kept or online, as --codes says. Kept ones need frames that are not augmented and a tokenizer
    that sees one frame at a time; being of all of a clip's frames, they pay from the third pass on."""
    if online.tokenizer is None:
        return online
    changing = (f"the {config.preset} preset crops frames at random, so codes change with them"
                if config.augment else
                "VideoSwin sees a frame's neighbours, so codes change with the frames that are sampled"
                if online.tokenizer.sees_neighbours else "")
    passes = min(args.epochs, (args.max_steps or math.inf) * args.batch_size / len(clips))
    if args.codes == "kept" and changing:
        raise InputError(f"--codes kept: {changing}; use --codes online")
    if args.codes == "online" or changing or args.codes == "auto" and passes < 3:
        machine.say("MVM's labels: online, from the tokenizer at each step"
                    + f" ({changing})" * bool(changing))
        return online
    machine.say("MVM's labels: kept, computed once for every source frame")
    return Labels(online.tokenizer, machine, *keep_codes(online.tokenizer, folder, clips, args, machine))


def finish(model, run, splits, labels, collate, args, machine):
    """Final evaluation: best.pt on the test split, zero-shot; pictures; what was learned, against chance."""
    model.load_state_dict(load(run.folder / "best.pt", "pretrain")["model"])
    model.eval()
    wordpiece, config, objectives = collate.wordpiece, model.config, args.objectives
    loader = evaluation_loader(splits["test"], collate, config, args, machine)
    scores = evaluate(model, loader, labels, wordpiece, objectives, machine)
    if labels.tokenizer is not None:
        scores |= train_tokenizer.codebook_in_use(labels.tokenizer, loader, machine)
        draw_masked(model, loader, labels, machine, run.folder / "masked.png")
    if "vtm" in objectives:
        found, ranking = score_retrieval(model, splits["test"], wordpiece, machine, note=run.note)
        scores |= found | {"retrieval_clips": len(ranking.names)}
        draw_retrieval(ranking, splits["test"], config, run.folder / "retrieval.png")
        try:
            choices = open_split(args.data, "test", "mc_caption")
        except DataError:
            machine.say("no multiple choice: the folder has no mc_caption files")
        else:
            scores |= score_choices(model, choices, wordpiece, machine, note=run.note)
    run.log(split="test", **scores)
    draw_curves(run, objectives, run.folder / "curves.png")
    for line in report(scores, objectives):
        print(line)
    run.say_end(f"python pretrain.py{as_typed()} --objectives vtm,mlm --out {run.folder}-without-mvm   "
                "(Table 5: what MVM adds)" if "mvm" in objectives else
                f"python finetune.py retrieval{same_set(args)} --init {run.folder}")


def report(s, objectives):
    """The lines that say what was learned, each against chance or against copying."""
    yield "on held-out clips (test), zero-shot; in brackets what chance or copying gets"
    if "vtm" in objectives:
        yield f"  matching (VTM)       {s['vtm']:6.1%}   (chance 50%)"
    if "mlm" in objectives:
        yield (f"  masked words (MLM)   {s['mlm']:6.1%}   (majority word {s['mlm_majority']:.1%}, another "
               f"clip's frames {s['mlm_other']:.1%}); content words {s['mlm_content']:.1%} "
               f"({s['mlm_other_content']:.1%})")
    if "mvm" in objectives:
        best = max(("mvm_majority", "mvm_mode", "mvm_copy"), key=s.get)
        learned = "" if s["mvm"] > s[best] else "   it has learned to copy, no more"
        yield (f"  masked cells (MVM)   {s['mvm']:6.1%}   (majority code {s['mvm_majority']:.1%}, commonest "
               f"visible {s['mvm_mode']:.1%}, nearest frame's {s['mvm_copy']:.1%}; {s['distinct']:.1f} codes "
               f"a frame){learned}")
        yield (f"  codebook in use      {s['codebook_usage']:6.1%}   "
               f"perplexity {s['codebook_perplexity']:.1f}")
    if "mc" in s:
        apart = ", ".join(f"{name[3:]} {share:.0%}" for name, share in s.items() if name.startswith("mc_"))
        yield f"  multiple choice      {s['mc']:6.1%}   (chance 20%); {apart}"
    if "r1" in s:
        n = s["retrieval_clips"]
        yield (f"  text-to-video        R@1 {s['r1']:.1%}  R@5 {s['r5']:.1%}  R@10 {s['r10']:.1%}  median "
               f"rank {s['median_rank']:g} of {n} clips  (chance {1 / n:.1%}, {min(1, 5 / n):.1%}, "
               f"{min(1, 10 / n):.1%}, {(n + 1) / 2:g})")


def main():
    args = parse()
    train(args, set_up(args.device, args.precision))


if __name__ == "__main__":
    run_script(main, DataError)
