"""The whole arena: the shipped model, an autoencoder of diffusers, codecs; its page in a browser."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny

from dc_ssdae.data.images import write_png
from dc_ssdae.data.sample_photos import sample_photos

REPOSITORY = Path(__file__).resolve().parents[2]
LABELS = ["ours", "peer", "jpeg:30", "jpeg:15", "webp:20", "bicubic:3.46", "bicubic:6.93"]


@pytest.fixture(scope="module")
def arena(made_once: Any) -> Path:
    """The folder that examples/arena.sh writes of crops of sample photos, with a peer of random weights."""

    def compare(folder: Path) -> None:
        photos, peer = folder / "photos", folder / "peer"
        for split, part in (("train", "train"), ("held_out", "validation")):
            (photos / part).mkdir(parents=True)
            for photo in sample_photos(split):  # type: ignore[arg-type]
                for place in range(10):
                    crop = photo.pixels[:, 10 * place : 10 * place + 160, 12 * place : 12 * place + 200]
                    write_png(crop, photos / part / f"{photo.name}-{place}.png")
        AutoencoderTiny(encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4).save_config(peer)
        environment = {**os.environ, "SIZE": "128", "LIMIT": "8"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # workers share the machine
        environment.pop("DC_SSDAE_WEIGHTS", None)
        command = ["bash", REPOSITORY / "examples/arena.sh", photos, folder / "arena", peer]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return made_once("arena", compare) / "arena"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The system's Chromium, with nothing of its own going on."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("there is no chromium on this machine (Debian: apt install chromium)")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("browser")), executable_path=found, headless=True, args=quiet
        )
        yield context
        context.close()


@pytest.fixture
def page(browser: Any, arena: Path) -> Iterator[Any]:
    """The arena's page; at the end nothing may have been said on the console."""
    opened = browser.new_page()
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("requestfailed", lambda request: said.append(request.url))
    opened.set_viewport_size({"width": 1440, "height": 900})
    opened.goto((arena / "index.html").as_uri())
    yield opened
    opened.close()
    assert said == []


def test_every_model_has_its_row(arena: Path) -> None:
    rows = {row["model"]: row for row in json.loads((arena / "table.json").read_text())["rows"]}
    assert list(rows) == LABELS
    assert not any("failed" in row for row in rows.values())
    assert [label for label, row in rows.items() if "random weights" in row["remarks"]] == ["peer"]
    assert rows["ours"]["latent_shape"]["value"] == [16, 16, 16]
    assert rows["peer"]["compression"]["value"] == 48
    assert rows["ours"]["psnr"]["value"] > rows["bicubic:3.46"]["psnr"]["value"] + 1
    for figure in ("psnr", "bits_per_pixel"):
        assert rows["jpeg:30"][figure]["value"] > rows["jpeg:15"][figure]["value"]


def pictures(page: Any) -> list[bytes]:
    """What the first cells look like: the original's, then those of the models."""
    views = page.locator(".view")
    return [views.nth(place).screenshot() for place in range(1 + len(LABELS))]


def test_the_slider_changes_the_pictures(page: Any) -> None:
    before = pictures(page)
    assert len(set(before)) == len(before)
    assert page.locator(".view").count() == 8 * len(before)
    page.locator("#split").fill("0")
    originals = pictures(page)
    assert originals[0] == before[0]
    assert all(now != then for now, then in zip(originals[1:], before[1:], strict=True))
    page.locator("#split").fill("50")
    halves = pictures(page)
    assert all(now not in (one, other) for now, one, other in zip(halves[1:], originals[1:], before[1:], strict=True))
    page.locator("#reset").click()
    assert pictures(page) == before
    page.locator(".view").nth(2).click()  # which flips every model
    assert page.locator("#split").input_value() == "0"
    page.locator(".view").nth(5).press("Enter")
    assert page.locator("#split").input_value() == "100"


def test_zoom_and_drag_show_the_same_crop_of_all(page: Any) -> None:
    before = pictures(page)
    page.locator("#zoom").fill("4")
    zoomed = pictures(page)
    # A picture that is black all over (the peer's random decoder may give that) looks the same at every zoom and place.
    moving = [place for place in range(len(before)) if place != 1 + LABELS.index("peer")]
    assert all(zoomed[place] != before[place] for place in moving)
    box = page.locator(".view").first.bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 40, box["y"] + 70, steps=3)
    page.mouse.up()
    dragged = pictures(page)
    assert all(dragged[place] != zoomed[place] for place in moving)
    assert page.locator("#split").input_value() == "100", "a drag is no click"
    places = page.eval_on_selector_all(
        ".layer", "layers => [...new Set(layers.map(layer => getComputedStyle(layer).transform))]"
    )
    assert places == ["matrix(4, 0, 0, 4, 0, 0)"]


@pytest.mark.parametrize("width", [375, 1440])
def test_it_can_be_read_at_any_width(page: Any, width: int) -> None:
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
    names = page.locator("td:first-child")
    heights = [names.nth(place).bounding_box()["height"] for place in range(names.count())]
    assert max(heights) < 90, "a name is not broken letter by letter"
