"""Stage 3: every downstream task of section 4, from a pretrained E-ViLM.

    python finetune.py qa                               open-ended video question answering
    python finetune.py mc --set caption                 multiple choice: caption, action or transition
    python finetune.py retrieval                        text-to-video, fast (4.4) or --scoring joint
    python finetune.py probe                            activity recognition by a linear probe
    python finetune.py search "a red circle moves left" --videos DIR
    python finetune.py ask CLIP "what colour is the circle?"

A task trains on the files of --data and scores its best epoch on the test split; `finetune.py TASK --help`
tells its flags. It leaves in --out (runs/TASK): last.pt, best.pt, metrics.jsonl, curves.png and a picture of
what it answered or found.
"""
import argparse
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_functional
import torch.nn.functional as F
from tqdm import tqdm

import pretrain
from evilm import (MASK, Choice, EViLM, FastRetrieval, InputError, LinearProbe, Run, WordPiece, as_typed,
                   changed, checkpoint_path, common_flags, config_of, configure, contrastive_loss, load,
                   make_optimizer, mlm_loss, nearest, on_device, positive, prefetch, preset_named,
                   ranks_by_cosine, run_script, same_set, set_up, vtm_loss, vtm_targets, without)
from pretrain import Ranking, name_broken, read_each_video, read_frames, recalls, score_retrieval
from toy_data import BrokenClip, DataError, open_split, pictures, read_clip, spans
from toy_data.clips import VIDEO_SUFFIXES
from train_tokenizer import (batches_left, clips_of, encode_padded, evaluation_loader, make_loader,
                             make_vocabulary, open_clips, pad, render_if_asked, scale)

# Epochs, learning rate and clips a step of each task. The paper gives retrieval's alone (4.4): "task-specific
# learning rates/epochs" (4.1).
SETTINGS = {
    "qa": {"toy": {"epochs": 2, "lr": 1e-3, "batch_size": 32},
           "paper": {"epochs": 10, "lr": 5e-5, "batch_size": 64}},
    "mc": {"toy": {"epochs": 12, "lr": 1e-3, "batch_size": 16, "mlm_first": 0.6,
                   "config": ["video_positions=3"]},        # questions of motion: where things are
           "paper": {"epochs": 20, "lr": 5e-5, "batch_size": 32, "mlm_first": 0.0, "config": []}},
    "retrieval": {"toy": {"epochs": 5, "lr": 1e-3, "batch_size": 64},
                  "paper": {"epochs": 200, "lr": 3e-4, "batch_size": 128}},
    "probe": {"toy": {"epochs": 30, "lr": 1e-3, "batch_size": 128},
              "paper": {"epochs": 100, "lr": 1e-3, "batch_size": 1024}},
}
# What one set of multiple choice has of its own, in the toy preset. Captions are what pretraining was about,
# and there are three times as many of them as questions. Transitions are told by order alone: the sines of
# neighbouring frames lie 1.6 apart, what is seen there 11, so they are read late; ten times as long, soon.
TOY_SETS = {"caption": {"epochs": 2, "mlm_first": 0.0, "config": []},
            "transition": {"epochs": 6, "config": ["video_positions=10"]}}
STILL_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp"}      # a folder of these is one clip
PICTURED = 12           # clips on a sheet of answers


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(zero_shot=False)
    commands = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    tasks = {name: add_task(commands, name) for name in SETTINGS}
    for name in ("qa", "mc"):
        tasks[name].add_argument("--see", default="both", choices=["both", "text"], help="text: a model that "
                                 "never sees the video, to compare with (default: both)")
    tasks["mc"].add_argument("--set", default="caption", metavar="NAME", help="which mc_NAME_train.jsonl: "
                             "caption, action or transition (default: caption)")
    tasks["mc"].add_argument("--mlm-first", type=fraction, metavar="SHARE", help="for that share of the "
                             "steps the right option's words are hidden and to be filled in (MLM), before "
                             "options are compared as well; 0: never (default: the preset's, 0.6 in toy, 0 "
                             "in paper; of captions 0)")
    tasks["retrieval"].add_argument("--scoring", default="fast", choices=["fast", "joint"], help="fast: two "
                                    "vectors and their cosine (4.4); joint: the 2-way head on every pair "
                                    "(default: fast)")
    for name in ("mc", "retrieval"):
        tasks[name].add_argument("--zero-shot", action="store_true", help="score --init as it is, without "
                                 "training")
    search = add_use(commands, "search", "retrieval", "rank a folder's clips for a sentence")
    search.add_argument("sentence")
    search.add_argument("--videos", required=True, metavar="DIR", help="clips, also in folders inside")
    search.add_argument("--out", default="search.png", metavar="FILE",
                        help="the picture (default: search.png)")
    ask = add_use(commands, "ask", "qa", "the likeliest answers to a question about a clip")
    ask.add_argument("video")
    ask.add_argument("question")
    args = parser.parse_args(argv)
    if args.task in SETTINGS and args.out is None:
        parts = [args.task, getattr(args, "set", ""), "zero-shot" * args.zero_shot,
                 "text" * (getattr(args, "see", "") == "text"),
                 "joint" * (getattr(args, "scoring", "") == "joint")]
        args.out = "runs/" + "-".join(filter(None, parts))
    return args


