"""A conversation kept in a file: the cache's whole state as safetensors, so that another process goes on to the bit.

Tensors lie under dotted names; the plain part is JSON in the file's metadata, with a checksum over both. Loading runs no
code from the file. What of a layer is state says `ADMSLayer.KEPT`; here only its kinds of values are known.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from .config import ADMSConfig
from .group import LayerGroup, whole_groups
from .layer import ADMSLayer
from .model_facts import UsedModel, describe_model, differences, layer_devices, model_differences
from .rows import Cohort, PaddedLayer
from .seen import SeenTokens
from .state import HeadState
from .tokens import WeightedTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .cache import ADMSKVCache

FORMAT, VERSION = "adms-session", "2"

# Of these only the first slots are in use: what counts them, and the dimension they are in.
_PARTLY_USED = {"buffer": ("length", 2), "query_buffer": ("query_slots_used", 3)}
# What transformers' own sliding layers remember beside keys and values.
_SLIDING = ("cumulative_length", "record_past")


class SessionMixin:
    """`save` and `load` of the cache."""

    # Names of what a cache holds beside its layers that is saved with it, and of what is not.
    KEPT = ("padding", "_length_override", "_hand_counts", "_variances", "seen_tokens")
    TRANSIENT = (
        "_config",
        "wired",
        "layers_at_once",
        "broken",
        "used_model",
        "window",
        "ropes",
        "ranks",
        "keys_as",
        "_arrival",
        "_followed",
        "_before",
        "_room",
        "_coming",
        "_told_rewound",
        "outer_mask",
        "_told_unwired",
        "_profile",
    )

    used_model: UsedModel | None

    def save(self, path: str | os.PathLike) -> None:
        """Write the conversation to a file: everything the cache holds, its settings, and what tells its model as it is now.

        Written aside in the same folder and put in place at the end: a file that was there stays as it was until then, and
        where saving fails.

        Args:
            path: where to; its folder must exist.

        Raises:
            ValueError: a cache that `enable_adms_llm` did not make, or a path that can't be.
            RuntimeError: a cache that can't be used any more, or in the middle of a forward pass.
            OSError: the file can't be written.
        """
        target = _checked_path(path)
        if target.exists() and not target.is_file():
            raise ValueError(f"path={str(path)!r} must be a file, or nothing yet")
        if not target.parent.is_dir():
            raise FileNotFoundError(f"path={str(path)!r}: there is no folder {str(target.parent)!r}")
        if not self.wired or self.used_model is None:
            raise ValueError("the cache can't be saved: it knows of no model. Only one that enable_adms_llm made can be")
        if self.broken:
            raise RuntimeError(f"the cache can't be saved: {self.broken}")
        for layer in self._full_layers():
            layer.accept()
        if self._arrival is not None or any(layer.overflow is not None for layer in self._full_layers()):
            raise RuntimeError("the cache can't be saved in the middle of a forward pass")
        tensors: dict[str, torch.Tensor] = {}
        numbers = {id(layer): number for number, layer in enumerate(self.layers)}
        session = json.dumps(
            {
                "model": self.used_model.describe(),
                "settings": self.config.to_dict(),
                "positions": {"offsets": self.window.offsets, "following": self.window.following},
                "cache": {name: _encode(getattr(self, name), f"cache.{name}", tensors) for name in self.KEPT},
                "layers": [_encode_layer(layer, f"layers.{i}", tensors) for i, layer in enumerate(self.layers)],
                "groups": [[numbers[id(layer)] for layer in group.layers] for group in whole_groups(self._full_layers())],
            }
        )
        metadata = {"format": FORMAT, "version": VERSION, "session": session, "checksum": _checksum(session, tensors)}
        _write(target, safetensors.torch.save(tensors, metadata))

    @staticmethod
    def load(path: str | os.PathLike, model: PreTrainedModel, config: ADMSConfig | None = None) -> ADMSKVCache:
        """The cache in a file that `save` wrote, and the model wired for it as `enable_adms_llm` does.

        Logits go on as they would have in the process that saved it, to the bit on the same device, versions and attention
        implementation. Each layer's tensors go to the device where the model has that layer.

        Args:
            path: the file.
            model: the model the conversation was held with, the same weights in the same dtype.
            config: the settings the file must have been saved with; None to take the file's.

        Raises:
            ValueError: a file that is damaged, of another version or of another model, or other settings (what differs is
                named); or a model that can't be enabled. Nothing has changed.
            FileNotFoundError: no such file.
        """
        # Only here: enable.py knows the cache.
        from .enable import check_model, make_cache, wire

        if config is not None:
            ADMSConfig.check(config)
        saved, tensors = _read(_checked_path(path))
        model = check_model(model)
        differing = model_differences(saved["model"], describe_model(model))
        if differing:
            raise ValueError(f"path={str(path)!r} was saved from another model: {differing}")
        cache = make_cache(model, config or ADMSConfig.from_dict(saved["settings"]))
        differing = differences(saved["settings"], cache.config.to_dict())
        if differing:
            raise ValueError(f"path={str(path)!r} was saved with other settings: {differing}")
        with torch.inference_mode(False), torch.no_grad():
            _restore(cache, saved, tensors, layer_devices(model))
        wire(model, cache)
        return cache


def _checked_path(path: str | os.PathLike) -> Path:
    """Where the file is or is to be, links followed, so that saving over one does not replace it."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path={path!r} must be a str or a Path")
    return Path(os.path.realpath(path))


