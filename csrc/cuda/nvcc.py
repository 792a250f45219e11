"""The CUDA compiler: where it is, which GPUs it knows, what it is told.  setup.py and resources.py ask here."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

# No --use_fast_math: infinities and NaN have a meaning here, and subnormal numbers count.
# `-v` of ptxas prints what each kernel needs: registers, stack, spills.
FLAGS = ["-std=c++17", "-O3", "-Xptxas", "-v"]
DEFAULT_ARCHITECTURES = "80 90 100"


class Missing(Exception):
    """What keeps CUDA kernels from being built, and what to do about it."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA compiler that runs."""

    command: list[str]
    known: list[str]
    """Architectures, such as 90."""
    libraries: str
    """Where libcudart_static.a is."""

    def knows(self, architecture: str) -> bool:
        """Whether `architecture` is one of this compiler's: 90, or with the features of that one GPU, 90a."""
        found = re.fullmatch(r"(\d+)([af]?)", architecture)
        return found is not None and found[1] in self.known and (not found[2] or int(found[1]) >= 90)

    def wanted(self) -> list[str]:
        """FASTDIV_CUDA_ARCHS; where it is not set, those of the default that this compiler knows."""
        if text := os.environ.get("FASTDIV_CUDA_ARCHS", ""):
            wanted = list(dict.fromkeys(re.split(r"[\s,;]+", text.strip(" ,;"))))
            if strange := [architecture for architecture in wanted if not self.knows(architecture)]:
                known = " ".join(self.known)
                raise SystemExit(f"fastdiv: FASTDIV_CUDA_ARCHS takes what {self.command[0]} knows, {known}, "
                                 f"with a (90a) for features of that one GPU; got {strange[0]!r}")  # fmt: skip
            return wanted
        return [architecture for architecture in DEFAULT_ARCHITECTURES.split() if self.knows(architecture)]


def gencode(architectures: list[str]) -> tuple[list[str], list[str]]:
    """Flags for machine code of each and PTX of the newest plain one, for GPUs to come; and what that makes."""
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    made = [f"sm_{name}" for name in architectures]
    if plain := [int(name) for name in architectures if name.isdigit()]:
        flags.append(f"-gencode=arch=compute_{max(plain)},code=compute_{max(plain)}")
        made.append(f"ptx_{max(plain)}")
    return flags, made


def find() -> Toolkit:
    """The compiler that NVCC names (arguments may follow), else nvcc on PATH or under CUDA_HOME.

    Raises:
        Missing: there is none, or it does not run, or it is too old, or its runtime library is not there.
    """
    if command := shlex.split(os.environ.get("NVCC", "")):
        if not shutil.which(command[0]):
            raise Missing(f"no nvcc (NVCC={os.environ['NVCC']!r}): let NVCC name one")
    else:
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        places = os.pathsep.join([os.environ.get("PATH", os.defpath), os.path.join(home, "bin")])
        if not (found := shutil.which("nvcc", path=places)):
            raise Missing("no nvcc on PATH or under CUDA_HOME: install CUDA's compiler or let NVCC name it")
        command = [found]

    known = sorted(re.findall(r"sm_(\d+)", _ask(command, "--list-gpu-code")), key=int)
    if "90" not in known:
        raise Missing(f"{command[0]} knows no sm_90: install CUDA 11.8 or newer")
    # What nvcc itself would give the linker: it may be a script, far from where its libraries are.
    places = _ask(command, "-dryrun", "any.cu")
    for place in re.findall(r'"-L([^"]+)"', places):
        if Path(place, "libcudart_static.a").exists():
            return Toolkit(command, known, os.path.realpath(place))
    raise Missing(f"no libcudart_static.a beside {command[0]}: install CUDA's runtime library for development")


def _ask(command: list[str], *question: str) -> str:
    try:
        result = subprocess.run([*command, *question], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise Missing(f"{command[0]} does not run ({error}): let NVCC name another") from None
    if result.returncode:
        said = (result.stdout.splitlines() or [f"status {result.returncode}"])[0]
        raise Missing(f"{command[0]} does not run ({said}): let NVCC name another")
    return result.stdout