def fraction(text):
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to below 1")
    return float(text)


def add_task(commands, name):
    settings = SETTINGS[name] | {f"toy of {its}s": own for its, own in TOY_SETS.items() if name == "mc"}
    flags = common_flags(None, settings=settings)
    task = commands.add_parser(name, parents=[flags], allow_abbrev=False, help=TASKS_HELP[name])
    task.add_argument("--init", default="runs/pretrain/best.pt", metavar="PATH|none", help="a run or "
                      "checkpoint of pretrain.py, or of retrieval --scoring joint; runs/encoder: pictures "
                      "alone, Table 5's first row; none: from nothing (default: runs/pretrain/best.pt)")
    task.add_argument("--out", metavar="DIR", help=f"the run's folder (default: runs/{name}"
                      + "-SET" * (name == "mc") + "; with -zero-shot, -text or -joint for what is not the "
                      "usual)")
    return task


TASKS_HELP = {"qa": "open-ended question answering", "mc": "multiple choice", "probe": "linear probe",
              "retrieval": "text-to-video retrieval"}


def add_use(commands, name, task, what):
    use = commands.add_parser(name, allow_abbrev=False, help=what, description=what)
    use.add_argument("--init", default=f"runs/{task}/best.pt", metavar="PATH", help="a checkpoint of "
                     f"finetune.py {task} (default: runs/{task}/best.pt)")
    use.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="default: auto")
    use.add_argument("--top", type=positive, default=5, help="how many (default: 5)")
    return use


# ------------------------------------------------------------------------------------------ where it begins


def begin(args, texts, manifest, machine):
    """The pretrained model that --init names, or a new one, and its WordPiece.

    Words of `texts` that a pretrained vocabulary cannot spell ("what", "colour") take rows of the embedding
    that no word used.
    """
    config = configure(args)
    checkpoint = None if args.init == "none" else load(
        args.init, "pretrain", "retrieval", "encoder",
        hint="; python pretrain.py makes one, --init none begins from nothing")
    if checkpoint is None or checkpoint["kind"] == "encoder":       # no more than pictures is known yet
        if args.zero_shot:
            raise InputError(f"--zero-shot scores a pretrained model: --init {args.init} knows no captions")
        wordpiece, config = make_vocabulary(args, config, texts, machine)
        torch.manual_seed(args.seed)
        model = EViLM(config).to(machine.device)
        if checkpoint is None:
            pretrain.start_from_nothing(model, manifest, args, machine)
        else:
            pretrain.copy_video(model, checkpoint, f"--init {args.init}")
            machine.say(f"video encoder: starts from {checkpoint_path(args.init)}")
        return model, wordpiece
    for flag in ("vocab", "vocab_captions"):
        if getattr(args, flag):
            raise InputError(f"--{flag.replace('_', '-')}: --init {args.init} brings its own vocabulary; the "
                             "flag is for --init none")
    if checkpoint["settings"].get("scoring") == "fast":
        raise InputError(f"--init {args.init}: was trained for fast retrieval; a task begins from a run of "
                         "pretrain.py or of retrieval --scoring joint")
    if checkpoint["config"]["preset"] != args.preset:
        raise InputError(f"--init {args.init} is of the {checkpoint['config']['preset']} preset, not of "
                         f"{args.preset}: name that one with --preset")
    config = changed(config_of(checkpoint), args.config)
    wordpiece = WordPiece(checkpoint["vocab"]).add_words(texts, config.vocab_rows)
    model = EViLM(replace(config, words=len(wordpiece)))
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError:
        raise InputError(f"--config {' '.join(args.config)}: the weights of --init {args.init} have other "
                         "sizes; frames, max_words and the like can be changed") from None
    return model.to(machine.device), wordpiece


# -------------------------------------------------------------------------------------- questions and options


class Task:
    """What the tasks that train on clips share."""
    first = 0.0             # the share of the steps, up to `turn`, that something else has first
    contrasts = False       # whether each clip of a batch is compared with all others
    counts = {}             # of how many each score is a share, where that is told

    def clips(self, model, args, machine):
        return clips_of(self.splits["train"], self.config, args, train=True, mismatched=self.mismatched)


