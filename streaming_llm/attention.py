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
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .autograd import autocast_dtype
from .layer import ADMSLayer

PREFIX = "adms_"
BASES = ("eager", "sdpa")
# Model types that call torch's attention themselves, whatever is registered.
SDPA_ITSELF = ("falcon",)
# Devices where torch's attention takes a float32 mask beside half-precision queries. CUDA's kernels want the queries' dtype;
# an eager attention adds and normalises in float32 anywhere.
WIDE_MASKS = ("cpu",)


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
        result = _attend(
            layer,
            own,
            functools.partial(packed_sdpa, **kwargs) if packed else own,
            query,
            key,
            value,
            attention_mask,
            wide=base == "eager" or query.device.type in WIDE_MASKS,
        )
        scale = kwargs.get("scaling")
        layer.observe(query, query.shape[-1] ** -0.5 if scale is None else scale, kwargs.get("softcap"))
        return result

    return adms_attention


def packed_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """torch's attention with the query heads of a group in the query axis, so that no keys or values are repeated.

    Args:
        query: `[batch, heads, new, head_dim]`; key, value: `[batch, kv_heads, tokens, dim]`; mask: additive
            `[batch, heads, new, tokens]`.

    Returns:
        `(output [batch, new, heads, value_dim], None)`, as transformers' own.
    """
    batch, heads, new, dim = query.shape
    rows = (batch, key.shape[1], heads // key.shape[1] * new)
    output = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(*rows, dim), key, value, attn_mask=mask.reshape(*rows, -1), dropout_p=dropout, scale=scaling
    )
    return output.view(batch, heads, new, -1).transpose(1, 2).contiguous(), None


def _attend(
    layer: ADMSLayer,
    kernel: Callable,
    masked: Callable,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    wide: bool,
) -> Any:
    """`kernel(query, key, value, mask)`; once log-mass counts, `masked(query, key, value, log_mass)`, `wide`: in float32.

    Autocast would round the log-mass, and make of its lowest number one that leaves nothing of a row: what it would do to
    the other three is done here, and it is off in the kernel.
    """
    if query.requires_grad and torch.is_grad_enabled() and not key.requires_grad:
        # Only the queries are learnt: the backward pass needs the keys and values as they are now.
        key, value = key.clone(), value.clone()
    if layer.plain:
        return kernel(query, key, value, mask)
    kind = query.device.type
    dtype = autocast_dtype(query.dtype, kind)
    wide = wide and dtype.itemsize < 4
    part = layer.stream.open.of_layer[layer.number]
    bias = part.bias(layer.number, query.shape[1] // key.shape[1], torch.float32 if wide else dtype)
    if not torch.is_autocast_enabled(kind):
        return masked(query, key, value, bias)
    with torch.autocast(kind, enabled=False):
        return masked(query.to(dtype), key.to(dtype), value.to(dtype), bias)


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

        result = _attend(layer, attend, attend, query, key.keys, value, attn_mask, wide=query.device.type in WIDE_MASKS)
        layer.observe(query, query.shape[-1] ** -0.5 if scale is None else scale)
        return result


def register() -> None:
    """Make the implementations known to transformers under `adms_eager` and `adms_sdpa`; does nothing the second time."""
    for base in BASES:
        name = PREFIX + base
        if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
            AttentionInterface.register(name, _attention(base))
