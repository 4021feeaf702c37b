"""MLServer, with its adaptive batching; the JPEG travels as base64 in the V2 protocol's JSON."""

import asyncio
import json

from mlserver import MLModel, MLServer
from mlserver.codecs import Base64Codec, StringCodec
from mlserver.settings import ModelParameters, ModelSettings, Settings
from mlserver.types import InferenceRequest, InferenceResponse

from benchmarks.contestants.model import open_model, options


class Classify(MLModel):
    """JPEGs in, their top 5 out, as a JSON text each."""

    async def load(self) -> bool:
        """In each worker."""
        self.model = open_model(options())
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """One batch."""
        jpegs = Base64Codec.decode_input(payload.inputs[0])
        answers = [json.dumps(predictions) for predictions in self.model.classify(jpegs)]
        return InferenceResponse(model_name=self.name, outputs=[StringCodec.encode_output("predictions", answers)])


if __name__ == "__main__":
    arguments = options()
    settings = Settings(
        host="127.0.0.1", http_port=arguments.port, grpc_port=arguments.port + 1, metrics_endpoint=None, debug=False,
        parallel_workers=arguments.workers if arguments.workers > 1 else 0,
    )  # fmt: skip
    model = ModelSettings(
        name="classify", implementation=Classify, max_batch_size=arguments.batch,
        max_batch_time=arguments.wait_ms / 1000, parameters=ModelParameters(),
    )  # fmt: skip
    asyncio.run(MLServer(settings).start([model]))
