"""Compiles the native kernels beside the package, where there is a C++ compiler; without one everything else installs.

All else about the package is in pyproject.toml.
"""

import importlib.util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOM = Path("src", "intarsia", "ops", "native")
spec = importlib.util.spec_from_file_location("native_build", ROOM / "build.py")
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)


class BuildNative(build_ext):
    """A library is loaded by ctypes: it needs no Python headers, and its name no version of Python."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or True  # the levels are compiled side by side

    def build_extension(self, ext: Extension) -> None:
        level = ext.name.rpartition("lib_")[2]
        try:
            native.compile_level(level, Path(self.get_ext_fullpath(ext.name)))
        except native.BuildError as error:
            raise CompileError(str(error)) from error  # a warning: the extension is optional

    def get_ext_filename(self, name: str) -> str:
        return str(Path(*name.split("."))) + ".so"


setup(
    ext_modules=[Extension(f"intarsia.ops.native.lib_{level}", [], optional=True) for level in native.levels()],
    cmdclass={"build_ext": BuildNative},
)
