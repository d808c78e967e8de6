"""The layout of the page: what the user chooses, and how results are shown. gradio is imported here alone."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from torch import Tensor

from dc_ssdae.app.compute import Models, Reconstruction, Settings, channels, descent_figure, read_photo
from dc_ssdae.data.sample_photos import sample_photos
from dc_ssdae.decoding import DESCENTS, ONE_STEP, samplers_of
from dc_ssdae.errors import InputError
from dc_ssdae.evaluation.candidates import OurCandidate
from dc_ssdae.evaluation.curves import save_picture
from dc_ssdae.evaluation.report.page import difference, fill

HERE = Path(__file__).parent
ORIGINAL = "original"
DIFFERENCE_GAIN = 4
ABOUT = """# DC-SSDAE
See what an autoencoder keeps of a photo: the image before and after, its latent, and the decode step by step."""
SYSTEM_FONT = ["system-ui", "sans-serif"]  # gradio's own would be one more download per page


class Figure(NamedTuple):
    """Pictures, uint8 (3, H, W), one below the other, with a title and a caption."""

    title: str
    caption: str
    pictures: Sequence[Tensor]


def launch(models: Models, host: str, port: int | None, in_browser: bool, debug: bool) -> tuple[gr.Blocks, str]:
    """Serve the page, in threads of their own; gives it and its address.

    Args:
        models: to choose from, at least one.
        host: address to listen on.
        port: None takes the first free one from 7860 on.
        in_browser: open it there.
        debug: print the traceback of what the page refuses.

    Raises:
        InputError: the port or the host cannot be listened on; or as `sample_photos`.
    """
    page = build(models, debug)
    theme = gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=SYSTEM_FONT, font_mono=["monospace"])
    looks: dict[str, Any] = {"theme": theme, "css_paths": HERE / "page.css", "footer_links": []}
    # Nothing leaves this machine, and nothing of what was tried stays in the browser.
    closed = {"share": False, "ssr_mode": False, "run_history": False, "enable_monitoring": False}
    try:
        _, url, _ = page.launch(
            server_name=host, server_port=port, inbrowser=in_browser, prevent_thread_lock=True, quiet=True,
            show_error=True, **looks, **closed,
        )  # fmt: skip
    except OSError as error:
        raise InputError(f"cannot listen on {host}, port {port or 'from 7860 on'}; choose another --port") from error
    return page, url


def build(models: Models, debug: bool = False) -> gr.Blocks:
    """Lay out the page."""
    labels = [*models.specs]

    @contextmanager
    def refusing() -> Iterator[None]:
        """Show the line of an `InputError`."""
        try:
            yield
        except InputError as error:
            raise gr.Error(
                escape(str(error), quote=False), title="This cannot be done", print_exception=debug
            ) from error

    def offer(label: str, sampler: str) -> list[Any]:
        """Set the controls of the decode to what a model, and a sampler, has."""
        with refusing():
            candidate = models.open(label)
        if not isinstance(candidate, OurCandidate):
            told = f"{label} decodes in one way only: it has no sampler, steps, tolerance or seed."
            alone = gr.update(choices=[ONE_STEP], value=ONE_STEP, interactive=False)
            return [alone, *3 * [gr.update(interactive=False)], gr.update(value=told, visible=True)]
        offered = samplers_of(candidate.value.dynamics)
        chosen = sampler if sampler in offered else ONE_STEP
        return [
            gr.update(choices=[*offered], value=chosen, interactive=True),
            gr.update(interactive=chosen != ONE_STEP),
            gr.update(interactive=chosen in DESCENTS),
            gr.update(interactive=True),
            gr.update(visible=False),
        ]

    def reconstruct(photo: Mapping[str, Any] | None, size: Any, label: str, *decoding: Any) -> list[Any]:
        with refusing():
            settings = Settings(size, *decoding)
            found = models.reconstruct(label, read_photo(photo["path"] if photo else None, size), settings, traced=True)
        pair, facts = tuple(map(as_array, (found.original, found.image))), " · ".join(found.facts())
        return [gr.update(visible=True), facts, pair, show_states(found), show_latent(found)]

    def compare(photo: Mapping[str, Any] | None, size: Any, chosen: Sequence[str]) -> list[Any]:
        with refusing():
            settings = Settings(size)
            pixels = read_photo(photo["path"] if photo else None, size)
            if not chosen:
                raise InputError("no model is chosen; choose one at least")
        pictures, figures = {ORIGINAL: as_array(pixels)}, [Figure(ORIGINAL, f"{size}×{size} pixels", [pixels])]
        for label in chosen:
            try:
                found = models.reconstruct(label, pixels, settings)
            except InputError as error:  # the others can still be compared
                gr.Warning(escape(str(error), quote=False))
                continue
            pictures[label] = as_array(found.image)
            stacked = [found.image, difference(pixels, found.image, DIFFERENCE_GAIN)]
            figures.append(Figure(label, "\n".join(found.facts()), stacked))
        names = [*pictures]
        left, right = (gr.update(choices=names, value=names[place]) for place in (0, -1))
        remark = f"Below each reconstruction: its difference from the original, ×{DIFFERENCE_GAIN}; grey is none."
        grid = render(figures, "max(9rem, 22%)", remark)
        return [gr.update(visible=True), pictures, left, right, (pictures[names[0]], pictures[names[-1]]), grid]

    with gr.Blocks(title="DC-SSDAE", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                photo = gr.Image(label="Photo", sources=["upload", "clipboard"], height=260)
                examples = [[as_array(example.pixels)] for example in sample_photos("held_out")]
                gr.Examples(examples, photo, label="Examples")
                size = gr.Number(
                    Settings.size, label="Size in pixels", precision=0,
                    info="The photo is resized and cropped to a square with this side, a multiple of the model's f.",
                )  # fmt: skip
            with gr.Column(scale=3, min_width=320):
                with gr.Tab("Reconstruct"):
                    with gr.Row():
                        model = gr.Dropdown(
                            labels, value=labels[0], label="Model", info="Loaded on first use.", scale=2
                        )
                        sampler = gr.Dropdown(
                            [ONE_STEP], value=ONE_STEP, label="Sampler", info="One of this model's.", scale=2
                        )
                        number = partial(gr.Number, min_width=90)
                        steps = number(Settings.steps, label="Steps", info="At most 64.", precision=0)
                        tolerance = number(Settings.tolerance, label="Tolerance", info="0: all steps.")
                        seed = number(Settings.seed, label="Seed", info="Of the noise.", precision=0)
                    remark = gr.Markdown(visible=False)
                    start = gr.Button("Reconstruct", variant="primary")
                    facts = gr.Markdown("Choose a photo, then press Reconstruct.", elem_classes="status")
                    with gr.Column(visible=False) as results:
                        gr.Markdown("### Original (left) and reconstruction (right)")
                        slider = gr.ImageSlider(show_label=False, format="png", interactive=False)
                        gr.Markdown("### The decode step by step")
                        states = gr.HTML(padding=False)
                        gr.Markdown("### The latent, channel by channel")
                        latent = gr.HTML(padding=False)
                with gr.Tab("Compare"):
                    about = "Each decodes in one step."
                    chosen = gr.CheckboxGroup(labels, value=labels, label="Models", info=about)
                    start_comparison = gr.Button("Compare", variant="primary")
                    told = gr.Markdown(
                        "Times are of a single run, which is slower the first time.", elem_classes="status"
                    )
                    with gr.Column(visible=False) as comparison:
                        with gr.Row():
                            left = gr.Dropdown([], label="Left")
                            right = gr.Dropdown([], label="Right")
                        pair = gr.ImageSlider(show_label=False, format="png", interactive=False)
                        grid = gr.HTML(padding=False)
        kept = gr.State({})
        controls = [sampler, steps, tolerance, seed]
        # One at a time: the cores are shared, and a model is loaded once. Inputs come as they are, the photo as a file:
        # gradio would read it in its own way, and say of a broken one what nobody understands.
        alone: dict[str, Any] = {"concurrency_id": "compute", "concurrency_limit": 1, "preprocess": False}
        for happens in (page.load, model.change, sampler.input):
            happens(offer, [model, sampler], [*controls, remark], show_progress="hidden", **alone)
        shown = [results, facts, slider, states, latent]
        start.click(reconstruct, [photo, size, model, *controls], shown, show_progress_on=facts, **alone)
        shown = [comparison, kept, left, right, pair, grid]
        start_comparison.click(compare, [photo, size, chosen], shown, show_progress_on=told, **alone)
        for side in (left, right):
            side.input(lambda kept, left, right: (kept[left], kept[right]), [kept, left, right], pair)
    return page


def show_states(found: Reconstruction) -> str:
    """The states of a decode in a grid, and, of several steps, the curves of their PSNR and residual."""
    if not found.states:
        return render([], remark="This model decodes in one way, which has no steps to look at.")
    figures, drawings = [], []
    for number, (pixels, psnr, residual) in enumerate(found.states):
        field = f"\nfield {residual:.3g}" if math.isfinite(residual) else ""
        figures.append(Figure(f"step {number}" if number else "start", f"{psnr:.2f} dB{field}", [pixels]))
    for name in ("psnr", "residual") if len(figures) > 2 else ():
        drawing = save_picture(partial(descent_figure, found.states, name), "svg").decode()
        drawings.append(drawing[drawing.index("<svg") :])
    return render(figures, "8rem", "PSNR, and the root mean square of the field, in each state.", drawings)


def show_latent(found: Reconstruction) -> str:
    """The channels of a latent in a grid."""
    if found.latent is None:
        return render([], remark="This model has no latent to look at.")
    shown = channels(found.latent)
    captions = [f"{channel.mean:.2f} ± {channel.std:.2f}" for channel in shown]
    figures = [Figure(f"{number}", captions[number], [channel.pixels]) for number, channel in enumerate(shown)]
    remark = "Mean ± standard deviation; each channel is shown from its smallest value (black) to its largest (white)."
    more = len(found.latent) - len(shown)
    return render(figures, "6rem", f"{remark} {more} more are not shown." if more else remark)


def render(figures: Sequence[Figure], least: str = "8rem", remark: str = "", drawings: Sequence[str] = ()) -> str:
    """Lay out pictures in a grid, each at least as wide as the CSS length `least`."""
    return fill(HERE / "figures.html", figures=figures, least=least, remark=remark, drawings=drawings)


def as_array(pixels: Tensor) -> np.ndarray:
    """As gradio takes images: uint8 (H, W, 3)."""
    return pixels.permute(1, 2, 0).numpy()
