"""A conversation turn by turn, and the script that holds it in a terminal, on a tiny random model."""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_llama
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from streaming_llm import ADMSConfig, ADMSKVCache, enable_adms_llm
from streaming_llm.chat import Chat, TextPieces, tokens_by_tier

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "streaming_chat.py"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMED = CHATML.replace("m['content']", "m['content'] | trim")
WITH_DEFAULT = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}" + CHATML
SMALL = {"recent_size": 24, "compressed_budget": 12, "sketch_budget": 8, "replay_budget": 4, "rank": 4}
SMALL |= {"compression_interval": 16}

needs_sessions = pytest.mark.skipif(not hasattr(ADMSKVCache, "save"), reason="this version's caches can't be saved")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=CHATML)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """A folder with a tiny random Llama and a byte-level tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("tiny_chat")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    model = make_tiny_llama(vocab_size=len(tokenizer))
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    return folder


class Talk:
    """A chat on the tiny model, the tokens its model was given, and answers that can be dictated."""

    def __init__(self, folder, template=CHATML, cache=None, **options):
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.chat_template = template
        cache = enable_adms_llm(self.model, ADMSConfig.adm_plus_plus(**{**SMALL, **(cache or {})}))
        self.chat = Chat(self.model, self.tokenizer, cache, **options)
        self.passes: list[list[int]] = []
        self._dictated: list[int] = []
        self.model.register_forward_hook(self._after, with_kwargs=True)

    def _after(self, module, args, kwargs, output):
        self.passes.append(kwargs["input_ids"][0].tolist())
        if self._dictated:
            output.logits.fill_(0)[..., self._dictated.pop(0)] = 1

    @property
    def fed(self) -> list[int]:
        return [token for tokens in self.passes for token in tokens]

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def dictate(self, answer: str, chunks: int = 1) -> None:
        """What the model will answer to a turn that is read in so many chunks, and that it ends the answer."""
        self._dictated = [0] * (chunks - 1) + self.ids(answer) + [self.tokenizer.eos_token_id]

    def say(self, text: str, answer: str | None = None) -> str:
        if answer is not None:
            turn = self.chat._owed + self.ids(self.chat._turn(text))
            self.dictate(answer, -(-len(turn) // self.chat.cache.config.compression_interval))
        said = "".join(self.chat.say(text))
        self._dictated = []
        return said

    def consistent(self) -> bool:
        lengths = {layer.get_seq_length() for layer in self.chat.cache.layers}
        return self.chat.cache.stream.open is None and lengths == {len(self.fed)}


@pytest.fixture
def talk(chat_folder):
    return lambda *args, **options: Talk(chat_folder, *args, **options)


# -- turns ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, TRIMMED, WITH_DEFAULT], ids=["chatml", "trimmed", "default-system"])
@pytest.mark.parametrize("system", [None, "You are a heron."])
def test_the_turns_given_one_by_one_are_the_tokens_of_the_whole_conversation(talk, template, system):
    here = talk(template, system=system)
    turns = [("Hello there, how are you?", "Well."), (" Ça va ? \n", "Très bien, 🙂 !"), ("And now?", "Bye.")]
    messages = [] if system is None else [{"role": "system", "content": system}]
    for user, answer in turns:
        assert here.say(user, answer) == answer
        assert here.chat.ending == "turn"
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        whole = here.ids(here.tokenizer.apply_chat_template(messages, tokenize=False))
        assert here.fed == whole[: len(here.fed)]
        assert here.tokenizer.decode(whole[len(here.fed) :]) == "<|im_end|>\n"
    assert here.chat.cache.stats["total_compressions"] > 0


def test_an_answer_cut_at_its_greatest_length_is_closed_with_the_next_turn(talk):
    here = talk(max_new_tokens=4)
    assert here.say("Hello", "abcdefgh") == "abcd"
    assert here.chat.ending == "length"
    assert here.tokenizer.decode(here.fed).endswith("<|im_start|>assistant\nabcd")
    here.say("And?", "x")
    assert "abcd<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n" in here.tokenizer.decode(here.fed)


def test_a_stopped_answer_stays_as_far_as_it_was_shown_and_is_closed_with_the_next_turn(talk):
    here = talk()
    here.dictate("abcdefgh", chunks=-(-len(here.ids(here.chat._turn("Hello"))) // 16))
    shown = ""
    for piece in here.chat.say("Hello"):
        shown += piece
        if shown == "abc":
            here.chat.stop()
    here._dictated = []
    assert (shown, here.chat.ending) == ("abc", "stopped")
    assert here.consistent()
    assert here.say("And?", "x") == "x"  # stopping is over with that answer
    assert "\nabc<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n" in here.tokenizer.decode(here.fed)


def test_an_answer_left_at_a_piece_stays_as_far_as_it_was_shown(talk):
    here = talk()
    here.dictate("abcdefgh", chunks=3)
    pieces = here.chat.say("Hello, is this a turn?")
    assert [next(pieces), next(pieces)] == ["a", "b"]
    pieces.close()
    assert here.tokenizer.decode(here.fed).endswith("assistant\nab")
    here.say("And?", "x")
    assert "\nab<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n" in here.tokenizer.decode(here.fed)


# As many passes as there are between two compactions: one of them compacts before it is struck.
@pytest.mark.parametrize("at", range(3, 11))
def test_an_interrupt_in_the_middle_of_a_forward_pass_leaves_what_stopping_there_would(talk, at):
    struck, stopped = (talk(max_new_tokens=16, cache={"compression_interval": 8}) for _ in range(2))
    for here in (struck, stopped):
        here.say("A first turn that is long enough to fill the cache.")
        turn = here.ids(here.chat._turn("Go on"))
        here.dictate("abcdefghij" * 4, chunks=-(-len(turn) // 8))
    strike_at(struck, -(-len(turn) // 8) + at, layer=at % 2)
    shown = []
    with pytest.raises(KeyboardInterrupt):
        for piece in struck.chat.say("Go on"):
            shown.append(piece)
    assert "".join(shown) == ("abcdefghij" * 4)[:at]
    assert struck.consistent()

    answer = stopped.chat.say("Go on")
    assert [next(answer) for _ in shown] == shown
    answer.close()
    for here in (struck, stopped):
        here._dictated = []
    assert stopped.fed == struck.fed
    assert struck.chat.cache.stats["total_compressions"] > 0
    assert struck.say("And then?") == stopped.say("And then?")
    assert stopped.fed == struck.fed


def strike_at(here, number, layer=1):
    """Have the model's forward pass `number` (from 0, from now on) raise KeyboardInterrupt, once."""
    last = len(here.passes) + number

    def strike(*_):
        if len(here.passes) == last:
            handle.remove()
            raise KeyboardInterrupt

    handle = here.model.model.layers[layer].mlp.register_forward_hook(strike)


