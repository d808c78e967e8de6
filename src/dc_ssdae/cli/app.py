"""`dc-ssdae app`: a page in the browser on which models are tried on photos."""

from dataclasses import dataclass

from dc_ssdae.cli.common import import_classes, say, select_device
from dc_ssdae.cli.options import DeviceOptions, ImportOptions
from dc_ssdae.errors import InputError
from dc_ssdae.presets import SHIPPED_MODEL
from dc_ssdae.settings import setting


@dataclass(kw_only=True)
class Options(DeviceOptions, ImportOptions):
    """Serve a page on which photos are reconstructed and models compared.

    The page shows a photo before and after, the channels of its latent, the decode step by step, and several models
    side by side. It needs no connection to the internet. Requires pip install 'dc-ssdae[app]'.

    Args:
        models: what to offer, each as in dc-ssdae compare; by default photos_f8c16, which comes with this package.
            Each is loaded when it is first used.
        host: address to listen on; 0.0.0.0 lets other machines in.
        port: to listen on; by default the first free one from 7860 on.
        open: open the page in a browser.
    """

    models: list[str] = setting([], positional=True, metavar="MODEL")
    host: str = setting("127.0.0.1", metavar="HOST")
    port: int | None = setting(None, at_least=1, at_most=65535, metavar="N")
    open: bool = False


def run(options: Options) -> None:
    """Serve the page until Ctrl-C."""
    device, classes = select_device(options.device), import_classes(options.modules)
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise InputError(f"the page needs gradio: pip install 'dc-ssdae[app]' ({error})") from error
    import torch

    from dc_ssdae.app.compute import Models
    from dc_ssdae.app.page import launch
    from dc_ssdae.evaluation.candidates import parse_candidates

    specs = parse_candidates(options.models or [SHIPPED_MODEL])
    models = Models(specs, device, getattr(torch, options.dtype), classes)
    page, url = launch(models, options.host, options.port, options.open, options.debug)
    say(f"{url} (Ctrl-C ends it)")
    page.block_thread()
