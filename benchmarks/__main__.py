"""``python -m vqkernels.benchmarks search --shape 4096,1024,256``: another name of ``vqkernels bench``.

A way in, not a part of this room: it hands its words to the command line and imports nothing from it.
"""

from __future__ import annotations

import runpy
import sys

if __name__ == "__main__":
    sys.argv = ["vqkernels", "bench", *sys.argv[1:]]
    runpy.run_module("vqkernels.cli.main", run_name="__main__")