LONG = "word " * 20


@pytest.mark.parametrize("way", ["stop", "interrupt"])
def test_a_turn_cut_while_it_is_read_is_ended_with_the_next_one(talk, way):
    here = talk(max_new_tokens=5)
    here.say("Hello", "Hi.")
    known = here.fed
    if way == "stop":
        handle = here.model.register_forward_hook(lambda *_: here.chat.stop())
        assert "".join(here.chat.say(LONG)) == ""
        handle.remove()
        read = 1
    else:
        strike_at(here, 2)
        with pytest.raises(KeyboardInterrupt):
            here.say(LONG)
        read = 2
    assert here.chat.ending == "stopped"
    assert here.consistent()
    cut = here.ids(here.chat._turn(LONG))[: 16 * read]
    assert here.fed == known + cut
    assert here.say("And?", None) is not None
    after = here.tokenizer.decode(here.fed[len(known) + len(cut) :])
    end = "<|im_end|>\n<|im_start|>assistant\n"
    assert after.startswith(f"{end}<|im_end|>\n<|im_start|>user\nAnd?{end}")
    here.say("So?", "x")
    assert here.tokenizer.decode(here.fed).count(end) == 4


def test_a_turn_cut_within_its_end_is_told_only_the_rest_of_it(talk):
    here = talk()
    here.say("Hello", "Hi.")
    known = len(here.fed)
    end = "<|im_end|>\n<|im_start|>assistant\n"
    filler = "x" * (32 - len(here.ids("<|im_end|>\n<|im_start|>user\n")) - 3)
    strike_at(here, 2)
    with pytest.raises(KeyboardInterrupt):
        here.say(filler)
    assert here.tokenizer.decode(here.fed).endswith(f"{filler}<|im_end|>\n<|im_start|>")
    here.say("And?", "y")
    told = here.tokenizer.decode(here.fed[known:])
    assert told == f"<|im_end|>\n<|im_start|>user\n{filler}{end}<|im_end|>\n<|im_start|>user\nAnd?{end}y"