class Choices(Task):
    """What open-ended questions and multiple choice share: a video with O texts, one logit of which is right.

    Called with samples it makes their batch: frames (B, T, 3, H, W), ids and mask (B, O, L), targets (B,).
    """
    score, mismatched, decide = "top1", False, ("see",)

    def __call__(self, samples):
        width, texts = self.config.max_words, [self.texts(s["row"]) for s in samples]
        ids, mask = pad([encode_question(self.wordpiece, *text, width) for row in texts for text in row],
                        width)
        return {"frames": torch.stack([s["frames"] for s in samples]),
                "ids": ids.view(len(texts), -1, width), "mask": mask.view(len(texts), -1, width),
                "targets": torch.tensor([self.target(s["row"]) for s in samples]),
                "rows": [s["row"] for s in samples], "whole": [not s["broken"] for s in samples],
                "broken": [line for s in samples for line in s["broken"]]}

    def say_cut(self, machine):
        """Says how many texts of the test split lose the end of their question."""
        texts = [text for row in self.splits["test"] for text in self.texts(row)]
        width = self.config.max_words
        long = sum(len(self.wordpiece.encode(" ".join(text), 10**6)) > width for text in texts)
        if long:
            machine.say(f"{long:,} of {len(texts):,} test questions (with an option) are longer than "
                        f"max_words, {width}, and lose their end; --config max_words=NUMBER reads more")

    def shown(self, batch):
        return scale(batch["frames"]) if self.see == "both" else None

    def seen(self, model):
        return without(model, "video_encoder", "video_proj") if self.see == "text" else model

    def logits(self, model, batch):
        return model(self.shown(batch), batch["ids"], batch["mask"])

    def loss(self, model, batch):
        return F.cross_entropy(self.logits(model, batch).float(), batch["targets"])

    @torch.no_grad()
    def evaluate(self, model, split, args, machine):
        """-> {"top1", and "top1_KIND" of each kind of question}; rows whose clip is broken are left out."""
        right, asked = Counter(), Counter()
        loader = evaluation_loader(self.splits[split], self, self.config, args, machine, most=None)
        for batch, _ in prefetch(loader, machine.device):
            with machine.autocast():
                chosen = most_likely(self.logits(model, batch).float())
            self.run.note(batch["broken"], "left out")
            for row, hit, whole in zip(batch["rows"], (chosen == batch["targets"]).tolist(), batch["whole"]):
                for name in {"top1", f"top1_{self.kind(row)}"} if whole else ():
                    right[name] += hit
                    asked[name] += 1
        scores, self.counts = shares(right, asked, machine)
        return scores

    @torch.no_grad()
    def draw(self, model, args, machine, folder):
        """A sheet of clips from all over the test split, with question, prediction and answer."""
        clips, entries = clips_of(self.splits["test"], self.config, args, train=False, mismatched=False), []
        batch = self([clips[0, i] for i in np.linspace(0, len(clips) - 1, PICTURED).astype(int).tolist()])
        batch = on_device(batch, machine.device)
        chosen = most_likely(self.logits(model, batch).float()).tolist()
        for i, row in enumerate(batch["rows"]):
            told, truth = self.answer(row, chosen[i]), int(batch["targets"][i])
            verdict = ("right: " if chosen[i] == truth else "wrong: ") + told
            if chosen[i] != truth:
                verdict += f", not {row['answer'] if truth < 0 else self.answer(row, truth)}"
            entries.append((batch["frames"][i].permute(0, 2, 3, 1).cpu().numpy(),
                            " ".join(filter(None, [row.get("question"), verdict]))))
        pictures.contact_sheet(entries, folder / "answers.png", f"{self.title}: predictions on test")


class Questions(Choices):
    """Open-ended QA over the training split's answers; any other answer of a question counts as wrong."""
    files, title = "qa", "Open-ended question answering"

    def __init__(self, args, splits):
        self.see, self.training_texts, kinds = args.see, [], defaultdict(Counter)
        for row in splits["train"]:
            self.training_texts.append(row["question"])
            kinds[self.kind(row)][str(row["answer"])] += 1
        self.answers = [answer for answer, _ in sum(kinds.values(), Counter()).most_common()]
        self.number = {answer: i for i, answer in enumerate(self.answers)}
        for name in ("val", "test"):
            if not any(str(row["answer"]) in self.number for row in splits[name]):
                raise DataError(f"{splits[name].path}: none of its answers occurs in {splits['train'].path}; "
                                "are the two of one set?")
        usual = {kind: answers.most_common(1)[0][0] for kind, answers in kinds.items()}
        hits = [usual.get(self.kind(row)) == str(row["answer"]) for row in splits["test"]]
        self.chance = {"the majority answer of each kind of question": sum(hits) / len(hits)}

    def kind(self, row):
        """The kind of question: as the row says, else its first word, as MSRVTT-QA and MSVD-QA count."""
        return row.get("kind") or row["question"].split()[0].lower()

    def texts(self, row):
        return [(row["question"], "")]

    def target(self, row):
        return self.number.get(str(row["answer"]), -1)

    def answer(self, row, i):
        return self.answers[i] if i >= 0 else "nothing"

    def head(self, model):
        return Choice(self.seen(model), len(self.answers))


