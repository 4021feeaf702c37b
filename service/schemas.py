"""Shapes of questions and answers, for the OpenAPI document. Answers are not validated at run time: we made them."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from model_export.bundle import Rule, Split
from service.operating_point import MODES


class Prediction(BaseModel):
    """One class and how probable it is."""

    label: str
    index: int = Field(description="Place of the class in the model's list.")
    probability: float = Field(ge=0, le=1)
    split: Split = Field(description="How frequent the class was in training.")


class Latency(BaseModel):
    """Milliseconds per step. Trunk and experts ran for the whole batch that the image travelled in."""

    decode: float
    queue: float = Field(description="From the decoded image until its batch closed.")
    trunk: float
    experts: list[float] = Field(description="One entry per expert that ran, its router included.")
    total: float = Field(
        description="From the end of the request's headers, of a small request from its last byte, to its answer."
    )


class ErrorBody(BaseModel):
    """What went wrong, for a program and for a person."""

    code: str
    message: str


class Classified(BaseModel):
    """The answer for one image."""

    filename: str | None
    predictions: list[Prediction]
    experts_used: int
    experts_total: int
    exit_reason: Literal["confident", "last", "budget"]
    router_scores: list[float] = Field(
        description="One entry per router that was asked; by another exit rule, that rule's scores."
    )
    thresholds: list[float] = Field(description="The next expert runs where a score reaches its threshold.")
    macs: int = Field(description="Multiply-accumulates spent on this image.")
    latency_ms: Latency


class Failed(BaseModel):
    """An image that could not be answered."""

    filename: str | None
    error: ErrorBody


class ModelName(BaseModel):
    """Which model answered."""

    name: str
    version: str


class Answer(BaseModel):
    """The answer of POST /classify: one result per image, in the order of the request."""

    request_id: str
    model: ModelName
    results: list[Classified | Failed]


class ErrorAnswer(BaseModel):
    """The answer where nothing could be classified; `results` where images were looked at one by one."""

    request_id: str
    error: ErrorBody
    results: list[Failed] | None = None


class ModelClass(BaseModel):
    """A class that the model knows."""

    label: str
    training_images: int
    split: Split


class ModelAnswer(BaseModel):
    """The manifest in short, and the operating points to choose from."""

    name: str
    version: str
    variant: str
    provider: str
    experts: int
    classes: list[ModelClass]
    rule: Rule = Field(description="What decides after an expert whether the next one runs.")
    thresholds: list[float] = Field(description="In force where a request does not give its own.")
    modes: dict[str, list[float]] = Field(description="The thresholds that a request may choose by a word.")
    max_experts: int
    input: dict[str, Any]
    macs: dict[str, Any]
    parity: dict[str, Any]
    calibration: dict[str, Any]
    provenance: dict[str, Any]


def classify_operation() -> dict[str, Any]:
    """POST /classify as OpenAPI describes it; the route itself is plain ASGI, so FastAPI cannot see it."""
    binary = {"type": "string", "format": "binary"}
    raw = {f"image/{kind}": {"schema": binary} for kind in ("jpeg", "png", "webp", "gif", "bmp", "tiff")}
    form = {"type": "object", "properties": {"file": {"type": "array", "items": binary}}, "required": ["file"]}
    refusals = {
        "413": "Body, image or number of images above the limit.", "415": "No known image type.",
        "422": "Damaged image, no image, or an invalid parameter.", "429": "Overloaded; see Retry-After.",
        "500": "Our failure; the request id finds it in the log.", "503": "Starting or stopping; see Retry-After.",
        "504": "No answer within RIDE_TIMEOUT_S.",
    }  # fmt: skip
    parameters = [
        ("top_k", {"type": "integer", "minimum": 1}, "Classes in the answer."),
        ("max_experts", {"type": "integer", "minimum": 1}, "Experts at most, for each image."),
        (
            "threshold",
            {"type": "number", "minimum": 0, "maximum": 1},
            "Router score from which the next expert runs; 0: all. Not together with mode.",
        ),
        (
            "mode",
            {"type": "string", "enum": list(MODES)},
            "Thresholds by a word: fast loses some accuracy, balanced is the default, full runs every expert.",
        ),
        (
            "min_confidence",
            {"type": "number", "minimum": 0, "maximum": 1},
            "The next expert also runs where the highest probability is below this.",
        ),
    ]
    return {
        "summary": "Classify one or several images",
        "description": "Files as multipart/form-data under any field name, or one image as the body.",
        "operationId": "classify",
        "parameters": [
            {"name": name, "in": "query", "required": False, "schema": schema, "description": text}
            for name, schema, text in parameters
        ],
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}} | raw},
        "responses": {"200": _response("Every image has a result, an answer or an error.", Answer)}
        | {status: _response(text, ErrorAnswer) for status, text in refusals.items()},
    }


def schema_components() -> dict[str, Any]:
    """The schemas that `classify_operation` refers to."""
    components: dict[str, Any] = {}
    for model in (Answer, ErrorAnswer):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        components |= schema.pop("$defs", {})
        components[model.__name__] = schema
    return components


def _response(text: str, model: type[BaseModel]) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"description": text, "content": {"application/json": {"schema": reference}}}
