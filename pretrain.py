"""Stage 2: video-language pre-training (3.4), L = L_MLM + L_VTM + L_MVM. The main job.

    python pretrain.py                                  the toy preset on the synthetic set
    python pretrain.py --device cuda --data my_clips --tokenizer runs/my_tokenizer --out runs/mine
    torchrun --nproc-per-node=2 pretrain.py             several processes

Trains the tokenizer first where there is none. Leaves in --out: last.pt (go on with --resume), best.pt
(highest mean of VTM and MLM accuracy on val, or MVM's alone), metrics.jsonl, curves.png, masked.png,
retrieval.png.
"""
import contextlib
import math
import os
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import train_tokenizer
from evilm import (Config, EViLM, InputError, Parser, Run, SemanticTokenizer, at_least, block_mask,
                   codebook_usage, configure, fill, freeze, load, load_published, make_optimizer,
                   make_vocabulary, mask_frames, mask_words, pretraining_loss, random_mask, read_lines,
                   read_metrics, recalls, run_script, save, score_choices, score_retrieval, set_up,
                   shared_flags, start_centred)
from toy_data import (Batches, ClipCaptions, DataError, WholeClips, make_loader, open_split, open_splits,
                      plots, render_if_missing)

HEADS = {"vtm": ("pooler", "vtm_head"), "mlm": ("mlm_head",), "mvm": ("mvm_head",)}      # of each objective
OBJECTIVES = tuple(HEADS)
EVALUATED = 1000                # clips, captions or questions of a split that one evaluation looks at
FUNCTION_WORDS = set("a an the is are there that and then while on at in of to with it".split())


def parse(argv=None):
    parser = Parser(description=__doc__)
    shared_flags(parser, out="runs/pretrain")
    add = parser.add_argument
    add("--tokenizer", default="runs/tokenizer", metavar="PATH|none", help="run or checkpoint of "
        "train_tokenizer.py, trained first where there is none; none: no MVM (default: runs/tokenizer)")
    add("--objectives", default="vtm,mlm,mvm", metavar="LIST", help="losses of Eq. (8), as in "
        "Table 5; without mlm no word is masked, without mvm no patch (default: vtm,mlm,mvm)")
    add("--init-video", default="none", metavar="FILE|none", help="published EdgeNeXt-Small, a torch file or "
        ".safetensors, for --preset paper (default: none, the video encoder starts from scratch)")
    add("--init-text", metavar="FILE", help="published BERT, 12 layers, 128 wide; --vocab is its vocab.txt")
    add("--codes", default="online", choices=["online", "offline"], help="compute MVM's labels at each step, "
        "or once for all frames, kept in memory (default: online)")
    add("--keep-at", type=fractions, default=[], metavar="LIST", help="leave checkpoints at these fractions "
        "of the run, such as 0.2,0.4")
    args = parser.parse_args(argv)
    args.objectives = tuple(name for name in args.objectives.split(",") if name)
    if not args.objectives or set(args.objectives) - set(OBJECTIVES):
        raise InputError(f"--objectives {','.join(args.objectives)}: it takes some of {','.join(OBJECTIVES)}")
    if args.tokenizer == "none":
        args.objectives = tuple(name for name in args.objectives if name != "mvm")
        if not args.objectives:
            raise InputError("--tokenizer none: MVM's labels come from a tokenizer; name one")
    if args.init_text and not args.vocab:
        raise InputError("--init-text: its embeddings need BERT's words; name its vocab.txt with --vocab")
    args.init_video = None if args.init_video == "none" else args.init_video
    return args


def fractions(text):
    return [at_least(0, float, 1)(part) for part in text.split(",")]


