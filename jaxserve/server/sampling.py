"""From the fields of a request to `SamplingParams`."""

from jaxserve.parallel.errors import RequestError
from jaxserve.request import SamplingParams, StructuredOutputs
from jaxserve.server.protocol import Sampled

MOST_TEXTS, MOST_CHARACTERS = 128, 4096
MOST_TOKENS = 1 << 18
"""More than there are in a vocabulary."""

SAME = (
    "n", "temperature", "top_p", "top_k", "min_p", "stop", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "stop_token_ids", "ignore_eos", "min_tokens", "allowed_token_ids", "bad_words",
    "skip_special_tokens", "include_stop_str_in_output",
)  # fmt: skip
"""Fields that mean what `SamplingParams` means by them."""


def sampling_params(
    body: Sampled, max_tokens: int | None, logprobs: int | None = None, prompt_logprobs: int | None = None
) -> SamplingParams:
    """How to continue; raises RequestError that names the field."""
    _check_sizes(body)
    given = {name: value for name in SAME if (value := getattr(body, name)) is not None}
    seed = None if body.seed is None else body.seed % 2**32  # OpenAI's may be negative, or larger
    return SamplingParams(
        **given, seed=seed, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs,
        structured_outputs=_form(body),
    )  # fmt: skip


def _check_sizes(body: Sampled) -> None:
    """Raises RequestError for lists so long that every token of the answer would take long, for all others too."""
    for name, given in {"stop": body.stop, "bad_words": body.bad_words}.items():
        texts = [given] if isinstance(given, str) else given or ()
        if len(texts) > MOST_TEXTS or sum(map(len, texts)) > MOST_CHARACTERS:
            rule = f"it must have at most {MOST_TEXTS}, of {MOST_CHARACTERS} characters together"
            raise RequestError(f"{name} has {len(texts)} texts of {sum(map(len, texts))} characters; {rule}")
    for name, ids in {"logit_bias": body.logit_bias, "allowed_token_ids": body.allowed_token_ids}.items():
        if len(ids or ()) > MOST_TOKENS:
            raise RequestError(f"{name} has {len(ids or ())} tokens; it must have at most {MOST_TOKENS}")


def _form(body: Sampled) -> StructuredOutputs | None:
    asked, own = body.response_format, body.structured_outputs
    if asked is None or asked.type == "text":
        return own and StructuredOutputs(
            json=own.json, regex=own.regex, choice=own.choice, grammar=own.grammar, json_object=own.json_object
        )
    if own is not None:
        raise RequestError("response_format and structured_outputs say the same twice; give one of them")
    if asked.type == "json_object":
        return StructuredOutputs(json_object=True)
    if asked.json_schema is None or asked.json_schema.schema is None:
        raise RequestError("response_format must have json_schema with a schema in it, for its type json_schema")
    return StructuredOutputs(json=asked.json_schema.schema)
