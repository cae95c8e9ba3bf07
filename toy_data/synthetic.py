"""A small world with a grammar: shapes that move over backgrounds, and what can be said and asked about them.

It stands in for the paper's 2.5M web videos: it renders in seconds, every claim about a clip can be checked,
and its words are long-tailed as those of real captions are, which is what the focal loss of Eq. (6) is for.

All clips come in groups of five that differ in what one question asks, so that each of the question's options
is the answer once and text alone tells nothing. In this order: the grammar as tables, a scene, saying it,
asking about it, grouping, the plan of all files, drawing, writing.
"""

import itertools
import json
import os
import shutil
from bisect import bisect
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from toy_data.clips import DataError, is_true

SYNTHETIC = "data/toy"          # rendered on first use; no other folder is
VERSION = 3
SIZE, FRAMES = 64, 12           # pixels a side, frames a clip

# ---- the grammar: what there is, commonest first ------------------------------------------------------
COLOURS = {
    "red": (226, 32, 32), "blue": (36, 72, 240), "green": (20, 196, 48), "yellow": (246, 226, 20),
    "purple": (136, 28, 206), "white": (246, 246, 246), "orange": (246, 128, 8), "pink": (246, 124, 192),
    "cyan": (20, 222, 232),
}
SHAPES = ("circle", "ring", "triangle", "cross", "ladder", "fence")
SIZES = ("large", "small", "medium")                     # medium is what is left unsaid
PIXELS = {"large": (40, 44), "medium": (31, 34), "small": (22, 24)}
PIXELS_IN_HALF = {"large": (28, 29), "medium": (24, 25), "small": (18, 19)}     # where two share the frame
BACKGROUNDS = {     # muted, so that none resembles a thing's colour: the ground, its shade, its light
    "grass": ((92, 106, 78), (76, 92, 64), (108, 120, 92)),
    "sand": ((168, 154, 126), (154, 140, 112), (180, 168, 142)),
    "water": ((78, 100, 120), (66, 88, 108), (98, 120, 138)),
    "snow": ((146, 156, 172), (136, 146, 164), (168, 178, 192)),
    "bricks": ((118, 86, 76), (106, 76, 68), (146, 132, 122)),
    "night": ((44, 46, 66), (36, 38, 56), (150, 150, 140)),
}
BOXES = {           # the part of the frame a thing keeps to: left, top, width, height
    "": (0, 0, 64, 64), "top": (0, 0, 64, 32), "bottom": (0, 32, 64, 32),
    "left-half": (0, 0, 32, 64), "right-half": (32, 0, 32, 64),
}
PLAIN = ("left", "right", "up", "down", "still")
ACTIONS = ("jumps", "blinks", "swells", "shakes", "flashes")
COUNTS = {"twice": "011100011100", "thrice": "011001100110"}     # the frames in which it is under way
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
TRANSITIONS = tuple(f"{a}-then-{b}" for a in PLAIN for b in PLAIN if a != b)
REPEATED = tuple(f"{action}-{count}" for action in ACTIONS for count in COUNTS)
HELD_OUT = {        # these occur only in test: the words are common, the combination is new
    ("red", "cross"), ("blue", "triangle"), ("green", "ring"), ("yellow", "circle"), ("purple", "triangle"),
    ("white", "ring"),
}

# ---- the grammar: how it is said, the usual form first ------------------------------------------------
USUAL = (0.7, 0.15, 0.08, 0.04, 0.03)
FORMS = {
    "a": ("a", "the"), "large": ("large", "big", "huge"), "small": ("small", "little", "tiny"),
    "purple": ("purple", "violet"), "cyan": ("cyan", "turquoise"), "circle": ("circle", "disc"),
    "cross": ("cross", "plus"), "ring": ("ring", "hoop"),
    "moves": ("moves", "slides", "drifts", "keeps moving", "glides"),
    "stays": ("stays", "remains", "stands"), "stops": ("stops", "halts"),
    "jumps": ("jumps", "hops"), "blinks": ("blinks", "vanishes"), "swells": ("swells", "grows"),
    "shakes": ("shakes", "wobbles"), "flashes": ("flashes", "darkens"),
    "twice": ("twice", "two times"), "thrice": ("three times", "thrice"),
    "and then": ("and then", "then"), "and": ("and", "while"),
    "order": ("usual", "there is", "colour last", "background first"),
}
SETTING = {name: f"on {name}" for name in BACKGROUNDS} | {"night": "at night"}
WHERE = {
    "top": "at the top", "bottom": "at the bottom", "left-half": "on the left", "right-half": "on the right",
}
BESIDE = {"top": "above", "bottom": "below", "left-half": "beside", "right-half": "beside"}

