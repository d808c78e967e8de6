"""What a model knows of its origin: which provenance is accepted, which is refused, and how it is told."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import EVALUATION, refusal

from dc_ssdae.errors import InputError
from dc_ssdae.provenance import Evaluation, Provenance, name_of_path, short_name

WHOLE: dict[str, Any] = {
    "preset": "demo",
    "changes": ["training.lr", "losses.kl"],
    "data": "photos",
    "images": 1234,
    "image_size": 64,
    "steps": 300000,
    "batch_size": 1,
    "initialised_from": "1-low_resolution",
    "teacher": "first",
    "source": "AutoencoderKL owner/name",
    "untrained": ["decoder"],
    "random_backbones": ["lpips"],
    "license": "apache-2.0",
    "version": "0.1.0",
    "evaluations": [EVALUATION],
}


def plain(given: Any) -> dict[str, Any]:
    return Provenance.from_mapping(given).to_mapping()


def test_what_is_known_is_kept_as_json_keeps_it() -> None:
    assert plain(WHOLE) == plain(json.loads(json.dumps(WHOLE))) == WHOLE
    assert list(plain(dict(reversed(WHOLE.items())))) == list(WHOLE), "in one order"
    assert plain({"untrained": ("encoder",)}) == {"untrained": ["encoder"]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"presett": "demo"}, "unknown key of provenance 'presett' (did you mean 'preset'?)"),
        ({"preset": "a\nb"}, "provenance.preset is 'a\\nb'; it must be a line"),
        ({"steps": -1}, "must be at least 0"),
        ({"untrained": ["dynamics"]}, "provenance.untrained is ['dynamics']; it must be of type list"),
        ({"evaluations": [{**EVALUATION, "metric": {}}]}, "unknown key of provenance.evaluations[0] 'metric'"),
        ({"evaluations": [{**EVALUATION, "metrics": {"psnr": {"value": float("nan")}}}]}, "a finite number"),
        ({"evaluations": [{**EVALUATION, "decoding": {"x": {"y": 1}}}]}, "decoding is "),
    ],
)
def test_what_does_not_fit_is_one_line(changed: dict[Any, Any], message: str) -> None:
    line = refusal(Provenance.from_mapping, {**WHOLE, **changed})
    assert message in line
    assert line.isprintable()
    assert len(line) < 500


def test_a_value_of_any_depth_is_refused_in_a_short_line() -> None:
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    entry = {**EVALUATION, "decoding": {"x": nested}}
    for value in (3, nested, {"data": nested}, {"evaluations": nested}, {"evaluations": [entry]}):
        assert len(refusal(Provenance.from_mapping, value)) < 500


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from([*WHOLE, "other"]), values, max_size=4))
def test_of_anything_it_gives_plain_data_or_one_line(given: dict[str, Any]) -> None:
    problem, known = "", Provenance()
    try:
        known = Provenance.from_mapping(given)
    except InputError as error:
        problem = str(error)
    assert problem.isprintable()
    assert Provenance.from_mapping(json.loads(json.dumps(known.to_mapping(), allow_nan=False))) == known
    assert all(text.isprintable() for fact in known.facts() for text in fact)


def test_figures_of_the_same_kind_are_replaced() -> None:
    def entries(*evaluations: dict[str, Any]) -> Any:
        known = Provenance()
        for evaluation in evaluations:
            known = known.with_evaluation(Evaluation.from_mapping(evaluation))
        return known.to_mapping()["evaluations"]

    better = {**EVALUATION, "images": 6000, "metrics": {"psnr": {"value": 30.0}}}
    assert entries(EVALUATION, better) == [better]
    for key, value in (("protocol", "rae"), ("data", "x"), ("image_size", 512), ("decoding", {})):
        other = {**EVALUATION, key: value}
        assert entries(EVALUATION, other) == [EVALUATION, other]
    assert len(entries({**EVALUATION, "decoding": None}, {**EVALUATION, "decoding": {}})) == 1


def test_how_it_is_told() -> None:
    assert Provenance().facts() == []
    facts = dict(Provenance.from_mapping(WHOLE).facts())
    assert len(facts) == len(WHOLE) - 1, "each but the evaluations"
    assert (facts["steps"], facts["settings changed in it"]) == ("300,000", "training.lr, losses.kl")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/someone/photos", "photos"),
        ("/data/imagenet/validation", "imagenet/validation"),
        ("/runs/mine/model", "mine"),
        ("/data/train-{000..127}.tar", "train-{000..127}.tar"),
        ("https://user:secret@host/private/train-{0..9}.tar?signature=secret#x", "train-{0..9}.tar"),
        ("/", None),
        ("/data/a\nb\x1b", "a b"),
    ],
)
def test_a_name_tells_nothing_of_where_it_lies(path: str, name: str | None) -> None:
    assert name_of_path(path) == name


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(max_size=400))
def test_any_text_makes_a_name_that_is_accepted(text: str) -> None:
    name = short_name(text)
    assert name is None or plain({"data": name}) == {"data": name}
