"""What is to be known of a model: what it calls its cache, what it is recognised by, and where its layers are."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import weakref
import zlib
from typing import Any

import torch

from ..sizing import layer_windows
from .wrappers import find_decoder, open_model

# What decides the shape of keys and values and what they mean.
_FACTS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "attn_logit_softcapping",
    "query_pre_attn_scalar",
    "rope_parameters",
)
# Numbers looked at in each parameter, and differences a message names.
_SAMPLE, _NAMED = 64, 4


def cache_argument(model: Any) -> str:
    """Name of the argument the model takes its cache by: `cache` since transformers 5.24, `past_key_values` before.

    It reads the signature of `forward`: ask once and not at every pass. What holds no transformers model is asked itself.
    """
    with contextlib.suppress(TypeError):
        model = open_model(model)
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def describe_model(model: torch.nn.Module) -> dict[str, Any]:
    """Plain values a model is recognised by: facts of its config, its dtype, and a checksum of a sample of each parameter.

    The checksum is of 64 evenly spaced numbers, so that another checkpoint of the same shape is told apart without reading
    all weights; None for parameters whose numbers are not there to be read (offloaded, or quantised by a tensor subclass).
    """
    text = model.config.get_text_config()
    facts = {name: getattr(text, name, None) for name in _FACTS}
    facts["sliding_window"] = {str(i): window for i, window in enumerate(layer_windows(text)) if window is not None}
    rotating = getattr(text, "no_rope_layers", None) or []
    facts["without_rope"] = {str(i): True for i, rotates in enumerate(rotating) if not rotates}
    facts["dtype"] = str(model.dtype).removeprefix("torch.")
    facts["weights"] = _weight_checksums(model)
    # As a file gives it back: lists for tuples, strings for keys.
    return json.loads(json.dumps(facts))


def _weight_checksums(model: torch.nn.Module) -> dict[str, int | None]:
    sums: dict[str, int | None] = {}
    samples: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, parameter in _acting_parameters(model).items():
        sums[name] = None
        if parameter.device.type != "meta" and type(parameter.data) is torch.Tensor:
            flat = parameter.data.reshape(-1)
            # An odd step, so that the sample is not one column of a matrix.
            sample = flat[:: (flat.numel() // _SAMPLE) | 1].contiguous().view(torch.uint8)
            samples.setdefault(parameter.device, {})[name] = sample
    # Each device is asked once.
    for parts in samples.values():
        whole = torch.cat(list(parts.values())).cpu()
        for name, part in zip(parts, whole.split([part.numel() for part in parts.values()]), strict=True):
            sums[name] = zlib.crc32(part.numpy())
    return sums


def _acting_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The model's parameters by the names they have without adapters (peft), and those of the adapters that are on.

    What an adapter is called and whether one was ever there does not tell two models apart; what it adds does.
    """
    active = {
        prefix: [] if module.disable_adapters else module.active_adapters
        for prefix, module in model.named_modules()
        if isinstance(getattr(module, "active_adapters", None), list)
    }
    found = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        for at in range(len(parts) - 1, 0, -1) if active else ():
            adapters = active.get(".".join(parts[:at]))
            if adapters is None:
                continue
            if parts[at] in ("base_layer", "original_module"):
                del parts[at]
            elif parts[at + 1] in adapters:
                parts[at + 1] = str(adapters.index(parts[at + 1]))
            else:
                parts = []
                break
        if parts:
            found[".".join(parts)] = parameter
    return found


class UsedModel:
    """The model a cache is used with, held weakly, so that it can be described as it is when that is asked for.

    A copy is of the same model; a pickle takes the description with it. So is a model that is gone described as it last was.
    """

    def __init__(self, model: torch.nn.Module | None, facts: dict[str, Any] | None = None):
        self._model = None if model is None else weakref.ref(model)
        self._facts = describe_model(model) if facts is None else facts

    def is_(self, model: torch.nn.Module) -> bool:
        """Whether it is this one."""
        return self._model is not None and self._model() is model

    def describe(self) -> dict[str, Any]:
        """What `describe_model` says of it."""
        model = None if self._model is None else self._model()
        if model is not None:
            self._facts = describe_model(model)
        return self._facts

    def __deepcopy__(self, memo: dict) -> UsedModel:
        return self

    def __reduce__(self) -> tuple:
        return UsedModel, (None, self.describe())


def use_with(cache: Any, model: torch.nn.Module) -> None:
    """Have `cache.used_model` be this one; see `ADMSKVCache.save`."""
    if cache.used_model is None or not cache.used_model.is_(model):
        cache.used_model = UsedModel(model)


def model_differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What differs between two results of `describe_model`, in words; empty where nothing does."""
    facts, others = ({name: fact for name, fact in given.items() if name != "weights"} for given in (there, here))
    said = differences(facts, others)
    if said:
        return said
    ours, theirs = there["weights"], here["weights"]
    wrong = [name for name in {**ours, **theirs} if name not in ours or name not in theirs]
    wrong = wrong or [name for name, own in ours.items() if None not in (own, theirs[name]) and own != theirs[name]]
    return f"the weights differ, first {wrong[0]} ({len(wrong)} of {len(ours)})" if wrong else ""


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The entries that differ between two dictionaries of plain values, in words; empty where none does."""
    ours, theirs = _flat(there), _flat(here)
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    said = [f"{name} is {ours.get(name)!r} there and {theirs.get(name)!r} here" for name in names[:_NAMED]]
    return ", ".join(said) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return found


def layer_devices(model: torch.nn.Module) -> list[torch.device]:
    """The device each layer computes its keys on."""
    decoder = find_decoder(model)
    devices = [model.device] * model.config.get_text_config().num_hidden_layers
    for name, module in decoder.named_modules():
        number = re.fullmatch(r"\w+\.(\d+)", name)
        if number is None or int(number[1]) >= len(devices):
            continue
        here = [parameter.device for parameter in module.parameters() if parameter.device.type != "meta"]
        # Where all are offloaded, accelerate's hooks say what device they are brought to.
        hooks = [getattr(part, "_hf_hook", None) for part in module.modules()]
        brought = [hook.execution_device for hook in hooks if getattr(hook, "execution_device", None) is not None]
        devices[int(number[1])] = torch.device([*here, *brought, model.device][0])
    return devices
