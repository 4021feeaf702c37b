"""The process's one OpenVINO core."""

import functools
from typing import Any


@functools.cache
def openvino_core() -> Any:
    """
    The one `openvino.Core` of this process, made when it is first asked for and never let go.

    Cores that come and go end the process at its next signal: see service/openvino_engine.py, which has its own.

    Raises:
        ImportError: where the package openvino is not installed.
    """
    from openvino import Core

    return Core()
