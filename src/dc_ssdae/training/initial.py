"""What a new run starts from: the weights of a saved model, or of another run."""

import sys
from pathlib import Path

from torch import Tensor

from dc_ssdae.components import COMPONENTS
from dc_ssdae.errors import InputError
from dc_ssdae.model_folder import model_folder
from dc_ssdae.presets import DEFAULT_CLASSES
from dc_ssdae.training.config import RunConfig
from dc_ssdae.training.recipe import RECIPE_FILE
from dc_ssdae.training.run import WEIGHTS_FILE, RunFolder
from dc_ssdae.training.step import TrainingStep
from dc_ssdae.weights import check_same_tensors, read_safetensors

OBJECTIVE = "objective."


def load_initial_weights(step: TrainingStep, source: str) -> set[str]:
    """Start from a saved model's or a run's averaged weights, and from what the run's loss terms have learnt.

    A term that the run did not have, or had in another form, starts anew, which is said.

    Args:
        step: takes the weights.
        source: a model's folder, a run's or a recipe's, whose last phase that has ended is meant.

    Returns:
        Names of the objective's tensors that were taken over.

    Raises:
        InputError: they are not there, or the model's are of another architecture.
    """
    weights = read_safetensors(model_folder(source) / WEIGHTS_FILE)
    check_same_tensors(f"training.init_from {source}", step.model.state_dict(), weights)
    step.model.load_state_dict(weights)
    run = Path(source)
    if (run / RECIPE_FILE).is_file():
        run = model_folder(run).resolve().parent  # a link leads from there into a phase
    last = RunFolder(run).checkpoints.last()
    if last is None:
        return set()
    before = _of_objective(read_safetensors(last / "model.safetensors"))
    loaded: set[str] = set()
    for name, term in step.objective.terms.items():
        prefix = f"{OBJECTIVE}terms.{name}."
        expected = {f"{prefix}{key}": tensor for key, tensor in term.state_dict().items()}
        given = {key: tensor for key, tensor in before.items() if key.startswith(prefix)}
        if not expected:
            continue
        try:
            check_same_tensors(source, expected, given)
        except InputError as error:
            print(f"losses.{name} starts anew: {error}", file=sys.stderr)
            continue
        term.load_state_dict({key.removeprefix(prefix): tensor for key, tensor in given.items()})
        loaded |= expected.keys()
    return loaded


def check_encoder_is_trained(config: RunConfig) -> None:
    """Refuse an encoder whose weights are random and stay so; a class of the user's may bring its own.

    Args:
        config: of a run that begins.

    Raises:
        InputError: the run has nothing to start from and trains no group of the encoder.
    """
    class_path = (config.model.encoder or {}).get("class_path", DEFAULT_CLASSES["encoder"])
    has_source = config.training.init_from is not None or config.distillation is not None
    if config.training.keeps_latent and class_path in COMPONENTS["encoder"] and not has_source:
        raise InputError(
            "training.train leaves the encoder out, whose weights would be random and stay so: start from a model by "
            "--training.init_from DIR (dc-ssdae convert diffusers makes one of a published encoder), or train it too"
        )


def check_terms_are_trained(step: TrainingStep, loaded: set[str]) -> None:
    """Refuse a loss term whose own parameters are random and stay so.

    Args:
        step: with what trains marked.
        loaded: names of tensors that are not random.

    Raises:
        InputError: names the term.
    """
    for name in sorted(step.held_back):
        if name.startswith(OBJECTIVE) and name not in loaded:
            term = name.split(".")[2]
            raise InputError(
                f"losses.{term} has parameters of its own, which are new and would not train: add losses.{term} to "
                f"training.train, start from a run that has trained them, or leave the term out: --losses.{term} 0"
            )


def _of_objective(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(OBJECTIVE)}
