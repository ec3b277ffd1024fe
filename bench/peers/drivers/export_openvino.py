"""Exports a Hugging Face folder for OpenVINO GenAI: EXPORT_OPENVINO.py FOLDER RESULT. Runs in an environment with optimum-intel.

The graph keeps the checkpoint's 16 bits per weight; in which precision it is computed is decided when it is loaded.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main(folder: str, result: str) -> int:
    """The status of the export."""
    command = [str(Path(sys.executable).parent / "optimum-cli"), "export", "openvino"]
    return subprocess.call([*command, "--model", folder, "--task", "text-generation-with-past", result])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
