"""LitServe, with its batching; the body is the JPEG."""

from typing import Annotated, Any

import litserve
from fastapi import Body

from benchmarks.contestants.model import open_model, options

Jpeg = Annotated[bytes, Body(media_type="image/jpeg")]


class Classify(litserve.LitAPI):
    """One JPEG in, its top 5 out."""

    def setup(self, device: str) -> None:
        """In each worker."""
        self.model = open_model(options())

    def decode_request(self, request: Jpeg) -> bytes:
        """Decoding is left to `predict`, which has threads for it."""
        return request

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        """The model takes a list."""
        return inputs

    def predict(self, jpegs: bytes | list[bytes]) -> Any:
        """A single JPEG where batching is off."""
        return self.model.classify(jpegs) if isinstance(jpegs, list) else self.model.classify([jpegs])[0]

    def unbatch(self, output: list[Any]) -> list[Any]:
        """The model gives a list."""
        return output

    def encode_response(self, output: list[dict[str, Any]]) -> dict[str, Any]:
        """As JSON."""
        return {"predictions": output}


if __name__ == "__main__":
    arguments = options()
    server = litserve.LitServer(
        Classify(max_batch_size=arguments.batch, batch_timeout=arguments.wait_ms / 1000, api_path="/classify"),
        accelerator="cpu", workers_per_device=arguments.workers, fast_queue=True,
    )  # fmt: skip
    server.run(
        host="127.0.0.1", port=arguments.port, num_api_servers=1, log_level="warning", generate_client_file=False,
        access_log=False,
    )  # fmt: skip
