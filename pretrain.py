"""Stage 2: video-language pretraining (3.4), L = L_MLM + L_VTM + L_MVM. The main job.

    python pretrain.py                                          the toy preset on the synthetic set, on what there is
    python pretrain.py --device cuda --preset paper --data webvid
    torchrun --nproc-per-node=2 pretrain.py                     over processes; several nodes: torchrun's own flags

Trains the tokenizer first where there is none. Leaves in --out: last.pt (go on with --resume), best.pt (highest mean
val accuracy), metrics.jsonl, curves.png, masked.png, retrieval.png.
"""
import contextlib
import hashlib
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import train_tokenizer
from evilm import (MASK, EViLM, InputError, Run, SemanticTokenizer, block_mask, common_flags, config_of, configure,
                   learning_rate, load, make_optimizer, mask_frames, mask_words, mlm_loss, mvm_loss, parts_of,
                   prefetch, rank_of_truth, run_script, set_up, to_device, vtm_loss)
from toy_data import Batches, BrokenClip, ClipCaptions, DataError, open_splits, pictures, read_clip
from train_tokenizer import evaluation_loader, make_loader, make_vocabulary, open_clips, pad, scale

LOSSES = {"vtm": vtm_loss, "mlm": mlm_loss, "mvm": mvm_loss}
FUNCTION_WORDS = set("a an the is are there that and then while on at in of to with it".split())


def parse(argv=None):
    parser = common_flags(__doc__, stage="")
    parser.add_argument("--tokenizer", default="runs/tokenizer", metavar="PATH|none", help="run or checkpoint of "
                        "train_tokenizer.py; trained first where there is none; none: no MVM (default: runs/tokenizer)")
    parser.add_argument("--objectives", default="vtm,mlm,mvm", metavar="LIST", help="which losses of Eq. (8), Table 5's "
                        "switches; one that is off masks nothing (default: vtm,mlm,mvm)")
    parser.add_argument("--codes", default="auto", choices=["auto", "kept", "online"], help="MVM's labels: kept, "
                        "computed once for every source frame and saved beside the tokenizer, or online; auto: kept "
                        "where frames are not augmented (default: auto)")
    parser.add_argument("--keep-at", default="", metavar="SHARES", help="leave checkpoints at these shares of the run, "
                        "e.g. 0.2,0.4 (default: none)")
    parser.add_argument("--out", default="runs/pretrain", metavar="DIR", help="the run's folder (default: "
                        "runs/pretrain)")
    args = parser.parse_args(argv)
    args.objectives = tuple(name for name in args.objectives.split(",") if name)
    if not args.objectives or set(args.objectives) - set(LOSSES):
        raise InputError(f"--objectives {','.join(args.objectives)}: a list of some of {','.join(LOSSES)}")
    if args.tokenizer == "none":
        args.objectives = tuple(name for name in args.objectives if name != "mvm")
    try:
        args.keep_at = [float(share) for share in args.keep_at.split(",") if share]
    except ValueError:
        raise InputError(f"--keep-at {args.keep_at}: shares of the run, such as 0.2,0.4") from None
    return args


# ------------------------------------------------------------------------------------------------------ masked batches


