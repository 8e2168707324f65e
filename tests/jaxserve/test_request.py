import pytest

from jaxserve import RequestError, SamplingParams


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("temperature", -0.1, "a finite number, 0 or more"),
        ("temperature", float("nan"), "finite"),
        ("temperature", "hot", "finite"),
        ("top_k", -2, "0 (off) or more"),
        ("top_k", 2**40, "0 (off) or more"),
        ("temperature", 1e300, "1e6 at most"),
        ("stop", 5, "a text or several"),
        ("stop_token_ids", 5, "a list of token ids"),
        ("top_k", 2.5, "whole number"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.1, "above 0 and at most 1"),
        ("min_p", -0.1, "from 0 to 1"),
        ("seed", -1, "from 0 to 2**32 - 1"),
        ("seed", 2**32, "from 0 to 2**32 - 1"),
        ("stop", "", "none empty"),
        ("stop", ["a", ""], "none empty"),
        ("stop", [3], "a text or several"),
        ("stop_token_ids", ["x"], "whole numbers"),
        ("max_tokens", 0, "1 or more"),
        ("max_tokens", True, "whole number"),
        ("min_tokens", 17, "from 0 to max_tokens (16)"),
        ("logprobs", 21, "from 0 to 20"),
    ],
)
def test_a_field_out_of_range_is_refused_with_its_name_and_range(field, value, rule):
    with pytest.raises(RequestError) as error:
        SamplingParams(**{field: value})
    assert str(error.value).startswith(f"{field} = ")
    assert rule in str(error.value)


def test_an_unknown_field_is_refused():
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]


def test_one_stop_text_may_be_given_without_a_list():
    assert SamplingParams(stop="END").stops == ("END",)
