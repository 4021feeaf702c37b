"""The process's one OpenVINO core."""

import functools
from typing import Any


@functools.cache
def openvino_core() -> Any:
    """
    The one `openvino.Core` of this process, made when it is first asked for and never let go.

    A second core would be dangerous: the CPU plug-in of each gives the thread a new stack for its signal handlers,
    unmaps it when the core goes, and puts back the one before it. Let go in the order in which they came, two cores
    leave an unmapped stack behind, and the next signal that Python handles (SIGTERM, SIGCHLD) ends the process by
    SIGSEGV.

    Raises:
        ImportError: where the package openvino is not installed.
    """
    from openvino import Core

    return Core()
