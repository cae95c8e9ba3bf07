"""Section 4: every downstream task, from a pre-trained E-ViLM.

    python finetune.py qa                               open-ended video question answering
    python finetune.py mc --set caption                 multiple choice: caption, action, transition, your own
    python finetune.py retrieval                        text-to-video, fast (4.4) or --scoring joint
    python finetune.py probe                            activity recognition by a linear probe
    python finetune.py search "a red circle moves left" --videos DIR
    python finetune.py ask CLIP "what colour is the circle?"

A task trains on its files in --data; the epoch that is best on val is scored on test. It leaves in --out
(runs/qa, runs/mc-caption and so on): last.pt (go on with --resume), best.pt, metrics.jsonl, curves.png, a
picture of predictions.
"""
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from evilm import (ROUNDING, Choice, Config, EViLM, FastRetrieval, InputError, LinearProbe, Parser, Run,
                   WordPiece, accuracies, at_least, changed_and_unseen, configure, contrastive_loss,
                   encode_captions, encode_clips, fill, freeze, load, make_optimizer, make_vocabulary, pad,
                   rank_of_truth, read_metrics, recalls, run_script, score_retrieval, set_up, shared_flags,
                   start_centred, vtm_loss, vtm_targets)
from toy_data import (Batches, BrokenClip, ClipCaptions, DataError, collate, find_clips, make_loader,
                      open_split, open_splits, plots, printable, read_clip, render_if_missing, spans)

# (epochs, peak learning rate, batch size) of each task; --config and the flags change them. The paper gives
# retrieval's alone (4.4); for the rest it has "task-specific learning rates/epochs" (4.1).
SETTINGS = {"qa": {"toy": (1, 1e-3, 32), "paper": (10, 5e-5, 64)},
            "mc": {"toy": (4, 1e-3, 16), "paper": (20, 5e-5, 32)},
            "retrieval": {"toy": (2, 1e-3, 64), "paper": (200, 3e-4, 128)},
            "probe": {"toy": (30, 1e-3, 128), "paper": (100, 1e-3, 1024)}}
# The toy preset's for the synthetic multiple-choice sets. Motion needs more of the sines of time and place.
SYNTHETIC_SETS = {"caption": {"epochs": 1}, "action": {"video_positions": 3.0},
                  "transition": {"video_positions": 10.0}}


