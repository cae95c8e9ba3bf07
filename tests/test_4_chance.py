"""Multiple choice cannot be answered from the video alone: a model that is trained on the task and sees no
options stays at chance. (Text alone: five clips share a question and its options, see test_synthetic.py.)
"""
import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from evilm import Config, EViLM
from toy_data import ClipCaptions, make_loader, open_splits, render


def test_video_alone_stays_at_chance_on_multiple_choice(tmp_path):
    render(tmp_path / "set", 600)
    splits = open_splits(tmp_path / "set", "mc_caption")
    config = replace(Config.toy(), size=32, text_layers=1, decoder_layers=1)
    model, out = EViLM(config), torch.nn.Linear(config.width, 5)
    optimizer = torch.optim.AdamW([*model.parameters(), *out.parameters()], lr=1e-3)
    frames, answers = {}, {}
    for name in ("train", "test"):
        clips = ClipCaptions(splits[name], config.frames, config.size, 0, train=False, mismatched=False)
        frames[name] = torch.cat([batch["frames"] for batch in make_loader(clips)])
        answers[name] = torch.tensor([row["answer"] for row in splits[name]])

    def logits(name, chosen):                       # (n, 5): of the options' places
        video = model.encode_video(frames[name][chosen].float() / 255)
        return out(model.fuse(video, None, None)[0])

    for _ in range(30):
        chosen = torch.randint(len(answers["train"]), (32,))
        F.cross_entropy(logits("train", chosen), answers["train"][chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    n = len(answers["test"])
    with torch.no_grad():
        found = torch.cat([logits("test", part) for part in torch.arange(n).split(50)])
    accuracy = float((found.argmax(1) == answers["test"]).float().mean())
    most = 1.96 * math.sqrt(0.2 * 0.8 / n)          # chance lies in Wilson's 95% interval
    assert abs(accuracy - 0.2) <= most, f"video alone answers {accuracy:.0%} of {n}"
