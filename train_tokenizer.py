"""Stage 1: the semantic vector-quantized video tokenizer (3.3). Learns to name a clip's words from its codes.

    python train_tokenizer.py                           the toy preset on the synthetic set, on what there is
    python train_tokenizer.py --data my_clips --preset paper --device cuda
    python train_tokenizer.py --target pixels           for Tables 6 and 7; so --encoder videoswin, --loss bce
    torchrun --nproc-per-node=2 train_tokenizer.py      over processes; several nodes: torchrun's own flags

Leaves in --out: last.pt (go on with --resume), best.pt (lowest val loss), metrics.jsonl, curves.png,
codebook.png.
"""
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import toy_data
from evilm import (SPECIAL, Config, InputError, Run, SemanticTokenizer, WordPiece, common_flags, configure,
                   focal_loss, load, load_published, make_optimizer, prefetch, run_script, same_set,
                   set_up, words_present)
from toy_data import Batches, ClipCaptions, DataError, pictures

SYNTHETIC = "data/toy"          # rendered on first use; a folder that the user names is never made up
MOST_EVALUATED = 1000           # clips of a split that one evaluation looks at


def parse(argv=None):
    parser = common_flags(__doc__, stage="tokenizer_")
    toy, paper = Config.toy(), Config.paper()
    parser.add_argument("--target", default="words", choices=["words", "pixels"], help="what is read from "
                        "the codes: the caption's words, or the frames' pixels, in DALL-E's place in Tables "
                        "6 and 7 (default: words)")
    parser.add_argument("--encoder", default="vit", choices=["vit", "videoswin"], help="CLIP's ViT, a frame "
                        "at a time, or VideoSwin, all together, which Table 7 compares (default: vit)")
    parser.add_argument("--loss", choices=["focal", "bce"], help="of the words: Eq. (6), or plain binary "
                        "cross-entropy, which Table 6 compares (default: focal)")
    parser.add_argument("--word-weight", type=float, help="factor on L_TOKEN in Eq. (7) (default: the "
                        f"preset's, {toy.word_weight:g} in toy, {paper.word_weight:g} in paper)")
    parser.add_argument("--warm", type=float, help="share of the steps in which words, or pixels, are read "
                        "from E(X) unquantized, for an encoder that starts from nothing (default: the "
                        f"preset's, {toy.tokenizer_warm:g} in toy, {paper.tokenizer_warm:g} in paper)")
    parser.add_argument("--revive-after", type=int, metavar="STEPS", help="move a code that no cell chose "
                        "for so many steps to an encoder output; 0: never, as in the paper (default: the "
                        f"preset's, {toy.tokenizer_revive} in toy, {paper.tokenizer_revive} in paper)")
    parser.add_argument("--init-tokenizer", metavar="FILE", help="published CLIP ViT-B/32, or Video Swin-T "
                        "for --encoder videoswin, that the encoder starts from, as in the paper: a torch "
                        "file or .safetensors, for --preset paper (default: none, it starts from nothing)")
    parser.add_argument("--out", default="runs/tokenizer", metavar="DIR", help="the run's folder (default: "
                        "runs/tokenizer)")
    args = parser.parse_args(argv)
    if args.target == "pixels":
        for flag, value in (("--loss", args.loss), ("--word-weight", args.word_weight)):
            if value is not None:
                raise InputError(f"{flag} {value}: of words, and --target pixels reads none; its loss is the "
                                 "squared error, its factor --config pixel_weight=NUMBER")
    else:
        args.loss = args.loss or "focal"
    return args


# ----------------------------------------------------------------------------- clips, captions and vocabulary


def render_if_asked(args, machine):
    if args.data == SYNTHETIC:
        machine.first(lambda: Path(SYNTHETIC).exists() or toy_data.render(SYNTHETIC))


