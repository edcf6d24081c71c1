"""Recordings of what streams say, so that code that was restructured can be compared with what it was, to the bit.

    python tests/recordings.py write FOLDER
    python tests/recordings.py check FOLDER [--tolerance 1e-5]

`write` runs every stream of `STREAMS` and keeps logits, tokens held by each head, `cache.stats`, `memory_report` and the
controller's budgets in a file each; `check` runs them again and tells which are equal to the bit, which within the
tolerance, which not, and where they first differ. Everything runs on one thread, seeded: a stream run twice is equal to the
bit on one machine, with one release of torch and of transformers (`check` tells where those are others than recorded).
A stream is one function here, so that it says the same whatever the inside of the package looks like: only what is
documented is used, and `held_by_heads` alone knows how a layer shows what it holds.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import logging
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

# Run as a script this is the package beside it, whatever else is installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import transformers  # noqa: E402
from conftest import make_tiny_llama, padded_passes, token_ids  # noqa: E402
from plain import chunk_sizes  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from test_families import make  # noqa: E402
from transformers import DynamicCache  # noqa: E402

import streaming_llm  # noqa: E402
from streaming_llm import ADMSConfig, ADMSKVCache, enable_adms_llm  # noqa: E402
from streaming_llm.baselines import enable_baseline  # noqa: E402

SIZES = {
    "start_size": 2, "recent_size": 12, "compressed_budget": 16, "compression_interval": 8, "rank": 6,
    "attention_window": 16, "min_importance_tokens": 2, "min_middle_size_for_compress": 0, "num_clusters": 6,
}  # fmt: skip
SKETCHES = {"enable_dual_fidelity": True, "sketch_budget": 6, "promotion_budget": 2, "sketch_originals": 24}
REPLAY = {"enable_residual_replay": True, "replay_budget": 4, "energy_replay_threshold": 0.95}
CALIBRATION = {"enable_position_calibration": True, "calibration_window": 40}
CONTROLLER = {"enable_adaptive_controller": True, "controller_gain": 0.5}
ALL_FOUR = SKETCHES | REPLAY | CALIBRATION | CONTROLLER | {"controller_scope": "model", "controller_group_size": 2}
ALL_FOUR_LAYER = ALL_FOUR | {"controller_scope": "layer"}
VQ, MATCHING = {"compressor_type": "vq"}, {"compressor_type": "attention_matching"}
# Settings that each are a stream of the tiny Llama, in chunks of 7 tokens.
SETTINGS = {
    "base": {},
    "streaming": {"compressed_budget": 0, "min_importance_tokens": 0},
    "sketches": SKETCHES,
    "sketches, sum": SKETCHES | {"sketch_reduction": "sum"},
    "sketches, first": SKETCHES | {"sketch_reduction": "first"},
    "sketches, nothing promoted": SKETCHES | {"promotion_budget": 0},
    "sketches, no originals": SKETCHES | {"sketch_originals": 0},
    "replay": REPLAY,
    "calibration": CALIBRATION,
    "controller, layer": CONTROLLER,
    "controller, groups": CONTROLLER | {"controller_group_size": 2},
    "controller, model": CONTROLLER | {"controller_scope": "model"},
    "all four": ALL_FOUR,
    "all four, layer": ALL_FOUR_LAYER,
    "vq": VQ,
    "vq, all four": VQ | ALL_FOUR,
    "vq, all four, layer": VQ | ALL_FOUR_LAYER,
    "vq, calibration grid": VQ | CALIBRATION | {"anchor_mode": "grid"},
    "vq, calibration hybrid": VQ | CALIBRATION | {"anchor_mode": "hybrid", "seed": 3},
    "vq, variance budgets": VQ | {"use_adaptive_budget": True},
    "attention matching": MATCHING,
    "attention matching, all four": MATCHING | ALL_FOUR,
    "attention matching, protected": MATCHING | {"protect_exact": True},
    "attention matching, variance budgets": MATCHING | {"use_adaptive_budget": True},
    "variance budgets": {"use_adaptive_budget": True},
    "variance budgets, sketches, replay": SKETCHES | REPLAY | {"use_adaptive_budget": True},
    "all four, grid": ALL_FOUR | {"anchor_mode": "grid"},
    "all four, hybrid": ALL_FOUR | {"anchor_mode": "hybrid"},
    "importance value_norm": {"importance_metric": "value_norm"},
    "importance key_norm": {"importance_metric": "key_norm"},
    "importance mixed": {"importance_metric": "mixed"},
    "importance blend": {"attention_blend": 0.5},
    "protected": {"protect_exact": True},
    "coverage": {"coverage_priority": 0.8, "coverage_segments": 3},
    "all pins": {"importance_ratio": 1.0},
    "no pins": {"importance_ratio": 0.0, "min_importance_tokens": 0},
    "small middle": {"min_middle_size_for_compress": 25},
    "few fitted": {"svd_max_tokens": 10, "rank": 3},
    "no sinks": {"start_size": 0},
    "dynamic sinks": {"enable_dynamic_sink": True, "max_seq_length": 500},
    "interval 1": {"compression_interval": 1},
    "wide window": {"attention_window": 64},
    "score decay 0": {"score_decay": 0.0},
}  # fmt: skip
# Those of them that are streamed in every way beside it.
MAIN = {name: SETTINGS[name] for name in ("base", "all four", "all four, layer", "vq", "attention matching")}
WAYS = {
    "chunks of 1": (1, 90),
    "chunks of 64": (64, 200),
    "one long prefill": ([170, 1], 200),
    "mixed": ([40, 1, 1, 9, 50, 1], 120),
}
# Tokens of each row in each pass: three very different rows, a second turn, and a pass in which a row gets nothing.
PADDED = [[3, 20, 75], *[[1, 1, 1]] * 20, [25, 2, 40], *[[1, 1, 1]] * 10, [0, 9, 30], *[[1, 1, 1]] * 12]
SMOL_SIZES = {
    "start_size": 4, "recent_size": 64, "compressed_budget": 96, "compression_interval": 32, "attention_window": 64,
    "min_middle_size_for_compress": 0,
}  # fmt: skip
SMOL_ALL = {
    "enable_dual_fidelity": True, "sketch_budget": 24, "enable_residual_replay": True, "replay_budget": 8,
    "enable_position_calibration": True, "enable_adaptive_controller": True, "controller_scope": "model",
    "compressed_budget": 64,
}  # fmt: skip


# -- what is kept of a stream --------------------------------------------------------------------------------------------


@dataclass
class Take:
    """What one stream said.

    Attributes:
        tensors: by name, numbered in the order they came.
        facts: what JSON holds, by name.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Keep a tensor."""
        self.tensors[f"{len(self.tensors):03d} {name}"] = tensor.detach().clone().contiguous()

    def look(self, name: str, cache: ADMSKVCache) -> None:
        """Keep what a cache shows: tokens held by each head, counters, bytes, budgets, sketches and replayed originals."""
        for number, layer in enumerate(cache.layers):
            self.add(f"{name}: tokens held in layer {number}", held_by_heads(layer))
        self.facts[f"{name}: stats"] = dict(cache.stats)
        self.facts[f"{name}: memory_report"] = dict(cache.memory_report())
        self.facts[f"{name}: seen, held_tokens"] = [cache.get_seq_length(), cache.held_tokens]
        for view in ("controller_budgets", "controller_energy_ema", "calibration_offsets", "sketch_energies"):
            shown = {f"{layer},{head}": listed(value) for (layer, head), value in getattr(cache, view).items()}
            if shown:
                self.facts[f"{name}: {view}"] = shown
        for view in ("sketch_bank", "replay_bank"):
            for (layer, head), bank in getattr(cache, view).items():
                for part in ("keys", "positions"):
                    self.add(f"{name}: {view}[{layer}, {head}] {part}", bank[part])


def listed(value):
    """A view's value as JSON holds it, with all its digits."""
    return value.tolist() if isinstance(value, torch.Tensor) else value


