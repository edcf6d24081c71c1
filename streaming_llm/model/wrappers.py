"""Modules that hold one transformers model: peft's, torch.compile's, accelerate's and a user's own are opened."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

_UNWRAP = "pass the model it holds (its .module), and run the forward passes that have a cache with that one"
_SHARDED = "its weights are sharded: load the model whole, or spread over devices with device_map='auto' or tp_plan='auto'"
# Class names of modules whose forward pass is not, in this process, that of the one model they hold; and the way out.
_PARALLEL = {
    "DataParallel": _UNWRAP,
    "DistributedDataParallel": _UNWRAP,
    "DeepSpeedEngine": _UNWRAP,
    "FullyShardedDataParallel": _SHARDED,
    "FSDPModule": _SHARDED,
}


def open_model(model: Any) -> PreTrainedModel:
    """The one transformers model that `model` is or holds, however many modules are around it.

    Raises:
        TypeError: no model, or a module that holds none or several.
        ValueError: one that spreads the model over devices or processes by itself; the message names the way out.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model={type(model).__name__} must be a transformers PreTrainedModel, or a module that holds one")
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _PARALLEL:
                raise ValueError(
                    f"model={type(model).__name__}: {kind.__name__} can't be enabled; {_PARALLEL[kind.__name__]}"
                )
        if getattr(getattr(module, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                f"model={type(model).__name__}: prompt learning can't be enabled, it puts keys of its own into the cache; "
                "use an adapter that changes weights, such as LoRA"
            )
    found = _outermost(model)
    if len(found) != 1:
        names = ", ".join(type(one).__name__ for one in found)
        raise TypeError(
            f"model={type(model).__name__} must be a transformers PreTrainedModel, or a module that holds one: it holds "
            + (f"{len(found)} ({names}); pass one of them" if found else "none")
        )
    return found[0]


def _outermost(module: torch.nn.Module) -> list[PreTrainedModel]:
    """The transformers models in a module that are in no other, each once."""
    if isinstance(module, PreTrainedModel):
        return [module]
    found = {id(one): one for child in module.children() for one in _outermost(child)}
    return list(found.values())


def find_decoder(model: PreTrainedModel) -> torch.nn.Module:
    """The module whose forward pass takes the tokens and the cache, also where torch.compile has wrapped it."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    decoder = getattr(decoder, "_orig_mod", decoder)
    # Some composite models name a causal model as their decoder, which has a decoder itself.
    return decoder if decoder is model or not isinstance(decoder, PreTrainedModel) else find_decoder(decoder)
