"""Around an enabled model's own methods: what tells the cache of a forward pass, and where `generate` meets it."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel

from ..cache import ADMSKVCache
from .attention import AttendedKeys, check_attention
from .facts import use_with
from .families import family_of
from .rope_reading import restore_frequencies

# Where a wired module keeps what was done to it, and the name of its argument for the cache.
STATE = "_adms_wiring"


def generate(model: PreTrainedModel, *args, **kwargs) -> Any:
    """The model's own `generate`, which takes an `ADMSKVCache` by either name."""
    return type(model).generate(model, *args, **_named(model, kwargs))


def _named(model: PreTrainedModel, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with an `ADMSKVCache` under the name that the model has for it."""
    cache, argument = _given_cache(given), model.__dict__[STATE]["argument"]
    if cache is None or argument in given:
        return given
    return {**{name: value for name, value in given.items() if value is not cache}, argument: cache}


def prepare_inputs(model: PreTrainedModel, input_ids: torch.Tensor, *args, **kwargs) -> dict[str, Any]:
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
    if family_of(model.config.get_text_config().model_type).cache_dropped:
        own = GenerationMixin.prepare_inputs_for_generation
    return own(model, input_ids, *args, **kwargs)


def begin_generation(name: str, model: PreTrainedModel, *args, **kwargs) -> Any:
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


def before_forward(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
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
    check_attention(module.config)
    cache.seen_tokens.check_reader(module)
    cache.keys_as = AttendedKeys.of if family_of(module.config.model_type).calls_sdpa else None
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


def before_logits(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
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


def after_forward(module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    cache = _given_cache(_arguments(module, args, kwargs))
    if cache is None:
        return
    cache.keys_as = None
    if output is None:
        cache.abort_forward()
    else:
        cache.end_forward()
