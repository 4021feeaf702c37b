"""What runs in each of MLServer's workers."""

import json

from mlserver import MLModel
from mlserver.codecs import Base64Codec, StringCodec
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