def parse(argv=None):
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    add = {name: commands.add_parser(name, help=task.title).add_argument for name, task in TASKS.items()}
    for name in TASKS:
        shared_flags(commands.choices[name], out=f"runs/{name}, with a suffix for --set, --zero-shot ...")
        commands.choices[name].set_defaults(out=None, set="", see="", scoring="", zero_shot=False)
        add[name]("--init", default="runs/pretrain", metavar="PATH|none", help="run of pretrain.py or of "
                  "retrieval --scoring joint; none: from scratch (default: runs/pretrain)")
    for name in ("qa", "mc"):
        add[name]("--see", default="both", choices=["both", "text"], help="text: a baseline that is trained "
                  "without the video (default: both)")
    for name in ("mc", "retrieval"):
        add[name]("--zero-shot", action="store_true", help="score --init without training")
    add["mc"]("--set", default="caption", metavar="NAME", help="of the files mc_NAME_train.jsonl and so on: "
              "caption, action, transition, or your own (default: caption)")
    add["retrieval"]("--scoring", choices=["fast", "joint"], help="cosine of two vectors (4.4), or the 2-way "
                     "head on every pair (default: fast, with --zero-shot joint)")
    for name, task, what in (("search", "retrieval", "rank a folder's clips for a sentence"),
                             ("ask", "qa", "the likeliest answers to a question about a clip")):
        add[name] = commands.add_parser(name, help=what).add_argument
        commands.choices[name].set_defaults(out="", workers=0, precision="auto")
        add[name]("--init", default=f"runs/{task}", metavar="PATH", help=f"default: runs/{task}")
        add[name]("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="default: auto")
        add[name]("--top", type=at_least(1), default=5, help="number of results (default: 5)")
    add["search"]("sentence")
    add["search"]("--videos", required=True, metavar="DIR", help="folder of clips, searched recursively")
    add["search"]("--out", default="search.png", metavar="FILE", help="default: search.png")
    add["ask"]("video")
    add["ask"]("question")
    args = parser.parse_args(argv)
    if args.task in TASKS and args.zero_shot and args.resume:
        raise InputError("--resume: --zero-shot does not train, so there is nothing to resume")
    if args.task == "retrieval" and not args.scoring:
        args.scoring = "joint" if args.zero_shot else "fast"
    if args.out is None:
        parts = [args.task, args.set, "zero-shot" if args.zero_shot else "",
                 *{args.see, args.scoring} & {"text", "joint"}]
        args.out = "runs/" + "-".join(filter(None, parts))
    return args


def train(args):
    """Fine-tunes as the flags say, from --init or with --resume; then scores best.pt on the test split."""
    machine = set_up(args)
    hint = "; python pretrain.py makes one"
    checkpoint = None if args.init == "none" else load(args.init, "pretrain", "retrieval", hint=hint)
    if machine.rank == 0:
        render_if_missing(args.data)
    machine.barrier()
    files = f"mc_{args.set}" if args.task == "mc" else TASKS[args.task].files
    if args.zero_shot:
        splits = {"test": open_split(args.data, "test", files, machine.print)}
    else:
        splits = open_splits(args.data, files, machine.print)
    base, wordpiece = begin(args, checkpoint, splits, machine)
    config = base.config
    task = TASKS[args.task](args, splits, wordpiece, config, machine)
    if args.init == "none":
        frames = task.samples(splits["train"], train=False).first(50).to(machine.device) / 255
        start_centred(base.video_encoder, base.normalise(frames).flatten(0, 1))
    torch.manual_seed(args.seed)
    model = task.head(base).to(machine.device)
    optimizer = make_optimizer(model, config.lr, config.weight_decay, machine.device)
    run = Run(args, args.task, config, wordpiece.vocab, machine, model, optimizer,
              decide=("max_steps", "init", "set", "see", "scoring"), answers=list(task.answers))
    if args.zero_shot:
        if machine.rank == 0:
            finish(task, model, run, args, machine)
        return machine.barrier()
    clips = task.clips(model, machine, run)
    steps = min(args.max_steps or math.inf, config.epochs * max(1, len(clips) // config.batch_size))
    batches = Batches(len(clips), config.batch_size, args.seed, steps, run.step, machine.rank,
                      machine.world_size, args.accumulate)
    loader = make_loader(clips, batches, task.collate, args.workers)
    wrapped = machine.wrap(model, args.compile)
    machine.print(f"{task.title}: {len(clips):,} samples, {steps:,} steps of {batches.batch_size}, {machine}")
    for batch in run.batches(loader, steps, config.lr, config.warmup):
        model.train()
        total = torch.zeros((), device=machine.device)
        for part in machine.parts(wrapped, batch, args.accumulate):
            with machine.autocast():
                loss = task.loss(wrapped, part, machine) / args.accumulate  # processes average gradients
            loss.backward()
            total += loss.detach() / machine.world_size
        run.optimise(total)
        if run.step % batches.steps_per_epoch == 0 or run.step == steps:
            loss = run.check_finite()
            if machine.rank == 0:
                model.eval()
                scores = task.evaluate(model, "val", machine, run)
                run.evaluated(scores[task.score], **scores, loss=loss)
                machine.print(f"step {run.step:,}, val: {task.score} {scores[task.score]:.1%}")
            machine.barrier()
            run.save_last()
    run.report_speed()
    if machine.rank == 0:
        fill(model, load(run.folder / "best.pt", args.task))
        finish(task, model, run, args, machine)
    machine.barrier()


def begin(args, checkpoint, splits, machine):
    """The pre-trained model of a checkpoint, or one from scratch, and its WordPiece. Words that a task adds
    ("what", "colour") take rows of the embedding that no word used."""
    texts = texts_of(splits["train"]) if "train" in splits else []
    if checkpoint is None:
        if args.zero_shot:
            raise InputError("--zero-shot scores a pre-trained model: name one with --init")
        config = with_settings(getattr(Config, args.preset)(), args)
        wordpiece, config = make_vocabulary(args, config, texts, machine)
        torch.manual_seed(args.seed)
        return EViLM(config).to(machine.device), wordpiece
    if args.vocab or args.vocab_captions:
        raise InputError(f"--vocab and --vocab-captions are for --init none: {args.init} has its vocabulary")
    if checkpoint.get("settings", {}).get("scoring") == "fast":
        raise InputError(f"--init {args.init} was trained for fast retrieval; start from a run of "
                         "pretrain.py or of retrieval --scoring joint")
    if checkpoint["config"].preset != args.preset:
        raise InputError(f"--init {args.init} was trained with --preset {checkpoint['config'].preset}")
    config = with_settings(checkpoint["config"], args)
    wordpiece = WordPiece(checkpoint["vocab"]).add_words(texts, config.vocab_rows)
    if args.zero_shot or len(wordpiece) == config.vocab_rows:
        name_unknown(wordpiece, texts_of(splits["test"]), machine)
    model = EViLM(replace(config, vocab_size=len(wordpiece)))
    fill(model, checkpoint)
    return model.to(machine.device), wordpiece


def texts_of(manifest):
    """All texts of a manifest that a model reads, or a probe names: questions, options, captions, labels."""
    for row in manifest:
        for field in manifest.fields:
            if field not in ("video", "answer"):
                yield from row[field] if field == "options" else [row[field]]


def with_settings(config, args):
    """The Config with the task's SETTINGS, changed by --config and by the flags that are given."""
    names = "epochs", "lr", "batch_size"
    settings = dict(zip(names, SETTINGS[args.task][args.preset]))
    synthetic = args.preset == "toy" and Path(args.data, "set.json").exists()
    if args.task == "mc" and synthetic and not args.zero_shot:
        settings |= SYNTHETIC_SETS.get(args.set, {})
    return configure(replace(config, **settings), args, **{name: name for name in names})


def name_unknown(wordpiece, texts, machine):
    """Names the words that the vocabulary cannot spell."""
    unknown = list(wordpiece.unknown(texts))
    if unknown:
        machine.print(f"unknown words, read as [UNK]: {len(unknown):,}, such as {', '.join(unknown[:10])}")


def finish(task, model, run, args, machine):
    """Final evaluation on the test split; pictures; what was learned, beside chance or a baseline."""
    model.eval()
    scores = task.evaluate(model, "test", machine, run)
    if args.zero_shot:
        run.open_folder()
    scores |= task.baselines
    run.log("test", **scores)
    if not args.zero_shot:
        val = [line for line in read_metrics(run.folder) if line["split"] == "val"]
        score, loss = ([(line["step"], line[name]) for line in val] for name in (task.score, "loss"))
        plots.curves([(f"{task.score}, val", {task.score: score}, task.baselines, True),
                      ("loss, training", {"loss": loss}, {}, False)], run.folder / "curves.png", task.title)
    task.draw(run.folder)
    print(f"{task.title}, test{', zero-shot' if args.zero_shot else ''}")
    for name, value in scores.items():
        whole = isinstance(value, int) or name == "median_rank"
        print(f"  {printable(name):<30}" + (f"{value:6g}" if whole else f"{value:6.1%}"))
    print(f"look at {', '.join(sorted(path.name for path in run.folder.glob('*.png')))} in {run.folder}; "
          f"broken clips: {len(run.broken)}")
    if args.init != "none" and not args.zero_shot:
        print("next: the same command with --init none and another --out shows what pre-training is worth")


class Task:
    """What `train` asks of a task. To add your own, write a class like those below; add it to TASKS, near the
    end of this file, and to SETTINGS, and an example line of its files to `toy_data.clips.EXAMPLES`.

    `title` is its name, `files` the prefix of its files, "qa" for qa_train.jsonl, `score` the score on val
    that selects best.pt, `answers` what the head's outputs stand for, `baselines` {name: score} of chance.
    prepare     refuses what the task cannot use, and sets answers and baselines
    head        puts the module that is trained around an EViLM
    clips       gives the training samples, dataset[(epoch, index)]
    collate     makes a batch of them: tensors, `frames` among them, and `broken`, one line per broken clip;
                DataLoader workers get a copy of the task for it, so a task holds neither a model nor a run
    loss        is the mean over a part of a batch
    evaluate    gives {name: score} of a split, integers being counts
    draw        makes a picture of what the last evaluation found, if the task has one
    """
    score, answers, baselines = "top1", (), {}

    def __init__(self, args, splits, wordpiece, config, machine):
        self.args, self.splits, self.wordpiece, self.config = args, splits, wordpiece, config
        self.prepare(machine)

    def require_known(self, what, is_known):
        """Refuses a val or test split of which training knows no row's answer or label."""
        for manifest in (self.splits["val"], self.splits["test"]):
            if not any(map(is_known, manifest)):
                raise DataError(f"{manifest.path}: none of its {what} is in {self.splits['train'].path}")

    def samples(self, manifest, train, mismatched=False):
        c = self.config
        return ClipCaptions(manifest, c.frames, c.size, self.args.seed, train, c.augment, mismatched,
                            c.negatives)

    def loader(self, manifest, collate):
        clips = self.samples(manifest, train=False)
        return make_loader(clips, collate=collate, workers=self.args.workers)

    def clips(self, model, machine, run):
        return self.samples(self.splits["train"], train=True)

    def draw(self, folder):
        pass


def is_right(logits, targets):
    """Where the target alone has the largest logit, -1 being no target: (B, n), (B,) -> bool (B,)."""
    return (rank_of_truth(logits, targets.clamp(min=0), ROUNDING) == 1) & (targets >= 0)


class Choices(Task):
    """What question answering and multiple choice share: a video with O texts, and logits of which one is
    right. A text is a question, or a question and an option. `kinds(row)` lists the row's sub-scores."""

    def target(self, row):
        """The index of the right logit; -1 for an answer that the training split lacks."""
        return self.number.get(str(row["answer"]), -1) if self.answers else row["answer"]

    def collate(self, samples):
        """-> frames, ids and mask (B, O, L), targets (B,); index and whole (B,) for `evaluate`."""
        batch = collate(samples)
        ids, mask = pad([encode_question(self.wordpiece, row["question"], option, self.config.max_words)
                         for row in batch["rows"] for option in ([""] if self.answers else row["options"])])
        shape = len(samples), -1, ids.shape[1]
        return {"frames": batch["frames"], "ids": ids.view(shape), "mask": mask.view(shape),
                "targets": torch.tensor([self.target(row) for row in batch["rows"]]),
                "index": torch.tensor([sample["index"] for sample in samples]),
                "whole": batch["whole"], "broken": batch["broken"]}

    def head(self, model):
        """One output per answer. Multiple choice has a single output, which starts as the difference of the
        2-way head's logits; --zero-shot scores that."""
        if self.args.see == "text":
            freeze(model, "video_encoder", "video_proj")
        return Choice(model, len(self.answers) or 1)

    def logits(self, model, batch):
        frames = batch["frames"].float() / 255 if self.args.see == "both" else None
        return model(frames, batch["ids"], batch["mask"])

    def loss(self, model, batch, machine):
        return F.cross_entropy(self.logits(model, batch), batch["targets"])

    @torch.no_grad()
    def evaluate(self, model, split, machine, run):
        manifest, self.predictions = self.splits[split], []         # (row, index of largest logit, right)
        for batch in self.loader(manifest, self.collate):
            run.name_broken(batch.pop("broken"), "left out")
            batch = {name: value.to(machine.device) for name, value in batch.items()}
            with machine.autocast():
                logits = self.logits(model, batch)
            found = logits.argmax(1), is_right(logits, batch["targets"]), batch["index"]
            self.predictions += [(manifest[i], chosen, right) for chosen, right, i in
                                 zip(*(values[batch["whole"]].tolist() for values in found))]
        rows, _, right = zip(*self.predictions)
        return accuracies("top1", right, map(self.kinds, rows)) | {"questions": len(rows)}

    def draw(self, folder):
        """answers.png: clips from all over the split, with question, prediction and answer."""
        entries = []
        for row, chosen, right in self.predictions[::math.ceil(len(self.predictions) / 12)]:
            names = self.answers or row["options"]
            text = f"{row['question']} {'right' if right else 'wrong'}: {names[chosen]}"
            if not right:
                text += f", not {row['answer'] if self.answers else names[row['answer']]}"
            entries.append((read_frames(self.splits["test"].video_path(row), self.config), text))
        plots.contact_sheet(entries, folder / "answers.png", f"{self.title}: predictions on test")


def encode_question(wordpiece, question, option, max_words):
    """[CLS] question option [SEP], at most `max_words` ids; where it is too long the question is cut."""
    end = wordpiece.encode(option, max_words)[1:]
    return wordpiece.encode(question, max_words - len(end) + 1)[:-1] + end


class Questions(Choices):
    """Open-ended QA over the training split's answers; any other answer to a question counts as wrong."""
    title, files = "Open-ended question answering", "qa"

    def prepare(self, machine):
        train, test = self.splits["train"], self.splits["test"]
        counts = Counter((self.kinds(row)[0], str(row["answer"])) for row in train).most_common()
        self.answers = list(dict.fromkeys(answer for (_, answer), _ in counts))
        self.number = {answer: i for i, answer in enumerate(self.answers)}
        self.require_known("answers", lambda row: self.target(row) >= 0)
        majority = dict(key for key, _ in reversed(counts))         # a kind's commonest is set last
        hits = [majority.get(self.kinds(row)[0]) == str(row["answer"]) for row in test]
        self.baselines = {"majority answer of each kind": sum(hits) / len(hits)}

    def kinds(self, row):
        """The row's own `kind`, else the question's first word, as MSRVTT-QA and MSVD-QA count."""
        return [str(row.get("kind") or row["question"].split()[0].lower())]


class Options(Choices):
    """Multiple choice: each option is read after the question, which may be empty."""
    title = "Multiple choice"

    def prepare(self, machine):
        test = self.splits["test"]
        self.title, options = f"{self.title}, {self.args.set}", len(test[0]["options"])
        self.baselines = {"chance": 1 / options}
        for manifest in self.splits.values():
            for i, row in enumerate(manifest):
                if len(row["options"]) != options:
                    raise DataError(f"{manifest.path}:{manifest.line(i)}: has {len(row['options'])} options, "
                                    f"where {test.path}:{test.line(0)} has {options}")

    def kinds(self, row):
        return changed_and_unseen(row)


class Retrieval(Task):
    """Text-to-video retrieval: every caption is a query, every video is ranked once, however many name it."""
    title, files, score = "Text-to-video retrieval", "", "r1"

    def prepare(self, machine):
        self.fast = self.args.scoring == "fast"
        self.title += f", {self.args.scoring}"
        self.baselines = {"chance of r1": 1 / len(self.splits["test"].each_video())}
        clips = len(self.splits["train"].each_video()) if "train" in self.splits else math.inf
        if self.fast and (self.args.accumulate > 1 or min(self.config.batch_size, clips) == 1):
            raise InputError("fast retrieval contrasts each clip with the whole batch: leave out "
                             "--accumulate, and use at least two clips and a --batch-size of at least 2")

    def head(self, model):
        return FastRetrieval(model) if self.fast else freeze(model, "mlm_head", "mvm_head")

    def clips(self, model, machine, run):
        return EachVideo(self.samples(self.splits["train"], train=True, mismatched=not self.fast))

    def collate(self, samples):
        """-> frames, names (B,) of the videos, as numbers, ids and mask (B, L) of the captions and, for joint
        scoring, of mismatched captions."""
        batch, B = collate(samples), len(samples)
        captions = [s["caption"] for s in samples] + [s["mismatched"] for s in samples if not self.fast]
        ids, mask = self.wordpiece.encode_batch(captions, self.config.max_words)
        texts = {"ids": ids[:B], "mask": mask[:B]}
        if not self.fast:
            texts |= {"mismatched_ids": ids[B:], "mismatched_mask": mask[B:]}
        return {"frames": batch["frames"], "names": torch.tensor([s["name"] for s in samples]), **texts,
                "broken": batch["broken"]}

    def loss(self, model, batch, machine):
        frames = batch["frames"].float() / 255
        if self.fast:
            video, text, scale = model(frames, batch["ids"], batch["mask"])
            video, text = from_all(video, machine), from_all(text, machine)
            return contrastive_loss(video, text, scale, machine.gather(batch["names"]))
        mismatched = batch["mismatched_ids"], batch["mismatched_mask"]
        logits, _, _ = model(frames, batch["ids"], batch["mask"], mismatched=mismatched)
        return vtm_loss(logits, vtm_targets(logits))

    def evaluate(self, model, split, machine, run):
        captions = self.splits[split]
        if not self.fast and split == "val":            # joint scoring is slow: 100 captions from all over
            captions = captions.subset(np.linspace(0, len(captions) - 1, min(100, len(captions))).astype(int))
        videos = self.loader(captions.each_video(), collate)
        self.ranking = score_retrieval(model, captions, videos, self.wordpiece, machine, run)
        rows, ranks, names, _ = self.ranking
        return recalls(ranks) | {"captions": len(rows), "clips": len(names)}

    def draw(self, folder):
        plots.retrieval(*self.ranking, self.splits["test"], self.config.size, folder / "retrieval.png",
                        f"{self.title}: test")


def from_all(vectors, machine):
    """The vectors of all processes. Gradient flows to this one's, times n since processes average theirs."""
    gathered, n = machine.gather(vectors.detach().clone()), machine.world_size
    gathered[machine.rank::n] += n * (vectors - vectors.detach())                           # adds zeros
    return gathered


class EachVideo(torch.utils.data.Dataset):
    """A training split by its videos: dataset[(epoch, index)] is a video with one of its captions, drawn from
    (seed, epoch, index): the paper's 200 epochs (4.4) as passes over videos. `name` is the video's number."""

    def __init__(self, clips):
        self.clips, videos = clips, torch.from_numpy(clips.manifest.videos)
        self.rows = videos.argsort(stable=True)                     # those of one video one after another
        self.ends = videos[self.rows].unique_consecutive(return_counts=True)[1].cumsum(0)

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, key):
        epoch, index = key
        first, end = int(self.ends[index - 1]) if index else 0, int(self.ends[index])
        drawn = np.random.default_rng([self.clips.seed, epoch, index, 2]).integers(first, end)
        sample = self.clips[epoch, int(self.rows[drawn])]
        return sample | {"name": int(self.clips.manifest.videos[sample["index"]])}


class Probe(Task):
    """Activity recognition by a linear probe: a classifier on features, which are computed once a clip."""
    title, files = "Activity recognition, linear probe", "action"

    def prepare(self, machine):
        samples = min(self.config.batch_size, len(self.splits["train"]))
        if machine.world_size * self.args.accumulate > 1 or samples == 1:
            raise InputError("probe: its BatchNorm needs the whole batch: use one process, no --accumulate, "
                             "at least two clips and a --batch-size of at least 2")
        counts = Counter(row["label"] for row in self.splits["train"])
        self.require_known("labels", lambda row: row["label"] in counts)
        self.answers = sorted(counts)
        majority = counts.most_common(1)[0][0]
        hits = [row["label"] == majority for row in self.splits["test"]]
        self.baselines = {"chance": 1 / len(counts), "majority label": sum(hits) / len(hits)}

    def head(self, model):
        return LinearProbe(model, len(self.answers))

    def clips(self, model, machine, run):
        number, self.features = {label: i for i, label in enumerate(self.answers)}, {}
        for split, manifest in self.splits.items():
            features, rows = encode_clips(model.features, self.loader(manifest, collate), machine, run)
            targets = torch.tensor([number.get(row["label"], -1) for row in rows])
            self.features[split] = features.float().cpu(), targets
        if len(self.features["train"][1]) == 1:
            raise InputError("probe: one training clip can be read; its norm needs two or more")
        self.args.workers = 0                           # what is left to read lies in memory
        return Features(*self.features["train"])

    def collate(self, samples):
        features, targets = zip(*samples)
        return {"frames": torch.stack(features), "targets": torch.stack(targets), "broken": []}

    def loss(self, model, batch, machine):
        return F.cross_entropy(model(batch["frames"]), batch["targets"])

    @torch.no_grad()
    def evaluate(self, model, split, machine, run):
        features, targets = self.features[split]
        logits = model(features.to(machine.device)).cpu()
        kinds = [[self.answers[target]] if target >= 0 else [] for target in targets.tolist()]
        return accuracies("top1", is_right(logits, targets).tolist(), kinds) | {"clips": len(targets)}


class Features(torch.utils.data.TensorDataset):
    """The probe's samples: dataset[(epoch, index)] -> features, target."""

    def __getitem__(self, key):
        return super().__getitem__(key[1])


TASKS = {"qa": Questions, "mc": Options, "retrieval": Retrieval, "probe": Probe}


@torch.no_grad()
def search(args):
    """Ranks a folder's clips for a sentence by fast retrieval."""
    clips, machine = find_clips(args.videos), set_up(args)
    checkpoint = load(args.init, "retrieval", hint="; python finetune.py retrieval makes one")
    if checkpoint.get("settings", {}).get("scoring") != "fast":
        raise InputError(f"--init {args.init} was trained for joint scoring; search needs --scoring fast")
    config, wordpiece = checkpoint["config"], WordPiece(checkpoint["vocab"])
    model = FastRetrieval(EViLM(config))
    fill(model, checkpoint)
    model.to(machine.device).eval()
    name_unknown(wordpiece, [args.sentence], machine)
    (query,), _ = encode_captions(model.embed_text, [args.sentence], wordpiece, config, machine)
    scores = {}
    for name, path in tqdm(clips.items(), "clips", unit="clip", leave=False):
        try:
            frames = torch.from_numpy(read_frames(path, config, config.size)).movedim(-1, 1)[None]
        except BrokenClip as error:
            tqdm.write(f"broken clip, left out: {error}")
            continue
        with machine.autocast():
            vector = model.embed_video(frames.to(machine.device) / 255)[0]
        scores[name] = float(vector @ query)
    if not scores:
        raise DataError(f"--videos {args.videos}: none of its clips can be read")
    best = sorted(scores, key=scores.get, reverse=True)[:args.top]
    print("\n".join(f"{scores[name]:6.3f}  {name}" for name in best))
    found = [(read_frames(clips[name], config), f"{scores[name]:.2f}  {name}") for name in best]
    plots.contact_sheet(found, args.out, args.sentence)
    print(f"look at {args.out}")


@torch.no_grad()
def ask(args):
    """Prints the likeliest answers to a question about a clip, with their probabilities."""
    machine = set_up(args)
    checkpoint = load(args.init, "qa", hint="; python finetune.py qa makes one")
    if checkpoint.get("settings", {}).get("see") == "text":
        raise InputError(f"--init {args.init} was trained with --see text, without any video")
    config, answers, wordpiece = checkpoint["config"], checkpoint["answers"], WordPiece(checkpoint["vocab"])
    model = Choice(EViLM(config), len(answers))
    fill(model, checkpoint)
    model.to(machine.device).eval()
    name_unknown(wordpiece, [args.question], machine)
    frames = torch.from_numpy(read_frames(args.video, config, config.size)).movedim(-1, 1)[None]
    ids, mask = (x.to(machine.device) for x in wordpiece.encode_batch([args.question], config.max_words))
    with machine.autocast():
        probabilities = model(frames.to(machine.device) / 255, ids[None], mask[None])[0].softmax(0)
    for probability, place in zip(*probabilities.topk(min(args.top, len(answers)))):
        print(f"{float(probability):6.1%}  {printable(answers[place])}")


def read_frames(path, config, size=None):
    """The frames that evaluation samples from a clip: uint8 (T, H, W, 3)."""
    return read_clip(path, lambda count: spans(count, config.frames), size)[0]


def main():
    args = parse()
    {"search": search, "ask": ask}.get(args.task, train)(args)


if __name__ == "__main__":
    run_script(main, DataError, BrokenClip)
