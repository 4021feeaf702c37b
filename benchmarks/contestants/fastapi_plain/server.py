"""FastAPI as its documentation shows it: a plain function in the thread pool, one image per run of the graph."""

import uvicorn
from fastapi import Body, FastAPI

from benchmarks.contestants.model import open_model, options


def create_app() -> FastAPI:
    """The application, with its model loaded."""
    app, model = FastAPI(), open_model(options())

    @app.post("/classify")
    def classify(image: bytes = Body(media_type="image/jpeg")) -> dict[str, list[dict[str, str | float]]]:
        return {"predictions": model.classify([image])[0]}

    return app


if __name__ == "__main__":
    arguments = options()
    uvicorn.run(
        "benchmarks.contestants.fastapi_plain.server:create_app", factory=True, host="127.0.0.1", port=arguments.port,
        workers=arguments.workers, log_level="warning", loop="uvloop", http="httptools", access_log=False,
    )  # fmt: skip
