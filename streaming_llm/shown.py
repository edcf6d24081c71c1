"""How a cache shows itself: one line in a terminal, a small table in a notebook."""

from __future__ import annotations

import html
from typing import Any

import torch

from .data.tokens import TIER_NAMES
from .layer import ADMSLayer
from .stats import format_bytes

# The archive and what it is found by are shown apart from what is attended to.
_ARCHIVE = ("archive", "index")
# Okabe and Ito's colours, neighbours of different lightness; the pictures of the evaluation have them too.
TIER_COLOURS = {
    "sink": "#000000",
    "exact": "#0072B2",
    "precision": "#56B4E9",
    "sketch": "#D55E00",
    "replay": "#E69F00",
    "recent": "#009E73",
}


def tokens_by_tier(cache: Any) -> dict[int, float]:
    """Tokens of each tier that holds any, of a head on average over rows, heads and layers of full attention."""
    held = [layer.held for layer in cache.layers if isinstance(layer, ADMSLayer) and layer.is_initialized]
    if not held:
        return {}
    heads = sum(tokens.beta.shape[0] * tokens.beta.shape[1] for tokens in held)
    counts = sum(torch.bincount(tokens.tier[tokens.valid].long(), minlength=len(TIER_NAMES) + 1).cpu() for tokens in held)
    return {tier: int(counts[tier]) / heads for tier in TIER_NAMES if counts[tier]}


class ShownMixin:
    """`repr(cache)`, and the table that a notebook shows for it."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(seen={self.get_seq_length()}, layers={len(self.layers)}, config={self.config!r})"

    def _repr_html_(self) -> str:
        """A table of tiers, tokens, bytes, archive and budgets; no script, style sheet or picture from elsewhere."""
        config, uses = self.config, self.memory_report()
        archive = sum(uses.pop(use, 0) for use in _ARCHIVE)
        tiers = {TIER_NAMES[tier]: tokens for tier, tokens in tokens_by_tier(self).items()}
        rows = [
            ("tokens seen", f"{self.get_seq_length():,}"),
            ("held by a head", f"{self.held_tokens:,} of at most {config.expected_max_tokens:,}"),
            *((f"&ensp;{_square(name)} {name}", f"{tokens:,.1f}") for name, tokens in tiers.items()),
            ("bytes", format_bytes(sum(uses.values()))),
            *(
                (f"&ensp;{html.escape(use)}", format_bytes(size))
                for use, size in uses.items()
                if size and use not in _ARCHIVE
            ),
        ]
        if config.enable_recall:
            tokens = self.stats["archived_tokens"]
            rows.append(("archive", f"{tokens:,} tokens of all layers and heads, {format_bytes(archive)}"))
        budgets = self.controller_budgets
        if len(budgets):
            found = sorted(int(budgets[head]) for head in budgets)
            rows.append(("budgets of heads", f"{found[0]:,} to {found[-1]:,}, median {found[len(found) // 2]:,}"))
        rows += [(html.escape(name), html.escape(repr(value))) for name, value in config.changed().items()]
        cells = "".join(
            f'<tr><td style="text-align:left">{name}</td><td style="text-align:right">{value}</td></tr>'
            for name, value in rows
        )
        kind = html.escape(type(self).__name__)
        return f"<table><caption>{kind}, {len(self.layers)} layers{_bar(tiers)}</caption>{cells}</table>"


def _square(tier: str) -> str:
    return f'<span style="color:{TIER_COLOURS[tier]}">&#9632;</span>'


def _bar(tiers: dict[str, float]) -> str:
    total = sum(tiers.values())
    order = [name for name in TIER_COLOURS if name in tiers]
    parts = "".join(
        f'<span style="display:inline-block;height:8px;width:{100 * tiers[name] / total:.1f}%;'
        f'background:{TIER_COLOURS[name]}"></span>'
        for name in order
    )
    return f'<div style="width:100%;font-size:0">{parts}</div>' if parts else ""
