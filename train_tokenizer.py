"""Stage 1: the semantic vector-quantized video tokenizer (3.3). Learns to name a clip's caption words from its codes.

    python train_tokenizer.py                                   the toy preset on the synthetic set, on what there is
    python train_tokenizer.py --data my_clips --preset paper --device cuda
    torchrun --nproc-per-node=2 train_tokenizer.py              over processes; several nodes: torchrun's own flags

Leaves in --out: last.pt (go on with --resume), best.pt (lowest val loss), metrics.jsonl, curves.png, codebook.png.
"""
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import toy_data
from evilm import (SPECIAL, InputError, NotFinite, Run, SemanticTokenizer, WordPiece, common_flags, configure,
                   focal_loss, learning_rate, make_optimizer, prefetch, run_script, set_up, words_present)
from toy_data import Batches, ClipCaptions, DataError, pictures

SYNTHETIC = "data/toy"          # rendered on first use; a folder that the user names is never made up
MOST_EVALUATED = 1000           # clips of a split that one evaluation looks at


def parse():
    parser = common_flags(__doc__.split("\n")[0], stage="tokenizer_")
    parser.add_argument("--loss", default="focal", choices=["focal", "bce"], help="of the words, Eq. (6) or plain "
                        "binary cross-entropy, which Table 6 compares (default: focal)")
    parser.add_argument("--word-weight", type=float, default=1.0, help="factor on L_TOKEN in Eq. (7) (default: 1, the "
                        "paper's)")
    parser.add_argument("--revive-after", type=int, default=20, metavar="STEPS", help="move a code that no cell chose "
                        "for so many steps to an encoder output; 0: never, as in the paper (default: 20)")
    parser.add_argument("--out", default="runs/tokenizer", metavar="DIR", help="the run's folder (default: "
                        "runs/tokenizer)")
    return parser.parse_args()


# ------------------------------------------------------------------------------------ clips, captions and vocabulary


def open_clips(args, machine):
    """The manifests {"train", "val", "test"} of --data; the synthetic set is rendered on first use."""
    if args.data == SYNTHETIC:
        machine.first(lambda: toy_data.render(SYNTHETIC))
    machine.first(lambda: toy_data.open_splits(args.data))      # writes the index that the others then map
    splits, notes = toy_data.open_splits(args.data)
    for note in notes:
        machine.say(note)
    return splits


