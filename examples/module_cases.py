"""Show what each ADM++ module does on a small case made for it (random tensors, no model) as a Markdown table."""

import sys


def run() -> int:
    from streaming_llm.evaluation.cases import markdown, run_cases

    print(markdown(run_cases()))
    return 0


if __name__ == "__main__":
    sys.exit(run())