def test_two_turns_cut_while_they_are_read_are_both_ended(talk):
    here = talk()
    here.say("Hello", "Hi.")
    known = len(here.fed)
    for read in (0, 3, 0, 3):  # where it is 0, nothing is, nor the end owed of the turn before
        before = len(here.passes)
        strike_at(here, read)
        with pytest.raises(KeyboardInterrupt):
            here.say(LONG)
        assert len(here.passes) == before + read
    here.say("And?", "y")
    told = here.tokenizer.decode(here.fed[known:])
    end, start = "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n"
    assert re.fullmatch(
        re.escape(start) + r"[word ]+" + re.escape(end + start) + r"[word ]+" + re.escape(f"{end}{start}And?{end}y"), told
    )


def test_a_first_turn_that_is_cut_is_forgotten(talk):
    here = talk()
    strike_at(here, 2)
    with pytest.raises(KeyboardInterrupt):
        here.say(LONG)
    assert here.chat.cache.get_seq_length() == 0
    here.passes.clear()
    here.say("Hello", "x")
    assert here.tokenizer.decode(here.fed) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nx"


def test_a_reset_begins_a_new_conversation(talk):
    here = talk(system="Be kind.")
    here.say("Hello", "Hi.")
    strike_at(here, 2)
    with pytest.raises(KeyboardInterrupt):
        here.say(LONG)
    here.chat.reset()
    here.passes.clear()
    here.say("Hello", "x")
    assert here.tokenizer.decode(here.fed).startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello")


# -- bounds --------------------------------------------------------------------------------------------------------------


def test_nothing_grows_with_the_conversation(talk):
    here = talk(max_new_tokens=4)
    most = here.chat.cache.config.expected_max_tokens
    held, sizes = [], []
    here.model.register_forward_hook(lambda *_: held.append(here.chat.cache.held_tokens))
    own = ("model", "tokenizer", "cache", "ending")
    for number in range(40):
        here.say(f"This is turn number {number:03}, which says little.")
        rest = {name: value for name, value in vars(here.chat).items() if name not in own}
        sizes.append((here.chat.cache.nbytes, len(pickle.dumps(rest))))
    assert len(here.fed) > 20 * most
    assert max(held) <= most
    assert len(set(sizes[5:])) == 1


def test_a_long_turn_is_given_in_chunks(talk):
    here = talk(max_new_tokens=1)
    here.say("x" * 1000)
    assert max(map(len, here.passes)) == 16
    assert here.chat.cache.held_tokens <= here.chat.cache.config.expected_max_tokens


# -- sampling ------------------------------------------------------------------------------------------------------------


