"""Wiring a model: its attention, its hooks, and the cache that goes with it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import logging
import threading
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from ..cache import ADMSKVCache
from ..config import MODULE_BUDGETS, ADMSConfig
from ..data.rope import Rope
from ..stream.positions import PositionWindow
from .attention import BASES, SDPA_ITSELF, AttendedKeys, WiredConfig, register
from .facts import cache_argument, use_with
from .parallel import ranks_of
from .rope_reading import restore_frequencies, rope_layers
from .wrappers import find_decoder, open_model

# Model types whose attention was tested with the cache (tests/test_families.py holds the list to its word).
SUPPORTED_MODEL_TYPES = (
    "falcon",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)
# Model types with a table of learned positions: there is none past its end.
_LEARNED_POSITIONS = ("gpt2",)
# Model types that have generate go on without the cache given, unseen, once a stream passes the config's
# original_max_position_embeddings, whether or not their RoPE changes there.
_CACHE_DROPPED = ("phi3",)
# Layers compacted in one call on a CPU: as many as stay in its caches. On an accelerator a compaction is bound by the number
# of kernels, not by their size: all go at once.
_CPU_LAYERS = 8
_STATE = "_adms_wiring"
# Threads may enable one model at the same time: it is wired once.
_WIRING = threading.RLock()

logger = logging.getLogger("streaming_llm")


def enable_adms_llm(model: PreTrainedModel, config: ADMSConfig | None = None, **settings: Any) -> ADMSKVCache:
    """Wire a model for the cache and return a new one: `model.generate(**inputs, past_key_values=cache)`.

    The model's attention implementation (eager or sdpa) is wrapped through transformers' `AttentionInterface`; with any
    other cache the model computes what it did before. May be called again at any time, with other settings; caches made
    earlier stay usable.

    Args:
        model: a causal language model of a supported family, or a module that holds one (peft's, torch.compile's).
        config: the settings as a whole, or
        **settings: each by its name in `ADMSConfig`; an unknown one raises `ValueError` naming it.

    Raises:
        ValueError: unknown or wrong setting, unsupported model family or attention implementation.
        TypeError: no model, or a module that holds several. Nothing has changed after either.
    """
    if config is not None and settings:
        raise ValueError(f"config and the settings {', '.join(settings)} were both given: pass one or the other")
    config = ADMSConfig(**settings) if config is None else ADMSConfig.check(config)
    model = check_model(model)
    cache = make_cache(model, config, explicit=bool(settings.get("enable_position_calibration")))
    wire(model, cache)
    return cache


def enable_adms_low_rank(model: PreTrainedModel, rank: int = 16, **settings: Any) -> ADMSKVCache:
    """`enable_adms_llm` with the low-rank compressor."""
    return enable_adms_llm(model, **{**settings, "compressor_type": "low_rank", "rank": rank})


def enable_adms_vq(model: PreTrainedModel, num_clusters: int = 64, **settings: Any) -> ADMSKVCache:
    """`enable_adms_llm` with the vector-quantising compressor."""
    return enable_adms_llm(model, **{**settings, "compressor_type": "vq", "num_clusters": num_clusters})


def enable_streaming_llm(
    model: PreTrainedModel, start_size: int = 4, recent_size: int = 2000, **settings: Any
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
            wiring = module.__dict__.pop(_STATE, {"handles": (), "methods": ()})
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
    return _STATE in find_decoder(open_model(model)).__dict__


def check_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, out of what is around it, where it can be wired; `TypeError` or `ValueError` where it can't."""
    model = open_model(model)
    text = model.config.get_text_config()
    if model.config.model_type not in SUPPORTED_MODEL_TYPES and text.model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"model type {model.config.model_type!r} can't be enabled; supported are {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    _check_attention(text)
    if getattr(text, "alibi", False):
        raise ValueError(
            f"model type {text.model_type!r} with alibi=True can't be enabled: it counts distances by index in the cache, "
            "which compaction changes; use a checkpoint with RoPE (alibi=False)"
        )
    return model


def _check_attention(text: PreTrainedConfig) -> None:
    """Refuse a text model's attention implementation that can't be shown the tokens' log-mass."""
    implementation = text._attn_implementation or "eager"
    if text.model_type in SDPA_ITSELF and implementation != "sdpa":
        raise ValueError(
            f"attention implementation {implementation!r} of model type {text.model_type!r} has no place for log-mass; load "
            "the model with attn_implementation='sdpa'"
        )
    if implementation not in BASES:
        raise ValueError(
            f"attention implementation {implementation!r} has no place for log-mass; load the model with "
            f"attn_implementation='sdpa' or call model.set_attn_implementation('sdpa') (supported: {', '.join(BASES)})"
        )


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
    known = find_decoder(model).__dict__.get(_STATE, {}).get("ropes")
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
    if ropes is None and policy == "absolute" and model.config.model_type not in _LEARNED_POSITIONS:
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
            if _STATE not in decoder.__dict__:
                _wire_decoder(decoder, cache)
            if decoder is not model and _STATE not in model.__dict__:
                _wire_head(model)
    except BaseException:
        disable_adms_llm(model)
        raise


