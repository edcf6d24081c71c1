"""Every way `generate` works, on every family, below and past the bound; the table is in the summary of the test run.

Below the bound everything is what it is with `DynamicCache`, to the bit. Past it, what `generate` did is done again by a
loop that gives the model the same tokens in the same pieces, with a cache of the same settings.
"""

from __future__ import annotations

import contextlib
import copy
import functools

import pytest
import torch
import transformers
from conftest import GENERATE_TABLE, token_ids
from packaging import version
from test_families import FAMILIES, make
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from streaming_llm import ADMSLayer, enable_adms_llm

ROOMY = {"rank": 8}
SMALL = {"start_size": 2, "recent_size": 16, "compressed_budget": 12, "compression_interval": 8, "rank": 8}
# No compaction after that of the prompt in 16 more tokens, in whatever pieces they come.
CALM = {**SMALL, "compression_interval": 24}
OLDEST = version.parse(transformers.__version__) < version.parse("5.3")
SLIDING = ("gemma2", "gemma3_text")

# Cells, of the table or of what it has no room for, that fail today, each with its reason.
PENDING: dict[tuple[str, str], str] = {}


@functools.cache
def models(name: str):
    """The family's tiny model twice, one for `DynamicCache` and one to be enabled."""
    return endless(make(name)), endless(make(name))


def endless(model):
    model.generation_config.eos_token_id = 10_000  # outside the vocabulary; transformers 5.2 can't assist without one
    model.generation_config.pad_token_id = 0
    return model


@functools.cache
def assistant(name: str):
    """A smaller model of the family."""
    layers = {"num_hidden_layers": 1}
    if name in SLIDING:
        layers["layer_types"] = ["full_attention"]
    return endless(make(name, **({"n_layer": 1} if name == "gpt2" else layers)))