# ---- the grammar: what a question asks ----------------------------------------------------------------
# The kinds of a split's groups, in a cycle; "motion" is a caption group that differs in plain motions.
KINDS = ("caption", "action", "transition", "caption", "motion",
         "caption", "action", "caption", "transition", "caption")
TEST_KINDS = ("caption", "action", "transition", "motion", "caption", "action", "caption", "transition",
              "caption", "caption", "motion", "action", "caption", "transition", "caption", "caption")
# What the clips of other caption groups differ in {attribute: number of values}, and a group's weight.
CHANGES = (
    ({"colour": 5}, 25), ({"shape": 5}, 16), ({"background": 5}, 10),
    ({"colour": 3, "shape": 3}, 17), ({"size": 2, "colour": 3}, 5), ({"size": 2, "shape": 3}, 5),
    ({"binding": 3}, 10),       # which colour belongs to which of two shapes
)
POWERS = {"colour": 0.5, "shape": 0.5, "size": 0.0, "motion": 0.0, "background": 0.4}   # weights 1/r^power
VALUES = {"colour": tuple(COLOURS), "shape": SHAPES, "size": ("large", "small"), "motion": PLAIN,
          "background": tuple(BACKGROUNDS)}


# ---- a scene ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Thing:
    colour: str
    shape: str
    size: str
    motion: str         # one word for the whole clip: "left", "left-then-up", "jumps-twice"
    place: str = ""     # its half of the frame, where two things share it

    def attributes(self):
        """Every word that holds of it; one that jumps twice also jumps."""
        words = [self.colour, self.shape, self.size, self.motion]
        if self.motion in REPEATED:
            words.append(self.motion.split("-")[0])
        if self.place:
            words += [self.place, BESIDE[self.place]]
        return words


@dataclass(frozen=True)
class Scene:
    things: tuple       # one Thing or two, in the order in which they are said
    background: str

    def shows(self):
        return [thing.attributes() for thing in self.things] + [["background", self.background]]

    def holds_unseen(self):
        return any((thing.colour, thing.shape) in HELD_OUT for thing in self.things)

    def can_be(self):
        """Whether each thing has room for its motion, and no two share both colour and shape."""
        names = {(thing.colour, thing.shape) for thing in self.things}
        fits = [can_move(thing.motion, thing.place, thing.size) for thing in self.things]
        return len(names) == len(fits) and all(fits)

    def change(self, index, **values):
        things = list(self.things)
        things[index] = replace(things[index], **values)
        return replace(self, things=tuple(things))


def draw(generator, names, power=0.0, count=None):
    """One of `names`, or `count` different ones; the r-th has weight 1/r^power."""
    weights = 1 / np.arange(1, len(names) + 1) ** power
    chosen = generator.choice(len(names), count, replace=False, p=weights / weights.sum())
    return names[chosen] if count is None else [names[i] for i in chosen]


def usual(forms, at):
    """The form at the quantile `at` (0 to 1) of a distribution with weights USUAL[:len(forms)]."""
    ends = list(itertools.accumulate(USUAL[:len(forms)]))
    return forms[bisect(ends, at * ends[-1])]


def can_move(motion, place, size):
    """Whether a half has room for a motion: across it only jumps or shakes, of small or medium things."""
    if not place:
        return True
    across = {"up", "down", "jumps"} if place in ("top", "bottom") else {"left", "right", "shakes"}
    return not across & set(motion.split("-")) or (motion in REPEATED and size != "large")


def draw_thing(generator, place=""):
    colour, shape = (draw(generator, VALUES[name], POWERS[name]) for name in ("colour", "shape"))
    size = draw(generator, SIZES)
    family = (PLAIN, REPEATED, TRANSITIONS)[generator.choice(3, p=(0.6, 0.25, 0.15))]
    motion = draw(generator, [motion for motion in family if can_move(motion, place, size)])
    return Thing(colour, shape, size, motion, place)