def held_by_heads(layer) -> torch.Tensor:
    """Tokens each head of a layer holds, `[batch, kv_heads]`; a sliding layer's as they are."""
    if not layer.is_initialized:
        return torch.zeros(0, dtype=torch.int64)
    if hasattr(layer, "held"):
        return layer.held.valid.sum(-1)
    return torch.full(layer.keys.shape[:2], layer.keys.shape[2])


# -- how streams are run -------------------------------------------------------------------------------------------------


@torch.no_grad()
def feed(take: Take, model, cache, ids: torch.Tensor, chunks: int | list[int], name: str = "logits", **inputs) -> None:
    """Give the model `ids` in `chunks` (see `plain.chunk_sizes`); the logits of all of them are one tensor."""
    parts = torch.split(ids, chunk_sizes(ids.shape[1], chunks), dim=1)
    take.add(name, torch.cat([model(input_ids=part, past_key_values=cache, **inputs).logits for part in parts], dim=1))


def feed_padded(take: Take, model, cache, passes: list[list[int]]) -> None:
    """Rows padded on the left: `passes[n][row]` tokens of the row in pass `n`; the logits of each pass are a tensor."""
    rows = [token_ids(sum(sizes), seed=10 + row) for row, sizes in enumerate(zip(*passes, strict=True))]
    for number, (logits, real) in enumerate(padded_passes(model, rows, passes, cache)):
        # What padding says means nothing.
        take.add(f"logits of pass {number}", torch.where(real[..., None], logits, 0.0))


