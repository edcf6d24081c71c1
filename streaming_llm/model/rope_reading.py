"""How a transformers model's keys turn with position: read from its own rotary module, and tried against what it stores.

Frequencies, scaling and layout are read from the model's own rotary module and compared with what that module and its
apply function compute, so no table of model families is needed; what does not agree is refused by name.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from ..data.autograd import autocast_dtype
from ..data.rope import Rope
from .facts import cache_argument
from .families import family_of
from .wrappers import find_decoder

SUPPORTED_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional")

_SUPPORTED = (
    f"supported: rope_type {', '.join(SUPPORTED_TYPES)}; rotary dimensions first in the head, paired as halves or as "
    "neighbours; one position a token"
)


def rope_of_layer(model: nn.Module, layer_idx: int | None = None, check: bool = True) -> Rope:
    """The Rope of one layer of a transformers model; without `layer_idx`, the one that all layers share.

    Raises:
        ValueError: as `rope_layers` does, and where the layers differ and `layer_idx` is None, or is out of range.
    """
    layers = rope_layers(model, check)
    if layer_idx is None:
        if any(rope != layers[0] for rope in layers):
            raise ValueError("layer_idx=None: the layers of this model differ in their RoPE; give a layer index")
        return layers[0]
    if not 0 <= layer_idx < len(layers):
        raise ValueError(f"layer_idx={layer_idx}: allowed are 0 to {len(layers) - 1}")
    return layers[layer_idx]


def read_rotary(rotary: nn.Module, config: Any = None, layer_type: str | None = None) -> Rope:
    """Read a transformers rotary module, without changing it.

    Args:
        rotary: module with `inv_freq` (or `<layer_type>_inv_freq`) whose forward gives cos and sin.
        config: the text model's config; `rotary.config` if None.
        layer_type: which of its layer types, where the module holds several (Gemma 3).

    Raises:
        ValueError: an unsupported RoPE, by name.
    """
    name = type(rotary).__name__
    config = getattr(rotary, "config", None) if config is None else config
    if not _is_rotary(rotary) or config is None:
        raise ValueError(f"rotary={name}: allowed are modules with inv_freq, and with a config or one given")
    parameters = getattr(config, "rope_parameters", None) or {}
    rope_type = getattr(rotary, "rope_type", None) or parameters.get("rope_type", "default")
    if isinstance(rope_type, dict):
        if layer_type not in rope_type:
            raise ValueError(f"layer_type={layer_type!r}: {name} has {', '.join(sorted(rope_type))}")
        rope_type, parameters = rope_type[layer_type], parameters.get(layer_type) or {}
    else:
        layer_type = None
    if rope_type not in SUPPORTED_TYPES:
        raise ValueError(f"rope_type {rope_type!r} of {name} is not supported; {_SUPPORTED}")
    if "mrope_section" in parameters or hasattr(rotary, "mrope_section"):
        raise ValueError(f"{name} uses multimodal RoPE (several positions a token), not supported; {_SUPPORTED}")
    if getattr(config, "kv_lora_rank", None) or getattr(config, "qk_rope_head_dim", None):
        raise ValueError(f"{name} belongs to multi-head latent attention, not supported; {_SUPPORTED}")

    stable_length = None
    if rope_type == "dynamic":
        # A module that has seen more goes back to these frequencies only below its original length, not at it.
        stable_length = rotary.original_max_seq_len - 1
    elif rope_type == "longrope":
        stable_length = parameters["original_max_position_embeddings"]

    with torch.inference_mode(False), torch.no_grad():
        rotary = _private_copy(rotary)
        kept = rotary if stable_length else None
        rope = Rope(rope_type, torch.empty(0, dtype=torch.float32), 1.0, False, stable_length, kept, layer_type)
        return _as_applied(rope, rotary, min(64, stable_length or 64))


def rope_at_length(rope: Rope, length: int) -> Rope:
    """The Rope the model uses in a forward pass whose highest position is `length - 1`.

    Itrope up to `stable_length`. Keys stored under one can be brought to another:
    `other.rotate(rope.unrotate(x, positions), positions)`.
    """
    if length < 1:
        raise ValueError(f"length={length}: allowed are integers of 1 or more")
    if rope.stable_length is None or length <= rope.stable_length:
        return rope
    with torch.inference_mode(False), torch.no_grad():
        return _as_applied(rope, copy.deepcopy(rope.rotary_module), length)


def rope_layers(model: nn.Module, check: bool = True) -> tuple[Rope, ...]:
    """The Rope of every layer of a transformers model, the same object where layers share it.

    Args:
        model: any transformers decoder or a model that holds one.
        check: run `check_rope`, one forward pass of one token, which also finds what no attribute tells. Without it the
            model is only read.

    Raises:
        ValueError: a RoPE that is not supported, by name, and what is.
    """
    decoder, config = _decoder(model)
    count = config.num_hidden_layers
    shared, own = {}, {}
    for name, module in _rotary_modules(decoder).items():
        layer = re.search(r"(?:^|\.)(\d+)\.", name)
        if layer:
            own.setdefault(int(layer[1]), module)
        else:
            shared[name] = module
    if len(shared) > 1:
        names = ", ".join(shared)
        raise ValueError(f"model type {config.model_type!r} has several rotary modules ({names}); {_SUPPORTED}")
    known: dict[tuple[int, str | None], Rope] = {}
    layers = []
    for index in range(count):
        module = next(iter(shared.values()), own.get(index))
        if module is None or not _layer_rotates(config, index):
            layers.append(Rope.none())
            continue
        layer_type = None
        if isinstance(getattr(module, "rope_type", None), dict):
            layer_type = config.layer_types[index]
            if getattr(config, "rope_parameters", {}).get(layer_type, False) is None:
                layers.append(Rope.none())
                continue
        if (id(module), layer_type) not in known:
            known[id(module), layer_type] = read_rotary(module, config, layer_type)
        layers.append(known[id(module), layer_type])
    if check:
        check_rope(model, layers)
    return tuple(layers)


def check_rope(model: nn.Module, ropes: Sequence[Rope]) -> None:
    """Raise unless the keys that the model itself stores turn as `ropes` says, layer by layer.

    A single token attends to itself alone, so every layer's hidden state, and its key before RoPE, is the same wherever
    that token stands; the stored key at a far position must be the one at 0, moved. One forward pass of two rows.

    Args:
        model: a transformers model with its weights loaded. Its frequencies are restored first, see
            `restore_frequencies`.
        ropes: one Rope a layer.

    Raises:
        ValueError: a layer does not agree; or nothing could be compared.
    """
    decoder, config = _decoder(model)
    kind = f"model type {config.model_type!r}"
    if len(ropes) != config.num_hidden_layers:
        raise ValueError(f"ropes has {len(ropes)} entries: {kind} has {config.num_hidden_layers} layers")
    restore_frequencies(model)
    if not any(rope.rotates for rope in ropes) and "position_ids" not in inspect.signature(decoder.forward).parameters:
        return  # it has no positions to give: relative biases or none, added to scores and not to keys
    device = decoder.get_input_embeddings().weight.device
    if device.type == "meta":
        raise ValueError(f"{kind} has no weights loaded (meta device); load them, or pass check=False")
    lengths = [rope.stable_length for rope in ropes if rope.stable_length]
    far = min(998, getattr(config, "max_position_embeddings", None) or 998, *lengths) - 1
    cache = DynamicCache(config=config)
    try:
        with torch.no_grad(), evaluating(decoder):
            decoder(
                # From the middle of the vocabulary: its ends hold padding and reserved tokens, which may embed to 0.
                input_ids=torch.full((2, 1), config.vocab_size // 2, device=device),
                position_ids=torch.tensor([[0], [far]], device=device),
                **{cache_argument(decoder): cache},
                use_cache=True,
            )
    except Exception as error:
        raise ValueError(f"{kind} can't be run to check its RoPE ({error}); {_SUPPORTED}") from error
    stored = {i: getattr(layer, "keys", None) for i, layer in enumerate(cache.layers)}
    stored = {i: keys for i, keys in stored.items() if isinstance(keys, torch.Tensor)}
    if not any(keys.any() for keys in stored.values()):
        raise ValueError(f"{kind} stored no keys, so its RoPE can't be checked; {_SUPPORTED}")
    # A key differs from the moved one by the rounding of its own dtype, and of cos and sin in that dtype.
    eps = {i: torch.finfo(autocast_dtype(keys.dtype, keys.device.type)).eps for i, keys in stored.items()}
    tolerance = {i: max(1e-4, 8 * own) for i, own in eps.items()}
    agree = {i: _difference(ropes[i].move(keys[:1], 0, far), keys[1:]) <= tolerance[i] for i, keys in stored.items()}
    if any(rope.rotates for rope in ropes):
        wrong = [i for i, same in agree.items() if not same]
        if wrong:
            layer = f"layer {wrong[0]}: its keys don't turn with position as {ropes[wrong[0]]} says"
            raise ValueError(f"{kind}, {layer}; {_SUPPORTED}")
    # Positions added to the input (GPT-2) change a key's length; a change of direction only is RoPE without a module.
    elif not all(agree.values()) and all(
        _difference(keys[:1].float().norm(dim=-1), keys[1:].float().norm(dim=-1)) <= tolerance[i]
        for i, keys in stored.items()
    ):
        raise ValueError(f"{kind} rotates its keys, but has no rotary module to read that from; {_SUPPORTED}")


def restore_frequencies(model: nn.Module) -> None:
    """Put "dynamic" frequencies back to those of the trained length, after a longer sequence has stretched them.

    The module keeps stretched frequencies for later short sequences (transformers 5.2 until the process ends, later
    releases at the trained length itself), where they disagree with `Rope` and with keys stored before. Costs nothing
    where there is nothing to restore: call it before a forward pass whenever a layer's `stable_length` is not None.
    """
    for module in _rotary_modules(_decoder(model)[0]).values():
        _restore(module, "dynamic")


def _private_copy(rotary: nn.Module) -> nn.Module:
    """A copy on the CPU in its original state, which may be run without the model noticing."""
    shell = copy.copy(rotary)
    # accelerate's hooks replace forward on the instance, and may hold the whole model's weights.
    for name in ("forward", "_old_forward", "_hf_hook"):
        shell.__dict__.pop(name, None)
    own = copy.deepcopy(shell).to("cpu")
    _restore(own)
    return own


def _restore(rotary: nn.Module, *types: str) -> None:
    """Undo what long sequences did to a rotary module, for the given RoPE types (all that depend on length if none)."""
    kinds = getattr(rotary, "rope_type", None)
    kinds = kinds if isinstance(kinds, dict) else {"": kinds}
    for layer_type, kind in kinds.items():
        prefix = f"{layer_type}_" if layer_type else ""
        original = getattr(rotary, f"{prefix}original_inv_freq", None)
        if kind not in (types or ("dynamic", "longrope")) or original is None:
            continue
        current = getattr(rotary, f"{prefix}inv_freq")
        # longrope's forward copies into inv_freq in place, which must not reach the original.
        original = original.to(current.device)
        setattr(rotary, f"{prefix}inv_freq", original if kind == "dynamic" else original.clone())
        if kind == "dynamic":
            for name in (f"{prefix}max_seq_len_cached", "max_seq_len_cached"):
                if hasattr(rotary, name):
                    setattr(rotary, name, rotary.original_max_seq_len)


def _decoder(model: nn.Module) -> tuple[nn.Module, Any]:
    """The module that holds the layers, and its config."""
    if not hasattr(model, "get_decoder") or not hasattr(model, "config"):
        raise ValueError(f"model={type(model).__name__}: allowed are transformers models (PreTrainedModel)")
    decoder = find_decoder(model)
    return decoder, decoder.config


def _is_rotary(module: nn.Module) -> bool:
    one = isinstance(getattr(module, "inv_freq", None), torch.Tensor)
    return one or isinstance(getattr(module, "rope_type", None), dict)


def _rotary_modules(decoder: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in decoder.named_modules() if _is_rotary(module)}


def _layer_rotates(config: Any, index: int) -> bool:
    """What the config tells of layers without RoPE, in models that have a rotary module."""
    if getattr(config, "alibi", False):  # Falcon
        return False
    rotating = getattr(config, "no_rope_layers", None)  # SmolLM3; 1 means RoPE, whatever the name says
    if rotating:
        return bool(rotating[index])
    if family_of(config.model_type).rotates_sliding_only and getattr(config, "sliding_window", None) is not None:
        return config.layer_types[index] == "sliding_attention"
    return True


def _cos_sin(rotary: nn.Module, layer_type: str | None, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The module's own `[1, tokens, .]` cos and sin for `[1, tokens]` positions, float32."""
    name = type(rotary).__name__
    kwargs = {} if layer_type is None else {"layer_type": layer_type}
    try:
        result = rotary(torch.zeros(1, 1, 1, dtype=torch.float32), positions, **kwargs)
    except (TypeError, RuntimeError, ValueError, AttributeError) as error:
        raise ValueError(f"{name} can't be read ({error}); {_SUPPORTED}") from error
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(f"{name} gives no cos and sin (complex RoPE, as in Llama 4), not supported; {_SUPPORTED}")
    return result[0].float(), result[1].float()


