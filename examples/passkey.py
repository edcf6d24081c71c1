"""Hide a pass key in streams longer than the model was trained on, ask for it at the end, and count how often it is found.

With no argument: SmolLM2-135M-Instruct, 16,384 and 32,768 tokens, 1,028 tokens a head. Ends with a table and writes
`results.json` into `--output_dir`.
"""

import sys


def run() -> int:
    from streaming_llm.evaluation.passkey import Passkey

    return Passkey.main()


if __name__ == "__main__":
    try:
        sys.exit(run())
    except KeyboardInterrupt:  # while the libraries are still being imported; `main` handles the rest
        sys.exit(130)
