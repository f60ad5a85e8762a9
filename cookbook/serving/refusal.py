"""An answer other than 200: what came, what was expected, what to do."""

from __future__ import annotations


class Refusal(Exception):
    """Becomes the HTTP status with {"detail": ...}. 404 also for what belongs to somebody else."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail
