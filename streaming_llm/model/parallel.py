"""Tensor parallelism: which processes a model's heads are spread over."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..stream.ranks import Ranks


def ranks_of(model: PreTrainedModel) -> Ranks | None:
    """The processes of a model loaded with `tp_plan="auto"`; None where each process has all heads."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or (getattr(model, "_tp_size", None) or 1) == 1:
        return None
    return Ranks(mesh)