def open_clips(args, machine, task=""):
    """The manifests {"train", "val", "test"} of a task's files in --data, by default of the captions; the
    synthetic set is rendered on first use."""
    render_if_asked(args, machine)
    machine.first(lambda: toy_data.open_splits(args.data, task))    # writes the index that others then map
    splits, notes = toy_data.open_splits(args.data, task)
    for note in notes:
        machine.say(note)
    return splits


def captions_of(manifest):
    return (row["caption"] for row in manifest)


def read_lines(flag, path):
    """The lines of a file that a flag names: words of BERT's vocab.txt, or captions."""
    try:
        return Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{flag} {path}: cannot be read ({error})") from None


def make_vocabulary(args, config, texts, machine):
    """WordPiece for the training texts, and the Config with the number of words in use."""
    if args.vocab_captions:
        texts = read_lines("--vocab-captions", args.vocab_captions)
    if args.vocab:
        whole = WordPiece(read_lines("--vocab", args.vocab))
        wordpiece = whole.keep_frequent(texts, min(1.0, config.vocab_rows / len(whole)))
    else:
        wordpiece = WordPiece.from_captions(texts, config.vocab_rows)
    machine.say(f"vocabulary: {len(wordpiece):,} words, {len(SPECIAL)} of them special tokens")
    return wordpiece, replace(config, words=len(wordpiece))


def pad(rows, width):
    """Lists of ids -> ids (B, width), mask (B, width)."""
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for row, words in zip(ids, rows):
        row[:len(words)] = torch.as_tensor(words)
    return ids, ids != 0            # [PAD] is 0


def encode_padded(wordpiece, texts, width):
    """Texts -> ids (B, width), mask (B, width)."""
    return pad([wordpiece.encode(text, width) for text in texts], width)


class TokenizerBatch:
    """Makes a batch of samples: frames (B, T, 3, H, W) uint8, their captions' words, ids and mask (B, L)."""
    mismatched = False

    def __init__(self, wordpiece, config):
        self.wordpiece, self.config = wordpiece, config

    def __call__(self, samples):
        ids, mask = encode_padded(self.wordpiece, [s["caption"] for s in samples], self.config.max_words)
        return {"frames": torch.stack([s["frames"] for s in samples]), "ids": ids, "mask": mask,
                "broken": [line for s in samples for line in s["broken"]]}


def clips_of(manifest, config, args, train, mismatched):
    """The samples of a manifest: random frames for training, the middle ones for evaluation."""
    return ClipCaptions(manifest, config.frames, config.size, args.seed, train, args.strict,
                        augment=train and config.augment, mismatched=mismatched,
                        negatives=config.negatives if train else 1)


def batches_left(clips, run, args, machine):
    """Sets how long the run is -> the Batches of the steps that are left."""
    epoch = Batches(len(clips), args.batch_size, args.seed, 0).steps_per_epoch
    run.steps = min(args.epochs * epoch, args.max_steps or math.inf)
    return Batches(len(clips), args.batch_size, args.seed, run.steps, run.step, machine.rank, machine.world)


def between_evaluations(steps):
    """Ten evaluations a run, at least a hundred steps apart, and one at the end."""
    return max(100, math.ceil(steps / 10))


def make_loader(clips, batches, collate, args, machine):
    return DataLoader(clips, batch_sampler=batches, collate_fn=collate, num_workers=args.workers,
                      pin_memory=machine.device.type == "cuda", prefetch_factor=4 if args.workers else None)


def evaluation_loader(manifest, collate, config, args, machine, most=MOST_EVALUATED, batch_size=50):
    """A split's first clips, or all, in order, once, with the middle frames: the same samples every time."""
    clips = clips_of(manifest, config, args, train=False, mismatched=collate.mismatched)
    keys = [(0, i) for i in range(len(clips))[:most]][machine.rank::machine.world]
    return make_loader(clips, [keys[i:i + batch_size] for i in range(0, len(keys), batch_size)], collate,
                       args, machine)


