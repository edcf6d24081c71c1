"""Print the comparison of every method in `--methods`, all at equal tokens a head, also as a Markdown table.

Takes the flags of `eval_adms_vs_streaming.py`; with no argument it runs every method there is.
"""

import sys


def run() -> int:
    from streaming_llm.evaluation.cli import main
    from streaming_llm.evaluation.methods import METHODS

    return main(
        prog="compare_methods.py",
        description="Compare every method at equal tokens a head on one stream of text; prints the table in Markdown too.",
        methods=tuple(METHODS),
        output_dir="results/compare_methods",
        markdown=True,
    )


if __name__ == "__main__":
    try:
        sys.exit(run())
    except KeyboardInterrupt:  # while the libraries are still being imported; `main` handles the rest
        sys.exit(130)