def generate(take: Take, model, cache, ids: torch.Tensor, new: int, **options) -> None:
    """What `generate` says, with scores and logits of each step."""
    settings = {"max_new_tokens": new, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    options = {"attention_mask": torch.ones_like(ids), **settings, **options}
    said = model.generate(ids, past_key_values=cache, **options)
    take.add("sequences", said["sequences"])
    for number, logits in enumerate(said["logits"]):
        take.add(f"logits of step {number}", logits)


def llama(implementation: str = "eager", window: int | None = None, dtype: torch.dtype = torch.float32):
    """The tiny Llama; `window`: the length it was trained to."""
    model = make_tiny_llama().to(dtype)
    model.set_attn_implementation(implementation)
    model.config.max_position_embeddings = window or model.config.max_position_embeddings
    model.generation_config.eos_token_id = 10_000
    return model


def seconds_model():
    """A smaller Llama, that helps the first to say what it would say."""
    model = make_tiny_llama()
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    model.config.layer_types = None
    model.generation_config.eos_token_id = 10_000
    return model


# -- the streams ---------------------------------------------------------------------------------------------------------


def plain_run(take: Take, settings: dict, chunks=7, tokens: int = 150, rows: int = 1, model: Callable = llama) -> None:
    """One stream from its first token to its last, counters looked at in the middle too."""
    model = model()
    cache = enable_adms_llm(model, **SIZES | settings)
    ids = token_ids(tokens, rows, seed=1)
    half = sum(chunk_sizes(tokens, chunks)[: len(chunk_sizes(tokens, chunks)) // 2])
    feed(take, model, cache, ids[:, :half], chunks, "logits of the first half")
    take.look("half way", cache)
    feed(take, model, cache, ids[:, half:], chunks if isinstance(chunks, int) else chunks[-1], "logits of the second half")
    take.look("at the end", cache)


def padded_run(take: Take, settings: dict, implementation: str = "eager", window: int | None = None) -> None:
    """Three rows of very different length."""
    model = llama(implementation, window)
    cache = enable_adms_llm(model, **SIZES | settings)
    feed_padded(take, model, cache, PADDED)
    take.look("at the end", cache)
    take.facts["budgets of the last row"] = {f"{x},{y}": b for (x, y), b in cache.controller_budgets.row(2).items()}


def unwired_run(take: Take, settings: dict) -> None:
    """A cache of a model that was not enabled, and a plain list of pairs."""
    model = llama()
    cache = ADMSKVCache(ADMSConfig(**SIZES | settings), model_config=model.config)
    feed(take, model, cache, token_ids(120, seed=1), 7)
    take.look("at the end", cache)
    pairs = [tuple(torch.randn(2, 1, 2, 80, 16, generator=torch.Generator().manual_seed(n))) for n in range(2)]
    for number, pair in enumerate(cache(pairs)):
        take.add(f"keys of pair {number}", pair[0])
        take.add(f"values of pair {number}", pair[1])


def baseline_run(take: Take, name: str) -> None:
    """A policy of the same layer that others proposed."""
    model = llama()
    cache = enable_baseline(model, name, **{key: value for key, value in SIZES.items() if key != "rank"})
    feed(take, model, cache, token_ids(120, seed=1), 7)
    take.look("at the end", cache)


def crop_run(take: Take, settings: dict) -> None:
    """Tokens taken back: before the first compaction, after it, and of passes that were tried out."""
    model = llama()
    cache, ids = enable_adms_llm(model, **SIZES | settings), token_ids(200, seed=1)
    feed(take, model, cache, ids[:, :20], 5)
    cache.crop(-6)
    feed(take, model, cache, ids[:, 20:100], 5)
    cache.crop(-4)
    feed(take, model, cache, ids[:, 100:130], 1)
    take.look("cropped twice", cache)
    cache.activate_past_recording()
    for start, gone in ((130, 3), (136, 0), (142, 5), (148, 12)):
        feed(take, model, cache, ids[:, start : start + 6 if gone < 6 else start + 30], 64)
        cache.crop(-gone)
    feed(take, model, cache, ids[:, 180:], 3)
    take.look("at the end", cache)


def saved_run(take: Take, settings: dict, window: int | None = None) -> None:
    """Saved, loaded into a model anew, and gone on with."""
    model = llama(window=window)
    cache, ids = enable_adms_llm(model, **SIZES | settings), token_ids(180, seed=1)
    feed(take, model, cache, ids[:, :113], 7)
    with tempfile.TemporaryDirectory() as folder:
        cache.save(Path(folder) / "conversation")
        other = llama(window=window)
        loaded = ADMSKVCache.load(Path(folder) / "conversation", other)
    take.look("loaded", loaded)
    feed(take, other, loaded, ids[:, 113:], 7)
    take.look("at the end", loaded)


def copied_run(take: Take, settings: dict) -> None:
    """A deep copy and its model go two ways, in turn."""
    model = llama()
    cache, ids = enable_adms_llm(model, **SIZES | settings), token_ids(180, seed=1)
    feed(take, model, cache, ids[:, :100], 7)
    twin = copy.deepcopy(cache)
    for start in range(100, 160, 20):
        feed(take, model, cache, ids[:, start : start + 20], 7, "logits of the first")
        feed(take, model, twin, ids[:, start : start + 20].flip(1), 3, "logits of the copy")
    take.look("the first at the end", cache)
    take.look("the copy at the end", twin)


def rows_run(take: Take, settings: dict, passes: list[list[int]] | None = None) -> None:
    """Rows repeated, put in another order and left out; `passes`: of a padded batch that comes before."""
    model = llama()
    cache = enable_adms_llm(model, **SIZES | settings)
    ids = token_ids(200, 6, seed=1)
    if passes is None:
        feed(take, model, cache, ids[:2, :60], 7)
    else:
        feed_padded(take, model, cache, passes)
    extra = {} if passes is None else {"attention_mask": None}
    rows = 2 if passes is None else len(passes[0])
    cache.batch_repeat_interleave(2)
    feed(take, model, cache, ids[: 2 * rows, 60:90], 5, **extra)
    order = [2, 2, 0, 1, 3, 5][: 2 * rows]
    cache.reorder_cache(torch.tensor([number if number < 2 * rows else 0 for number in order]))
    feed(take, model, cache, ids[: 2 * rows, 90:125], 5, **extra)
    cache.batch_select_indices(torch.tensor([1, 3]))
    feed(take, model, cache, ids[:2, 125:180], 5, **extra)
    take.look("at the end", cache)


def generate_run(
    take: Take, settings: dict, new: int = 30, assisted: bool = False, tokens: int = 60, rows: int = 1, **options
) -> None:
    """What `generate` says after a prompt longer than the bound."""
    model = llama()
    cache = enable_adms_llm(model, **SIZES | settings)
    if assisted:
        options["assistant_model"] = seconds_model()
    if options.get("prompt_lookup_num_tokens"):
        ids = token_ids(tokens // 3, rows, seed=1).repeat(1, 3)
    else:
        ids = token_ids(tokens, rows, seed=1)
    generate(take, model, cache, ids, new, **options)
    take.look("at the end", cache)


def failed_run(take: Take, settings: dict) -> None:
    """Passes that fail in the second layer, or bring NaN, and the stream going on as if they had never been."""
    model = llama()
    cache, ids = enable_adms_llm(model, **SIZES | settings), token_ids(150, seed=1)
    feed(take, model, cache, ids[:, :101], 5)
    for number, tokens in enumerate((1, 5)):
        hook = model.model.layers[1].mlp.register_forward_pre_hook(_refuse)
        try:
            feed(take, model, cache, ids[:, 101 : 101 + tokens], 64)
        except _Refused:
            take.facts[f"failure {number}"] = cache.get_seq_length()
        hook.remove()
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids[:, 101:104]) * torch.nan
    try:
        model(inputs_embeds=embedded, past_key_values=cache)
    except ValueError as error:
        take.facts["NaN"] = type(error).__name__
    feed(take, model, cache, ids[:, 101:], 5)
    take.look("at the end", cache)


class _Refused(Exception):
    pass


def _refuse(*_):
    raise _Refused


def two_turns(take: Take, settings: dict) -> None:
    """Two caches of other settings on one model in turn, transformers' own between them, a reset and the first anew."""
    model = llama()
    first = enable_adms_llm(model, **SIZES)
    second = enable_adms_llm(model, **SIZES | settings)
    own, ids = DynamicCache(config=model.config), token_ids(120, seed=1)
    for start in range(0, 120, 30):
        for name, cache in (("first", first), ("own", own), ("second", second)):
            feed(take, model, cache, ids[:, start : start + 30], 7, name)
    take.look("the second at the end", second)
    second.reset()
    feed(take, model, second, ids, 7, "after reset")
    take.look("after reset", second)


def by_hand(take: Take) -> None:
    """The documented methods for one head."""
    cache = ADMSKVCache(ADMSConfig(**SIZES | SKETCHES | REPLAY | CALIBRATION | CONTROLLER))
    keys, values = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(5))
    positions = torch.arange(40) + 3
    take.add("reduced", torch.cat(cache._apply_sketch_reduction(keys, values, "mean")))
    take.facts["residual energy"] = cache._compute_residual_energy(keys, values, keys[::2], values[::2])
    take.facts["spectral energy"] = cache._compute_spectral_energy(keys[::2], values[::2], keys, values)
    for start in (0, 20):
        cache._update_sketch_bank(0, 1, keys[start : start + 20], values[start : start + 20], positions[start : start + 20])
        cache._update_replay_bank(0, 1, keys[start : start + 20], values[start : start + 20], positions[start : start + 20])
    for name, found in (
        ("sketches", cache._get_sketch_tokens(0, 1, 4)),
        ("promoted", cache._promote_sketches_to_precision(0, 1, 2)),
        ("replayed", cache._trigger_replay(0, 1, 0.4)),
    ):
        for part, tensor in zip(("keys", "values", "positions"), found, strict=True):
            take.add(f"{name} {part}", tensor)
    cache.current_length = 300
    cache._update_calibration_anchors(0, 1, positions.float() * 1.1)
    take.add("calibrated", cache._calibrate_synthetic_positions(0, 1, torch.arange(20.0) + 100, keys[:20]))
    cache._update_controller_state(0, 1, 0.4, 0.7)
    take.facts["budgets"] = [cache._get_adaptive_budget(0, 1, 16), cache._scaled_budget(0, 0, keys, values)]
    take.facts["stats"] = dict(cache.stats)


def _streams() -> dict[str, Callable[[Take], None]]:
    streams: dict[str, Callable[[Take], None]] = {}
    for name, settings in SETTINGS.items():
        streams[f"settings/{name}"] = partial(plain_run, settings=settings)
    for name, settings in MAIN.items():
        streams[f"sdpa/{name}"] = partial(plain_run, settings=settings, model=partial(llama, "sdpa"))
        streams[f"bf16/{name}"] = partial(plain_run, settings=settings, model=partial(llama, dtype=torch.bfloat16))
        streams[f"two rows/{name}"] = partial(plain_run, settings=settings, rows=2, tokens=120)
        for way, (chunks, tokens) in WAYS.items():
            streams[f"{way}/{name}"] = partial(plain_run, settings=settings, chunks=chunks, tokens=tokens)
        streams[f"padded/{name}"] = partial(padded_run, settings=settings)
        streams[f"saved/{name}"] = partial(saved_run, settings=settings)
        streams[f"crop/{name}"] = partial(crop_run, settings=settings)
        streams[f"deepcopy/{name}"] = partial(copied_run, settings=settings)
        streams[f"rows/{name}"] = partial(rows_run, settings=settings)
        streams[f"failed passes/{name}"] = partial(failed_run, settings=settings)
    for name in ("base", "all four", "vq"):
        settings = MAIN[name]
        for policy in ("auto", "cache"):
            past = settings | {"position_policy": policy}
            for dtype in (torch.float32, torch.bfloat16):
                model = partial(llama, window=80, dtype=dtype)
                kind = "" if dtype == torch.float32 else ", bf16"
                streams[f"past the trained length, {policy}{kind}/{name}"] = partial(
                    plain_run, settings=past, tokens=260, model=model
                )
            streams[f"past the trained length, {policy}, padded/{name}"] = partial(padded_run, settings=past, window=100)
        streams[f"past the trained length, saved/{name}"] = partial(saved_run, settings=settings, window=80)
        for family in ("gemma2", "gemma3_text", "gpt2"):
            kind = None if family == "gemma2" else "sdpa"
            # What has no RoPE has nothing to calibrate.
            calibrated = family != "gpt2" and settings.get("enable_position_calibration", False)
            own = settings | {"enable_position_calibration": calibrated}
            streams[f"{family}/{name}"] = partial(plain_run, settings=own, model=partial(make, family, kind))
        streams[f"gemma3_text, eager/{name}"] = partial(
            plain_run, settings=settings, model=partial(make, "gemma3_text", "eager")
        )
        streams[f"beams/{name}"] = partial(generate_run, settings=settings, new=20, rows=2, num_beams=3)
        streams[f"assisted/{name}"] = partial(generate_run, settings=settings, assisted=True)
        streams[f"prompt lookup/{name}"] = partial(generate_run, settings=settings, prompt_lookup_num_tokens=4)
        streams[f"greedy/{name}"] = partial(generate_run, settings=settings, rows=2)
    streams["padded, sdpa/all four"] = partial(padded_run, settings=ALL_FOUR, implementation="sdpa")
    streams["padded/variance budgets"] = partial(padded_run, settings={"use_adaptive_budget": True})
    streams["padded rows/base"] = partial(rows_run, settings={}, passes=[[3, 20, 45], *[[1, 1, 1]] * 10])
    streams["padded rows/all four"] = partial(rows_run, settings=ALL_FOUR, passes=[[3, 20, 45], *[[1, 1, 1]] * 10])
    streams["sampling/base"] = partial(generate_run, settings={}, do_sample=True, num_return_sequences=2)
    streams["not enabled/base"] = partial(unwired_run, settings={})
    streams["not enabled/vq"] = partial(unwired_run, settings=VQ)
    streams["two caches/all four"] = partial(two_turns, settings=ALL_FOUR)
    streams["by hand"] = by_hand
    for name in ("h2o", "snapkv", "tova"):
        streams[f"baselines/{name}"] = partial(baseline_run, name=name)
    return streams


@torch.no_grad()
def smol_run(take: Take, settings: dict, chunks: int | list[int] = 64, tokens: int = 700) -> None:
    """The novel on SmolLM2-135M: whole logits of each pass's last token, and of every token what the next one's were."""
    from streaming_llm.evaluation import load_model
    from streaming_llm.evaluation.texts import shipped_text

    if not hasattr(smol_run, "loaded"):
        smol_run.loaded = load_model(device="cpu")
    model, tokenizer = smol_run.loaded
    ids = tokenizer(shipped_text()[:20_000], return_tensors="pt").input_ids[:, : tokens + 1]
    cache = enable_adms_llm(model, **SMOL_SIZES | settings)
    fates, stop = [], 0
    for size in chunk_sizes(tokens, chunks):
        start, stop = stop, stop + size
        logits = model(input_ids=ids[:, start:stop], past_key_values=cache).logits
        take.add(f"logits of token {stop - 1}", logits[:, -1])
        following = ids[:, start + 1 : stop + 1, None]
        fates.append(torch.cat([logits.gather(2, following)[..., 0], logits.logsumexp(-1)], dim=0))
    take.add("logit of the next token, and of all", torch.cat(fates, dim=1))
    take.look("at the end", cache)


def _smol_streams() -> dict[str, Callable[[Take], None]]:
    chosen = {
        "base": {},
        "all four": SMOL_ALL,
        "vq": VQ,
        "attention matching": MATCHING,
        "variance budgets": {"use_adaptive_budget": True},
    }
    streams = {f"smollm2/{name}": partial(smol_run, settings=settings) for name, settings in chosen.items()}
    streams["smollm2, one by one/all four"] = partial(smol_run, settings=SMOL_ALL, chunks=[190, 1], tokens=250)
    return streams


STREAMS = _streams() | _smol_streams()


def record(name: str) -> Take:
    """Run a stream of `STREAMS`: one thread, seeded, deterministic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    take = Take()
    try:
        STREAMS[name](take)
    finally:
        torch.set_num_threads(threads)
    return take


# -- files and comparison ------------------------------------------------------------------------------------------------


def path_of(folder: Path, name: str) -> Path:
    """The file of a stream."""
    return folder / (re.sub(r"[^a-z0-9]+", "_", name.lower()) + ".safetensors")


def save(folder: Path, name: str, take: Take) -> None:
    """Write what a stream said."""
    save_file(take.tensors, path_of(folder, name), {"facts": json.dumps(take.facts)})


def load(folder: Path, name: str) -> Take:
    """What a stream said when it was recorded."""
    with safe_open(path_of(folder, name), "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        return Take({key: file.get_tensor(key) for key in sorted(file.keys())}, facts)


def compared(recorded: Take, now: Take, tolerance: float) -> tuple[str, list[str]]:
    """How what a stream says now is to what it said: `equal`, `near` (tensors within the tolerance), `facts` (tensors equal
    or near, other facts) or `different`; and where they first differ, of tensors and of facts."""
    places, state = [], "equal"
    for name, then in recorded.tensors.items():
        new = now.tensors.get(name)
        if new is None or new.shape != then.shape or new.dtype != then.dtype:
            shape = "not there" if new is None else f"{new.dtype} {list(new.shape)}"
            places.append(f"{name}: {then.dtype} {list(then.shape)}, now {shape}")
            state = "different"
            break
        if torch.equal(then, new):
            continue
        whole = not then.is_floating_point()
        near = not whole and torch.allclose(new.double(), then.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
        if state == "equal" or not near:
            unequal = (then != new) if near or whole else ~torch.isclose(new.double(), then.double(), tolerance, tolerance)
            at = tuple(unequal.nonzero()[0].tolist())
            farthest = (new.double() - then.double()).abs().max()
            places.append(f"{name}{list(at)}: {then[at].item()!r}, now {new[at].item()!r} (at most {farthest:.1e} apart)")
        state = "near" if near else "different"
        if not near:
            break
    for name in now.tensors.keys() - recorded.tensors.keys() if state != "different" else ():
        places.append(f"{name}: new")
        state = "different"
    for name in sorted(recorded.facts.keys() | now.facts.keys()):
        then, new = recorded.facts.get(name), json.loads(json.dumps(now.facts.get(name)))
        if then != new and not alike(then, new, tolerance if state == "near" else 0.0):
            places.append(f"{name}: {then}, now {new}")
            state = "facts" if state in ("equal", "near") else state
            break
    return state, places


def alike(then, new, tolerance: float) -> bool:
    """Whether two facts are the same, numbers within the tolerance."""
    if isinstance(then, dict) and isinstance(new, dict):
        return then.keys() == new.keys() and all(alike(then[key], new[key], tolerance) for key in then)
    if isinstance(then, list) and isinstance(new, list):
        return len(then) == len(new) and all(alike(a, b, tolerance) for a, b in zip(then, new, strict=True))
    if isinstance(then, float) and isinstance(new, float):
        return abs(then - new) <= tolerance * max(1.0, abs(then))
    return then == new


def surroundings() -> dict[str, str]:
    """What recordings depend on beside the code."""
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(["git", "-C", root, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def main(arguments: list[str] | None = None) -> int:
    """See the module; returns the exit status, 1 where a stream is different or failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["write", "check", "list"])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="relative and absolute, beyond which it is different")
    parser.add_argument("--only", default="*", help="streams to run, a pattern as of a shell; --only 'settings/*'")
    parser.add_argument("--skip", default="", help="streams to leave out, a pattern; --skip 'smollm2*'")
    chosen = parser.parse_args(arguments)
    names = [n for n in STREAMS if fnmatch.fnmatch(n, chosen.only) and not fnmatch.fnmatch(n, chosen.skip)]
    if chosen.what == "list":
        print("\n".join(names))
        return 0
    if chosen.folder is None or not names:
        parser.error("folder is needed" if chosen.folder is None else f"--only {chosen.only!r} names no stream")
    print(f"the package in {Path(streaming_llm.__file__).parent}")
    torch.use_deterministic_algorithms(True, warn_only=True)
    logging.getLogger("streaming_llm").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    index = chosen.folder / "recordings.json"
    if chosen.what == "write":
        chosen.folder.mkdir(parents=True, exist_ok=True)
        index.write_text(json.dumps(surroundings(), indent=1) + "\n")
    else:
        then, now = json.loads(index.read_text()), surroundings()
        print(f"recorded at {then['commit']}, now {now['commit']}")
        for key in now.keys() - {"commit"}:
            if now[key] != then[key]:
                print(f"{key} was {then[key]}, is {now[key]}")
    found: dict[str, list[str]] = {}
    for name in names:
        start = time.perf_counter()
        try:
            take = record(name)
        except Exception as error:  # A stream that fails is a finding, and the others are still to be run.
            state, places = "failed", [f"{type(error).__name__}: {error}"]
        else:
            state, places = "written", []
            if chosen.what == "write":
                save(chosen.folder, name, take)
            elif path_of(chosen.folder, name).exists():
                state, places = compared(load(chosen.folder, name), take, chosen.tolerance)
            else:
                state = "not recorded"
        found.setdefault(state, []).append(name)
        print(f"{state:12} {name} ({time.perf_counter() - start:.1f} s)", *places, sep="\n    ", flush=True)
    print(", ".join(f"{len(streams)} {state}" for state, streams in found.items()))
    return int(bool(found.keys() - {"written", "equal", "near"}))


if __name__ == "__main__":
    sys.exit(main())
