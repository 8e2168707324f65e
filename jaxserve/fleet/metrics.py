"""What dashboards read of a fleet: instances, jobs, what was lost and how soon it went on."""

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from jaxserve.fleet.fleet import Fleet, Span


class FleetCollector(Collector):
    """A fleet as it is when it is asked for."""

    def __init__(self, fleet: Fleet):
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        tally = self._fleet.tally
        yield from self._instances()
        jobs = GaugeMetricFamily("jaxserve:fleet_jobs", "Answers on their way, by stage.", labels=("stage",))
        stages = self._fleet.stages()
        for stage in ("waiting", "prefill", "decode"):
            jobs.add_metric([stage], stages[stage])
        yield jobs
        yield CounterMetricFamily("jaxserve:fleet_retries", "Jobs given to another instance.", tally.retries)
        lost = CounterMetricFamily("jaxserve:fleet_instances_lost", "Instances lost, by why.", labels=("why",))
        for why in ("gone", "dead", "hung"):
            lost.add_metric([why], tally.lost[why])
        yield lost
        text = "Prompts whose pages did not come from one instance to the other."
        missed = CounterMetricFamily("jaxserve:fleet_handovers_missed", text, labels=("prefill", "decode"))
        for link, count in list(tally.missed.items()):
            missed.add_metric(link, count)
        yield missed
        yield _summary("detection", "From the last sign of an instance until it was found lost.", tally.detection)
        yield _summary("recovery", "From then until another instance went on with an answer.", tally.recovery)

    def _instances(self) -> Iterator[Metric]:
        text = "Instances, by role and state."
        instances = GaugeMetricFamily("jaxserve:fleet_instances", text, labels=("role", "state"))
        for (role, state), count in Counter(self._fleet.members.states().values()).items():
            instances.add_metric([role, state], count)
        yield instances
        text = "Pages of an instance's cache in use; 1 is all."
        usage = GaugeMetricFamily("jaxserve:fleet_kv_cache_usage", text, labels=("instance", "role"))
        for about, c in ((each.instance.about, each.instance.signs.counters) for each in self._fleet.members):
            usage.add_metric([about.name, about.role], c.pages_used / max(1, c.pages))
        yield usage


def _summary(name: str, text: str, span: Span) -> Metric:
    return SummaryMetricFamily(f"jaxserve:fleet_{name}_seconds", text, count_value=span.count, sum_value=span.seconds)
