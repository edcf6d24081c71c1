"""Models the tests share: real SmolLM2 weights, and a tiny random Llama for everything that needs no real ones."""

from __future__ import annotations

import os

# Tests run in two processes: each with one thread, and so do the processes they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests that need packages of the extra `test-extras`; .ci/run runs them where CI_EXTRAS=1.
collect_ignore = [] if os.environ.get("CI_EXTRAS") == "1" else ["extras"]

import pytest  # noqa: E402
import torch  # noqa: E402

# (mode of generate, model type): "pass", "refused: ...", "pending: ..." or "FAILED", as tests/test_generate.py found it.
GENERATE_TABLE: dict[tuple[str, str], str] = {}


def pytest_sessionfinish(session):
    """A process that ran tests hands its part of the table to the one that prints it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["generate_table"] = [[*key, cell] for key, cell in GENERATE_TABLE.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Take over what such a process found."""
    found = getattr(node, "workeroutput", {}).get("generate_table", ())
    GENERATE_TABLE.update({(mode, family): cell for mode, family, cell in found})


def pytest_terminal_summary(terminalreporter):
    """Print what `generate` can do on which family, where that was tested."""
    if not GENERATE_TABLE:
        return
    modes = list(dict.fromkeys(mode for mode, _ in GENERATE_TABLE))
    families = sorted({family for _, family in GENERATE_TABLE})
    notes = list(dict.fromkeys(cell for cell in GENERATE_TABLE.values() if cell.startswith(("refused", "pending"))))
    terminalreporter.section("generate: mode x family")
    width = max(map(len, modes))
    terminalreporter.write_line(" " * width + "  " + "  ".join(families))
    for mode in modes:
        cells = (GENERATE_TABLE.get((mode, family), "-") for family in families)
        cells = (f"{cell[:7]} {notes.index(cell) + 1}" if cell in notes else cell for cell in cells)
        row = "  ".join(cell.ljust(len(family)) for cell, family in zip(cells, families, strict=True))
        terminalreporter.write_line(f"{mode.ljust(width)}  {row}".rstrip())
    for number, note in enumerate(notes, start=1):
        terminalreporter.write_line(f"{number}: {note}")


@pytest.fixture(scope="session")
def smol():
    """`(model, tokenizer)` of SmolLM2-135M-Instruct in float32 on the CPU; fetched once into the user's cache."""
    return real_model()


@pytest.fixture(scope="session")
def gemma():
    """`(model, tokenizer)` of Gemma 3 270M in float32 on the CPU; fetched once into the user's cache."""
    return real_model("gemma3-270m")


def real_model(name: str | None = None):
    from streaming_llm.evaluation import EvaluationError, load_model

    try:
        return load_model(name, device="cpu")
    except EvaluationError as error:
        # A machine without a registry can still run the rest; a CI run that skips these would prove nothing.
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(f"the real weights are needed in CI: {error}")
        pytest.skip(f"the real weights can't be had here: {error}")


def make_tiny_llama(vocab_size: int = 128):
    """The soak's tiny random Llama, trained to 4,096 tokens, with an end-of-sequence token."""
    from streaming_llm.evaluation.soak import tiny_model

    return tiny_model(4096, vocab_size=vocab_size, bos_token_id=1, eos_token_id=2, pad_token_id=2)


@pytest.fixture
def tiny_llama():
    """A new tiny random Llama (see `make_tiny_llama`) with 128 tokens."""
    return make_tiny_llama()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory):
    """A folder with a tiny random Llama and a byte-level tokenizer, as `--model_name_or_path` takes it."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    make_tiny_llama(vocab_size=256).save_pretrained(folder)
    return folder


def token_ids(tokens: int, batch: int = 1, seed: int = 0, vocab_size: int = 128) -> torch.Tensor:
    """Seeded random token ids `[batch, tokens]`, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (batch, tokens), generator=generator)


@torch.no_grad()
def padded_passes(model, rows: list[torch.Tensor], passes: list[list[int]], cache):
    """Rows `[1, tokens]` streamed together: yields the logits of each pass and where its tokens are real, `[rows, width]`.

    `passes[n][row]`: real tokens of the row in pass `n`. A pass is as wide as its longest row, the others are padded on the
    left. Position ids count a row's real tokens.
    """
    fed, mask = [0] * len(rows), torch.zeros(len(rows), 0, dtype=torch.long)
    for sizes in passes:
        width = max(sizes)
        ids = torch.full((len(rows), width), model.config.pad_token_id or 0)
        new = torch.zeros(len(rows), width, dtype=torch.long)
        for row, size in enumerate(sizes):
            ids[row, width - size :] = rows[row][0, fed[row] : fed[row] + size]
            new[row, width - size :] = 1
            fed[row] += size
        mask = torch.cat([mask, new], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -width:]
        yield model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits, new > 0


@torch.no_grad()
def stream(model, ids: torch.Tensor, cache, chunk: int, **inputs) -> torch.Tensor:
    """Logits `[batch, tokens, vocab]` of `ids` given to the model in chunks of `chunk` tokens with `cache`."""
    parts = []
    for start in range(0, ids.shape[1], chunk):
        parts.append(model(input_ids=ids[:, start : start + chunk], past_key_values=cache, **inputs).logits)
    return torch.cat(parts, dim=1)


