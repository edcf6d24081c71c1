"""What a memory is for: facts, needles, a table, a variable, a passage and a name, asked for once the text was read.

With no argument: SmolLM2-135M-Instruct, texts of 2,048 and 6,144 tokens, 516 tokens a head. Ends with a table and writes
`results.json` and `memory.png` into `--output_dir`.
"""

import sys


def run() -> int:
    from streaming_llm.evaluation.memory import Memory

    return Memory.main()


if __name__ == "__main__":
    try:
        sys.exit(run())
    except KeyboardInterrupt:  # while the libraries are still being imported; `main` handles the rest
        sys.exit(130)
