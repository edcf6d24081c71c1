"""The merge of one head of one row in plain Python loops: slow, and written from the description, not from the package."""

from __future__ import annotations

import math


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


def merge(keys, values, betas, masses, counts, keep: set[int], weight: float) -> list[dict]:
    """Every token not in `keep` joins the nearest kept one; the kept tokens with what they then stand for, in order."""
    members = {slot: [slot] for slot in sorted(keep)}
    for slot in range(len(keys)):
        if slot in keep:
            continue
        best, least = None, math.inf
        for kept in members:
            distance = sum((a - b) ** 2 for a, b in zip(keys[slot], keys[kept], strict=True))
            distance += weight**2 * sum((a - b) ** 2 for a, b in zip(values[slot], values[kept], strict=True))
            if distance < least:
                best, least = kept, distance
        members[best].append(slot)
    result = []
    for kept, joined in members.items():
        total = sum(masses[slot] for slot in joined)
        value = [sum(masses[slot] * values[slot][d] for slot in joined) / total for d in range(len(values[kept]))]
        result.append(
            {
                "slot": kept,
                "key": keys[kept],
                "value": value if len(joined) > 1 else values[kept],
                "beta": betas[kept] + math.log(total / masses[kept]) if len(joined) > 1 else betas[kept],
                "count": sum(counts[slot] for slot in joined),
                "mass": total,
            }
        )
    return result
