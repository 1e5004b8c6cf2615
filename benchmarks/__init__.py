"""Speed, memory and correctness of the ops beside what else a user could run: ``vqkernels bench``.

``run_bench(BenchConfig(operation="search", shape=["4096,1024,256"]))`` of ``main`` and ``config`` is the whole of it.
"""
