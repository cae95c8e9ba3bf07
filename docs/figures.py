"""Draws Figs. 1 and 5 of the paper from the numbers in its tables: `python docs/figures.py`."""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))
from toy_data.pictures import FAINT, INK, SERIES, SMALL, grid, save, scatter, write

# Every method whose parameters and FLOPs Table 1 gives. R@10, of text-to-video retrieval, is from Table 2,
# all else from Table 1; None where they are silent. The scores of all-in-one-T but TGIF-Frame are starred
# there: the E-ViLM authors measured them, with the released checkpoint.
COLUMNS = ("parameters (M)", "GFLOPs", "TGIF-Frame (%)", "MSRVTT-QA (%)", "MSVD-QA (%)", "MSRVTT R@10 (%)")
METHODS = {
    "E-ViLM":       (16,  12.2, 60.7, 39.3, 41.5, 64.4),
    "all-in-one-T": (12,  18.1, 53.9, 36.8, 32.2, 53.1),
    "all-in-one-S": (33,  134,  64.0, 39.5, 41.7, None),
    "all-in-one-B": (110, 235,  64.2, 42.9, 46.5, 71.9),
    "ClipBERT":     (137, 3800, 60.3, 37.4, None, 59.9),
    "JustAsk":      (157, 4400, None, 41.5, 46.3, None),
    "VIOLET":       (198, 4900, 68.9, 43.9, 47.9, 73.6),
}
COLOURS = {"E-ViLM": SERIES[1], **dict.fromkeys(("all-in-one-T", "all-in-one-S", "all-in-one-B"), SERIES[0])}
OUR_COST = 7.4, 14.8  # as `python evilm.py` counts: G multiply-adds, and GFLOPs at two a multiply-add


def panel(cost, score, area, our_cost=None):
    """One column over another, a dot per method that has both; `area` turns parameters into pixels."""
    dots, bars = [], []
    for method, numbers in METHODS.items():
        row, colour = dict(zip(COLUMNS, numbers)), COLOURS.get(method, FAINT)
        if row[score] is not None:
            dots.append((f"{method}, {numbers[0]} M", row[cost], row[score], area(numbers[0]), colour))
        if method == "E-ViLM" and our_cost:
            bars.append((*our_cost, row[score], colour))
    return scatter(score, cost, dots, bars)


def figure1(path):
    panels = [panel("GFLOPs", score, lambda parameters: 8 * parameters, OUR_COST) for score in COLUMNS[2:]]
    caption = ("A dot's area shows the parameters. The bar through E-ViLM is this code's count beside the "
               "paper's 12.2: 7.4 G multiply-adds, 14.8 GFLOPs with multiply and add apart; 16.3 M "
               "parameters. All scores are the paper's.")
    save(path, "Fig. 1: accuracy and cost, from Tables 1 and 2 of the paper",
         [grid(panels, 2, gap=48, gap_below=32), write(caption, 1300, SMALL, INK)], gap_below=28, heavy=0)


def figure5(path):
    caption = ("All numbers are those of the paper's Table 1; this code counts 16.3 M parameters in E-ViLM, "
               "as the paper's Table 8 does.")
    dots = panel("parameters (M)", "MSRVTT-QA (%)", lambda parameters: 250)
    save(path, "Fig. 5: MSRVTT-QA and parameters",
         [dots, write(caption, 650, SMALL, INK)], gap_below=28, heavy=0)


if __name__ == "__main__":
    figure1(DOCS / "figure1.png")
    figure5(DOCS / "figure5.png")
