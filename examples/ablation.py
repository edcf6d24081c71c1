"""Measure what each of the four ADM++ modules brings, alone and one on top of another, at equal tokens a head.

With no argument: SmolLM2-135M-Instruct on the shipped novel, *Pride and Prejudice*, at 260 and 516 tokens a head.
Ends with a table for each text and budget and writes `ablation.json` and `ablation.png` into `--output_dir`.
"""

import sys


def run() -> int:
    from streaming_llm.evaluation.ablation import Ablation

    return Ablation.main()


if __name__ == "__main__":
    try:
        sys.exit(run())
    except KeyboardInterrupt:  # while the libraries are still being imported; `main` handles the rest
        sys.exit(130)
