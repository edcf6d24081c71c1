"""What an editor knows of the package: every setting by name, type and meaning, and types a strict checker believes.

`python tests/test_typing.py` writes `streaming_llm/settings.py` anew from the fields of `ADMSConfig`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import os
import subprocess
import sys
import textwrap
import typing
from pathlib import Path

import pytest

import streaming_llm
from streaming_llm import ADMSConfig, settings
from streaming_llm.baselines import enable_baseline

ROOT = Path(__file__).parent.parent
HEAD = '''"""The settings by name, for editors and type checkers: `**settings` of the functions that take them.

Made from the fields of `ADMSConfig` by `python tests/test_typing.py`; change those.
"""

from __future__ import annotations

from typing import Literal, TypedDict
'''
# A function may have some settings as parameters of its own, which its `**settings` may not name again.
APART = {
    "WindowSettings": (("start_size", "recent_size"), "The sizes that StreamingLLM has too."),
    "RankSettings": (("rank",), "Of the low-rank compressor."),
    "ClusterSettings": (("num_clusters",), "Of the vector-quantising compressor."),
}
TAIL = '''

class Settings(WindowSettings, RankSettings, ClusterSettings, OtherSettings, total=False):
    """Any settings of `ADMSConfig`."""


class LowRankSettings(WindowSettings, ClusterSettings, OtherSettings, total=False):
    """Those of `enable_adms_low_rank`, which has the others as parameters."""


class VQSettings(WindowSettings, RankSettings, OtherSettings, total=False):
    """Those of `enable_adms_vq`, likewise."""


class StreamingSettings(RankSettings, ClusterSettings, OtherSettings, total=False):
    """Those of `enable_streaming_llm`, likewise."""
'''
TAKES_SETTINGS = (
    streaming_llm.enable_adms_llm,
    streaming_llm.enable_adms_low_rank,
    streaming_llm.enable_adms_vq,
    streaming_llm.enable_streaming_llm,
    enable_baseline,
    ADMSConfig.adm_plus_plus,
    ADMSConfig.from_memory,
)
# Settings they fix themselves, and defaults of their own.
NOT_TAKEN = {
    "enable_adms_low_rank": ["compressor_type"],
    "enable_adms_vq": ["compressor_type"],
    "enable_streaming_llm": ["compressed_budget", "min_importance_tokens"],
    "enable_baseline": ["compressor_type", "importance_ratio", "min_importance_tokens"],
}
OTHER_DEFAULTS = {
    "adm_plus_plus": ADMSConfig.adm_plus_plus().to_dict(),
    "from_memory": {"recent_size": ..., "compressed_budget": ...},
}


def written(field: dataclasses.Field) -> str:
    """A setting as a key of a typed dict, its default and meaning below it."""
    options = field.metadata.get("options")
    kind = f"Literal[{', '.join(map(repr, options))}]".replace("'", '"') if options else field.type
    meaning = f'"""{field.metadata["help"]} ({field.default})"""'
    lines = textwrap.wrap(meaning, 120, initial_indent="    ", subsequent_indent="    ")
    return "\n".join([f"    {field.name}: {kind}", *lines])


def settings_file() -> str:
    """What `streaming_llm/settings.py` must hold."""
    fields = {field.name: field for field in dataclasses.fields(ADMSConfig)}
    classes = [(name, *apart) for name, apart in APART.items()]
    taken = [setting for names, _ in APART.values() for setting in names]
    classes.append(("OtherSettings", [name for name in fields if name not in taken], "All the others."))
    text = HEAD
    for name, members, meaning in classes:
        body = "\n".join(written(fields[member]) for member in members)
        text += f'\n\nclass {name}(TypedDict, total=False):\n    """{meaning}"""\n\n{body}\n'
    return text + TAIL


def test_the_typed_settings_are_the_fields_of_the_config():
    assert Path(settings.__file__).read_text(encoding="utf-8") == settings_file(), "python tests/test_typing.py writes it"
    kinds, hints = typing.get_type_hints(ADMSConfig), typing.get_type_hints(settings.Settings)
    assert set(hints) == set(ADMSConfig.setting_names())
    for field in dataclasses.fields(ADMSConfig):
        options = field.metadata.get("options")
        assert hints[field.name] == (typing.Literal[options] if options else kinds[field.name]), field.name


@pytest.mark.parametrize("function", TAKES_SETTINGS, ids=lambda function: function.__name__)
def test_help_lists_every_setting_with_its_type_default_and_meaning(function):
    parameters = inspect.signature(function).parameters
    kinds = typing.get_type_hints(ADMSConfig)
    lines = {line.split(":")[0].strip(): line.strip() for line in inspect.getdoc(function).splitlines() if ":" in line}
    assert not [one for one in parameters.values() if one.kind is inspect.Parameter.VAR_KEYWORD]
    missing = [name for name in ADMSConfig.setting_names() if name not in parameters]
    assert missing == NOT_TAKEN.get(function.__name__, [])
    for field in dataclasses.fields(ADMSConfig):
        parameter = parameters.get(field.name)
        if parameter is None or parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        default = OTHER_DEFAULTS.get(function.__name__, {}).get(field.name, field.default)
        assert (parameter.annotation, parameter.default) == (kinds[field.name], default)
        kind = kinds[field.name].__name__
        assert lines[field.name] == f"{field.name}: {kind} = {default!r}. {field.metadata['help']}"


STRICT = '''
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from typing_extensions import assert_type

import streaming_llm
from streaming_llm import *
from streaming_llm.baselines import enable_baseline
from streaming_llm.chat import Chat
from streaming_llm.evaluation import (
    METHODS, EvaluationError, MethodResult, TextStreams, cache_factory, evaluate_streams, load_model, load_text,
    lockstep, plan_methods, resolve_settings, shipped_text,
)


class Mine(Compressor):
    """A compressor of a user's own."""

    def compress(
        self,
        tokens: WeightedTokens,
        reference: Reference,
        width: int,
        budget: torch.Tensor | None = None,
        least: int | None = None,
    ) -> WeightedTokens:
        queries: Queries | None = reference.queries
        assert_type(reference.weight, torch.Tensor)
        assert queries is None or queries.states.dim() == 5
        return tokens


