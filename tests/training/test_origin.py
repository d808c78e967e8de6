"""What a run's model says of its origin: names without paths, what differs from the preset, what is inherited."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import MODEL, run_config

from dc_ssdae.presets import load_preset
from dc_ssdae.training.config import DataConfig, RunConfig
from dc_ssdae.training.origin import changed_settings, data_name, inherited, origin


def demo(training: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    """The preset demo, as --config demo gives it, and some changes."""
    layer = load_preset("demo")
    layer["training"] = {**layer["training"], "preset": "demo", **(training or {})}
    return RunConfig.from_mapping({**layer, **sections})


def test_only_what_makes_it_another_training_is_a_change() -> None:
    same = {"steps": 7, "output": "x", "seed": 3, "wandb_project": "mine", "processes": 1}
    assert changed_settings(demo(same, data={**load_preset("demo")["data"], "root": "photos"})) == []
    changed = demo({"lr": 1.0}, losses={"lpips": 0.0, "repa": 0.0, "kl": 0.0}, model=MODEL)
    names = ["model.encoder", "model.decoder", "model.dynamics", "training.lr", "losses.kl"]
    assert changed_settings(changed) == names


@pytest.mark.parametrize(
    ("data", "train", "validation"),
    [
        ({"root": "/data/photos"}, "photos", "photos/validation"),
        ({"root": "/data/photos", "validation": "/data/others"}, "photos", "others"),
        ({"dataset": {"class_path": "Shards", "init_args": {"urls": ["https://h/b-0.tar?key"]}}}, "b-0.tar", None),
        ({"dataset": {"class_path": "HubDataset", "init_args": {"path": "owner/set"}}}, "owner/set", None),
        ({"dataset": {"class_path": "my.own.Photos", "init_args": {"root": "/data/secret"}}}, "Photos", None),
    ],
)
def test_data_are_named_without_their_place(data: dict[str, Any], train: str | None, validation: str | None) -> None:
    config = DataConfig(**data)
    assert data_name(config) == train
    if validation is not None:
        assert data_name(config, validation=True) == validation


def test_a_new_model_has_random_weights_until_they_train() -> None:
    fresh = inherited(run_config(), None)
    assert fresh == {"untrained": ["encoder", "decoder"]}
    assert "untrained" not in origin(run_config(), fresh, 9, [])
    decoder_alone = run_config(train=["decoder", "losses.repa"])
    assert origin(decoder_alone, fresh, 9, [])["untrained"] == ["encoder"]
    own = run_config(model={"encoder": {"class_path": "mine.Encoder"}})
    assert inherited(own, None) == {"untrained": ["decoder"]}, "a user's class may bring its weights"


def test_what_stays_true_is_inherited(tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    folder.mkdir()
    known = {"source": "AutoencoderKL owner/name", "untrained": ["decoder"], "license": "mit", "steps": 3, "data": "x"}
    (folder / "config.json").write_text(json.dumps({"provenance": known}))
    config = run_config(init_from=str(folder), train=["decoder"])
    before = inherited(config, folder)
    assert before == {"source": "AutoencoderKL owner/name", "untrained": ["decoder"], "license": "mit"}
    found = origin(config, before, 9, ["lpips"])
    assert found.items() >= {"source": "AutoencoderKL owner/name", "license": "mit", "images": 9}.items()
    assert found["initialised_from"] == "converted"
    assert found["random_backbones"] == ["lpips"]
    assert not found.keys() & {"untrained", "data", "steps"}
    assert origin(config, found, 9, ["lpips"]) == found, "as a run that goes on finds it"


def test_a_distillation_names_its_teacher() -> None:
    config = RunConfig.from_mapping({**run_config().to_mapping(), "distillation": {"teacher": "/runs/first/model"}})
    assert origin(config, None, 9, [])["teacher"] == "first"