def random_states(tokens: int, batch: int = 1, heads: int = 2, dim: int = 8, seed: int = 0, dtype=torch.float32):
    """Seeded random `(keys, values)`, each `[batch, heads, tokens, dim]`."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, heads, tokens, dim, generator=generator)
    return keys.to(dtype), values.to(dtype)


def random_queries(tokens: int, batch: int = 1, heads: int = 2, groups: int = 2, dim: int = 8, seed: int = 1):
    """Seeded random queries as an attention function gets them, `[batch, heads * groups, tokens, dim]`."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(batch, heads * groups, tokens, dim, generator=generator)


def memory_of(layer):
    """What the modules remember of one layer of a cache: a `Memory` of views `[batch, kv_heads, ...]`."""
    return layer.stack.memory.map(lambda tensor: layer.stack.of_layer(layer.number, tensor))


# Of these tests' cases so many run among the quick ones, evenly spaced; the others are slow ones: what they prove is of the
# same kind, and all of them take long.
QUICK_CASES = {
    "test_attention.py::test_an_unfilled_cache_gives_logits_equal_to_the_bit": 8,
    "test_attention.py::test_real_weights_give_logits_and_tokens_equal_to_the_bit": 1,
    "test_autograd.py::test_a_stream_is_bounded_and_its_next_passes_are_within_the_rounding": 7,
    "test_autograd.py::test_autocast_and_the_models_dtype_may_change_at_any_pass": 7,
    "test_chat.py::test_an_interrupt_in_the_middle_of_a_forward_pass_leaves_what_stopping_there_would": 3,
    "test_controller.py::test_layers_compacted_together_or_one_by_one_come_out_the_same": 1,
    "test_copies.py::test_a_change_of_rows_that_changes_nothing_loses_nothing": 9,
    "test_copies.py::test_every_cache_goes_through_a_pickle_to_the_bit": 9,
    "test_evaluation_long.py::test_a_leak_at_every_forward_pass_is_seen": 2,
    "test_evaluation_long.py::test_a_soak_of_many_trained_lengths_passes": 1,
    "test_evaluation_long.py::test_the_soak_command_passes_within_the_trained_length": 1,
    "test_evaluation_streaming.py::test_no_method_sees_its_own_future": 1,
    "test_families.py::test_past_the_bound_logits_are_finite_and_the_cache_bounded": 30,
    "test_generate.py::test_below_the_bound_generate_gives_what_it_gives_with_dynamic_cache": 60,
    "test_generate.py::test_past_the_bound_generate_does_what_a_loop_by_hand_does": 34,
    "test_modules.py::test_a_deep_copy_goes_on_as_the_cache_does_and_by_itself": 2,
    "test_modules.py::test_a_forward_that_fails_leaves_no_trace_wherever_the_stream_is": 1,
    "test_modules.py::test_a_long_prefill_that_fails_after_layers_were_compacted_has_never_been": 1,
    "test_modules.py::test_a_reset_cache_is_as_new": 2,
    "test_modules.py::test_cropped_tokens_are_forgotten_and_the_stream_goes_on": 2,
    "test_modules.py::test_generate_stays_bounded_on_a_padded_batch": 2,
    "test_modules.py::test_rows_take_all_that_is_theirs_along": 3,
    "test_modules.py::test_the_cache_takes_the_memory_it_said_to_the_byte": 4,
    "test_parallel.py::test_all_a_layer_makes_is_on_the_device_of_its_keys": 2,
    "test_plain.py::test_every_setting_does_what_the_reference_does": 10,
    "test_plain.py::test_families_are_the_references_too": 4,
    "test_plain_padded.py::test_a_row_of_a_left_padded_batch_is_the_row_alone": 3,
    "test_plain_padded.py::test_rows_are_alone_with_other_settings_too": 2,
    "test_plain_padded.py::test_the_position_window_is_the_references": 4,
    "test_positions.py::test_a_stream_at_token_5_000_000_gives_the_logits_of_one_near_0": 2,
    "test_positions.py::test_positions_never_leave_the_window_and_keep_their_order": 7,
    "test_rows.py::test_a_row_of_a_padded_batch_gives_what_it_gives_alone": 12,
    "test_rows.py::test_a_row_stays_itself_with_all_four_modules": 1,
    "test_runtime.py::test_a_failed_pass_is_taken_back_at_every_layer_of_every_kind": 12,
    "test_runtime.py::test_a_failure_in_the_middle_of_a_compaction_leaves_the_cache_as_it_was": 3,
    "test_runtime.py::test_all_layers_are_at_one_point_after_a_pass_that_failed_between_two_groups": 5,
    "test_runtime.py::test_one_cache_goes_through_every_mode_with_equal_logits": 7,
    "test_session.py::test_a_loaded_conversation_goes_on_to_the_bit": 10,
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark as slow the cases of a test that `QUICK_CASES` leaves to them."""
    cases: dict[str, list] = {}
    for item in items:
        name = f"{item.path.name}::{getattr(item, 'originalname', item.name)}"
        if name in QUICK_CASES and item.get_closest_marker("slow") is None:
            cases.setdefault(name, []).append(item)
    for name, own in cases.items():
        count, kept = len(own), QUICK_CASES[name]
        quick = {place * count // kept for place in range(kept)}
        for place, item in enumerate(own):
            if place not in quick:
                item.add_marker(pytest.mark.slow)
