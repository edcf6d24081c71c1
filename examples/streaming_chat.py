"""Chat in the terminal for as long as you like: the cache is bounded, and each turn gives the model its new tokens only.

With no argument: SmolLM2-135M-Instruct and ADM++. `/help` lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.
"""

import logging
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELP = """\
/stats       what the cache holds: tokens by tier, bytes, counters
/recall      what the last answer read again, at its end, of what had left the window (with --enable_recall)
/edit N TEXT say TEXT in place of what you said in turn N (1: the first; -1: the last), and forget what came after
/again N     answer turn N anew (the last one without N)
/save PATH   write the conversation to a file
/load PATH   go on with a conversation that was saved, in place of this one
/reset       forget everything said
/help        this list
/quit        leave (so does Ctrl-D)
Ctrl-C stops an answer; what was said of it stays in the conversation."""
ENDINGS = {"stopped": "(stopped)", "length": "(cut: max_new_tokens)"}
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
MOST_HISTORY = 1000


def parser():
    """The parser of the command line."""
    from streaming_llm.evaluation import flags
    from streaming_llm.evaluation.methods import DEFAULT_MIDDLE, DEFAULT_RECENT

    @dataclass
    class Arguments(flags.Model):
        system: str | None = flags.argument("system message (that of the model's chat template)", metavar="TEXT")
        max_new_tokens: int = flags.count("most tokens of an answer (%(default)s)", 512)
        temperature: float = flags.argument("of the sampling; 0: the likeliest token (%(default)s)", 0.0, metavar="T")
        top_p: float = flags.argument("sample from this much probability (%(default)s: all)", 1.0, metavar="P")
        script: str | None = flags.argument(
            "take the turns from a file, one a line; # begins a comment (the terminal)", metavar="FILE"
        )
        log_level: str = flags.argument("what is logged; INFO: the cache's state (%(default)s)", "WARNING", choices=LEVELS)

    description = "Chat in the terminal, in bounded memory however long it gets."
    return flags.Parser("streaming_chat.py", description, Arguments, (DEFAULT_RECENT, DEFAULT_MIDDLE))


def main(argv: Sequence[str] | None = None) -> int:
    from streaming_llm.evaluation.run import exit_code

    given = parser().parse(sys.argv[1:] if argv is None else argv)
    return exit_code("streaming_chat.py", lambda: run(*given))


