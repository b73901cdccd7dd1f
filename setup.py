"""Builds csrc/ into vitfast/_native with CMake and ninja. Metadata is in pyproject.toml.

An install never fails for want of the extension: without a compiler, or when the build breaks, the
reason is written to vitfast/_build_info.py, which `vitfast info` and error messages quote. Whoever
asks for the extension itself (`build_ext --inplace`, or CMAKE_ARGS set) gets the error instead.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildError(Exception):
    """Why there is no extension, in one line."""


def find_tool(name: str) -> str:
    """A program on the PATH, or beside this Python, where pip puts the cmake and ninja packages."""
    found = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if found is None:
        raise BuildError(f"no {name} found")
    return found


def check_compiler() -> None:
    named = os.environ.get("CXX")
    if named:
        program = shlex.split(named)[0]
        if shutil.which(program) is None:
            raise BuildError(f"no C++ compiler found (CXX={named})")
    elif not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        raise BuildError("no C++ compiler found")


def pybind11_dir() -> str:
    try:
        import pybind11
    except ImportError:
        raise BuildError(f"pybind11 is not installed for {sys.executable}") from None
    return pybind11.get_cmake_dir()


def run(step: str, command: list[str]) -> None:
    """Run, showing the output as it comes; on failure quote the first error in it."""
    print("+", shlex.join(command), flush=True)
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line.strip())
    if process.returncode:
        raise BuildError(f"{step} failed: {first_error(lines) or f'exit {process.returncode}'}")


def first_error(lines: list[str]) -> str:
    for i, line in enumerate(lines):
        if line.startswith("CMake Error"):  # the text is in the lines below
            text = [after for after in lines[i + 1 : i + 6] if after and after[:2] != "--"]
            return " ".join(text[:2]) or line
        if re.search(r"\berror\b:?", line, re.IGNORECASE):
            return line.replace(f"{ROOT}{os.sep}", "")
    return ""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One build at a time in a folder. The kernel drops the lock when its holder dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        with contextlib.suppress(ImportError):  # Windows
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cmake_build(folder: Path) -> Path:
    """The extension, built in `folder` (which is kept, so that the next build is incremental)."""
    check_compiler()
    cmake, ninja, pybind11 = find_tool("cmake"), find_tool("ninja"), pybind11_dir()
    configure = [
        cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(folder),
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11}",
        *shlex.split(os.environ.get("CMAKE_ARGS", "")),
    ]  # fmt: skip
    key = "\n".join([*configure, os.environ.get("CXX", ""), os.environ.get("CXXFLAGS", "")])
    stamp = folder / "configured.txt"
    if not stamp.exists() or stamp.read_text() != key:
        # CMake caches paths, and those of an isolated build are gone by the next one.
        (folder / "CMakeCache.txt").unlink(missing_ok=True)
        shutil.rmtree(folder / "CMakeFiles", ignore_errors=True)
    run("cmake", configure)
    stamp.write_text(key)
    jobs = [] if "CMAKE_BUILD_PARALLEL_LEVEL" in os.environ else ["--parallel", str(cores())]
    run("compiling", [cmake, "--build", str(folder), *jobs])
    built = [f for f in folder.glob("_native*") if f.suffix in (".so", ".pyd")]
    if len(built) != 1:
        raise BuildError(f"expected one extension in {folder}, found {len(built)}")
    return built[0]


def cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class BuildPy(build_py):
    def run(self) -> None:
        if not self.editable_mode:  # files deleted since the last build must not reach the wheel
            shutil.rmtree(Path(self.build_lib, "vitfast"), ignore_errors=True)
        super().run()
        if not self.editable_mode:  # compiled where the GPU is, see vitfast/runtime/cuda.py
            folder = Path(self.build_lib, "vitfast", "_cuda")
            folder.mkdir(parents=True, exist_ok=True)
            for source in sorted((ROOT / "csrc" / "cuda").iterdir()):
                shutil.copyfile(source, folder / source.name)


class BuildExt(build_ext):
    def run(self) -> None:
        self.asked_inplace = self.inplace  # the base class clears it while it builds
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        folder = Path(self.build_temp).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        status = "built"
        with locked(folder):
            try:
                replace(target, cmake_build(folder).read_bytes())
            except BuildError as error:
                if "CMAKE_ARGS" in os.environ or (self.asked_inplace and not self.editable_mode):
                    raise SystemExit(f"vitfast: {error}") from None
                target.unlink(missing_ok=True)
                status = str(error)
                self.warn(f"installing without native CPU kernels: {status}")
            compiler = folder / "compiler.txt"
            info = f"NATIVE_STATUS = {status!r}\nCOMPILER = "
            info += f"{compiler.read_text() if compiler.exists() else None!r}\n"
        replace(target.with_name("_build_info.py"), info.encode())
        if self.asked_inplace or (ROOT / ".git").exists():
            self.copy_to_checkout(target, info)

    def copy_extensions_to_source(self) -> None:
        """Done above, and so that a process using the old file is not disturbed."""

    def copy_to_checkout(self, target: Path, info: str) -> None:
        """Python started in a checkout imports the package from there, not the installed one, so
        the checkout gets a copy of what was built for the installation."""
        inplace = ROOT / "vitfast" / target.name
        with contextlib.suppress(PermissionError):
            if target.exists():
                replace(inplace, target.read_bytes())
            if target.exists() or not inplace.exists():
                replace(inplace.with_name("_build_info.py"), info.encode())


def replace(path: Path, content: bytes) -> None:
    """Write through a second name: a running process keeps the file that it has mapped."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    draft.write_bytes(content)
    draft.chmod(0o644)
    draft.replace(path)


setup(
    ext_modules=[Extension("vitfast._native", sources=[], optional=True)],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
)
