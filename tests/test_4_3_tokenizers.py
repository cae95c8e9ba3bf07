"""4.3 and Tables 6, 7, the other tokenizers: VideoSwin as the encoder, pixels as the target."""
from dataclasses import asdict, replace

import plain
import pytest
import torch
import torch.nn.functional as F

import pretrain
import toy_data
import train_tokenizer
from evilm import (IMAGENET, Config, EViLM, InputError, SemanticTokenizer, VideoSwin, changed, config_of,
                   normalise, run_script, set_up, trace)
from train_tokenizer import beside_the_loss, reconstruction_loss, words_beside

KINDS = [("words", "vit"), ("words", "videoswin"), ("pixels", "vit"), ("pixels", "videoswin")]


@pytest.fixture
def make(tiny, randomise):
    """make(target, encoder): a tokenizer of that kind, its weights random."""
    def made(target, encoder):
        return randomise(SemanticTokenizer(replace(tiny, tokenizer_target=target, tokenizer_encoder=encoder)))
    return made


@pytest.fixture
def frames():
    return torch.rand(3, 2, 3, 64, 64)


def near(ours, plainly, atol=1e-9):
    torch.testing.assert_close(ours, plainly.to(ours.dtype), atol=atol, rtol=1e-6)


# -------------------------------------------------------------------------------------------------- VideoSwin


@pytest.mark.parametrize("T, window", [
    (5, (2, 3, 3)),             # padded and shifted in time, rows and columns; the last stage is one window
    (4, (4, 4, 4)),             # whole windows
    (3, (8, 7, 7)),             # a clip shorter than a window
])
def test_videoswin_is_the_releases_with_a_stride_of_1_in_time(randomise, T, window):
    depths, heads = (2, 2, 1, 1), (1, 2, 2, 4)
    swin = randomise(VideoSwin(8, depths, heads, window).double())
    x = torch.randn(2, T, 3, 32, 64, dtype=torch.float64)
    with torch.no_grad():
        ours = swin(x)
    assert ours.shape == (2, T, 1, 2, 64)
    near(ours, plain.video_swin(x, plain.weights(swin), depths, heads, window))


@pytest.mark.parametrize("target, encoder", KINDS)
def test_a_code_a_cell_on_the_visual_encoders_grid(make, tiny, frames, target, encoder):
    tokenizer, model = make(target, encoder), EViLM(tiny)
    ids = tokenizer.tokenize(frames)
    assert ids.shape == (3, tiny.frames, tiny.grid, tiny.grid)
    assert ids[0].numel() == model.encode_video(frames).shape[1]
    assert torch.equal(tokenizer.tokenize(frames[1:2])[0], ids[1])          # no clip needs another


def test_the_presets_grids_are_the_visual_encoders():
    for config in (Config.toy(), replace(Config.paper(), frames=2)):
        with torch.device("meta"):
            swin = VideoSwin(config.swin_dim, (1, 1, 1, 1), config.swin_heads, config.swin_window)
            cells = swin(torch.empty(1, config.frames, 3, config.size, config.size))
        assert cells.shape == (1, config.frames, config.grid, config.grid, 8 * config.swin_dim)


def test_videoswin_sees_a_frames_neighbours_and_vit_does_not(make, frames):
    other = torch.cat([frames[:, :1], torch.rand(3, 1, 3, 64, 64)], 1)
    with torch.no_grad():
        for encoder, sees in (("vit", False), ("videoswin", True)):
            tokenizer = make("words", encoder)
            moved = (tokenizer.embed(frames) - tokenizer.embed(other))[:, 0].abs().max()
            assert tokenizer.sees_neighbours == sees and (moved > 1e-3) == sees


def test_videoswin_gets_frames_in_the_scale_it_was_trained_in(make, frames):
    tokenizer = make("words", "videoswin")
    with torch.no_grad():
        near(tokenizer.embed(frames), tokenizer.proj(tokenizer.encoder(normalise(frames, *IMAGENET))))


def test_videoswins_norms_can_start_centred_on_real_frames(tiny, frames):
    tokenizer = SemanticTokenizer(replace(tiny, tokenizer_encoder="videoswin", swin_dim=4))
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    tokenizer.start(frames)
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(value, before[name]) != (name.startswith("encoder.") and "norm" in name)
    with torch.no_grad():
        cells = tokenizer.encoder(normalise(frames, *IMAGENET)).flatten(0, 3)
    near(cells.mean(0), torch.zeros(32), atol=1e-4)
    near(cells.std(0), torch.ones(32), atol=0.05)


