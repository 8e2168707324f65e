import itertools

import pytest

from jaxserve.tiers.keys import PageKind, digest_of

KIND = PageKind("deepseek", "v1", "bfloat16", 64)


def test_a_page_s_key_is_the_same_in_every_process():
    assert KIND.key(b"digest").hex() == "f92ec6053886dc29d58843aada859e92b64cd979bbc2c5130d3b514acde46bc0"


@pytest.mark.parametrize("change", [{"model": "qwen"}, {"version": "v2"}, {"dtype": "int8"}, {"page_size": 128}])
def test_pages_of_another_kind_have_other_keys(change):
    assert KIND._replace(**change).key(b"digest") != KIND.key(b"digest")


def test_pages_of_other_tokens_have_other_keys():
    assert KIND.key(b"digest") != KIND.key(b"another")


def test_where_a_part_ends_matters():
    parts = [b"a", b"", b"ab", b"b", b"\0", b"1"]
    groups = [group for n in range(4) for group in itertools.product(parts, repeat=n)]
    assert len({digest_of(*group) for group in groups}) == len(groups)