def first_frames(manifest, collate, config, args, machine, clips):
    """Frames of a split's first clips, (B, T, 3, H, W) in [0, 1], the same on all processes."""
    loader = evaluation_loader(manifest, collate, config, args, machine.alone(), clips, clips)
    return scale(next(iter(loader))["frames"].to(machine.device))


def scale(frames):
    """uint8 frames, as they travel, -> [0, 1]."""
    return frames.float() / 255


# ----------------------------------------------------------------------------------------------------- losses


def reconstruction_loss(args, config, read, batch):
    """The first term of Eq. (7), of what D reads from the codes: L_TOKEN of words' logits (B, K), or, of
    frames (B, T, 3, H, W), the mean squared error of their pixels, which are in [0, 1]."""
    if config.tokenizer_target == "pixels":
        return F.mse_loss(read.float(), scale(batch["frames"]))
    logits, targets = read.float(), words_present(batch["ids"], batch["mask"], config.words)
    return (focal_loss(logits, targets) if args.loss == "focal"
            else F.binary_cross_entropy_with_logits(logits, targets))


def beside_the_loss(config, read, batch):
    """Numerators and denominators of the score beside the loss. Of words, their recall, (2, K): of a
    caption's k words, those among the k that score highest; of pixels, (2, 1), the error of a clip's mean
    colour."""
    if config.tokenizer_target == "pixels":
        errors = (scale(batch["frames"]) - scale(batch["frames"]).mean((1, 3, 4), keepdim=True)) ** 2
        return torch.tensor([[errors.sum()], [errors.numel()]], dtype=torch.float64)
    targets = words_present(batch["ids"], batch["mask"], config.words)
    ranks = read.float().argsort(1, descending=True).argsort(1)
    found = (ranks < targets.sum(1, keepdim=True)) * targets
    return torch.stack([found.sum(0), targets.sum(0)]).double().cpu()


def names_of(config):
    """What metrics.jsonl calls the target's loss, what stands beside it, and its gradient."""
    return (("word_loss", "word_recall", "word_gradient") if config.tokenizer_target == "words" else
            ("pixel_loss", "pixel_mean_colour", "pixel_gradient"))


@torch.no_grad()
def evaluate(tokenizer, loader, args, machine):
    """On held-out clips: the loss, what stands beside it, and how much of the codebook is in use."""
    tokenizer.eval()
    c = tokenizer.config
    counts, sums, beside = torch.zeros(c.codes), torch.zeros(3, dtype=torch.float64), 0.0
    for batch, _ in prefetch(loader, machine.device):
        with machine.autocast():
            read, ids, code_loss = tokenizer(scale(batch["frames"]))
        n, loss = len(ids), reconstruction_loss(args, c, read, batch)
        sums += torch.tensor([n * float(loss), n * float(code_loss), n], dtype=torch.float64)
        beside = beside + beside_the_loss(c, read, batch)
        counts += torch.bincount(ids.flatten().cpu(), minlength=c.codes)
    sums, (part, whole) = machine.total(sums), machine.total(beside)
    tokenizer.train()
    loss_name, beside_name, _ = names_of(c)
    scores = {loss_name: float(sums[0] / sums[2]), "code_loss": float(sums[1] / sums[2]),
              beside_name: float(part.sum() / whole.sum()), **usage(machine.total(counts))}
    if c.tokenizer_target == "words":       # each word counts the same, the rare ones as the common
        scores["word_recall_macro"] = float((part / whole)[whole > 0].mean())
    return scores


def usage(counts):
    """The share of codes that occur, the paper's vocabulary rate, and their distribution's perplexity. Of how
    many clips the paper does not say; here of a split's first MOST_EVALUATED."""
    share = counts[counts > 0] / counts.sum()
    return {"codebook_usage": len(share) / len(counts),
            "codebook_perplexity": float(torch.exp(-(share * share.log()).sum()))}


@torch.no_grad()
def codebook_in_use(tokenizer, loader, machine):
    """`usage` on the clips of a loader."""
    ids = [tokenizer.tokenize(scale(batch["frames"])).flatten().cpu()
           for batch, _ in prefetch(loader, machine.device)]
    return usage(torch.bincount(torch.cat(ids), minlength=tokenizer.config.codes))


