"""Renders the synthetic set: python -m toy_data --out data/toy --clips 12000 --seed 0 --show"""

import argparse
import json
import sys
from pathlib import Path

from toy_data.clips import errors_in_one_line, read_clip
from toy_data.pictures import contact_sheet
from toy_data.synthetic import render


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m toy_data", description="Render the synthetic set: clips, captions, questions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("data/toy"), help="the folder to render into")
    parser.add_argument("--clips", type=int, default=12000, help="clips in all, in fives, at least 45")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same bytes")
    parser.add_argument("--show", action="store_true", help="draw a dozen clips to OUT/sheet.png")
    return parser.parse_args(arguments)


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def show(out, count=12):
    """A contact sheet of clips from all over the test split."""
    rows = read_rows(out / "test.jsonl")
    rows = rows[::max(1, len(rows) // count)][:count]
    sheet = [(read_clip(out / row["video"])[0][1::3], row["caption"]) for row in rows]
    contact_sheet(sheet, out / "sheet.png", title="Clips of the synthetic set and their captions")
    print(f"{out / 'sheet.png'}: {len(rows)} clips with their captions")


def describe(out):
    train, val, test = (read_rows(out / f"{split}.jsonl") for split in ("train", "val", "test"))
    words = {word for row in train for word in row["caption"].split()}
    clips = sum(1 for _ in (out / "clips").iterdir())
    print(f"{out}: {clips:,} clips; captions: {len(train):,} train, {len(val):,} val, {len(test):,} test, "
          f"of {len(words)} words")
    asked = {"mc_caption": "captions to choose from", "mc_action": "actions", "mc_transition": "transitions",
             "qa": "open questions", "action": "motion labels"}
    counts = [f"{len(read_rows(out / f'{name}_train.jsonl')):,} {what}" for name, what in asked.items()]
    print(f"   in train {', '.join(counts)}")
    for row in train[::len(train) // 3 + 1]:
        print(f"   {row['video']}  {row['caption']}")
    print(f"next: python pretrain.py --data {out}")


def main():
    arguments = parse_arguments(sys.argv[1:])
    with errors_in_one_line():
        render(arguments.out, arguments.clips, arguments.seed)
        if arguments.show:
            show(arguments.out)
        describe(arguments.out)


if __name__ == "__main__":
    main()
