"""MLServer, with its adaptive batching; the JPEG travels as base64 in the V2 protocol's JSON."""

import uvloop
from mlserver import MLServer
from mlserver.settings import ModelSettings, Settings

from benchmarks.contestants.model import options


async def serve() -> None:
    """Until told to stop."""
    arguments = options()
    settings = Settings(
        host="127.0.0.1", http_port=arguments.port, grpc_port=arguments.port + 1, metrics_endpoint=None, debug=False,
        parallel_workers=arguments.workers if arguments.workers > 1 else 0,
    )  # fmt: skip
    model = ModelSettings(
        name="classify", implementation="benchmarks.contestants.mlserver.runtime.Classify",
        max_batch_size=arguments.batch, max_batch_time=arguments.wait_ms / 1000,
    )  # fmt: skip
    await MLServer(settings).start([model])


if __name__ == "__main__":
    uvloop.run(serve())
