"""The parts of a model, encoder, decoder and dynamics: their classes, built-in and users', and their settings."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from inspect import Parameter, signature
from typing import Any, NamedTuple, get_origin, get_type_hints

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from dc_ssdae.classes import find_imported, full_name
from dc_ssdae.dynamics import EquilibriumMatching, FlowMatching
from dc_ssdae.errors import InputError, as_json, check_names, check_type, unknown_name
from dc_ssdae.networks import DCEncoder, DiffusersEncoder, KLEncoder, TimmEncoder, UViTDecoder
from dc_ssdae.presets import DEFAULT_CLASSES
from dc_ssdae.settings import alternatives

COMPONENTS: Mapping[str, Mapping[str, type]] = {
    "encoder": {
        "DCEncoder": DCEncoder,
        "KLEncoder": KLEncoder,
        "DiffusersEncoder": DiffusersEncoder,
        "TimmEncoder": TimmEncoder,
    },
    "decoder": {"UViTDecoder": UViTDecoder},
    "dynamics": {"EquilibriumMatching": EquilibriumMatching, "FlowMatching": FlowMatching},
}
"""The classes of this package that a config may name, by part."""

SIZES = ("latent_channels", "downsample_factor")
HANDED_OVER = {"encoder": SIZES, "decoder": (*SIZES, "time_conditioning"), "dynamics": ()}
"""What a part's constructor takes from the model's other settings."""

LARGEST_PARAMETERS, LARGEST_MODULES = 10**10, 5_000
"""What a part may have; a stranger's config.json could ask for any size."""

DYNAMICS_METHODS = ("sample_level", "corrupt", "clean_estimate", "loss")


class ResolvedPart(NamedTuple):
    """A part of a model before it is built: its class and all its settings.

    Args:
        kind: the class.
        config: as config.json holds it: class_path, bare for a class of this package and module.Class for a user's;
            and init_args with every setting.
        arguments: the same settings as the constructor takes them, with tuples where it asks for tuples.
    """

    kind: type
    config: dict[str, Any]
    arguments: dict[str, Any]

    def build(self, **handed_over: Any) -> Any:
        """Construct the part.

        Args:
            handed_over: the settings that follow from the model's others, those in `HANDED_OVER`.

        Raises:
            InputError: the class refuses its settings, or they make it too large.
        """
        name = self.config["class_path"]
        try:
            with register_module_module_registration_hook(_size_limit(name)):
                return self.kind(**handed_over, **self.arguments)
        except Exception as error:
            if isinstance(error, InputError):
                raise
            message = " ".join(f"its constructor raised {type(error).__name__}: {error}".split())
            raise InputError(f"{name} cannot be built with its settings; {message}") from error


def resolve_part(part: str, given: Mapping[str, Any] | None, classes: Sequence[type] = ()) -> ResolvedPart:
    """Find a part's class and complete its settings with the class's defaults.

    Args:
        part: "encoder", "decoder" or "dynamics".
        given: class_path and init_args, either of which may be left out.
        classes: users' classes that class_path may name.

    Raises:
        InputError: the class or a setting is unknown, missing or of the wrong type.
    """
    given = {} if given is None else given
    check_type(part, given, Mapping)
    check_names(f"key of {part}", given, ("class_path", "init_args"))
    kind = find_class(part, given.get("class_path", DEFAULT_CLASSES[part]), classes)
    name = kind.__name__ if kind in COMPONENTS[part].values() else full_name(kind)
    settings = {} if given.get("init_args") is None else given["init_args"]
    check_type(f"init_args of {part}", settings, Mapping)
    parameters = signature(kind).parameters.values()
    named = [entry for entry in parameters if entry.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]
    defaults = {entry.name: entry.default for entry in named if entry.name not in HANDED_OVER[part]}
    if not any(entry.kind == Parameter.VAR_KEYWORD for entry in parameters):
        check_names(f"setting of {name}", settings, defaults)
    hints, stored, arguments = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    with suppress(NameError, TypeError, AttributeError):  # hints that only a type checker can read
        hints = get_type_hints(kind.__init__)  # type: ignore[misc]
    for key, value in {**defaults, **settings}.items():
        if value is Parameter.empty:
            raise InputError(f"{name} needs its setting {key!r}: give it in init_args of {part}")
        hint = hints.get(key, tuple if isinstance(defaults.get(key), tuple) else Any)
        # Made from what config.json will hold, so that what is accepted here can also be loaded.
        stored[key] = arguments[key] = as_json(f"{key} of {name}", value)
        if any(tuple in (choice, get_origin(choice)) for choice in alternatives(hint)):
            arguments[key] = _deep_tuple(stored[key])
        if key in settings and key in hints:
            check_type(f"{key} of {name}", arguments[key], hint)
    return ResolvedPart(kind, {"class_path": name, "init_args": stored}, arguments)


def find_class(part: str, class_path: object, classes: Sequence[type] = ()) -> type:
    """Find the class that a config names for a part, without ever importing it.

    In this order: a class of this package by its bare name; one of `classes`, by its full name or, because a class
    may have moved since, by its bare one; a class of an imported module by its full name.

    Args:
        part: "encoder", "decoder" or "dynamics".
        class_path: the bare name or module.Class.
        classes: classes that the user has passed.

    Raises:
        InputError: there is none, or it cannot be such a part.
    """
    path = class_path if isinstance(class_path, str) else ""
    if path in COMPONENTS[part]:
        return COMPONENTS[part][path]
    passed = {kind for kind in classes if full_name(kind) == path}
    passed = passed or {kind for kind in classes if kind.__name__ == path.rpartition(".")[2]}
    kind = next(iter(passed)) if len(passed) == 1 else find_imported(path)
    if "." not in path and not passed:
        raise unknown_name(f"class of {part}", class_path, COMPONENTS[part])
    named = f"{part} class {class_path!r}"
    if not isinstance(kind, type):
        raise InputError(f"{named} is not imported, or is no class: import its module, or pass one such class")
    if part == "dynamics":
        lacking = [f"method {name}" for name in DYNAMICS_METHODS if not callable(getattr(kind, name, None))]
    elif not issubclass(kind, nn.Module):
        raise InputError(f"{named} is no torch.nn.Module")
    else:
        # Of the bases too, to which a constructor that takes anything hands it on. Were this not asked for, a file
        # could have any module built whose class happens to be imported, with settings of its choice.
        taken = {name for base in kind.__mro__ for name in signature(base.__init__).parameters}  # type: ignore[misc]
        lacking = [f"setting {name}" for name in HANDED_OVER[part] if name not in taken]
    if lacking:
        raise InputError(f"{named} has no {lacking[0]}")
    return kind


def _size_limit(name: str) -> Callable[[nn.Module, str, nn.Module | None], None]:
    """A hook that stops the building of a network that gets larger than any autoencoder."""
    parameters = modules = 0

    def count(_: nn.Module, __: str, added: nn.Module | None) -> None:
        nonlocal parameters, modules
        if added is not None:
            modules += 1
            parameters += sum(parameter.numel() for parameter in added.parameters(recurse=False))
        if parameters > LARGEST_PARAMETERS or modules > LARGEST_MODULES:
            raise InputError(f"{name} has {parameters:,} parameters in {modules:,} modules: its settings are too large")

    return count


def _deep_tuple(value: Any) -> Any:
    return tuple(map(_deep_tuple, value)) if isinstance(value, list) else value
