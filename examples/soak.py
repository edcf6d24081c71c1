"""Send a million random tokens through a tiny random model and check the cache after every forward pass.

Prints a summary; exits with 1 at the first violation of what must always hold.
"""

import sys


def run() -> int:
    from streaming_llm.evaluation.soak import Soak

    return Soak.main()


if __name__ == "__main__":
    try:
        sys.exit(run())
    except KeyboardInterrupt:  # while the libraries are still being imported; `main` handles the rest
        sys.exit(130)
