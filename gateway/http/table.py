"""All that the server serves."""

from __future__ import annotations

from weft.gateway.apis import chat, completions, messages, models, native, native_info, responses
from weft.gateway.http import health
from weft.gateway.http.base import Route
from weft.gateway.runs import handlers

ROUTES: tuple[Route, ...] = (
    *health.ROUTES,
    *chat.ROUTES,
    *completions.ROUTES,
    *responses.ROUTES,
    *models.ROUTES,
    *messages.ROUTES,
    *native.ROUTES,
    *native_info.ROUTES,
    *handlers.ROUTES,
)
