"""Builds the CPU kernels: one library for each instruction set, the best of which is chosen at run time.

Everything else about the package is in pyproject.toml. Where no C++17 compiler is found the build goes on without them: quire then
runs its CPU steps through XLA alone, and says so (`quire env`, the log at start).
"""

import copy
import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNELS = Path("kernels")
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
INSTRUCTION_SETS = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS |= {"avx2": _AVX2, "avx512": _AVX512, "avx512bf16": [*_AVX512, "-mavx512bf16", "-mavx512vnni"]}

FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    # Contraction would fuse a multiply and an add in one place and not in another, and a row's bits would depend on its batch.
    "-ffp-contract=off",
    "-fno-math-errno",
    # The same memory is words to one loop and floats or bfloat16 to the next, which a compiler may otherwise take for impossible.
    "-fno-strict-aliasing",
]


class BuildKernels(build_ext):
    """Compiles in parallel, against the headers of the jaxlib at hand, into libraries that no Python version is tied to."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def run(self) -> None:
        import jaxlib  # a build requirement: not there yet when setup.py is only asked for metadata

        headers = Path(jaxlib.__file__).parent / "include"
        for extension in self.extensions:
            extension.extra_compile_args += ["-isystem", str(headers)]
        super().run()

    def build_extension(self, ext: Extension) -> None:
        # All libraries come from the same sources, at the same time: each needs a place of its own for its objects.
        apart = copy.copy(self)
        apart.build_temp = os.path.join(self.build_temp, ext.name)
        super(BuildKernels, apart).build_extension(ext)

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3 on this kind of machine: the libraries use nothing of Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform_tag = super().get_tag()
        return "py3", "none", platform_tag


def kernels(name: str, flags: list[str]) -> Extension:
    return Extension(
        f"quire.kernels.native.quire_cpu_{name}",
        sources=sorted(map(str, KERNELS.glob("*/cpu.cc"))),
        depends=sorted(map(str, KERNELS.glob("*/*.h"))),
        include_dirs=[str(KERNELS / "native")],
        define_macros=[("NDEBUG", None)],
        extra_compile_args=[*FLAGS, *flags],
        language="c++",
        optional=True,
    )


setup(
    ext_modules=[kernels(name, flags) for name, flags in INSTRUCTION_SETS.items()],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
