"""Show what each ADM++ module does on a small case made for it (random tensors, no model) as a Markdown table."""

import sys


def run() -> int:
    from streaming_llm.evaluation.cases import Cases

    return Cases.main()


if __name__ == "__main__":
    try:
        sys.exit(run())
    except KeyboardInterrupt:  # while the libraries are still being imported; `main` handles the rest
        sys.exit(130)