def test_the_trace_shows_videoswins_parts(tiny, capsys):
    trace(replace(tiny, tokenizer_encoder="videoswin"))
    said = capsys.readouterr().out
    for name in ("patch_embed.proj", "layers.0.blocks.0 SwinBlock", "layers.2.downsample PatchMerging"):
        assert f"4.3 VideoSwin encoder.{name}" in said


# --------------------------------------------------------------------------------------- Pixels as the target


def test_pixels_are_drawn_in_their_places_from_the_frames_own_codes(make):
    tokenizer, codes = make("pixels", "vit"), F.normalize(torch.randn(2, 2, 2, 2, 6), dim=-1)
    w = plain.weights(tokenizer)
    with torch.no_grad():
        drawn = tokenizer.draw_pixels(codes)
    assert drawn.shape == (2, 2, 3, 64, 64)
    for b in range(2):
        for t in range(2):
            x = plain.linear(codes[b:b + 1, t].double().flatten(1, 2), w, "expand") + plain.sines(1, 2, 32)
            cells = plain.linear(plain.bert(x, w, 2, 2, at="decoder."), w, "head")[0].view(2, 2, 3, 32, 32)
            for row in range(2):
                for column in range(2):
                    near(drawn[b, t, :, 32 * row:32 * row + 32, 32 * column:32 * column + 32],
                         cells[row, column], atol=1e-4)


def test_the_pixels_loss_is_their_mean_squared_error(tiny, frames):
    config = replace(tiny, tokenizer_target="pixels")
    drawn, batch = torch.rand(3, 2, 3, 64, 64), {"frames": (255 * frames).to(torch.uint8)}
    pixels = batch["frames"].double() / 255
    loss = reconstruction_loss(None, config, drawn, batch)
    assert float(loss) == pytest.approx(float(((drawn.double() - pixels) ** 2).mean()), rel=1e-5)
    part, whole = beside_the_loss(config, drawn, batch)
    mean = torch.stack([pixels[b].mean((0, 2, 3)) for b in range(3)])[:, None, :, None, None]
    assert float(part / whole) == pytest.approx(float(((mean - pixels) ** 2).mean()), rel=1e-5)


def test_of_words_it_is_counted_which_are_found_among_as_many_as_there_are(tiny):
    config = replace(tiny, words=9)                                     # four words: ids 5 to 8
    ids = torch.tensor([[5, 6, 0], [5, 0, 0]])
    read = torch.tensor([[3.0, 1.0, 2.0, 0.0],                          # of two, the first is found
                         [2.0, 0.0, 1.0, 0.0]])                         # of one, it is
    found, there = beside_the_loss(config, read, {"ids": ids, "mask": ids > 0})
    assert found.tolist() == [2, 0, 0, 0] and there.tolist() == [2, 1, 0, 0]


def test_codes_of_two_numbers_are_drawn_on_their_circle(home, monkeypatch):
    run(train_tokenizer, "--config code_dim=2 --out two", home, monkeypatch)
    assert (home / "two/circle.png").exists()


def test_a_tokenizer_learns_to_draw_a_few_clips(tiny):
    config = replace(tiny, tokenizer_target="pixels")
    tokenizer = SemanticTokenizer(config)
    colours = torch.rand(6, 2, 3, 2, 2).repeat_interleave(32, -1).repeat_interleave(32, -2)     # one a cell
    optimizer, losses = torch.optim.AdamW(tokenizer.parameters(), 3e-3), []
    for _ in range(60):
        drawn, _, code_loss = tokenizer(colours)
        loss = F.mse_loss(drawn, colours)
        (config.target_weight * loss + code_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0] and tokenizer.tokenize(colours).unique().numel() > 2


def test_words_beside_a_code_are_those_its_clips_have_oftener():
    carried = torch.tensor([[1.0, 0, 1], [1, 0, 0], [0, 0, 1], [0, 0, 1]])
    present = torch.tensor([[1.0, 1], [1, 0], [0, 0], [0, 1]])
    times, more = words_beside(carried, present)
    near(times, torch.tensor([[2.0, 1], [0, 0], [2 / 3, 4 / 3]]), atol=1e-6)
    near(more, torch.tensor([[0.5, 0], [-0.5, -0.5], [-1 / 6, 1 / 6]]), atol=1e-6)


