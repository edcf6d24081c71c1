"""Wiring a model: its attention, its hooks, and the cache that goes with it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import threading
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationMixin, PreTrainedModel

from ..cache import ADMSKVCache
from ..config import MODULE_BUDGETS, ADMSConfig, tell_settings
from ..data.rope import Rope
from ..settings import LowRankSettings, Settings, StreamingSettings, VQSettings
from ..stream.positions import PositionWindow
from .attention import WiredConfig, check_attention, register
from .facts import cache_argument, use_with
from .families import FAMILIES, family_of
from .hooks import STATE, after_forward, before_forward, before_logits, begin_generation, generate, prepare_inputs
from .parallel import ranks_of
from .probe import probe_model
from .rope_reading import rope_layers
from .wrappers import find_decoder, open_model

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Layers compacted in one call on a CPU: as many as stay in its caches. On an accelerator a compaction is bound by the number
# of kernels, not by their size: all go at once.
_CPU_LAYERS = 8
# What `probe` may be.
PROBES = (None, "auto", "always", False)
# Threads may enable one model at the same time: it is wired once.
_WIRING = threading.RLock()

logger = logging.getLogger("streaming_llm")


@tell_settings()
def enable_adms_llm(
    model: PreTrainedModel,
    config: ADMSConfig | None = None,
    *,
    probe: str | bool | None = None,
    **settings: Unpack[Settings],
) -> ADMSKVCache:
    """Wire a model for the cache and return a new one: `model.generate(**inputs, past_key_values=cache)`.

    The model's attention implementation (eager or sdpa) is wrapped through transformers' `AttentionInterface`; with any
    other cache the model computes what it did before. May be called again at any time, with other settings; caches made
    earlier stay usable.

    Args:
        model: a causal language model, or a module that holds one (peft's, torch.compile's).
        probe: whether to try the model itself before it is wired, in under a second for a small one, and refuse it with the
            reason where a check fails. None or "auto": only a type that was not tested; "always": any; False: none.
        config: the settings as a whole, or
        **settings: each by its name in `ADMSConfig`; an unknown one raises `ValueError` naming it.

    Returns:
        A new cache. The model uses it only where it is passed: `enable_adms_llm` alone changes nothing that is generated.

    Raises:
        ValueError: unknown or wrong setting, a model type or attention implementation that can't be, or a failed probe.
        TypeError: no model, or a module that holds several. Nothing has changed after either.
    """
    if config is not None and settings:
        raise ValueError(f"config and the settings {', '.join(settings)} were both given: pass one or the other")
    config = ADMSConfig(**settings) if config is None else ADMSConfig.check(config)
    model = check_model(model, probe)
    cache = make_cache(model, config, explicit=bool(settings.get("enable_position_calibration")))
    wire(model, cache)
    return cache


@tell_settings(without=("compressor_type",))
def enable_adms_low_rank(model: PreTrainedModel, rank: int = 16, **settings: Unpack[LowRankSettings]) -> ADMSKVCache:
    """`enable_adms_llm` with the low-rank compressor."""
    return enable_adms_llm(model, **{**settings, "compressor_type": "low_rank", "rank": rank})


@tell_settings(without=("compressor_type",))
def enable_adms_vq(model: PreTrainedModel, num_clusters: int = 64, **settings: Unpack[VQSettings]) -> ADMSKVCache:
    """`enable_adms_llm` with the vector-quantising compressor."""
    return enable_adms_llm(model, **{**settings, "compressor_type": "vq", "num_clusters": num_clusters})


@tell_settings(without=("compressed_budget", "min_importance_tokens"))
def enable_streaming_llm(
    model: PreTrainedModel, start_size: int = 4, recent_size: int = 2000, **settings: Unpack[StreamingSettings]
) -> ADMSKVCache:
    """StreamingLLM (Xiao et al. 2023, arXiv 2309.17453) as a policy of the same cache: sinks and recent window only."""
    fixed = {"compressed_budget": 0, "min_importance_tokens": 0, "start_size": start_size, "recent_size": recent_size}
    for name in ("compressed_budget", "min_importance_tokens"):
        if settings.get(name):
            raise ValueError(f"{name}={settings[name]} can't be set: StreamingLLM keeps sinks and recent window only")
    return enable_adms_llm(model, **{**settings, **fixed})


def disable_adms_llm(model: PreTrainedModel) -> None:
    """Undo `enable_adms_llm`: hooks and attention are what they were. Harmless for a model that is not enabled.

    Raises:
        TypeError: no model; see `enable_adms_llm`.
    """
    model = open_model(model)
    decoder = find_decoder(model)
    with _WIRING:
        for module in (decoder, model):
            wiring = module.__dict__.pop(STATE, {"handles": (), "methods": ()})
            for handle in wiring["handles"]:
                handle.remove()
            for name in wiring["methods"]:
                module.__dict__.pop(name, None)
        for module in decoder.modules():
            own = module.__dict__.get("config")
            if isinstance(own, WiredConfig):
                module.config = own.config


def is_enabled(model: PreTrainedModel) -> bool:
    """Whether the model is wired."""
    return STATE in find_decoder(open_model(model)).__dict__


def check_model(model: PreTrainedModel, probe: str | bool | None = None) -> PreTrainedModel:
    """The model itself, out of what is around it, where it can be wired; `TypeError` or `ValueError` where it can't.

    Args:
        probe: as for `enable_adms_llm`. A model that is wired already was probed then.
    """
    if probe not in PROBES or probe == 0 and probe is not False:
        raise ValueError(f"probe={probe!r} must be one of {', '.join(map(repr, PROBES))}")
    model = open_model(model)
    text = model.config.get_text_config()
    for kind in (model.config.model_type, text.model_type):
        if family_of(kind).refused:
            raise ValueError(f"model type {kind!r} can't be enabled: {family_of(kind).refused}")
    if model.config.is_encoder_decoder:
        kind = model.config.model_type
        raise ValueError(f"model type {kind!r} can't be enabled: {family_of('t5').refused}")
    check_attention(text)
    if getattr(text, "alibi", False):
        raise ValueError(
            f"model type {text.model_type!r} with alibi=True can't be enabled: it counts distances by index in the cache, "
            "which compaction changes; use a checkpoint with RoPE (alibi=False)"
        )
    tested = model.config.model_type in FAMILIES or text.model_type in FAMILIES
    unsure = not tested or family_of(text.model_type).varies
    if probe == "always" or (probe is not False and unsure and not is_enabled(model)):
        _probe(model)
    if not tested and not is_enabled(model):
        how = "neither tested nor probed" if probe is False else "probed, not tested: it passed every check of the probe"
        logger.warning("model type %r was %s", model.config.model_type, how)
    return model


def _probe(model: PreTrainedModel) -> None:
    """See `probe_model`; a model that was not wired is not, afterwards."""

    def cached(config: ADMSConfig) -> ADMSKVCache:
        cache = make_cache(model, config)
        wire(model, cache)
        return cache

    wired = is_enabled(model)
    try:
        probe_model(model, cached)
    finally:
        if not wired:
            disable_adms_llm(model)


def make_cache(model: PreTrainedModel, config: ADMSConfig, explicit: bool = False) -> ADMSKVCache:
    """A new cache for a model that can be wired and is not yet.

    Args:
        explicit: whether the calibration was asked for by name; it is then an error, not a warning, where it can't be.
    """
    ranks = ranks_of(model)
    for name, on in (
        ("use_adaptive_budget=True", config.use_adaptive_budget),
        ("controller_scope='layer'", config.enable_adaptive_controller and config.controller_scope == "layer"),
    ):
        if ranks is not None and on:
            raise ValueError(
                f"{name} shares budget between a layer's heads, which tensor parallelism puts into different "
                "processes; use controller_scope='model'"
            )
    ropes, reason = _ropes(model)
    if reason is not None and config.enable_position_calibration:
        if explicit:
            raise ValueError(f"enable_position_calibration=True can't be: {reason}; set it to False")
        logger.warning("position calibration is off: %s", reason)
        config = dataclasses.replace(config, enable_position_calibration=False)
    if reason is not None and config.positions == "cache":
        raise ValueError(f"position_policy='cache' can't be: {reason}")
    window = _window(model, config, ropes, reason)
    if window.limit is not None and window.policy != "absolute" and window.fixed is None:
        config = config.fit_positions(window.limit)
    for switch, (budget, _) in MODULE_BUDGETS.items():
        if getattr(config, switch) and not getattr(config, budget):
            logger.warning("%s=True does nothing with %s=0", switch, budget)
    cache = ADMSKVCache(
        config,
        model_config=model.config,
        wired=True,
        layers_at_once=_layers_at_once(model),
        ropes=ropes,
        window=window,
        ranks=ranks,
    )
    use_with(cache, model)
    cache.ropes = ropes, reason
    return cache


def _ropes(model: PreTrainedModel) -> tuple[tuple[Rope, ...] | None, str | None]:
    """How each layer's keys turn with position, and why they can't be moved: one of the two is None."""
    known = find_decoder(model).__dict__.get(STATE, {}).get("ropes")
    if known is not None:
        return known
    try:
        ropes = rope_layers(model)
    except ValueError as error:
        return None, str(error)
    if not any(rope.rotates for rope in ropes):
        return None, f"model type {model.config.model_type!r} has no RoPE"
    return ropes, None


def _window(
    model: PreTrainedModel, config: ADMSConfig, ropes: tuple[Rope, ...] | None, reason: str | None
) -> PositionWindow:
    """The positions the model may be given: below its trained length, and where its frequencies stay what they are."""
    text = model.config.get_text_config()
    trained = getattr(text, "max_position_embeddings", None)
    stable = [rope.stable_length for rope in ropes or () if rope.stable_length is not None]
    policy = config.positions
    if policy == "absolute" and reason is None:
        if not stable:
            return PositionWindow("absolute")
        kind = next(rope.rope_type for rope in ropes if rope.stable_length is not None)
        why = f"rope_type {kind!r} has other frequencies there, which stored keys do not fit: use position_policy='auto'"
        return PositionWindow("absolute", min(stable), why)
    learned = text.model_type not in FAMILIES or family_of(text.model_type).learned_positions
    if ropes is None and policy == "absolute" and not learned:
        return PositionWindow("absolute")
    return PositionWindow(policy, min([*([] if trained is None else [trained]), *stable], default=None), reason)


def _layers_at_once(model: PreTrainedModel) -> int:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or getattr(model, "hf_device_map", None):
        return 1
    return _CPU_LAYERS if model.device.type == "cpu" else model.config.get_text_config().num_hidden_layers


def wire(model: PreTrainedModel, cache: ADMSKVCache) -> None:
    """Wrap the model's attention and register the hooks; once is enough. Where that fails, nothing has changed.

    What was found out about its RoPE for `cache` is remembered for the next.
    """
    decoder = find_decoder(model)
    try:
        with _WIRING:
            if STATE not in decoder.__dict__:
                _wire_decoder(decoder, cache)
            if decoder is not model and STATE not in model.__dict__:
                _wire_head(model)
    except BaseException:
        disable_adms_llm(model)
        raise


def _wire_decoder(decoder: torch.nn.Module, cache: ADMSKVCache) -> None:
    handles: list[Any] = []
    decoder.__dict__[STATE] = {
        "handles": handles,
        "methods": (),
        "argument": cache_argument(decoder),
        "ropes": cache.ropes,
    }
    register()
    handles.append(decoder.register_forward_pre_hook(before_forward, with_kwargs=True))
    handles.append(decoder.register_forward_hook(after_forward, with_kwargs=True, always_call=True))
    if family_of(decoder.config.model_type).calls_sdpa:
        return
    wired = WiredConfig(decoder.config)
    for module in decoder.modules():
        # A model within keeps its own: transformers looks there for whom to tell of another implementation.
        if module.__dict__.get("config") is decoder.config and not isinstance(module, PreTrainedModel):
            module.config = wired


def _wire_head(model: PreTrainedModel) -> None:
    handles: list[Any] = []
    methods: list[str] = []
    model.__dict__[STATE] = {"handles": handles, "methods": methods, "argument": cache_argument(model)}
    handles.append(model.register_forward_pre_hook(before_logits, with_kwargs=True))
    if not isinstance(model, GenerationMixin):
        return
    own = {"prepare_inputs_for_generation": prepare_inputs, "generate": generate}
    own |= {name: functools.partial(begin_generation, name) for name in ("_prefill", "_get_candidate_generator")}
    for name, replacement in own.items():
        if name not in model.__dict__ and hasattr(model, name):
            method = functools.partial(replacement, model)
            # generate reads there what it may pass.
            method.__signature__ = inspect.signature(getattr(model, name))
            methods.append(name)
            setattr(model, name, method)
