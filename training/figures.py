"""Pictures of results as PNG files: matplotlib's object-oriented API on the Agg canvas, without global state.

Colours are Okabe and Ito's (2008) and shades of one blue: both survive colour blindness and a grey printer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
DPI = 144
LABEL_WIDTH = 22
"""Characters of a class name per line."""

Pixels = NDArray[np.uint8]


def confusion_matrix(counts: ArrayLike, classes: Sequence[str], path: Path) -> None:
    """Draws counts [C,C] (rows the truth): each cell holds its count and is shaded by its share of the row."""
    n = np.asarray(counts)
    if n.shape != (len(classes), len(classes)):
        raise ValueError(f"counts {n.shape}: must be {len(classes)} x {len(classes)}, one row per class")
    shares = n / np.maximum(n.sum(axis=1, keepdims=True), 1)
    side = max(2.2, 0.62 * len(classes))
    figure, axes = _figure(side + 2.8, side + 1.6)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [_wrapped(name) for name in classes]
    if max(map(len, names)) > 8:
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    else:
        axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted class", ylabel="true class")
    size = 9 if n.max(initial=0) < 10_000 else 7
    for (row, column), count in np.ndenumerate(n):
        colour = "white" if shares[row, column] > 0.55 else "black"
        axes.text(column, row, f"{count:g}", ha="center", va="center", color=colour, fontsize=size)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("share of the true class")
    _save(figure, path)


def reliability_diagram(
    confidence: ArrayLike,
    accuracy: ArrayLike,
    counts: ArrayLike,
    ece: float | None,
    path: Path,
    axes: tuple[str, str] = ("confidence (largest probability)", "accuracy"),
) -> None:
    """Draws accuracy against confidence per bin, [bins] each, over a histogram of the counts; empty bins are left out.

    The arguments are those of `training.metrics.reliability`; bins are of equal width over 0 to 1. `axes` names what
    lies across and what upwards.
    """
    across, upwards = axes
    x, y, n = (np.asarray(a, dtype=np.float64) for a in (confidence, accuracy, counts))
    figure = Figure(figsize=(4.6, 5.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    edges, used = np.linspace(0, 1, len(n) + 1), n > 0
    middles, width = (edges[:-1] + edges[1:]) / 2, edges[1]
    upper.bar(middles[used], y[used], width, color=COLOURS[5], edgecolor="white", label=f"{upwards} in the bin")
    upper.plot([0, 1], [0, 1], "--", color="#555555", label="perfectly calibrated")
    upper.plot(x[used], y[used], "o-", color=COLOURS[1], markersize=4, label="at the mean confidence")
    upper.set(ylabel=upwards, xlim=(0, 1), ylim=(0, 1.02))
    if ece is not None:
        upper.set_title(f"expected calibration error {ece:.3f}", fontsize=10)
    upper.legend(fontsize=8)
    lower.bar(middles, n, width, color=COLOURS[0], edgecolor="white")
    lower.set(xlabel=across, ylabel="predictions")
    lower.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    for panel in (upper, lower):
        _plain(panel)
    _save(figure, path)


def curves(
    series: Mapping[str, tuple[ArrayLike, ArrayLike]], path: Path, xlabel: str, ylabel: str, log_y: bool = False
) -> None:
    """Draws one line per entry, name -> (x [N], y [N]); values that are not finite leave a gap."""
    figure, axes = _figure(6.4, 3.6)
    for i, (name, (x, y)) in enumerate(series.items()):
        colour, style = COLOURS[i % len(COLOURS)], STYLES[i % len(STYLES)]
        values = np.asarray(y, dtype=np.float64)
        marker = "o" if len(values) == 1 else None
        axes.plot(np.asarray(x), values, color=colour, linestyle=style, linewidth=1.4, marker=marker, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if log_y:
        axes.set_yscale("log")
    axes.grid(axis="y", which="major", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    if len(series) > 1:
        axes.legend(fontsize=8, frameon=False)
    _plain(axes)
    _save(figure, path)


def with_bands(
    x: ArrayLike,
    series: Mapping[str, tuple[ArrayLike, Sequence[Sequence[float | None]]]],
    path: Path,
    xlabel: str,
    ylabel: str,
) -> None:
    """Draws one line of points per entry over x [N], name -> (y [N], intervals [N] of low and high), with its bars."""
    figure, axes = _figure(6.4, 3.6)
    places = np.asarray(x, dtype=np.float64)
    for i, (name, (y, intervals)) in enumerate(series.items()):
        values = np.asarray(y, dtype=np.float64)
        ends = np.asarray([[np.nan if end is None else end for end in ends] for ends in intervals], dtype=np.float64)
        bars = np.abs(ends.T - values)
        colour = COLOURS[i % len(COLOURS)]
        axes.errorbar(places, values, bars, fmt=f"{'os^'[i % 3]}-", color=colour, capsize=3, linewidth=1.4, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    if len(series) > 1:
        axes.legend(fontsize=8, frameon=False)
    _plain(axes)
    _save(figure, path)


def training_loss(steps: ArrayLike, loss: ArrayLike, epochs: ArrayLike, path: Path, marks: Sequence[int] = ()) -> None:
    """Draws the loss of each step [N], faintly, and the mean of each epoch at the middle of its steps.

    `epochs` [N] says to which epoch a step belongs; `marks` are steps at which training was started again.
    """
    x, y, e = np.asarray(steps, dtype=np.float64), np.asarray(loss, dtype=np.float64), np.asarray(epochs)
    figure, axes = _figure(6.4, 3.4)
    axes.plot(x, y, color=COLOURS[5], linewidth=0.8, alpha=0.7, label="step")
    _, which, counts = np.unique(e, return_inverse=True, return_counts=True)
    middles, means = np.bincount(which, x) / counts, np.bincount(which, y) / counts
    marker = "o" if len(means) < 3 else None
    axes.plot(middles, means, color=COLOURS[0], linewidth=1.8, marker=marker, markersize=4, label="mean of an epoch")
    for number, mark in enumerate(marks):
        label = "started again" if number == 0 else None
        axes.axvline(mark, color="#555555", linewidth=1, linestyle=":", label=label)
    axes.set(xlabel="step", ylabel="loss", xlim=(0, x.max(initial=1)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, frameon=False)
    _plain(axes)
    _save(figure, path)


def probes(
    steps: ArrayLike, scores: Mapping[str, ArrayLike], chance: float | None, effective_rank: ArrayLike, path: Path
) -> None:
    """Draws balanced accuracies over steps, name -> [N] in 0..1, with the line of chance, and the effective rank [N]
    below; without scores the rank alone."""
    x, rank = np.asarray(steps, dtype=np.float64), np.asarray(effective_rank, dtype=np.float64)
    figure = Figure(figsize=(6.4, 4.8 if scores else 2.6), layout="constrained")
    panels = figure.subplots(2 if scores else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 2] if scores else [1])
    lower: Axes = panels[-1, 0]
    line: dict[str, Any] = {"linewidth": 1.6, "markersize": 4.5}
    if scores:
        upper: Axes = panels[0, 0]
        for i, (name, values) in enumerate(scores.items()):
            upper.plot(
                x, np.asarray(values, dtype=np.float64), f"{'os^'[i % 3]}-", color=COLOURS[i], label=name, **line
            )
        if chance is not None:
            upper.axhline(chance, color="#555555", linewidth=1.2, linestyle="--", label=f"guessing ({chance:.2f})")
        upper.set(ylabel="balanced accuracy", ylim=(0, 1.02))
        upper.legend(fontsize=8, frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    lower.plot(x, rank, "D-", color=COLOURS[2], **line)
    lower.set(xlabel="step", ylabel="effective rank", ylim=(0, max(1.0, 1.15 * np.nanmax(rank, initial=0))))
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    lower.yaxis.set_major_locator(MaxNLocator(5))
    for axes in panels[:, 0]:
        axes.grid(axis="y", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        _plain(axes)
    _save(figure, path)


def forest(series: Mapping[str, Mapping[str, tuple[float, float, float]]], path: Path, xlabel: str) -> None:
    """Draws differences as points with intervals around a line at 0: name -> row -> (value, low, high).

    Rows are those of the first entry, from top to bottom; each entry has its colour and marker. NaN leaves a row empty.
    """
    names = list(next(iter(series.values())))
    spread = 0.7 if len(series) > 1 else 0.0
    figure, axes = _figure(6.4, 0.9 + len(names) * (0.32 + 0.13 * (len(series) - 1)) + 0.22 * len(series))
    for i, (name, rows) in enumerate(series.items()):
        value, low, high = np.asarray([rows[row] for row in names], dtype=np.float64).T
        shift = spread * ((i + 0.5) / len(series) - 0.5)
        ends = np.stack([np.maximum(value - low, 0), np.maximum(high - value, 0)])
        axes.errorbar(
            value,
            np.arange(len(names)) + shift,
            xerr=ends,
            fmt="osD^v"[i % 5],
            color=COLOURS[i % len(COLOURS)],
            markersize=5,
            linewidth=1.5,
            capsize=3,
            label=name.replace("$", r"\$"),
        )
    axes.axvline(0, color="#555555", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(xlabel)
    axes.grid(axis="x", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    if len(series) > 1:
        axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=min(3, len(series)))
    _plain(axes)
    _save(figure, path)


def search_history(
    points: Mapping[str, tuple[ArrayLike, ArrayLike]], path: Path, ylabel: str, failed: Sequence[int] = ()
) -> None:
    """Draws trials as points, name -> (numbers [N], values [N]), and the best of the first name's so far as a line.

    The first name is of the trials that may win. `failed` numbers have no value and stand at the lower edge.
    """
    figure, axes = _figure(6.4, 3.6)
    last = max([*failed, *(n for x, _ in points.values() for n in np.asarray(x).tolist())], default=0)
    for i, (name, (x, y)) in enumerate(points.items()):
        numbers, values = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
        if i == 0 and len(numbers):
            order = np.argsort(numbers)
            steps, best = np.append(numbers[order], last), np.maximum.accumulate(values[order])
            best = np.append(best, best[-1])
            axes.step(steps, best, where="post", color=COLOURS[1], linewidth=1.4, label="best so far")
        if len(numbers):
            marker, face = ("o", COLOURS[0]) if i == 0 else ("o", "white")
            axes.scatter(numbers, values, 30, marker=marker, facecolor=face, edgecolor=COLOURS[0], zorder=3, label=name)
    if len(failed):
        low = np.zeros(len(failed))
        edge = axes.get_xaxis_transform()
        axes.scatter(failed, low, 36, marker="x", color="#555555", transform=edge, clip_on=False, label="failed")
    axes.set(xlabel="trial (0: the defaults)", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", which="major", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, frameon=False)
    _plain(axes)
    _save(figure, path)


def stage_gains(names: Sequence[str], values: ArrayLike, gains: ArrayLike, path: Path, metric: str) -> None:
    """Draws, side by side and from above, each point's metric and its gain over the one above it.

    values, gains: [N, 3] as value, low, high; NaN where there is none. Gains have a line at 0.
    """
    figure = Figure(figsize=(7.2, 0.9 + 0.45 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(names))
    for axes, rows, label in ((left, values, metric), (right, gains, f"gain in {metric}")):
        value, low, high = np.asarray(rows, dtype=np.float64).reshape(-1, 3).T
        axes.hlines(places, low, high, color=COLOURS[0], linewidth=1.6)
        axes.scatter(value, places, 34, color=COLOURS[0], zorder=3)
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="x", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        _plain(axes)
    right.axvline(0, color="#555555", linewidth=1)
    left.set_yticks(places, [_wrapped(name) for name in names])
    left.set_ylim(len(names) - 0.5, -0.5)
    _save(figure, path)


def reconstructions(original: Pixels, masked: Pixels, reconstructed: Pixels, path: Path) -> None:
    """Draws three rows of K pictures [K,H,W,C] uint8 (C 1 or 3): original, masked, reconstruction."""
    rows = {"original": original, "masked": masked, "reconstruction": reconstructed}
    height, width = original.shape[1:3]
    cell = 1.3
    figure = Figure(
        figsize=(cell * len(original) + 1, cell * 3 * height / width + 0.2),
        layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0),
    )
    grid = figure.subplots(3, len(original), squeeze=False)
    for (name, images), line in zip(rows.items(), grid, strict=True):
        for image, axes in zip(images, line, strict=True):
            _picture(axes, image)
        line[0].set_ylabel(name, fontsize=9, rotation="horizontal", ha="right", va="center")
    _save(figure, path)


def pairs(
    images: Sequence[tuple[Pixels, Pixels]],
    titles: Sequence[str],
    captions: Sequence[tuple[str, str]],
    path: Path,
    columns: int = 2,
) -> None:
    """Draws pairs of pictures [H,W] or [H,W,C] uint8 side by side, a title above each pair and a caption below each
    picture."""
    if not images:
        raise ValueError("images: needs at least one pair")
    columns = min(columns, len(images))
    lines = -(-len(images) // columns)
    texts = [tuple(_wrapped(caption) for caption in both) for both in captions]
    text_height = 0.14 * max(text.count("\n") + 1 for both in texts for text in both) + 0.4
    figure = Figure(figsize=(4.2 * columns, (1.9 + text_height) * lines), layout="constrained")
    cells = np.asarray(figure.subfigures(lines, columns, squeeze=False, wspace=0.04)).ravel()
    for cell, both, title, words in zip(cells, images, titles, texts, strict=False):
        cell.suptitle(title.replace("$", r"\$"), fontsize=8)
        for axes, image, text in zip(cell.subplots(1, 2), both, words, strict=True):
            _picture(axes, image)
            axes.set_adjustable("datalim")
            axes.set_box_aspect(1)
            axes.set_xlabel(text, fontsize=7, labelpad=3)
    _save(figure, path)


def contact_sheet(images: Sequence[Pixels], captions: Sequence[str], path: Path, columns: int = 6) -> None:
    """Draws pictures [H,W] or [H,W,C] uint8 of any sizes in a grid, each with its caption below."""
    if not images:
        raise ValueError("images: a contact sheet needs at least one")
    columns = min(columns, len(images))
    lines = -(-len(images) // columns)
    texts = [_wrapped(caption) for caption in captions]
    text_height = 0.15 * max(text.count("\n") + 1 for text in texts) + 0.12
    figure = Figure(figsize=(1.55 * columns, (1.45 + text_height) * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in grid[len(images) :]:
        axes.set_axis_off()
    for axes, image, text in zip(grid[: len(images)], images, texts, strict=True):
        _picture(axes, image)
        axes.set_adjustable("datalim")
        axes.set_box_aspect(1)  # square cells, so that the captions of a line stand level
        axes.set_xlabel(text, fontsize=7, labelpad=3)
    _save(figure, path)


def overlays(images: Pixels, maps: ArrayLike | None, captions: Sequence[str], path: Path) -> None:
    """Draws pictures [N,H,W,C] uint8 in a grid, each with its caption below and, beside it, itself under its map
    [N,H,W] in 0..1; without maps, the pictures alone, twice as many in a line."""
    pair, wide = 1 if maps is None else 2, images.shape[2] > 1.8 * images.shape[1]
    columns = min(len(images), (4 if wide else 6) // pair)
    lines = -(-len(images) // columns)
    texts = [_wrapped(caption) for caption in captions]
    text_height = 0.15 * max(text.count("\n") + 1 for text in texts) + 0.1
    side = 2.2 if wide else 1.45
    height = side * images.shape[1] / images.shape[2]
    figure = Figure(figsize=(side * pair * columns, (height + text_height) * lines), layout="constrained")
    grid = figure.subplots(lines, columns * pair, squeeze=False)
    for axes in grid.ravel():
        axes.set_axis_off()
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        line, column = divmod(number, columns)
        left: Axes = grid[line, column * pair]
        left.set_axis_on()
        _picture(left, image)
        left.set_xlabel(text, fontsize=7, labelpad=3, loc="left")
        if maps is not None:
            right: Axes = grid[line, column * pair + 1]
            right.set_axis_on()
            _picture(right, _grey(image))
            right.imshow(np.asarray(maps)[number], cmap="viridis", vmin=0, vmax=1, alpha=0.5)
    _save(figure, path)


def _grey(image: Pixels) -> Pixels:
    """[H,W] of a picture [H,W,1|3], so that its colours do not mix with those of a map."""
    return np.asarray(image[..., :3].mean(axis=-1).round(), dtype=np.uint8)


def intervals(
    rows: Sequence[tuple[str, float, float | None, float | None, float | None]], path: Path, xlabel: str = "value"
) -> None:
    """Draws (name, value, low, high, guessing level) as one line each, the first on top: a point, its interval where
    there is one, and a mark where guessing would be."""
    figure, axes = _figure(6.4, 0.42 * len(rows) + 1.1)
    places = np.arange(len(rows))[::-1]
    for place, (_, value, low, high, guess) in zip(places, rows, strict=True):
        if low is not None and high is not None:
            axes.plot([low, high], [place, place], color=COLOURS[0], linewidth=2.2, solid_capstyle="butt")
        axes.plot(
            value, place, "o", color=COLOURS[0], markersize=6, label="value, 95 % interval" if not place else None
        )
        if guess is not None:
            label = "guessing" if place == places[0] else None
            axes.plot(guess, place, "|", color=COLOURS[1], markersize=16, markeredgewidth=2.2, label=label)
    lowest = min([0.0, *(low for _, _, low, _, _ in rows if low is not None)])
    axes.set(xlabel=xlabel, xlim=(lowest - 0.02, 1.02), ylim=(-0.6, len(rows) - 0.4))
    axes.set_yticks(places, [_wrapped(name) for name, *_ in rows])
    axes.grid(axis="x", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    _plain(axes)
    _save(figure, path)


def _picture(axes: Axes, image: Pixels) -> None:
    pixels = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _wrapped(text: str) -> str:
    """Lines of at most `LABEL_WIDTH`, cut after `/`, else at `_`, `-` and blanks; `$` starts no formula."""
    lines: list[str] = []
    for line in text.split("\n"):
        levels = [line] if len(line) <= LABEL_WIDTH else re.findall(r"[^/]*/|[^/]+", line)
        lines += [cut for level in levels for cut in _cut(level.strip())]
    return "\n".join(lines).replace("$", r"\$")


def _cut(text: str) -> list[str]:
    lines = [""]
    for piece in re.findall(r"[^ _-]*[ _-]|[^ _-]+", text):
        if lines[-1] and len(lines[-1] + piece.rstrip()) > LABEL_WIDTH:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.08)