# -- values ----------------------------------------------------------------------------------------------------------------


def _kinds() -> dict[str, type]:
    """Dataclasses of tensors by name."""
    return {kind.__name__: kind for kind in (WeightedTokens, SeenTokens, *HeadState.__subclasses__())}


def _encode(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON can hold it; its tensors go to `tensors`, under names that begin with `name`."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.Tensor):
        # A copy: safetensors takes no two tensors of one storage.
        tensors[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"kind": "tensor", "name": name}
    if type(value) in (list, tuple):
        return {
            "kind": type(value).__name__,
            "items": [_encode(item, f"{name}.{i}", tensors) for i, item in enumerate(value)],
        }
    if type(value) is dict:
        # Pairs, because keys may be numbers.
        return {"kind": "dict", "items": [[key, _encode(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if type(value).__name__ in _kinds():
        fields = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        return {
            "kind": type(value).__name__,
            "fields": {key: _encode(field, f"{name}.{key}", tensors) for key, field in fields.items()},
        }
    raise TypeError(f"{name} of type {type(value).__name__} has no place in a saved conversation")


def _decode(node: Any, tensors: dict[str, torch.Tensor], device: torch.device) -> Any:
    """What `_encode` was given, its tensors on `device`."""
    if not isinstance(node, dict):
        return node
    kind = node["kind"]
    if kind == "tensor":
        return tensors[node["name"]].to(device, copy=True)
    if kind in ("list", "tuple"):
        items = [_decode(item, tensors, device) for item in node["items"]]
        return items if kind == "list" else tuple(items)
    if kind == "dict":
        return {key: _decode(item, tensors, device) for key, item in node["items"]}
    return _kinds()[kind](**{name: _decode(field, tensors, device) for name, field in node["fields"].items()})


# -- layers ----------------------------------------------------------------------------------------------------------------


def _encode_layer(layer: Any, prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A layer's state; of buffers only what is in use."""
    if not isinstance(layer, ADMSLayer):
        state = {name: getattr(layer, name, False) for name in _SLIDING}
        if layer.is_initialized:
            state |= {"keys": layer.keys, "values": layer.values}
        return {name: _encode(value, f"{prefix}.{name}", tensors) for name, value in state.items()}
    state = {name: getattr(layer, name) for name in layer.KEPT}
    slots, rows = {}, {}
    if isinstance(layer, PaddedLayer):
        # What is free in its buffers differs from row to row.
        rows["cohorts"] = [
            {"rows": cohort.rows, "part": _encode_layer(cohort.part, f"{prefix}.cohorts.{i}", tensors)}
            for i, cohort in enumerate(state.pop("cohorts"))
        ]
    for name, (count, dim) in () if rows else _PARTLY_USED.items():
        whole, used = state.get(name), getattr(layer, count)
        if isinstance(whole, WeightedTokens):
            slots[name], state[name] = whole.length, whole.slice(0, used)
        elif whole is not None:
            slots[name], state[name] = whole.shape[dim], whole.narrow(dim, 0, used)
    state |= {"slots": slots, "fallbacks": layer.compressor.fallbacks}
    return rows | {name: _encode(value, f"{prefix}.{name}", tensors) for name, value in state.items()}


def _restore_layer(layer: Any, nodes: dict[str, Any], tensors: dict[str, torch.Tensor], device: torch.device) -> None:
    """Give a new layer the state that `_encode_layer` took."""
    if not isinstance(layer, ADMSLayer):
        state = {name: _decode(node, tensors, device) for name, node in nodes.items()}
        if "keys" in state:
            layer.lazy_initialization(state["keys"], state["values"])
        for name, value in state.items():
            setattr(layer, name, value)
        return
    nodes = dict(nodes)
    cohorts = nodes.pop("cohorts", [])
    state = {name: _decode(node, tensors, device) for name, node in nodes.items()}
    slots, layer.compressor.fallbacks = state.pop("slots"), state.pop("fallbacks")
    for name, value in state.items():
        setattr(layer, name, _full_size(name, value, slots[name]) if name in slots else value)
    if isinstance(layer, PaddedLayer):
        layer.cohorts = []
        for saved in cohorts:
            part = layer.unpadded()
            _restore_layer(part, saved["part"], tensors, device)
            part.dtype, part.device = layer.buffer.keys.dtype, device
            layer.cohorts.append(Cohort(saved["rows"], part))
    if layer.is_initialized and layer.buffer is not None:
        layer.dtype, layer.device, layer.group = layer.buffer.keys.dtype, device, None


def _full_size(name: str, used: Any, slots: int) -> Any:
    """A buffer of `slots` slots whose first are `used`."""
    if isinstance(used, WeightedTokens):
        buffer = WeightedTokens.empty(used.keys, used.values, slots, exact=used.exact)
        buffer.refresh(0, slots)
        buffer.write(0, used)
        return buffer
    dim = _PARTLY_USED[name][1]
    buffer = used.new_zeros(*used.shape[:dim], slots, *used.shape[dim + 1 :])
    buffer.narrow(dim, 0, used.shape[dim]).copy_(used)
    return buffer


def _restore(
    cache: ADMSKVCache, saved: dict[str, Any], tensors: dict[str, torch.Tensor], devices: list[torch.device]
) -> None:
    """Give a new cache what was saved."""
    cpu = torch.device("cpu")
    for name in cache.KEPT:
        setattr(cache, name, _decode(saved["cache"][name], tensors, cpu))
    # Parts called by hand may have made more layers than the model has; what they hold was never on its device.
    cache._make_layers(len(saved["layers"]) - 1)
    cache.window.offsets, cache.window.following = saved["positions"]["offsets"], saved["positions"]["following"]
    for i, nodes in enumerate(saved["layers"]):
        if "cohorts" in nodes:
            cache.layers[i] = PaddedLayer(cache.layers[i], 0)
        layer = cache.layers[i]
        by_hand = i >= len(devices) or not nodes.get("is_initialized", True)
        _restore_layer(layer, nodes, tensors, cpu if by_hand else devices[i])
    for numbers in saved["groups"]:
        members = [cache.layers[i] for i in numbers]
        if cache.layers_at_once > 1 and len({layer.device for layer in members}) == 1:
            LayerGroup.of(members)


# -- the file --------------------------------------------------------------------------------------------------------------


def _checksum(session: str, tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of the plain part and of each tensor with its name, dtype and shape."""
    digest = hashlib.sha256(session.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _write(target: Path, content: bytes) -> None:
    """Put the content where `target` says, whole or not at all."""
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(aside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The plain part and the tensors of a saved conversation; `ValueError` where the file is not as it was written."""
    if not path.exists():
        raise FileNotFoundError(f"path={str(path)!r}: there is no such file")
    wrong = f"path={str(path)!r} is no saved conversation, or damaged"
    if not path.is_file():
        raise ValueError(f"{wrong}: it is no file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{wrong}: it does not say that it is one")
            if metadata.get("version") != VERSION:
                found = metadata.get("version")
                raise ValueError(f"path={str(path)!r} is of version {found!r}; this release reads version {VERSION!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{wrong}: {error}") from error
    session = metadata.get("session", "")
    if metadata.get("checksum") != _checksum(session, tensors):
        raise ValueError(f"{wrong}: its checksum is wrong")
    saved = json.loads(session)
    strange = set(saved["cache"]) ^ set(SessionMixin.KEPT)
    for nodes in saved["layers"]:
        if "cumulative_length" not in nodes:
            kept = PaddedLayer.KEPT if "cohorts" in nodes else ADMSLayer.KEPT
            strange |= set(nodes) ^ {*kept, "slots", "fallbacks"}
    if strange:
        raise ValueError(
            f"path={str(path)!r} was saved by another release of this package: only one of them knows "
            f"{', '.join(sorted(strange))}"
        )
    return saved, tensors