def draw_scene(generator, unseen, count=None):
    """A scene of `count` things, of one or two where that is left open; with a held-out pair if `unseen`."""
    count = count or 1 + int(generator.random() < 0.35)
    halves = draw(generator, [("top", "bottom"), ("left-half", "right-half")])
    places = draw(generator, halves, count=2) if count == 2 else [""]
    background = draw(generator, VALUES["background"], POWERS["background"])
    scene = Scene(tuple(draw_thing(generator, place) for place in places), background)
    if not unseen:
        return scene
    colour, shape = draw(generator, sorted(HELD_OUT))
    return scene.change(0, colour=colour, shape=shape)


# ---- saying it ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Wording:
    """The free choices of a caption. With one wording, five scenes' captions differ only as the scenes do."""
    words: dict         # the grammar's word -> the form used
    fields: tuple       # what is said of each thing, besides colour and shape
    background: bool


def draw_wording(generator, scene, must=frozenset()):
    """How to say a scene; `must` holds pairs of a thing's index and what has to be said of it."""
    words = {word: usual(forms, at) for (word, forms), at in zip(FORMS.items(), generator.random(len(FORMS)))}
    if words["order"] == "there is":
        words["a"] = "a"
    two = len(scene.things) == 2
    both = two and (generator.random() < 0.85 or any(index == 1 for index, _ in must))
    related = both and generator.random() < 0.2
    chances = {"size": 0.4, "motion": 0.8, "count": 0.5, "place": 0.05 if both else 0.5 * two}
    fields = []
    for index, thing in enumerate(scene.things[:1 + both]):
        said = {name for name, chance in chances.items() if generator.random() < chance}
        # A thing that swells has no fixed size, and medium is never said.
        if thing.size == "medium" or thing.motion.startswith("swells"):
            said.discard("size")
        # "a red ring moves left above a blue star"; never "a red ring and a blue star moves left".
        if index == 1 and (related or "motion" not in fields[0]):
            said.discard("motion")
        if both and "motion" not in said:       # "a ring and a star on the left" is not clear
            said.discard("place")
        fields.append(said | {name for i, name in must if i == index})
    if related and "motion" not in fields[1]:
        fields[1].add("relation")
    background = (None, "background") in must or generator.random() < 0.5
    return Wording(words, tuple(fields), background)


def say_motion(motion, counted, words):
    """'moves left', 'stays still and then moves up', 'jumps three times'."""
    if motion in REPEATED:
        action, count = motion.split("-")
        return f"{words[action]} {words[count]}" if counted else words[action]
    first, then, second = motion.partition("-then-")
    moves = "moves" if then and words["moves"] == "keeps moving" else words["moves"]
    said = f"{words['stays']} still" if first == "still" else f"{moves} {first}"
    if second == "still":
        second = words["stops"]
    elif first == "still":
        second = f"{moves} {second}"
    return f"{said} {words['and then']} {second}" if then else said


def say_thing(thing, fields, wording):
    """(its caption, its claims)"""
    words = wording.words
    names = {name: words.get(value, value) for name, value in vars(thing).items()}
    said, claims = [names["colour"], names["shape"]], [thing.colour, thing.shape]
    if words["order"] == "colour last":
        said = [names["shape"], "in", names["colour"]]
    if "size" in fields:
        said.insert(0, names["size"])
        claims.append(thing.size)
    said.insert(0, "an" if words["a"] == "a" and said[0] == "orange" else words["a"])
    if "place" in fields:
        said.append(WHERE[thing.place])
        claims.append(thing.place)
    if "motion" in fields:
        counted = "count" in fields or thing.motion not in REPEATED
        said += ["that"] * (words["order"] == "there is") + [say_motion(thing.motion, counted, words)]
        claims.append(thing.motion if counted else thing.motion.split("-")[0])
    return " ".join(said), claims


def say(scene, wording):
    """(caption, what it claims): the claims are lists of the grammar's own words, as in `Scene.shows`."""
    said = [say_thing(thing, fields, wording) for thing, fields in zip(scene.things, wording.fields)]
    texts, claims = [text for text, _ in said], [claim for _, claim in said]
    joint, order = "and", wording.words["order"]
    if len(said) == 2 and "relation" in wording.fields[1]:
        joint = BESIDE[scene.things[0].place]
        claims = [claim + [BESIDE[thing.place]] for claim, thing in zip(claims, scene.things)]
    elif all("motion" in fields for fields in wording.fields):
        joint = wording.words["and"]        # "while" joins two motions, not two names
    caption = "there is " * (order == "there is") + f" {joint} ".join(texts)
    if wording.background:
        claims.append(["background", scene.background])
        setting = SETTING[scene.background]
        caption = f"{setting} {caption}" if order == "background first" else f"{caption} {setting}"
    return caption, claims


