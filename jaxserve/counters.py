"""What an engine counts. Plain numbers, for metrics and for whoever wants to know where the time goes."""

from dataclasses import dataclass, field

from jaxserve.tiers.counters import TierCounters


@dataclass
class Counters:
    """Sums since the engine started; those of the moment are marked."""

    steps: int = 0
    waiting: int = 0  # now: answers that are queued
    running: int = 0  # now
    pages_used: int = 0  # now
    pages: int = 0  # in all
    page_size: int = 0  # tokens of each
    slots: int = 0  # answers that can run at once
    preemptions: int = 0
    prompt_tokens: int = 0  # of answers that have started
    cached_tokens: int = 0  # of those, found in the cache
    generated_tokens: int = 0
    decoded_rows: int = 0  # a row an answer and a round: a token of the model's own, and guesses that held
    wide_rows: int = 0  # of those, with guesses verified
    accepted: list[int] = field(default_factory=list)  # guesses that held, by their place
    compiled: int = 0  # programs, before the first step
    late_compiled: int = 0  # programs since: each made a step wait
    schedule_seconds: float = 0.0  # planning and launching
    device_seconds: float = 0.0  # waiting for results
    read_seconds: float = 0.0  # from results to outputs
    exposed_seconds: float = 0.0  # of the host's time, how much the device had nothing to do in
    step_seconds: float = 0.0
    tiers: dict[str, TierCounters] = field(default_factory=dict)  # of the context cache, from the fastest

    @property
    def tokens_per_row(self) -> float:
        """New tokens of an answer in a round, 1 without guesses that hold."""
        return (self.decoded_rows + sum(self.accepted)) / max(1, self.decoded_rows)
