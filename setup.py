"""Where the packages lie, and the compiled library inside the wheel when VQKERNELS_PREBUILD=1 asks for it."""

from __future__ import annotations

import os

from setuptools import setup

PACKAGES = {
    "vqkernels": "vqkernels",
    "vqkernels.kernels": "vqkernels/kernels",
    "vqkernels.ops": "vqkernels/ops",
    "vqkernels.nn": "vqkernels/nn",
    "vqkernels.compat": "vqkernels/compat",
    "vqkernels.cli": "vqkernels/cli",
    "vqkernels.profiling": "vqkernels/profiling",
    "vqkernels.models": "models",
    "vqkernels.models.configs": "models/configs",
    "vqkernels.benchmarks": "benchmarks",
    "vqkernels.csrc": "csrc",
    "vqkernels.csrc.cpu": "csrc/cpu",
    "vqkernels.csrc.cuda": "csrc/cuda",
}


def _prebuilt() -> dict:
    """The C++ extension as part of the wheel; needs torch at build time (--no-build-isolation)."""
    if os.environ.get("VQKERNELS_PREBUILD") != "1":
        return {}
    import importlib.util

    from torch.utils.cpp_extension import BuildExtension, CppExtension

    spec = importlib.util.spec_from_file_location("_extension", "vqkernels/_extension.py")
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    return {
        "ext_modules": [
            CppExtension(
                "vqkernels._C",
                [str(path) for path in extension.cpu_sources(root="csrc")],
                extra_compile_args=extension.CPU_FLAGS,
                py_limited_api=True,
            )
        ],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={
        "vqkernels": ["py.typed"],
        "vqkernels.kernels": ["*.json"],
        "vqkernels.models.configs": ["*.yaml", "*/*.yaml"],
        "vqkernels.csrc": ["*.h", "*.cpp"],
        "vqkernels.csrc.cpu": ["*.h", "*.cpp"],
        "vqkernels.csrc.cuda": ["*.h", "*.cuh", "*.cu"],
    },
    **_prebuilt(),
)