# ---- asking about it ----------------------------------------------------------------------------------
def questions(scene, generator):
    """One to three questions of different kinds, each with one answer: (kind, question, answer)."""
    asked = {"count": [("how many things are there?", ("one", "two")[len(scene.things) - 1])],
             "background": [("what is in the background?", scene.background)]}
    for thing in scene.things:
        others = [other for other in scene.things if other is not thing]
        if all(other.shape != thing.shape for other in others):
            asked.setdefault("colour", []).append((f"what colour is the {thing.shape}?", thing.colour))
        if all(other.colour != thing.colour for other in others):
            asked.setdefault("shape", []).append((f"what shape is the {thing.colour} thing?", thing.shape))
        if others:
            question = f"where is the {thing.colour} {thing.shape}?"
            asked.setdefault("where", []).append((question, thing.place.removesuffix("-half")))
    kinds = draw(generator, list(asked), count=int(generator.integers(1, 4)))
    return [(kind, *draw(generator, asked[kind])) for kind in kinds]


# ---- grouping -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Group:
    """Five scenes and the question they share: option i is true of scene i and of no other."""
    kind: str           # caption, action, transition
    changed: tuple      # what the scenes differ in
    must: frozenset     # what a caption of theirs has to say
    scenes: tuple
    question: str
    options: tuple
    claims: tuple       # what each option claims


def is_sound(group):
    """Whether the five scenes are possible and differ, and each option is true of its own scene only."""
    if min(len(set(group.scenes)), len(set(group.options))) < 5 or not all(map(Scene.can_be, group.scenes)):
        return False
    shown = [scene.shows() for scene in group.scenes]
    return all(is_true(claim, shown[j]) == (i == j) for i, claim in enumerate(group.claims) for j in range(5))


def varied(generator, scene, changes):
    """(what captions must say, scenes that differ in nothing but the changes)"""
    index = int(generator.integers(len(scene.things)))
    if "binding" in changes:
        pairs = itertools.permutations(draw(generator, VALUES["colour"], POWERS["colour"], 3), 2)
        return {(1, "shape")}, [scene.change(0, colour=a).change(1, colour=b) for a, b in pairs]
    if "motion" in changes and len(scene.things) == 2:
        # A half has room for three plain motions only, so both things change.
        along = [motion for motion in PLAIN if can_move(motion, scene.things[0].place, "large")]
        pairs = itertools.product(along, repeat=2)
        must = {(0, "motion"), (1, "motion")}
        return must, [scene.change(0, motion=a).change(1, motion=b) for a, b in pairs]
    values = [draw(generator, VALUES[name], POWERS[name], count) for name, count in changes.items()]
    if "background" in changes:
        return {(None, "background")}, [replace(scene, background=name) for name in values[0]]
    combinations = [dict(zip(changes, combination)) for combination in itertools.product(*values)]
    return {(index, name) for name in changes}, [scene.change(index, **values) for values in combinations]


def caption_group(generator, changes, unseen):
    scene = draw_scene(generator, unseen, 2 if "binding" in changes else None)
    if "binding" in changes and scene.things[0].shape == scene.things[1].shape:
        return None     # the swap of its colours would be the same scene
    must, scenes = varied(generator, scene, changes)
    scenes = tuple(draw(generator, scenes, count=5))
    wording = draw_wording(generator, scenes[0], must)
    options, claims = zip(*[say(scene, wording) for scene in scenes])
    return Group("caption", tuple(changes), frozenset(must), scenes, "", options, claims)


def action_group(generator, unseen):
    scene, count = draw_scene(generator, unseen), draw(generator, list(COUNTS))
    index = int(generator.integers(len(scene.things)))
    name = f"{scene.things[index].colour} {scene.things[index].shape}"
    actions = tuple(draw(generator, ACTIONS, count=5))
    scenes = tuple(scene.change(index, motion=f"{action}-{count}") for action in actions)
    claims = tuple([[*name.split(), f"{action}-{count}"]] for action in actions)
    question = f"what does the {name} do {FORMS[count][0]}?"
    return Group("action", ("motion",), frozenset(), scenes, question, actions, claims)


