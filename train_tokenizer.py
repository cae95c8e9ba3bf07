"""Stage 1: the semantic vector-quantized video tokenizer (3.3), which reads a caption's words from codes.

    python train_tokenizer.py                           the toy preset on the synthetic set
    python train_tokenizer.py --data my_clips --preset paper --init-tokenizer clip_vit_b32.safetensors
    python train_tokenizer.py --target pixels           for Tables 6, 7; also --encoder videoswin, --loss bce
    torchrun --nproc-per-node=2 train_tokenizer.py      several processes

Leaves in --out: last.pt (go on with --resume), best.pt (lowest val loss), metrics.jsonl, curves.png,
codebook.png.
"""
import math

import torch
import torch.nn.functional as F

from evilm import (SPECIAL, Config, InputError, Parser, Run, SemanticTokenizer, at_least, codebook_usage,
                   configure, fill, freeze, load, load_published, make_optimizer, make_vocabulary,
                   read_metrics, run_script, set_up, shared_flags, start_centred, svq_loss, words_present)
from toy_data import (Batches, ClipCaptions, DataError, collate, make_loader, open_splits, plots,
                      render_if_missing)

EVALUATED = 1000                # clips of a split that one evaluation looks at
METRICS = {"words": ("word_loss", "word_recall"), "pixels": ("pixel_loss", "pixel_mean_colour")}


def parse(argv=None):
    parser = Parser(description=__doc__)
    shared_flags(parser, out="runs/tokenizer")
    add = parser.add_argument
    add("--target", choices=["words", "pixels"], help="what is read from the codes: the caption's words "
        "(default), or the frames' pixels, in DALL-E's place in Tables 6 and 7")
    add("--encoder", choices=["vit", "videoswin"], help="CLIP's ViT, frame by frame (default), or VideoSwin, "
        "all frames together (Table 7)")
    add("--loss", choices=["focal", "bce"], default="focal", help="of the words: Eq. (6), or binary "
        "cross-entropy (Table 6)")
    add("--word-weight", type=at_least(0, float), help="factor on L_TOKEN in Eq. (7)")
    add("--warm", type=at_least(0, float, 1), help="fraction of the steps, at the start, unquantized")
    add("--revive-after", type=at_least(0), metavar="STEPS", help="every STEPS steps, move the codes unused "
        "since the last time to encoder outputs; 0: never (the paper preset's default)")
    add("--init-tokenizer", metavar="FILE", help="published CLIP ViT-B/32, or Video Swin-T for --encoder "
        "videoswin, for --preset paper: a torch file or .safetensors (default: from scratch)")
    add("--freeze-encoder", action="store_true", help="do not train the encoder that --init-tokenizer loads")
    args = parser.parse_args(argv)
    if args.target == "pixels" and (args.loss != "focal" or args.word_weight is not None):
        raise InputError("--loss and --word-weight apply only to --target words; the pixels' factor is "
                         "--config pixel_weight=NUMBER")
    if args.freeze_encoder and not args.init_tokenizer:
        raise InputError("--freeze-encoder: keeps published weights; name their file with --init-tokenizer")
    return args


class TokenizerBatch:
    """Makes a batch of samples: frames (B, T, 3, H, W) uint8, their captions' ids and mask (B, L)."""

    def __init__(self, wordpiece, max_words):
        self.wordpiece, self.max_words = wordpiece, max_words

    def __call__(self, samples):
        batch = collate(samples)
        ids, mask = self.wordpiece.encode_batch([row["caption"] for row in batch["rows"]], self.max_words)
        return {"frames": batch["frames"], "ids": ids, "mask": mask, "broken": batch["broken"]}


def tokenizer_loss(args, config, frames, batch, read, code_loss):
    """Eq. (7), or its counterpart with pixels (4.3) or binary cross-entropy (Table 6), for what D `read` from
    the codes -> (loss, its first term)."""
    if config.tokenizer_target == "pixels":
        pixels = F.mse_loss(read.float(), frames)
        return config.pixel_weight * pixels + code_loss, pixels
    words = words_present(batch["ids"], batch["mask"], config.vocab_size)
    if args.loss == "bce":
        token = F.binary_cross_entropy_with_logits(read.float(), words)
        return config.word_weight * token + code_loss, token
    loss, terms = svq_loss(read, words, code_loss, config.word_weight)                      # Eq. (7)
    return loss, terms["token"]


