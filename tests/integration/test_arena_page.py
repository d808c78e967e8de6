"""Pages in a browser, of made-up results; and, as a long test, the whole of examples/arena.sh."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_samples import LABELS, arena_of, entries, report_of, shown_of

from dc_ssdae.data.images import write_png
from dc_ssdae.data.sample_photos import sample_photos

pytestmark = pytest.mark.filterwarnings("ignore:Glyph .* missing from font")  # the duck
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of an arena, one model of which failed, and of one model."""
    folder, arena, report = tmp_path_factory.mktemp("pages"), arena_of(entries()), report_of()
    found = {"arena": arena.as_page(arena.as_picture())}
    found["evaluation"] = report.as_page([*shown_of(9.0).values()], [*shown_of(3.0).values()])
    for name, content in found.items():
        (folder / f"{name}.html").write_bytes(content)
    return {name: folder / f"{name}.html" for name in found}


@pytest.fixture
def page(browser: Any, pages: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Any]:
    """A page, by default the arena's; at the end nothing may have been said on the console."""
    opened = browser.new_page()
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("requestfailed", lambda failed: said.append(failed.url))
    opened.set_viewport_size({"width": 1440, "height": 900})
    opened.goto(pages[getattr(request, "param", "arena")].as_uri())
    yield opened
    opened.close()
    assert said == []


def pictures(page: Any) -> list[bytes]:
    """What the cells of the first photo look like: the original's, then those of the models that finished."""
    views = page.locator(".view[tabindex]")
    return [views.nth(place).screenshot() for place in range(len(LABELS))]


def test_slider_click_and_keyboard_flip_the_pictures(page: Any) -> None:
    before = pictures(page)
    page.locator("#split").fill("0")
    originals = pictures(page)
    assert set(originals[1:-1]).isdisjoint(before), "the last is lossless"
    assert originals[0] == before[0]
    originals_lie_beneath = (
        "layers => layers.every(layer => getComputedStyle(layer).backgroundImage"
        ".includes(layer.closest('.photo').querySelector('.original').src))"
    )
    assert page.eval_on_selector_all(".before .layer", originals_lie_beneath)
    page.locator("#split").fill("50")
    assert set(pictures(page)[1:-1]).isdisjoint({*before, *originals})
    page.locator("#reset").click()
    assert pictures(page) == before
    page.locator(".view").nth(1).click()  # which flips every model
    assert page.locator("#split").input_value() == "0"
    page.locator(".view").nth(2).press("Enter")
    assert page.locator("#split").input_value() == "100"


def test_zoom_and_drag_show_the_same_crop_of_all(page: Any) -> None:
    before = pictures(page)
    page.locator("#zoom").fill("4")
    zoomed = pictures(page)
    assert set(zoomed).isdisjoint(before)
    box = page.locator(".view").first.bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 40, box["y"] + 70, steps=3)
    page.mouse.up()
    assert set(pictures(page)).isdisjoint(zoomed)
    assert page.locator("#split").input_value() == "100", "a drag is no click"
    crop = page.evaluate(
        "['--x', '--y'].map(name => parseFloat(document.documentElement.style.getPropertyValue(name)))"
    )
    assert crop == pytest.approx([50 + 100 * 60 / (3 * box["width"]), 50 + 100 * 30 / (3 * box["height"])], abs=1.0)
    transforms = "layers => [...new Set(layers.map(layer => getComputedStyle(layer).transform))]"
    assert page.eval_on_selector_all(".layer", transforms) == ["matrix(4, 0, 0, 4, 0, 0)"]


@pytest.mark.parametrize("page", ["arena", "evaluation"], indirect=True)
def test_it_can_be_read_at_any_width(page: Any) -> None:
    for width in (375, 1440):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        smallest = page.evaluate(
            "Math.min(...[...document.querySelectorAll('p, li, td, th, h1, h2, h3, figcaption, label')]"
            ".map(element => parseFloat(getComputedStyle(element).fontSize)))"
        )
        assert smallest >= 13
        first = page.locator(".view").first.bounding_box()
        assert first["width"] >= 140
        assert first["y"] < 900, "pictures come first"


@pytest.mark.slow
def test_the_example_compares_our_model_with_codecs_and_resizing(tmp_path: Path) -> None:
    for photo in sample_photos("held_out"):
        write_png(photo.pixels[:, :160, :200], tmp_path / f"{photo.name}.png")
    environment = {**os.environ, "SIZE": "128", "LIMIT": "2"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment.pop("DC_SSDAE_WEIGHTS", None)
    command = ["bash", REPOSITORY / "examples/arena.sh", tmp_path, tmp_path / "arena"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {row["model"]: row for row in json.loads((tmp_path / "arena" / "table.json").read_text())["rows"]}
    assert list(rows) == ["ours", "jpeg:30", "jpeg:15", "webp:20", "bicubic:3.46", "bicubic:6.93"]
    assert rows["ours"]["psnr"]["value"] > rows["bicubic:3.46"]["psnr"]["value"] + 1
