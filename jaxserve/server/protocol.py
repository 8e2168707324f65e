"""What clients send and get: OpenAI's names, and vLLM's for what OpenAI doesn't have.

Fields that are not here are refused by name. None stands for a field that was left out, as OpenAI's clients send it.
"""

from typing import Any, Literal

import msgspec

# Requests.


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """How to stream."""

    include_usage: bool = False  # in a chunk of its own at the end


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A schema that the answer follows; it always does, `strict` or not."""

    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Structured(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`jaxserve.StructuredOutputs`: exactly one of these."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool = False


class Sampled(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What all that is generated can be asked with; `jaxserve.SamplingParams` says what it means."""

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # whose request it is, for the log
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    structured_outputs: Structured | None = None
    priority: int | None = None
    cache_salt: str | None = None


class CompletionRequest(Sampled):
    """`POST /v1/completions`."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None


class Function(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A tool; all are functions."""

    function: Function
    type: Literal["function"] = "function"


class FunctionName(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One of the functions."""

    name: str


class ToolChoice(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The function to be called."""

    function: FunctionName
    type: Literal["function"] = "function"


class ChatRequest(Sampled):
    """`POST /v1/chat/completions`."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None  # the newer name of max_tokens
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    # vLLM's
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`POST /tokenize`: of a text, or of a conversation."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True
    messages: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[int]


# Responses.


class CachedTokens(msgspec.Struct):
    """Of a prompt's tokens."""

    cached_tokens: int = 0  # computed by earlier requests


class Usage(msgspec.Struct):
    """Tokens of all prompts and answers of a request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: CachedTokens = msgspec.field(default_factory=CachedTokens)


class CompletionLogprobs(msgspec.Struct):
    """Lists with an entry for each token."""

    text_offset: list[int] = []  # where in the choice's text it begins
    token_logprobs: list[float | None] = []  # None: nothing predicts a prompt's first
    tokens: list[str] = []
    top_logprobs: list[dict[str, float] | None] = []


class CompletionChoice(msgspec.Struct):
    """An answer, or what a chunk adds to it."""

    index: int
    text: str = ""
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Completion(msgspec.Struct):
    """`text_completion`, whole or a chunk."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    object: str = "text_completion"


class Candidate(msgspec.Struct):
    """A token that might stand at a place."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    """The token that stands there."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Candidate]


class ChatLogprobs(msgspec.Struct):
    """One for each token."""

    content: list[TokenLogprob]


class CalledFunction(msgspec.Struct, omit_defaults=True):
    """A function's name, and its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, omit_defaults=True):
    """A call; a chunk has it whole."""

    id: str
    type: str
    function: CalledFunction
    index: int | None = None  # among the answer's, in chunks


class Message(msgspec.Struct):
    """What the model says."""

    role: str = "assistant"
    content: str | None = None
    reasoning_content: str | None = None  # DeepSeek's: what it thought before
    tool_calls: list[ToolCall] | None = None


class ChatChoice(msgspec.Struct):
    """An answer."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Delta(msgspec.Struct, omit_defaults=True):
    """What a chunk adds to a message."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatDelta(msgspec.Struct):
    """What a chunk adds to an answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class ChatCompletion(msgspec.Struct):
    """`chat.completion`."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None
    object: str = "chat.completion"


class ChatChunk(msgspec.Struct):
    """`chat.completion.chunk`."""

    id: str
    created: int
    model: str
    choices: list[ChatDelta]
    usage: Usage | None = None
    object: str = "chat.completion.chunk"


class Model(msgspec.Struct):
    """A model that is served."""

    id: str
    created: int
    max_model_len: int
    chat: bool  # whether it has a chat template
    roles: bool  # whether that tells who says what; a model of which it doesn't was not trained to chat
    object: str = "model"
    owned_by: str = "jaxserve"


class Models(msgspec.Struct):
    """`GET /v1/models`."""

    data: list[Model]
    object: str = "list"


class LoadRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`POST /models/load`."""

    model: str


class LoadedModel(msgspec.Struct):
    """What is served now, and what it took."""

    model: str
    seconds: float


class Tokens(msgspec.Struct):
    """`POST /tokenize`."""

    tokens: list[int]
    count: int
    max_model_len: int


class Text(msgspec.Struct):
    """`POST /detokenize`."""

    prompt: str


class Error(msgspec.Struct):
    """What was wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    """OpenAI's form of an error."""

    error: Error
