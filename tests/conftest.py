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
    from streaming_llm.evaluation import EvaluationError, load_model

    try:
        return load_model(device="cpu")
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
