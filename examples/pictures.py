"""Draw what a cache holds: its memory map, its budgets over time, and the text that the last step read again lit up.

With no argument: SmolLM2-135M-Instruct on 3,072 tokens of *Pride and Prejudice*, ADM++ with recall. Writes `memory_map.png`,
`budgets.png`, `reading.png` and `results.json` into `--output_dir`.
"""

import sys


def run() -> int:
    from streaming_llm.evaluation.pictures import Pictures

    return Pictures.main()


if __name__ == "__main__":
    try:
        sys.exit(run())
    except KeyboardInterrupt:  # while the libraries are still being imported; `main` handles the rest
        sys.exit(130)
