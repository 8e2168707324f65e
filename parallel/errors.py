"""Every error that jaxserve raises on purpose. This folder is the leftmost, so that all can raise them.

    JaxserveError
    ├── ConfigError        config.json lacks a key, contradicts itself, or asks for what is not supported
    ├── CheckpointError    files of weights or of the tokenizer are missing, damaged, or not those of the config
    ├── ShardingError      a mesh, or what is to lie where on it, cannot be as asked
    ├── TransferError      pages did not come from another mesh, or may not be those that were sent
    ├── ProcessError       a process that shares the mesh has left, or is set up otherwise
    ├── EngineError        the engine has failed for good, or hangs
    │   └── ShutDownError  it was shut down, without a fault
    ├── RequestError       a prompt or a sampling parameter that the engine cannot serve
    │   └── QueueFullError not now, because too many wait already
    └── ServerError        a server that was asked is not there, refuses, or breaks off its answer

All are ValueErrors too. Each says what is wrong, where, and what to do about it.
"""


class JaxserveError(ValueError):
    """The root of the tree."""


class ConfigError(JaxserveError):
    """A `config.json` lacks what is needed, contradicts itself, or asks for something that is not supported."""


class CheckpointError(JaxserveError):
    """Files of a checkpoint are missing, damaged, or not what its config announces."""


class ShardingError(JaxserveError):
    """There is no such mesh, or an array or the experts cannot be placed on it as asked."""


class ProcessError(JaxserveError):
    """A process that shares the mesh has left, or was started with other settings."""


class TransferError(JaxserveError):
    """Pages did not come from another mesh, or not unharmed; `kind` is a word for what to do about it.

    `gone`: nobody offers them, or no longer. `refused`: they are other than was asked for, or another has asked first.
    `damaged`: they can be asked for again. `dead`: the link has ended, make another; `late`: so has it, by a deadline.
    """

    def __init__(self, message: str, kind: str):
        """`kind` is one of those above."""
        super().__init__(message)
        self.kind = kind


class EngineError(JaxserveError):
    """The engine has failed for good, or hangs: there will be no answer."""


class ShutDownError(EngineError):
    """The engine was shut down before the answer was complete."""


class RequestError(JaxserveError):
    """A prompt or a sampling parameter that the engine cannot serve; nothing was queued."""


class QueueFullError(RequestError):
    """As many answers wait as may; the same request can be served later."""


class ServerError(JaxserveError):
    """A server that was asked is not there, refuses, or breaks off its answer; `kind` is for counting."""

    def __init__(self, message: str, kind: str):
        """`kind` is a few words that are the same for all failures of a kind, such as `HTTP 429`."""
        super().__init__(message)
        self.kind = kind