class PretrainBatch:
    """Makes a batch of samples and masks it; all masks of a sample follow from (seed, epoch, index), those of
    its words also from whether patches are masked.

    `frames` (B, T, 3, H, W) uint8, unmasked, and the rest as `pretraining_loss` takes it; `mismatched_whole`
    (B, L) are the mismatched ids before masking. `index` (B,) and `numbers` (B, T) say where frames come
    from, `counts` (3,) are the numbers of pairs, masked words and masked patches: the losses' denominators.
    """

    def __init__(self, wordpiece, config, objectives, seed):
        self.wordpiece, self.config, self.objectives, self.seed = wordpiece, config, objectives, seed
        patches, masked = config.grid ** 2, round(config.mask_ratio * config.grid ** 2)
        self.ratio = f"{masked} of {patches} patches a frame ({masked / patches:.0%})"
        if "mvm" in objectives and not 0 < masked < patches:
            raise InputError(f"--config mask_ratio={config.mask_ratio}: masks {self.ratio}; MVM needs masked "
                             "and visible ones")

    def __call__(self, samples):
        c, B = self.config, len(samples)
        captions = [s["caption"] for s in samples] + [s["mismatched"] for s in samples]
        ids, mask = self.wordpiece.encode_batch(captions, c.max_words)                      # (2B, L)
        masked_ids, masked_words = ids.clone(), torch.zeros_like(mask)
        masked_patches = torch.zeros(B, c.frames, c.grid, c.grid, dtype=torch.bool)
        draw_patches = block_mask if c.blocks else random_mask
        for i, sample in enumerate(samples):
            entropy = np.random.SeedSequence([self.seed, sample["epoch"], sample["index"], 1])
            generator = torch.Generator().manual_seed(int(entropy.generate_state(1)[0]))
            if "mvm" in self.objectives:
                masked_patches[i] = draw_patches(c.frames, c.grid, c.mask_ratio, generator)
            if "mlm" in self.objectives:    # in both captions, or a [MASK] would show which pair matches
                for j in (i, B + i):
                    masked_ids[j], masked_words[j] = mask_words(ids[j], c.vocab_size, generator, c.word_ratio)
        return {"frames": torch.stack([s["frames"] for s in samples]), "masked_patches": masked_patches,
                "ids": ids[:B], "masked_ids": masked_ids[:B], "mask": mask[:B],
                "masked_words": masked_words[:B], "mismatched_whole": ids[B:],
                "mismatched_ids": masked_ids[B:], "mismatched_mask": mask[B:],
                "index": torch.tensor([s["index"] for s in samples]),
                "numbers": torch.stack([s["numbers"] for s in samples]),
                "counts": torch.tensor([2 * B, int(masked_words[:B].sum()), int(masked_patches.sum())]),
                "broken": [line for s in samples for line in s["broken"]]}


