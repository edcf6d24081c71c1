"""The attention function: the model's own kernel, with the tokens' log-mass; shows the queries to the layer.

Registered with transformers' `AttentionInterface` under the base implementation's name with a prefix. For any other cache
it is the base function, called with what it would have been called with.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .layer import ADMSLayer

PREFIX = "adms_"
BASES = ("eager", "sdpa")


def base_attention(module: torch.nn.Module, base: str) -> Callable:
    """The function the model would have called: its modelling file's own for eager, the registered one otherwise."""
    if base != "eager":
        return ALL_ATTENTION_FUNCTIONS[base]
    return sys.modules[type(module).__module__].eager_attention_forward


def _attention(base: str) -> Callable:
    def adms_attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See the module. `query` is `[batch, heads, tokens, head_dim]`, `key` and `value` have `kv_heads` heads."""
        forward = base_attention(module, base)
        layer: ADMSLayer | None = getattr(key, "adms_layer", None)
        if layer is None:
            return forward(module, query, key, value, attention_mask, **kwargs)
        if query.requires_grad and torch.is_grad_enabled() and not key.requires_grad:
            # Only the queries are learnt: the backward pass needs the keys and values as they are now.
            key, value = key.clone(), value.clone()
        if not layer.plain:
            attention_mask = layer.attention_bias(query.shape[2], query.shape[1] // key.shape[1], query.dtype)
        result = forward(module, query, key, value, attention_mask, **kwargs)
        scale = kwargs.get("scaling")
        layer.observe(query, query.shape[-1] ** -0.5 if scale is None else scale, kwargs.get("softcap"))
        return result

    return adms_attention


def register() -> None:
    """Make the implementations known to transformers under `adms_eager` and `adms_sdpa`; does nothing the second time."""
    for base in BASES:
        name = PREFIX + base
        if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
            AttentionInterface.register(name, _attention(base))
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