class Options(Choices):
    """Multiple choice among five options, each read after the question, if there is one.

    To match an option with what a thing does is to learn two things at once, what the words mean and how to
    compare; where pretraining taught neither, the loss is long at ln 5. So the words come first (--mlm-first):
    those of the right option are hidden and filled in, as in pretraining; the paper does not say that it did.
    """
    answers, chance, decide = (), {"chance": 0.2}, ("set", "see", "mlm_first")

    def __init__(self, args, splits):
        self.see, self.title = args.see, f"Multiple choice, {args.set}"
        self.first = args.mlm_first
        for manifest in splits.values():
            for i, row in enumerate(manifest):
                if len(row["options"]) != 5:
                    raise DataError(f"{manifest.path}:{manifest.line(i)}: has {len(row['options'])} options, "
                                    "where five are wanted")
        self.training_texts = [text for row in splits.get("train", ())
                               for text in (row["question"], *row["options"])]

    def kind(self, row):
        return "+".join(row.get("changed", ["all"]))

    def texts(self, row):
        return [(row["question"], option) for option in row["options"]]

    def target(self, row):
        return row["answer"]

    def answer(self, row, i):
        return row["options"][i] if i >= 0 else "none"

    def head(self, model):
        return Choice(self.seen(model), 1, fills_in=self.first > 0)

    def __call__(self, samples):
        """The batch, and `words` (B, L), True at the right option's words, where they are to be hidden."""
        batch = super().__call__(samples)
        if not self.first:
            return batch
        rows = torch.arange(len(samples))
        ends = batch["mask"][rows, batch["targets"]].sum(1, keepdim=True) - 1               # where [SEP] is
        counts = [len(self.wordpiece.encode(s["row"]["options"][s["row"]["answer"]], self.config.max_words))
                  - 2 for s in samples]
        place = torch.arange(self.config.max_words)
        words = (place < ends) & (place >= ends - torch.tensor(counts)[:, None])
        return batch | {"words": words & (batch["ids"][rows, batch["targets"]] > MASK)}      # no [UNK]

    def loss(self, model, batch):
        if not self.first:
            return super().loss(model, batch)
        targets = batch["targets"]
        clips = torch.arange(len(targets), device=targets.device)
        ids, mask, words = batch["ids"][clips, targets], batch["mask"][clips, targets], batch["words"]
        options = (batch["ids"], batch["mask"]) if self.run.step >= self.turn else (None, None)
        logits, said = model(self.shown(batch), *options, right=(ids.masked_fill(words, MASK), mask, words))
        loss = mlm_loss(said, ids[words], len(targets))     # over clips, as the other is: -log p of an option
        return loss if logits is None else loss + F.cross_entropy(logits.float(), targets)


def encode_question(wordpiece, question, option, width):
    """[CLS] question option [SEP], at most `width` ids; of what is too long the question loses its end."""
    end = wordpiece.encode(option, width)[1:]
    return wordpiece.encode(question, width - len(end) + 1)[:-1] + end


def most_likely(logits):
    """The place of the largest logit, (B, n) -> (B,); -2, which is never right, where two are the largest."""
    best, place = logits.max(1)
    return place.masked_fill((logits == best[:, None]).sum(1) > 1, -2)


def shares(right, asked, machine):
    """right / asked under each name, added up over all processes, and how many were asked."""
    names = [sorted(asked)]
    if machine.world > 1:
        names = [None] * machine.world
        dist.all_gather_object(names, sorted(asked))
    names = sorted({name for found in names for name in found})
    counts = machine.total([float(found[name]) for found in (right, asked) for name in names]).view(2, -1)
    return dict(zip(names, (counts[0] / counts[1]).tolist())), dict(zip(names, counts[1].tolist()))


# -------------------------------------------------------------------------------------------------- retrieval