def transition_group(generator, unseen):
    """The question asks for the second motion; where it equals the first, the first simply continues."""
    scene, first = draw_scene(generator, unseen, count=1), draw(generator, PLAIN)
    name = f"{scene.things[0].colour} {scene.things[0].shape}"
    seconds = draw(generator, PLAIN, count=5)
    motions = [first if second == first else f"{first}-then-{second}" for second in seconds]
    said = {motion: f"moves {motion}" for motion in PLAIN} | {"still": "stops"}
    said[first] = "stays still" if first == "still" else f"keeps moving {first}"
    question = f"what does the {name} do after {'staying' if first == 'still' else 'moving'} {first}?"
    scenes = tuple(scene.change(0, motion=motion) for motion in motions)
    claims = tuple([[*name.split(), motion]] for motion in motions)
    options = tuple(said[second] for second in seconds)
    return Group("transition", ("motion",), frozenset(), scenes, question, options, claims)


def draw_group(generator, kind, unseen, taken, known):
    """A sound group of scenes that no other split has, with held-out pairs if it is an `unseen` one."""
    weights = np.array([weight for _, weight in CHANGES])
    changes = CHANGES[generator.choice(len(CHANGES), p=weights / weights.sum())][0]
    make = {"action": action_group, "transition": transition_group,
            "motion": partial(caption_group, changes={"motion": 5}),
            "caption": partial(caption_group, changes=changes)}[kind]
    for _ in range(5000):
        group = make(generator, unseen=unseen)
        if group and is_sound(group) and is_known(group.options, known) and not taken & set(group.scenes):
            if any(map(Scene.holds_unseen, group.scenes)) == unseen:
                return group
    raise DataError("--clips: too many for every split to have scenes of its own; ask for fewer")


def is_known(texts, known):
    """Whether all words of `texts` are in the set `known`; with None, always."""
    return known is None or all(known.issuperset(text.split()) for text in texts)


def draw_caption(generator, scene, must, known, used):
    """(caption, claims), in known words, and not used before if that comes easily."""
    for attempt in range(30):
        caption, claims = say(scene, draw_wording(generator, scene, must))
        if is_known([caption], known) and (attempt > 3 or caption not in used):
            break
    used.add(caption)
    return caption, claims