class PretrainBatch:
    """Makes a batch of samples and masks it; all masks of a sample follow from (seed, epoch, index).

    Frames (B, T, 3, H, W) uint8 travel whole. Texts are (B, 2, L): [:, 0] the matched captions, [:, 1] the mismatched:
    `ids` whole, `masked` with words masked, `mask` True where a word is; `words` (B, L) are the matched captions'
    words to predict. `cells` (B, T, g, g) are to be masked. `rows` (B,) and `numbers` (B, T): where frames come from.
    """
    mismatched = True

    def __init__(self, wordpiece, config, objectives, seed):
        self.wordpiece, self.config, self.objectives, self.seed = wordpiece, config, objectives, seed

    def __call__(self, samples):
        c = self.config
        texts = [self.wordpiece.encode(s[name], c.max_words) for s in samples for name in ("caption", "mismatched")]
        ids, mask = (x.view(len(samples), 2, -1) for x in pad(texts, max(map(len, texts))))
        masked, chosen = ids.clone(), torch.zeros_like(mask)
        cells = torch.zeros(len(samples), c.frames, c.grid, c.grid, dtype=torch.bool)
        for i, sample in enumerate(samples):
            entropy = np.random.SeedSequence([self.seed, sample["epoch"], sample["index"], 1])
            generator = torch.Generator().manual_seed(int(entropy.generate_state(1)[0]))
            if "mvm" in self.objectives:
                cells[i] = block_mask(c.frames, c.grid, c.mask_ratio, generator)
            if "mlm" in self.objectives:        # in both captions, or a [MASK] would tell which pair is right
                for j in range(2):
                    masked[i, j], chosen[i, j] = mask_words(ids[i, j], c.words, generator, c.word_ratio)
        return {"frames": torch.stack([s["frames"] for s in samples]), "ids": ids, "masked": masked, "mask": mask,
                "words": chosen[:, 0], "cells": cells, "rows": torch.tensor([s["index"] for s in samples]),
                "numbers": torch.stack([torch.as_tensor(s["numbers"]) for s in samples]),
                "broken": [line for s in samples for line in s["broken"]]}


def masked_pass(model, batch, codes, objectives):
    """One masked pass (3.2): {objective: (logits, targets)}. `codes` (B, T, g, g) are MVM's labels."""
    frames, B = scale(batch["frames"]), len(batch["frames"])
    if "mvm" in objectives:
        frames = mask_frames(frames, batch["cells"])
    vtm, mlm, mvm = model(frames, batch["masked"][:, 0], batch["mask"][:, 0],
                          words=batch["words"] if "mlm" in objectives else None,
                          cells=batch["cells"].flatten(1) if "mvm" in objectives else None,
                          mismatched=(batch["masked"][:, 1], batch["mask"][:, 1]) if "vtm" in objectives else None)
    found = {}
    if vtm is not None:
        found["vtm"] = vtm, torch.arange(2 * B, device=vtm.device).lt(B).long()         # 1: the pair matches
    if mlm is not None:
        found["mlm"] = mlm, batch["ids"][:, 0][batch["words"]]
    if mvm is not None:
        found["mvm"] = mvm, codes[batch["cells"]]
    return found


# ---------------------------------------------------------------------------------------------------- the tokenizer


def open_tokenizer(args, config, wordpiece, machine):
    """The tokenizer that --tokenizer names, in evaluation mode, and its run's folder; it is trained where there is
    none. (None, None) without MVM."""
    if "mvm" not in args.objectives:
        return None, None
    path = Path(args.tokenizer)
    path = path if path.suffix == ".pt" else path / "best.pt"
    if not path.exists() and args.tokenizer.endswith(".pt"):
        raise InputError(f"--tokenizer {path}: there is no such checkpoint")
    if not path.exists():
        machine.say(f"no tokenizer in {path.parent}: training one first (python train_tokenizer.py)")
        flags = ["--data", args.data, "--preset", args.preset, "--device", args.device, "--precision", args.precision,
                 "--workers", str(args.workers), "--seed", str(args.seed), "--out", str(path.parent)]
        flags += ["--max-steps", str(args.max_steps)] * bool(args.max_steps) + ["--vocab", args.vocab] * bool(args.vocab)
        flags += ["--compile"] * args.compile + ["--strict"] * args.strict
        flags += ["--resume"] * (path.parent / "last.pt").exists()
        train_tokenizer.train(train_tokenizer.parse(flags), machine)
    checkpoint = load(path, "tokenizer")
    for what, theirs, ours in (("preset", checkpoint["config"]["preset"], config.preset),
                               ("vocabulary", checkpoint["vocab"], wordpiece.vocab)):
        if theirs != ours:
            raise InputError(f"--tokenizer {path} was trained with another {what}: train one for this run "
                             "(train_tokenizer.py --out DIR) and name it, or --tokenizer none")
    tokenizer = SemanticTokenizer(config_of(checkpoint)).to(machine.device)
    tokenizer.load_state_dict(checkpoint["model"])
    return tokenizer.eval().requires_grad_(False), path.parent


