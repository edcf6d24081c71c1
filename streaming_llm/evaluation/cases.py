"""One small case for each ADM++ module, made so that what it is for can be seen: random tensors, no model.

Each case compares the same layer with the module off and on, or asks a documented part by hand. The numbers say what a
module does where it has something to do; what it is worth on text is for the ablation to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from streaming_llm.cache import ADMSKVCache
from streaming_llm.compaction.controller import attention_output, layer_budgets
from streaming_llm.compaction.replay import replay, replay_count
from streaming_llm.config import ADMSConfig
from streaming_llm.data.queries import Queries
from streaming_llm.data.tokens import WeightedTokens, concatenate
from streaming_llm.maths.budgets import share_budget

from . import flags
from .lone_layer import LoneLayer
from .report import markdown_columns
from .run import Run

HEADS, GROUPS, DIM = 2, 2, 16
SINKS, RECENT, MIDDLE, INTERVAL = 4, 32, 24, 16
# Position of the token that is forgotten and asked for later.
NEEDLE = 40


@dataclass
class Case:
    """One line of the table: what was measured, without the module and with it."""

    module: str
    measured: str
    without: float
    with_module: float


def _layer(**settings) -> LoneLayer:
    base = {"start_size": SINKS, "recent_size": RECENT, "compression_interval": INTERVAL, "attention_window": 64}
    base |= {"min_middle_size_for_compress": 0, "rank": 8}
    return LoneLayer(ADMSConfig(**(base | settings)), wired=True)


def _states(tokens: int, seed: int, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values and queries of a head group; keys lie round 12 centres at a distance of `spread`."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(HEADS, 12, DIM, generator=generator, dtype=torch.float32)
    which = torch.randint(12, (tokens,), generator=generator)
    keys = centres[:, which] + spread * torch.randn(HEADS, tokens, DIM, generator=generator, dtype=torch.float32)
    values = torch.randn(HEADS, tokens, DIM, generator=generator, dtype=torch.float32)
    queries = torch.randn(HEADS * GROUPS, tokens, DIM, generator=generator, dtype=torch.float32)
    return keys[None], values[None], queries[None]


@torch.no_grad()
def _run(layer: LoneLayer, keys: torch.Tensor, values: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Stream the states through the layer; relative squared error of its attention output, `[chunks]`."""
    errors = []
    for start in range(0, keys.shape[2], INTERVAL):
        stop = start + INTERVAL
        held_k, held_v = layer.update(keys[:, :, start:stop], values[:, :, start:stop])
        asked = queries[:, :, start:stop]
        bias = layer.attention_bias(INTERVAL, GROUPS, torch.float32)
        output = _attention(asked, held_k, held_v, bias)
        hidden = keys.new_full((INTERVAL, stop), -torch.inf).triu(start + 1)
        truth = _attention(asked, keys[:, :, :stop], values[:, :, :stop], hidden)
        errors.append((output - truth).square().sum() / truth.square().sum())
        layer.observe(asked, DIM**-0.5)
    return torch.stack(errors)


def _attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    keys, values = keys.repeat_interleave(GROUPS, 1), values.repeat_interleave(GROUPS, 1)
    return torch.nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)


def _mean_error(seeds: int, spread: float = 1.0, **settings) -> float:
    runs = [_run(_layer(**settings), *_states(320, seed, spread))[8:].mean() for seed in range(seeds)]
    return float(torch.stack(runs).mean())


def sketches_keep_mass(seeds: int) -> list[Case]:
    """Attention output error where the overflow is dropped, and where it becomes sketches; equal tokens."""
    from streaming_llm import baselines  # noqa: F401  registers the evicting policies

    dropped = _mean_error(seeds, compressed_budget=MIDDLE, compressor_type="h2o", importance_ratio=0.0)
    settings = {"compressed_budget": MIDDLE - 8, "enable_dual_fidelity": True, "sketch_budget": 8}
    sketched = _mean_error(seeds, **settings)
    return [Case("dual fidelity", "attention output error: overflow dropped / sketched", dropped, sketched)]


@torch.no_grad()
def promoted_originals(seeds: int) -> list[Case]:
    """The attention a sketched token itself gets once the queries come to ask for it: never or four sketches promoted."""
    share: dict[int, list[float]] = {0: [], 4: []}
    for promotion_budget, found in share.items():
        for seed in range(seeds):
            layer = _layer(
                compressed_budget=MIDDLE - 8,
                enable_dual_fidelity=True,
                sketch_budget=8,
                sketch_originals=64,
                promotion_budget=promotion_budget,
            )
            keys, values, queries = _states(160, seed)
            # One direction is the needle's own; until it is asked for, nothing looks there but away from it.
            keys[..., -1], queries[..., -1] = 0.0, -1.0
            keys[:, :, NEEDLE, -1] = 8.0
            _run(layer, keys, values, queries)
            more = _states(4 * INTERVAL, 1000 + seed)
            more[0][..., -1], more[2][..., -1] = 0.0, 4.0
            _run(layer, *more)
            held = layer.held
            itself = (held.pos == NEEDLE) & (held.count == 1) & (held.beta == 0)
            found.append(float((held.mass * itself).sum(-1).mean()))
    before, after = (sum(found) / len(found) for found in share.values())
    return [
        Case("dual fidelity", "attention to a sketched token once it is asked for: never promoted / promoted", before, after)
    ]


