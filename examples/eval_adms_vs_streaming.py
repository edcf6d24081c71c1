"""Compare ADMS and StreamingLLM at equal tokens a head with the full cache, on one stream of text.

With no argument: SmolLM2-135M-Instruct on the shipped novel, *Pride and Prejudice*, ADMS with all four ADM++
modules on. Ends with a table and writes `results.json` and `perplexity.png` into `--output_dir`.
"""

import sys


def run() -> int:
    from streaming_llm.evaluation.comparison import Comparison

    return Comparison.main()


if __name__ == "__main__":
    try:
        sys.exit(run())
    except KeyboardInterrupt:  # while the libraries are still being imported; `main` handles the rest
        sys.exit(130)
