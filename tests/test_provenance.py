"""What a model knows of its origin: which provenance is accepted, which is refused, and how it is told."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dc_ssdae.errors import InputError
from dc_ssdae.evaluation.estimates import METRICS
from dc_ssdae.provenance import (
    TITLES,
    check_evaluation,
    check_provenance,
    evaluation_title,
    is_untrained,
    metric_text,
    name_of_path,
    short_name,
    training_lines,
    with_evaluation,
)

EVALUATION: dict[str, Any] = {
    "protocol": "dcae",
    "data": "photos/validation",
    "images": 5000,
    "image_size": 256,
    "decoding": {"sampler": "nesterov", "num_steps": 4, "step_size": [0.5, 0.25]},
    "metrics": {"psnr": {"value": 25.125, "low": 25.0, "high": 25.25}, "rfid": {"value": 0.0}},
}
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


def test_what_is_known_is_kept_as_json_keeps_it() -> None:
    assert check_provenance(None) is None
    assert check_provenance({}) == {}
    assert check_provenance(WHOLE) == WHOLE
    assert check_provenance(json.loads(json.dumps(WHOLE))) == WHOLE
    tuples = {"untrained": ("encoder", "decoder"), "evaluations": (EVALUATION,)}
    assert check_provenance(tuples) == {"untrained": ["encoder", "decoder"], "evaluations": [EVALUATION]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"presett": "demo"}, r"unknown key of provenance 'presett' \(did you mean 'preset'\?\)"),
        ({3: "demo"}, "unknown key of provenance"),
        ({"preset": 3}, "provenance.preset is 3; it must be a line"),
        ({"preset": "a\nb"}, r"provenance.preset is 'a\\nb'; it must be a line"),
        ({"preset": "a\u2028b"}, "must be a line"),
        ({"preset": "a\u202eb"}, "must be a line"),
        ({"data": "\x1b[31m"}, "must be a line"),
        ({"data": "x" * 201}, "must be a line of 1 to 200"),
        ({"data": " "}, "must be a line"),
        ({"images": True}, "provenance.images is True; it must be a whole number"),
        ({"steps": -1}, "must be a whole number from 0 on"),
        ({"steps": 1.0}, "must be a whole number"),
        ({"steps": 10**30}, "must be a whole number"),
        ({"untrained": ["dynamics"]}, r"provenance.untrained\[0\] is 'dynamics'; it must be encoder or decoder"),
        ({"untrained": "encoder"}, "must be a list"),
        ({"changes": ["x"] * 65}, "must be a list of 64 at most"),
        ({"license": "Apache 2.0\n- x"}, "must be a licence as the hub names it"),
        ({"evaluations": {}}, "must be a list"),
        ({"evaluations": [3]}, r"provenance.evaluations\[0\] is 3; it must be a mapping"),
        ({"evaluations": [{"protocol": "dcae"}]}, r"provenance.evaluations\[0\] lacks data"),
        ({"evaluations": [{**EVALUATION, "metric": {}}]}, r"unknown key of provenance.evaluations\[0\] 'metric'"),
        ({"evaluations": [{**EVALUATION, "metrics": {"a|b": {"value": 1.0}}}]}, r"'a\|b'; it must be a name"),
        ({"evaluations": [{**EVALUATION, "metrics": {"psnr": {}}}]}, "metrics.psnr lacks value"),
        ({"evaluations": [{**EVALUATION, "metrics": {"psnr": {"value": float("nan")}}}]}, "must be a finite number"),
        ({"evaluations": [{**EVALUATION, "metrics": {"psnr": {"value": 10**400}}}]}, "must be a finite number"),
        ({"evaluations": [{**EVALUATION, "decoding": {"x": {"y": 1}}}]}, "must be a finite number"),
    ],
)
def test_what_does_not_fit_is_one_line(changed: dict[Any, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        check_provenance({**WHOLE, **changed})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_what_is_no_mapping_is_refused() -> None:
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    for value in (3, "preset", [WHOLE], nested):
        with pytest.raises(InputError, match=r"provenance is .*; it must be a mapping") as caught:
            check_provenance(value)
        assert len(str(caught.value)) < 500


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from([*WHOLE, "other"]), values, max_size=4))
def test_of_anything_it_gives_plain_data_or_one_line(given: dict[str, Any]) -> None:
    problem = ""
    try:
        checked = check_provenance(given) or {}
    except InputError as error:
        problem, checked = str(error), {}
    assert problem.isprintable()
    if not problem:
        assert check_provenance(json.loads(json.dumps(checked, allow_nan=False))) == checked
        assert all(text.isprintable() for line in training_lines(checked) for text in line)


def test_metrics_have_one_order_and_the_reports_titles() -> None:
    shuffled = {**EVALUATION, "metrics": {name: {"value": 1} for name in ("mine", "rfid", "ssim", "psnr")}}
    assert list(check_evaluation("it", shuffled)["metrics"]) == ["psnr", "ssim", "rfid", "mine"]
    for name, info in METRICS.items():
        assert TITLES[name] == ", ".join(filter(None, [info.title, info.unit]))


def test_figures_of_the_same_kind_are_replaced() -> None:
    better = {**EVALUATION, "images": 6000, "metrics": {"psnr": {"value": 30.0}}}
    assert with_evaluation(WHOLE, better)["evaluations"] == [better]
    assert WHOLE["evaluations"] == [EVALUATION]
    for key, value in (("protocol", "rae"), ("data", "x"), ("image_size", 512), ("decoding", {})):
        other = {**EVALUATION, key: value}
        assert with_evaluation(WHOLE, other) == {**WHOLE, "evaluations": [EVALUATION, other]}
    assert with_evaluation(None, EVALUATION) == {"evaluations": [EVALUATION]}
    in_one_step = {name: value for name, value in EVALUATION.items() if name != "decoding"}
    assert len(with_evaluation(with_evaluation(None, in_one_step), {**in_one_step, "decoding": {}})["evaluations"]) == 1


def test_how_it_is_told() -> None:
    assert training_lines({}) == []
    assert dict(training_lines(WHOLE)) == {
        "untrained": "the decoder, whose weights are random",
        "preset": "demo, with training.lr and losses.kl changed",
        "converted from": "AutoencoderKL owner/name",
        "started from": "1-low_resolution",
        "distilled from": "first",
        "training data": "photos, 1,234 images, crops of 64×64 px",
        "training": "300,000 steps of 1 image",
        "caution": "loss terms with random backbones, which teach nothing: lpips",
        "licence of the weights": "apache-2.0",
        "written by": "dc-ssdae 0.1.0",
    }
    untrained = {"untrained": ["encoder", "decoder"]}
    assert training_lines(untrained) == [("untrained", "all of it: the weights are random")]
    assert is_untrained(untrained)
    assert not is_untrained(WHOLE)
    assert not is_untrained(None)
    assert evaluation_title(EVALUATION, "<{}>".format) == (
        "protocol <dcae>, 5,000 images of <photos/validation>, 256×256 px, "
        "decoded with <sampler> <nesterov>, <num_steps> <4>, <step_size> <0.5, 0.25>"
    )
    watching = {"protocol": "training", "data": "x", "images": 1, "step": 1, "metrics": {}}
    assert evaluation_title(watching) == "during training, after 1 step, 1 image of x, decoded in one step"
    assert metric_text(EVALUATION["metrics"]["psnr"]) == "25.125 (25 to 25.25)"
    assert metric_text({"value": 0.0}) == "0"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/someone/photos", "photos"),
        ("/data/photos/", "photos"),
        ("/data/imagenet/validation", "imagenet/validation"),
        ("/runs/mine/model", "mine"),
        ("/data/train-{000..127}.tar", "train-{000..127}.tar"),
        ("https://user:secret@host/private/train-{0..9}.tar?signature=secret#x", "train-{0..9}.tar"),
        ("https://secret-host", None),
        ("/", None),
        ("/data/a\nb\x1b", "a b"),
    ],
)
def test_a_name_tells_nothing_of_where_it_lies(path: str, name: str | None) -> None:
    assert name_of_path(path) == name


def test_relative_paths_are_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "photos" / "sub")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [name_of_path(path) for path in ("..", ".", "~/pictures")] == ["photos", "sub", "pictures"]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(max_size=400))
def test_any_text_makes_a_name_that_is_accepted(text: str) -> None:
    name = short_name(text)
    assert name is None or check_provenance({"data": name}) == {"data": name}