@torch.no_grad()
def replay_lowers_the_error(seeds: int) -> list[Case]:
    """Output error right before and right after originals are re-injected, and where compactions trigger that at all."""
    on = {"compressed_budget": MIDDLE - 8, "enable_residual_replay": True, "replay_budget": 8}

    def states(seed: int, alike: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        keys, values, queries = _states(320, seed, 0.02 if alike else 2.0)
        # Where the values of neighbours differ, merging averages them away.
        return keys, keys.clone() if alike else 8.0 * values, queries

    errors = []
    for seed in range(seeds):
        layer = _layer(**on, energy_replay_threshold=1e-6)
        keys, values, queries = states(seed, alike=False)
        _run(layer, keys, values, queries)
        asked = Queries(queries[:, :, -INTERVAL:].unflatten(1, (HEADS, GROUPS)), DIM**-0.5)
        truth = attention_output(asked, WeightedTokens.new(keys, values, torch.arange(320)[None, None]))
        before = attention_output(asked, layer.held)
        middle = layer.buffer.slice(SINKS, SINKS + layer.width)
        count = replay_count(torch.zeros(1, HEADS, dtype=torch.float32), 0.88, 8)
        rest, back = replay(middle, layer.originals, count, 8)
        ends = layer.held.slice(0, SINKS), layer.held.slice(SINKS + layer.width, layer.length)
        after = attention_output(asked, concatenate([ends[0], rest, back, ends[1]]))
        errors.append([float((output - truth).square().sum() / truth.square().sum()) for output in (before, after)])
    lost = torch.tensor(errors, dtype=torch.float32).mean(0).tolist()

    def triggers(alike: bool) -> float:
        layer = _layer(**on, energy_replay_threshold=0.88)
        _run(layer, *states(0, alike))
        return float(layer.replay_triggers) / max(1, layer.head_compactions)

    return [
        Case("replay", "attention output error before / after eight originals are re-injected", *lost),
        Case("replay", "compactions that trigger: values alike / values that differ", triggers(True), triggers(False)),
    ]


def calibration_follows_the_drift() -> list[Case]:
    """Mean error in positions of synthetic tokens on a stream whose true positions run ahead of the count."""
    cache = ADMSKVCache(ADMSConfig(start_size=4, recent_size=256, enable_position_calibration=True))
    cache.current_length = 4096
    count = torch.arange(4096)
    true = 1.05 * count + 7
    cache._update_calibration_anchors(0, 0, true[-512:])
    synthetic = count[1024:3800:40].float()
    placed = cache._calibrate_synthetic_positions(0, 0, synthetic, torch.zeros(len(synthetic), 1, dtype=torch.float32))
    wanted = true[1024:3800:40]
    before, after = ((positions - wanted).abs().mean() for positions in (synthetic, placed))
    return [
        Case(
            "calibration", "mean error of synthetic positions, positions 5% ahead of the count", float(before), float(after)
        )
    ]


def budgets_go_where_they_are_needed() -> list[Case]:
    """Budgets of two layers of which one loses ten times as much at every compaction, and their sum."""
    lost = torch.tensor([[0.1, 0.01]], dtype=torch.float32)
    budgets = layer_budgets(lost, 100)[0].tolist()
    equal = share_budget(torch.ones(2, dtype=torch.float32), 100, 1, 200).tolist()
    return [
        Case("controller", "budget of a layer that loses ten times as much as the other (equal: 100)", equal[0], budgets[0]),
        Case("controller", "budgets of both together", sum(equal), sum(budgets)),
    ]


def run_cases(seeds: int = 8) -> list[Case]:
    """All cases; `seeds` random streams for each that is an average."""
    if seeds < 1:
        raise ValueError(f"seeds={seeds} must be at least 1")
    made: list[Callable[[], list[Case]]] = [
        lambda: sketches_keep_mass(seeds),
        lambda: promoted_originals(seeds),
        lambda: replay_lowers_the_error(seeds),
        calibration_follows_the_drift,
        budgets_go_where_they_are_needed,
    ]
    return [case for make in made for case in make()]


COLUMNS: dict[str, Callable[[Case], str]] = {
    "module": lambda case: case.module,
    "measured": lambda case: case.measured,
    "without / first": lambda case: f"{case.without:.4g}",
    "with / second": lambda case: f"{case.with_module:.4g}",
}


@dataclass
class CasesArguments:
    """The flags."""

    seeds: int = flags.count("random streams for each case that is an average (%(default)s)", 8)


class Cases(Run):
    """Show what each ADM++ module does on a small case made for it (random tensors, no model)."""

    prog = "module_cases.py"
    Arguments = CasesArguments
    sizes = None
    packages = ()

    def measure(self) -> Iterator[None]:
        """Run all cases."""
        self.found = run_cases(self.arguments.seeds)
        yield

    def table(self) -> None:
        """Print the table."""
        print(markdown_columns(self.found, COLUMNS))
