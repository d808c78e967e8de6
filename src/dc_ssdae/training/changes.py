"""What must stay as it was when a run goes on: settings that would make it another run, and its images."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dc_ssdae.errors import InputError, shown
from dc_ssdae.training.config import RunConfig

if TYPE_CHECKING:
    from dc_ssdae.data.sources import ImageSource


def lasting_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that no flag may change when a run goes on, by their dotted names.

    These are the fixed ones and those that name folders, which may have been moved, but not by this.
    """
    folders = {"training.output": config.training.output, "training.init_from": config.training.init_from}
    if config.distillation is not None:
        folders["distillation.teacher"] = config.distillation.teacher
    return {**config.fixed_settings(), **folders}


def check_changes(before: Mapping[str, Any], after: Mapping[str, Any], path: Path) -> None:
    """Refuse changed settings that would make it another run.

    Args:
        before: settings of the run by their dotted names, such as `RunConfig.fixed_settings` gives. A setting that one
            side alone has is another version's, and passed over; a loss term is not.
        after: the settings with which it is to go on.
        path: of the run's folder.

    Raises:
        InputError: names the first setting that differs.
    """
    for name in {**before, **after}:
        is_term = name.startswith("losses.")
        if is_term and name not in before and after[name]["weight"]:
            raise InputError(f"{name} is not part of {path}; start a new run with --training.init_from {path}")
        old, new = before.get(name), after.get(name)
        if old != new and name in before and (is_term or name in after):
            raise InputError(
                f"{name} is {shown(old)} in {path} and cannot become {shown(new)} when the run goes on; a new run can "
                f"start from its weights: --training.init_from {path}"
            )


def check_images(state: Mapping[str, Any], images: "ImageSource") -> None:
    """Refuse another data set than a run began with, in which its order would be another.

    Args:
        state: of the run's checkpoint.
        images: to train on.

    Raises:
        InputError: their number is another, or their names are.
    """
    count, began_with = len(images), state["images_in_data_set"]
    if began_with != count:
        raise InputError(f"the run began with {began_with} training images and the data set now has {count}")
    names = names_sha256(images)
    if None not in (names, state.get("names_sha256")) and names != state["names_sha256"]:
        raise InputError(f"the {count} training images have other names than when the run began; put those back")


def names_sha256(images: "ImageSource") -> str | None:
    """The checksum of the images' names; None for a data set that tells none."""
    tell = getattr(images, "names_sha256", None)
    return tell() if callable(tell) else None
