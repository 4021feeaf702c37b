"""POST /classify, from the door to the answer. Plain ASGI: every request passes here, and each layer would cost it."""

import asyncio
import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast
from urllib.parse import parse_qsl

import orjson
from starlette.types import Receive, Scope, Send

from service.cascade import Job, NotFiniteError, Outcome
from service.classifier import Choice, ClassifiedImage, Classifier, not_finite
from service.errors import STATUS, ClientGoneError, ServiceError
from service.headers import Headers, common_headers, request_id_of
from service.logs import log
from service.metrics import CLIENT_GONE, image_macs
from service.operating_point import MODES, Mode
from service.places import BatcherStoppedError
from service.protocol import LINGER_S, Exchange
from service.uploads import Body, MemoryLease, Upload, read_uploads, uploads_in
from service.watch import Watch

MAX_PARAMETERS: Final = 16
NUMBER: Final = re.compile(r"[0-9]{1,20}(\.[0-9]{0,40})?(e-?[0-9]{1,3})?|\.[0-9]{1,40}", re.ASCII | re.IGNORECASE)
ARRIVING_S: Final = 0.1  # for the rest of a refused body: when it comes, the connection can be kept
PARAMETERS: Final = ("top_k", "max_experts", "threshold", "min_confidence", "mode")


