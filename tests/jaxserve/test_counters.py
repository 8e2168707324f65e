from dataclasses import fields

from jaxserve.counters import Counters, total
from jaxserve.tiers.counters import TierCounters


def test_sums_over_engines_have_every_field():
    ones = {f.name: 1 for f in fields(Counters) if f.name not in ("accepted", "tiers")}
    memory, disk = TierCounters(hits=1, read_seconds=0.5), TierCounters(misses=2)
    one = Counters(**ones, accepted=[1, 2], tiers={"memory": memory, "disk": disk})
    both = total([one, Counters(**ones, accepted=[3], tiers={"memory": memory})])
    assert both.accepted == [4, 2]
    assert both.tiers == {"memory": TierCounters(hits=2, read_seconds=1.0), "disk": disk}
    assert {name: getattr(both, name) for name in ones} == {name: 2 for name in ones} | {"page_size": 1}
    assert total([]) == Counters()


def test_of_an_engine_that_is_gone_the_sums_remain_and_nothing_of_the_moment():
    c = Counters(steps=3, generated_tokens=5, waiting=1, running=2, pages_used=3, pages=4, slots=5, page_size=16)
    assert c.at_rest() == Counters(steps=3, generated_tokens=5, page_size=16)