# ------------------------------------------------------------------------------------------------ The scripts


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    toy_data.render(folder / "clips", 45)
    return folder


SMALL = ("--data clips --workers 0 --batch-size 4 --device cpu --config frames=2 --config swin_dim=8 "
         "--config swin_depths=1,1,1,1 --config vit_layers=1 --config tokenizer_layers=1")


def run(script, flags, home, monkeypatch, steps=2):
    monkeypatch.chdir(home)
    script.train(script.parse(f"{SMALL} {flags} --max-steps {steps}".split()), set_up("cpu", "fp32"))


def weights(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize("target, encoder", KINDS[1:3])         # the first is test_scripts.py's
def test_each_kind_trains_resumes_and_labels_pretraining(home, monkeypatch, capsys, target, encoder):
    kind = f"--target {target} --encoder {encoder} --warm 0.5"
    whole, parts = f"{target}-{encoder}", f"{target}-{encoder}-parts"
    run(train_tokenizer, f"{kind} --out {whole}", home, monkeypatch, steps=3)
    said = capsys.readouterr().out
    assert ("squared error of pixels" in said) == (target == "pixels") and "codes in use" in said
    assert (home / whole / "codebook.png").exists() and (home / whole / "curves.png").exists()

    monkeypatch.setattr(train_tokenizer, "finish", lambda *_: None)
    optimise = train_tokenizer.Run.optimise

    def stops_after_two(self, losses):
        optimise(self, losses)
        self.stop = self.step == 2
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_tokenizer.Run, "optimise", stops_after_two)
        run(train_tokenizer, f"{kind} --out {parts}", home, monkeypatch, steps=3)
    for other in ("--target words" if target == "pixels" else "--target pixels",
                  "--encoder vit" if encoder == "videoswin" else "--encoder videoswin"):
        with pytest.raises(InputError, match=f"tokenizer_{other.split()[0][2:]} of"):
            run(train_tokenizer, f"{kind} --out {parts} --resume {other}", home, monkeypatch, steps=3)
    run(train_tokenizer, f"{kind} --out {parts} --resume", home, monkeypatch, steps=3)
    one, two = weights(home / whole / "last.pt"), weights(home / parts / "last.pt")
    assert all(torch.equal(one[name], two[name]) for name in one)

    monkeypatch.setattr(pretrain, "finish", lambda *_: None)
    codes = "kept" if encoder == "vit" else "auto"
    flags = f"--init-video none --tokenizer {whole}"
    run(pretrain, f"{flags} --codes {codes} --out p-{whole}", home, monkeypatch)
    said = capsys.readouterr().out
    assert ("labels: online" in said and "neighbours" in said) == (encoder == "videoswin")
    assert ("labels: kept" in said) == (encoder == "vit") and (home / f"p-{whole}/last.pt").exists()
    if encoder == "videoswin":
        with pytest.raises(InputError, match="--codes kept.*neighbours"):
            run(pretrain, f"{flags} --codes kept --out never", home, monkeypatch)
        assert not (home / "never").exists()


@pytest.mark.parametrize("flags, named", [
    ("--target pixels --loss bce", "--loss bce"),
    ("--target pixels --loss focal", "--loss focal"),
    ("--target pixels --word-weight 3", "--word-weight 3"),
    ("--config tokenizer_target=pixels", "--target"),
    ("--config tokenizer_encoder=videoswin", "--encoder"),
])
def test_what_does_not_go_together_ends_in_one_line(home, monkeypatch, capsys, flags, named):
    with pytest.raises(SystemExit) as end:
        run_script(lambda: run(train_tokenizer, flags + " --out bad", home, monkeypatch))
    said = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(said) == 1 and said[0].startswith("error:") and named in said[0]
    assert not (home / "bad").exists()


def test_a_checkpoint_older_than_a_field_has_its_presets(tiny):
    for config in (Config.toy(), Config.paper()):
        older = {name: value for name, value in asdict(config).items()
                 if not name.startswith(("swin_", "pixel_", "tokenizer_target", "tokenizer_encoder"))}
        assert config_of({"config": older}) == config
    assert changed(Config.toy(), ["swin_depths=1,1,1,1"]).swin_depths == (1, 1, 1, 1)
    with pytest.raises(InputError):
        config_of({"config": {**asdict(tiny), "no_such_field": 1}})
