"""From the fields of a request to `SamplingParams`."""

from jaxserve.parallel.errors import RequestError
from jaxserve.request import SamplingParams, StructuredOutputs
from jaxserve.server.protocol import Sampled

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
    given = {name: value for name in SAME if (value := getattr(body, name)) is not None}
    seed = None if body.seed is None else body.seed % 2**32  # OpenAI's may be negative, or larger
    return SamplingParams(
        **given, seed=seed, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs,
        structured_outputs=_form(body),
    )  # fmt: skip


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
