"""GET /v1/models."""

from __future__ import annotations

from weft.gateway.apis.common import check_model
from weft.gateway.apis.openai_types import Model, ModelList
from weft.gateway.http.base import Answer, Exchange, Route


async def models(exchange: Exchange) -> Answer:
    names = [name for name in exchange.state.config.names if name != "*"]
    return Answer(ModelList([_model(exchange, name) for name in names]))


async def model(exchange: Exchange) -> Answer:
    return Answer(_model(exchange, check_model(exchange, exchange.path("model"))))


def _model(exchange: Exchange, name: str) -> Model:
    return Model(id=name, created=exchange.state.created, max_model_len=exchange.state.engine.context)


ROUTES = (
    Route("GET", "/v1/models", models, "openai", "The models served.", reply=ModelList),
    Route("GET", "/v1/models/{model}", model, "openai", "One model.", reply=Model, statuses=(404,)),
)
