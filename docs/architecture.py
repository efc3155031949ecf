"""Draw how the GPT reads a page, from the shipped model's real weights:  python -m docs.architecture

It writes images/architecture.png. Everything in the picture is measured: the page is one of a game that the shipped
model plays, and the tables, the attention and the answer are the model's.

Places and sizes are in inches, and y counts from the bottom.
"""

import harness.start  # before the slow imports

from itertools import islice
from pathlib import Path

import numpy as np
import torch
from matplotlib.patches import FancyArrowPatch, Polygon, Rectangle

from breakout_ascii import CHARACTERS, COLUMNS, ROWS, BreakoutAscii
from harness.figures import new_figure
from harness.messages import shown
from harness.options import Parser
from harness.supervise import run_script
from load_model import play
from policies import SHIPPED, load_policy
from viewer.replay.attention import attention, plain_gpt

OUT = Path(__file__).parent.parent / "images" / "architecture.png"
STEP = 469  # of the game with seed 0: the ball falls, and the paddle is far to its left
WIDTH, HEIGHT = 10.0, 6.95  # inches; GitHub shows an inch as about 84 pixels
PAPER, INK, GREY, FAINT = "#ffffff", "#1b2733", "#5c6b7a", "#d5dce3"
NIGHT = "#10161d"  # behind a page
COLOUR_OF = {
    "O": "#ff8c1a",
    "=": "#e0449a",
    "|": "#1f9fd6",
    "_": "#1f9fd6",
    "#": "#8795a3",
    "\n": "#12b35a",
    " ": "#a58bd6",
}
THINGS = {"ball": "O", "paddle": "=", "bricks": "_", "walls": "#", "line ends": "\n", "space": " "}  # for the legend
CURVES = {13: 0.18, 7: 0.22, 3: 0.42}  # heads whose attention is drawn on the page, and how much their lines bend


def text(figure, x, y, words, size=12, **how):
    """Write words that begin at x, with y in their middle; `how` is for matplotlib."""
    style = {"color": INK, "va": "center", "fontsize": size} | how
    figure.text(x / WIDTH, y / HEIGHT, words, **style)


def panel(figure, x, y, width, height, frame=False):
    """Return axes without ticks, with the lower left corner at x, y; `frame` draws a thin line around them."""
    axes = figure.add_axes([x / WIDTH, y / HEIGHT, width / WIDTH, height / HEIGHT])
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=frame, color=FAINT)
    return axes


def arrow(figure, start, end):
    """Draw an arrow between two places (x, y)."""
    figure.add_artist(
        FancyArrowPatch(
            (start[0] / WIDTH, start[1] / HEIGHT),
            (end[0] / WIDTH, end[1] / HEIGHT),
            transform=figure.transFigure,
            arrowstyle="-|>",
            mutation_scale=16,
            linewidth=1.8,
            color=GREY,
        )
    )


def heading(figure, x, y, number, words):
    """Write the number of a stage in a disc, and its heading behind it."""
    disc = {"boxstyle": "circle,pad=0.25", "facecolor": INK, "edgecolor": "none"}
    text(figure, x + 0.12, y, str(number), 12, color=PAPER, ha="center", weight="bold", bbox=disc)
    text(figure, x + 0.38, y, words, 13, weight="bold")