def make_vocabulary(args, config, captions, machine):
    """WordPiece for these captions, and the Config with the number of words in use."""
    if args.vocab:
        try:
            whole = WordPiece(Path(args.vocab).read_text(encoding="utf-8").split("\n"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--vocab {args.vocab}: cannot be read ({error})") from None
        wordpiece = whole.keep_frequent(captions, min(1.0, config.vocab_rows / len(whole)))
    else:
        wordpiece = WordPiece.from_captions(captions, config.vocab_rows)
    machine.say(f"vocabulary: {len(wordpiece):,} words, {len(SPECIAL)} of them special tokens")
    return wordpiece, replace(config, words=len(wordpiece))


def pad(rows, width):
    """Lists of ids -> ids (B, width), mask (B, width)."""
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for row, words in zip(ids, rows):
        row[:len(words)] = torch.as_tensor(words)
    return ids, ids != 0            # [PAD] is 0


class TokenizerBatch:
    """Makes a batch of samples: frames (B, T, 3, H, W) uint8 and the words of their captions, ids and mask (B, L)."""

    def __init__(self, wordpiece, config):
        self.wordpiece, self.config = wordpiece, config

    def __call__(self, samples):
        ids, mask = pad([self.wordpiece.encode(s["caption"], self.config.max_words) for s in samples],
                        self.config.max_words)
        return {"frames": torch.stack([s["frames"] for s in samples]), "ids": ids, "mask": mask,
                "broken": [line for s in samples for line in s["broken"]]}


def make_loader(clips, batches, collate, args, machine):
    return DataLoader(clips, batch_sampler=batches, collate_fn=collate, num_workers=args.workers,
                      pin_memory=machine.device.type == "cuda", prefetch_factor=4 if args.workers else None)


def evaluation_loader(manifest, collate, config, args, machine, batch_size=50):
    """A split's first clips in order, once, with the middle frames: the same samples every time."""
    clips = ClipCaptions(manifest, config.frames, config.size, args.seed, train=False, strict=args.strict,
                         mismatched=collate.mismatched if hasattr(collate, "mismatched") else False)
    keys = [(0, i) for i in range(min(len(clips), MOST_EVALUATED))][machine.rank::machine.world]
    return make_loader(clips, [keys[i:i + batch_size] for i in range(0, len(keys), batch_size)], collate, args, machine)


def scale(frames):
    """uint8 frames, as they travel, -> [0, 1]."""
    return frames.float() / 255


# ------------------------------------------------------------------------------------------------------------- losses


def word_loss(name, logits, targets):
    return focal_loss(logits, targets) if name == "focal" else F.binary_cross_entropy_with_logits(logits, targets)


@torch.no_grad()
def evaluate(tokenizer, loader, args, machine):
    """On held-out clips: the loss, recall of the captions' words, and how much of the codebook is in use."""
    tokenizer.eval()
    c = tokenizer.config
    counts, sums = torch.zeros(c.codes), torch.zeros(5, dtype=torch.float64)
    for batch, _ in prefetch(loader, machine.device):
        with machine.autocast():
            logits, ids, code_loss = tokenizer(scale(batch["frames"]))
        logits, targets = logits.float(), words_present(batch["ids"], batch["mask"], c.words)
        n = len(logits)
        # Of a caption's k words, how many are among the k that score highest?
        ranks = logits.argsort(1, descending=True).argsort(1)
        found = ((ranks < targets.sum(1, keepdim=True)) & (targets > 0)).sum()
        sums += torch.tensor([n * float(word_loss(args.loss, logits, targets)), n * float(code_loss), n, float(found),
                              float(targets.sum())], dtype=torch.float64)
        counts += torch.bincount(ids.flatten().cpu(), minlength=c.codes)
    sums, counts = machine.total(sums), machine.total(counts)
    share = counts[counts > 0] / counts.sum()
    tokenizer.train()
    return {"word_loss": float(sums[0] / sums[2]), "code_loss": float(sums[1] / sums[2]),
            "word_recall": float(sums[3] / sums[4]), "codebook_usage": len(share) / c.codes,
            "codebook_perplexity": float(torch.exp(-(share * share.log()).sum()))}


def gradients_at_encoder(tokenizer, batch, args):
    """Norms of the gradients that L_TOKEN and the code terms of Eq. (7) each send to E(X)."""
    embedded = tokenizer.embed(scale(batch["frames"])).detach().requires_grad_()
    quantized, _, code_loss = tokenizer.quantizer(embedded)
    words = words_present(batch["ids"], batch["mask"], tokenizer.config.words)
    loss = args.word_weight * word_loss(args.loss, tokenizer.read_words(quantized), words)
    return {name: float(torch.autograd.grad(term, embedded, retain_graph=True)[0].norm())
            for name, term in (("word_gradient", loss), ("code_gradient", code_loss))}


# ----------------------------------------------------------------------------------------------------------- training


def train(args, machine):
    """Trains a tokenizer as the flags say and returns its best checkpoint's path."""
    config = configure(args, stage="tokenizer_")
    splits = open_clips(args, machine)
    wordpiece, config = make_vocabulary(args, config, [row["caption"] for row in splits["train"]], machine)
    clips = ClipCaptions(splits["train"], config.frames, config.size, args.seed, train=True, strict=args.strict,
                         augment=config.augment, mismatched=False)
    torch.manual_seed(args.seed)
    tokenizer = SemanticTokenizer(config).to(machine.device)
    optimizer = make_optimizer(tokenizer, args.lr, config.weight_decay, machine.device)
    settings = {name: getattr(args, name) for name in ("epochs", "max_steps", "batch_size", "lr", "seed", "loss",
                                                       "word_weight", "revive_after")}
    run = Run(args.out, "tokenizer", config, wordpiece.vocab, settings, machine)
    run.start(tokenizer, optimizer, args.resume)

    epoch_steps = Batches(len(clips), args.batch_size, args.seed, 0).steps_per_epoch
    steps = min(args.epochs * epoch_steps, args.max_steps or math.inf)
    batches = Batches(len(clips), args.batch_size, args.seed, steps, run.step, machine.rank, machine.world)
    collate = TokenizerBatch(wordpiece, config)
    loader = make_loader(clips, batches, collate, args, machine)
    held_out = evaluation_loader(splits["val"], collate, config, args, machine)
    model = torch.compile(tokenizer) if args.compile else tokenizer
    if machine.world > 1:
        model = DistributedDataParallel(model)

    machine.say(f"tokenizer: {len(clips):,} clips, {steps:,} steps of {args.batch_size} on {machine.device}")
    used = torch.zeros(config.codes, device=machine.device)
    broken, bar = set(), tqdm(total=steps, initial=run.step, unit="step", disable=not machine.main)
    for batch, _ in prefetch(loader, machine.device):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.step, steps, args.lr, config.warmup)
        with machine.autocast():
            logits, ids, code_loss = model(scale(batch["frames"]))
        words = words_present(batch["ids"], batch["mask"], config.words)
        loss = args.word_weight * word_loss(args.loss, logits.float(), words) + code_loss      # Eq. (7)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        run.step += 1
        used += torch.bincount(ids.flatten(), minlength=config.codes)
        if args.revive_after and run.step % args.revive_after == 0 and run.step < 0.8 * steps:
            generator = torch.Generator().manual_seed(args.seed + run.step)
            tokenizer.quantizer.revive(used > 0, tokenizer.embed(scale(batch["frames"])).flatten(0, 3), generator)
            used.zero_()
        bar.update()
        if run.step % epoch_steps == 0 or run.step == steps:
            scores = evaluate(tokenizer, held_out, args, machine)
            run.log(split="val", **scores, **gradients_at_encoder(tokenizer, batch, args))
            print(scores)
    bar.close()
    run.save_last(tokenizer, optimizer)
    run.save_best(tokenizer, 1)


def main():
    args = parse()
    train(args, set_up(args.device, args.precision))


if __name__ == "__main__":
    run_script(main, DataError)