def test_an_answer_follows_from_seed_and_conversation(talk):
    def answers(**options):
        here = talk(max_new_tokens=12, **options)
        return [here.say("Hello"), here.say("And?")]

    sampled = answers(temperature=1.0, seed=1)
    assert sampled == answers(temperature=1.0, seed=1)
    assert sampled != answers(temperature=1.0, seed=2)
    torch.manual_seed(7)  # nor does it follow from torch's own state
    assert sampled == answers(temperature=1.0, seed=1)
    greedy = answers()
    assert greedy == answers(temperature=1.0, top_p=1e-6) == answers(temperature=1e-4, seed=3)
    assert greedy != sampled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": -0.1}, "temperature=-0.1 must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be at least 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be more than 0 and at most 1"),
        ({"top_p": 1.1}, "top_p=1.1 must be more than 0 and at most 1"),
    ],
)
def test_a_setting_out_of_range_is_refused(talk, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        talk(**options)


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        (None, {}, "has no chat template"),
        (CHATML.partition("{% if")[0], {}, "can't be continued turn by turn"),
        ("{{ messages | length }}" + CHATML, {}, "can't be continued turn by turn"),
        ("{{ messages[-1]['content'] }}" + CHATML, {}, "can't be continued turn by turn"),
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML,
            {"system": "Be kind."},
            "system='Be kind.': the chat template refuses such a conversation: no system here",
        ),
    ],
)
def test_a_template_that_can_not_be_continued_is_refused(talk, template, options, message):
    with pytest.raises(ValueError, match=message):
        talk(template, **options)


def test_a_special_token_that_ends_the_turns_of_the_template_ends_an_answer_too(chat_folder):
    model = AutoModelForCausalLM.from_pretrained(chat_folder)
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    model.generation_config.eos_token_id = [3, 4]
    tokenizer.eos_token = "<|im_start|>"
    chat = Chat(model, tokenizer, enable_adms_llm(model))
    names = ("<|im_start|>", "<|im_end|>")
    assert chat._ends == {3, 4, *tokenizer.convert_tokens_to_ids(names)}
    assert model.generation_config.eos_token_id == [3, 4]


# -- text ----------------------------------------------------------------------------------------------------------------


def words_tokenizer() -> PreTrainedTokenizerFast:
    """One with spaces before words and bytes as tokens of their own, as SentencePiece's are."""
    vocab = {
        token: index for index, token in enumerate(["▁one", "▁two", ",", "▁", "<s>", *(f"<0x{i:02X}>" for i in range(256))])
    }
    backend = Tokenizer(BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_pieces_are_whole_characters_and_together_the_text():
    tokenizer = byte_tokenizer()
    text = "Ça va? 🙂🙂 日本語, and\n words."
    ids = tokenizer(text)["input_ids"]
    pieces = TextPieces(tokenizer)
    parts = [pieces.put(token) for token in ids] + [pieces.end()]
    assert [part for part in parts if part] == list(text)


def test_pieces_of_a_word_tokenizer_keep_their_spaces():
    tokenizer = words_tokenizer()
    names = ["▁one", ",", "<s>", "▁two", "▁two", "▁", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "▁one"]
    ids = tokenizer.convert_tokens_to_ids(names)
    assert None not in ids
    pieces = TextPieces(tokenizer)
    parts = [pieces.put(token) for token in ids] + [pieces.end()]
    assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=True) == "one, two two 🙂 one"
    assert parts == ["one", ",", "", " two", " two", " ", "", "", "", "🙂", " one", ""]


def test_bytes_that_are_no_character_come_with_the_next_one_or_at_the_end():
    tokenizer = byte_tokenizer()
    first, *rest = tokenizer("é")["input_ids"]
    letter = tokenizer("x")["input_ids"][0]
    pieces = TextPieces(tokenizer)
    assert [pieces.put(first), pieces.put(letter), pieces.put(first), pieces.end()] == ["", "\ufffdx", "", "\ufffd"]


# -- what it says of itself ----------------------------------------------------------------------------------------------


def test_the_statistics_are_those_of_the_cache(talk):
    here = talk(max_new_tokens=30)
    assert "nothing was compacted yet" in here.chat.stats()
    assert tokens_by_tier(here.chat.cache) == {}
    for _ in range(4):
        here.say("This is a turn of some length, and so on.")
    cache = here.chat.cache
    tiers = tokens_by_tier(cache)
    assert sum(tiers.values()) == pytest.approx(sum(layer.held_tokens().mean() for layer in cache.layers) / 2)
    text = here.chat.stats()
    assert f"tokens seen {len(here.fed):,}; a head holds {cache.held_tokens}, never more than 68" in text
    assert re.search(r"^sink +4\.0  4$", text, re.MULTILINE)
    assert re.search(rf"^sketch +{tiers[4 - 1]:.1f}  8$", text, re.MULTILINE)
    assert f"compressions {cache.stats['total_compressions']}, " in text
    assert "nothing was compacted yet" not in text
    for name in ("attended", "originals"):
        assert f"{name} " in text