def _as_applied(rope: Rope, rotary: nn.Module, length: int) -> Rope:
    """`rope` with the frequencies, scaling, pairing and direction of a forward pass of `length` tokens.

    Neither attributes nor the apply function are trusted by their names (Phi-3.5-MoE computes with others than it
    holds): each reading is tried on random vectors against the module's own cos and sin in the model's own function.
    `rotary`, on the CPU, may keep a state from it.
    """
    name = type(rotary).__name__
    positions = torch.tensor([0, 1, 2, length - 1]).clamp(max=length - 1)
    cos, sin = _cos_sin(rotary, rope.layer_type, positions[None])
    apply = getattr(sys.modules[type(rotary).__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        raise ValueError(f"{name} comes without apply_rotary_pos_emb, not supported; {_SUPPORTED}")
    prefix = f"{rope.layer_type}_" if rope.layer_type else ""
    held = [getattr(rotary, f"{prefix}{key}", None) for key in ("inv_freq", "original_inv_freq")]
    held = [inv_freq.detach().float().clone() for inv_freq in held if inv_freq is not None]
    x = torch.randn(1, 2, 4, 2 * held[0].shape[0], generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    arguments = (x, cos, sin) if list(inspect.signature(apply).parameters)[1:2] == ["cos"] else (x, x, cos, sin)
    try:
        theirs = apply(*arguments)
    except (TypeError, RuntimeError, ValueError, IndexError) as error:
        raise ValueError(f"apply_rotary_pos_emb of {name} can't be called ({error}); {_SUPPORTED}") from error
    theirs = theirs[1] if isinstance(theirs, tuple) else theirs
    scaling = cos[0, 0, 0].item()  # cos of 0, scaled
    for inv_freq in (signed for one in held for signed in (one, -one)):
        for interleaved in (False, True):
            reading = replace(rope, inv_freq=inv_freq, attention_scaling=scaling, interleaved=interleaved)
            if theirs.shape == x.shape and _difference(reading.rotate(x, positions), theirs) < 1e-4:
                return reading
    raise ValueError(f"{name} does not turn vectors as position times inv_freq, not supported; {_SUPPORTED}")


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, in parts of the largest element of `b`."""
    return ((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-30)).item()


@contextlib.contextmanager
def evaluating(module: nn.Module):
    """Dropout off in `module`, and each part back in its own mode afterwards."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