def use(model: PreTrainedModel) -> None:
    register_compressor("mine", Mine)
    cache = enable_adms_llm(model, recent_size=8, importance_metric="mixed", enable_recall=True)
    assert_type(cache, ADMSKVCache)
    assert_type(enable_adms_llm(model, ADMSConfig(rank=8)), ADMSKVCache)
    assert_type(enable_adms_low_rank(model, rank=8, recent_size=8), ADMSKVCache)
    assert_type(enable_adms_vq(model, num_clusters=8, recent_size=8), ADMSKVCache)
    assert_type(enable_streaming_llm(model, recent_size=8), ADMSKVCache)
    assert_type(enable_baseline(model, "h2o", compressed_budget=8), ADMSKVCache)
    disable_adms_llm(model)
    config = ADMSConfig.adm_plus_plus(recent_size=8)
    assert_type(config, ADMSConfig)
    assert_type(ADMSConfig.from_memory(model.config, 1 << 20, torch.float32, recent_size=8), ADMSConfig)
    assert_type(ADMSConfig.from_json("{}"), ADMSConfig)
    assert_type(config.to_json(), str)
    assert_type(config.expected_max_tokens, int)
    assert_type(config.memory_bytes(model.config, torch.float16), int)
    assert_type(cache.config.rank, int)
    assert_type(cache.nbytes, int)
    assert_type(cache.held_tokens, int)
    assert_type(cache.memory_report(), dict[str, int])
    assert_type(cache.stats, dict[str, int])
    assert_type(cache.recalled(0, 0), tuple[torch.Tensor, torch.Tensor])
    assert_type(cache.recalled_passages(), list[tuple[float, int, int]])
    assert_type(cache.save("talk.adms"), None)
    assert_type(ADMSKVCache.load("talk.adms", model), ADMSKVCache)
    cache.crop(-1)
    cache.reset()
    assert_type(SUPPORTED_MODEL_TYPES, tuple[str, ...])
    assert issubclass(NonFiniteError, Exception) and issubclass(EvaluationError, Exception)
    layers = [layer for layer in cache.layers if isinstance(layer, ADMSLayer)]
    assert_type(layers, list[ADMSLayer])
    own: Settings = {"recent_size": 8}
    assert_type(enable_adms_llm(model, **own), ADMSKVCache)
    loaded, tokenizer = load_model(dtype="float32")
    text: TextStreams = load_text(tokenizer, num_eval_tokens=64)
    assert_type(shipped_text(), str)
    plans = plan_methods(list(METHODS), resolve_settings({"recent_size": 8}))
    results = evaluate_streams(loaded, text.streams, {plan.method.name: cache_factory(loaded, plan) for plan in plans})
    assert_type(results, dict[str, MethodResult])
    for chunk in lockstep(loaded, text.streams[0], {"adms": cache}, 64):
        assert_type(chunk.logits, torch.Tensor)
    chat = Chat(loaded, tokenizer, cache)
    for piece in chat.say("Hello"):
        assert_type(piece, str)
    assert_type(streaming_llm.__version__, str)
'''
# Each is wrong, and a checker must say so: types that are all `Any` would pass the file above.
WRONG = (
    "enable_adms_llm(model, recent_sise=8)",
    'enable_adms_llm(model, rank="16")',
    'enable_adms_llm(model, importance_metric="atention")',
    "ADMSConfig(recent_size=8.5)",
    "cache.nothing",
    'cache.save(["a"])',
    "enable_adms_vq(model, recent=8)",
)


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """Check files with mypy in strict mode; gives its exit code and output."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is in the extra `test`")
    folder = tmp_path_factory.mktemp("checked")

    def check(name: str, text: str):
        (folder / name).write_text(text, encoding="utf-8")
        # As an installed package is found: what is wrong within it is no user's business.
        environment = os.environ | {"MYPYPATH": "", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", name]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    return check


def test_the_public_names_pass_a_strict_type_checker(checked):
    code, output = checked("right.py", STRICT)
    assert code == 0, output
    for name in streaming_llm.__all__:
        assert name in STRICT, name


def test_the_type_checker_finds_what_is_wrong(checked):
    begin = "from streaming_llm import *\nfrom transformers import PreTrainedModel\n\n\n"
    begin += "def use(model: PreTrainedModel, cache: ADMSKVCache) -> None:\n"
    code, output = checked("wrong.py", begin + "".join(f"    {line}\n" for line in WRONG))
    first = begin.count("\n") + 1
    assert code == 1
    for number, line in enumerate(WRONG, start=first):
        assert f"wrong.py:{number}: error" in output, line


if __name__ == "__main__":
    Path(settings.__file__).write_text(settings_file(), encoding="utf-8")
