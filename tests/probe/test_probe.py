"""The probe: its loss against closed forms, its samplers on exact fields, its resuming, and the command."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import differences, forget_processes, last, make_images, metrics
from torch import Tensor
from torch.nn.functional import pixel_shuffle

from dc_ssdae.cli.main import main
from dc_ssdae.data.images import to_model_range
from dc_ssdae.data.loader import ValidationImages
from dc_ssdae.data.sources import open_sources
from dc_ssdae.distributed import Processes
from dc_ssdae.dynamics import EquilibriumMatching, FlowMatching
from dc_ssdae.errors import InputError
from dc_ssdae.evaluation.candidates import open_candidate, parse_candidate
from dc_ssdae.latent import DiagonalGaussian
from dc_ssdae.probe.config import DYNAMICS, LatentsConfig, NetworkConfig, ProbeConfig, probe_training
from dc_ssdae.probe.features import FeatureNetwork, frechet_distances
from dc_ssdae.probe.latents import LatentSamples, LatentSources, open_latents
from dc_ssdae.probe.measure import ProbeMeasurement, matching_places
from dc_ssdae.probe.run import Probe
from dc_ssdae.probe.sampling import TOLERANCE, Sampling, draw_latents
from dc_ssdae.probe.step import SHARES, FieldStep, draw_levels, field_losses, level_of
from dc_ssdae.probe.trainer import ProbeTask, ProbeTrainer, build_step
from dc_ssdae.training.run import RunFolder

CPU = torch.device("cpu")
EQM = DYNAMICS["equilibrium_matching"]


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    forget_processes()
    yield
    forget_processes()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of twelve images, and two of one, too few to be told."""
    root = tmp_path_factory.mktemp("photos")
    for seed, (name, count) in enumerate({"a": 12, "b": 1, "c": 12, "d": 1}.items()):
        make_images(root / name, count, seed)
    return root


