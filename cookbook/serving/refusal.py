"""An answer other than 200: what came, what was expected, what to do."""

from __future__ import annotations


class Refusal(Exception):
    """Becomes the HTTP status with {"detail": ...}. 404 also for what belongs to somebody else.

    `param` and `code` are what OpenAI's way of writing errors has besides: the parameter's name, a word for programs.
    """

    def __init__(self, status: int, detail: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.param, self.code = status, detail, param, code
