"""Requests as a server takes them, in words of its own vocabulary: so prompts have as many tokens as they should."""

import re
from collections.abc import Mapping, Sequence
from pydoc_data.topics import topics
from typing import Any, Literal

from jaxserve.bench.load import Job
from jaxserve.bench.workload import Ask, tokens
from jaxserve.client import Client
from jaxserve.parallel.errors import ServerError

PASSAGE = "\n".join(topics[name] for name in sorted(topics))[:8000]
"""Python's own help: prose and code, on any machine."""
PLAIN_IDS = range(100, 1000)
"""Tokens that any vocabulary has: above those with a special meaning."""

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


def jobs(
    client: Client, asks: Sequence[Ask], endpoint: Literal["completions", "chat"], common: Mapping[str, Any], seed: int
) -> list[Job]:
    """The requests to send; `common` is what all bodies have."""
    words = known_tokens(client) if any(ask.pieces for ask in asks) else []
    return [Job(PATHS[endpoint], {**common, **_body(client, ask, endpoint, words, seed)}, ask.arrival) for ask in asks]


def _body(client: Client, ask: Ask, endpoint: str, words: Sequence[int], seed: int) -> dict[str, Any]:
    """Completions take tokens as they are, chat takes text."""
    prompt = ask.text or tokens(ask.pieces, words, seed)
    if endpoint == "completions":
        return {"prompt": prompt, "max_tokens": ask.output_tokens}
    text = prompt if isinstance(prompt, str) else spelled(client, prompt)
    return {"messages": [{"role": "user", "content": text}], "max_tokens": ask.output_tokens}


def known_tokens(client: Client) -> list[int]:
    """The ids that the server makes of a passage, each once; `PLAIN_IDS` if it doesn't tokenize for others."""
    bodies = {"prompt": PASSAGE, "add_special_tokens": False}, {"content": PASSAGE}  # ours and vLLM's; llama.cpp's
    for body in bodies:
        try:
            found = client.post("/tokenize", body).get("tokens")
        except (ServerError, AttributeError):
            continue
        if found:
            return sorted({int(token) for token in found})
    return list(PLAIN_IDS)


def spelled(client: Client, ids: Sequence[int]) -> str:
    """The text of `ids`, for chat; English words, as many, if the server doesn't tell."""
    try:
        answer = client.post("/detokenize", {"tokens": list(ids)})
        return answer.get("prompt") or answer["content"]
    except (ServerError, LookupError, AttributeError):
        words = sorted(set(re.findall(r"\b[a-z]{2,8}\b", PASSAGE)))
        return " ".join(words[id % len(words)] for id in ids)