class Collected(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


class StopAt(StoppingCriteria):
    """Stops a row at a length."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def say(model, ids, cache, mask="ones", new=8, **options) -> dict[str, list[torch.Tensor]]:
    """What `generate` returns: `sequences`, and one `logits` and one `scores` tensor a step."""
    torch.manual_seed(0)
    if ids is not None and mask is not None:
        options["attention_mask"] = torch.ones_like(ids) if isinstance(mask, str) else mask
    settings = {"max_new_tokens": new, "do_sample": False, "return_dict_in_generate": True}
    options = {**settings, "output_logits": True, "output_scores": True, **options}
    output = model.generate(ids, past_key_values=cache, **options)
    assert output.past_key_values is cache
    return {
        name: [output[name]] if name == "sequences" else list(output[name]) for name in ("sequences", "logits", "scores")
    }


def flat(*outputs: dict) -> list[torch.Tensor]:
    return [tensor for output in outputs for name in ("sequences", "logits", "scores") for tensor in output[name]]


def repeated(tokens: int) -> torch.Tensor:
    return torch.cat([token_ids(tokens // 2)] * 2, dim=1)


def padded(tokens: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = token_ids(tokens, 2), torch.ones(2, tokens, dtype=torch.long)
    ids[0, : tokens // 3] = 0
    mask[0, : tokens // 3] = 0
    return ids, mask


# Quick tests try each mode on four families that differ in kind, and in turn on one of the others; `-m slow` on all.
UNLIKE = ("falcon", "gemma2", "gpt2", "llama")


def cells(modes, always=UNLIKE):
    """`(mode, family)` of the whole table, those that are not quick marked as slow."""
    others = [name for name in FAMILIES if name not in always]
    for number, mode in enumerate(modes):
        for name in FAMILIES:
            quick = name in (*always, others[number % len(others)])
            yield pytest.param(mode, name, marks=() if quick else pytest.mark.slow)


# -- below the bound ---------------------------------------------------------------------------------------------------
# Each mode: (model, family, function that makes a cache) -> the tensors that must be equal.


def _greedy(model, name, new_cache):
    return flat(say(model, token_ids(20, 2), new_cache()))


def _sampling(model, name, new_cache):
    options = {"do_sample": True, "top_k": 20, "temperature": 0.8, "repetition_penalty": 1.2}
    return flat(say(model, token_ids(20, 2), new_cache(), **options))


def _beam_search(model, name, new_cache):
    return [t for beams in (2, 3) for t in flat(say(model, token_ids(20, 2), new_cache(), num_beams=beams))]


def _beam_sampling(model, name, new_cache):
    return flat(say(model, token_ids(20), new_cache(), num_beams=2, do_sample=True))


def _several_sequences(model, name, new_cache):
    beams = say(model, token_ids(20, 2), new_cache(), num_beams=3, num_return_sequences=2)
    sampled = say(model, token_ids(20), new_cache(), do_sample=True, num_return_sequences=3)
    assert beams["sequences"][0].shape[0] == 4 and sampled["sequences"][0].shape[0] == 3
    return flat(beams, sampled)


def _assisted(model, name, new_cache):
    return flat(
        say(model, token_ids(20), new_cache(), assistant_model=assistant(name), new=12),
        say(model, token_ids(20), new_cache(), assistant_model=assistant(name), do_sample=True),
    )


def _prompt_lookup(model, name, new_cache):
    return flat(say(model, repeated(20), new_cache(), prompt_lookup_num_tokens=4, new=12))


def _early_exit(model, name, new_cache):
    cache = new_cache()
    model = copy.deepcopy(model)  # a failure leaves it with fewer layers
    return flat(say(model, token_ids(20), cache, assistant_early_exit=1))


def _prefill_in_chunks(model, name, new_cache):
    cache, whole = new_cache(), token_ids(20, 2)
    if OLDEST and isinstance(cache, DynamicCache):
        # There generate gives every chunk the positions of the last: by hand, as it should be.
        logits = loop(model, cache, whole, 7, 7, 6)[-1:]
        for _ in range(7):
            whole = torch.cat([whole, logits[-1].argmax(-1, keepdim=True)], dim=1)
            logits += loop(model, cache, whole[:, -1:], 1)
        return [torch.cat([whole, logits[-1].argmax(-1, keepdim=True)], dim=1), *logits, *logits]
    return flat(say(model, whole, cache, prefill_chunk_size=7))


def _logits_to_keep(model, name, new_cache):
    cache = new_cache()
    with torch.no_grad():
        first = model(token_ids(20), past_key_values=cache, logits_to_keep=3).logits
        second = model(token_ids(4, seed=1), past_key_values=cache, logits_to_keep=torch.tensor([0, 2])).logits
    assert (first.shape[1], second.shape[1]) == (3, 2)
    return [first, second, *flat(say(model, token_ids(20), new_cache(), logits_to_keep=3))]


def _streamer(model, name, new_cache):
    streamer = Collected()
    said = say(model, token_ids(20), new_cache(), streamer=streamer)
    assert streamer.tokens == said["sequences"][0][0].tolist() and streamer.ended
    return flat(said)


def _stopping(model, name, new_cache):
    said = say(model, token_ids(20), new_cache(), stopping_criteria=StoppingCriteriaList([StopAt(23)]))
    assert said["sequences"][0].shape[1] == 23
    end = int(said["sequences"][0][0, 21])
    return flat(said, say(model, token_ids(20, 2), new_cache(), eos_token_id=end))


def _embeddings(model, name, new_cache):
    ids = token_ids(20, 2)
    embeddings = model.get_input_embeddings()(ids).detach()
    return flat(say(model, None, new_cache(), inputs_embeds=embeddings, attention_mask=torch.ones_like(ids)))


def _left_padding(model, name, new_cache):
    ids, mask = padded()
    return flat(say(model, ids, new_cache(), mask))


def _turns_whole(model, name, new_cache):
    cache, outputs, whole = new_cache(), [], token_ids(12)
    for turn in range(3):
        outputs.append(say(model, whole, cache, new=4))
        whole = torch.cat([outputs[-1]["sequences"][0], token_ids(3, seed=turn + 1)], dim=1)
    return flat(*outputs)


def _turns_new(model, name, new_cache):
    cache, outputs, whole = new_cache(), [], token_ids(12)
    for turn in range(3):
        new = whole[:, cache.get_seq_length() :]
        outputs.append(say(model, new, cache, mask=torch.ones_like(whole), new=4))
        said = outputs[-1]["sequences"][0][:, new.shape[1] :]
        whole = torch.cat([whole, said, token_ids(3, seed=turn + 1)], dim=1)
    return flat(*outputs)


def _generate_on(model, name, new_cache):
    cache, once = new_cache(), say(model, token_ids(20, 2), new_cache(), new=8)
    first = say(model, token_ids(20, 2), cache, new=4)
    second = say(model, first["sequences"][0], cache, new=4)
    assert torch.equal(second["sequences"][0], once["sequences"][0])
    return flat(once, first, second)


def _reset(model, name, new_cache):
    cache = new_cache()
    first = say(model, token_ids(20, 2), cache)
    cache.reset()
    if OLDEST and isinstance(cache, DynamicCache):
        cache = new_cache()  # reset only fills it with zeros there
    assert cache.get_seq_length() == 0
    again = say(model, token_ids(20, 2), cache)
    assert all(torch.equal(a, b) for a, b in zip(flat(first), flat(again), strict=True))
    return flat(again)


def _branches(model, name, new_cache):
    cache, ids = new_cache(), token_ids(20)
    said = say(model, ids, cache, new=4)["sequences"][0]
    outputs = []
    for branch in (1, 2):
        whole = torch.cat([said, token_ids(3, seed=branch)], dim=1)
        outputs.append(say(model, whole, copy.deepcopy(cache), new=4))
    outputs.append(say(model, said, cache, new=4))
    assert torch.equal(outputs[-1]["sequences"][0], say(model, ids, new_cache(), new=8)["sequences"][0])
    return flat(*outputs)


def _guidance(model, name, new_cache):
    return flat(say(model, token_ids(20), new_cache(), guidance_scale=1.5))


BELOW = {
    "greedy": _greedy,
    "sampling": _sampling,
    "beam search": _beam_search,
    "beam sampling": _beam_sampling,
    "several return sequences": _several_sequences,
    "assisted": _assisted,
    "prompt lookup": _prompt_lookup,
    "early exit": _early_exit,
    "prefill in chunks": _prefill_in_chunks,
    "logits to keep": _logits_to_keep,
    "streamer": _streamer,
    "stopping": _stopping,
    "inputs_embeds": _embeddings,
    "left padding": _left_padding,
    "turns, whole text": _turns_whole,
    "turns, new tokens": _turns_new,
    "generate on": _generate_on,
    "reset, then again": _reset,
    "branches of a copy": _branches,
    "guidance": _guidance,
}

# What transformers refuses below the bound whatever the cache: {mode: {family: exception}}.
REFUSED: dict[str, dict[str, type[Exception]]] = {
    "early exit": dict.fromkeys(FAMILIES if OLDEST else ("falcon", "gpt2", "gpt_neox"), TypeError if OLDEST else IndexError)
}
if OLDEST:
    REFUSED["turns, new tokens"] = dict.fromkeys(FAMILIES, IndexError)
    # There a sliding layer can't be cropped past its window.
    REFUSED["assisted"] = REFUSED["prompt lookup"] = dict.fromkeys(SLIDING, ValueError)


def refusal(mode: str, name: str) -> type[Exception] | None:
    """With what transformers refuses the cell; notes it in the table."""
    refused = REFUSED.get(mode, {}).get(name)
    if refused is not None:
        GENERATE_TABLE[mode, name] = (
            f"refused: {refused.__name__} by transformers {transformers.__version__}, with any cache"
        )
    return refused


@contextlib.contextmanager
def cell(mode: str, name: str):
    """A cell of the table: failed until the end says otherwise."""
    GENERATE_TABLE[mode, name] = "FAILED"
    try:
        yield
    except BaseException:
        GENERATE_TABLE[mode, name] = "FAILED"
        if (mode, name) in PENDING:
            GENERATE_TABLE[mode, name] = f"pending: {PENDING[mode, name]}"
            pytest.xfail(PENDING[mode, name])
        raise
    assert (mode, name) not in PENDING, "this works: take it out of PENDING"
    if GENERATE_TABLE[mode, name] == "FAILED":
        GENERATE_TABLE[mode, name] = "pass"


@pytest.mark.parametrize("mode,name", cells(BELOW))
def test_below_the_bound_generate_gives_what_it_gives_with_dynamic_cache(mode, name):
    plain, enabled = models(name)

    def with_dynamic_cache():
        return BELOW[mode](plain, name, lambda: DynamicCache(config=plain.config))

    def with_ours():
        return BELOW[mode](enabled, name, lambda: enable_adms_llm(enabled, **ROOMY))

    with cell(mode, name):
        refused = refusal(mode, name)
        if refused is not None:
            with pytest.raises(refused):
                with_dynamic_cache()
            with pytest.raises(refused):
                with_ours()
            return
        expected, got = with_dynamic_cache(), with_ours()
        assert len(expected) == len(got) > 1
        assert all(torch.equal(one, other) for one, other in zip(expected, got, strict=True))


# -- past the bound ------------------------------------------------------------------------------------------------------


class Watch:
    """Checks after every forward pass of the model that logits are finite and the cache bounded.

    What is tried out counts with the crop that follows: the cache is bounded then, before the next pass and at the end.
    """

    def __init__(self, model, cache):
        self.model, self.cache, self.passes = model, cache, 0

    def __enter__(self):
        self.handles = [
            self.model.register_forward_hook(self.check),
            self.model.register_forward_pre_hook(lambda *_: self.check_bound()),
        ]
        return self

    def __exit__(self, kind, *_):
        for handle in self.handles:
            handle.remove()
        if kind is None:
            self.check_bound()

    def check_bound(self):
        assert self.cache.stream.open is None
        assert self.cache.held_tokens <= self.cache.config.expected_max_tokens

    def check(self, module, args, output):
        self.passes += 1
        assert output.logits.isfinite().all()
        if not self.cache.stream.records_past:
            self.check_bound()
        for layer in self.cache.layers:
            assert layer.get_seq_length() == self.cache.get_seq_length()


def watched(model, ids, cache, **options) -> dict[str, list[torch.Tensor]]:
    with Watch(model, cache) as watch:
        said = say(model, ids, cache, **options)
    assert watch.passes and any(layer.compacted for layer in cache.layers if isinstance(layer, ADMSLayer))
    return said


@torch.no_grad()
def loop(model, cache, ids: torch.Tensor, *pieces: int, **inputs) -> list[torch.Tensor]:
    """The last logits `[batch, vocab]` of each piece of `ids`, given to the model one piece after the other."""
    logits, start = [], 0
    inputs["logits_to_keep"] = 1  # as generate does: another number of rows is another kernel, with other roundings
    for length in pieces:
        logits.append(model(ids[:, start : start + length], past_key_values=cache, **inputs).logits[:, -1].float())
        start += length
    return logits


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def small(model, **changed):
    return enable_adms_llm(model, **{**SMALL, **changed})


LONG, NEW = 60, 12
ONES = (1,) * (NEW - 1)


def _past_greedy(model, name):
    said = watched(model, token_ids(LONG, 2), small(model), new=NEW)
    whole = said["sequences"][0]
    assert same(said["logits"], loop(model, small(model), whole, LONG, *ONES))
    assert torch.equal(torch.stack(said["logits"], dim=1).argmax(-1), whole[:, LONG:])


def _past_sampling(model, name):
    said = watched(model, token_ids(LONG), small(model), new=NEW, do_sample=True, top_k=20, num_return_sequences=3)
    whole = said["sequences"][0]
    assert same(said["logits"], loop(model, small(model), whole, LONG, *ONES))
    torch.manual_seed(0)
    drawn = [torch.multinomial(scores.softmax(-1), 1) for scores in said["scores"]]
    assert torch.equal(torch.cat(drawn, dim=1), whole[:, LONG:]) and len(whole.unique(dim=0)) > 1


def _past_beams(model, name):
    cache = small(model)
    with Watch(model, cache):
        output = model.generate(
            token_ids(LONG), attention_mask=torch.ones(1, LONG, dtype=torch.long), past_key_values=cache, do_sample=False,
            max_new_tokens=NEW, num_beams=3, num_return_sequences=3, length_penalty=0.0, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    whole = output.sequences
    logits = torch.stack(loop(model, small(model), whole, LONG, *ONES), dim=1).log_softmax(-1)
    scores = logits.gather(-1, whole[:, LONG:, None]).sum((1, 2))
    assert len(whole.unique(dim=0)) == 3
    torch.testing.assert_close(output.sequences_scores, scores, atol=1e-3, rtol=1e-4)


def _past_prefill_in_chunks(model, name):
    said = watched(model, token_ids(LONG, 2), small(model), new=NEW, prefill_chunk_size=7)
    pieces = (7,) * (LONG // 7) + ((LONG % 7,) if LONG % 7 else ())
    assert same(said["logits"], loop(model, small(model), said["sequences"][0], *pieces, *ONES)[len(pieces) - 1 :])


def _past_logits_to_keep(model, name):
    with torch.no_grad():
        every = model(token_ids(LONG), past_key_values=small(model)).logits
        last = model(token_ids(LONG), past_key_values=small(model), logits_to_keep=3).logits
    torch.testing.assert_close(last, every[:, -3:])
    said = watched(model, token_ids(LONG), small(model), new=NEW, logits_to_keep=3)
    expected = loop(model, small(model), said["sequences"][0], LONG, *ONES)
    torch.testing.assert_close(torch.cat(said["logits"]), torch.cat(expected))


def _past_streamer_and_stopping(model, name):
    streamer = Collected()
    stop = StoppingCriteriaList([StopAt(LONG + 9)])
    said = watched(model, token_ids(LONG), small(model), new=NEW, streamer=streamer, stopping_criteria=stop)
    whole = said["sequences"][0]
    assert streamer.tokens == whole[0].tolist() and whole.shape[1] == LONG + 9
    assert same(said["logits"], loop(model, small(model), whole, LONG, *ONES[:8]))


def _past_embeddings(model, name):
    ids = token_ids(LONG, 2)
    embeddings = model.get_input_embeddings()(ids).detach()
    mask = torch.ones_like(ids)
    said = watched(model, None, small(model), new=NEW, inputs_embeds=embeddings, attention_mask=mask)
    assert same(said["logits"], watched(model, ids, small(model), new=NEW)["logits"])


def _past_turns(model, name):
    cache, whole, logits = small(model), token_ids(LONG), []
    for turn in range(3):
        said = watched(model, whole, cache, new=NEW)
        logits += said["logits"]
        whole = torch.cat([said["sequences"][0], token_ids(3, seed=turn + 1)], dim=1)
    assert same(logits, loop(model, small(model), whole, LONG, *ONES, 4, *ONES, 4, *ONES))


def _past_turns_new(model, name):
    cache, whole, logits = small(model), token_ids(LONG), []
    for turn in range(2):
        new = whole[:, cache.get_seq_length() :]
        said = watched(model, new, cache, mask=torch.ones_like(whole), new=NEW)
        logits += said["logits"]
        said = said["sequences"][0][:, new.shape[1] :]
        whole = torch.cat([whole, said, token_ids(3, seed=turn + 1)], dim=1)
    assert same(logits, loop(model, small(model), whole, LONG, *ONES, 4, *ONES))


def _past_generate_on_and_reset(model, name):
    cache = small(model)
    first = watched(model, token_ids(LONG, 2), cache, new=5)
    second = watched(model, first["sequences"][0], cache, new=NEW - 5)
    assert same(first["logits"] + second["logits"], loop(model, small(model), second["sequences"][0], LONG, *ONES))
    cache.reset()
    assert same(first["logits"], watched(model, token_ids(LONG, 2), cache, new=5)["logits"])


def _past_branches(model, name):
    cache = small(model)
    said = watched(model, token_ids(LONG), cache, new=5)["sequences"][0]
    for branch in (1, 2):
        whole = torch.cat([said, token_ids(3, seed=branch)], dim=1)
        got = watched(model, whole, copy.deepcopy(cache), new=NEW)
        pieces = (LONG, 1, 1, 1, 1, 4, *ONES)
        assert same(got["logits"], loop(model, small(model), got["sequences"][0], *pieces)[5:])
    got = watched(model, said, cache, new=NEW - 5)
    assert same(got["logits"], loop(model, small(model), got["sequences"][0], LONG, *ONES)[5:])


def _past_left_padding(model, name):
    ids, mask = padded(LONG)
    said = watched(model, ids, small(model), mask=mask, new=NEW)
    others = torch.where(mask.bool(), ids, 5)
    assert same(said["logits"], watched(model, others, small(model), mask=mask, new=NEW)["logits"])
    # A row that is long enough by itself is compacted to the same, and so says the same, alone.
    ids, mask = padded(2 * LONG)
    both = watched(model, ids, small(model, **CALM), mask=mask, new=NEW)
    for row in (0, 1):
        alone = both["sequences"][0][row : row + 1, (mask[row] == 0).sum() :]
        expected = loop(model, small(model, **CALM), alone, int(mask[row].sum()), *ONES)
        torch.testing.assert_close(
            torch.cat([logits[row : row + 1] for logits in both["logits"]]), torch.cat(expected), atol=1e-3, rtol=1e-3
        )


def _check_assisted(model, ids, **options):
    cache = small(model, **CALM)
    ids = watched(model, ids, cache, new=2)["sequences"][0]
    expected = watched(model, ids, copy.deepcopy(cache), new=NEW)["sequences"][0]
    said = watched(model, ids, cache, new=NEW, **options)["sequences"][0]
    assert torch.equal(said[:, : expected.shape[1]], expected)
    # With prompt lookup transformers 5.2 may say one token more than it was asked for.
    assert said.shape[1] - expected.shape[1] in ((0, 1) if OLDEST else (0,))
    assert cache.get_seq_length() == said.shape[1] - 1
    # Where pieces of other lengths are compacted at other times the tokens may differ; they are still tokens of a bounded
    # cache, and what was taken back leaves no trace in its length.
    cache = small(model)
    said = watched(model, ids, cache, new=3 * NEW, **options)["sequences"][0]
    assert said.shape[1] == cache.get_seq_length() + 1
    assert said.shape[1] - ids.shape[1] - 3 * NEW in ((0, 1) if OLDEST else (0,))


def _past_assisted(model, name):
    _check_assisted(model, token_ids(LONG), assistant_model=assistant(name))


def _past_prompt_lookup(model, name):
    _check_assisted(model, repeated(LONG), prompt_lookup_num_tokens=4)


PAST = {
    "greedy, past the bound": _past_greedy,
    "sampling, several sequences, past": _past_sampling,
    "beam search, past": _past_beams,
    "assisted, past": _past_assisted,
    "prompt lookup, past": _past_prompt_lookup,
    "prefill in chunks, past": _past_prefill_in_chunks,
    "logits to keep, past": _past_logits_to_keep,
    "streamer, stopping, past": _past_streamer_and_stopping,
    "inputs_embeds, past": _past_embeddings,
    "left padding, past": _past_left_padding,
    "turns, whole text, past": _past_turns,
    "turns, new tokens, past": _past_turns_new,
    "generate on, reset, past": _past_generate_on_and_reset,
    "branches of a copy, past": _past_branches,
}
if OLDEST:
    REFUSED["turns, new tokens, past"] = REFUSED["turns, new tokens"]
    REFUSED["assisted, past"] = REFUSED["prompt lookup, past"] = REFUSED["assisted"]


@pytest.mark.parametrize("mode,name", cells(PAST, ("gemma2", "gpt2", "llama")))
def test_past_the_bound_generate_does_what_a_loop_by_hand_does(mode, name):
    model = models(name)[1]
    with cell(mode, name):
        refused = refusal(mode, name)
        with contextlib.nullcontext() if refused is None else pytest.raises(refused):
            PAST[mode](model, name)


# -- refused -------------------------------------------------------------------------------------------------------------

ALWAYS_REFUSED = {
    "contrastive search": ({"penalty_alpha": 0.6, "top_k": 4}, "trust_remote_code"),
    "DoLa": ({"dola_layers": "low"}, "trust_remote_code"),
    "group beam search": ({"num_beam_groups": 2, "num_beams": 2, "diversity_penalty": 1.0}, "trust_remote_code"),
    "constrained beam search": ({"force_words_ids": [[5]], "num_beams": 2}, "trust_remote_code"),
    "static cache": ({"cache_implementation": "static"}, "cache_implementation"),
    "quantized cache": ({"cache_implementation": "quantized"}, "cache_implementation"),
    "use_cache=False": ({"use_cache": False}, "use_cache=False contradicts past_key_values"),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mode", ALWAYS_REFUSED)
def test_what_does_not_go_with_this_cache_is_refused_before_anything_is_generated(mode, name):
    model, (options, message) = models(name)[1], ALWAYS_REFUSED[mode]
    cache = enable_adms_llm(model, **ROOMY)
    with cell(mode, name):
        with pytest.raises(ValueError, match=message):
            say(model, token_ids(20), cache, **options)
        assert cache.get_seq_length() == 0
        why = {"trust_remote_code": "transformers fetches this mode from the Hub", "cache_implementation": "another cache"}
        GENERATE_TABLE[mode, name] = f"refused: ValueError, {why.get(message, message)}"


@pytest.mark.skipif(OLDEST, reason="sliding layers can't be cropped there")
@pytest.mark.parametrize("name", SLIDING)
def test_sliding_layers_are_bounded_again_after_assisted_generation(name):
    model = models(name)[1]
    cache = small(model)
    said = say(model, token_ids(LONG), cache, assistant_model=assistant(name))["sequences"][0]
    whole = say(model, said, cache, new=2 * NEW)["sequences"][0]
    assert cache.get_seq_length() == whole.shape[1] - 1
    assert [layer.keys.shape[2] for layer in cache.layers if not isinstance(layer, ADMSLayer)] == [15, 15]
    cache = enable_adms_llm(model, **ROOMY)
    said = say(model, token_ids(LONG), cache, assistant_model=assistant(name))["sequences"][0]
    again = say(model, said, cache, new=2 * NEW)
    expected = say(model, said, enable_adms_llm(model, **ROOMY), new=2 * NEW)
    torch.testing.assert_close(torch.cat(again["logits"]), torch.cat(expected["logits"]), atol=1e-4, rtol=1e-4)


def test_input_without_a_new_token_is_refused_and_the_cache_stays_as_it_was():
    model = models("llama")[1]
    cache = enable_adms_llm(model, **ROOMY)
    said = say(model, token_ids(20), cache)["sequences"][0]
    with pytest.raises(ValueError, match="conversation of 27 .* no beginning in common"):
        say(model, token_ids(3, seed=1), cache, mask=None)
    with pytest.raises(ValueError, match="no new tokens.*conversation of 27.*reset.*deepcopy.*rewind_to"):
        model(said[:, :0], past_key_values=cache)
    assert cache.get_seq_length() == 27
    assert same(say(model, said, cache)["sequences"], say(model, said, DynamicCache(config=model.config))["sequences"])