def gradients_at_encoder(tokenizer, batch, args):
    """Norms of the gradients that the reconstruction and the code terms of Eq. (7) each send to E(X)."""
    embedded = tokenizer.embed(scale(batch["frames"])).detach().requires_grad_()
    quantized, _, code_loss = tokenizer.quantizer(embedded)
    c = tokenizer.config
    loss = c.target_weight * reconstruction_loss(args, c, tokenizer.reconstruct(quantized), batch)
    return {name: float(torch.autograd.grad(term, embedded, retain_graph=True)[0].norm())
            for name, term in ((names_of(c)[2], loss), ("code_gradient", code_loss))}


# --------------------------------------------------------------------------------------------------- training


def train(args, machine):
    """Trains a tokenizer as the flags say, from nothing or from where it was, and leaves its pictures."""
    config = configure(args, stage="tokenizer_")
    config = replace(config, word_weight=config.word_weight if args.word_weight is None else args.word_weight,
                     tokenizer_warm=config.tokenizer_warm if args.warm is None else args.warm,
                     tokenizer_revive=config.tokenizer_revive if args.revive_after is None
                     else args.revive_after,
                     tokenizer_target=args.target, tokenizer_encoder=args.encoder)
    splits = open_clips(args, machine)
    wordpiece, config = make_vocabulary(args, config, captions_of(splits["train"]), machine)
    clips = clips_of(splits["train"], config, args, train=True, mismatched=False)
    torch.manual_seed(args.seed)
    tokenizer = SemanticTokenizer(config).to(machine.device)
    collate = TokenizerBatch(wordpiece, config)
    if args.init_tokenizer and not args.resume:
        machine.say(load_published(tokenizer.encoder, args.init_tokenizer))
    elif tokenizer.sees_neighbours and not args.resume:
        tokenizer.start(first_frames(splits["train"], collate, config, args, machine, 32))
    optimizer = make_optimizer(tokenizer, args.lr, config.weight_decay, machine.device)
    run = Run(args, "tokenizer", config, wordpiece.vocab, ("loss", "init_tokenizer"), machine)
    run.start(tokenizer, optimizer, args.resume)

    batches = batches_left(clips, run, args, machine)
    look = between_evaluations(run.steps)
    warm, last_revival = round(config.tokenizer_warm * run.steps), 0.8 * run.steps
    held_out = evaluation_loader(splits["val"], collate, config, args, machine)
    model = machine.wrap(tokenizer, args.compile)
    used = run.state.get("used", torch.zeros(config.codes)).to(machine.device)
    loss_name = names_of(config)[0]

    machine.say(f"tokenizer: {len(clips):,} clips, {run.steps:,} steps of {batches.batch_size} clips, "
                f"{machine}")
    for batch in run.steps_of(make_loader(clips, batches, collate, args, machine)):
        run.set_learning_rate(args.lr, config.warmup)
        if run.step == warm:
            tokenizer.quantizer.start(embedded(tokenizer, batch), run.generator())
            machine.shared(tokenizer.quantizer.codebook.data)
        losses, chosen = learn(model, batch, run.step >= warm, batches.batch_size, config, args, machine)
        run.optimise(losses)
        used += chosen
        if config.tokenizer_revive and run.step % config.tokenizer_revive == 0 and (
                warm < run.step < last_revival):
            used = machine.total(used)
            tokenizer.quantizer.revive(used > 0, embedded(tokenizer, batch), run.generator())
            machine.shared(tokenizer.quantizer.codebook.data)
            used.zero_()
        run.state["used"] = used
        if run.step % look == 0 or run.step == run.steps:
            scores = evaluate(tokenizer, held_out, args, machine)
            run.log(split="val", **scores, **gradients_at_encoder(tokenizer, batch, args))
            run.save_best(-math.inf if run.step < warm else -scores[loss_name])
            machine.say(f"{report(config, scores)}, codes in use {scores['codebook_usage']:.1%}")
            run.save_last()
    run.end_of_steps()
    if machine.main:
        finish(tokenizer, run, splits, collate, args, machine)