# ---- the plan: every split's groups, and the rows of every file ---------------------------------------
def plan(clips, seed):
    """(the scenes of all clips, {file: its rows}). No scene is in two splits; where train is large enough to
    have all words, val and test are worded in those of its captions."""
    scenes, files, taken, words = [], {}, set(), set()
    val, test = min(max(3, clips // 125), 80), min(max(3, clips // 31), 320)    # groups; 3 cover all kinds
    sizes = {"train": clips // 5 - val - test, "val": val, "test": test}
    for number, (split, size) in enumerate(sizes.items()):
        kinds = TEST_KINDS if split == "test" else KINDS
        known = words if split != "train" and clips >= 500 else None
        rows, used = {}, set()
        for index in range(size):
            generator = np.random.default_rng([seed, number, index])
            # Two test groups of nine have a held-out pair, in one clip or all: a sixth or so of the clips.
            unseen = split == "test" and index % 9 in (1, 5)
            group = draw_group(generator, kinds[index % len(kinds)], unseen, taken, known)
            for name, row in group_rows(generator, group, len(scenes), known, used):
                rows.setdefault(f"{name}_{split}".removeprefix("captions_"), []).append(row)
            scenes += group.scenes
        if split == "test":
            rows["test"] = tell_apart(rows["test"][:400])
        if split == "train":
            words = {word for row in rows["train"] for word in row["caption"].split()}
        taken.update(scenes)
        files |= rows
    return scenes, files


def group_rows(generator, group, first, known, used):
    """The rows of a group's five clips, `first` being the number of the first: pairs (file, row)."""
    for answer, scene in enumerate(group.scenes):
        common = {"video": video_name(first + answer), "unseen": scene.holds_unseen()}
        caption, claims = draw_caption(generator, scene, group.must, known, used)
        yield "captions", common | {"caption": caption, "says": claims, "shows": scene.shows()}
        yield f"mc_{group.kind}", common | {
            "question": group.question, "options": group.options, "answer": answer,
            "changed": group.changed, "says": group.claims,
        }
        for kind, question, word in questions(scene, generator):
            yield "qa", common | {"question": question, "answer": word, "kind": kind}
        motion = scene.things[0].motion
        if len(scene.things) == 1 and motion not in TRANSITIONS:
            yield "action", common | {"label": motion.split("-")[0]}


def tell_apart(rows, most=200):
    """Rows whose captions are true of their own clip alone, found by taking the least entangled first."""
    clash = np.array([[is_true(a["says"], b["shows"]) for b in rows] for a in rows])
    clash |= clash.T
    chosen = []
    for i in np.argsort(clash.sum(1), kind="stable"):
        if len(chosen) < most and not clash[i, chosen].any():
            chosen.append(int(i))
    return [rows[i] for i in sorted(chosen)]


def video_name(number):
    return f"clips/{number:05d}.gif"


# ---- drawing ------------------------------------------------------------------------------------------
@cache
def silhouette(shape, side):
    """Two (side, side) bool: where the shape is, and where it is without its edge."""
    v, u = (2 * np.mgrid[:side, :side] + 1 - side) / side       # -1 to 1, downwards and to the right
    radius = np.hypot(u, v)
    if shape in ("ladder", "fence"):    # three rungs between two rails; three pales on one rail
        bars = np.floor((v if shape == "ladder" else u) * 2.5 + 2.5) % 2 == 0
        rails = np.abs(u) >= 0.7 if shape == "ladder" else np.abs(v) <= 0.15
        inside = (bars | rails) & (np.abs(u) <= 0.95) & (np.abs(v) <= 0.95)
    else:
        inside = {
            "circle": radius <= 1,
            "ring": (radius <= 1) & (radius >= 0.55),
            "triangle": (abs(u) <= (v + 1) / 2) & (v <= 0.85),
            "cross": np.minimum(abs(u), abs(v)) <= 0.36,
        }[shape]
    padded = np.pad(inside, 1)
    core = inside & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside, core


def draw_background(name, generator):
    """(SIZE, SIZE) of 0 to 2: the ground, its shade, its light."""
    y, x = np.mgrid[:SIZE, :SIZE] + generator.integers(0, 24, (2, 1, 1))
    grains = generator.random((SIZE, SIZE))
    if name == "grass":     # blades: grains three pixels high
        return np.repeat((grains < 0.25) + 2 * (grains > 0.88), 3, 0)[:SIZE]
    if name == "sand":
        return (grains < 0.12) + 2 * (grains > 0.94)
    if name == "water":     # waves
        wave = (y + np.round(2 * np.sin(x / 5)).astype(int)) % 12
        return 1 * (wave < 3) + 2 * (wave == 5)
    if name == "snow":      # flakes: grains of two by two
        flakes = np.repeat(np.repeat(grains[::2, ::2], 2, 0), 2, 1)
        return 1 * (flakes < 0.1) + 2 * (flakes > 0.95)
    if name == "bricks":
        joint = (y % 12 < 2) | ((x + 12 * (y // 12 % 2)) % 24 < 2)
        return np.where(joint, 2, 1 * (grains < 0.1))
    return 1 * (y // 16 % 2) + (grains > 0.99) * (2 - y // 16 % 2)      # night: dim bands and stars


def legs(motion, room, generator):
    """A thing's offset (x, y) in pixels in each frame, under one plain motion or two: (FRAMES, 2)."""
    motions, carried = motion.split("-then-"), np.zeros((FRAMES, 2))
    turns = np.linspace(0, FRAMES - 1, len(motions) + 1)
    for direction, start, end in zip(motions, turns, turns[1:]):
        done = np.clip((np.arange(FRAMES) - start) / (end - start), 0, 1)[:, None]
        carried += done * DIRECTIONS[direction] * room * generator.uniform(0.75, 1)
    return carried


def track(motion, pixels, box, generator):
    """In each frame the thing's corner (x, y), its side (0 where it has vanished), whether it is dark."""
    action, count = motion.split("-") if motion in REPEATED else ("", "")
    active = np.array([frame == "1" for frame in COUNTS.get(count, "0" * FRAMES)])
    sides = np.full(FRAMES, pixels)
    if action == "swells":
        sides = np.where(active, min(round(1.15 * pixels), *box[2:]), round(0.75 * pixels))
    room = np.array(box[2:]) - sides.max()
    offsets = np.zeros((FRAMES, 2))
    if action == "jumps":
        offsets[:, 1] = active * -min(0.6 * pixels, room[1])
    elif action == "shakes":    # alternates, mirrored in time, or it would look like a plain motion
        frame = np.arange(FRAMES)
        way = np.where(np.minimum(frame, frame[::-1]) % 2, 1, -1)
        offsets[:, 0] = active * way * min(0.5 * pixels, room[0] // 2)
    elif not action:
        offsets = legs(motion, room, generator)
    offsets = np.round(offsets).astype(int)
    # A random start among those that keep the whole path inside the box.
    start = generator.integers(-offsets.min(0), room - offsets.max(0) + 1)
    corners = offsets + start + box[:2] + (sides.max() - sides[:, None]) // 2
    return corners, np.where(active & (action == "blinks"), 0, sides), active & (action == "flashes")


def draw_clip(scene, generator):
    """(frames of palette indices (FRAMES, SIZE, SIZE) uint8, palette (n, 3) uint8)"""
    def jitter(colours, by):
        return list(np.clip(np.array(colours) + generator.integers(-by, by + 1, 3), 0, 254))

    palette = jitter(BACKGROUNDS[scene.background], 6)
    frames = np.repeat(draw_background(scene.background, generator)[None], FRAMES, 0).astype(np.uint8)
    for thing in scene.things:
        fill, (colour,) = len(palette), jitter([COLOURS[thing.colour]], 8)
        palette += [colour, colour // 3, 0 * colour]        # itself, its edge, itself in the dark
        pixels = generator.integers(*(PIXELS_IN_HALF if thing.place else PIXELS)[thing.size], endpoint=True)
        tracks = track(thing.motion, int(pixels), BOXES[thing.place], generator)
        for frame, (x, y), side, dark in zip(frames, *tracks):
            if side:    # in the dark the edge stays as bright as the shape was
                inside, core = silhouette(thing.shape, int(side))
                patch = frame[y:y + side, x:x + side]
                patch[inside] = fill if dark else fill + 1
                patch[core] = fill + 2 if dark else fill
    # Pillow drops a frame equal to the one before, so a corner pixel alternates between two close colours.
    frames[:, 0, 0] = len(palette) + np.arange(FRAMES) % 2
    return frames, np.array(palette + [palette[0], palette[0] + (0, 0, 1)]).astype(np.uint8)


# ---- writing ------------------------------------------------------------------------------------------
def write_clip(path, scene, generator):
    frames, palette = draw_clip(scene, generator)
    images = [Image.fromarray(frame) for frame in frames]
    for image in images:
        image.putpalette(palette.tobytes())
    images[0].save(path, save_all=True, append_images=images[1:], duration=120, loop=0, optimize=False)


def render(out, clips=10000, seed=0):
    """Draws the set into the folder `out`: whole, or not at all. The same bytes for the same seed."""
    out = Path(out)
    if clips < 45:
        raise DataError(f"--clips {clips}: at least 45, so that every split has every kind of question")
    if seed < 0:
        raise DataError(f"--seed {seed}: 0 or more")
    card = {"name": "synthetic", "clips": clips // 5 * 5, "seed": seed, "version": VERSION}
    if out.is_file() or out.is_dir() and any(out.iterdir()):
        try:
            found = json.loads((out / "set.json").read_text())
        except (OSError, ValueError):
            found = "something other than a synthetic set"
        if found != card:
            raise DataError(f"{out}: holds {found}, not {card}; give another folder as --out, or remove this")
        print(f"{out}: holds this set already")
        return
    scenes, files = plan(clips, seed)
    place = out.resolve()
    folder = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        (folder / "clips").mkdir(parents=True)
        for number, scene in enumerate(tqdm(scenes, "drawing clips", unit="clip", leave=False)):
            write_clip(folder / video_name(number), scene, np.random.default_rng([seed, number]))
        for name, rows in files.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "set.json").write_text(json.dumps(card) + "\n")
        if not (place / "set.json").exists():     # another process may have been faster
            folder.replace(place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def render_if_missing(folder):
    """Renders the set into data/toy on first use; no other folder is ever created."""
    if Path(folder) == Path(SYNTHETIC) and not Path(folder).exists():
        render(folder)