def train(args):
    """Trains a tokenizer as the flags say, anew or with --resume; then scores best.pt and draws."""
    machine = set_up(args)
    config = configure(getattr(Config, args.preset)(), args, tokenizer_epochs="epochs",
                       tokenizer_batch_size="batch_size", tokenizer_lr="lr", tokenizer_target="target",
                       tokenizer_encoder="encoder", word_weight="word_weight", tokenizer_warm="warm",
                       tokenizer_revive="revive_after")
    if machine.rank == 0:
        render_if_missing(args.data)
    machine.barrier()
    splits = open_splits(args.data, note=machine.print)
    wordpiece, config = make_vocabulary(args, config, (row["caption"] for row in splits["train"]), machine)
    torch.manual_seed(args.seed)
    tokenizer = SemanticTokenizer(config).to(machine.device)

    clips, val, test = (ClipCaptions(splits[name], config.frames, config.size, args.seed, name == "train",
                                     config.augment, mismatched=False)
                        for name in ("train", "val", "test"))
    make_batch = TokenizerBatch(wordpiece, config.max_words)
    if not args.resume:
        start_encoder(tokenizer, splits["train"], args, machine)
    if args.freeze_encoder:
        freeze(tokenizer, "encoder")
    optimizer = make_optimizer(tokenizer, config.tokenizer_lr, config.weight_decay, machine.device)
    used = torch.zeros(config.codes, device=machine.device)         # codes chosen since the last revival
    run = Run(args, "tokenizer", config, wordpiece.vocab, machine, tokenizer, optimizer,
              decide=("max_steps", "loss", "init_tokenizer", "freeze_encoder"), sums={"used": used})
    wrapped = machine.wrap(tokenizer, args.compile)

    steps_per_epoch = max(1, len(clips) // config.tokenizer_batch_size)
    steps = min(args.max_steps or math.inf, config.tokenizer_epochs * steps_per_epoch)
    batches = Batches(len(clips), config.tokenizer_batch_size, args.seed, steps, run.step, machine.rank,
                      machine.world_size, args.accumulate)
    loader = make_loader(clips, batches, make_batch, args.workers)
    held_out = make_loader(val, collate=make_batch, workers=args.workers, most=EVALUATED)
    loss_name, _ = METRICS[config.tokenizer_target]
    warm = min(round(config.tokenizer_warm * steps), steps - 1)         # the last step quantizes
    evaluate_every = max(100, math.ceil(steps / 10))
    machine.print(f"tokenizer: {len(clips):,} clips, {steps:,} steps of {batches.batch_size}, {machine}")
    for batch in run.batches(loader, steps, config.tokenizer_lr, config.warmup):
        if run.step == warm > 0:
            move_codes(torch.ones_like(used).bool(), tokenizer, wrapped, batch, run)
            # `used` keeps the marks of the warm-up, so that the first revival moves few of the new codes.
        total = torch.zeros((), device=machine.device)
        for part in machine.parts(wrapped, batch, args.accumulate):
            frames = part["frames"].float() / 255
            with machine.autocast():
                read, ids, code_loss = wrapped(frames, quantize=run.step >= warm)
                loss, _ = tokenizer_loss(args, config, frames, part, read, code_loss)       # Eq. (7)
            (loss / args.accumulate).backward()                     # equal parts; DDP averages over processes
            total += loss.detach() / args.accumulate / machine.world_size
            used.index_fill_(0, ids.flatten(), 1.0)
        run.optimise(total)
        # The last fifth of the run leaves the codes alone, so that the decoder can settle.
        revives = config.tokenizer_revive and run.step % config.tokenizer_revive == 0
        if revives and warm < run.step < 0.8 * steps:
            unused = (machine.total(used) == 0).to(machine.device)
            move_codes(unused, tokenizer, wrapped, batch, run)
            used.zero_()
        if run.step % evaluate_every == 0 or run.step == steps:
            run.check_finite()
            if machine.rank == 0:
                scores = evaluate(tokenizer, held_out, run, args, machine)
                run.evaluated(-math.inf if run.step <= warm else -scores[loss_name], **scores,
                              **gradients_at_encoder(tokenizer, part, args))
                machine.print(f"step {run.step:,}, val: {report(config, scores)}")
            machine.barrier()
            run.save_last()
    run.report_speed()
    if machine.rank == 0:
        finish(tokenizer, run, test, make_batch, args, machine)
    machine.barrier()


def start_encoder(tokenizer, manifest, args, machine):
    """Published weights where --init-tokenizer names them; from scratch, VideoSwin's norms centred."""
    if args.init_tokenizer:
        machine.print(str(load_published(tokenizer.encoder, args.init_tokenizer)))
        return
    c = tokenizer.config
    if c.preset == "paper" and not c.tokenizer_revive:
        machine.print("without --init-tokenizer FILE the encoder starts from scratch, and the paper's "
                      "settings let its codebook collapse; --warm 0.4 --revive-after 20 help")
    if tokenizer.sees_neighbours:
        middle = ClipCaptions(manifest, c.frames, c.size, args.seed, train=False, mismatched=False)
        frames = middle.first(32).to(machine.device) / 255
        start_centred(tokenizer.encoder, tokenizer.normalise(frames))


@torch.no_grad()
def move_codes(which, tokenizer, wrapped, batch, run):
    """Moves the codes where `which` (M,) is True onto E(X) of the batch, on all processes alike."""
    parts = run.machine.parts(wrapped, batch, run.args.accumulate)
    vectors = torch.cat([tokenizer.embed(part["frames"].float() / 255) for part in parts])
    generator = torch.Generator().manual_seed(run.args.seed * 1_000_003 + run.step)
    tokenizer.quantizer.move_codes(which, run.machine.gather(vectors).flatten(0, 3), generator)


@torch.no_grad()
def evaluate(tokenizer, loader, run, args, machine):
    """Scores on held-out clips: the loss, a second metric, and how much of the codebook is in use.

    For words the second metric is recall: the fraction of a caption's k words among its k highest logits; for
    pixels it is a baseline, the squared error of predicting the clip's mean colour.
    """
    config, n = tokenizer.config, 0
    sums, ratio, counts = torch.zeros(2), 0.0, torch.zeros(config.codes)
    for batch in loader:
        run.name_broken(batch["broken"], "replaced")
        frames = batch["frames"].to(machine.device).float() / 255
        batch = {name: batch[name].to(machine.device) for name in ("ids", "mask")}
        with machine.autocast():
            read, ids, code_loss = tokenizer(frames)
            _, first_term = tokenizer_loss(args, config, frames, batch, read, code_loss)
        sums += len(frames) * torch.stack([first_term, code_loss]).float().cpu()
        n += len(frames)
        counts += torch.bincount(ids.flatten().cpu(), minlength=config.codes)
        if config.tokenizer_target == "pixels":
            errors = (frames - frames.mean((1, 3, 4), keepdim=True)) ** 2
            ratio = ratio + torch.tensor([[errors.sum()], [errors.numel()]])
        else:
            words = words_present(batch["ids"], batch["mask"], config.vocab_size)
            ranks = read.float().argsort(1, descending=True).argsort(1)
            found = (ranks < words.sum(1, keepdim=True)) * words
            ratio = ratio + torch.stack([found.sum(0), words.sum(0)]).cpu()                 # (2, K)
    (part, whole), (loss_name, metric_name) = ratio, METRICS[config.tokenizer_target]
    scores = {loss_name: float(sums[0] / n), "code_loss": float(sums[1] / n),
              metric_name: float(part.sum() / whole.sum()), **codebook_usage(counts)}
    if config.tokenizer_target == "words":      # mean over words: rare ones count as much
        scores["word_recall_macro"] = float((part / whole)[whole > 0].mean())
    return scores


def gradients_at_encoder(tokenizer, batch, args):
    """Norms of the gradients that the first term and the code terms of Eq. (7) each send to E(X)."""
    frames, config = batch["frames"].float() / 255, tokenizer.config
    embedded = tokenizer.embed(frames).detach().requires_grad_()
    quantized, _, code_loss = tokenizer.quantizer(embedded)
    loss, _ = tokenizer_loss(args, config, frames, batch, tokenizer.reconstruct(quantized), 0.0)
    norms = [float(torch.autograd.grad(term, embedded, retain_graph=True)[0].norm())
             for term in (loss, code_loss)]
    first_term = "word_gradient" if config.tokenizer_target == "words" else "pixel_gradient"
    return {first_term: norms[0], "code_gradient": norms[1]}


def report(config, scores):
    """What was read from the codes, in a line."""
    if config.tokenizer_target == "pixels":
        read = f"squared error {scores['pixel_loss']:.4f} (mean colour {scores['pixel_mean_colour']:.4f})"
    else:
        read = f"words found {scores['word_recall']:.1%} (mean over words {scores['word_recall_macro']:.1%})"
    return (f"{read}; of {config.codes:,} codes {scores['codebook_usage']:.1%} in use, perplexity "
            f"{scores['codebook_perplexity']:.1f}")


def finish(tokenizer, run, clips, make_batch, args, machine):
    """Scores best.pt on the test split, draws the pictures."""
    fill(tokenizer, load(run.folder, "tokenizer"))
    config = tokenizer.config
    loader = make_loader(clips, collate=make_batch, workers=args.workers, most=EVALUATED)
    scores = evaluate(tokenizer, loader, run, args, machine)
    run.log("test", **scores)
    val = [line for line in read_metrics(run.folder) if line["split"] == "val"]

    def series(name):
        return [(line["step"], line[name]) for line in val]

    loss_name, _ = METRICS[config.tokenizer_target]
    losses = {config.tokenizer_target: series(loss_name), "codes": series("code_loss")}
    panels = [("codes in use, val", {"usage": series("codebook_usage")}, {}, True),
              ("losses, val", losses, {}, False)]
    if config.tokenizer_target == "words":
        panels.insert(0, ("words found, val", {"recall": series("word_recall")}, {}, True))
    plots.curves(panels, run.folder / "curves.png", f"Tokenizer of {config.tokenizer_target}")
    draw_codebook(tokenizer, loader, make_batch.wordpiece, run.folder / "codebook.png", machine)
    print(f"test: {report(config, scores)}")
    print(f"look at {run.folder}/codebook.png and curves.png; broken clips: {len(run.broken)}")
    print("next: python pretrain.py, with --tokenizer DIR if this was not the default --out")


@torch.no_grad()
def draw_codebook(tokenizer, loader, wordpiece, path, machine, tiles=24, crops=8):
    """codebook.png: patches that carry each of the most used codes, and words that go with the code.

    For a semantic tokenizer these are the words whose predicted probability, for a clip with this code in
    every patch, most exceeds their frequency in captions; for a pixel tokenizer, the words that are more
    frequent in captions of clips with the code than in all captions.
    """
    c, patches_of, carried, present = tokenizer.config, {}, [], []
    counts = torch.zeros(c.codes)
    for batch in loader:
        frames = batch["frames"].to(machine.device)
        ids = tokenizer.tokenize(frames.float() / 255).cpu()
        counts += torch.bincount(ids.flatten(), minlength=c.codes)
        carried.append(torch.zeros(len(ids), c.codes).scatter_(1, ids.flatten(1), 1.0))
        present.append(words_present(batch["ids"], batch["mask"], c.vocab_size))
        patches = batch["frames"].unfold(3, 32, 32).unfold(4, 32, 32)                # (B, T, 3, g, g, 32, 32)
        patches = patches.permute(0, 1, 3, 4, 5, 6, 2).flatten(0, 3)
        for code in ids.unique().tolist():
            patches_of.setdefault(code, []).extend(patches[ids.flatten() == code][:2])
    carried, present = torch.cat(carried), torch.cat(present)
    drawn = counts.argsort(descending=True)[:min(tiles, int((counts > 0).sum()))]
    if c.tokenizer_target == "words":
        codes = F.normalize(tokenizer.quantizer.codebook, dim=-1)[drawn.to(machine.device), None, None, None]
        clip = codes.expand(-1, c.frames, c.grid, c.grid, -1)
        shown, title = tokenizer.read_words(clip).sigmoid().cpu(), "words predicted"
    else:
        shown = carried[:, drawn].t() @ present / carried[:, drawn].sum(0)[:, None]
        title = "words of their clips' captions"
    entries = []
    for code, words in zip(drawn.tolist(), shown):
        strongest = (words - present.mean(0)).topk(min(4, len(words))).indices.tolist()
        entries.append((f"code {code} · {counts[code] / counts.sum():.1%} of patches",
                        torch.stack(patches_of[code][:crops]).numpy(),
                        [(wordpiece.vocab[len(SPECIAL) + k], float(words[k])) for k in strongest]))
    plots.codebook(entries, path, f"What the most used codes stand for: {title}")


if __name__ == "__main__":
    run_script(lambda: train(parse()), DataError)
