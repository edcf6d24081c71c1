"""Print the comparison of every method in `--methods`, all at equal tokens a head, also as a Markdown table.

Takes the flags of `eval_adms_vs_streaming.py`; with no argument it runs every method there is.
"""

import sys


def run() -> int:
    from streaming_llm.evaluation.comparison import EveryMethod

    return EveryMethod.main()


if __name__ == "__main__":
    try:
        sys.exit(run())
    except KeyboardInterrupt:  # while the libraries are still being imported; `main` handles the rest
        sys.exit(130)
