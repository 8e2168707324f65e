"""What tells about the server: health, version, models, tokens, numbers for dashboards and for the page."""

import asyncio
import time
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from jaxserve import __version__
from jaxserve.server.chat import render
from jaxserve.server.errors import ApiError, json_response
from jaxserve.server.protocol import (
    ChatRequest,
    DetokenizeRequest,
    LoadedModel,
    LoadRequest,
    Model,
    Models,
    Text,
    TokenizeRequest,
    Tokens,
)
from jaxserve.server.service import Service


def health(service: Service) -> Response:
    """200 if requests are answered, else 503."""
    return json_response({"status": service.state}, 200 if service.state == "ready" else 503)


def version() -> Response:
    return json_response({"version": __version__})


async def metrics(service: Service) -> Response:
    await service.loaded.load.read()
    return Response(service.loaded.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def models(service: Service) -> Models:
    templates = service.loaded.tokenizer.chat_templates.values()
    about = service.created, service.max_model_len, bool(templates), any("role" in text for text in templates)
    return Models([Model(name, *about) for name in service.names])


def model(service: Service, name: str) -> Model:
    service.check_model(name)
    return next(each for each in models(service).data if each.id == name)


async def load(service: Service, body: LoadRequest) -> LoadedModel:
    """Has another model served; answers when it is."""
    began = time.monotonic()
    await service.switch(body.model)
    return LoadedModel(body.model, round(time.monotonic() - began, 3))


async def tokenize(service: Service, body: TokenizeRequest) -> Tokens:
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "prompt and messages: give one of them", param="prompt")
    if body.prompt is not None:
        ids = await service.encode(body.prompt, body.add_special_tokens)
    else:
        chat = ChatRequest(messages=body.messages or [], add_generation_prompt=body.add_generation_prompt)
        ids = await asyncio.to_thread(render, service.loaded.tokenizer, chat)
    return Tokens(ids, len(ids), service.max_model_len)


async def detokenize(service: Service, body: DetokenizeRequest) -> Text:
    service.check_model(body.model)
    return Text(await asyncio.to_thread(service.loaded.tokenizer.decode, body.tokens, False))


async def stats(service: Service) -> dict[str, Any]:
    """What the page shows."""
    engine, _, metrics, load = service.loaded
    load_le, c = await load.read(), engine.engine.counters
    return {
        "model": service.names[0],
        "state": service.state,
        "uptime": round(time.time() - service.created, 3),
        "requests": {"running": c.running, "waiting": c.waiting, "slots": c.slots, "finished": metrics.finished},
        "cache": {"used": c.pages_used, "pages": c.pages, "page_size": c.page_size},
        "tokens": {"prompt": c.prompt_tokens, "cached": c.cached_tokens, "generated": c.generated_tokens},
        "latency": metrics.percentiles(),
        "drafts": {"rows": c.wide_rows, "accepted": c.accepted},
        "experts": None if load_le is None else {"layers": load.layers, "tokens": load_le.tolist()},
        "steps": c.steps,
        "preemptions": c.preemptions,
        "compilations": {"warmup": c.compiled, "late": c.late_compiled},
    }
