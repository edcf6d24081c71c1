"""Pictures of what a cache did and does: perplexity along a stream, the memory map, budgets and energies over time, and the
text with what the last step recalled lit up.

Colours are Okabe and Ito's, told apart with any colour vision; line styles, order and labels tell the rest. A method has the
same colour in every picture. Needs `matplotlib`, but for `reading_html`.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.tokens import TIER_NAMES
from ..layer import ADMSLayer
from ..shown import TIER_COLOURS
from .report import grid, new_figure, save_figure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .. import ADMSKVCache
    from .streaming import MethodResult

BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73"),
    *("#0072B2", "#D55E00", "#CC79A7"),
)
COLOURS = (BLACK, VERMILION, BLUE, GREEN, PURPLE, ORANGE, SKY, "#999999")
# Share of the strongest token's weight below which a token that was read is not lit.
LEAST_LIT = 0.02
STYLES = ("-", "--", "-.", ":")
# Colour and line style of each method, in every picture.
METHOD_LOOKS = {
    "full": (BLACK, "-"),
    "restarted": (BLACK, ":"),
    "streaming": (VERMILION, "--"),
    "adms": (BLUE, "-"),
    "adms_recall": (GREEN, "-"),
    "adms_low_rank": (SKY, "-"),
    "adms_vq": (SKY, ":"),
    "adms_attention_matching": (SKY, "-."),
    "h2o": (ORANGE, "--"),
    "snapkv": (PURPLE, "-."),
    "tova": (ORANGE, ":"),
}


def line_looks(names: Iterable[str], width: float = 1.6) -> dict[str, dict[str, Any]]:
    """Colour, style and width of each line: a method's own, and for other names what no method has."""
    names = list(names)
    spare = itertools.cycle(look for look in itertools.product(COLOURS, STYLES) if look not in METHOD_LOOKS.values())
    looks = {name: METHOD_LOOKS[name] if name in METHOD_LOOKS else next(spare) for name in names}
    return {name: {"color": colour, "linestyle": style, "linewidth": width} for name, (colour, style) in looks.items()}


