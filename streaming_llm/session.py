"""A conversation kept in a file: the cache's whole state as safetensors, so that another process goes on to the bit.

Tensors lie under dotted names; the plain part is JSON in the file's metadata, with a checksum over both. Loading runs no
code from the file. What is state say the fields of a `Stack`; here only their kinds of values are known.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import uuid
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from .by_hand import HandState
from .cache import ADMSKVCache
from .compaction.counts import Counts
from .compaction.memory import Memory
from .config import ADMSConfig
from .data.state import HeadState
from .data.tokens import WeightedTokens
from .layer import ADMSLayer
from .model.enable import check_model, make_cache, wire
from .model.facts import describe_model, differences, layer_devices, model_differences
from .seen import SeenTokens
from .store.archive import Archive
from .store.row import Row
from .store.stack import Stack
from .stream.trading import joined

FORMAT, VERSION = "adms-session", "3"

# What a cache holds beside its stream that is saved with it.
_KEPT = ("padding", "_length_override", "seen_tokens", "_hand", "_hand_counts", "_variances")
# What a stream holds beside its stacks and positions, likewise.
_STREAM_KEPT = ("next_trades", "records_past", "cut")
# Of a stack, what the model that loads it tells anew; of its tokens and queries only the slots in use are saved.
_TOLD_ANEW = ("config", "rope")
# What transformers' own sliding layers remember beside keys and values.
_SLIDING = ("cumulative_length", "record_past")


def save(cache: ADMSKVCache, path: str | os.PathLike) -> None:
    """Write the conversation to a file: everything the cache holds, its settings, and what tells its model as it is now.

    Written aside in the same folder and put in place at the end: a file that was there stays as it was until then, and
    where saving fails.

    Args:
        path: where to; its folder must exist.

    Raises:
        ValueError: a cache that `enable_adms_llm` did not make, or a path that can't be.
        RuntimeError: in the middle of a forward pass.
        OSError: the file can't be written.
    """
    target = _checked_path(path)
    if target.exists() and not target.is_file():
        raise ValueError(f"path={str(path)!r} must be a file, or nothing yet")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path={str(path)!r}: there is no folder {str(target.parent)!r}")
    if not cache.wired or cache.used_model is None:
        raise ValueError("the cache can't be saved: it knows of no model. Only one that enable_adms_llm made can be")
    cache._settle()
    stream = cache.stream
    if stream.open is not None:
        raise RuntimeError("the cache can't be saved in the middle of a forward pass")
    tensors: dict[str, torch.Tensor] = {}
    sliding = {i: layer for i, layer in enumerate(cache.layers) if not isinstance(layer, ADMSLayer)}
    session = json.dumps(
        {
            "model": cache.used_model.describe(),
            "settings": cache.config.to_dict(),
            "positions": {"offsets": cache.window.offsets, "following": cache.window.following},
            "cache": {name: _encode(getattr(cache, name), f"cache.{name}", tensors) for name in _KEPT},
            "layers": len(cache.layers),
            "stream": {name: _encode(getattr(stream, name), f"stream.{name}", tensors) for name in _STREAM_KEPT},
            "fallbacks": _encode(stream.compressor.fallbacks, "fallbacks", tensors),
            "stacks": [_encode_stack(stack, f"stacks.{i}", tensors) for i, stack in enumerate(stream.stacks)],
            "sliding": {i: _encode_sliding(layer, f"sliding.{i}", tensors) for i, layer in sliding.items()},
        }
    )
    metadata = {"format": FORMAT, "version": VERSION, "session": session, "checksum": _checksum(session, tensors)}
    _write(target, safetensors.torch.save(tensors, metadata))


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


# The cache has both as methods. They stand above it, since a file is loaded for a model, which is wired for it.
ADMSKVCache.save, ADMSKVCache.load = save, staticmethod(load)


def _checked_path(path: str | os.PathLike) -> Path:
    """Where the file is or is to be, links followed, so that saving over one does not replace it."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path={path!r} must be a str or a Path")
    return Path(os.path.realpath(path))


# -- values ----------------------------------------------------------------------------------------------------------------


def _kinds() -> dict[str, type]:
    """Dataclasses of tensors by name."""
    kinds = (WeightedTokens, Memory, Counts, HandState, Row, SeenTokens, *HeadState.__subclasses__())
    return {kind.__name__: kind for kind in kinds}


