"""The page in a browser: both tabs with results, refusals, narrow windows; and how the command starts it."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from tiny_models import refusal

from dc_ssdae.app.compute import Models
from dc_ssdae.cli.main import main
from dc_ssdae.evaluation.candidates import parse_candidates


def test_the_command_needs_gradio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'dc-ssdae[app]'" in line


def test_the_command_serves_this_machine_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[tuple[Any, ...]] = []

    def launch(models: Models, *given: Any) -> tuple[Any, str]:
        called.append(([*models.specs], *given))
        return SimpleNamespace(block_thread=lambda: None), "http://the-address/"

    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "dc_ssdae.app.page", SimpleNamespace(launch=launch))
    assert main(["app", "--device", "cpu"]) == 0
    assert main(["app", "jpeg:50", "x=preset:demo", "--host", "0.0.0.0", "--port", "81", "--open"]) == 0
    assert called[0] == (["photos_f8c16"], "127.0.0.1", None, False, False)
    assert called[1] == (["jpeg:50", "x"], "0.0.0.0", 81, True, False)
    assert "http://the-address/" in capsys.readouterr().out


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the page is served, with the shipped model and a codec."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'dc-ssdae[app]'")
    from dc_ssdae.app.page import launch

    served, url = launch(Models(parse_candidates(["photos_f8c16", "jpeg:20"])), "127.0.0.1", None, False, False)
    yield url
    served.close(verbose=False)


@pytest.fixture
def page(address: str, browser: Any) -> Iterator[Any]:
    """The page, narrow, with an example chosen; at the end nothing may have been asked of another host."""
    opened = browser.new_page()
    asked: list[str] = []
    failed: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: failed.append(str(error)))
    opened.set_viewport_size({"width": 375, "height": 900})
    opened.goto(address)
    opened.get_by_label("Size in pixels").fill("64")
    yield opened
    opened.close()
    assert {urlsplit(url).hostname for url in asked if urlsplit(url).scheme.startswith("http")} == {"127.0.0.1"}
    assert failed == []


def choose(page: Any, label: str, name: str) -> None:
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=name, exact=True).click()


def press(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def test_a_port_that_is_taken_is_refused(address: str) -> None:
    from dc_ssdae.app.page import launch

    port = urlsplit(address).port
    assert f"port {port}" in refusal(launch, Models(parse_candidates(["jpeg:50"])), "127.0.0.1", port, False, False)


@pytest.mark.filterwarnings("ignore::Warning:gradio.queueing")
def test_both_tabs_show_results_and_say_what_is_wrong(page: Any, tmp_path: Path) -> None:
    press(page, "Reconstruct")
    page.get_by_text("there is no photo yet").wait_for()
    (tmp_path / "notes.png").write_text("no photo")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "notes.png")
    press(page, "Reconstruct")
    page.get_by_text("cannot read image 'notes.png'").wait_for()
    page.locator(".gallery-item").first.click()

    choose(page, "Sampler", "gradient_descent")
    press(page, "Reconstruct")
    page.get_by_text("latent 16×8×8").wait_for()
    figures = page.locator(".figures")
    assert figures.nth(0).locator("figure b").all_inner_texts() == ["start", *(f"step {n}" for n in range(1, 5))]
    assert figures.nth(1).locator("img").count() == 16
    assert page.locator(".drawings svg").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth") <= 375

    page.get_by_label("Size in pixels").fill("60")
    press(page, "Reconstruct")
    page.get_by_text("photos_f8c16: an image's sides must be positive multiples of f = 8").wait_for()
    page.get_by_label("Size in pixels").fill("64")
    choose(page, "Model", "jpeg:20")
    page.get_by_text("jpeg:20 decodes in one way only").wait_for()
    assert page.get_by_label("Sampler", exact=True).is_disabled()

    page.get_by_role("tab", name="Compare").click()
    press(page, "Compare")
    page.get_by_text("×4; grey is none").wait_for()
    compared = page.locator(".figures:visible figure")
    assert compared.locator("b").all_inner_texts() == ["original", "photos_f8c16", "jpeg:20"]
    assert compared.locator("img").count() == 5
    before = page.locator("img:visible[src*='/file=']").evaluate_all("images => images.map(image => image.src)")
    choose(page, "Left", "photos_f8c16")
    page.wait_for_function(
        "before => [...document.querySelectorAll('img')].filter(image => image.offsetParent && "
        "image.src.includes('/file=') && !before.includes(image.src)).length === 1",
        arg=before,
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
