"""The parts of a model, encoder, decoder and dynamics: their classes, built-in and users', and their settings."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, get_type_hints

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from dc_ssdae.classes import find_imported, full_name
from dc_ssdae.dynamics import EquilibriumMatching, FlowMatching
from dc_ssdae.errors import InputError, as_json, check_names, check_type, unknown_name
from dc_ssdae.networks import DCEncoder, DiffusersEncoder, KLEncoder, UViTDecoder
from dc_ssdae.presets import DEFAULT_CLASSES

COMPONENTS: Mapping[str, Mapping[str, type]] = {
    "encoder": {"DCEncoder": DCEncoder, "KLEncoder": KLEncoder, "DiffusersEncoder": DiffusersEncoder},
    "decoder": {"UViTDecoder": UViTDecoder},
    "dynamics": {"EquilibriumMatching": EquilibriumMatching, "FlowMatching": FlowMatching},
}
"""The classes of this package that a config may name, by part."""

HANDED_OVER: Mapping[str, tuple[str, ...]] = {
    "encoder": ("latent_channels", "downsample_factor"),
    "decoder": ("latent_channels", "downsample_factor", "time_conditioning"),
    "dynamics": (),
}
"""What a part's constructor takes from the model's other settings."""

LARGEST = {"parameters": 10**10, "modules": 5_000}
"""What a part may have; a stranger's config.json could ask for any size."""

DYNAMICS_METHODS = ("sample_level", "corrupt", "clean_estimate", "loss")
DYNAMICS_ATTRIBUTES = ("conditions_on_time", "noise_level")


@dataclass(frozen=True)
class ResolvedPart:
    """A part of a model before it is built: its class and all its settings.

    Args:
        part: "encoder", "decoder" or "dynamics".
        kind: the class.
        config: as config.json holds it: class_path, bare for a class of this package and module.Class for a user's;
            and init_args with every setting.
        arguments: the same settings as the constructor takes them, with tuples where it asks for tuples.
    """

    part: str
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
            with bounded_size(name):
                built = self.kind(**handed_over, **self.arguments)
        except InputError:
            raise
        except Exception as error:
            message = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(
                f"{self.part} {name} cannot be built with its settings; its constructor raised {message}"
            ) from error
        for attribute in DYNAMICS_ATTRIBUTES if self.part == "dynamics" else ():
            if not hasattr(built, attribute):
                raise InputError(f"dynamics {name} has no attribute {attribute}")
        return built


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
    parameters, takes_any = _constructor(kind)
    defaults = {key: value.default for key, value in parameters.items() if key not in HANDED_OVER[part]}
    if not takes_any:
        check_names(f"setting of {name}", settings, defaults)
    hints, stored, arguments = _type_hints(kind), {}, {}
    for key, value in {**defaults, **settings}.items():
        if value is inspect.Parameter.empty:
            raise InputError(f"{name} needs its setting {key!r}: give it in init_args of {part}")
        hint = hints.get(key, tuple if isinstance(defaults.get(key), tuple) else Any)
        stored[key] = as_json(f"{key} of {name}", value)
        # Made from what config.json will hold, so that what is accepted here can also be loaded.
        arguments[key] = _as_hinted(stored[key], hint)
        if key in settings and key in hints:
            check_type(f"{key} of {name}", arguments[key], hint)
    return ResolvedPart(part, kind, {"class_path": name, "init_args": stored}, arguments)


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
    if isinstance(class_path, str) and class_path in COMPONENTS[part]:
        return COMPONENTS[part][class_path]
    kind = _users_class(part, class_path, classes)
    named = f"{part} class {class_path!r}"
    if part == "dynamics":
        missing = [name for name in DYNAMICS_METHODS if not callable(getattr(kind, name, None))]
        if missing:
            raise InputError(f"{named} has no method {missing[0]}")
    elif not issubclass(kind, nn.Module):
        raise InputError(f"{named} is no torch.nn.Module")
    parameters, takes_any = _constructor(kind)
    # A constructor that takes anything hands it on to a base class's. Were that not asked for, a file could have any
    # such module built that happens to be imported, with settings of its choice.
    named_by = [_constructor(base)[0] for base in kind.__mro__] if takes_any else [parameters]
    for name in HANDED_OVER[part]:
        if not any(name in names for names in named_by):
            raise InputError(f"{named}: its constructor must take {', '.join(HANDED_OVER[part])}; it lacks {name}")
    return kind


def _users_class(part: str, class_path: object, classes: Sequence[type]) -> type:
    """Find a class of the user's among those passed, or else among the imported ones."""
    steps = class_path.split(".") if isinstance(class_path, str) else [""]
    passed = {kind for kind in classes if full_name(kind) == class_path}
    passed = passed or {kind for kind in classes if kind.__name__ == steps[-1]}
    if len(passed) > 1:
        names = ", ".join(sorted(map(full_name, passed)))
        raise InputError(f"{part} class {class_path!r} could be several of classes: {names}; pass one of them")
    if passed:
        return passed.pop()
    if len(steps) < 2 or not all(step.isidentifier() or step == "<locals>" for step in steps):
        raise unknown_name(f"class of {part}", class_path, COMPONENTS[part])
    kind = find_imported(".".join(steps))
    if not isinstance(kind, type):
        raise InputError(
            f"{part} class {class_path!r} is not imported, or is no class: import {'.'.join(steps[:-1])} first, "
            f"or pass the class as classes=[{steps[-1]}]"
        )
    return kind


@contextmanager
def bounded_size(name: str) -> Iterator[None]:
    """Stop the building of a network that gets larger than any autoencoder.

    Raises:
        InputError: it has more than 10 billion parameters or 5,000 modules.
    """
    counts = dict.fromkeys(LARGEST, 0)

    def count(_: nn.Module, __: str, added: nn.Module | None) -> None:
        if added is not None:
            counts["modules"] += 1
            counts["parameters"] += sum(parameter.numel() for parameter in added.parameters(recurse=False))
        for what, largest in LARGEST.items():
            if counts[what] > largest:
                raise InputError(f"{name} has more than {largest:,} {what}: its settings are too large")

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _constructor(kind: type) -> tuple[dict[str, inspect.Parameter], bool]:
    """The parameters of a class's constructor by name, and whether it takes any others."""
    parameters = inspect.signature(kind).parameters
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {name: parameter for name, parameter in parameters.items() if parameter.kind not in variadic}
    return named, any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


def _type_hints(kind: type) -> dict[str, Any]:
    try:
        return get_type_hints(kind.__init__)  # type: ignore[misc]
    except (NameError, TypeError, AttributeError):  # hints that only a type checker can read
        return {}


def _as_hinted(value: Any, hint: Any) -> Any:
    """Give a setting that JSON holds as a list, or as lists of lists, as the tuple that its type hint asks for."""
    candidates = (value, tuple(value), _deep_tuple(value)) if isinstance(value, list) else ()
    for candidate in candidates:
        with suppress(InputError):
            check_type("", candidate, hint)
            return candidate
    return value


def _deep_tuple(value: Any) -> Any:
    return tuple(map(_deep_tuple, value)) if isinstance(value, list) else value