def learn(model, batch, quantize, batch_size, config, args, machine):
    """The gradients of Eq. (7) on a batch, in parts (--accumulate) -> this process's shares of its first term
    and of the code terms (2,), and how many cells chose each code (M,)."""
    losses, chosen = torch.zeros(2, device=machine.device), torch.zeros(config.codes, device=machine.device)
    for part, sync in machine.parts(model, batch, args.accumulate):
        with sync, machine.autocast():
            read, ids, code_loss = model(scale(part["frames"]), quantize=quantize)
            share = len(ids) / batch_size * machine.world               # of this part in the batch's mean
            target_term = share * reconstruction_loss(args, config, read, part)
            # Eq. (7). 3.4 adds "L_SVQ and L_TOKEN", but L_SVQ holds L_TOKEN, which counts once.
            loss = config.target_weight * target_term + share * code_loss
        loss.backward()
        losses += torch.stack([target_term.detach(), share * code_loss.detach()])
        chosen += torch.bincount(ids.flatten(), minlength=config.codes)
    return losses, chosen


def embedded(tokenizer, batch):
    """E(X) of a batch without gradient: (cells of all clips, code_dim)."""
    with torch.no_grad():
        return tokenizer.embed(scale(batch["frames"])).flatten(0, 3)


def finish(tokenizer, run, splits, collate, args, machine):
    """Scores best.pt on the test split, draws the pictures, says what was learned."""
    alone = machine.alone()
    tokenizer.load_state_dict(load(run.folder / "best.pt", "tokenizer")["model"])
    loader = evaluation_loader(splits["test"], collate, tokenizer.config, args, alone)
    scores = evaluate(tokenizer, loader, args, alone)
    run.log(split="test", **scores)
    metrics = [line for line in run.metrics() if line["split"] == "val"]
    series = {name: [(line["step"], line[name]) for line in metrics]
              for name in metrics[0] if name != "split"}
    c, (loss_name, beside_name, _) = tokenizer.config, names_of(tokenizer.config)
    of_words = c.tokenizer_target == "words"
    panels = [("words found, val", {"recall": series[beside_name]}, {}, True) if of_words else
              ("squared error of pixels, val", {"error": series[loss_name]},
               {"mean colour": series[beside_name][-1][1]}, False),
              ("codes in use, val", {"usage": series["codebook_usage"]}, {}, True),
              ("losses, val", {c.tokenizer_target: series[loss_name], "codes": series["code_loss"]}, {},
               False)]
    pictures.curves(panels, run.folder / "curves.png",
                    "Semantic tokenizer (3.3)" if of_words else "Tokenizer of pixels (4.3)")
    draw_codebook(tokenizer, loader, collate.wordpiece, run.folder, alone)
    print(f"test: {report(c, scores)}; {scores['codebook_usage']:.1%} of {c.codes:,} codes in use, "
          f"perplexity {scores['codebook_perplexity']:.1f}")
    run.say_end(f"python pretrain.py{same_set(args)} --tokenizer {run.folder}")


def report(config, scores):
    """What was read from the codes, said in a line."""
    if config.tokenizer_target == "pixels":
        return (f"squared error of pixels {scores['pixel_loss']:.4f} (a clip's mean colour: "
                f"{scores['pixel_mean_colour']:.4f})")
    return (f"word loss {scores['word_loss']:.4f}, {scores['word_recall']:.1%} of a caption's words are "
            f"among as many that score highest; averaged over words {scores['word_recall_macro']:.1%}")