class Retrieval(Task):
    """Text-to-video retrieval: every caption is a query, every video is ranked once, however many name it.

    Called with samples it makes their batch: frames, the captions' ids and mask (B, L), `names` (B,) numbers
    of the videos; for joint scoring also a wrong caption of each, `other_ids` and `other_mask`.
    """
    score, files, answers, title, decide = "r1", "", (), "Text-to-video retrieval", ("scoring",)

    def __init__(self, args, splits):
        self.mismatched = args.scoring == "joint"
        self.contrasts = not self.mismatched
        self.train_split = splits.get("train", ())
        self.chance = {"chance": 1 / len(np.unique(splits["test"].videos))}
        self.training_texts = [row["caption"] for row in self.train_split]

    def __call__(self, samples):
        def encode(name):
            return encode_padded(self.wordpiece, [s[name] for s in samples], self.config.max_words)

        ids, mask = encode("caption")
        batch = {"frames": torch.stack([s["frames"] for s in samples]), "ids": ids, "mask": mask,
                 "names": torch.tensor([int(self.train_split.videos[s["index"]]) for s in samples]),
                 "broken": [line for s in samples for line in s["broken"]]}
        if self.mismatched:
            batch["other_ids"], batch["other_mask"] = encode("mismatched")
        return batch

    def head(self, model):
        return without(model, "mlm_head", "mvm_head") if self.mismatched else FastRetrieval(model)

    def loss(self, model, batch):
        frames = scale(batch["frames"])
        if self.mismatched:
            logits, _, _ = model(frames, batch["ids"], batch["mask"],
                                 mismatched=(batch["other_ids"], batch["other_mask"]))
            return vtm_loss(logits, vtm_targets(logits))
        video, text, sharpness = model(frames, batch["ids"], batch["mask"])
        return contrastive_loss(*map(from_all, (video, text)), sharpness, from_all(batch["names"]))

    def evaluate(self, model, split, args, machine):
        """-> {"r1", "r5", "r10", "median_rank"}; joint scoring takes 100 captions from all over val."""
        given = model, self.splits[split], self.wordpiece, machine
        if self.mismatched:
            most = 100 if split == "val" else len(self.splits[split])
            found, self.ranking = score_retrieval(*given, most, self.run.note)
        else:
            found, self.ranking = score_fast_retrieval(*given, self.run.note)
        return found

    def draw(self, model, args, machine, folder):
        pretrain.draw_retrieval(self.ranking, self.splits["test"], self.config, folder / "retrieval.png",
                                title=f"{self.title} on test")


def from_all(values):
    """The rows of all processes' tensors: contrast needs the whole batch. Gradient flows back to each."""
    if not dist.is_initialized():
        return values
    return torch.cat(dist_functional.all_gather(values))


@torch.no_grad()
def embed_captions(model, captions, wordpiece, machine):
    """-> unit vectors (n, D), on the CPU"""
    width, vectors = model.model.config.max_words, []
    for start in range(0, len(captions), 500):
        ids, mask = encode_padded(wordpiece, captions[start:start + 500], width)
        with machine.autocast():
            vectors.append(model.embed_text(ids.to(machine.device), mask.to(machine.device)).cpu())
    return torch.cat(vectors)


@torch.no_grad()
def embed_clips(model, frames, machine):
    """frames uint8 (n, T, 3, H, W) -> unit vectors (n, D), on the CPU"""
    with machine.autocast():
        return torch.cat([model.embed_video(scale(part.to(machine.device))).cpu()
                          for part in frames.split(50)])


@torch.no_grad()
def score_fast_retrieval(model, manifest, wordpiece, machine, note=name_broken):
    """Fast retrieval (4.4) -> (scores by name, the Ranking), as score_retrieval's."""
    model.eval()
    vectors, place, rows = read_each_video(manifest, list(manifest), model.model.config,
                                           lambda frames: embed_clips(model, frames, machine), note)
    queries = embed_captions(model, [row["caption"] for row in rows], wordpiece, machine)
    ranks = ranks_by_cosine(queries, vectors, torch.tensor([place[row["video"]] for row in rows]))
    return recalls(ranks), Ranking(rows, ranks, list(place), lambda q: vectors @ queries[q])


# -------------------------------------------------------------------------------------------- linear probe


