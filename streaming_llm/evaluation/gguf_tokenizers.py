"""Tokenizers made from a GGUF file's own tokens, where transformers' releases would give wrong or different ones.

transformers 5.2 takes SmolLM's for CodeLlama's, adding tokens the model doesn't have and losing spaces, and gives Gemma's
merges in a wrong order (perplexity 53 instead of 20) without its beginning-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# GGUF's types of tokens.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def own_tokenizer(fields: Mapping[str, Any]):
    """The tokenizer of a file with these `GGUFReader.fields`; None where transformers is to make it.

    Made here are SmolLM's and those of Gemma 1 to 3.
    """

    def value(name: str):
        field = fields.get(name)
        return None if field is None else field.contents()

    if value("tokenizer.ggml.pre") == "smollm":
        return _wrapped(_byte_level(value), value)
    gemma = value("general.architecture") in ("gemma", "gemma2", "gemma3")
    if gemma and value("tokenizer.ggml.model") == "llama" and value("tokenizer.ggml.add_space_prefix") is False:
        return _wrapped(_by_scores(value), value)
    return None


def _byte_level(value):
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    tokens = value("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in value("tokenizer.ggml.merges")]
    backend = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _by_scores(value):
    """SentencePiece's BPE: the pair whose piece has the highest score is joined first; unknown characters are bytes."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    tokens, scores = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.scores")
    types = value("tokenizer.ggml.token_type")
    vocab = {token: index for index, token in enumerate(tokens)}
    pieces = [(-score, token) for token, score, kind in zip(tokens, scores, types, strict=True) if kind == _NORMAL]
    merges = []
    for _, piece in sorted(pieces):
        cuts = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [pair for pair in cuts if pair[0] in vocab and pair[1] in vocab]
    unknown = tokens[value("tokenizer.ggml.unknown_token_id")]
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _wrapped(backend, value):
    """The tokenizer of transformers round a backend, with the file's special tokens and template."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    tokens, types = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    # Found in the text before anything is merged, as SentencePiece does: runs of spaces and line ends, and tags.
    whole = [token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    backend.add_tokens([AddedToken(token, special=False, normalized=True) for token in whole])
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: value(f"tokenizer.ggml.{key}_token_id") for name, key in named.items()}
    if value("tokenizer.ggml.add_bos_token") and ids["bos_token"] is not None:
        bos = tokens[ids["bos_token"]]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids["bos_token"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=value("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{name: tokens[index] for name, index in ids.items() if index is not None},
    )
