"""What can be wrong with a request, and the HTTP status that says so."""

from typing import Final

STATUS: Final = {
    "image_unsupported": 415,
    "image_unreadable": 422,
    "image_too_large": 413,
    "request_too_large": 413,
    "too_many_images": 413,
    "no_image": 422,
    "parameter_invalid": 422,
    "overloaded": 429,
    "not_ready": 503,
    "shutting_down": 503,
    "timeout": 504,
    "internal": 500,
    "not_found": 404,
    "method_not_allowed": 405,
    "request_invalid": 400,
    "head_too_large": 431,
}
# Of what never reaches POST /classify, and is in none of its figures.
ELSEWHERE: Final = ("not_found", "method_not_allowed", "request_invalid", "head_too_large")


class ServiceError(Exception):
    """
    A refusal or failure whose message is meant for the caller.

    Attributes:
        code: a key of STATUS.
        message: which thing, what it was, the limit, the next step.
        retry_after: seconds after which it is worth trying again, where it is.
    """

    def __init__(self, code: str, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after = retry_after

    @property
    def status(self) -> int:
        """The HTTP status of this code."""
        return STATUS[self.code]

    def as_json(self) -> dict[str, str]:
        """The `error` object of an answer."""
        return {"code": self.code, "message": self.message}


class ClientGoneError(Exception):
    """The client hung up; there is nobody left to answer."""
