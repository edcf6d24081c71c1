"""The attention function: the model's own kernel, with the tokens' log-mass; shows the queries to the layer.

Registered with transformers' `AttentionInterface` under the base implementation's name with a prefix. For any other cache
it is the base function, called with what it would have been called with. An enabled model's attention modules see the
prefixed name through a `WiredConfig`; the model's own config never holds it. Falcon does not ask that interface: there the
keys themselves, as `AttendedKeys`, see to it that torch's attention is called with the log-mass.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attend.kernels import WIDE_MASKS, attend_weighted, packed_sdpa
from ..layer import ADMSLayer
from .families import family_of

PREFIX = "adms_"
BASES = ("eager", "sdpa")


class WiredConfig:
    """A model's config as the attention modules of an enabled model see it: with the implementation's name prefixed.

    Everything else is the config's own, now and later, so that whoever reads or sets the model's implementation (continuous
    batching, `set_attn_implementation`, another model made from the same config) meets what was there.
    """

    def __init__(self, config: Any):
        vars(self)["config"] = config

    @property
    def _attn_implementation(self) -> str | None:
        """The config's implementation, with the prefix where there is a place for log-mass."""
        own = self.config._attn_implementation
        return PREFIX + own if own in BASES else own

    def __getattr__(self, name: str) -> Any:
        if name == "config":  # not there yet while being copied
            raise AttributeError(name)
        return getattr(self.config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.config, name, value)


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
        own = functools.partial(forward, module, **kwargs)
        packed = base == "sdpa" and query.shape[1] != key.shape[1]
        part, scale = layer.stream.open.of_layer[layer.number], kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        result = attend_weighted(
            part,
            layer.number,
            own,
            functools.partial(packed_sdpa, **kwargs) if packed else own,
            query,
            key,
            value,
            attention_mask,
            wide=base == "eager" or query.device.type in WIDE_MASKS,
            scale=scale,
        )
        part.observe(layer.number, query, scale, kwargs.get("softcap"), layer.stream.records_past)
        return result

    return adms_attention


class AttendedKeys(torch.Tensor):
    """Keys that bring their layer's log-mass into `scaled_dot_product_attention`, wherever that is called with them.

    Their shape and other properties can be asked for; any other computation with them would leave the log-mass out and
    raises `RuntimeError`.
    """

    keys: torch.Tensor
    adms_layer: ADMSLayer

    @classmethod
    def of(cls, keys: torch.Tensor) -> torch.Tensor:
        """`keys` as such, where a layer of an enabled model's cache gave them; else as they are."""
        layer = getattr(keys, "adms_layer", None)
        if layer is None:
            return keys
        attended = keys.as_subclass(cls)
        attended.keys, attended.adms_layer = keys, layer
        return attended

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name == "scaled_dot_product_attention":
            return cls._attention(func, *args, **kwargs)
        if name not in ("__get__", "size", "dim"):
            raise RuntimeError(
                f"the model computes with the cache's keys itself ({name}), so their log-mass would be lost: use the 'sdpa' "
                "attention implementation and output_attentions=False"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @staticmethod
    def _attention(
        kernel: Callable,
        query: torch.Tensor,
        key: AttendedKeys,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **kwargs,
    ) -> torch.Tensor:
        layer = key.adms_layer

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            # The log-mass says what is causal as well, and torch takes no mask beside is_causal.
            causal = is_causal and mask is attn_mask
            return kernel(query, key, value, attn_mask=mask, dropout_p=dropout_p, is_causal=causal, scale=scale, **kwargs)

        wide, part = query.device.type in WIDE_MASKS, layer.stream.open.of_layer[layer.number]
        own = query.shape[-1] ** -0.5 if scale is None else scale
        result = attend_weighted(part, layer.number, attend, attend, query, key.keys, value, attn_mask, wide, own)
        layer.observe(query, own)
        return result


def check_attention(text: PreTrainedConfig) -> None:
    """Refuse a text model's attention implementation that can't be shown the tokens' log-mass."""
    implementation = text._attn_implementation or "eager"
    if family_of(text.model_type).calls_sdpa and implementation != "sdpa":
        raise ValueError(
            f"attention implementation {implementation!r} of model type {text.model_type!r} has no place for log-mass; load "
            "the model with attn_implementation='sdpa'"
        )
    if implementation not in BASES:
        raise ValueError(
            f"attention implementation {implementation!r} has no place for log-mass; load the model with "
            f"attn_implementation='sdpa' or call model.set_attn_implementation('sdpa') (supported: {', '.join(BASES)})"
        )


def register() -> None:
    """Make the implementations known to transformers under `adms_eager` and `adms_sdpa`; does nothing the second time."""
    for base in BASES:
        name = PREFIX + base
        if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
            AttentionInterface.register(name, _attention(base))