class ClassifyRoute:
    """The one hot route."""

    def __init__(self, classifier: Classifier) -> None:
        manifest = classifier.bundle.manifest
        self._classifier = classifier
        self._settings = classifier.settings
        self._watch = Watch(classifier.settings.timeout_s)
        self._labels = list(zip(manifest.classes, manifest.splits, strict=True))
        self._model = {"name": manifest.name, "version": manifest.version}
        self._macs = [image_macs(manifest, used, classifier.operation.rule) for used in range(manifest.n_experts + 1)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; whatever happens, it is counted and logged, and the client gets JSON."""
        started = time.perf_counter()
        status = CLIENT_GONE
        request_id = request_id_of(scope["headers"])
        body = Body(scope["headers"], receive)
        lingers, most_bytes = False, 2 * self._settings.max_bytes
        try:
            self._classifier.enter()
            try:
                status, answer = await self._answer(scope["query_string"], body, request_id, started)
            finally:
                self._classifier.leave()
            await self._send(send, status, answer, body, request_id)
        except ServiceError as error:  # refused, before its images were looked at
            status = error.status
            self._note(request_id, error)
            await body.discard(most_bytes, ARRIVING_S)
            lingers = not body.complete
            await self._send(send, status, _refusal(request_id, error), body, request_id, error, last=not lingers)
        except ClientGoneError:
            log(logging.INFO, "client_gone", request_id=request_id)
        except Exception:
            status = STATUS["internal"]
            raise
        finally:
            self._classifier.metrics.request_done(status, time.perf_counter() - started)
        if lingers:  # closed while the client sends, the connection would be reset, and our answer might be lost
            await body.discard(most_bytes, LINGER_S)
            await send({"type": "http.response.body"})

    def fast_path(self, query: bytes, headers: Headers, data: bytes, exchange: Exchange) -> bool:
        """
        Answer, without a task, a request whose body, or whose form's only file, is an image that is quickly decoded.

        Returns:
            Whether it will be answered. Anything else, and whatever is to be refused, is left to `__call__`.
        """
        started, classifier = time.perf_counter(), self._classifier
        if len(data) > self._settings.max_bytes:
            return False
        lease = classifier.upload_memory.lease()
        try:
            classifier.check_ready()
            choice = self._choice(query)
            lease.grow(len(data))
            upload = self._only_upload(headers, data)
            begun = classifier.begin(upload.data, choice) if upload is not None else None
        except Exception:  # it will happen again on the normal path, which says so
            upload = begun = None
        if upload is None or begun is None:
            lease.release()
            return False
        _FastRequest(self, exchange, request_id_of(headers), upload, choice, started, lease, *begun)
        return True

    def _only_upload(self, headers: Headers, data: bytes) -> Upload | None:
        """The one file in a body; None where a form has none, or several."""
        content_type = dict(headers).get(b"content-type", b"")
        if not content_type.startswith(b"multipart/"):
            return Upload(None, data)
        uploads = uploads_in(content_type.decode("latin-1"), data, max_images=self._settings.max_images)
        return uploads[0] if len(uploads) == 1 else None

    async def _answer(self, query: bytes, body: Body, request_id: str, started: float) -> tuple[int, dict[str, Any]]:
        """Receive and classify; the status and body to send. Raises ServiceError where no image was looked at."""
        classifier, settings = self._classifier, self._settings
        try:
            with self._watch.over(body):
                choice = self._choice(query)
                classifier.check_room()
                with classifier.upload_memory.lease() as lease:
                    uploads = await read_uploads(
                        body, lease, max_bytes=settings.max_bytes, max_images=settings.max_images
                    )
                    outcomes = await classifier.classify(uploads, choice)
        except (ClientGoneError, ServiceError):
            raise
        except Exception as error:
            raise self._explained(error, request_id) from error
        return self._status_and_body(uploads, outcomes, choice, request_id, started)

    def _explained(self, error: Exception, request_id: str) -> ServiceError:
        """What the client is told of a failure; one that is a surprise is logged."""
        if isinstance(error, ServiceError):
            return error
        if isinstance(error, BatcherStoppedError):
            return ServiceError("shutting_down", "service stopped before this image's turn came", retry_after=1)
        log(logging.ERROR, "failed", error=error, request_id=request_id)
        return ServiceError("internal", f"our failure, not yours; the log has it under request id {request_id}")

    def _status_and_body(
        self,
        uploads: Sequence[Upload],
        outcomes: Sequence[ClassifiedImage | ServiceError],
        choice: Choice,
        request_id: str,
        started: float,
    ) -> tuple[int, dict[str, Any]]:
        """The status and body of an answer in which every image was looked at."""
        results = [
            self._result(upload, outcome, choice, started)
            if isinstance(outcome, ClassifiedImage)
            else self._failure(upload, outcome, request_id)
            for upload, outcome in zip(uploads, outcomes, strict=True)
        ]
        errors = [outcome for outcome in outcomes if isinstance(outcome, ServiceError)]
        if len(errors) == len(results):
            return errors[0].status, {"request_id": request_id, "error": errors[0].as_json(), "results": results}
        return 200, {"request_id": request_id, "model": self._model, "results": results}

    def _choice(self, query: bytes) -> Choice:
        """The query's parameters, within the bundle's and the operator's limits; or ServiceError parameter_invalid."""
        operation, n_classes = self._classifier.operation, len(self._labels)
        top_k = min(self._settings.top_k, n_classes)
        if not query:
            return Choice(operation.thresholds, operation.max_experts, 0.0, top_k)
        given = _parameters(query)
        thresholds, max_experts, min_confidence = operation.thresholds, operation.max_experts, 0.0
        if "top_k" in given:
            top_k = _whole("top_k", given["top_k"], n_classes, "the model's classes")
        if "max_experts" in given:
            n_experts = self._classifier.bundle.manifest.n_experts
            max_experts = min(
                max_experts, _whole("max_experts", given["max_experts"], n_experts, "the model's experts")
            )
        if "min_confidence" in given:
            min_confidence = _share("min_confidence", given["min_confidence"])
        if "threshold" in given and "mode" in given:
            raise ServiceError("parameter_invalid", "threshold and mode both choose the thresholds; give one of them")
        if "threshold" in given:
            thresholds = (_share("threshold", given["threshold"]),) * len(thresholds)
        if "mode" in given:
            if given["mode"] not in MODES:
                raise ServiceError(
                    "parameter_invalid", f"mode is {given['mode'][:40]!r}; must be one of {', '.join(MODES)}"
                )
            thresholds = operation.modes[cast(Mode, given["mode"])]
        return Choice(thresholds, max_experts, min_confidence, top_k)

    def _result(self, upload: Upload, classified: ClassifiedImage, choice: Choice, started: float) -> dict[str, Any]:
        """One answered image, as JSON, counted."""
        outcome = classified.outcome
        self._classifier.metrics.image_answered(outcome)
        return {
            "filename": upload.filename,
            "predictions": [
                {"label": self._labels[index][0], "index": index, "probability": value, "split": self._labels[index][1]}
                for index, value in zip(outcome.classes, outcome.probabilities, strict=True)
            ],
            "experts_used": outcome.experts_used,
            "experts_total": len(self._macs) - 1,
            "exit_reason": outcome.exit_reason,
            "router_scores": outcome.router_scores,
            "thresholds": choice.thresholds,
            "macs": self._macs[outcome.experts_used],
            "latency_ms": {
                "decode": _ms(classified.decode_s),
                "queue": _ms(outcome.queue_s),
                "trunk": _ms(outcome.trunk_s),
                "experts": [_ms(seconds) for seconds in outcome.experts_s],
                "total": _ms(time.perf_counter() - started),
            },
        }

    def _failure(self, upload: Upload, error: ServiceError, request_id: str) -> dict[str, Any]:
        """One image that could not be decoded, or for which a graph gave NaN, as JSON, counted."""
        self._note(request_id, error)
        return {"filename": upload.filename, "error": error.as_json()}

    def _note(self, request_id: str, error: ServiceError) -> None:
        """Count and log a refusal, or a failure of ours."""
        self._classifier.metrics.refused(error.code)
        ours = error.code == "internal"
        level, event = (logging.ERROR, "not_answered") if ours else (logging.WARNING, "refused")
        log(level, event, request_id=request_id, code=error.code, message=error.message)

    async def _send(
        self,
        send: Send,
        status: int,
        answer: dict[str, Any],
        body: Body,
        request_id: str,
        error: ServiceError | None = None,
        *,
        last: bool = True,
    ) -> None:
        content = orjson.dumps(answer)
        headers = [(b"content-length", b"%d" % len(content)), *_headers(request_id, error)]
        if not body.complete or self._classifier.state == "draining":
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content, "more_body": not last})


