"""``python -m vqkernels.benchmarks search --shape 4096,1024,256``: the same as ``vqkernels bench``."""

from __future__ import annotations

import sys

from .config import parse_arguments


def main(words: list[str] | None = None) -> int:
    """The command line: see ``--help``. Returns 0; 1 where ours was wrong or a goal was missed; 2 for a mistake."""
    try:
        config = parse_arguments(sys.argv[1:] if words is None else words, "python -m vqkernels.benchmarks")
        from .main import exit_code, run_bench  # after the words are understood: it imports torch

        return exit_code(run_bench(config))
    except ValueError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