# -- the script ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("streaming_chat", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(chat_folder):
    settings = [f"--{name}={value}" for name, value in SMALL.items()]
    return ["--model_name_or_path", str(chat_folder), "--device", "cpu", "--max_new_tokens", "8", *settings]


@pytest.fixture
def run_script(program, arguments, tmp_path):
    def run(*lines, options=()):
        path = tmp_path / "script.txt"
        path.write_text("\n".join(lines), encoding="utf-8")
        return program.main([*arguments, *options, "--script", str(path)])

    return run


def test_a_script_prints_its_turns_and_the_answers(run_script, capsys, talk):
    assert run_script("# a comment", "Hello", "", "/stats", "And?", "/quit", "never said") == 0
    printed = capsys.readouterr().out
    here = talk(max_new_tokens=8)
    first, seen, second = here.say("Hello"), len(here.fed), here.say("And?")
    assert first != second
    cut = "\n(cut: max_new_tokens)\n"
    assert printed.startswith(f"> Hello\n{first}{cut}> /stats\ntokens seen {seen}; ")
    assert printed.endswith(f"> And?\n{second}{cut}> /quit\n")


def test_every_command_of_the_help_is_one(run_script, program, capsys, tmp_path):
    names = re.findall(r"^/\w+", program.HELP, re.MULTILINE)
    assert names == ["/stats", "/recall", "/edit", "/again", "/save", "/load", "/reset", "/help", "/quit"]
    assert run_script("Hello", "/help", "/reset", "/stats", "/quit") == 0
    printed = capsys.readouterr().out
    assert program.HELP in printed
    assert "tokens seen 0;" in printed


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("/save", 2, "/save needs a path"),
        ("/statistics", 2, "unknown command /statistics; /help lists them"),
        pytest.param("/load missing.session", 1, "/load missing.session: ", marks=needs_sessions),
        pytest.param("/save no/such/folder/x", 1, "/save no/such/folder/x: ", marks=needs_sessions),
    ],
)
def test_a_script_ends_at_a_line_that_goes_wrong(run_script, capsys, line, code, message):
    assert run_script("Hello", line, "never said") == code
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    assert message in output.err
    assert output.out.endswith(f"> {line}\n")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--temperature", "-1"], 2, "temperature=-1.0"),
        (["--max_new_tokens", "0"], 2, "max_new_tokens=0"),
        (["--recent_size", "0"], 2, "recent_size=0"),
        (["--script", "missing.txt"], 1, "can't read --script missing.txt: No such file"),
        (["--model_name_or_path", "./missing"], 1, "can't load the model './missing'"),
    ],
)
def test_wrong_arguments_are_one_line(program, arguments, capsys, options, code, message):
    assert program.main([*arguments, *options]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_a_model_without_a_chat_template_is_one_line(program, tiny_model_folder, capsys):
    assert program.main(["--model_name_or_path", str(tiny_model_folder), "--device", "cpu"]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_settings_are_those_of_the_other_scripts_and_reach_the_cache(program, arguments, monkeypatch, run_script):
    seen = []
    monkeypatch.setattr("streaming_llm.chat.Chat.stats", lambda self: seen.append(self) or "")
    assert run_script("/stats", options=["--disable_residual_replay", "--replay_budget=0", "--rank=2", "--seed=5"]) == 0
    config = seen[0].cache.config
    assert (config.rank, config.seed, seen[0].seed, config.compression_interval) == (2, 5, 5, 16)
    assert (config.enable_residual_replay, config.enable_dual_fidelity, config.enable_adaptive_controller) == (0, 1, 1)


def typed(monkeypatch, *lines):
    """Have the prompt give these lines; an exception among them is raised."""
    waiting = list(lines)

    def answer(_):
        line = waiting.pop(0)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", answer)
    return waiting


def test_an_unknown_command_at_the_prompt_says_so_and_the_chat_goes_on(program, arguments, monkeypatch, capsys):
    typed(monkeypatch, "/nonsense", "/save", "  ", "Hello", EOFError())
    assert program.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "error: unknown command /nonsense; /help lists them\n" in printed
    assert "error: /save needs a path" in printed
    assert "(cut: max_new_tokens)" in printed


@pytest.mark.parametrize("way", [["/quit"], [EOFError()], [KeyboardInterrupt(), KeyboardInterrupt()]])
def test_the_ways_out_of_the_chat(program, arguments, monkeypatch, way):
    waiting = typed(monkeypatch, *way, "still there")
    assert program.main(arguments) == 0
    assert waiting == ["still there"]


def test_one_interrupt_at_the_prompt_only_clears_the_line(program, arguments, monkeypatch, capsys):
    waiting = typed(monkeypatch, KeyboardInterrupt(), "/help", KeyboardInterrupt(), EOFError())
    assert program.main(arguments) == 0
    assert waiting == []
    assert capsys.readouterr().out.count("Ctrl-C again") == 2


def start(arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, **options)


def read_until(process, mark="", least=0, seconds=120):
    """What the process writes, until `mark` and so many characters are there."""
    os.set_blocking(process.stdout.fileno(), False)
    text, end = b"", time.monotonic() + seconds
    while mark.encode() not in text or len(text) < least:
        assert time.monotonic() < end, text
        text += process.stdout.read(4096) or b""
        time.sleep(0.01)
    return text.decode("utf-8", "replace")


@pytest.fixture
def endless_folder(chat_folder, tmp_path):
    """The model of `chat_folder` with answers that never end: of two tokens of opposite logits one is above the end's 0."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(chat_folder), AutoTokenizer.from_pretrained(chat_folder)
    with torch.no_grad():
        weight = model.lm_head.weight
        weight[tokenizer.eos_token_id] = 0
        weight[tokenizer.convert_tokens_to_ids("b")] = -weight[tokenizer.convert_tokens_to_ids("a")]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.skipif(os.name == "nt", reason="sends a signal")
def test_a_real_interrupt_stops_the_answer_and_not_the_chat(arguments, endless_folder):
    arguments = [*arguments, "--model_name_or_path", str(endless_folder), "--max_new_tokens", "1000000"]
    # Tests that a shell runs in the background ignore interrupts, and so would what they start.
    process = start(arguments, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        read_until(process, "Ctrl-D leaves.\n> ")
        for _ in range(3):
            process.stdin.write(b"Hello\n")
            read_until(process, "Hello\n")
            read_until(process, least=100)
            process.send_signal(signal.SIGINT)
            assert "\n(stopped)\n> " in read_until(process, "(stopped)\n> ")
        process.send_signal(signal.SIGINT)
        assert "(Ctrl-C again or Ctrl-D leaves)" in read_until(process, "leaves)\n> ")
        process.stdin.write(b"/stats\n")
        assert re.search(r"a head holds (\d+), never more than 68", read_until(process, "adjustments"))
        process.stdin.close()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.stdout.close()


@needs_sessions
# That a file is enough in another process tests/test_session.py shows quickly.
@pytest.mark.parametrize("where", ["here", pytest.param("in a new process", marks=pytest.mark.slow)])
def test_a_saved_conversation_goes_on_with_the_same_answer(run_script, arguments, tmp_path, capsys, where):
    options = ["--temperature", "1", "--seed", "4"]
    path = tmp_path / "a conversation.session"
    say = "This is a turn of some length, and then there is more."
    assert run_script(say, say, f"/save {path}", "And?", options=options) == 0
    answer = capsys.readouterr().out.partition("> And?\n")[2]
    if where == "here":
        assert run_script(f"/load {path}", "And?", options=options) == 0
        output = capsys.readouterr().out
    else:
        (tmp_path / "next.txt").write_text(f"/load {path}\nAnd?\n", encoding="utf-8")
        process = start([*arguments, *options, "--script", str(tmp_path / "next.txt")])
        output = process.communicate(timeout=300)[0].decode()
        assert process.returncode == 0
    assert len(answer.strip()) > 8
    assert output.partition("> And?\n")[2] == answer


@needs_sessions
def test_a_conversation_saved_with_a_cut_turn_has_that_turn_ended(talk, tmp_path):
    here = talk(max_new_tokens=5)
    here.say("Hello", "Hi.")
    strike_at(here, 2)
    with pytest.raises(KeyboardInterrupt):
        here.say(LONG)
    here.chat.save(tmp_path / "session")
    assert here.tokenizer.decode(here.fed).endswith("<|im_end|>\n<|im_start|>assistant\n")
    there = talk(max_new_tokens=5)
    there.chat.load(tmp_path / "session")
    assert there.chat.cache.get_seq_length() == len(here.fed)
    assert there.say("And?") == here.say("And?")
    assert there.tokenizer.decode(there.fed).startswith("<|im_end|>\n<|im_start|>user\nAnd?")


@needs_sessions
def test_a_load_that_fails_leaves_the_conversation(talk, tmp_path):
    here = talk()
    here.say("Hello", "Hi.")
    (tmp_path / "broken").write_bytes(b"nothing")
    with pytest.raises(ValueError):
        here.chat.load(tmp_path / "broken")
    here.say("And?", "x")
    assert here.tokenizer.decode(here.fed).endswith(
        "Hi.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nx"
    )


# -- templates that render earlier turns otherwise -----------------------------------------------------------------------

# As QwQ and R1 have it: the prompt opens the thinking, of which earlier answers keep nothing.
THINKING = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]").replace(
    "assistant\n{", "assistant\n<think>{"
)
LAST_MARKED = CHATML.replace("<|im_end|>", "{% if loop.last %}!{% endif %}<|im_end|>")
WIDE = {"recent_size": 400, "compression_interval": 200}


@pytest.mark.parametrize("template", [THINKING, LAST_MARKED, TRIMMED], ids=["thinking", "last marked", "trimmed"])
def test_what_the_template_renders_of_earlier_turns_is_what_the_cache_has_read(talk, template):
    here, said = talk(template, cache=WIDE), []
    for user, answer in (("Hello?", "Hm, well.</think>Hi. "), ("And?", "I think so</think>Yes."), ("Bye", " one two")):
        assert here.say(user, answer) == answer
        said += [user, answer]
        rendered = here.ids(here.chat._render(*said[:-1])) + here.ids(answer)
        assert here.chat.cache.seen_tokens.whole()[0].tolist() == rendered


def test_a_turn_that_can_not_be_taken_back_stays_as_it_was_read(talk):
    here = talk(THINKING)
    thought = "Hm, " * 30 + "</think>Hi."
    here.say("Hello?", thought)
    before = here.chat.cache.get_seq_length()
    assert here.say("And?", "Well</think>Yes.") == "Well</think>Yes."
    assert here.chat.cache.seen_tokens.whole()[0, :before].tolist() == here.fed[:before]
    assert here.chat.cache.get_seq_length() == len(here.fed)


def test_what_comes_after_a_turn_that_is_taken_back_is_no_longer_than_the_turns(talk):
    here = talk(THINKING, cache=WIDE)
    here.say("Hello?", "Hm, well.</think>Hi.")
    assert here.chat._last is not None
    here.chat.reset()
    assert here.chat._last is None
    here.say("Hello?", "Hm, well.</think>Hi.")
    read = len(here.fed)
    here.say("And?", "x</think>y")
    # The answer without its thinking is read again, and no more of what was before it.
    assert here.tokenizer.decode(here.fed[read:]).startswith("Hi.<|im_end|>\n<|im_start|>user\nAnd?")