def plot_perplexity(path: Path, results: Mapping[str, MethodResult], title: str, score_from: int) -> None:
    """Draw running perplexity and cache size over the tokens read, one line a method.

    `score_from`: the first scored token; what comes before is shaded, as it has no perplexity.
    """
    figure = new_figure(9, 7)
    upper, lower = figure.subplots(2, 1, sharex=True)
    visible: list[float] = []
    looks = line_looks(results, 1.8)
    for name, result in results.items():
        curve = result.curve
        points = [(t, p) for t, p in zip(curve.tokens, curve.perplexity, strict=True) if p is not None]
        upper.plot([t for t, _ in points], [p for _, p in points], label=name, **looks[name])
        # The mean of the first few tokens swings wildly and would set the scale: it may leave the picture.
        visible.extend(p for _, p in points[len(points) // 10 :])
        lower.plot(curve.tokens, [size / 2**20 for size in curve.cache_bytes], label=name, **looks[name])
    if visible:
        low, high = min(visible), max(visible)
        margin = 0.08 * (high - low) or 0.05 * high
        upper.set_ylim(low - margin, high + margin)
    for axes in (upper, lower):
        axes.axvspan(0, score_from, color="0.93", zorder=0)
        grid(axes)
        axes.margins(x=0)
    upper.set_title(title, loc="left", fontsize=11)
    upper.set_ylabel("running perplexity\n(scored tokens so far)")
    lower.set_ylabel("cache size (MiB)")
    lower.set_xlabel("tokens read")
    lower.set_ylim(bottom=0)
    if score_from > 1:
        upper.text(score_from / 2, 0.5, "not scored", transform=upper.get_xaxis_transform(), ha="center", color="0.4")
    handles, labels = upper.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    save_figure(figure, path)


def tiers_by_head(cache: ADMSKVCache, row: int = 0) -> tuple[list[int], torch.Tensor]:
    """The layers of full attention, and how many tokens of each tier their heads hold, `[layers, kv_heads, tiers]`.

    Tiers come in the order of `TIER_COLOURS`. Raises `ValueError` for a cache that holds nothing yet.
    """
    order = {name: tier for tier, name in TIER_NAMES.items()}
    layers = [layer for layer in cache.layers if isinstance(layer, ADMSLayer) and layer.is_initialized]
    if not layers:
        raise ValueError("cache holds no token yet: read a text with it first")
    counts = []
    for layer in layers:
        tier, valid = layer.held.tier[row], layer.held.valid[row]
        counts.append(torch.stack([((tier == order[name]) & valid).sum(-1) for name in TIER_COLOURS], dim=-1).cpu())
    return [layer.number for layer in layers], torch.stack(counts)


def plot_memory_map(path: Path, cache: ADMSKVCache, title: str = "", row: int = 0) -> None:
    """Draw what every layer and KV head holds: tokens by tier (left), and where in the stream they are from (right).

    A merged token is drawn at its own position, which is that of those it stands for, averaged.
    """
    numbers, counts = tiers_by_head(cache, row)
    heads = counts.shape[1]
    lines = counts.flatten(0, 1)
    figure = new_figure(10, max(3.2, 1.7 + 0.055 * len(lines)))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 3))
    at, begin = range(len(lines)), torch.zeros(len(lines))
    for index, (name, colour) in enumerate(TIER_COLOURS.items()):
        width = lines[:, index].float()
        if bool(width.any()):
            left.barh(at, width, left=begin, height=1.0, color=colour, label=name)
            begin = begin + width
    layers = {layer.number: layer for layer in cache.layers if isinstance(layer, ADMSLayer)}
    tiers = {name: tier for tier, name in TIER_NAMES.items()}
    for index, number in enumerate(numbers):
        held = layers[number].held
        for name, colour in TIER_COLOURS.items():
            chosen = (held.tier[row] == tiers[name]) & held.valid[row]
            head, slot = chosen.cpu().nonzero(as_tuple=True)
            right.scatter(
                *(held.pos[row].cpu()[head, slot], index * heads + head),
                **{"marker": "s", "s": 1.2, "color": colour, "linewidths": 0, "rasterized": True},
            )
    step = max(1, len(numbers) // 10)
    left.set_yticks([index * heads + (heads - 1) / 2 for index in range(0, len(numbers), step)], numbers[::step])
    left.set_ylim(len(lines) - 0.5, -0.5)
    left.set_ylabel(f"layer ({heads} KV heads each)")
    left.set_xlabel("tokens held")
    right.set_xlabel("position in the stream")
    for axes in (left, right):
        grid(axes)
        axes.set_xlim(left=0)
    left.set_title(title or f"{cache.current_length:,} tokens seen", loc="left", fontsize=11)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    save_figure(figure, path)


@dataclasses.dataclass
class Watch:
    """What the controller measured and decided, taken down with `sample(cache)` as a stream is read.

    `tokens`: seen at each sample; `budgets`, `energies`: by layer and KV head, then one value a sample, NaN before the first
    compaction.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    budgets: dict[tuple[int, int], list[float]] = dataclasses.field(default_factory=dict)
    energies: dict[tuple[int, int], list[float]] = dataclasses.field(default_factory=dict)

    def sample(self, cache: ADMSKVCache) -> None:
        """Take down the present budgets and energies; reads from the device."""
        for name, found in (("budgets", cache.controller_budgets), ("energies", cache.controller_energy_ema)):
            series, now = getattr(self, name), {head: float(found[head]) for head in found}
            for head in {**series, **now}:
                series.setdefault(head, [float("nan")] * len(self.tokens)).append(now.get(head, float("nan")))
        self.tokens.append(cache.current_length)


def plot_watch(path: Path, watch: Watch, title: str = "") -> None:
    """Draw budgets and reconstruction energies over time, a line a head, as two maps.

    Raises `ValueError` where no controller has decided yet.
    """
    if not watch.budgets:
        raise ValueError("watch holds no budget: it needs enable_adaptive_controller=True and a compaction")
    figure = new_figure(9, 6.5)
    panels = figure.subplots(2, 1, sharex=True)
    for axes, series, label in zip(
        panels, (watch.budgets, watch.energies), ("budget (tokens)", "reconstruction energy"), strict=True
    ):
        heads = sorted(series)
        edges = [0, *watch.tokens]
        image = axes.pcolormesh(edges, range(len(heads) + 1), [series[head] for head in heads], cmap="cividis")
        figure.colorbar(image, ax=axes, label=label, pad=0.01)
        firsts = [number for number, (layer, head) in enumerate(heads) if head == min(h for ly, h in heads if ly == layer)]
        firsts = firsts[:: max(1, len(firsts) // 10)]
        axes.set_yticks([first + 0.5 for first in firsts], [heads[first][0] for first in firsts])
        axes.set_ylim(len(heads), 0)
        axes.set_ylabel("layer")
        axes.xaxis.set_major_formatter("{x:,.0f}")
    panels[0].set_title(title or "Where the controller spends the budget", loc="left", fontsize=11)
    panels[-1].set_xlabel("tokens read")
    save_figure(figure, path)


@dataclasses.dataclass(frozen=True)
class Passage:
    """A stretch of the text and what the last pass read of it.

    `weight`: attention that its tokens drew together, averaged over layers and heads. `first`: position of the first token
    shown. `pieces`: each token's text and its own share of the weight, 0 for one that was not read.
    """

    weight: float
    first: int
    pieces: tuple[tuple[str, float], ...]


def read_now(
    cache: ADMSKVCache, tokenizer: PreTrainedTokenizerBase, most: int = 5, beside: int = 12, row: int = 0
) -> list[Passage]:
    """The passages that the last pass read from the archive, in the order of the text, `beside` tokens before and after.

    `most`: the strongest passages at most. Empty where nothing was read (`enable_recall=False`, or all is still held).
    """
    heads = [
        (layer.number, head)
        for layer in cache.layers
        if isinstance(layer, ADMSLayer) and layer.is_initialized
        for head in range(layer.held.beta.shape[1])
    ]
    drawn: dict[int, float] = {}
    for layer, head in heads:
        for position, weight in zip(*(part.tolist() for part in cache.recalled(layer, head, row)), strict=True):
            drawn[position] = drawn.get(position, 0.0) + weight / len(heads)
    ids = cache.seen_tokens.whole()[row].tolist()
    passages = []
    for weight, first, last in sorted(cache.recalled_passages(most, row=row), key=lambda found: found[1]):
        begin, end = max(0, first - beside), min(len(ids), last + 1 + beside)
        pieces = tuple((tokenizer.decode([ids[at]]), drawn.get(at, 0.0)) for at in range(begin, end))
        passages.append(Passage(weight, begin, pieces))
    return passages


def _strength(passages: Sequence[Passage]) -> float:
    return max((weight for passage in passages for _, weight in passage.pieces), default=0.0) or 1.0


def reading_html(passages: Sequence[Passage]) -> str:
    """The passages of `read_now` as HTML for a notebook: what was read is lit, the stronger the more, and underlined."""
    most, lines = _strength(passages), []
    for passage in passages:
        text = ""
        for piece, weight in passage.pieces:
            piece = html.escape(piece)
            lit = f"background:rgba(230,159,0,{0.15 + 0.85 * weight / most:.2f});color:#000;text-decoration:underline"
            text += f'<span style="{lit}">{piece}</span>' if weight >= LEAST_LIT * most else piece
        lines.append(f"<p><small>token {passage.first:,}, weight {passage.weight:.4f}</small><br>{text}</p>")
    return "".join(lines) or "<p>nothing was recalled in the last pass</p>"


def plot_reading(path: Path, passages: Sequence[Passage], title: str = "", columns: int = 96) -> None:
    """Draw the passages of `read_now`: what was read stands on orange, the stronger the darker, and is underlined."""
    lines: list[tuple[str | None, list[tuple[str, float]]]] = []
    for passage in passages:
        lines.append((f"token {passage.first:,}, weight {passage.weight:.4f}", []))
        line: list[tuple[str, float]] = []
        for piece, weight in passage.pieces:
            piece = " ".join(piece.split("\n"))
            if sum(len(text) for text, _ in line) + len(piece) > columns:
                lines.append((None, line))
                line = []
            line.append((piece.lstrip() if not line else piece, weight))
        lines.append((None, line))
    if not lines:
        lines.append(("nothing was recalled in the last pass", []))
    most = _strength(passages)
    figure = new_figure(0.085 * columns + 0.5, 0.24 * len(lines) + 0.7)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim(0, columns)
    axes.set_ylim(len(lines), -0.3)
    axes.set_title(title or "What the last step read again", loc="left", fontsize=11)
    font = {"family": "DejaVu Sans Mono", "fontsize": 9, "va": "center", "ha": "center"}
    for number, (head, pieces) in enumerate(lines):
        if head is not None:
            axes.text(0, number + 0.5, head, fontsize=8, color="0.35", va="center")
        at = 0
        for piece, weight in pieces:
            if weight >= LEAST_LIT * most:
                share = 0.15 + 0.85 * weight / most
                axes.axhspan(
                    *(number + 0.08, number + 0.92),
                    **{"xmin": at / columns, "xmax": (at + len(piece)) / columns, "color": ORANGE, "alpha": share, "lw": 0},
                )
                axes.plot([at, at + len(piece)], [number + 0.9] * 2, color=BLACK, linewidth=0.8)
            for index, letter in enumerate(piece):
                axes.text(at + index + 0.5, number + 0.5, letter, **font)
            at += len(piece)
    save_figure(figure, path)
