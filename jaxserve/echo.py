"""How probable a server's model finds what may follow a context, from prompts that it echoes with log-probabilities.

That is lm-evaluation-harness's way with a server (`local-completions`). Prompts are token ids: a text would be cut into
tokens by the server, and where its context ends could not be told.
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from jaxserve.checkpoints.evaluation.scoring import Encode, Encoded, Likelihood, Show, encode_item
from jaxserve.checkpoints.evaluation.tasks import Item
from jaxserve.client import Client
from jaxserve.parallel.errors import ServerError

IN_FLIGHT = 8  # requests that are open at a time


def likelihoods(
    client: Client, model: str, encode: Encode, items: Sequence[Item], show: Show = lambda done, total: None,
    max_tokens: int = 1,
) -> list[list[Likelihood]]:  # fmt: skip
    """What the model makes of each choice of each item, and `show` is told of the items that are done.

    `max_tokens` may be 0 where a server allows that; a token that is generated is not read. Raises ServerError.
    """
    encoded, found = [encode_item(item, encode) for item in items], []
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        for one in pool.map(partial(_ask, client, model, max_tokens), encoded):
            found.append(one)
            show(len(found), len(items))
    return found


def _ask(client: Client, model: str, max_tokens: int, item: Encoded) -> list[Likelihood]:
    """All choices in one request, so that the server can compute their context once."""
    prompts = [list(row) for row in item.rows]
    body = {"model": model, "prompt": prompts, "max_tokens": max_tokens, "temperature": 0, "echo": True, "logprobs": 1}
    answer = client.post("/v1/completions", body)
    try:
        echoed = {choice["index"]: choice["logprobs"] for choice in answer["choices"]}
        return [_likelihood(echoed[i], slice(item.first, len(row))) for i, row in enumerate(item.rows)]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ServerError(
            f"{client.url} does not echo prompts with log-probabilities ({reason}); use a server whose "
            "/v1/completions has echo and logprobs together, as this one's and vLLM's",
            "no echo",
        ) from None


def _likelihood(logprobs: Mapping[str, Any], place: slice) -> Likelihood:
    """Of the tokens there. Of tokens that are equally probable each counts as the most probable one."""
    chosen, best = logprobs["token_logprobs"][place], logprobs["top_logprobs"][place]
    if len(chosen) != place.stop - place.start:
        raise ValueError(f"{len(logprobs['token_logprobs'])} log-probabilities for {place.stop} tokens")
    expected = sum(one >= max(top.values()) for one, top in zip(chosen, best, strict=True))
    return Likelihood(math.fsum(chosen) / math.log(2), len(chosen), expected)