class Probe:
    """Activity recognition by a linear probe: a classifier on clips' features, which are computed once."""
    score, files, training_texts, title, decide, first = "top1", "action", (), "Linear probe", (), 0
    contrasts = True        # by its norm

    def __init__(self, args, splits):
        counts = Counter(row["label"] for row in splits["train"])
        self.answers = sorted(counts)
        self.chance = {"chance": 1 / len(counts)}
        self.number = {label: i for i, label in enumerate(self.answers)}
        usual = counts.most_common(1)[0][0]
        hits = [row["label"] == usual for row in splits["test"]]
        self.chance["the majority label"] = sum(hits) / len(hits)

    def __call__(self, samples):
        return {"frames": torch.stack([s["features"] for s in samples]),
                "targets": torch.tensor([s["target"] for s in samples]), "broken": []}

    def head(self, model):
        return LinearProbe(model, len(self.answers))

    def clips(self, model, args, machine):
        """Computes each split's features and the numbers of its labels, -1 for one that training does not
        have, broken clips left out; -> those of the training split."""
        def collate(samples):
            return {"frames": torch.stack([s["frames"] for s in samples]),
                    "targets": torch.tensor([self.number.get(s["row"]["label"], -1) for s in samples]),
                    "whole": torch.tensor([not s["broken"] for s in samples]),
                    "broken": [line for s in samples for line in s["broken"]]}

        collate.mismatched, self.features = False, {}
        for split, manifest in self.splits.items():
            loader = evaluation_loader(manifest, collate, self.config, args, machine.alone(), most=None)
            found = []
            for batch, _ in tqdm(prefetch(loader, machine.device), f"features, {split}", len(loader), False):
                with machine.autocast():
                    features = model.features(scale(batch["frames"])).float()
                found.append((features[batch["whole"]], batch["targets"][batch["whole"]]))
                self.run.note(batch["broken"], "left out")
            self.features[split] = tuple(torch.cat(part) for part in zip(*found))
        return Features(*self.features["train"])

    def loss(self, model, batch):
        return F.cross_entropy(model(batch["frames"]), batch["targets"])

    @torch.no_grad()
    def evaluate(self, model, split, args, machine):
        """-> {"top1", "top1_LABEL" of each label there is}; keeps the confusion matrix, (truth, chosen)."""
        features, targets = self.features[split]
        model.eval()
        chosen = model(features).argmax(1)
        self.confusion = torch.zeros(len(self.answers), len(self.answers), dtype=torch.long)
        known = targets >= 0
        self.confusion.index_put_((targets[known].cpu(), chosen[known].cpu()), torch.tensor(1),
                                  accumulate=True)
        asked = {f"top1_{label}": n for label, n in zip(self.answers, self.confusion.sum(1).tolist()) if n}
        right = {f"top1_{label}": n for label, n in zip(self.answers, self.confusion.diag().tolist())}
        self.counts = {"top1": len(targets), **asked}
        return {"top1": float((chosen == targets).float().mean()),
                **{name: right[name] / n for name, n in asked.items()}}

    def draw(self, model, args, machine, folder):
        pictures.confusion(self.confusion.numpy(), self.answers, folder / "confusion.png",
                           f"{self.title}: what each label was taken for, test")


class Features(torch.utils.data.Dataset):
    """The probe's clips: dataset[(epoch, index)] -> features and target."""

    def __init__(self, features, targets):
        self.features, self.targets = features.cpu(), targets.cpu()

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, key):
        return {"features": self.features[key[1]], "target": int(self.targets[key[1]])}


# --------------------------------------------------------------------------------------------------- training

TASKS = {"qa": Questions, "mc": Options, "retrieval": Retrieval, "probe": Probe}


def settle(args, machine):
    """Fills in the flags that were left out -> the name of the task's files."""
    preset_named(args.preset)
    files = f"mc_{args.set}" if args.task == "mc" else TASKS[args.task].files
    settings = dict(SETTINGS[args.task][args.preset])
    if args.task == "mc" and args.preset == "toy":
        settings |= TOY_SETS.get(args.set, {})
    args.config = settings.pop("config", []) + args.config
    for name, value in settings.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.zero_shot and files not in ("", "mc_caption"):
        raise InputError(f"--zero-shot: the 2-way head matches captions; mc --set {args.set} has questions")
    if args.accumulate > 1 and (args.task == "probe" or getattr(args, "scoring", "") == "fast"):
        raise InputError("--accumulate: fast retrieval contrasts each clip with its whole batch, and the "
                         "probe's norm is over it, which cannot be cut")
    if args.task == "probe" and (machine.world > 1 or args.batch_size == 1):
        raise InputError("probe: its norm is over the whole batch; use one process, and a --batch-size of 2 "
                         "or more")
    return files


def train(args, machine):
    """Fine-tunes as the flags say, from --init or from where it was; scores best.pt on the test split."""
    files = settle(args, machine)
    render_if_asked(args, machine)
    splits = ({"test": open_split(args.data, "test", files, machine.say)} if args.zero_shot
              else open_clips(args, machine, files))
    task = TASKS[args.task](args, splits)
    base, wordpiece = begin(args, task.training_texts, splits.get("train"), machine)
    task.splits, task.wordpiece, task.config = splits, wordpiece, base.config
    if isinstance(task, Choices):
        task.say_cut(machine)
    torch.manual_seed(args.seed)
    model = task.head(base).to(machine.device)
    run = Run(args, args.task, base.config, wordpiece.vocab, ("task", "init", *task.decide), machine)
    run.constant["answers"], task.run = list(task.answers), run
    video_lr = 1.0 if args.init == "none" else base.config.video_lr
    optimizer = make_optimizer(model, args.lr, base.config.weight_decay, machine.device, video_lr)
    run.start(model, optimizer, args.resume)
    if args.zero_shot:
        return report_zero_shot(task, base, run, args, machine)

    clips = task.clips(model, args, machine)
    batches = batches_left(clips, run, args, machine)
    if task.contrasts and batches.batch_size % machine.world:
        raise InputError(f"--batch-size {batches.batch_size}: fast retrieval contrasts the clips of all "
                         f"{machine.world} processes, which need equally many")
    machine.say(f"{task.title}: {len(clips):,} lines, {run.steps:,} steps of {batches.batch_size}, {machine}")
    wrapped = machine.wrap(model, args.compile, idle=task.first > 0)
    task.turn = turn = min(round(task.first * run.steps), run.steps - 1)
    for batch in run.steps_of(make_loader(clips, batches, task, args, machine)):
        run.set_learning_rate(args.lr, base.config.warmup, turn)
        model.train()
        losses = torch.zeros(1, device=machine.device)
        for part, sync in machine.parts(wrapped, batch, args.accumulate):
            with sync:
                with machine.autocast():
                    loss = task.loss(wrapped, part)
                # What contrasts is of the whole batch already; other losses' parts count as their clips do.
                share = 1.0 if task.contrasts else len(part["frames"]) * machine.world / batches.batch_size
                (share * loss).backward()
            losses += share * loss.detach()
        run.optimise(losses)
        if run.step % batches.steps_per_epoch == 0 or run.step == run.steps:
            model.eval()
            scores = task.evaluate(model, "val", args, machine)
            run.log(split="val", **scores, loss=float(losses))
            early = run.step <= turn and turn > 0
            if not early:
                run.save_best(scores[task.score])
            machine.say(f"step {run.step:,}, val: {task.score} {scores[task.score]:.1%}"
                        + f" (words come first, until step {turn:,})" * early)
            run.save_last()
    run.end_of_steps()
    if machine.main:
        finish(task, model, run, args, machine.alone())


