"""Say no in HTTP: one exception that carries everything an error answer needs."""

from __future__ import annotations

from leyden.errors import ConfigurationError, ContextLengthError, EngineError

RETRY_AFTER_SECONDS = 1


class Refusal(Exception):
    """An answer other than 200. Its message reaches the client, so it never quotes a header or a token."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        """The field of the request that is wrong."""
        self.retry_after_seconds = retry_after_seconds

    @property
    def kind(self) -> str:
        """Return OpenAI's error type."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"


def refusal_of(error: Exception, prompt_field: str) -> Refusal:
    """Translate what an engine raises; `prompt_field` is the caller's name for what the model reads."""
    match error:
        case Refusal():
            return error
        case ContextLengthError():
            return Refusal(400, str(error), code="context_length_exceeded", param=prompt_field)
        case ConfigurationError():
            return Refusal(400, str(error), code="unsupported_value")
        case EngineError():
            return Refusal(503, str(error), code="engine_unavailable", retry_after_seconds=RETRY_AFTER_SECONDS)
    return Refusal(500, f"the engine failed: {type(error).__name__}: {error}", code="engine_failed")
