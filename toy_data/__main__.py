"""Renders the synthetic set: python -m toy_data --out data/toy --clips 10000 --seed 0 --show"""

import argparse
from pathlib import Path

from toy_data.clips import errors_in_one_line, open_splits, read_clip
from toy_data.plots import contact_sheet
from toy_data.synthetic import SYNTHETIC, render


def show(out, test, count=12):
    """A contact sheet of clips from all over the test split."""
    rows = [test[i] for i in range(0, len(test), max(1, len(test) // count))][:count]
    sheet = [(read_clip(out / row["video"])[0][1::3], row["caption"]) for row in rows]
    contact_sheet(sheet, out / "sheet.png", "Clips of the synthetic set and their captions")
    print(f"{out / 'sheet.png'}: {len(rows)} clips with their captions")


def describe(out, train, val, test):
    clips = sum(1 for _ in (out / "clips").iterdir())
    print(f"{out}: {clips:,} clips; captions: {len(train):,} train, {len(val):,} val, {len(test):,} test")
    for row in (train[i] for i in range(0, len(train), len(train) // 3 + 1)):
        print(f"   {row['video']}  {row['caption']}")
    print(f"next: python pretrain.py --data {out}")


def main():
    parser = argparse.ArgumentParser(
        prog="python -m toy_data", description="Render the synthetic set: clips, captions, questions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path(SYNTHETIC), help="the folder to render into")
    parser.add_argument("--clips", type=int, default=10000, help="clips in all, in fives, at least 45")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same bytes")
    parser.add_argument("--show", action="store_true", help="draw a dozen clips to OUT/sheet.png")
    parser.error = lambda message: parser.exit(2, f"error: {message} (--help lists the flags)\n")
    args = parser.parse_args()
    with errors_in_one_line():
        render(args.out, args.clips, args.seed)
        splits = open_splits(args.out)
        if args.show:
            show(args.out, splits["test"])
        describe(args.out, **splits)


if __name__ == "__main__":
    main()