def draw_page(axes, page, weights):
    """Draw a page and, as lines from its last position, where the heads in CURVES look, for weights (H, 1944)."""
    axes.set(xlim=(-1, COLUMNS + 0.6), ylim=(ROWS - 0.2, -0.8), facecolor=NIGHT)
    for token in np.flatnonzero((page != ord(" ")) & (page != ord("\n"))):
        character = chr(page[token])
        style = {"family": "monospace", "fontsize": 8.6, "ha": "center", "va": "center", "zorder": 4}
        style |= {"color": COLOUR_OF[character], "weight": "bold" if character in "O=" else "normal"}
        axes.text(token % COLUMNS, token // COLUMNS, character, **style)
    last = (COLUMNS - 1, ROWS - 1)
    for head, bend in CURVES.items():
        for token in np.flatnonzero(weights[head] > 0.03):
            line = FancyArrowPatch(
                last,
                (token % COLUMNS, token // COLUMNS),
                connectionstyle=f"arc3,rad={bend}",
                arrowstyle="-",
                color=COLOUR_OF[chr(page[token])],
                alpha=0.8,
                linewidth=0.6 + 2.2 * weights[head, token],
                shrinkA=4,
                shrinkB=4,
            )
            axes.add_patch(line)
    style = {"facecolor": COLOUR_OF["\n"], "edgecolor": "none", "zorder": 5}
    axes.add_patch(Rectangle((last[0] - 0.7, last[1] - 0.6), 1.4, 1.2, **style))
    axes.text(*last, "↵", color=PAPER, fontsize=10, ha="center", va="center", zorder=6, weight="bold")


def draw_table(figure, x, y, height, weight, chosen, label):
    """Draw an embedding table (n, 64) as colours, with a mark and a label at the chosen row."""
    axes = panel(figure, x, y, 1.75, height, frame=True)
    axes.imshow(weight, cmap="RdBu_r", vmin=-2, vmax=2, aspect="auto", interpolation="nearest")
    axes.axhspan(chosen - 0.5, chosen + 0.5, facecolor="none", edgecolor=COLOUR_OF["O"], linewidth=1.8, clip_on=False)
    middle = y + height * (1 - (chosen + 0.5) / len(weight))  # of the chosen row
    text(figure, x + 1.85, middle, label, 11.5, color=COLOUR_OF["O"], weight="bold")


def draw_embedding(figure, gpt, page, x, top):
    """Draw the three tables, and the sum of three of their rows that stands for the ball."""
    token = int((page == ord("O")).argmax())
    row, column = divmod(token, COLUMNS)
    parts = [
        (0.42, gpt.wte.weight.numpy(), CHARACTERS.index("O"), "“O”"),
        (0.72, gpt.wre.weight.numpy(), row, f"row {row}"),
        (1.25, gpt.wce.weight.numpy(), column, f"column {column}"),
    ]
    y = top
    total = 0
    for number, (height, weight, chosen, label) in enumerate(parts):
        y -= height
        draw_table(figure, x, y, height, weight, chosen, label)
        total = total + weight[chosen]
        if number < 2:
            text(figure, x + 0.87, y - 0.13, "+", 14, ha="center", color=GREY)
        y -= 0.26
    text(figure, x + 0.87, y + 0.13, "=", 14, ha="center", color=GREY)
    axes = panel(figure, x, y - 0.2, 1.75, 0.2, frame=True)
    axes.imshow(total[None], cmap="RdBu_r", vmin=-2, vmax=2, aspect="auto", interpolation="nearest")
    text(figure, x + 1.85, y - 0.1, "64 numbers", 11.5, weight="bold")


def draw_heads(figure, page, weights, x, y):
    """Draw where each of the 16 heads looks, (16, 1944), as small pages with a circle where a weight is large."""
    width, height, gap = 1.1, 0.42, 0.08
    colours = np.array([COLOUR_OF[chr(code)] for code in page])
    for head in range(16):
        left = x + (head % 4) * (width + gap)
        bottom = y + (3 - head // 4) * (height + gap)
        axes = panel(figure, left, bottom, width, height)
        axes.set(xlim=(-3, COLUMNS + 2), ylim=(ROWS + 1, -2), facecolor=NIGHT)
        drawn = np.flatnonzero(weights[head] > 0.01)
        sizes = 3 + 55 * weights[head, drawn]
        places = {"x": drawn % COLUMNS, "y": drawn // COLUMNS}
        axes.scatter(**places, s=sizes, c=colours[drawn], linewidths=0, alpha=0.9)
        axes.text(-1.5, 2.2, str(head), color="#b8c4d0", fontsize=9, va="center")


def draw_legend(figure, x, y):
    """Name the things on a page in their colours."""
    for name, character in THINGS.items():
        text(figure, x, y, f"● {name}", 11, color=COLOUR_OF[character])
        x += 0.37 + 0.083 * len(name)


def draw_mlp(figure, x, y):
    """Draw an MLP that widens 64 numbers to 256 and narrows them again."""
    axes = panel(figure, x, y - 0.55, 1.1, 1.1)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")
    for left, right, low, high in ((0.04, 0.47, 0.36, 0.02), (0.53, 0.96, 0.02, 0.36)):
        corners = [(left, low), (right, high), (right, 1 - high), (left, 1 - low)]
        axes.add_patch(Polygon(corners, facecolor="#c9d6e3", edgecolor=INK, linewidth=1.2))
    text(figure, x + 0.55, y - 0.75, "64 → 256 → 64", 11, ha="center")


def draw_answer(figure, logits, value, changes, x, y):
    """Draw the probabilities of the three actions as bars, and below them the value and what the page is to change.

    changes: (24 + 81,) probabilities that these rows and columns of the page change next.
    """
    probabilities = logits.softmax(-1).tolist()
    for number, (name, probability) in enumerate(zip(("stay", "left", "right"), probabilities)):
        height = y - 0.3 * number
        text(figure, x, height, name, 12)
        axes = panel(figure, x + 0.5, height - 0.09, 1.3, 0.18, frame=True)
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.barh(0.5, probability, 1.0, color=INK)
        text(figure, x + 1.9, height, f"{100 * probability:.1f} %", 11.5)
    text(figure, x, y - 0.92, "value", 12)
    text(figure, x + 0.5, y - 0.92, f"{value:.1f} bricks, discounted", 11.5)
    text(figure, x, y - 1.32, "and, in training, what will change:", 11.5)
    for number, (name, strip) in enumerate((("rows", changes[:ROWS]), ("columns", changes[ROWS:]))):
        height = y - 1.57 - 0.25 * number
        text(figure, x, height, name, 11.5)
        axes = panel(figure, x + 0.75, height - 0.08, 1.75, 0.16, frame=True)
        axes.imshow(strip[None], cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")


def draw(policy, page):
    """Return the Figure."""
    gpt = plain_gpt(policy).requires_grad_(False)
    tokens = torch.from_numpy(page)[None]
    weights = attention(gpt, tokens)[0].numpy()
    features = gpt.features(gpt.encode(tokens))
    logits, values = gpt.heads(features)
    changes = gpt.change_head(features)[0].sigmoid().numpy()
    figure = new_figure(WIDTH, HEIGHT)
    figure.set(facecolor=PAPER, layout_engine="none")
    heading(figure, 0.2, 6.72, 1, "A page of 24 × 81 = 1944 characters")
    draw_page(panel(figure, 0.2, 3.02, 6.35, 3.45), page, weights)
    heading(figure, 6.95, 6.72, 2, "Three embeddings")
    draw_embedding(figure, gpt, page, 6.95, 6.47)
    heading(figure, 0.2, 2.68, 3, "16 heads: what the last position looks at")
    draw_legend(figure, 0.2, 2.38)
    draw_heads(figure, page, weights, 0.2, 0.2)
    heading(figure, 5.3, 2.68, 4, "MLP")
    draw_mlp(figure, 5.35, 1.45)
    heading(figure, 7.15, 2.68, 5, "The answer")
    draw_answer(figure, logits[0], float(values[0]), changes, 7.15, 2.32)
    arrow(figure, (4.98, 1.45), (5.3, 1.45))
    arrow(figure, (6.55, 1.45), (6.95, 1.45))
    return figure


def main(argv=()):
    Parser("-m docs.architecture", __doc__).parse_args(argv)
    policy, _ = load_policy(SHIPPED)
    step = next(islice(play(policy, BreakoutAscii(), STEP + 1), STEP, None))
    draw(policy, step.before.page).savefig(OUT, dpi=200)
    print(f"wrote {shown(OUT)}")
    return 0


if __name__ == "__main__":
    run_script(main, "-m docs.architecture")