def _encode(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON can hold it; its tensors go to `tensors`, under names that begin with `name`."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.Tensor):
        # A copy: safetensors takes no two tensors of one storage.
        tensors[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"kind": "tensor", "name": name}
    if isinstance(value, Row):
        return {"kind": "Row", "fields": value._asdict()}
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


def _strange(node: Any) -> set[str]:
    """Kinds and fields of what `_encode` gave that only one of the file and this release knows."""
    if isinstance(node, list):
        return set().union(*map(_strange, node))
    if not isinstance(node, dict):
        return set()
    strange, kind = set().union(*map(_strange, node.values())), node.get("kind")
    if "fields" in node:
        known = _kinds().get(kind)
        strange |= {kind} if known is None else set(inspect.signature(known).parameters) ^ set(node["fields"])
    return strange


# -- stacks ----------------------------------------------------------------------------------------------------------------


def _encode_stack(stack: Stack, prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A stack, of its buffers only what is in use."""
    fields = {item.name: getattr(stack, item.name) for item in dataclasses.fields(stack) if item.name not in _TOLD_ANEW}
    slots = fields["tokens"].length
    fields["tokens"] = stack.tokens.slice(0, stack.columns)
    if stack.queries is not None:
        fields["queries"] = stack.queries[:, :, :, : max(row.queries for row in stack.rows)]
    if stack.archive is not None:
        fields["archive"] = stack.archive.as_dict(max(row.archived for row in stack.rows))
    return {"slots": slots} | {name: _encode(value, f"{prefix}.{name}", tensors) for name, value in fields.items()}


def _decode_stack(
    cache: ADMSKVCache, nodes: dict[str, Any], tensors: dict[str, torch.Tensor], devices: list[torch.device]
) -> list[Stack]:
    """The stack that `_encode_stack` took, on the devices of its layers; as several where these differ."""
    cpu, stream = torch.device("cpu"), cache.stream
    fields = {name: _decode(node, tensors, cpu) for name, node in nodes.items() if name != "slots"}
    first = fields["layers"][0]
    archived = fields.pop("archive")
    stack = Stack(config=stream.config, rope=cache.layers[first].rope, **fields)
    if archived is not None:
        rows = stack.batch
        states = (stack.tokens.keys[:rows], stack.tokens.values[:rows])
        stack.archive = Archive.from_dict(stream.config, *states, len(stack.layers), archived)
    stack.tokens = stack.tokens.widened(nodes["slots"])
    if stack.queries is not None:
        missing = stream.config.query_slots - stack.queries.shape[3]
        stack.queries = torch.nn.functional.pad(stack.queries, (0, 0, 0, missing))
    parts = [stack.single(layer).to(devices[layer] if layer < len(devices) else cpu) for layer in stack.layers]
    if len({part.device for part in parts}) == 1 and len(parts) <= stream.layers_at_once:
        return [Stack.join(parts, len(parts))]
    return joined(parts, stream.layers_at_once)


def _encode_sliding(layer: Any, prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What one of transformers' own layers with a sliding window holds."""
    state = {name: getattr(layer, name, False) for name in _SLIDING}
    if layer.is_initialized:
        state |= {"keys": layer.keys, "values": layer.values}
    return {name: _encode(value, f"{prefix}.{name}", tensors) for name, value in state.items()}


def _restore(
    cache: ADMSKVCache, saved: dict[str, Any], tensors: dict[str, torch.Tensor], devices: list[torch.device]
) -> None:
    """Give a new cache what was saved."""
    cpu, stream = torch.device("cpu"), cache.stream
    for name in _KEPT:
        setattr(cache, name, _decode(saved["cache"][name], tensors, cpu))
    # Parts called by hand may have made more layers than the model has; what they hold was never on its device.
    cache._make_layers(saved["layers"] - 1)
    stream.window.offsets, stream.window.following = saved["positions"]["offsets"], saved["positions"]["following"]
    for name in _STREAM_KEPT:
        setattr(stream, name, _decode(saved["stream"][name], tensors, cpu))
    stream.compressor.fallbacks = _decode(saved["fallbacks"], tensors, cpu)
    stream.stacks = [part for nodes in saved["stacks"] for part in _decode_stack(cache, nodes, tensors, devices)]
    for name, nodes in saved["sliding"].items():
        layer, state = cache.layers[int(name)], {}
        for key, node in nodes.items():
            state[key] = _decode(node, tensors, devices[int(name)])
        if "keys" in state:
            layer.lazy_initialization(state["keys"], state["values"])
        vars(layer).update(state)


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
    strange = set(saved["cache"]) ^ set(_KEPT) | set(saved["stream"]) ^ set(_STREAM_KEPT)
    known = {item.name for item in dataclasses.fields(Stack)} - set(_TOLD_ANEW) | {"slots"}
    for nodes in saved["stacks"]:
        strange |= set(nodes) ^ known
    strange |= _strange([saved["cache"], saved["stacks"]])
    if strange:
        raise ValueError(
            f"path={str(path)!r} was saved by another release of this package: only one of them knows "
            f"{', '.join(sorted(strange))}"
        )
    return saved, tensors
