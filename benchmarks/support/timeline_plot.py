"""The plot of `timeline.py`: bars of microseconds by op, rooflines across them, measurements beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

COLOURS = {
    "hyper-connections": "#4c78a8",
    "projections of q and KV": "#9ecae9",
    "norm, RoPE, store": "#b79a20",
    "compression": "#f2cf5b",
    "indexer": "#54a24b",
    "attention": "#88d27a",
    "output projections": "#72b7b2",
    "routing": "#b279a2",
    "experts": "#e45756",
    "embedding, lists, state": "#9d755d",
    "head": "#f58518",
    "sampling": "#ffbf79",
    "launches": "#bab0ac",
}
MEASURED = "#222222"
# The salt makes the same file from the same figures.
STYLE = {"svg.hashsalt": "timeline", "font.size": 9, "axes.titlesize": 10}
WIDTH = 0.7


def draw(figures: Mapping[str, Any], launch: float, measured: Mapping[str, Any] | None, path: Path) -> None:
    """figures: of `timeline.predicted`. Two rows of steps, one for each card, and one of single layers."""
    batches = list(next(iter(figures.values()))["8k"]["fp8"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(14, 12), layout="constrained")
        _fill(figure, figures, batches, measured)
        figure.suptitle(f"DeepSeek-V4-Flash, one decode step: predicted, with {launch:g} us a launch")
        figure.savefig(path, format="svg", metadata={"Date": None})


def _fill(
    figure: Figure, figures: Mapping[str, Any], batches: Sequence[str], measured: Mapping[str, Any] | None
) -> None:
    axes = figure.subplots(len(figures) + 1, len(batches))
    for row, (card, contexts) in zip(axes, figures.items(), strict=False):
        ours = measured if measured is not None and card in measured["device"] else None
        for axis, batch in zip(row, batches, strict=True):
            _steps(axis, contexts, batch, ours)
            axis.set_title(f"{card}, batch {batch}: one step of 43 layers")
    card = next((c for c in figures if measured is not None and c in measured["device"]), next(iter(figures)))
    name = "fp8" if measured is None else measured["experts"]
    for axis, batch in zip(axes[-1], batches, strict=True):
        _layers(axis, figures[card]["8k"][name][batch]["layers"], batch, measured)
        axis.set_title(f"{card}, batch {batch}: one layer, 8k, {name.upper()} experts")
    handles: list[Any] = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    handles.append(Line2D([], [], color="black", linewidth=2, label="roofline (bytes / bandwidth)"))
    if measured is not None:
        handles.append(Patch(color=MEASURED, label=f"measured, {measured['device']}"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False)


def _steps(axis: Axes, contexts: Mapping[str, Any], batch: str, measured: Mapping[str, Any] | None) -> None:
    """Milliseconds of a step: contexts, each with both formats of experts, and beside one what was measured."""
    labels: list[str] = []
    for context, formats in contexts.items():
        for name, by_batch in formats.items():
            step = by_batch[batch]
            place = len(labels)
            top = _stack(axis, place, {k: v / 1e3 for k, v in step["us by op"].items()})
            _roof(axis, place, step["roofline us"] / 1e3)
            _number(axis, place, top)
            labels.append(f"{context}\n{name.upper()}")
            if measured is not None and (context, name) == ("8k", measured["experts"]):
                time = measured["step us of 43 layers"].get(batch)
                if time is not None:
                    _bar(axis, len(labels), time / 1e3)
                    labels.append("\nmeasured")
    _finish(axis, labels, "ms")


def _layers(axis: Axes, layers: Mapping[str, Any], batch: str, measured: Mapping[str, Any] | None) -> None:
    labels: list[str] = []
    for kind, layer in layers.items():
        place = len(labels)
        top = _stack(axis, place, layer["us by op"])
        _number(axis, place, top)
        labels.append(f"{kind}\n{layer['launches']} launches")
        time = (measured or {}).get("per layer us", {}).get(kind, {}).get(batch)
        if time is not None:
            _bar(axis, len(labels), time)
            labels.append("\nmeasured")
    _finish(axis, labels, "us")


def _stack(axis: Axes, place: int, parts: Mapping[str, float]) -> float:
    """Launches on top: what is below them is bytes and products."""
    bottom = 0.0
    for name in COLOURS:
        if parts.get(name):
            axis.bar(place, parts[name], WIDTH, bottom, color=COLOURS[name])
            bottom += parts[name]
    return bottom


def _bar(axis: Axes, place: int, value: float) -> None:
    axis.bar(place, value, WIDTH, color=MEASURED)
    _number(axis, place, value)


def _number(axis: Axes, place: int, value: float) -> None:
    axis.annotate(f"{value:.0f}" if value >= 100 else f"{value:.3g}", (place, value), ha="center", va="bottom")


def _roof(axis: Axes, place: int, value: float) -> None:
    axis.plot((place - WIDTH / 1.6, place + WIDTH / 1.6), (value, value), color="black", linewidth=2)


def _finish(axis: Axes, labels: Sequence[str], unit: str) -> None:
    axis.set_xticks(range(len(labels)), labels, fontsize=8 if len(labels) < 6 else 6.5)
    axis.set_ylabel(unit)
    axis.margins(y=0.1)
    axis.spines[["top", "right"]].set_visible(False)
