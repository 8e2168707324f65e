"""The description of the server for machines: OpenAPI 3.2, made from the types that it reads and writes."""

from typing import Any, NamedTuple

import msgspec

from jaxserve import __version__
from jaxserve.server import protocol as p
from jaxserve.server.service import Service

REF = "#/components/schemas/{name}"


class Endpoint(NamedTuple):
    """A path, its method, and what it takes and gives."""

    path: str
    method: str
    summary: str
    body: type[msgspec.Struct] | None = None
    gives: type[msgspec.Struct] | None = None
    chunks: type[msgspec.Struct] | None = None  # of its stream
    errors: tuple[int, ...] = ()
    kind: str = "application/json"


ASKED = (400, 401, 404, 408, 413, 415, 421, 429, 503, 504)
ENDPOINTS = (
    Endpoint("/v1/completions", "post", "Continue texts", p.CompletionRequest, p.Completion, p.Completion, ASKED),
    Endpoint("/v1/chat/completions", "post", "Answer", p.ChatRequest, p.ChatCompletion, p.ChatChunk, ASKED),
    Endpoint("/v1/models", "get", "What is served", gives=p.Models, errors=(401, 503)),
    Endpoint("/models/load", "post", "Serve another", p.LoadRequest, p.LoadedModel, errors=(*ASKED, 500)),
    Endpoint("/v1/models/{name}", "get", "A model", gives=p.Model, errors=(401, 404, 503)),
    Endpoint("/tokenize", "post", "A text's tokens", p.TokenizeRequest, p.Tokens, errors=ASKED),
    Endpoint("/detokenize", "post", "Tokens' text", p.DetokenizeRequest, p.Text, errors=ASKED),
    Endpoint("/health", "get", "Whether requests are answered", errors=(503,)),
    Endpoint("/version", "get", "Of jaxserve"),
    Endpoint("/metrics", "get", "For Prometheus", errors=(503,), kind="text/plain"),
    Endpoint("/stats", "get", "For the page", errors=(401, 503)),
)


def describe(service: Service) -> dict[str, Any]:
    """The whole description."""
    paths: dict[str, Any] = {}
    for endpoint in ENDPOINTS:
        paths.setdefault(endpoint.path, {})[endpoint.method] = _operation(endpoint, service)
    return {
        "openapi": "3.2.0",
        "info": {"title": "jaxserve", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _schemas() -> dict[str, Any]:
    kinds = [kind for e in ENDPOINTS for kind in (e.body, e.gives, e.chunks) if kind] + [p.ErrorBody]
    _, schemas = msgspec.json.schema_components(list(dict.fromkeys(kinds)), ref_template=REF)
    return schemas


def _operation(endpoint: Endpoint, service: Service) -> dict[str, Any]:
    content = {endpoint.kind: {"schema": _ref(endpoint.gives) if endpoint.gives else {}}}
    if endpoint.chunks:
        content["text/event-stream"] = {"itemSchema": _event(endpoint.chunks)}
    errors = {"application/json": {"schema": _ref(p.ErrorBody) if endpoint.path != "/health" else {}}}
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "responses": {
            "200": {"description": "OK", "content": content},
            **{str(status): {"description": "Error", "content": errors} for status in endpoint.errors},
        },
    }
    if endpoint.body:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(endpoint.body)}}}
    if "{name}" in endpoint.path:
        schema = {"type": "string", "examples": service.names}
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": schema}]
    return operation


def _event(chunk: type[msgspec.Struct]) -> dict[str, Any]:
    """A server-sent event of a stream."""
    content = {"anyOf": [_ref(chunk), _ref(p.ErrorBody)]}
    data = [{"const": "[DONE]"}, {"type": "string", "contentMediaType": "application/json", "contentSchema": content}]
    return {"type": "object", "required": ["data"], "properties": {"data": {"anyOf": data}}}


def _ref(kind: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": REF.format(name=kind.__name__)}
