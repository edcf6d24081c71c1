"""The modules and the other compressors in plain loops, one head at a time, on top of `plain.py`.

`ModuleCache(model, config)`, given to `plain.plain_stream`, is the reference of a cache with sketches, replay, calibration,
the controller in both scopes, budgets by variance, `vq` and `attention_matching`. Written from the description, in double
precision. An original refers to the token that stands for it by itself, not by a slot.
"""

from __future__ import annotations

import math

import torch
from plain import CHANGED, PlainCache, PlainHead, PlainLayer, best, dot, importance, orthonormal, probabilities, turned

from streaming_llm import ADMSConfig

# What the description gives numbers for: `dual_fidelity._FAINT`, `_MOST_LOG_GAIN`, `pipeline._QUERY_STEP`,
# `_RETURNED_SHARE`, `originals._LEAST_REST`, `sizing.REPLAY_BANK`, `replay.SPECTRAL_RANK`, `low_rank._ITERATIONS`.
FAINT, MOST_LOG_GAIN, SKETCH_QUERY_STEP, RETURNED_SHARE = 0.1, 1.0, 8, 0.125
LEAST_REST, REPLAY_BANK, SPECTRAL_RANK, ITERATIONS = 0.5, 4, 8, 2
# `calibration.MIN_ANCHORS` and `BLEND`; what a key moves at least (`pipeline._Compaction._placed`).
MIN_ANCHORS, BLEND, LEAST_MOVE = 10, 0.7, 1e-2
# `controller.QUERY_STEP`, `EXPONENT`, `GRAIN`; `pipeline._MEASURED_FIRST`, `_MEASURED_EVERY`; `trading._FIRST`, `_EVERY`.
CONTROL_QUERY_STEP, EXPONENT, GRAIN = 8, 0.7, 4
MEASURED_FIRST, MEASURED_EVERY, PLANNED_FIRST, PLANNED_EVERY = 8, 4, 2, 64
# `vq._ROUNDS`, `_STEPS`; `attention_matching._RIDGE`, `_QUERY_STEP`, `_MASS_RANGE`.
DRAWS, LLOYD_STEPS = 4, 4
MATCHING_RIDGE, MATCHING_QUERY_STEP, MASS_RANGE = 0.1, 2, (0.05, 20.0)


def every(items: list, step: int) -> list:
    """Every `step`-th item, the newest among them."""
    return items[::-1][::step][::-1]


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).square().sum())


# -- budgets -------------------------------------------------------------------------------------------------------------


def shared(weights: list[float], base: int, low: int, high: int, margins: list[float]) -> list[int]:
    """Whole budgets in proportion to the weights, within limits, `base` on average; largest remainders round up."""
    total = base * len(weights)
    weights = [weight + 1e-12 for weight in weights]
    lower, upper = (math.log(max(base, 1e-9) / edge) for edge in (max(weights), min(weights)))
    for _ in range(40):
        scale = (lower + upper) / 2
        if sum(min(max(weight * math.exp(scale), low), high) for weight in weights) >= total:
            upper = scale
        else:
            lower = scale
    shares = [min(max(weight * math.exp(upper), low), high) for weight in weights]
    whole = [math.floor(share) for share in shares]
    rests = [share - floor if floor < high else -1.0 for share, floor in zip(shares, whole, strict=True)]
    ranked = sorted(range(len(weights)), key=lambda index: -rests[index])
    missing = total - sum(whole)
    if 0 < missing < len(weights):
        margins.append(abs(rests[ranked[missing - 1]] - rests[ranked[missing]]) or math.inf)
    for index in ranked[:missing]:
        whole[index] += 1
    return whole


def variance(tokens: list[dict]) -> float:
    """Variance over mean square of the keys and of the values, averaged."""
    parts = []
    for name in ("key", "value"):
        mean = sum(token[name] for token in tokens) / len(tokens)
        spread = sum(distance(token[name], mean) for token in tokens)
        parts.append(spread / sum(float(token[name].square().sum()) for token in tokens))
    return sum(parts) / 2


# -- one head ------------------------------------------------------------------------------------------------------------


