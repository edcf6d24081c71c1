"""RULER's tasks that need no download, through lm-eval, for every method: one table.

With no argument: SmolLM2-135M-Instruct, 2,048 to 16,384 tokens, 516 tokens a head, 20 questions a task: hours on a CPU, so
begin with `--lengths 2048 --limit 3`. Ends with a table and writes `results.json` into `--output_dir`.
"""

import sys


def run() -> int:
    from streaming_llm.evaluation.ruler import Ruler

    return Ruler.main()


if __name__ == "__main__":
    try:
        sys.exit(run())
    except KeyboardInterrupt:  # while the libraries are still being imported; `main` handles the rest
        sys.exit(130)
