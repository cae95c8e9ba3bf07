"""Stage 0: the video encoder learns to name what pictures show, before it sees a caption.

    python train_encoder.py                             the toy preset on the synthetic set, on what there is

The paper's encoders do not begin from nothing either: its tokenizer's is CLIP's, and EdgeNeXt was published
with ImageNet's weights, which `pretrain.py --init-video FILE` loads. No one published weights of the toy
preset's size, so the synthetic set's own pictures stand for ImageNet: stills of training clips that hold one
thing, tagged with its colour, shape and size and the background. Motion is not among the tags, nor are clips
of two things, val or test. `pretrain.py` runs this by itself; `--init-video none` there does without.

Leaves in --out: last.pt (go on with --resume), best.pt (lowest val loss), metrics.jsonl, curves.png.
"""
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from evilm import (InputError, PictureTags, Run, common_flags, configure, load, make_optimizer, prefetch,
                   run_script, same_set, set_up)
from toy_data import DataError, Manifest, pictures, tags
from train_tokenizer import (batches_left, between_evaluations, clips_of, evaluation_loader, first_frames,
                             make_loader, open_clips, scale)

STILLS = 2          # of a clip, in one step


def parse(argv=None):
    parser = common_flags(__doc__, stage="encoder_")
    parser.add_argument("--out", default="runs/encoder", metavar="DIR", help="the run's folder (default: "
                        "runs/encoder)")
    return parser.parse_args(argv)


def tagged(manifest):
    """The rows of a manifest that say what a still shows, as a Manifest."""
    chosen = [i for i, row in enumerate(manifest) if tags(row)]
    rows = np.arange(len(manifest)) if manifest.rows is None else manifest.rows
    return Manifest(manifest.path, manifest.fields, rows[chosen])


class TagBatch:
    """Makes a batch of samples: frames (B, T, 3, H, W) uint8, and tags (B, kinds), the number of each."""
    mismatched = False

    def __init__(self, manifest):
        rows = [tags(row) for row in manifest]
        self.names = {kind: sorted({row[kind] for row in rows}) for kind in rows[0]}

    def __call__(self, samples):
        rows = [tags(s["row"]) for s in samples]
        # A tag that training does not have is no class: -1.
        numbers = [[names.index(row[kind]) if row[kind] in names else -1
                    for kind, names in self.names.items()] for row in rows]
        return {"frames": torch.stack([s["frames"] for s in samples]), "tags": torch.tensor(numbers),
                "broken": [line for s in samples for line in s["broken"]]}


def tag_loss(logits, targets):
    """Cross-entropy, averaged over clips, summed over kinds: logits (B, n) of each, targets (B, kinds), -1
    for a tag that no training clip has; those add nothing."""
    return sum(F.cross_entropy(one.float(), target, ignore_index=-1, reduction="sum") / len(target)
               for one, target in zip(logits, targets.t()))


@torch.no_grad()
def evaluate(model, loader, names, machine):
    """On held-out stills: the loss, and how many tags of each kind are right, a share."""
    model.eval()
    sums = torch.zeros(2 + len(names), dtype=torch.float64)
    for batch, _ in prefetch(loader, machine.device):
        with machine.autocast():
            logits = model(scale(batch["frames"]))
        right = [int((one.argmax(1) == target).sum()) for one, target in zip(logits, batch["tags"].t())]
        n = len(batch["tags"])
        sums += torch.tensor([n, n * float(tag_loss(logits, batch["tags"])), *right], dtype=torch.float64)
    model.train()
    count, *sums = machine.total(sums).tolist()
    return dict(zip(("tag_loss", *names), (value / count for value in sums)))


def train(args, machine):
    """Trains an encoder as the flags say, from nothing or from where it was."""
    config = configure(args, stage="encoder_")
    splits = {split: tagged(manifest) for split, manifest in open_clips(args, machine).items()}
    for split, manifest in splits.items():
        if not len(manifest):
            raise InputError(f"--data {args.data}: no line of its {split} split says what is to be seen, "
                             '"shows": [["red", "circle", "large", "left"], ["background", "sand"]]')
    collate = TagBatch(splits["train"])
    torch.manual_seed(args.seed)
    model = PictureTags(config, [len(names) for names in collate.names.values()]).to(machine.device)
    if not args.resume:
        model.video_encoder.start(first_frames(splits["train"], collate, config, args, machine, 64))
    optimizer = make_optimizer(model, args.lr, config.weight_decay, machine.device)
    run = Run(args, "encoder", config, collate.names, (), machine)
    run.start(model, optimizer, args.resume)

    clips = clips_of(splits["train"], replace(config, frames=STILLS), args, train=True, mismatched=False)
    batches = batches_left(clips, run, args, machine)
    look = between_evaluations(run.steps)
    held_out = evaluation_loader(splits["val"], collate, config, args, machine)
    wrapped = machine.wrap(model, args.compile)
    machine.say(f"pictures: stills of {len(clips):,} clips, {run.steps:,} steps of {batches.batch_size}, "
                f"{machine}")
    for batch in run.steps_of(make_loader(clips, batches, collate, args, machine)):
        run.set_learning_rate(args.lr, config.warmup)
        run.optimise(learn(wrapped, batch, batches.batch_size, args, machine))
        if run.step % look == 0 or run.step == run.steps:
            scores = evaluate(model, held_out, collate.names, machine)
            run.log(split="val", **scores)
            run.save_best(-scores["tag_loss"])
            machine.say(f"step {run.step:,}, val: {report(scores)}")
            run.save_last()
    run.end_of_steps()
    if machine.main:
        finish(model, run, splits, config, collate, args, machine.alone())


def learn(model, batch, batch_size, args, machine):
    """The gradients of a batch, in parts (--accumulate) -> this process's share of the loss, (1,)."""
    losses = torch.zeros(1, device=machine.device)
    for part, sync in machine.parts(model, batch, args.accumulate):
        with sync, machine.autocast():
            share = len(part["tags"]) / batch_size * machine.world      # of this part in the batch's mean
            loss = share * tag_loss(model(scale(part["frames"])), part["tags"])
        loss.backward()
        losses += loss.detach() / machine.world
    return losses


def finish(model, run, splits, config, collate, args, machine):
    """Scores best.pt on the test split, draws the curves, says what was learned."""
    model.load_state_dict(load(run.folder / "best.pt", "encoder")["model"])
    loader = evaluation_loader(splits["test"], collate, config, args, machine)
    scores = evaluate(model, loader, collate.names, machine)
    run.log(split="test", **scores)
    metrics = [line for line in run.metrics() if line["split"] == "val"]
    series = {name: [(line["step"], line[name]) for line in metrics] for name in scores}
    panels = [("tags found, val", {kind: series[kind] for kind in collate.names}, {}, True),
              ("loss, val", {"loss": series["tag_loss"]}, {}, False)]
    pictures.curves(panels, run.folder / "curves.png", "Pictures, in ImageNet's place")
    print(f"test: {report(scores)}")
    run.say_end(f"python pretrain.py{same_set(args)} --init-video {run.folder}")


def report(scores):
    return ", ".join(f"{kind} {share:.1%}" for kind, share in scores.items() if kind != "tag_loss")


def main():
    args = parse()
    train(args, set_up(args.device, args.precision))


if __name__ == "__main__":
    run_script(main, DataError)