@pytest.fixture(scope="module")
def latents(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> LatentsConfig:
    """The pixels of the photos at 8 px in patches of 2: latents of 12×4×4, each with its mirror image's."""
    folder = tmp_path_factory.mktemp("probe")
    return probe_of(photos, folder, workers=0).prepare().data


def probe_of(photos: Path, folder: Path, **given: Any) -> Probe:
    """The probe of the photos' pixels at 8 px, in patches of 2."""
    spec, images = parse_candidate("pixels:2"), open_sources(str(photos), None, None, None)
    settings: dict[str, Any] = {"size": 8, "samples": 6, **given}
    return Probe(folder=folder, device=CPU, spec=spec, candidate=open_candidate(spec), images=images, **settings)


def probe_config(latents: LatentsConfig, dynamics: str = "flow_matching", **training: Any) -> ProbeConfig:
    network = NetworkConfig(patch=1, dynamics=dict(DYNAMICS[dynamics]))
    settings = {"steps": 6, "batch_size": 4, "checkpoint_every": 4, "evaluate_every": 4, **training}
    return ProbeConfig(latents, network, probe_training(**settings))


@pytest.mark.parametrize("dynamics", ["flow_matching", "equilibrium_matching"])
def test_an_untrained_network_has_the_loss_of_knowing_nothing(latents: LatentsConfig, dynamics: str) -> None:
    """Its answer is 0: the loss is the mean square of the target, λ c (ε − x) or x − ε."""
    config = probe_config(latents, dynamics)
    sources = open_latents(latents)
    everything = LatentSources(sources.train, sources.train)  # normalised: of variance 1
    found = field_losses(build_step(config, everything).eval(), everything.validation, 1000, 7)
    shares = torch.tensor(SHARES)
    decay = torch.ones(len(SHARES)) if dynamics == "flow_matching" else (shares / 0.2).clamp(max=1.0)
    assert torch.tensor(found.field) == pytest.approx(2.0 * decay.square(), rel=0.1)
    assert torch.tensor(found.clean) == pytest.approx(2.0 * shares.square(), rel=0.1)
    assert float(found.per_latent.mean()) == pytest.approx(sum(found.field) / len(found.field))
    again = field_losses(build_step(config, everything).eval(), everything.validation, 1000, 50)
    assert again.field == pytest.approx(found.field, rel=1e-6)


class ExactStep(FieldStep):
    """Knows the one latent there is, x*: flow matching's velocity, and the gradient field that vanishes there."""

    def __init__(self, dynamics: Any, target: Tensor) -> None:
        super().__init__(torch.nn.Identity(), dynamics)
        self.target = target

    def predict(self, x_level: Tensor, level: Tensor, labels: Tensor) -> Tensor:
        away = x_level - self.target
        if isinstance(self.dynamics, FlowMatching):
            return -away / level.view(-1, 1, 1, 1)
        far = away.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        size = self.target[0].numel() ** 0.5  # about how far noise is
        return self.dynamics.gradient_scale * away / far * size * (far / size / 0.2).clamp(max=1.0)


@pytest.mark.parametrize("name", ["euler", "gradient_descent", "nesterov", "adaptive"])
def test_samplers_reach_the_data_of_an_exact_field(name: str) -> None:
    dynamics = FlowMatching() if name == "euler" else EquilibriumMatching("truncated", 4.0)
    target = torch.full((1, 4, 8, 8), 0.1)
    x = torch.randn(3, 4, 8, 8)
    result = draw_latents(ExactStep(dynamics, target), x, torch.tensor([0, -1, 0]), Sampling(name, 40))
    assert (result.sample - target).abs().max() < 0.2 * TOLERANCE * 4
    if name == "adaptive":
        assert (result.num_evaluations < 40).all()
        assert (result.residual_rms < TOLERANCE * 4.0).all()
    else:
        assert (result.sample - target).abs().max() < 0.05
        assert (result.num_evaluations == 40).all()


def test_guidance_moves_away_from_the_field_without_a_class() -> None:
    class Labelled(FieldStep):
        def predict(self, x_level: Tensor, level: Tensor, labels: Tensor) -> Tensor:
            return torch.where(labels.view(-1, 1, 1, 1) < 0, 1.0, 3.0).expand_as(x_level)

    step, x = Labelled(torch.nn.Identity(), FlowMatching()), torch.zeros(2, 1, 2, 2)
    labels = torch.tensor([0, 1])
    plain = draw_latents(step, x, labels, Sampling("euler", 1)).sample
    guided = draw_latents(step, x, labels, Sampling("euler", 1, guidance=2.0)).sample
    assert (plain.unique().tolist(), guided.unique().tolist()) == ([3.0], [5.0])


def test_classes_of_few_images_are_not_told_and_a_tenth_is_held_out(latents: LatentsConfig) -> None:
    train, validation = open_latents(latents)
    assert (len(train), len(validation)) == (24, 2)
    assert not {*train.indices} & {*validation.indices}
    assert [train.class_name(number) for number in (-1, 0, 1)] == ["", "a", "c"]
    told = [train.read(place).label for place in range(len(train))]
    assert sorted({*told}) == [-1, 0, 1]
    assert told.count(-1) == 2
    assert train.names_sha256() != validation.names_sha256()
    values = torch.stack([train.read(place).latent for place in range(24)])
    assert values.mean(dim=(0, 2, 3)) == pytest.approx(torch.zeros(12), abs=0.3)


@pytest.mark.parametrize("dynamics", ["flow_matching", "equilibrium_matching"])
def test_a_probe_that_a_signal_stops_goes_on_to_the_bit(
    latents: LatentsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dynamics: str
) -> None:
    config = probe_config(latents, dynamics)
    probes = [Probe(folder=tmp_path / name, device=CPU) for name in ("whole", "stopped")]
    whole, stopped = (probe.folder / "run" for probe in probes)
    assert probes[0].train(config) is None
    arguments = ProbeTrainer.arguments

    def stopping(trainer: ProbeTrainer, batch: Any) -> Any:
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return arguments(trainer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(ProbeTrainer, "arguments", stopping)
        assert probes[1].train(config) == "SIGTERM"
    assert last(stopped).state["step"] == 3
    assert probes[1].train(config) is None
    assert differences(last(stopped), last(whole)) == set()
    assert metrics(stopped) == metrics(whole)
    assert probes[1].train(config) is None  # nothing is left to do
    with pytest.raises(InputError, match=r"training\.lr"):
        probes[1].train(replace(config, training=replace(config.training, lr=0.5)))
    from diffusers import DiTTransformer2DModel

    network = DiTTransformer2DModel.from_pretrained(whole / "model")  # a model of diffusers' own
    assert all(torch.equal(tensor, last(whole).tensors["ema"][name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_levels_are_shares_of_noise_for_every_dynamics(share: float) -> None:
    x, noise = torch.full((2, 3, 4, 4), 1.0), torch.full((2, 3, 4, 4), -1.0)
    for dynamics in (FlowMatching(), EquilibriumMatching()):
        level = level_of(dynamics, torch.full((2,), share))
        assert dynamics.corrupt(x, noise, level).x_level.unique().tolist() == pytest.approx([1.0 - 2.0 * share])


def test_the_command_encodes_trains_and_writes_a_report(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DC_SSDAE_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    data = ("--model", "pixels:2", "--data", str(photos), "--size", "8")
    training = ("--steps", "3", "--train-batch", "4", "--workers", "0", "--device", "cpu")
    sampling = ("--samples", "6", "--sampling-steps", "2,4", "--dynamics", "equilibrium_matching")
    words = ["probe", *data, *training, *sampling, "--out", str(tmp_path / "out")]
    assert main(words) == 0
    found = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert found["about"]["steps"] == 3
    assert 0.0 < found["loss"]["value"] < 3.0
    assert found["distances"] == []  # no network's weights are here
    assert found["about"]["patch"] == 1
    page = (tmp_path / "out" / "index.html").read_text()
    assert "pixels:2" in page
    assert "no weights of Inception" in page
    assert "no weights of Inception" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "samples.png").is_file()
    capsys.readouterr()
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err
    # The latents that are there, without a decoder.
    folder = tmp_path / "alone"
    assert main(["probe", "--latents", str(tmp_path / "out" / "latents"), *training, "--out", str(folder)]) == 0
    alone = json.loads((folder / "probe.json").read_text())
    assert alone["copying"] is None
    other = make_images(tmp_path / "other", 3)
    told = ("--latents", str(tmp_path / "out" / "latents"), "--model", "pixels:2", "--data", str(other))
    assert main(["probe", *told, "--size", "8", "--out", str(tmp_path / "y")]) == 2
    assert "--data has no image" in capsys.readouterr().err
    assert main(["probe", "--data", str(photos), "--out", str(tmp_path / "x")]) == 2
    assert "--latents" in capsys.readouterr().err


def test_the_arena_shows_the_probes_figures(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DC_SSDAE_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    measured = ("--data", str(photos), "--size", "8", "--workers", "0", "--device", "cpu", "--metrics", "psnr")
    words = ["compare", "pixels:2", "jpeg:50", *measured, "--rounds", "1", "--batch", "8", "--probe-steps", "2"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    pixels, jpeg = table["rows"]
    assert 0.0 < pixels["probe_loss"]["value"] < 3.0
    assert jpeg["probe_loss"]["value"] is None
    assert "easier to generate" in table["columns"]["probe_loss"]
    assert any("latents of the same shape" in line for line in table["caveats"])
    assert "easier to generate" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "probe" / "0-pixels_2" / "index.html").is_file()


def test_images_are_found_by_the_names_of_their_latents(latents: LatentsConfig, photos: Path) -> None:
    source = open_sources(str(photos), None, None, None).train
    train = open_latents(latents).train.upright()
    images = ValidationImages(source, 8, len(source))
    for place, found in zip((5, 0, 20), matching_places(images, train, [5, 0, 20]), strict=True):
        pixels = pixel_shuffle(train.dataset.denormalise(train.read(place).latent), 2)
        torch.testing.assert_close(pixels, to_model_range(images[found].pixels), atol=1e-5, rtol=0.0)


def test_pictures_are_compared_with_the_images_that_they_are_of(photos: Path, tmp_path: Path) -> None:
    """By the pixels themselves: reconstructions are of other images than the references; copies are found out."""
    probe = probe_of(photos, tmp_path, workers=0, training=probe_training(steps=1, batch_size=4))
    config = probe.prepare()
    sources, candidate = open_latents(config.data), probe.candidate
    measurement = ProbeMeasurement(build_step(config, sources).eval(), sources, CPU, 5, 0)
    train, count = sources.train.upright(), 12  # half of 24
    decode = partial(measurement._decode, candidate)
    everything = torch.stack([decode(train.read(place).latent[None])[0] for place in range(24)])
    by_pixels = {"pixels": FeatureNetwork("pixels", True, 192, lambda x: x.flatten(1).double())}
    images = ValidationImages(probe.images.train, 8, len(probe.images.train))

    class Copies(ProbeMeasurement):
        """Samples that are training images."""

        def _samples(self, candidate: Any, drawing: Any) -> Iterator[Tensor]:
            drawing.moments.add(DiagonalGaussian(torch.stack([train.read(place).latent for place in range(count)])))
            yield everything[:count]

    copying = Copies(measurement.step, sources, CPU, 5, 0)
    found = copying.pictures(candidate, images, by_pixels, [Sampling("euler", 1)], 1000)
    assert (found["searched"], found["copying"].value) == (24, 0.0)
    for place, neighbours in enumerate(found["neighbours"]):
        assert torch.equal(neighbours.images[0], everything[place])
        assert neighbours.distances[0] == pytest.approx(0.0, abs=1e-6)
    assert {tuple(image.flatten().tolist()) for image in found["references"]} <= {
        tuple(image.flatten().tolist()) for image in everything[::2]
    }
    reference, samples = (each.flatten(1).double() for each in (everything[::2], everything[:count]))
    floor, copies = frechet_distances(reference, [everything[1::2].flatten(1).double(), samples], replicates=0)
    values = [distance.value.value for distance in found["distances"]]
    assert values == pytest.approx([floor.value, copies.value], rel=1e-6)
    assert [distance.count for distance in found["distances"]] == [count, count]
    assert found["distances"][1].variance == pytest.approx(1.0, abs=0.5)


def test_noise_and_levels_are_those_of_the_place_in_the_global_batch(latents: LatentsConfig) -> None:
    """However processes share the batch."""
    config = probe_config(latents)
    trainer: Any = SimpleNamespace(
        config=config, module=build_step(config, open_latents(latents)), accelerator=SimpleNamespace(device=CPU)
    )
    samples = LatentSamples(open_latents(latents).train, 0, 4)
    whole, *parts = ([samples[8 + place] for place in places] for places in (range(4), range(2), range(2, 4)))
    expected = ProbeTrainer.arguments(trainer, samples.collate(whole))
    found = [ProbeTrainer.arguments(trainer, samples.collate(part)) for part in parts]
    for one, both in zip(expected, zip(*found, strict=True), strict=True):
        assert torch.equal(one, torch.cat(both))
    assert len(expected[3].unique()) == 4
    with pytest.raises(InputError, match="3 processes"):
        ProbeTask(config, "").check(RunFolder(Path()), Processes(0, 3), "NO")


@pytest.mark.parametrize(("levels", "variance"), [("uniform", 1 / 12), ("logit_normal", 0.0434)])
def test_levels_are_drawn_as_asked(levels: str, variance: float) -> None:
    """The variance of the sigmoid of a standard normal is 0.0434 (numerically)."""
    for dynamics in (FlowMatching(), EquilibriumMatching()):
        drawn = draw_levels(levels, 20_000, torch.Generator().manual_seed(0), dynamics)
        assert float(drawn.mean()) == pytest.approx(0.5, abs=0.01)
        assert float(drawn.var()) == pytest.approx(variance, rel=0.03)