def _wire_decoder(decoder: torch.nn.Module, cache: ADMSKVCache) -> None:
    handles: list[Any] = []
    decoder.__dict__[_STATE] = {
        "handles": handles,
        "methods": (),
        "argument": cache_argument(decoder),
        "ropes": cache.ropes,
    }
    register()
    handles.append(decoder.register_forward_pre_hook(_before_forward, with_kwargs=True))
    handles.append(decoder.register_forward_hook(_after_forward, with_kwargs=True, always_call=True))
    if decoder.config.model_type in SDPA_ITSELF:
        return
    wired = WiredConfig(decoder.config)
    for module in decoder.modules():
        # A model within keeps its own: transformers looks there for whom to tell of another implementation.
        if module.__dict__.get("config") is decoder.config and not isinstance(module, PreTrainedModel):
            module.config = wired


def _wire_head(model: PreTrainedModel) -> None:
    handles: list[Any] = []
    methods: list[str] = []
    model.__dict__[_STATE] = {"handles": handles, "methods": methods, "argument": cache_argument(model)}
    handles.append(model.register_forward_pre_hook(_before_logits, with_kwargs=True))
    if not isinstance(model, GenerationMixin):
        return
    own = {"prepare_inputs_for_generation": _prepare_inputs, "generate": _generate}
    own |= {name: functools.partial(_begin_generation, name) for name in ("_prefill", "_get_candidate_generator")}
    for name, replacement in own.items():
        if name not in model.__dict__ and hasattr(model, name):
            method = functools.partial(replacement, model)
            # generate reads there what it may pass.
            method.__signature__ = inspect.signature(getattr(model, name))
            methods.append(name)
            setattr(model, name, method)


def _generate(model: PreTrainedModel, *args, **kwargs) -> Any:
    """The model's own `generate`, which takes an `ADMSKVCache` by either name."""
    return type(model).generate(model, *args, **_named(model, kwargs))


