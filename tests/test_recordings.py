"""The recordings that restructured code is compared with: a stream says the same each time, and a difference is found."""

from __future__ import annotations

import pytest
import recordings
import torch


@pytest.mark.parametrize("name", ["settings/all four", "padded/vq", "beams/base"])
def test_a_stream_run_twice_is_equal_to_the_bit(name, tmp_path):
    recordings.save(tmp_path, name, recordings.record(name))
    then = recordings.load(tmp_path, name)
    assert len(then.tensors) >= 3 and then.facts["at the end: stats"]["total_compressions"] > 0
    assert recordings.compared(then, recordings.record(name), 0.0) == ("equal", [])


def _take(*logits: float, count: int = 3) -> recordings.Take:
    take = recordings.Take(facts={"stats": {"total_compressions": count}})
    for number in logits:
        take.add("logits", torch.tensor([[1.0, number]]))
    return take


def test_what_differs_is_told_with_the_first_place():
    recorded = _take(2.0, 3.0)
    state, places = recordings.compared(recorded, _take(2.0, 3.000001), 1e-5)
    assert state == "near" and len(places) == 1 and places[0].startswith("001 logits[0, 1]: 3.0, now 3.00000")
    state, places = recordings.compared(recorded, _take(2.000001, 4.0), 1e-5)
    assert state == "different" and places[-1].startswith("001 logits[0, 1]: 3.0, now 4.0")
    assert recordings.compared(recorded, _take(2.0, 3.0, count=4), 1e-5)[0] == "facts"
    assert recordings.compared(recorded, _take(2.0), 1e-5)[0] == "different"
    assert recordings.compared(recorded, _take(2.0, 3.0, 3.0), 1e-5)[0] == "different"
    assert recordings.compared(_take(torch.nan), _take(torch.nan), 1e-5)[0] == "near"
