"""PyTriton: Triton's HTTP server and dynamic batching in front of Python; the JPEG is a binary tensor."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from benchmarks.contestants.model import TOP_K, Model, open_model, options


def classifier(model: Model) -> Callable[..., dict[str, NDArray[Any]]]:
    """A function from a batch of JPEGs (B, 1) to labels and probabilities (B, TOP_K)."""

    @batch
    def classify(image: NDArray[np.bytes_]) -> dict[str, NDArray[Any]]:
        answers = model.classify([bytes(jpeg) for jpeg in image[:, 0]])
        labels = [[prediction["label"].encode() for prediction in predictions] for predictions in answers]
        values = [[prediction["probability"] for prediction in predictions] for predictions in answers]
        return {"label": np.array(labels), "probability": np.array(values, np.float32)}

    return classify


if __name__ == "__main__":
    arguments = options()
    config = TritonConfig(
        http_address="127.0.0.1", http_port=arguments.port, allow_grpc=False, allow_metrics=False, log_verbose=0
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="classify",
            infer_func=[classifier(open_model(arguments)) for _ in range(arguments.workers)],
            inputs=[Tensor(name="image", dtype=bytes, shape=(1,))],
            outputs=[
                Tensor(name="label", dtype=bytes, shape=(TOP_K,)),
                Tensor(name="probability", dtype=np.float32, shape=(TOP_K,)),
            ],
            config=ModelConfig(
                max_batch_size=arguments.batch,
                batcher=DynamicBatcher(max_queue_delay_microseconds=int(1000 * arguments.wait_ms)),
            ),
            strict=False,
        )
        triton.serve()
