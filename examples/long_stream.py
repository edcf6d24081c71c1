"""Stream a text many times longer than the model was trained on and show that nothing breaks, grows or slows down.

With no argument: SmolLM2-135M-Instruct on 65,536 tokens of *Pride and Prejudice*, 1,028 tokens a head. Ends with two tables
and writes `results.json` and `perplexity.png` into `--output_dir`.
"""

import sys


def run() -> int:
    from streaming_llm.evaluation.long_stream import LongStream

    return LongStream.main()


if __name__ == "__main__":
    try:
        sys.exit(run())
    except KeyboardInterrupt:  # while the libraries are still being imported; `main` handles the rest
        sys.exit(130)
