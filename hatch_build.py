"""Compile the codec's kernels into the wheel; without a C compiler the codec runs in torch.

A wheel with kernels is for one platform, and for every Python on it: they do not use Python's ABI.
An editable install finds them beside their source.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = "src/kvprism/codec/libkvprism.so"


class Kernels(BuildHookInterface):
    """`scripts/build-codec`, run when kvprism is installed or a wheel is built."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        script = Path(self.root) / "scripts" / "build-codec"
        if subprocess.run([sys.executable, str(script)]).returncode:
            # What earlier sources left must not be taken for these ones'.
            (Path(self.root) / LIBRARY).unlink(missing_ok=True)
            self.app.display_warning("kvprism without C kernels: see `kvprism doctor`")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data.update(pure_python=False, tag=f"py3-none-{platform}")
        build_data["artifacts"].append(LIBRARY)
