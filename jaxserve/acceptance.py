"""What a request must be, to be served with a model at all."""

import reprlib
from collections.abc import Sequence

from jaxserve.guidance import Guides
from jaxserve.layers.config import Config
from jaxserve.parallel.errors import RequestError
from jaxserve.request import Request
from jaxserve.table import OWN_ENDS
from jaxserve.tokenizer import Tokenizer


class Acceptance:
    """The rules of one model, and of whoever serves it with so many tokens; needs no weights."""

    def __init__(self, cfg: Config, tokenizer: Tokenizer, max_model_len: int):
        self.eos_ids = frozenset([*cfg.eos_ids, *tokenizer.eos_ids])
        self.guides = Guides(tokenizer, cfg.vocab_size, sorted(self.eos_ids))
        self.max_model_len = max_model_len
        self._cfg = cfg

    def check(self, request: Request) -> None:
        """Raises RequestError that names the field and its range if the request can never be served."""
        tokens, p = request.prompt_token_ids, request.params
        self._check_length(tokens)
        if not isinstance(request.priority, int):
            raise RequestError(f"priority = {request.priority!r}: it must be a whole number")
        if not isinstance(request.cache_salt, str) or not _is_text(request.cache_salt):
            raise RequestError(f"cache_salt = {reprlib.repr(request.cache_salt)}: it must be a text")
        if request.answered and (p.n != 1 or p.prompt_logprobs is not None):
            raise RequestError("answered: it goes with n = 1 and without prompt_logprobs")
        if request.answered and (known := len(tokens) + len(request.answered)) >= self.max_model_len:
            raise RequestError(f"prompt and answered have {known} tokens; {self.max_model_len - 1} are accepted")
        stops = p.stop_token_ids or ()
        if len(stops) > OWN_ENDS:
            raise RequestError(f"stop_token_ids has {len(stops)} tokens; it must have at most {OWN_ENDS}")
        self._check_tokens(request)
        self.guides.make(p)  # refuses forms that can't be followed

    def _check_tokens(self, request: Request) -> None:
        p = request.params
        named = {
            "prompt_token_ids": request.prompt_token_ids,
            "answered": request.answered,
            "stop_token_ids": p.stop_token_ids,
            "allowed_token_ids": p.allowed_token_ids,
            "logit_bias": p.logit_bias,
        }
        for name, ids in named.items():
            wrong = [t for t in ids or () if not 0 <= t < self._cfg.vocab_size]
            if wrong:
                raise RequestError(f"{name} has {wrong[0]}; the model's tokens are 0 to {self._cfg.vocab_size - 1}")

    def _check_length(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise RequestError("the prompt has no tokens; give at least one (a begin-of-text token, say)")
        if len(tokens) >= self.max_model_len:
            raise RequestError(
                f"prompt has {len(tokens)} tokens; this engine accepts {self.max_model_len - 1} "
                f"(max_model_len {self.max_model_len} less one). "
                + ("Raise max_model_len, or shorten" if self.max_model_len < self._cfg.max_positions else "Shorten")
                + " the prompt."
            )


def _is_text(text: str) -> bool:
    """Whether it can be written as bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