def checked(arguments, settings: Mapping[str, Any]):
    """The plan of the cache and the chat's settings. Raises `ValueError` for what is wrong with either."""
    from streaming_llm.chat import check_answer_settings
    from streaming_llm.evaluation import plan_methods, resolve_settings

    [plan] = plan_methods(["adms"], resolve_settings(settings))
    answers = {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_p")}
    check_answer_settings(**answers)
    return plan, answers


def run(arguments, settings: Mapping[str, Any]) -> int:
    import transformers

    from streaming_llm.chat import Chat
    from streaming_llm.evaluation import cache_factory, load_model

    # All that can be wrong with the arguments is found before the weights are loaded.
    plan, answers = checked(arguments, settings)
    script = None if arguments.script is None else read_script(arguments.script)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("streaming_llm").setLevel(arguments.log_level)
    logging.getLogger("streaming_llm.evaluation").setLevel(min(logging.INFO, logging.getLevelName(arguments.log_level)))
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load_model(arguments.model_name_or_path, arguments.dtype, arguments.device)
    seed = settings.get("seed", 0)
    chat = Chat(model, tokenizer, cache_factory(model, plan)(), system=arguments.system, seed=seed, **answers)
    if script is None:
        return converse(chat)
    follow(chat, script)
    return 0


def read_script(path: str) -> list[str]:
    """The turns and commands in a file, without comments and empty lines."""
    from streaming_llm.evaluation import EvaluationError

    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise EvaluationError(f"can't read --script {path}: {getattr(error, 'strerror', None) or error}") from error
    return [line for line in lines if line.strip() and not line.startswith("#")]


def follow(chat, lines: Iterable[str]) -> None:
    """Say the lines of a script; the first that goes wrong ends it."""
    for line in lines:
        print(f"> {line}", flush=True)
        if is_quit(line):
            return
        take(chat, line)


def converse(chat) -> int:
    """Talk with whoever is at the terminal, until the end of the input, /quit, or Ctrl-C twice at the prompt."""
    config = chat.cache.config
    print(f"At most {config.expected_max_tokens:,} tokens a head are held. /help lists the commands, Ctrl-D leaves.")
    read = line_reader()
    leaving = False
    while True:
        try:
            line = read()
            leaving = False
            if is_quit(line):
                return 0
            if line.strip():
                take(chat, line, interruptible=True)
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
            if leaving:
                return 0
            leaving = True
            print("(Ctrl-C again or Ctrl-D leaves)")
        except (OSError, RuntimeError, ValueError) as error:
            print(f"error: {error}")


def line_reader() -> Callable[[], str]:
    """A function that prompts for a line; with editing and a bounded history on a terminal, where Python has readline."""
    if not sys.stdin.isatty():

        def echoed() -> str:
            line = input("> ")
            print(line, flush=True)
            return line

        return echoed
    try:
        import readline
    except ImportError:
        return lambda: input("> ")
    # A text of several lines that is pasted is one turn; Python turns this off by itself.
    readline.parse_and_bind("set enable-bracketed-paste on")

    def edited() -> str:
        while readline.get_current_history_length() > MOST_HISTORY:
            readline.remove_history_item(0)
        return input("> ")

    return edited


def is_quit(line: str) -> bool:
    return line.split()[:1] == ["/quit"]


def take(chat, line: str, interruptible: bool = False) -> None:
    """Obey a command, or say a turn and print the answer as it comes. Raises what went wrong."""
    pieces = said_anew(chat, line)
    if pieces is None and line.startswith("/"):
        print(obey(chat, line), flush=True)
        return
    if interruptible:
        # Not KeyboardInterrupt: that could strike in the middle of a compaction.
        before = signal.signal(signal.SIGINT, lambda *_: chat.stop())
    try:
        for piece in chat.say(line) if pieces is None else pieces:
            print(piece, end="", flush=True)
    finally:
        if interruptible:
            signal.signal(signal.SIGINT, before)
        print(flush=True)
    if chat.ending in ENDINGS:
        print(ENDINGS[chat.ending], flush=True)


def said_anew(chat, line: str) -> Iterator[str] | None:
    """The answer to a turn that `/edit` or `/again` takes back and says; None where the line is another one."""
    name, _, rest = line.partition(" ")
    if name not in ("/edit", "/again"):
        return None
    number, _, text = rest.strip().partition(" ")
    known = ["-1", *(str(own + 1) for own in chat.turns)]
    if number not in (known if name == "/edit" else [*known, ""]) or (name == "/edit" and not text.strip()):
        usage = "the number of a turn and a text" if name == "/edit" else "the number of a turn, or none for the last"
        raise ValueError(f"{line.strip()}: it needs {usage}; the cache can go back to: {', '.join(known[1:]) or 'none'}")
    turn = int(number or -1) - (number not in ("", "-1"))
    return chat.edit(turn, text.strip()) if name == "/edit" else chat.regenerate(turn)


def passages(chat) -> str:
    """What the last answer recalled, strongest first, in lines."""
    found = chat.recalled()
    if not found:
        return "nothing was recalled (what left the window can be, with --enable_recall)"
    return "\n".join(f"{weight:7.2%}  ...{' '.join(text.split())}..." for weight, text in found)


def obey(chat, line: str) -> str:
    """Carry out a command; what there is to say of it."""
    from streaming_llm.evaluation import EvaluationError

    name, _, path = (part.strip() for part in line.partition(" "))
    if name in ("/save", "/load"):
        if not path:
            raise ValueError(f"{name} needs a path")
        action, done = (chat.save, "saved to") if name == "/save" else (chat.load, "going on with")
        try:
            action(Path(path).expanduser())
        except (OSError, RuntimeError, ValueError) as error:
            raise EvaluationError(f"{name} {path}: {error}") from error
        return f"{done} {path}: {chat.cache.get_seq_length():,} tokens"
    if name == "/stats":
        return chat.stats()
    if name == "/recall":
        return passages(chat)
    if name == "/reset":
        chat.reset()
        return "everything said is forgotten"
    if name == "/help":
        return HELP
    raise ValueError(f"unknown command {name}; /help lists them")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # while the libraries are still being imported; `main` handles the rest
        sys.exit(130)