def finish(task, model, run, args, machine):
    """Scores best.pt on the test split, draws the pictures, says what was learned, against chance."""
    model.load_state_dict(load(run.folder / "best.pt", args.task)["model"])
    model.eval()
    scores = task.evaluate(model, "test", args, machine)
    run.log(split="test", **scores, **{f"against {name}": value for name, value in task.chance.items()})
    lines = [line for line in run.metrics() if line["split"] == "val"]
    series = {name: [(line["step"], line[name]) for line in lines] for name in (task.score, "loss")}
    pictures.curves([(f"{task.score}, val", {task.score: series[task.score]}, task.chance, True),
                     ("loss, training" + f": hidden words alone to step {task.turn:,}" * bool(task.turn),
                      {"loss": series["loss"]}, {}, False)],
                    run.folder / "curves.png", task.title)
    task.draw(model, args, machine, run.folder)
    report(task, scores, run, args)


def report_zero_shot(task, model, run, args, machine):
    """Scores the pretrained model by its own 2-way head, or by its vectors as they are, without training."""
    if not machine.main:
        return
    scorer = task.head(model).to(machine.device).eval()     # of options: begins as the 2-way head
    scores = task.evaluate(scorer, "test", args, machine)
    task.draw(scorer, args, machine, run.folder)
    run.log(split="test", **scores, **{f"against {name}": value for name, value in task.chance.items()})
    report(task, scores, run, args)


def report(task, scores, run, args):
    """The lines that say what was learned, what to look at, and what to type next."""
    print(f"{task.title}, test" + ", zero-shot" * args.zero_shot)
    for name, value in scores.items():
        print(f"  {name:<24} " + (f"{value:.1f}" if name == "median_rank" else f"{value:6.1%}")
              + (f" of {task.counts[name]:,.0f}" if name in task.counts else ""))
    print("  against " + ", ".join(f"{name} {value:.1%}" for name, value in task.chance.items()))
    run.say_end("" if args.zero_shot else next_command(task, run, args))


def next_command(task, run, args):
    """What a user would want to type after a task: to use it, or to see what it owes to pretraining."""
    if isinstance(task, Retrieval):
        return (f"python finetune.py mc{same_set(args)} --zero-shot --init {run.folder}" if task.mismatched
                else f'python finetune.py search "a red circle moves left" --videos DIR --init {run.folder}')
    if getattr(args, "see", "both") == "text":
        return f"python finetune.py{as_typed()} --see both --out {run.folder}-seen   (what the video adds)"
    if isinstance(task, Questions):
        return f'python finetune.py ask CLIP "what colour is the circle?" --init {run.folder}'
    if args.init == "none":
        return ""
    return (f"python finetune.py{as_typed()} --init none --out {run.folder}-from-nothing   "
            "(what pretraining is worth)")


# --------------------------------------------------------------------------------------------- search and ask


def open_trained(args, kind, head):
    """A fine-tuned model of --init, in evaluation mode, its WordPiece, and the checkpoint."""
    checkpoint = load(args.init, kind, hint=f"; python finetune.py {kind} makes one")
    model = head(EViLM(config_of(checkpoint)), checkpoint)
    model.load_state_dict(checkpoint["model"])
    return model.eval(), WordPiece(checkpoint["vocab"]), checkpoint


