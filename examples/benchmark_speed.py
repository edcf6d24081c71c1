"""Measure how fast caches decode and read from short histories to long ones, and the memory they take at the peak.

With no argument: SmolLM2-135M-Instruct in float32, histories of 516 to 65,536 tokens, then a document of 20,000 tokens read
in passes of several sizes. Ends with two tables and writes `speed.json` and `speed.png` into `--output_dir`.
"""

import sys


def run() -> int:
    from streaming_llm.evaluation.speed import Speed

    return Speed.main()


if __name__ == "__main__":
    try:
        sys.exit(run())
    except KeyboardInterrupt:  # while the libraries are still being imported; `main` handles the rest
        sys.exit(130)