def train(args):
    """Pre-trains as the flags say, anew or with --resume; then scores best.pt on the test split."""
    machine = set_up(args)
    config = configure(getattr(Config, args.preset)(), args, epochs="epochs", batch_size="batch_size",
                       lr="lr")
    if machine.rank == 0:
        render_if_missing(args.data)
    machine.barrier()
    splits = open_splits(args.data, note=machine.print)
    clips, val, test = (ClipCaptions(splits[name], config.frames, config.size, args.seed, name == "train",
                                     config.augment, negatives=config.negatives)
                        for name in ("train", "val", "test"))
    questions = {split: open_questions(args, config, split, most)
                 for split, most in (("val", 200), ("test", EVALUATED))}
    wordpiece, config = make_vocabulary(args, config, (row["caption"] for row in splits["train"]), machine)
    make_batch = PretrainBatch(wordpiece, config, args.objectives, args.seed)
    tokenizer = open_tokenizer(args, config, wordpiece, machine) if "mvm" in args.objectives else None
    if tokenizer is not None:
        config = replace(config, codes=tokenizer.config.codes)
    torch.manual_seed(args.seed)
    model = EViLM(config, wordpiece.vocab).to(machine.device)
    if not args.resume:
        start_encoders(model, splits["train"], args, machine)
    unused = [part for name in OBJECTIVES if name not in args.objectives for part in HEADS[name]]
    freeze(model, *unused)
    optimizer = make_optimizer(model, config.lr, config.weight_decay, machine.device)
    sums = torch.zeros(len(OBJECTIVES), device=machine.device)  # of each loss since the last evaluation
    run = Run(args, "pretrain", config, wordpiece.vocab, machine, model, optimizer,
              decide=("max_steps", "objectives", "tokenizer", "init_video", "init_text"),
              sums={"losses": sums})
    wrapped = machine.wrap(model, args.compile)

    steps = min(args.max_steps or math.inf, config.epochs * max(1, len(clips) // config.batch_size))
    batches = Batches(len(clips), config.batch_size, args.seed, steps, run.step, machine.rank,
                      machine.world_size, args.accumulate)
    loader = make_loader(clips, batches, make_batch, args.workers)
    held_out = make_loader(val, collate=make_batch, workers=args.workers, most=EVALUATED)
    offline = offline_codes(tokenizer, clips, args, machine) if args.codes == "offline" else None
    evaluate_every = max(100, math.ceil(steps / 5))             # five times, a short run less often
    keep = {max(1, round(fraction * steps)): fraction for fraction in args.keep_at}
    machine.print(f"pre-training on {'+'.join(args.objectives)}: {len(clips):,} clips, {steps:,} steps of "
                  f"{batches.batch_size}, {machine}")
    if tokenizer is not None:
        machine.print(f"masking {make_batch.ratio}")
    for batch in run.batches(loader, steps, config.lr, config.warmup):
        counts = dict(zip(OBJECTIVES, machine.total(batch.pop("counts")).tolist()))
        if offline is not None:
            batch |= offline(batch)
        total = torch.zeros((), device=machine.device)
        for part in machine.parts(wrapped, batch, args.accumulate):
            part["frames"] = part["frames"].float() / 255
            with machine.autocast():
                if tokenizer is not None and "labels" not in part:
                    part["labels"] = tokenizer.tokenize(part["frames"])                     # unmasked frames
                loss, losses = pretraining_loss(wrapped, part, args.objectives, config.mvm_weight, counts)
            (loss * machine.world_size).backward()              # Eq. (8); DDP averages over processes
            total += loss.detach()
            sums += torch.stack([losses.get(name, loss * 0).detach() for name in OBJECTIVES])
        run.optimise(total)
        if run.step in keep:
            run.check_finite()
            if machine.rank == 0:
                save(run.checkpoint(), run.folder / f"at-{keep[run.step]:g}.pt")
        if run.step % evaluate_every == 0 or run.step == steps:
            run.check_finite()
            train_losses = machine.total(sums) / ((run.step - 1) % evaluate_every + 1)
            if machine.rank == 0:
                scores = evaluate(model, run, held_out, questions["val"], tokenizer, make_batch, machine)
                run.evaluated(selection_score(scores), **scores,
                              **{f"loss_{name}": float(x) for name, x in zip(OBJECTIVES, train_losses)
                                 if name in args.objectives})
                machine.print(f"step {run.step:,}, val: " + ", ".join(
                    f"{name} {scores[name]:.1%}" for name in (*OBJECTIVES, "mc") if name in scores))
            machine.barrier()
            sums.zero_()
            run.save_last()
    run.report_speed()
    if machine.rank == 0:
        finish(model, run, test, questions["test"], tokenizer, make_batch, args, machine)
    machine.barrier()


# ---------------------------------------------------------------------------------- what training begins with


def open_questions(args, config, split, most):
    """A loader of mc_caption's first questions, for zero-shot multiple choice; None if there are none."""
    if not Path(args.data, f"mc_caption_{split}.jsonl").exists():
        return None
    rows = open_split(args.data, split, "mc_caption")
    first = rows.subset(np.arange(len(rows))[:most])                # so that groups of five stay whole
    clips = ClipCaptions(first, config.frames, config.size, args.seed, train=False, mismatched=False)
    return make_loader(clips, workers=args.workers)


def open_tokenizer(args, config, wordpiece, machine):
    """The tokenizer that --tokenizer names, in evaluation mode; it is trained first where there is none."""
    path = Path(args.tokenizer)
    metrics = path / "metrics.jsonl"
    ended = (path / "best.pt").exists() and (not metrics.exists() or b'"test"' in metrics.read_bytes())
    if not (ended or path.is_file() or path.suffix in (".pt", ".pth")):
        if config.preset == "paper":
            raise InputError(f"--tokenizer {path}: no finished run, and the paper's tokenizer collapses if "
                             "trained from scratch. Train one from CLIP: python train_tokenizer.py --preset "
                             "paper --init-tokenizer FILE; or pre-train without MVM: --tokenizer none")
        stage = train_tokenizer.parse([])
        for name in ("data", "preset", "device", "precision", "workers", "seed", "max_steps", "vocab",
                     "vocab_captions", "config", "strict", "compile"):
            setattr(stage, name, getattr(args, name))
        stage.out, stage.resume = str(path), (path / "last.pt").exists()
        args.resume = args.resume and Path(args.out, "last.pt").exists()    # none if stopped in stage 1
        machine.print(f"no tokenizer in {path}: training it first (python train_tokenizer.py)")
        train_tokenizer.train(stage)
    checkpoint = load(path, "tokenizer")
    theirs = asdict(checkpoint["config"]) | {"vocabulary": checkpoint["vocab"]}
    ours = asdict(config) | {"vocabulary": wordpiece.vocab}
    changed = [change.partition("=")[0] for change in args.config]
    changed = [name for name in changed if name.startswith(("code", "vit_", "swin_", "tokenizer_"))]
    for what in ("preset", "size", "vocabulary", *changed):
        if theirs[what] != ours[what]:
            raise InputError(f"--tokenizer {path} was trained with another {what}: train one for this run "
                             "(train_tokenizer.py --out DIR) and name it, or --tokenizer none")
    machine.print(f"tokenizer: {checkpoint['path']}, step {checkpoint['step']:,}")
    short = checkpoint.get("settings", {}).get("max_steps")
    if short and short != args.max_steps:
        machine.print(f"warning: it was cut short by --max-steps {short}; remove {path} to train it whole")
    tokenizer = SemanticTokenizer(checkpoint["config"])
    fill(tokenizer, checkpoint)
    del tokenizer.expand, tokenizer.decoder, tokenizer.head     # encoder and VQ module alone (3.3)
    return tokenizer.to(machine.device).eval().requires_grad_(False)


def start_encoders(model, manifest, args, machine):
    """Published weights where --init-video and --init-text name them; from scratch, centred norms."""
    if args.init_video:
        machine.print(str(load_published(model.video_encoder, args.init_video)))
    else:
        config = model.config
        clips = ClipCaptions(manifest, config.frames, config.size, args.seed, train=False, mismatched=False)
        frames = clips.first(64).to(machine.device) / 255
        start_centred(model.video_encoder, model.normalise(frames).flatten(0, 1))
    if args.init_text:
        machine.print(str(load_published(model, args.init_text, read_lines("--vocab", args.vocab))))


@torch.no_grad()
def offline_codes(tokenizer, clips, args, machine):
    """Off-the-shelf labels (3.3): the codes of all frames, computed once -> a function: batch -> {"labels"},
    or {} where a clip of the batch cannot be read as a whole."""
    if tokenizer is None or clips.augment or tokenizer.sees_neighbours:
        raise InputError("--codes offline: needs MVM, frames without augmentation, and a tokenizer that sees "
                         "one frame at a time; use --codes online")
    videos = clips.manifest.each_video()
    loader = make_loader(WholeClips(videos, tokenizer.config.size), [[i] for i in range(len(videos))], list,
                         args.workers)
    codes = {}                                                              # of each video: (frames, g, g)
    for video, (frames,) in zip(tqdm(videos.videos.tolist(), "labels", disable=machine.rank > 0), loader):
        if len(frames):                                                     # none of a broken clip
            with machine.autocast():
                parts = [tokenizer.tokenize(some.to(machine.device)[None].float() / 255)[0].int().cpu()
                         for some in frames.split(256)]
            codes[video] = torch.cat(parts)
    names = clips.manifest.videos.tolist()

    def labels_of(batch):
        videos = [names[i] for i in batch["index"].tolist()]
        if not all(video in codes for video in videos):
            return {}
        labels = [codes[video][numbers] for video, numbers in zip(videos, batch["numbers"])]
        return {"labels": torch.stack(labels).long()}

    return labels_of


# ------------------------------------------------------------------------------------------------- evaluation


def selection_score(scores):
    """The val score that selects best.pt: the mean accuracy of those of VTM and MLM that are trained, so that
    runs with and without MVM are selected alike; MVM's accuracy if only MVM is trained."""
    names = [name for name in ("vtm", "mlm") if name in scores] or ["mvm"]
    return sum(scores[name] for name in names if not math.isnan(scores[name])) / len(names)


@torch.no_grad()
def evaluate(model, run, loader, questions, tokenizer, make_batch, machine):
    """Held-out accuracies (0 to 1) of the objectives, of their baselines and, if there are questions, of
    zero-shot multiple choice.

    VTM sees unmasked clips and captions, MLM masked words with unmasked frames, MVM masked frames with
    unmasked words. `mlm_other` is MLM with another video's frames, `mlm_content` MLM on all but function
    words; `distinct` is the mean number of different codes per frame. For MVM's baselines see `copied_codes`.
    """
    wordpiece, objectives = make_batch.wordpiece, make_batch.objectives
    model.eval()
    hits, truths = defaultdict(list), defaultdict(list)         # is each guess right, by score; the labels
    code_counts = torch.zeros(model.config.codes)
    videos = torch.from_numpy(loader.dataset.manifest.videos).to(machine.device)
    content = torch.tensor([word not in FUNCTION_WORDS for word in wordpiece.vocab], device=machine.device)
    for batch in loader:
        run.name_broken(batch["broken"], "replaced")
        batch = {name: value.to(machine.device) for name, value in batch.items() if torch.is_tensor(value)}
        frames, mask = batch["frames"].float() / 255, batch["mask"]
        with machine.autocast():
            video = model.encode_video(frames)
            if "vtm" in objectives:
                for sign, ids, text_mask in ((1, batch["ids"], mask),
                                             (-1, batch["mismatched_whole"], batch["mismatched_mask"])):
                    scores = model.match(video, model.encode_text(ids, text_mask), text_mask)
                    hits["vtm"].append(sign * scores > 0)
            if "mlm" in objectives:
                text, masked_words = model.encode_text(batch["masked_ids"], mask), batch["masked_words"]
                truths["mlm"].append(batch["ids"][masked_words])
                # Rows beside each other are often of one video, or of scenes that differ in one attribute.
                half, names = len(video) // 2, videos[batch["index"]]
                others = masked_words & (names != names.roll(half))[:, None]
                for name, seen, counted in (("mlm", video, masked_words),
                                            ("mlm_other", video.roll(half, 0), others)):
                    truth, h_text = batch["ids"][counted], model.fuse(seen, text, mask)[1]
                    right = model.mlm_head(h_text[counted])[:, :len(wordpiece)].argmax(-1) == truth
                    hits[name].append(right)
                    hits[f"{name}_content"].append(right[content[truth]])
            if "mvm" in objectives:
                labels, masked = tokenizer.tokenize(frames), batch["masked_patches"]
                video = model.encode_video(mask_frames(frames, masked))
                h_video = model.fuse(video, model.encode_text(batch["ids"], mask), mask)[2]
                truth = labels[masked]
                truths["mvm"].append(truth)
                guesses = {"mvm": model.mvm_head(h_video[masked.flatten(1)]).argmax(-1).cpu(),
                           **copied_codes(labels.cpu(), masked.cpu())}
                for name, guess in guesses.items():
                    hits[name].append(guess == truth.cpu())
                code_counts += labels.flatten().cpu().bincount(minlength=len(code_counts))
                distinct = [len(frame.unique()) for frame in labels.cpu().flatten(0, 1)]
                hits["distinct"].append(torch.tensor(distinct))
    scores = {}
    if "vtm" in objectives and questions is not None:
        scores = score_choices(model, questions, wordpiece, machine, run)
    model.train()
    scores |= {name: float(torch.cat(parts).cpu().double().mean()) for name, parts in hits.items()}
    for name, parts in truths.items():              # the best constant guess, on these very words and patches
        found = torch.cat(parts).cpu()
        scores[f"{name}_majority"] = float(found.bincount(minlength=1).max().double() / len(found))
    return scores | (codebook_usage(code_counts) if "mvm" in objectives else {})


def copied_codes(labels, masked):
    """Baselines for masked patches: `mvm_mode`, the most common visible code of the frame; `mvm_copy`, the
    patch's code in the nearest frame that shows it, else the mode. labels, masked (B, T, g, g)."""
    B, T, g, _ = labels.shape
    mode, copy = torch.empty_like(labels), torch.empty_like(labels)
    for b in range(B):
        for t in range(T):
            mode[b, t] = copy[b, t] = labels[b, t][~masked[b, t]].mode().values
            for other in sorted(set(range(T)) - {t}, key=lambda other: -abs(other - t)):    # the nearest last
                copy[b, t] = torch.where(masked[b, other], copy[b, t], labels[b, other])
    return {"mvm_mode": mode[masked], "mvm_copy": copy[masked]}


def finish(model, run, test, questions, tokenizer, make_batch, args, machine):
    """Final evaluation: best.pt on the test split, zero-shot; pictures; what was learned, against chance."""
    fill(model, load(run.folder, "pretrain"))
    wordpiece, objectives = make_batch.wordpiece, args.objectives
    loader = make_loader(test, collate=make_batch, workers=args.workers, most=EVALUATED)
    if questions is None and "vtm" in objectives:
        machine.print("no multiple choice: the folder has no mc_caption_test.jsonl")
    scores = evaluate(model, run, loader, questions, tokenizer, make_batch, machine)
    model.eval()
    if tokenizer is not None:
        draw_masked(model, test, make_batch, tokenizer, machine, run.folder / "masked.png")
    if "vtm" in objectives:
        scores |= zero_shot_retrieval(model, run, test.manifest, wordpiece, args, machine)
    run.log("test", **scores)
    chance = 1 / len(questions.dataset.manifest[0]["options"]) if questions else None
    draw_curves(run, objectives, chance, run.folder / "curves.png")
    print("\n".join(report(scores, objectives, chance)))
    print(f"look at {', '.join(sorted(path.name for path in run.folder.glob('*.png')))} in {run.folder}; "
          f"broken clips: {len(run.broken)}")
    if "mvm" in objectives:
        print("next: the same command with --objectives vtm,mlm --out runs/without-mvm   (Table 5)")


def zero_shot_retrieval(model, run, manifest, wordpiece, args, machine):
    """Retrieval by joint scoring, without training for it -> its scores; draws retrieval.png."""
    spread = np.linspace(0, len(manifest) - 1, min(EVALUATED, len(manifest))).astype(int)   # of all videos
    captions = manifest.subset(spread)
    c = model.config
    videos = ClipCaptions(captions.each_video(), c.frames, c.size, args.seed, train=False, mismatched=False)
    loader = make_loader(videos, workers=args.workers)
    ranking = score_retrieval(model, captions, loader, wordpiece, machine, run)
    plots.retrieval(*ranking, manifest, c.size, run.folder / "retrieval.png",
                    "Zero-shot text-to-video retrieval, joint scoring")
    _, ranks, names, _ = ranking
    return recalls(ranks) | {"retrieval_clips": len(names)}


@torch.no_grad()
def draw_masked(model, clips, make_batch, tokenizer, machine, path):
    """masked.png: frames, what the model saw, and the codes it predicts for what it did not see."""
    samples = [clips[0, i] for i in np.linspace(0, len(clips) - 1, 6).astype(int).tolist()]
    captions, batch = [sample["caption"] for sample in samples], make_batch(samples)
    batch = {name: value.to(machine.device) for name, value in batch.items() if torch.is_tensor(value)}
    frames, masked, mask = batch["frames"].float() / 255, batch["masked_patches"], batch["mask"]
    labels = tokenizer.tokenize(frames)
    video, text = model.encode_video(mask_frames(frames, masked)), model.encode_text(batch["ids"], mask)
    predicted = model.mvm_head(model.fuse(video, text, mask)[2]).argmax(-1).view_as(labels)
    shown = {"frames": batch["frames"].permute(0, 1, 3, 4, 2), "mask": masked, "true": labels,
             "predicted": predicted}
    plots.masked([{name: value[i].cpu().numpy() for name, value in shown.items()} | {"caption": caption}
                  for i, caption in enumerate(captions)],
                 path, "Masked video modeling: predicted codes of masked patches")


def draw_curves(run, objectives, chance, path):
    """curves.png: val accuracies over the steps with their baselines, and training losses. The panel of
    multiple choice, with its `chance` level, also shows finished runs in the neighbouring folders."""
    val = [line for line in read_metrics(run.folder) if line["split"] == "val"]
    baselines = {"vtm": {"chance": 0.5}, "mlm": {}, "mvm": {}}
    for key in ("mlm_majority", "mlm_other", "mvm_majority", "mvm_mode", "mvm_copy"):
        if key in val[-1]:
            baselines[key[:3]][key[4:]] = val[-1][key]
    panels = [(f"{name}, val", {name: [(line["step"], line[name]) for line in val]}, baselines[name], True)
              for name in objectives]
    choices, files = {}, run.folder.resolve().parent.glob("*/metrics.jsonl")
    for file in sorted(files, key=os.path.getmtime)[-8:]:
        with contextlib.suppress(ValueError, LookupError):      # a damaged file of another run
            lines = read_metrics(file.parent)
            if "mc" in lines[0] and lines[-1]["split"] == "test":
                choices[file.parent.name] = [(line["step"], line["mc"]) for line in lines[:-1]]
    if choices:
        panels.append(("multiple choice, val", choices, {"chance": chance} if chance else {}, True))
    losses = {name: [(line["step"], line[f"loss_{name}"]) for line in val] for name in objectives}
    plots.curves([*panels, ("losses, training", losses, {}, False)], path, "Pre-training (3.4)")


def report(s, objectives, chance):
    """The lines that say what was learned, each against chance or a baseline."""
    yield "on the test split, zero-shot; in brackets what chance or a baseline gets"
    if "vtm" in objectives:
        yield f"  matching (VTM)       {s['vtm']:6.1%}   (chance 50%)"
    if "mlm" in objectives:
        yield (f"  masked words (MLM)   {s['mlm']:6.1%}   (majority word {s['mlm_majority']:.1%}, another "
               f"clip's frames {s['mlm_other']:.1%}); content words {s['mlm_content']:.1%} "
               f"({s['mlm_other_content']:.1%})")
    if "mvm" in objectives:
        copied = s["mvm"] <= max(s[name] for name in ("mvm_majority", "mvm_mode", "mvm_copy"))
        yield (f"  masked patches (MVM) {s['mvm']:6.1%}   (majority code {s['mvm_majority']:.1%}, commonest "
               f"visible {s['mvm_mode']:.1%}, nearest frame's {s['mvm_copy']:.1%})"
               + ("; no better than copying" if copied else ""))
        yield (f"  codebook in use      {s['codebook_usage']:6.1%}   perplexity "
               f"{s['codebook_perplexity']:.1f}, {s['distinct']:.1f} codes a frame")
    if "mc" in s:
        parts = ", ".join(f"{name[3:]} {s[name]:.0%}" for name in sorted(s) if name.startswith("mc_"))
        yield f"  multiple choice      {s['mc']:6.1%}   (chance {chance:.0%}); {parts}"
    if "r1" in s:
        n = s["retrieval_clips"]
        yield (f"  text-to-video, joint R@1 {s['r1']:.1%}  R@5 {s['r5']:.1%}  R@10 {s['r10']:.1%}  median "
               f"rank {s['median_rank']:g} of {n} clips  (chance {1 / n:.1%}, {min(1, 5 / n):.1%}, "
               f"{min(1, 10 / n):.1%}, {(n + 1) / 2:g})")


if __name__ == "__main__":
    run_script(lambda: train(parse()), DataError)