def search(args, machine):
    """Ranks a folder's clips for a sentence; their vectors are kept there, and only new ones computed."""
    def head(model, checkpoint):
        if checkpoint["settings"]["scoring"] != "fast":
            raise InputError(f"--init {args.init}: was trained for joint scoring; search wants --scoring "
                             "fast")
        return FastRetrieval(model)

    if not Path(args.out).parent.is_dir():
        raise InputError(f"--out {args.out}: there is no folder {Path(args.out).parent}")
    model, wordpiece, _ = open_trained(args, "retrieval", head)
    model.to(machine.device)
    names, vectors = vectors_of_folder(model, Path(args.videos), machine)
    query = embed_captions(model, [args.sentence], wordpiece, machine)
    scores, places = nearest(query, vectors, min(args.top, len(names)))
    found = []
    for score, place in zip(scores[0].tolist(), places[0].tolist()):
        clip = Path(args.videos) / names[place]
        print(f"{score:6.3f}  {clip}")
        frames, _ = read_clip(clip, lambda count: spans(count, model.model.config.frames), 192)
        found.append((frames, f"{score:.2f}  {names[place]}"))
    pictures.contact_sheet(found, args.out, args.sentence)
    print(f"look at {args.out}")


def vectors_of_folder(model, folder, machine):
    """The names of a folder's clips and their vectors (n, D). Kept in the folder, under a name that follows
    from the weights; a clip is known by its name, size and time of change."""
    clips = find_clips(folder)
    path = folder / f".vectors-{pretrain.digest_of(model).hexdigest()[:12]}.npz"
    known, names = read_vectors(path), []
    try:
        for name, key in tqdm(clips.items(), "vectors", unit="clip", leave=False):
            if key not in known:
                try:
                    frames = read_frames(folder / name, model.model.config)
                except BrokenClip as error:
                    tqdm.write(f"broken clip, left out: {error}")
                    continue
                known[key] = embed_clips(model, frames[None], machine)[0].numpy()
            names.append(name)
    finally:                        # after Ctrl-C as well, also of clips that were not yet come to
        keep_vectors(path, {key: known[key] for key in clips.values() if key in known})
    if not names:
        raise DataError(f"--videos {folder}: none of its clips can be read")
    return names, np.stack([known[clips[name]] for name in names])


def read_vectors(path):
    """{key of a clip: its vector}; none where there is no file, or a damaged one."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            return dict(zip(kept["clips"].tolist(), kept["vectors"]))
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return {}


def keep_vectors(path, known):
    try:
        with open(path.with_suffix(".part"), "wb") as file:
            np.savez(file, clips=np.array(list(known)), vectors=np.array(list(known.values())))
        path.with_suffix(".part").replace(path)
    except OSError as error:
        tqdm.write(f"{path}: vectors are not kept ({error.strerror})")


def find_clips(folder):
    """{name: what tells this version of the clip from others} of all clips in a folder and those inside."""
    if not folder.is_dir():
        raise InputError(f"--videos {folder}: there is no such folder")
    found = {}
    for path in sorted(folder.rglob("*")):
        endings = {part.suffix.lower() for part in path.iterdir()} if path.is_dir() else set()
        images = endings & STILL_SUFFIXES and not endings & VIDEO_SUFFIXES
        if images or path.suffix.lower() in VIDEO_SUFFIXES and path.is_file():
            states = [part.stat() for part in (path.iterdir() if images else [path])]
            size, changed_at = sum(s.st_size for s in states), max(s.st_mtime_ns for s in states)
            name = str(path.relative_to(folder))
            found[name] = f"{name} {size} {changed_at}"
    if not found:
        raise DataError(f"--videos {folder}: has no clips ({' '.join(sorted(VIDEO_SUFFIXES))}, or folders of "
                        "images)")
    return found


@torch.no_grad()
def ask(args, machine):
    """The likeliest answers to a question about a clip, with their probabilities."""
    def head(model, checkpoint):
        if checkpoint["settings"]["see"] == "text":
            raise InputError(f"--init {args.init}: was trained with --see text and has never seen a video")
        return Choice(model, len(checkpoint["answers"]))

    model, wordpiece, checkpoint = open_trained(args, "qa", head)
    model.to(machine.device)
    config = model.model.config
    try:
        frames = read_frames(args.video, config)
    except BrokenClip as error:
        raise InputError(str(error)) from None
    ids = encode_question(wordpiece, args.question, "", config.max_words)
    if len(wordpiece.encode(args.question, 10**6)) > config.max_words:
        print(f"the question is longer than {config.max_words - 2} words, and its end is not read")
    ids, mask = pad([ids], config.max_words)
    frames = scale(frames[None].to(machine.device))
    chances = model(frames, ids[None].to(machine.device), mask[None].to(machine.device))[0].float().softmax(0)
    for chance, place in zip(*chances.topk(min(args.top, len(chances)))):
        print(f"{float(chance):6.1%}  {checkpoint['answers'][place]}")


def main():
    args = parse()
    machine = set_up(args.device, getattr(args, "precision", "auto"))
    {"search": search, "ask": ask}.get(args.task, train)(args, machine)


if __name__ == "__main__":
    run_script(main, DataError)