@dataclass(slots=True, eq=False)
class _FastRequest:
    """
    A request that is answered without a task, from the moment when its image is queued.

    Attributes:
        started: time.perf_counter() at the first look at it.
        decode_s: what decoding its image took.
        began: time.monotonic() from which its time limit counts.
        left: whether it is answered, or given up.
    """

    route: ClassifyRoute
    exchange: Exchange
    request_id: str
    upload: Upload
    choice: Choice
    started: float
    lease: MemoryLease
    job: Job
    outcome: asyncio.Future[Outcome]
    decode_s: float
    began: float = field(default_factory=time.monotonic)
    left: bool = False

    def __post_init__(self) -> None:
        self.route._classifier.enter()
        self.route._watch.add(self)
        self.exchange.hung_up = self._hung_up
        self.outcome.add_done_callback(self._answer)

    def look(self) -> None:
        """Nothing to do: the protocol says when the client hangs up."""

    def time_over(self, explain: Callable[[str], ServiceError]) -> None:
        """Give the image up, and say so."""
        self._refuse(explain("answered"))
        self._give_up()

    def _hung_up(self) -> None:
        log(logging.INFO, "client_gone", request_id=self.request_id)
        self._leave(CLIENT_GONE)
        self._give_up()

    def _give_up(self) -> None:
        self.outcome.cancel()
        self.job.abandoned = True

    def _answer(self, future: asyncio.Future[Outcome]) -> None:
        if self.left:  # too late: given up while this call was waiting for its turn
            return
        if self.exchange.gone:
            self.exchange.hung_up = None
            self._hung_up()
            return
        try:
            outcome: ClassifiedImage | ServiceError = ClassifiedImage(future.result(), self.decode_s)
        except NotFiniteError as error:
            outcome = not_finite(error)
        except Exception as error:
            self._refuse(self.route._explained(error, self.request_id))
            return
        self._send(*self.route._status_and_body([self.upload], [outcome], self.choice, self.request_id, self.started))

    def _refuse(self, error: ServiceError) -> None:
        self.route._note(self.request_id, error)
        self._send(error.status, _refusal(self.request_id, error), error)

    def _send(self, status: int, answer: dict[str, Any], error: ServiceError | None = None) -> None:
        if self.route._classifier.state == "draining":
            self.exchange.keep_alive = False
        self._leave(status)
        self.exchange.answer(status, _headers(self.request_id, error), orjson.dumps(answer))

    def _leave(self, status: int) -> None:
        self.left = True
        self.lease.release()
        self.route._watch.remove(self)
        self.route._classifier.leave()
        self.route._classifier.metrics.request_done(status, time.perf_counter() - self.started)


def _refusal(request_id: str, error: ServiceError) -> dict[str, Any]:
    return {"request_id": request_id, "error": error.as_json()}


def _headers(request_id: str, error: ServiceError | None) -> Headers:
    headers = [(b"content-type", b"application/json"), *common_headers(request_id, "/classify")]
    if error is not None and error.retry_after is not None:
        headers.append((b"retry-after", str(error.retry_after).encode()))
    return headers


def _parameters(query: bytes) -> dict[str, str]:
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, max_num_fields=MAX_PARAMETERS, errors="strict")
    except ValueError:  # bytes that are no text, or a hundred fields
        raise ServiceError("parameter_invalid", f"query is no list of {', '.join(PARAMETERS)}") from None
    given: dict[str, str] = {}
    for name, value in pairs:
        if name not in PARAMETERS:
            raise ServiceError("parameter_invalid", f"{name[:40]!r} is no parameter; there are {', '.join(PARAMETERS)}")
        if name in given:
            raise ServiceError("parameter_invalid", f"{name} is given twice; give it once")
        given[name] = value
    return given


def _whole(name: str, text: str, limit: int, what: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= limit):
        raise ServiceError(
            "parameter_invalid", f"{name} is {text[:40]!r}; must be a whole number from 1 to {limit}, {what}"
        )
    return int(text)


def _share(name: str, text: str) -> float:
    value = float(text) if NUMBER.fullmatch(text) else math.nan
    if not 0 <= value <= 1:
        raise ServiceError("parameter_invalid", f"{name} is {text[:40]!r}; must be a number from 0 to 1")
    return value


def _ms(seconds: float) -> float:
    return int(1e6 * seconds + 0.5) / 1000  # a quarter of what round() takes