def _named(model: PreTrainedModel, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with an `ADMSKVCache` under the name that the model has for it."""
    cache, argument = _given_cache(given), model.__dict__[_STATE]["argument"]
    if cache is None or argument in given:
        return given
    return {**{name: value for name, value in given.items() if value is not cache}, argument: cache}


def _prepare_inputs(model: PreTrainedModel, input_ids: torch.Tensor, *args, **kwargs) -> dict[str, Any]:
    """The model's own `prepare_inputs_for_generation`, except where that loses sight of an `ADMSKVCache`."""
    own = type(model).prepare_inputs_for_generation
    cache = _given_cache(kwargs)
    if cache is None:
        return own(model, input_ids, *args, **kwargs)
    seen, length = cache.get_seq_length(), input_ids.shape[1]
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if positions is not None and isinstance(mask, torch.Tensor) and mask.dim() == 2:
        # For a prefill in chunks the mask ends with the chunk, the positions with the prompt (transformers 5.2).
        kwargs["position_ids"] = positions = positions[..., : mask.shape[1]]
    places = kwargs.get("cache_position")
    if places is not None:
        # After such a prefill it is one too far, and sliding windows with it (transformers 5.2).
        kwargs["cache_position"] = places - places[:1] + seen
        if kwargs.get("inputs_embeds") is None and length > len(places):
            # Where rows were padded anew the text has other columns than the cache.
            input_ids = input_ids[:, -len(places) :]
    if kwargs.get("is_first_iteration") and kwargs.get("next_sequence_length", 0) is None and 0 < seen < length:
        # Assisted generation gives the whole text again to a cache that has seen most of it (transformers 5.23).
        if positions is not None and positions.shape[-1] == length and not positions[..., 0].any():
            kwargs["next_sequence_length"] = length - seen
    if model.config.model_type in _CACHE_DROPPED:
        own = GenerationMixin.prepare_inputs_for_generation
    return own(model, input_ids, *args, **kwargs)


def _begin_generation(name: str, model: PreTrainedModel, *args, **kwargs) -> Any:
    """The model's own method `name`, in which `generate` begins; before, an `ADMSKVCache` goes back to where the text parts
    from the tokens it has seen."""
    own = getattr(type(model), name)
    given = inspect.signature(own).bind(model, *args, **kwargs).arguments
    model_kwargs, settings, ids = given["model_kwargs"], given["generation_config"], given["input_ids"]
    cache = _given_cache(model_kwargs)
    seen = 0 if cache is None else cache.get_seq_length()
    if not seen:
        return own(**given)
    embeddings, mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
    if embeddings is not None:
        if embeddings.shape[1] <= seen:
            raise ValueError(
                f"inputs_embeds of {embeddings.shape[1]} tokens bring nothing new: this cache holds a conversation of "
                f"{seen}. Call cache.reset(), make a new cache, or take copy.deepcopy(cache) before a turn"
            )
    elif ids.shape[1] == (getattr(settings, "_mask_length", ids.shape[1]) if mask is None else mask.shape[1]):
        rest, known = cache.rewind_to(ids, mask)
        seen = cache.get_seq_length()
        if known is not mask:
            if name != "_prefill":
                raise ValueError("assisted generation can't go on from a text that is padded otherwise than the one before")
            # From here on generate counts columns as the cache does.
            given["input_ids"] = torch.cat([rest.new_zeros(len(rest), seen), rest], dim=1)
            model_kwargs["attention_mask"] = known
            if model_kwargs.get("position_ids") is not None:
                model_kwargs["position_ids"] = (known.long().cumsum(-1) - 1).clamp_min(0)
        model_kwargs.pop("cache_position", None)
    if (
        name == "_prefill"
        and seen
        and settings.prefill_chunk_size
        and "is_first_iteration" not in inspect.signature(own).parameters
    ):
        # There chunks begin with the text, whatever was seen (transformers 5.2): what is new is read at once.
        given["generation_config"] = copy.copy(settings)
        given["generation_config"].prefill_chunk_size = None
    return own(**given)


def _given_cache(given: dict[str, Any]) -> ADMSKVCache | None:
    """The cache among the arguments, where it is one of ours; since transformers 5.24 models call it `cache`."""
    for name in ("past_key_values", "cache"):
        if isinstance(given.get(name), ADMSKVCache):
            return given[name]
    return None


def _arguments(module: torch.nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    if not args:
        return kwargs
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


def _before_forward(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    given = _arguments(module, args, kwargs)
    cache = _given_cache(given)
    if cache is None:
        return None
    tokens = given.get("input_ids")
    if tokens is None:
        tokens = given.get("inputs_embeds")
    if tokens is None:
        return None
    if given.get("use_cache") is False:
        raise ValueError(
            "use_cache=False contradicts past_key_values: generate would read the whole text anew at every step"
        )
    if tokens.shape[1] == 0:
        seen = cache.get_seq_length()
        raise ValueError(
            f"input_ids bring no new tokens: this cache holds a conversation of {seen}. Call cache.reset() or make a new "
            "cache for another text, take copy.deepcopy(cache) before a turn that may be said again, or let "
            "cache.rewind_to(input_ids) go back. generate takes input_ids as the whole text so far, or as what is new where "
            "attention_mask is as long as the whole (transformers 5.3 or newer)"
        )
    if getattr(module, "_is_replica", False):
        raise ValueError("DataParallel has several threads fill one cache: use the model it holds (.module) instead")
    _check_attention(module.config)
    cache.seen_tokens.check_reader(module)
    cache.keys_as = AttendedKeys.of if module.config.model_type in SDPA_ITSELF else None
    if cache.changing_frequencies:
        restore_frequencies(module)
    own = given.get("attention_mask")
    # Some composite models give their text part masks they have made of it, one a kind of layer: those are for attention.
    outer, cache.outer_mask = cache.outer_mask, None
    told = outer if isinstance(own, dict) and isinstance(outer, torch.Tensor) else own
    positions, mask = cache.begin_forward(
        given.get("position_ids"), told, tokens.shape[1], tokens.shape[0], tokens.device, tokens
    )
    mask = mask if told is own else own
    named = _named(module, given)
    if positions is given.get("position_ids") and mask is own and named is given:
        return None
    return (), {**named, "position_ids": positions, "attention_mask": mask}


def _before_logits(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Tell the cache its model and mask, under the name it has here; refuse right padding whose logits are asked for."""
    cache = _given_cache(kwargs)
    if cache is None:
        return None
    use_with(cache, module)
    mask = cache.outer_mask = kwargs.get("attention_mask")
    last_only = type(kwargs.get("logits_to_keep")) is int and kwargs["logits_to_keep"] == 1
    if (
        last_only
        and isinstance(mask, torch.Tensor)
        and mask.dim() == 2
        and bool(((mask[:, -1] == 0) & mask.bool().any(-1)).any())
    ):
        raise ValueError(
            "attention_mask has padding after the last token of a row, whose next token would be predicted from padding: "
            "pad on the left (tokenizer.padding_side = 'left')"
        )
    return args, _named(module, kwargs)


def _after_forward(module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    cache = _given_cache(_arguments(module, args, kwargs))
    if cache is None:
        return
    cache.keys_as = None
    if output is None:
        cache.abort_forward()
    else:
        cache.end_forward()
