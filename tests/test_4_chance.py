"""Multiple choice cannot be answered from one side: models that see only text or only video stay at chance.

Both are trained on the training split of the task itself, the fair meaning of "chance" (section 4's tasks are
about video and language together). Text alone needs few steps: five clips share a question and its options,
each of which is right for one of them, so a model that reads no more than these is right for one in five.
"""
import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from evilm import Config, EViLM, WordPiece
from toy_data import ClipCaptions, make_loader, open_splits, render


def blind_accuracy(folder, side, steps):
    """Trains a model that sees one side alone -> (accuracy on test, number of questions)."""
    splits = open_splits(folder, "mc_caption")
    rows = {name: list(splits[name]) for name in ("train", "test")}
    words = WordPiece.from_captions(option for row in rows["train"]
                                    for option in [row["question"], *row["options"]])
    config = replace(Config.toy(), vocab_size=len(words), size=32, text_layers=1, decoder_layers=1)
    model, out = EViLM(config), torch.nn.Linear(config.width, 1 if side == "text" else 5)
    optimizer = torch.optim.AdamW([*model.parameters(), *out.parameters()], lr=1e-3)
    frames = {}
    for name in rows if side == "video" else ():
        clips = ClipCaptions(splits[name], config.frames, config.size, 0, train=False, mismatched=False)
        frames[name] = torch.cat([batch["frames"] for batch in make_loader(clips)])

    def logits(name, chosen):
        """(n, 5): of the options' texts where the text is seen, of their places where the video is."""
        if side == "video":
            video = model.encode_video(frames[name][chosen].float() / 255)
            return out(model.fuse(video, None, None)[0])
        texts = [f"{rows[name][i]['question']} {option}"
                 for i in chosen.tolist() for option in rows[name][i]["options"]]
        ids, mask = words.encode_batch(texts, config.max_words)
        return out(model.fuse(None, model.encode_text(ids, mask), mask)[0]).view(-1, 5)

    answers = {name: torch.tensor([row["answer"] for row in found]) for name, found in rows.items()}
    for _ in range(steps):
        chosen = torch.randint(len(answers["train"]), (32,))
        F.cross_entropy(logits("train", chosen), answers["train"][chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        found = torch.cat([logits("test", part) for part in torch.arange(len(answers["test"])).split(50)])
    return float((found.argmax(1) == answers["test"]).float().mean()), len(found)


def test_one_side_alone_stays_at_chance_on_multiple_choice(tmp_path):
    render(tmp_path / "set", 600)
    for side, steps in (("text", 6), ("video", 30)):
        accuracy, n = blind_accuracy(tmp_path / "set", side, steps)
        most = 1.96 * math.sqrt(0.2 * 0.8 / n)      # chance lies in Wilson's 95% interval
        assert abs(accuracy - 0.2) <= most, f"{side} alone answers {accuracy:.0%} of {n}"
