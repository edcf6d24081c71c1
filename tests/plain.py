"""The cache of one row in plain loops: slow, one KV head at a time, written from the description and not from the package.

`plain_stream` runs a transformers model with its own modules and, in its layers of full attention, a cache and an attention
made of the loops below. What the package computes batched must equal it. Everything here is in double precision, so what
differs is the package's rounding. Base ADMS with the `low_rank` compressor only; `plain_modules.py` adds the rest to it.

Where two candidates are so close that rounding decides between them, nothing says which one is right. Every choice records
how close it was (`margins`), and a stream says up to which token no choice was closer than `TIE` (`PlainCache.steady`).
"""

from __future__ import annotations

import math

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import eager_mask

from streaming_llm import ADMSConfig

# Relative difference below which float32 may order two numbers otherwise than float64.
TIE = 1e-5
# What the description gives numbers for: `upkeep._PREFILL_STEP`, `merge._FAINT`, `low_rank._RIDGE` and `_ITERATIONS`.
PREFILL_STEP, FAINT, RIDGE, ITERATIONS = 4, 0.1, 0.01, 2
# `config.MOVE_QUERIES`: of the queries from before a compaction so many are kept for a move of positions.
MOVE_QUERIES = 16
# `low_rank._ROUNDING`: the least the ridge is, as a part of the keys' mean square; felt only where keys do not differ.
ROUNDING = 2.0**-23
# `merge._TINY`: what a token that others join is taken to draw at least.
TINY = 1e-12
# `tokens.CHANGED`: the least a token that was given a log-mass keeps of it.
CHANGED = 1e-7
NAME = "plain_reference"

# -- the merge -----------------------------------------------------------------------------------------------------------