class ModuleHead(PlainHead):
    """A head with what the modules remember of it.

    Attributes:
        originals: tokens kept outside the attended set, in no order: `key`, `value`, `pos`, `score`, `share` (of the mass of
            `parent`, the token that stands for it) and `order` (number of its arrival).
        reserved: slots kept free for replay.
        anchors: pairs of a synthetic and a true position, the newest last; offsets: of the last fit.
        energy, mass, measured: the controller's averages, and how many measurements there were.
        decided: the budget in force, 0 before the first decision.
        budget, least: tokens the precision tier may hold in the compaction that comes (None: all), and the fewest any may.
    """

    def __init__(self, config: ADMSConfig):
        super().__init__(config)
        self.width = config.widest_middle
        self.fits = config.compressor_type != "low_rank"
        self.inv_freq: torch.Tensor | None = None
        self.originals: list[dict] = []
        self.reserved = config.replay_budget
        self.anchors: list[tuple[float, float]] = []
        self.offsets = (1.0, 0.0)
        self.energy, self.mass, self.measured, self.decided = 1.0, 0.0, 0, 0
        self.budget: int | None = None
        self.least = 0
        self.variance: float | None = None
        self.promotions = self.triggers = self.replayed = self.calibrations = self.adjustments = 0

    @property
    def reference(self) -> list[list[torch.Tensor]]:
        """The newest stored queries, those that have seen all candidates."""
        return self.asked_at_compaction[-self.config.recent_size :]

    def asked(self, tokens: list[dict], step: int = 1) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        """`(query, what it sees of the tokens, its normaliser)` of every `step`-th of `reference`."""
        result = []
        queries = self.reference
        for number, groups in enumerate(queries):
            age = len(queries) - 1 - number
            if age % step:
                continue
            seen = tokens[: len(tokens) - age]
            for query in groups:
                own = torch.stack([self.logit(query, token["key"]) + token["beta"] for token in seen])
                result.append((query, own, float(own.logsumexp(0))))
        return result

    def logit(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        logit = query @ key * self.scale
        return logit if self.softcap is None else self.softcap * torch.tanh(logit / self.softcap)

    # -- the controller's measurement ------------------------------------------------------------------------------------

    def outputs(self, step: int) -> list[torch.Tensor]:
        """Attention output over all that is held of every `step`-th query."""
        queries, result = self.reference, []
        for number, groups in enumerate(queries):
            age = len(queries) - 1 - number
            if age % step == 0:
                seen = self.tokens[: len(self.tokens) - age]
                values = torch.stack([token["value"] for token in seen])
                result += [probabilities(query, seen, self.scale, self.softcap) @ values for query in groups]
        return result

    def reduce(self, width: int) -> None:
        config = self.config
        due = self.compactions < MEASURED_FIRST or self.compactions % MEASURED_EVERY == 0
        if not (config.enable_adaptive_controller and due and self.reference):
            return super().reduce(width)
        middle = self.tokens[config.dynamic_start_size : len(self.tokens) - config.recent_size]
        before, mass = self.outputs(CONTROL_QUERY_STEP), sum(token["mass"] for token in middle)
        super().reduce(width)
        after = self.outputs(CONTROL_QUERY_STEP)
        lost = sum(distance(a, b) for a, b in zip(after, before, strict=True))
        energy = min(max(1 - lost / sum(float(b.square().sum()) for b in before), 0.0), 1.0)
        gain = config.controller_gain if self.measured else 1.0
        self.energy += gain * (energy - self.energy)
        self.mass += gain * (min(max(mass, 0.0), 1.0) - self.mass)
        self.measured += 1

    # -- the order of a compaction ---------------------------------------------------------------------------------------

    def compressed(self, middle: list[dict], width: int, size: int) -> list[dict]:
        config = self.config
        sinks = config.dynamic_start_size
        before, after = self.tokens[:sinks], self.tokens[len(self.tokens) - config.recent_size :]
        slots = [self.slot(sinks + index) - sinks for index in range(len(middle))]
        if not (config.sketch_budget or config.replay_budget):
            kept, _ = self.choose(middle, before + middle + after, len(before), slots, width, self.budget, self.least, size)
            return self.in_order(kept) if self.place(kept) else kept
        sketches, replays = config.sketch_budget, config.replay_budget
        precision = width - sketches - replays
        pool = middle
        if sketches and config.promotion_budget and config.sketch_originals:
            room = min(config.original_slots, max(2 * config.promotion_budget, int(self.least * RETURNED_SHARE)))
            pool = self.in_order(self.promote(middle, room))
            size, slots = size + room, list(range(len(pool)))
        budget = precision if self.budget is None else self.budget
        budget += replays - self.reserved
        kept, assigned = self.choose(
            pool, before + pool + after, len(before), slots,
            precision + replays + sketches, budget + sketches, self.least + sketches, size,
        )  # fmt: skip
        if sketches:
            self.sketch(pool, kept, assigned)
        energy = self.follow(pool, assigned, size)
        if replays:
            kept = self.replay(kept, energy)
        self.place(kept)
        assert len(kept) <= width
        return self.in_order(kept)

    def in_order(self, tokens: list[dict]) -> list[dict]:
        tokens = sorted(tokens, key=lambda token: token["pos"])
        # At the very same position they stay as they were.
        gaps = [b["pos"] - a["pos"] for a, b in zip(tokens, tokens[1:], strict=False)]
        self.margins += [gap / 100 for gap in gaps if gap]
        return tokens

    def choose(
        self, pool: list[dict], held: list[dict], start: int, slots: list[int],
        width: int, budget: int | None, least: int, size: int,
    ) -> tuple[list[dict], list[dict]]:  # fmt: skip
        """The exact and precision tiers; arguments as for `low_rank`, and `held`: all tokens, the candidates from `start`
        on; `slots`: of the candidates."""
        if self.config.compressor_type == "low_rank":
            return self.low_rank(pool, width, budget, least, size)
        pinned = self.pins(pool, width, budget, least, size)
        worth = importance(pool, self.config)
        if self.config.compressor_type == "vq":
            return self.vq(pool, held, start, slots, pinned, worth, width, budget, least, size)
        kept, assigned = self.merged(pool, pinned, worth, width if budget is None else budget)
        self.match(pool, held, start, kept, width)
        return kept, assigned

    # -- vq --------------------------------------------------------------------------------------------------------------

    def vq(self, pool, held, start, slots, pinned, worth, width, budget, least, size) -> tuple[list[dict], list[dict]]:
        config = self.config
        pins = max(config.min_importance_tokens, round(config.importance_ratio * least))
        clusters = max(1, min(config.num_clusters, least - pins))
        number = max(0, (width if budget is None else budget) - clusters)
        lift = max(worth) + 1
        exact = best([own + lift if slot in pinned else own for slot, own in enumerate(worth)], number, self.margins)
        result: list[dict] = []
        assigned: list[dict] = [{}] * len(pool)
        for slot in sorted(exact):
            token = dict(pool[slot])
            token["tier"] = "exact" if token["count"] == 1 else "precision"
            result.append(token)
            assigned[slot] = token
        members = [slot for slot in range(len(pool)) if slot not in exact]
        asked = self.asked(held)
        masses = {slot: sum(math.exp(float(own[start + slot]) - z) for _, own, z in asked) / len(asked) for slot in members}
        if len(members) < clusters:
            self.margins.append(0.0)  # Centres would be drawn from what is no candidate.
        nearest = self.kmeans([pool[slot]["key"] for slot in members], [masses[slot] for slot in members],
                              [slots[slot] for slot in members], min(clusters, len(members)), size)  # fmt: skip
        for number in range(clusters):
            own = [slot for slot, at in zip(members, nearest, strict=True) if at == number]
            if not own:
                continue
            total = sum(masses[slot] for slot in own)
            parts = [masses[slot] / total for slot in own]
            token = dict(pool[own[0]])
            if len(own) > 1:
                token["key"] = sum(part * pool[slot]["key"] for part, slot in zip(parts, own, strict=True))
                token["value"] = sum(part * pool[slot]["value"] for part, slot in zip(parts, own, strict=True))
                token["pos"] = sum(part * pool[slot]["pos"] for part, slot in zip(parts, own, strict=True))
                draws = sum(math.exp(float(self.logit(query, token["key"])) - z) for query, _, z in asked) / len(asked)
                token["beta"] = math.log(total / draws)
            gather(token, [pool[slot] for slot in own])
            token["tier"] = "precision"
            result.append(token)
            for slot in own:
                assigned[slot] = token
        return self.in_order(result), assigned

    def kmeans(self, points, masses, slots, clusters, size) -> list[int]:
        """Which centre each point is nearest to; the centres are drawn one slot, one number."""
        generator = torch.Generator().manual_seed(self.config.seed)
        weights = [mass / sum(masses) for mass in masses]
        mean = sum(weight * point for weight, point in zip(weights, points, strict=True))
        away = [distance(point, mean) for point in points]
        chosen: list[int] = []
        for step in range(DRAWS):
            take = clusters * (step + 1) // DRAWS - len(chosen)
            if take == 0:
                continue
            noise = torch.rand(size, generator=generator).clamp(1e-7, 1 - 1e-7).tolist()
            draws = []
            for index in range(len(points)):
                draw = math.log(max(weights[index] * away[index], 1e-30)) - math.log(-math.log(noise[slots[index]]))
                draws.append(-1e9 if index in chosen else draw + 1e3)
            # Their differences count, not their size.
            new = best(draws, take, margins := [])
            self.margins += [margin * 100 for margin in margins]
            chosen += sorted(new)
            away = [
                min([own] + [distance(point, points[at]) for at in new]) for own, point in zip(away, points, strict=True)
            ]
        centres = [points[at] for at in sorted(chosen)]
        nearest = self.nearest(points, centres)
        for _ in range(LLOYD_STEPS):
            for number in range(clusters):
                own = [index for index in range(len(points)) if nearest[index] == number]
                total = sum(weights[index] for index in own)
                if total > 0:
                    centres[number] = sum(weights[index] / total * points[index] for index in own)
            nearest = self.nearest(points, centres)
        return nearest

    def nearest(self, points, centres) -> list[int]:
        result = []
        for point in points:
            ranked = sorted((distance(point, centre), number) for number, centre in enumerate(centres))
            result.append(ranked[0][1])
            if len(ranked) > 1:
                size = float(point.square().sum() + centres[ranked[0][1]].square().sum())
                self.margins.append((ranked[1][0] - ranked[0][0]) / size)
        return result

    # -- attention matching ----------------------------------------------------------------------------------------------

    def match(self, pool: list[dict], held: list[dict], start: int, kept: list[dict], width: int) -> None:
        """Fit log-masses, then values, to what the candidates gave the queries."""
        asked = self.asked(held, MATCHING_QUERY_STEP)
        masses, outputs, design = [], [], []
        for query, own, normaliser in asked:
            truth = [math.exp(float(own[start + slot]) - normaliser) for slot in range(len(pool))]
            masses.append(sum(truth))
            outputs.append(sum(p * token["value"] for p, token in zip(truth, pool, strict=True)))
            design.append([math.exp(float(self.logit(query, t["key"])) + t["beta"] - normaliser) for t in kept])
        design = torch.tensor(design, dtype=torch.float64)
        masses = torch.tensor(masses, dtype=torch.float64)[:, None]
        fitted = ridge(design, masses, torch.ones(len(kept), 1, dtype=torch.float64), width)[:, 0].tolist()
        free = [token["count"] > 1 or not self.config.protect_exact for token in kept]
        factors = [min(max(f, MASS_RANGE[0]), MASS_RANGE[1]) if own else 1.0 for f, own in zip(fitted, free, strict=True)]
        gain = float(masses.sum()) / sum(float(design[:, n].sum()) * factor for n, factor in enumerate(factors))
        factors = [factor * gain if own else 1.0 for factor, own in zip(factors, free, strict=True)]
        design = torch.stack([design[:, n] * factor for n, factor in enumerate(factors)], dim=1)
        values = ridge(design, torch.stack(outputs), torch.stack([token["value"] for token in kept]), width)
        for token, factor, value, own in zip(kept, factors, values, free, strict=True):
            if own:
                token["value"], token["mass"] = value, token["mass"] * factor
                token["beta"] = token["beta"] + math.log(factor) or CHANGED

    # -- sketches --------------------------------------------------------------------------------------------------------

    def energies(self, tokens: list[dict]) -> dict[int, float]:
        """Residual energy of each sketch with originals, by the token's identity."""
        error: dict[int, float] = {}
        norm: dict[int, float] = {}
        for name in ("key", "value"):
            sizes = [float(original[name].square().sum()) for original in self.originals]
            level = sum(sizes) / max(len(sizes), 1)
            for original, size in zip(self.originals, sizes, strict=True):
                own = id(original["parent"])
                error[own] = error.get(own, 0.0) + distance(original[name], original["parent"][name]) / level
                norm[own] = norm.get(own, 0.0) + size / level
        sketches = [id(token) for token in tokens if token["tier"] == "sketch" and id(token) in norm]
        return {own: min(math.sqrt(error[own] / norm[own]), 1.0) for own in sketches}

    def promote(self, middle: list[dict], room: int) -> list[dict]:
        """The middle without what returns from its worst sketches, and what does."""
        energy = self.energies(middle)
        worth = [energy.get(id(token), 0.0) * token["mass"] for token in middle]
        others = [token["mass"] for token in middle if token["tier"] != "sketch"]
        usual = sum(others) / max(len(others), 1)
        self.margins += [abs(own - usual) / max(usual, 1e-30) for own in worth if own > 0]
        eligible = [index for index, own in enumerate(worth) if own > 0 and own >= usual]
        chosen = best([worth[index] for index in eligible], self.config.promotion_budget, self.margins)
        rank = {id(middle[eligible[index]]): worth[eligible[index]] for index in chosen}
        leaving = [original for original in self.originals if id(original["parent"]) in rank]
        if len(leaving) > room:
            self.margins.append(0.0)  # Which of them it is depends on where they are stored.
            leaving = leaving[:room]
        returned = []
        for original in leaving:
            parent, share = original["parent"], original["share"]
            token = untouched(original, "exact")
            token["mass"], token["square"] = parent["mass"] * share, parent["square"] * share**2
            token["score"] = max(original["score"], parent["score"] * math.sqrt(share))
            returned.append(token)
        self.promotions += len({id(original["parent"]) for original in leaving})
        return self.take_off(middle, leaving, sketches_only=True) + returned

    def take_off(self, tokens: list[dict], leaving: list[dict], sketches_only: bool) -> list[dict]:
        """The tokens without the mass of the originals that leave; they themselves stay as they were."""
        result = []
        for token in tokens:
            own = [original for original in leaving if original["parent"] is token]
            staying = [original for original in self.originals if original["parent"] is token]
            rest = min(max(1 - sum(original["share"] for original in own), 1e-3), 1.0)
            new = dict(token)
            if own:
                new["count"] -= len(own)
                new["mass"] *= rest
                new["beta"] = token["beta"] + math.log(rest) or CHANGED
                if not sketches_only and token["tier"] != "sketch":
                    self.margins.append(abs(rest - LEAST_REST))
                if not sketches_only and token["tier"] != "sketch" and rest >= LEAST_REST:
                    new["value"] = (token["value"] - sum(o["share"] * o["value"] for o in own)) / rest
            for original in staying:
                original["parent"] = new
                original["share"] = min(original["share"] / rest, 1.0)
            if new["count"] > 0:
                result.append(new)
        self.originals = [original for original in self.originals if not any(original is other for other in leaving)]
        return result

    def sketch(self, pool: list[dict], kept: list[dict], assigned: list[dict]) -> None:
        """Of the kept tokens that stand for several those that draw least are made anew from all their members."""
        config = self.config
        several = [token for token in kept if token["count"] > 1]
        chosen = best([-token["mass"] for token in several], config.sketch_budget, self.margins)
        clusters = []
        for index in sorted(chosen):
            members = [token for token, made in zip(pool, assigned, strict=True) if made is several[index]]
            clusters.append((several[index], members))
        everyone = [token["mass"] for _, members in clusters for token in members]
        faint = FAINT * sum(everyone) / max(len(everyone), 1) + 1e-30
        asked = self.asked(self.tokens, SKETCH_QUERY_STEP)
        for token, members in clusters:
            first, total = members[0], sum(member["mass"] for member in members)
            if len(members) == 1:
                token.update({name: first[name] for name in ("key", "value", "beta", "pos")})
            elif config.sketch_reduction == "first":
                token.update({name: first[name] for name in ("key", "value", "pos")})
            else:
                weights = [member["count" if config.sketch_reduction == "mean" else "mass"] for member in members]
                for name in ("key", "value"):
                    parts = [weight * member[name] for weight, member in zip(weights, members, strict=True)]
                    token[name] = sum(parts) / sum(weights)
                token["pos"] = sum(member["mass"] * member["pos"] for member in members) / total
            gather(token, members)
            token["tier"] = "sketch"
            if len(members) > 1:
                draws = sum(math.exp(float(self.logit(query, token["key"])) - z) for query, _, z in asked) / len(asked)
                token["beta"] = min(math.log((total + faint) / (draws + faint)), math.log(token["count"]) + MOST_LOG_GAIN)

    def follow(self, pool: list[dict], assigned: list[dict], size: int) -> float:
        """Originals learn their new stand-ins, and those of what was compressed now are stored. Returns the energy of what
        was made against what it was made from."""
        config = self.config
        if not config.original_slots:
            return 1.0
        made = {id(token): new for token, new in zip(pool, assigned, strict=True)}
        before = {id(token): token["mass"] for token in pool}
        for original in self.originals:
            old = id(original["parent"])
            original["parent"] = made[old]
            original["share"] *= min(before[old] / made[old]["mass"], 1.0)
        joined = []
        for token, new in zip(pool, assigned, strict=True):
            own = token["count"] == 1 and token["beta"] == 0 and token["tier"] != "sketch"
            if own and new["count"] > 1 and (config.replay_budget or new["tier"] == "sketch"):
                joined.append((token, new))
        most = min(size, config.compression_interval * 3 // 2)
        joined = joined[max(0, len(joined) - most) :]
        energy = 1.0
        if config.replay_budget and joined:
            given = [torch.cat([token["key"], token["value"]]) for token, _ in joined]
            stand_ins = [torch.cat([new["key"], new["value"]]) for _, new in joined]
            energy = leading_energy(stand_ins, most) / leading_energy(given, most)
            energy = min(max(energy, 0.0), 1.0)
        fresh = []
        for number, (token, new) in enumerate(joined):
            original = {name: token[name] for name in ("key", "value", "pos", "score")}
            original |= {"parent": new, "share": min(token["mass"] / new["mass"], 1.0), "order": (self.compactions, number)}
            fresh.append(original)
        self.keep_originals(fresh)
        return energy

    def keep_originals(self, fresh: list[dict]) -> None:
        """Where there is no room the last to arrive stay, `4 * replay_budget` of them, then those of highest score, those
        that a sketch stands for first."""
        everyone = self.originals + fresh
        newest = sorted(everyone, key=lambda original: original["order"])[-REPLAY_BANK * self.config.replay_budget :]
        newest = newest if self.config.replay_budget else []
        wanted = [o["score"] * (1 if o["parent"]["tier"] == "sketch" else 1e-6) for o in everyone]
        lift = max(wanted, default=0.0) + 1
        ranks = [rank + lift * any(o is other for other in newest) for rank, o in zip(wanted, everyone, strict=True)]
        kept = best(ranks, self.config.original_slots, self.margins)
        self.originals = [original for index, original in enumerate(everyone) if index in kept]

    # -- replay ----------------------------------------------------------------------------------------------------------

    def replay(self, kept: list[dict], energy: float) -> list[dict]:
        """What is kept, and of the last originals to arrive as many as the energy is too low."""
        config = self.config
        budget, threshold = config.replay_budget, config.energy_replay_threshold
        wanted = 0
        self.margins.append(abs(energy - threshold))
        if energy < threshold:
            exactly = budget * (threshold - energy) / threshold
            self.margins.append(abs(exactly - round(exactly)))
            wanted = min(max(int(exactly), 1), budget)
        count = min(wanted, self.reserved)
        self.reserved = budget if wanted else 0
        leaving = (
            sorted(self.originals, key=lambda original: original["order"])[len(self.originals) - count :] if count else []
        )
        returned = []
        for original in leaving:
            token, parent, share = untouched(original, "replay"), original["parent"], original["share"]
            token["mass"], token["square"] = parent["mass"] * share, parent["square"] * share**2
            token["score"] = original["score"]
            returned.append(token)
        self.triggers += bool(returned)
        self.replayed += len(returned)
        return self.take_off(kept, leaving, sketches_only=False) + returned

    # -- calibration -----------------------------------------------------------------------------------------------------

    def place(self, tokens: list[dict]) -> bool:
        """Tokens whose keys are averages get their `anchor_mode` position, calibrated; whether that may have moved any."""
        config = self.config
        if not config.enable_position_calibration or self.inv_freq is None:
            return False
        made = []
        for token in tokens:
            sketch = token["tier"] == "sketch" and config.sketch_reduction != "first"
            averaged = token["tier"] == "precision" and config.compressor_type == "vq"
            if (sketch or averaged) and token["count"] > 1:
                made.append(token)
        made.sort(key=lambda token: token["pos"])
        true = [token["pos"] for token in made]
        synthetic = self.synthetic(true, len(tokens))
        self.anchors = (self.anchors + list(zip(synthetic, true, strict=True)))[-config.calibration_window :]
        slope, shift, centre = self.fit()
        low, high = min(token["pos"] for token in tokens), max(token["pos"] for token in tokens)
        fitted = len(self.anchors) >= MIN_ANCHORS
        self.calibrations += bool(fitted and made)
        placed = synthetic
        if fitted:
            self.offsets = (1 + slope, shift - slope * centre)
            placed = sorted(min(max(p + BLEND * (shift + slope * (p - centre)), low), high) for p in synthetic)
        else:
            self.offsets = (1.0, 0.0)
        if config.anchor_mode == "mean":
            return False
        for token, new in zip(made, placed, strict=True):
            self.margins.append(abs(abs(new - token["pos"]) - LEAST_MOVE) / 10)
            if abs(new - token["pos"]) > LEAST_MOVE:
                token["key"] = turned(token["key"], new - token["pos"], self.inv_freq)
                token["pos"] = new
        return True

    def synthetic(self, true: list[float], width: int) -> list[float]:
        mode, count = self.config.anchor_mode, len(true)
        if mode == "mean" or not count:
            return list(true)
        step = (true[-1] - true[0]) / max(count - 1, 1)
        grid = [true[0] + step * number for number in range(count)]
        if mode == "grid":
            return grid
        # One draw a token; more than are needed make no difference.
        draw = torch.rand(width, generator=torch.Generator().manual_seed(self.config.seed), dtype=torch.float64).tolist()
        mixed = [(g + t) / 2 + (d - 0.5) * step / 4 for g, t, d in zip(grid, true, draw, strict=False)]
        return sorted(min(max(p, true[0]), true[-1]) for p in mixed)

    def fit(self) -> tuple[float, float, float]:
        """Ridge regression of how far true positions are from the synthetic: `(slope, mean, centre)`."""
        count = max(len(self.anchors), 1)
        centre = sum(synthetic for synthetic, _ in self.anchors) / count
        shift = sum(true - synthetic for synthetic, true in self.anchors) / count
        spread = sum((synthetic - centre) ** 2 for synthetic, _ in self.anchors)
        both = sum((synthetic - centre) * (true - synthetic - shift) for synthetic, true in self.anchors)
        slope = both / (spread * (1 + self.config.calibration_regularization)) if spread > 0 else 0.0
        return slope, shift, centre

    def rebase(self, d: int, inv_freq: torch.Tensor) -> None:
        super().rebase(d, inv_freq)
        for original in self.originals:
            new = max(original["pos"] - d, self.config.dynamic_start_size)
            original["key"] = turned(original["key"], new - original["pos"], inv_freq)
            original["pos"] = new
        self.anchors = [(synthetic - d, true - d) for synthetic, true in self.anchors]


def untouched(original: dict, tier: str) -> dict:
    """An original as a token of its own."""
    return {name: original[name] for name in ("key", "value", "pos")} | {"beta": 0.0, "count": 1, "tier": tier}


def gather(token: dict, members: list[dict]) -> None:
    """What a token has of its members: masses and counts added up, scores and mean squares the largest."""
    token["mass"] = sum(member["mass"] for member in members)
    token["count"] = sum(member["count"] for member in members)
    token["score"] = max(member["score"] for member in members)
    token["square"] = max(member["square"] for member in members)


def ridge(design: torch.Tensor, target: torch.Tensor, start: torch.Tensor, slots: int) -> torch.Tensor:
    """The minimum of `|design x - target|^2 + 0.1 * level * |x - start|^2`; `level`: the mean diagonal over all slots."""
    columns = design.shape[1]
    level = sum(dot(design[:, n].tolist(), design[:, n].tolist()) for n in range(columns)) / slots
    gram = design.T @ design + MATCHING_RIDGE * level * torch.eye(columns, dtype=torch.float64)
    return start + torch.linalg.solve(gram, design.T @ (target - design @ start))


def leading_energy(rows: list[torch.Tensor], slots: int) -> float:
    """Sum of the largest squared singular values of rows among `slots`, the others of which are zero."""
    rows = rows + [torch.zeros_like(rows[0])] * (slots - len(rows))
    matrix = torch.stack(rows)
    gram = matrix @ matrix.T if slots < matrix.shape[1] else matrix.T @ matrix
    trace = gram.diagonal().sum()
    dim = len(gram)
    if dim <= SPECTRAL_RANK:
        return float(trace)
    start = torch.randn(dim, SPECTRAL_RANK, generator=torch.Generator().manual_seed(0)).double()
    basis = list(start.T)
    for _ in range(ITERATIONS):
        basis = orthonormal([gram / trace @ unit + 1e-7 * first for unit, first in zip(basis, start.T, strict=True)])
    return sum(float(unit @ gram @ unit) for unit in basis)


# -- one layer, one row --------------------------------------------------------------------------------------------------


class ModuleLayer(PlainLayer):
    """The heads of a layer, which may share a budget.

    Attributes:
        planned: the budget all heads have from the model's, None before there was one.
    """

    head_class = ModuleHead
    planned: int | None = None
    inv_freq: torch.Tensor | None = None

    def lazy_initialization(self, key_states, value_states) -> None:
        super().lazy_initialization(key_states, value_states)
        for head in self.heads:
            head.inv_freq = self.inv_freq

    def compact(self, width: int | None = None) -> None:
        config = self.config
        width = self.heads[0].width if width is None else width
        precision = width - config.sketch_budget - config.replay_budget
        base, least, budgets = config.compressed_budget, precision, [None] * len(self.heads)
        if self.planned is not None:
            budgets, least = [self.planned] * len(self.heads), self.planned
        elif config.enable_adaptive_controller and config.controller_scope == "layer":
            budgets, least = self.decided(), min(1, base)
        elif config.use_adaptive_budget:
            least = max(1, int(base * config.adaptive_budget_floor))
            for head in self.heads:
                now = variance(head.tokens[config.dynamic_start_size : len(head.tokens) - config.recent_size])
                known = now if head.variance is None else head.variance
                head.variance = known + config.adaptive_variance_smoothing * (now - known)
            budgets = shared([head.variance for head in self.heads], base, least, precision, self.heads[0].margins)
        for head, budget in zip(self.heads, budgets, strict=True):
            head.budget, head.least = budget, least
            if budget is not None and config.enable_adaptive_controller:
                head.adjustments += budget != (head.decided or base)
                head.decided = budget
            head.compact(width)

    def decided(self) -> list[int]:
        """Budgets of the heads by the energy and the attention mass of their groups."""
        config, factors = self.config, []
        for number in range(len(self.heads)):
            first = number // config.controller_group_size * config.controller_group_size
            group = self.heads[first : first + config.controller_group_size]
            known = [head for head in group if head.measured]
            if not self.heads[number].measured:
                factors.append(1.0)
                continue
            energy = sum(head.energy for head in known) / len(known)
            mass = sum(head.mass for head in known) / len(known)
            low, high = config.controller_energy_floor, config.controller_energy_ceiling
            growth = 1 + min(max((low - energy) / max(low, 1e-6), 0.0), 1.0)
            shrink = 1 - 0.5 * min(max((energy - high) / max(1 - high, 1e-6), 0.0), 1.0)
            factors.append(growth * shrink * (0.8 + 0.4 * min(mass, 1.0)))
        base = config.compressed_budget
        return shared(factors, base, min(1, base), 2 * base, self.heads[0].margins)


class ModuleCache(PlainCache):
    """A `PlainCache` with every module that its settings ask for."""

    layer_class = ModuleLayer

    def __init__(self, model, config: ADMSConfig, *args, **window):
        super().__init__(model, config, *args, **window)
        self.config = config
        self.next_plan = PLANNED_FIRST
        for layer in self.layers:
            layer.inv_freq = self.inv_freq

    def begin(self, positions: list[int]) -> list[int]:
        for head in self.heads:
            head.limit = self.limit
        if self.config.enable_adaptive_controller and self.config.controller_scope == "model" and self.heads:
            self.plan(len(positions))
        return super().begin(positions)

    def plan(self, new: int) -> None:
        """Layers trade budget where a compaction is due and enough was measured since the last time."""
        layers = [layer for layer in self.layers if isinstance(layer, ModuleLayer)]
        compactions = self.heads[0].compactions
        if not compactions or compactions < self.next_plan or not self.heads[0].is_due(new):
            return
        for head in self.heads:
            head.fold_waiting(len(head.tokens))
        config = self.config
        base = config.compressed_budget
        step = max(1, base // GRAIN)
        lost = [sum(1 - head.energy for head in layer.heads) / len(layer.heads) for layer in layers]
        weights = [max(own, 1e-9) ** EXPONENT for own in lost]
        steps = shared(weights, base // step, min(1, base // step), 2 * (base // step), self.heads[0].margins)
        for layer, own in zip(layers, steps, strict=True):
            layer.planned = own * step + base % step
            layer.compact(layer.planned + config.sketch_budget + config.replay_budget)
        self.next_plan = min(2 * compactions, compactions + PLANNED_EVERY)

    @property
    def counters(self) -> dict[str, int]:
        """Those of `cache.stats` that the modules count."""
        names = {
            "total_sketch_promotions": "promotions",
            "total_replay_triggers": "triggers",
            "total_replay_tokens": "replayed",
            "total_calibrations": "calibrations",
            "total_budget_adjustments": "adjustments",
        }
        return {shown: sum(getattr(head, name) for head in self.heads) for shown, name in names.items()}
