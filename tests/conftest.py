"""What all tests share: one thread share per worker, fixed seeds, and the folders with data from outside."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from two_processes import TwoProcesses

REPOSITORY = Path(__file__).resolve().parents[1]


def folder_from(variable: str, default: str) -> Path:
    """The folder that an environment variable names, else its default beside the repository."""
    return Path(os.environ.get(variable) or REPOSITORY / default).resolve()


def pytest_configure(config: pytest.Config) -> None:
    # Workers of xdist share the machine; an explicit OMP_NUM_THREADS is the user's own choice.
    if not os.environ.get("OMP_NUM_THREADS"):
        workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test that asks for `golden_file` every file of the golden folder, or one skip where there is none."""
    if "golden_file" not in metafunc.fixturenames:
        return
    folder = folder_from("DC_SSDAE_GOLDEN", "../shared/golden")
    files = sorted(folder.glob("*.safetensors"))
    if files:
        metafunc.parametrize("golden_file", files, ids=[file.stem for file in files])
    else:
        reason = f"no safetensors file in {folder}; set DC_SSDAE_GOLDEN to the folder of golden files"
        metafunc.parametrize("golden_file", [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="absent")])


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same state of the default generator, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


MadeOnce = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """Fill a folder in one of xdist's workers, for what takes long; the others wait and find it."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base

    def make(name: str, fill: Callable[[Path], None]) -> Path:
        folder = root / name
        with FileLock(root / f"{name}.lock"):
            if not (folder / ".made").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                (folder / ".made").touch()
        return folder

    return make


@pytest.fixture(scope="session")
def saved_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small saved model, which tests read and never change."""
    from tiny_models import tiny

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture
def copied_folder(saved_folder: Path, tmp_path: Path) -> Path:
    """A copy of the saved model's folder, to be spoilt."""
    return shutil.copytree(saved_folder, tmp_path / "copied")


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoProcesses]:
    """Run a function in two processes of a group, which all tests of a worker share."""
    group = TwoProcesses(tmp_path_factory.mktemp("processes"))
    yield group
    group.close()


@pytest.fixture(scope="session")
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
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of as many KiB as the module's DISK_KIB says; skips where none can be mounted."""
    path = tmp_path / "disk"
    path.mkdir()
    size = f"size={request.module.DISK_KIB}k"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small file system is not permitted: {mounted.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture
def data_dir() -> Path:
    folder = folder_from("DC_SSDAE_DATA", "../shared/data/imagenet-sample")
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing; set DC_SSDAE_DATA to a folder of photos")
    return folder


@pytest.fixture
def squeezenet() -> Path:
    """The folder with torchvision's weights of SqueezeNet."""
    folder = folder_from("DC_SSDAE_WEIGHTS", "../shared/weights")
    if not (folder / "squeezenet1_1-b8a52dc0.pth").is_file():
        pytest.skip(f"SqueezeNet's weights are not in {folder}; set DC_SSDAE_WEIGHTS to their folder")
    return folder