def dot(left: list[float], right: list[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def attention_masses(queries, keys, betas, scale) -> list[float]:
    """Mean attention probability of each key over all queries; every query sees every key."""
    masses = [0.0] * len(keys)
    for query in queries:
        logits = [dot(query, key) * scale + beta for key, beta in zip(keys, betas, strict=True)]
        top = max(logits)
        weights = [math.exp(logit - top) for logit in logits]
        total = sum(weights)
        for slot, weight in enumerate(weights):
            masses[slot] += weight / total / len(queries)
    return masses


def value_weight(queries, values, scale) -> float:
    """What differences of values are multiplied by beside differences of keys (see `compressors.merge.value_scale`)."""
    dim = len(queries[0])
    query_energy = sum(dot(query, query) for query in queries) / len(queries) / dim * scale**2
    value_energy = sum(dot(value, value) for value in values) / len(values)
    return 1.0 / math.sqrt(query_energy * value_energy)


def accepting(masses, keep: set[int], pinned: set[int], protect: bool, margins: list[float]) -> set[int]:
    """Which of the kept tokens take others in: those that draw attention; with `protect` no pinned one, where another is."""
    faint = FAINT * sum(masses[slot] for slot in keep) / len(keep)
    margins += [abs(masses[slot] - faint) / faint for slot in keep]
    accepts = {slot for slot in keep if masses[slot] >= faint}
    if protect:
        accepts = (accepts - pinned) or (keep - pinned) or accepts
    return accepts


def merge(
    keys, values, betas, masses, counts, keep: set[int], weight: float, accepts: set[int] | None = None, margins=None
) -> list[dict]:
    """Every token not in `keep` joins the nearest kept one; the kept tokens with what they then stand for, in order.

    Args:
        accepts: those of `keep` that take others in, None for all.
        margins: how close each choice was is appended.
    """
    members = {slot: [slot] for slot in sorted(keep)}
    rows = [[*key, *(weight * x for x in value)] for key, value in zip(keys, values, strict=True)]
    for slot in range(len(keys)):
        if slot in keep:
            continue
        distances = []
        for kept in sorted(keep if accepts is None else accepts):
            distances.append((sum((a - b) ** 2 for a, b in zip(rows[slot], rows[kept], strict=True)), kept))
        distances.sort()
        members[distances[0][1]].append(slot)
        if margins is not None and len(distances) > 1:
            size = dot(rows[slot], rows[slot]) + max(dot(rows[kept], rows[kept]) for _, kept in distances[:2])
            margins.append((distances[1][0] - distances[0][0]) / size)
    result = []
    for kept, joined in members.items():
        parts = {slot: max(masses[slot], TINY) if slot == kept else masses[slot] for slot in joined}
        total = sum(parts.values())
        value = [sum(part * values[slot][d] for slot, part in parts.items()) / total for d in range(len(values[kept]))]
        result.append(
            {
                "slot": kept,
                "key": keys[kept],
                "value": value if len(joined) > 1 else values[kept],
                "beta": betas[kept] + math.log(total / parts[kept]) if len(joined) > 1 else betas[kept],
                "count": sum(counts[slot] for slot in joined),
                "mass": total if len(joined) > 1 else masses[kept],
                "members": joined,
            }
        )
    return result


# -- what is kept --------------------------------------------------------------------------------------------------------


def best(values: list[float], number: int, margins: list[float]) -> set[int]:
    """The indices of the `number` highest values."""
    ranked = sorted(range(len(values)), key=lambda index: -values[index])
    if 0 < number < len(values):
        last, next_one = values[ranked[number - 1]], values[ranked[number]]
        margins.append((last - next_one) / max(abs(last), 1e-30))
    return set(ranked[:number])


def orthonormal(columns: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gram-Schmidt, each column twice."""
    basis: list[torch.Tensor] = []
    for column in columns:
        for _ in range(2):
            for unit in basis:
                column = column - (column @ unit) * unit
            column = column / column.norm()
        basis.append(column)
    return basis


def leverage(keys: list[torch.Tensor], weights: list[float], config: ADMSConfig, margins: list[float]) -> list[float]:
    """Ridge leverage of each key in the rank-r subspace of the weighted, centred keys."""
    whole = sum(weights)
    shares = [weight / whole for weight in weights]
    fitted = [index for index, weight in enumerate(weights) if weight > 0]
    if len(keys) > config.svd_max_tokens:
        chosen = best([weights[index] for index in fitted], config.svd_max_tokens, margins)
        fitted = [fitted[index] for index in chosen]
    total = sum(shares[index] for index in fitted)
    dim = len(keys[0])
    mean = sum((shares[index] / total * keys[index] for index in fitted), torch.zeros(dim, dtype=torch.float64))
    covariance = torch.zeros(dim, dim, dtype=torch.float64)
    for index in fitted:
        away = keys[index] - mean
        covariance += shares[index] / total * torch.outer(away, away)
    trace = covariance.diagonal().sum().clamp_min(1e-30)
    ridge = max(RIDGE * trace, ROUNDING * sum(shares[index] / total * keys[index].square().sum() for index in fitted))
    start = torch.randn(dim, min(config.rank, dim), generator=torch.Generator().manual_seed(0)).double()
    basis = list(start.T)
    for _ in range(ITERATIONS):
        basis = orthonormal([covariance / trace @ unit + 1e-7 * first for unit, first in zip(basis, start.T, strict=True)])
    energies = [unit @ covariance @ unit for unit in basis]
    if len(fitted) < sum(weight > 0 for weight in weights):
        # A direction in which the fitted keys hardly differ is rounding's, and the other keys may well differ in it.
        margins.append(float(min(energies) / trace) / 100)
    result = []
    for key, share in zip(keys, shares, strict=True):
        codes = [(key - mean) @ unit for unit in basis]
        result.append(sum(float(share * c**2 / (e + ridge)) for c, e in zip(codes, energies, strict=True)))
    return result


def importance(tokens: list[dict], config: ADMSConfig) -> list[float]:
    scores = [token["score"] for token in tokens]
    lengths = [float(token["value"].norm()) for token in tokens]
    if config.importance_metric == "value_norm":
        return lengths
    if config.importance_metric == "key_norm":
        return [1 / float(token["key"].norm()) for token in tokens]
    if config.importance_metric == "mixed":
        return [score * length for score, length in zip(scores, lengths, strict=True)]
    blend = config.attention_blend
    if blend == 1:
        return scores
    return [blend * s / sum(scores) + (1 - blend) * v / sum(lengths) for s, v in zip(scores, lengths, strict=True)]


def covering(pool: list[dict], worth: list[float], wanted: int, config: ADMSConfig, margins: list[float]) -> list[float]:
    """The importance with the best tokens of each of `coverage_segments` stretches of the middle lifted above all others."""
    segments = config.coverage_segments
    each = round(config.coverage_priority * wanted) // segments
    if each == 0:
        return worth
    first, last = min(token["pos"] for token in pool), max(token["pos"] for token in pool)
    segment = [min(int((token["pos"] - first) / max(last - first, 1) * segments), segments - 1) for token in pool]
    lift, lifted = max(worth) + 1, list(worth)
    for number in range(segments):
        own = [slot for slot in range(len(pool)) if segment[slot] == number]
        for index in best([worth[slot] for slot in own], each, margins):
            lifted[own[index]] += lift
    return lifted


# -- one head ------------------------------------------------------------------------------------------------------------


def logits_of(query: torch.Tensor, tokens: list[dict], scale: float, softcap: float | None) -> torch.Tensor:
    """`softcap(q.k * scale) + beta` of each token."""
    logits = torch.stack([token["key"] for token in tokens]) @ query * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits + torch.tensor([token["beta"] for token in tokens], dtype=torch.float64)


def probabilities(query: torch.Tensor, tokens: list[dict], scale: float, softcap: float | None, bias=None) -> torch.Tensor:
    """Softmax of `logits_of` over the tokens; `bias`: what is added beside the log-mass."""
    logits = logits_of(query, tokens, scale, softcap)
    if bias is not None:
        logits = logits + bias
    weights = (logits - logits.max()).exp()
    return weights / weights.sum()


class PlainHead:
    """One KV head of one row: the tokens it holds, in order, and its newest queries.

    A head whose middle is not full has unused slots behind it: they count where slots are counted, and hold nothing.

    Attributes:
        width: slots of the middle after a compaction; unused: how many of them hold nothing.
        filled: tokens before those.
        queries: those stored, oldest first; folded: how many of them count in scores; kept: how many are from before the
            last compaction, or the last time that they all had to count. The former come first.
        fits: whether a compaction asks those kept, too.
    """

    fits = False

    def __init__(self, config: ADMSConfig):
        self.config = config
        self.tokens: list[dict] = []
        self.queries: list[torch.Tensor] = []
        self.kept = self.folded = 0
        self.seen = 0
        self.width = config.compressed_budget
        self.unused = self.filled = 0
        self.limit: int | None = None
        self.scale, self.softcap = 1.0, None
        self.compactions = 0
        self.margins: list[float] = []

    @property
    def length(self) -> int:
        """Slots in use."""
        return len(self.tokens) + self.unused

    def slot(self, index: int) -> int:
        """The slot of the token of that number."""
        return index if index < self.filled else index + self.unused

    @property
    def middle_slots(self) -> int:
        """Slots between sinks and recent window."""
        return self.length - self.config.dynamic_start_size - self.config.recent_size

    @property
    def compactable(self) -> bool:
        """Whether there is more between sinks and recent window than the budget."""
        return self.middle_slots > (self.width if self.compactions else self.config.middle_allocation)

    @property
    def capacity(self) -> int:
        """Slots that may be in use between two passes."""
        config = self.config
        if not self.compactions:
            return config.expected_max_tokens
        return config.dynamic_start_size + self.width + config.recent_size + config.compression_interval

    def is_due(self, new: int) -> bool:
        """Whether `new` more tokens would not fit."""
        return self.length + new > self.capacity and self.compactable

    def append(self, keys: torch.Tensor, values: torch.Tensor, positions: list[int]) -> None:
        for key, value, pos in zip(keys.double(), values.double(), positions, strict=True):
            self.seen += 1
            fresh = {"beta": 0.0, "score": 0.0, "mass": 0.0, "square": 0.0, "count": 1, "tier": "recent"}
            self.tokens.append({"key": key, "value": value, "pos": pos, **fresh})

    def attend(self, queries: list[torch.Tensor]) -> list[torch.Tensor]:
        """The output of each of the newest queries `[groups, head_dim]`, the last of which belongs to the last token."""
        outputs = []
        for number, groups in enumerate(queries):
            seen = self.tokens[: len(self.tokens) - len(queries) + number + 1]
            values = torch.stack([token["value"] for token in seen])
            outputs.append(torch.stack([probabilities(q, seen, self.scale, self.softcap) @ values for q in groups]))
        return outputs

    def observe(self, queries: list[torch.Tensor]) -> bool:
        """After attention: the queries are stored or folded. Returns whether the pass was too long: it is to be reduced."""
        scored = self.config.middle_allocation > 0
        if self.length > self.capacity:
            if scored:
                self.fold_long_pass(queries)
            return True
        if scored:
            self.store(queries)
        return False

    @property
    def keeps(self) -> int:
        """Queries kept from before a compaction: for a fit, else to hold against a move of positions."""
        if self.fits:
            return self.config.attention_window
        return 0 if self.config.positions == "absolute" else min(MOVE_QUERIES, self.config.compression_interval)

    @property
    def query_slots(self) -> int:
        """Queries there is room for."""
        return self.config.compression_interval + self.keeps

    @property
    def asked_at_compaction(self) -> list[torch.Tensor]:
        """The queries a compaction asks: those since the last one, and those kept for a fit."""
        return self.queries if self.fits else self.queries[self.kept :]

    def make_query_room(self, new: int) -> None:
        """Before a pass: where its `new` queries would be more than fit, those stored count, and the newest are kept."""
        room = self.query_slots if self.fits else self.config.compression_interval
        if len(self.asked_at_compaction) + new > room:
            self.fold_waiting(len(self.tokens))
            self.keep(max(0, self.query_slots - max(new, self.config.compression_interval)))

    def store(self, queries: list[torch.Tensor]) -> None:
        if len(queries) > self.query_slots:
            self.fold(queries, len(self.tokens), len(queries))
            return self.keep_folded(queries)
        self.queries = self.queries + queries

    def keep_folded(self, queries: list[torch.Tensor]) -> None:
        """The newest of a pass's queries, which count already, are what is stored now."""
        self.queries = queries[-self.query_slots :]
        self.folded = len(self.queries)
        self.kept = max(0, self.folded - self.config.compression_interval)

    def keep(self, number: int) -> None:
        """Of the stored queries, which count already, the newest `number` stay."""
        self.queries = self.queries[max(0, len(self.queries) - number) :]
        self.kept = self.folded = len(self.queries)

    def newest(self) -> list[torch.Tensor]:
        """The newest queries, as many as are kept from before a compaction, at most `recent_size`."""
        number = min(self.keeps, self.config.recent_size)
        return self.queries[-number:] if number else []

    def fold_waiting(self, length: int) -> None:
        waiting = self.queries[self.folded :]
        self.fold(waiting, length, len(waiting))
        self.folded = len(self.queries)

    def fold_long_pass(self, queries: list[torch.Tensor]) -> None:
        """Blocks of `attention_window` queries counted from the newest; of those before the last block every fourth."""
        new = len(queries)
        before = len(self.tokens) - new
        ends = list(range(new, 0, -self.config.attention_window))
        for stop in reversed(ends):
            start = max(0, stop - self.config.attention_window)
            step = 1 if stop == new else PREFILL_STEP
            asked = [queries[number] for number in range(start, stop) if (stop - 1 - number) % step == 0]
            self.fold(asked, before + stop, stop - start, step)
        self.keep_folded(queries)

    def fold(self, queries: list[torch.Tensor], length: int, count: int, step: int = 1) -> None:
        """Into the averages and scores of the first `length` tokens goes what the queries, `step` tokens apart, attend to.

        The newest query belongs to the last of them; each sees the tokens up to its own. They stand for `count` queries.
        """
        if not queries or not length:
            return
        tokens = self.tokens[:length]
        mass = torch.zeros(length, dtype=torch.float64)
        square = torch.zeros(length, dtype=torch.float64)
        for age, groups in enumerate(reversed(queries)):
            seen = length - age * step
            for query in groups:
                p = probabilities(query, tokens[:seen], self.scale, self.softcap)
                mass[:seen] += p / (len(queries) * len(groups))
                square[:seen] += p**2 / (len(queries) * len(groups))
        share = min(1.0, count / self.config.attention_window)
        for token, m, s in zip(tokens, mass.tolist(), square.tolist(), strict=True):
            token["mass"] = (1 - share) * token["mass"] + share * m
            token["square"] = (1 - share) * token["square"] + share * s
            token["score"] = max(self.config.score_decay ** (count / 64) * token["score"], math.sqrt(token["square"]))

    def compact(self, width: int | None = None) -> None:
        """Sinks and recent window stay; the middle is reduced to the budget, in `width` slots where they are others now."""
        assert self.compactable
        self.forget()
        self.reduce(self.width if width is None else width)
        self.keep(self.keeps)

    def reduce(self, width: int) -> None:
        config = self.config
        first, last = config.dynamic_start_size, len(self.tokens) - config.recent_size
        sinks, middle, recent = self.tokens[:first], self.tokens[first:last], self.tokens[last:]
        # Where the widest head may keep more than there is, as many unused slots come to it as make one too many.
        size = self.middle_slots if self.middle_slots > width else width + 1
        kept = self.compressed(middle, width, size) if width else []
        for token in sinks:
            token["tier"] = "sink"
        for token in recent:
            token["tier"] = "recent"
        self.tokens = sinks + kept + recent
        self.width, self.unused, self.filled = width, width - len(kept), first + len(kept)
        self.compactions += 1

    def forget(self) -> None:
        """Past the trained length what tokens weigh for others fades."""
        config = self.config
        if not self.compactions or self.limit is None or self.seen <= self.limit:
            return
        since = self.length - config.dynamic_start_size - self.width - config.recent_size
        left = config.mass_decay ** (since / 64)
        for token in self.tokens:
            if token["beta"] > CHANGED:
                lighten(token, math.log(1 + (math.exp(token["beta"]) - 1) * left))

    def drawn(self, queries: list[torch.Tensor], sums: list[list[float]] | None = None) -> tuple[list[float], list]:
        """What each token draws of the queries, and each query's sum of weights; `sums`: divide by these instead."""
        draws, own = [0.0] * len(self.tokens), []
        for age, groups in enumerate(reversed(queries)):
            own.append([])
            for number, query in enumerate(groups):
                seen = self.tokens[: len(self.tokens) - age]
                weights = logits_of(query, seen, self.scale, self.softcap).exp().tolist()
                own[-1].append(sum(weights))
                for slot, weight in enumerate(weights):
                    draws[slot] += weight / (own[-1][-1] if sums is None else sums[age][number])
        return draws, own

    def compressed(self, middle: list[dict], width: int, size: int) -> list[dict]:
        """What the middle, of `size` slots, becomes: at most `width` tokens in order."""
        kept, _ = self.low_rank(middle, width, None, width, size)
        return kept

    def pins(self, pool: list[dict], width: int, budget: int | None, least: int, size: int) -> set[int]:
        """Which of the candidates come out with their own key; arguments as for `low_rank`."""
        config = self.config
        exact = max(config.min_importance_tokens, round(config.importance_ratio * width))
        if size < config.min_middle_size_for_compress or exact > width:
            exact = width
        wanted = exact
        if budget is not None:
            wanted = max(round(budget * (exact / width)), min(config.min_importance_tokens, least))
        worth = importance(pool, config)
        return best(covering(pool, worth, exact, config, self.margins), wanted, self.margins)

    def low_rank(
        self, pool: list[dict], width: int, budget: int | None, least: int, size: int
    ) -> tuple[list[dict], list[dict]]:
        """Pins and the tokens of highest leverage, the rest merged into them.

        Args:
            pool: the candidates.
            width: slots there are for what is kept.
            budget: tokens that may be, None for all of them; least: the fewest any head may keep.
            size: slots of the candidates.

        Returns:
            `(kept, assigned)`: the tokens kept in order, and for each candidate the one that has its mass now.
        """
        worth = importance(pool, self.config)
        pinned = self.pins(pool, width, budget, least, size)
        weights = [0.0 if slot in pinned else worth[slot] for slot in range(len(pool))]
        # Where none is left to choose there is no subspace either.
        number = width if budget is None else budget
        levers = [0.0] * len(pool)
        if len(pinned) < min(number, len(pool)):
            levers = leverage([token["key"] for token in pool], weights, self.config, self.margins)
        return self.merged(pool, pinned, levers, number)

    def merged(
        self, pool: list[dict], pinned: set[int], priority: list[float], number: int
    ) -> tuple[list[dict], list[dict]]:
        """The pins and those of highest priority, `number` in all, with what joins them; returns as `low_rank` does."""
        others = [slot for slot in range(len(pool)) if slot not in pinned]
        chosen = best([priority[slot] for slot in others], number - len(pinned), self.margins)
        keep = pinned | {others[index] for index in chosen}
        masses = [token["mass"] for token in pool]
        accepts = accepting(masses, keep, pinned, self.config.protect_exact, self.margins)
        queries = [query.tolist() for groups in self.asked_at_compaction[-self.config.recent_size :] for query in groups]
        values = [token["value"].tolist() for token in pool]
        result: list[dict] = []
        assigned: list[dict] = [{}] * len(pool)
        for made in merge(
            [token["key"].tolist() for token in pool],
            values,
            [token["beta"] for token in pool],
            masses,
            [token["count"] for token in pool],
            keep,
            value_weight(queries, values, self.scale),
            accepts,
            self.margins,
        ):
            token = dict(pool[made["slot"]])
            if made["count"] != token["count"]:
                token["value"] = torch.tensor(made["value"], dtype=torch.float64)
                token["beta"], token["count"], token["mass"] = made["beta"], made["count"], made["mass"]
            token["tier"] = "exact" if made["slot"] in pinned and token["count"] == 1 else "precision"
            result.append(token)
            for member in made["members"]:
                assigned[member] = token
        return result, assigned

    def rebase(self, d: int, inv_freq: torch.Tensor) -> None:
        """Every token moves `d` positions back, but not before its slot; the stored queries move with the newest.

        What weighs more than itself then draws no more than before.
        """
        before, sums = self.drawn(self.newest()) if self.compactions else ([], [])
        for index, token in enumerate(self.tokens):
            new = max(token["pos"] - d, self.slot(index))
            token["key"] = turned(token["key"], new - token["pos"], inv_freq)
            token["pos"] = new
        self.queries = [torch.stack([turned(q, -d, inv_freq) for q in groups]) for groups in self.queries]
        if sums:
            after, _ = self.drawn(self.newest(), sums)
            for token, old, new in zip(self.tokens, before, after, strict=True):
                if token["beta"] > CHANGED and new > old:
                    lighten(token, token["beta"] - math.log(new / old))


def lighten(token: dict, beta: float) -> None:
    """A lower log-mass for a token that weighs more than itself, its masses with it; it never weighs less than itself."""
    beta = max(beta, CHANGED)
    share = math.exp(beta - token["beta"])
    token["beta"], token["mass"], token["square"] = beta, token["mass"] * share, token["square"] * share**2


def turned(state: torch.Tensor, delta: int, inv_freq: torch.Tensor) -> torch.Tensor:
    """A rotated key or query `[head_dim]` taken `delta` positions on; dimension i is paired with i + rotary_dim / 2."""
    half = len(inv_freq)
    result = state.clone()
    for pair in range(half):
        angle = delta * float(inv_freq[pair])
        one, other = float(state[pair]), float(state[pair + half])
        result[pair] = one * math.cos(angle) - other * math.sin(angle)
        result[pair + half] = other * math.cos(angle) + one * math.sin(angle)
    return result


# -- one row on a model --------------------------------------------------------------------------------------------------


class PlainLayer(CacheLayerMixin):
    """The heads of one layer of full attention, and what transformers asks of them."""

    is_sliding = False
    head_class = PlainHead

    def __init__(self, config: ADMSConfig):
        super().__init__()
        self.config = config
        self.heads: list[PlainHead] = []
        self.seen = 0
        self.positions: list[int] = []

    def lazy_initialization(self, key_states, value_states) -> None:
        self.heads = [self.head_class(self.config) for _ in range(key_states.shape[1])]
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.make_room(key_states.shape[2])
        for head, keys, values in zip(self.heads, key_states[0], value_states[0], strict=True):
            head.make_query_room(key_states.shape[2])
            head.append(keys, values, self.positions)
        self.seen += key_states.shape[2]
        return key_states, value_states

    def make_room(self, new: int) -> None:
        """Compact where `new` more tokens would not fit."""
        if self.heads and self.heads[0].is_due(new):
            for head in self.heads:
                head.fold_waiting(len(head.tokens))
            self.compact()

    def compact(self) -> None:
        for head in self.heads:
            head.compact()

    def attend(self, query: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
        """`[heads, tokens, head_dim]` in, `[heads, tokens, value_dim]` out; then the heads take note of the queries."""
        groups = query.shape[0] // len(self.heads)
        outputs, too_long = [], []
        for number, head in enumerate(self.heads):
            head.scale, head.softcap = scale, softcap
            queries = list(query[number * groups : (number + 1) * groups].double().transpose(0, 1))
            outputs.append(torch.stack(head.attend(queries), dim=1))
            too_long.append(head.observe(queries))
        if too_long[0]:
            self.compact()
        return torch.cat(outputs)

    def get_mask_sizes(self, query_length) -> tuple[int, int]:
        new = query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length
        return self.seen + new, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


class PlainCache(Cache):
    """One row's cache: `PlainLayer` for full attention, transformers' own layer where there is a sliding window.

    Args:
        window: positions stay below it: before a pass whose last position would not, everything held moves back (`rebase`),
            so that the next position is the number of slots in use, or `target` where that is more. None: they only grow.
            A compaction due in the coming pass comes before the move; one after a long pass has its move before the next.
        at_compaction: move back at each compaction instead, to the number of slots in use after it.
        limit: tokens from which on what is merged fades; None for `window`.

    Attributes:
        given: the position the row's next token would have if nothing had moved.
        moved: sum of all moves; the model is given a position less this.
        rebases: number of moves.
        fed: tokens streamed.
        steady: tokens up to which no choice was closer than `TIE`.
    """

    layer_class = PlainLayer

    def __init__(
        self,
        model: PreTrainedModel,
        config: ADMSConfig,
        window: int | None = None,
        target: int | None = None,
        at_compaction: bool = False,
        limit: int | None = None,
    ):
        modules = ("sketch_budget", "replay_budget", "enable_position_calibration", "enable_adaptive_controller")
        beyond = [name for name in (*modules, "use_adaptive_budget") if getattr(config, name)]
        if self.layer_class is PlainLayer and (beyond or config.compressor_type != "low_rank"):
            raise ValueError(f"plain.py is base ADMS with low_rank only, not {beyond or config.compressor_type}")
        own = DynamicCache(config=model.config).layers
        super().__init__(layers=[layer if layer.is_sliding else self.layer_class(config) for layer in own])
        self.window, self.target, self.at_compaction = window, target or 0, at_compaction
        self.limit = window if limit is None else limit
        tables = [module.inv_freq for module in model.modules() if hasattr(module, "inv_freq")]
        self.inv_freq = tables[0].double() if tables else None
        self.given = self.moved = self.rebases = self.fed = self.steady = 0
        self._compactions = 0

    @property
    def heads(self) -> list[PlainHead]:
        return [head for layer in self.layers if isinstance(layer, PlainLayer) for head in layer.heads]

    @property
    def compactions(self) -> int:
        """Compactions of each head (all have the same)."""
        return self.heads[0].compactions if self.heads else 0

    @property
    def closest(self) -> float:
        """The smallest margin of any choice so far."""
        return min((margin for head in self.heads for margin in head.margins), default=math.inf)

    def state(self) -> list[list[list[dict]] | None]:
        """`[layer][head][slot]`: the tokens held; None for a layer with a sliding window."""
        plain = (layer if isinstance(layer, PlainLayer) else None for layer in self.layers)
        return [None if layer is None else [head.tokens for head in layer.heads] for layer in plain]

    def begin(self, positions: list[int]) -> list[int]:
        """The positions the model is given for new tokens at `positions`, after a move where one is due."""
        for head in self.heads:
            head.limit = self.limit
        for layer in self.layers:
            if isinstance(layer, PlainLayer):
                layer.make_room(len(positions))
        if self.at_compaction:
            due = self.compactions > self._compactions
            self._compactions = self.compactions
        else:
            due = self.window is not None and positions[-1] - self.moved >= self.window
        if due and self.heads:
            self.rebase(positions[-1] - positions[0] + 1)
        self.given = positions[-1] + 1
        inside = [position - self.moved for position in positions]
        for layer in self.layers:
            layer.positions = inside
        return inside

    def rebase(self, span: int) -> None:
        goal = max(max(head.length for head in self.heads), self.target)
        d = self.given - self.moved - (goal if self.window is None else min(goal, self.window - span))
        if d <= 0:
            return
        for head in self.heads:
            head.rebase(d, self.inv_freq)
        for layer in self.layers:
            if not isinstance(layer, PlainLayer):
                for head in layer.keys[0]:
                    for key in head:
                        key.copy_(turned(key, -d, self.inv_freq))
        self.moved += d
        self.rebases += 1

    def attention(self, module, query, key, value, attention_mask, **kwargs):
        """What the model's attention calls: `[1, heads, tokens, head_dim]` in, `[1, tokens, heads, value_dim]` out."""
        layer = self.layers[module.layer_idx]
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if isinstance(layer, PlainLayer):
            output = layer.attend(query[0], scale, kwargs.get("softcap"))
        else:
            output = _masked(query[0], key[0], value[0], attention_mask[0, 0], scale, kwargs.get("softcap"))
        return output.to(query.dtype).transpose(0, 1)[None], None


def _masked(query, keys, values, mask, scale, softcap) -> torch.Tensor:
    """Attention of a sliding layer: what is seen is the mask's business."""
    groups = query.shape[0] // keys.shape[0]
    outputs = []
    for number, head in enumerate(query.double()):
        tokens = [{"key": key, "beta": 0.0} for key in keys[number // groups].double()]
        rows = [probabilities(q, tokens, scale, softcap, bias) for q, bias in zip(head, mask.double(), strict=True)]
        outputs.append(torch.stack(rows) @ values[number // groups].double())
    return torch.stack(outputs)


def chunk_sizes(tokens: int, chunks: int | list[int]) -> list[int]:
    """`chunks` as a list that sums to `tokens`: a number is that many a pass, a list's last entry goes on as needed."""
    sizes = [chunks] if isinstance(chunks, int) else list(chunks)
    result: list[int] = []
    while sum(result) < tokens:
        size = sizes[min(len(result), len(sizes) - 1)]
        result.append(min(size, tokens - sum(result)))
    return result


@torch.no_grad()
def plain_stream(
    model: PreTrainedModel,
    ids: torch.Tensor,
    config: ADMSConfig,
    chunks: int | list[int],
    position_ids: torch.Tensor | None = None,
    cache: PlainCache | None = None,
    **window,
) -> tuple[torch.Tensor, PlainCache]:
    """Stream one row through the model with the plain cache; its attention implementation is restored afterwards.

    Args:
        ids: `[1, tokens]`.
        chunks: tokens of each pass, see `chunk_sizes`.
        position_ids: `[1, tokens]`; None counts on from the last.
        cache: one to go on with; None for a new `PlainCache(model, config, **window)`.

    Returns:
        `(logits, cache)`: `[1, tokens, vocab]`, and the cache with its state.
    """
    cache = PlainCache(model, config, **window) if cache is None else cache
    if position_ids is None:
        position_ids = torch.arange(cache.given, cache.given + ids.shape[1])[None]
    before = model.config._attn_implementation
    AttentionInterface.register(NAME, cache.attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    model.set_attn_implementation(NAME)
    parts, done = [], 0
    try:
        for size in chunk_sizes(ids.shape[1], chunks):
            inside = torch.tensor([cache.begin(position_ids[0, done : done + size].tolist())])
            part = ids[:, done : done + size]
            parts.append(model(input_ids=part, position_ids=inside, past_key_values=cache, use_cache=True).logits)
            done += size
            cache.fed += size
            if cache.closest >= TIE:
                cache.steady = cache.fed
    finally:
        model.set_attn_implementation(before)
    return torch.cat(parts, dim=1), cache