@torch.no_grad()
def words_predicted(tokenizer):
    """The words that each code predicts, of a clip that is this code everywhere: probabilities (M, K), and by
    how much each exceeds its mean over the codes."""
    c = tokenizer.config
    codebook = F.normalize(tokenizer.quantizer.codebook, dim=-1)[:, None, None, None]
    scores = torch.cat([tokenizer.read_words(codes.expand(-1, c.frames, c.grid, c.grid, -1)).sigmoid().cpu()
                        for codes in codebook.split(64)])
    return scores, scores - scores.mean(0)


def words_beside(carried, present):
    """The words in the captions of the clips that carry each code. carried (B, M), present (B, K) -> how many
    times as often as in all captions a word is there (M, K), and its share there less its share in all."""
    among, overall = carried.t() @ present / carried.sum(0).clamp(min=1)[:, None], present.mean(0)
    return among / overall.clamp(min=1 / len(present)), among - overall


@torch.no_grad()
def look_up_cells(tokenizer, loader, machine):
    """-> some cells of each code, {code: [uint8 (32, 32, 3)]}, two a batch, to be of many clips; how many
    cells each code has (M,); the codes of each clip (B, M), and the words of its caption (B, K)."""
    c, cells = tokenizer.config, {}
    counts, carried, present = torch.zeros(c.codes), [], []
    for batch, _ in prefetch(loader, machine.device):
        ids = tokenizer.tokenize(scale(batch["frames"])).cpu()
        counts += torch.bincount(ids.flatten(), minlength=c.codes)
        carried.append(torch.zeros(len(ids), c.codes).scatter_(1, ids.flatten(1), 1.0))
        present.append(words_present(batch["ids"], batch["mask"], c.words).cpu())
        patches = batch["frames"].cpu().unfold(3, 32, 32).unfold(4, 32, 32)         # (B, T, 3, g, g, 32, 32)
        patches = patches.permute(0, 1, 3, 4, 5, 6, 2).flatten(0, 3)
        for code in ids.unique().tolist():
            cells.setdefault(code, []).extend(patches[ids.flatten() == code][:2].numpy())
    return cells, counts, torch.cat(carried), torch.cat(present)


def draw_codebook(tokenizer, loader, wordpiece, folder, machine, tiles=24, crops=8):
    """codebook.png: cells that carry each of the most used codes, and the words it predicts most strongly;
    circle.png, where codes are two numbers: all codes in use, where they lie.

    A tokenizer of pixels predicts no words: those below its cells are the ones that the captions of its clips
    have oftener than others. A semantic one has these above the cells, so that the two can be compared.
    """
    tokenizer.eval()
    cells, counts, carried, present = look_up_cells(tokenizer, loader, machine)
    beside = words_beside(carried, present)
    predicted = words_predicted(tokenizer) if tokenizer.config.tokenizer_target == "words" else None
    used = counts.argsort(descending=True)[:int((counts > 0).sum())].tolist()

    def strongest(code, values, lifts):
        words = lifts[code].topk(4).indices
        return [(wordpiece.vocab[len(SPECIAL) + k], float(values[code, k])) for k in words]

    entries = []
    for code in used[:tiles]:
        label, words = f"code {code} · {counts[code] / counts.sum():.1%} of cells", strongest(code, *beside)
        if predicted:
            label += " · in captions: " + ", ".join(f"{word} {times:.1f}x" for word, times in words)
            words = strongest(code, *predicted)
        entries.append((label, np.stack(cells[code][:crops]), words))
    shown = "words predicted" if predicted else "words of their clips' captions, times as often as in all"
    pictures.codebook(entries, folder / "codebook.png", f"What the most used codes stand for: {shown}")
    if tokenizer.config.code_dim == 2:
        points = tokenizer.quantizer.codebook.detach().cpu().numpy()
        pictures.circle([(points[code], cells[code][0], strongest(code, *(predicted or beside))[0][0])
                         for code in used], folder / "circle.png", "Codes of two numbers, where they lie")


def main():
    args = parse()
    train(args, set_up(args.device, args.precision))


if __name__ == "__main__":
    run_script(main, DataError)