class Labels:
    """MVM's labels of a batch, (B, T, g, g): from the tokenizer online, or looked up where codes are kept (3.3).

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
        frames = self.starts[batch["rows"].cpu().numpy(), None] + batch["numbers"].cpu().numpy()
        return torch.from_numpy(self.codes[frames].astype(np.int64)).to(self.machine.device)


class WholeClips(Dataset):
    """All source frames of each video of a manifest, once: (F, 3, size, size) uint8; none where a clip is broken."""

    def __init__(self, manifest, size):
        self.manifest, self.size = manifest, size
        _, self.first_rows, self.numbers = np.unique(manifest.videos, return_index=True, return_inverse=True)

    def __len__(self):
        return len(self.first_rows)

    def path(self, i):
        return self.manifest.video_path(self.manifest[self.first_rows[i]])

    def __getitem__(self, i):
        try:
            return torch.from_numpy(read_clip(self.path(i), size=self.size)[0]).permute(0, 3, 1, 2)
        except BrokenClip:
            return torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)


def keep_codes(tokenizer, folder, manifest, args, machine):
    """The codes of every source frame of every clip, computed once -> (starts, codes) of Labels.

    They are saved beside the tokenizer under a name that follows from its weights and the clips, and found again.
    """
    clips = WholeClips(manifest, tokenizer.config.size)
    identity = hashlib.sha1()
    for weight in tokenizer.state_dict().values():
        identity.update(weight.cpu().numpy().tobytes())
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
    loader = DataLoader(clips, batch_size=None, num_workers=args.workers)
    for frames in tqdm(loader, desc="MVM labels, kept", unit="clip", leave=False):
        with machine.autocast():
            found = [tokenizer.tokenize(scale(part.to(machine.device))[None])[0] for part in frames.split(256)]
        codes += [part.to(torch.int16).cpu().numpy() for part in found]
        lengths.append(len(frames))
    draft = path.with_suffix(".part.npz")
    np.savez(draft, codes=np.concatenate(codes), starts=np.cumsum(lengths)[:-1])
    os.replace(draft, path)


# ---------------------------------------------------------------------------------------------------------- evaluation


def percent(part, whole):
    return float(part / whole) if whole else math.nan


@torch.no_grad()
def evaluate(model, loader, labels, wordpiece, objectives, machine):
    """Held-out accuracies of the three objectives beside what needs no understanding; shares are 0 to 1.

    Matching sees whole inputs; words are masked under whole frames, cells under whole words. `mlm_other` is MLM with
    another clip's frames, `mlm_content` MLM on words that are not function words. Beside MVM: the majority code, the
    commonest code among the frame's visible cells, the same cell's code in the nearest frame where it is visible.
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
        counts = machine.total(torch.bincount(torch.cat(found), minlength=10**5).cpu()) if found else torch.zeros(1)
        sums[name + "_majority"], sums[name + "_all"] = int(counts.max()) / machine.world, int(counts.sum()) / machine.world
    names = sorted(sums)
    sums = dict(zip(names, machine.total(*(sums[name] for name in names)).tolist()))
    whole = {"vtm": "pairs", "mlm_content": "content", "mlm_other_content": "content", "distinct": "frames"}
    whole |= {name: name[:3] + "_all" for name in ("mlm", "mlm_majority", "mlm_other", "mvm", "mvm_majority", "mvm_mode",
                                                   "mvm_copy")}
    return {name: percent(sums[name], sums[of]) for name, of in whole.items() if name in sums and sums.get(of)}


def copied_codes(codes, cells):
    """What copying would answer for the masked cells: {"mvm_mode", "mvm_copy"}, each (masked,). Both (B, T, g, g)."""
    B, T, g, _ = codes.shape
    mode, copy = torch.empty_like(codes), torch.empty_like(codes)
    for b in range(B):
        for t in range(T):
            visible = codes[b, t][~cells[b, t]]
            mode[b, t] = copy[b, t] = visible.mode().values if len(visible) else -1
            for other in sorted(set(range(T)) - {t}, key=lambda other: -abs(other - t)):        # the nearest comes last
                copy[b, t] = torch.where(cells[b, other], copy[b, t], codes[b, other])
    return {"mvm_mode": mode[cells], "mvm_copy": copy[cells]}
