"""The parts of a model, encoder, decoder and dynamics: their classes, built-in and users', and their settings."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from dc_ssdae.classes import find_imported, full_name
from dc_ssdae.dynamics import EquilibriumMatching, FlowMatching
from dc_ssdae.errors import InputError, check_type, unknown_name
from dc_ssdae.latent import DiagonalGaussian
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


def find_class(part: str, class_path: object, classes: Iterable[type] = (), source: str = "the model") -> type:
    """Find the class that a config names for a part, without ever importing it.

    In this order: a class of this package by its bare name; one of `classes`, by its full name or, because a class
    may have moved since, by its bare one; a class of an imported module by its full name.

    Args:
        part: "encoder", "decoder" or "dynamics".
        class_path: the bare name or module.Class.
        classes: classes that the user has passed.
        source: who names the class, for the message.

    Raises:
        InputError: there is none, or it cannot be such a part.
    """
    if not isinstance(class_path, str):
        raise unknown_name(f"class of {part}", class_path, COMPONENTS[part])
    if class_path in COMPONENTS[part]:
        return COMPONENTS[part][class_path]
    kind = _passed(class_path, check_classes(classes), source)
    if kind is None:
        kind = _imported(part, class_path, source)
    named = f"{source} names {part} class {class_path!r}"
    if part == "dynamics":
        missing = [name for name in DYNAMICS_METHODS if not callable(getattr(kind, name, None))]
        if missing:
            raise InputError(f"{named}, which has no method {missing[0]}")
    elif not issubclass(kind, nn.Module):
        raise InputError(f"{named}, which is no torch.nn.Module")
    parameters, takes_any = _constructor(kind)
    # A constructor that takes anything hands it on to a base class's. Were that not asked for, a file could have any
    # such module built that happens to be imported, with settings of its choice.
    named_by = [_constructor(base)[0] for base in kind.__mro__] if takes_any else [parameters]
    for name in HANDED_OVER[part]:
        if not any(name in names for names in named_by):
            raise InputError(f"{named}, whose constructor lacks {name}: it must take {', '.join(HANDED_OVER[part])}")
    for name, parameter in parameters.items():
        if parameter.kind == inspect.Parameter.POSITIONAL_ONLY:
            raise InputError(f"{named}, whose constructor must take {name} by name too, not by place alone")
    return kind


def check_classes(classes: Iterable[type]) -> list[type]:
    """List the classes that a user has passed.

    Raises:
        InputError: it is no list, or holds something else.
    """
    if isinstance(classes, type | str) or not isinstance(classes, Iterable):
        raise InputError(f"classes is {classes!r}; it must be a list of classes, such as classes=[MyEncoder]")
    listed = list(classes)
    for kind in listed:
        if not isinstance(kind, type):
            raise InputError(f"classes holds {kind!r}, which is no class")
    return listed


def _passed(class_path: str, classes: Sequence[type], source: str) -> type | None:
    exact = [kind for kind in classes if full_name(kind) == class_path]
    bare = [kind for kind in classes if kind.__name__ == class_path.rpartition(".")[2]]
    found = list(dict.fromkeys(exact or bare))
    if len(found) > 1:
        names = ", ".join(full_name(kind) for kind in found)
        raise InputError(f"{source} names {class_path!r}, which several of classes could be: {names}; pass one of them")
    return found[0] if found else None


def _imported(part: str, class_path: str, source: str) -> type:
    module, dot, name = class_path.rpartition(".")
    if not dot or not all(step.isidentifier() or step == "<locals>" for step in class_path.split(".")):
        raise unknown_name(f"class of {part}", class_path, COMPONENTS[part])
    kind = find_imported(class_path)
    if isinstance(kind, type):
        return kind
    named = f"{source} names {part} class {class_path!r}"
    if kind is not None:
        raise InputError(f"{named}, which is a {type(kind).__name__} and not a class")
    passing = f"pass the class as classes=[{name}]"
    if module == "__main__" or "<locals>" in module:
        raise InputError(f"{named}, which no module holds: {passing}")
    if find_imported(f"{module}.__name__") is not None:
        raise InputError(f"{named}, but the imported {module} has no {name}: {passing}")
    raise InputError(f"{named}, which is not imported: import {module} first, or {passing}")


def resolve_part(part: str, given: Mapping[str, Any] | None, classes: Iterable[type] = ()) -> dict[str, Any]:
    """Fill a part's settings up with its class's defaults.

    Args:
        part: "encoder", "decoder" or "dynamics".
        given: class_path and init_args, either of which may be left out.
        classes: users' classes that class_path may name.

    Returns:
        class_path, bare for a class of this package and module.Class for a user's; and init_args with every
        setting, those of a user's class as config.json will give them back.

    Raises:
        InputError: the class or a setting is unknown, missing or of the wrong type.
    """
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise InputError(f"{part} is {given!r}; it must be a mapping with class_path and init_args")
    check_names(f"key of {part}", given, ("class_path", "init_args"))
    kind = find_class(part, given.get("class_path", DEFAULT_CLASSES[part]), classes)
    is_built_in = kind in COMPONENTS[part].values()
    name = kind.__name__ if is_built_in else full_name(kind)
    settings = {} if given.get("init_args") is None else given["init_args"]
    if not isinstance(settings, Mapping):
        raise InputError(f"init_args of {part} is {settings!r}; it must be a mapping")
    for setting in settings:
        if setting in HANDED_OVER[part]:
            raise InputError(f"{setting} is not a setting of {part}: it follows from the model's other settings")
    parameters, takes_any = _constructor(kind)
    defaults = {key: value.default for key, value in parameters.items() if key not in HANDED_OVER[part]}
    if not takes_any:
        check_names(f"setting of {name}", settings, defaults)
    values = {**defaults, **settings}
    for key, value in values.items():
        if value is inspect.Parameter.empty:
            raise InputError(f"{name} needs its setting {key!r}: give it in init_args of {part}")
    hints = _type_hints(kind)
    if is_built_in:
        for key, value in settings.items():
            check_type(f"{key} of {name}", value, hints[key])
        return {"class_path": name, "init_args": values}
    stored = {key: _as_json(f"{key} of {name}", value) for key, value in values.items()}
    for key in settings:
        # As it will come back from config.json, so that what is accepted here can also be loaded.
        _check_hint(f"{key} of {name}", _as_hinted(stored[key], hints.get(key, Any)), hints.get(key, Any))
    return {"class_path": name, "init_args": stored}


def build_part(
    part: str, resolved: Mapping[str, Any], handed_over: Mapping[str, Any], classes: Iterable[type] = ()
) -> Any:
    """Construct a part from what `resolve_part` gave.

    Args:
        part: "encoder", "decoder" or "dynamics".
        resolved: class_path and init_args.
        handed_over: the part's settings that follow from the model's others.
        classes: users' classes that class_path may name.

    Raises:
        InputError: the class refuses its settings.
    """
    name = resolved["class_path"]
    kind = find_class(part, name, classes)
    if kind in COMPONENTS[part].values():
        try:
            with torch.device("meta"), bounded_size(name):  # before any memory is taken
                built = kind(**resolved["init_args"], **handed_over)
            is_wanted = torch.get_default_device().type == "meta"
            return built if is_wanted else kind(**resolved["init_args"], **handed_over)
        except TypeError as error:
            raise InputError(f"{name}: a setting is of the wrong type: {error}") from error
        except (RuntimeError, OverflowError, MemoryError) as error:  # more numbers than PyTorch can count
            first = (str(error).splitlines() or ["out of memory"])[0]
            raise InputError(f"{name} cannot be built with these settings: {first}") from error
    parameters, _ = _constructor(kind)
    hints = _type_hints(kind)
    settings = {}
    for key, value in resolved["init_args"].items():
        default = parameters[key].default if key in parameters else None
        settings[key] = _as_hinted(value, hints.get(key, tuple if isinstance(default, tuple) else Any))
    try:
        with bounded_size(name):
            built = kind(**settings, **handed_over)
    except InputError:
        raise
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"{part} {name} cannot be built with its settings; its constructor raised {message}"
        ) from error
    if part == "dynamics":
        for attribute in DYNAMICS_ATTRIBUTES:
            if not hasattr(built, attribute):
                raise InputError(f"dynamics {name} has no attribute {attribute}")
    return built


@contextmanager
def bounded_size(name: str) -> Iterator[None]:
    """Stop the building of a network that gets larger than any autoencoder.

    Raises:
        InputError: it has more than 10 billion parameters or 5,000 modules.
    """
    counts = {"parameters": 0, "modules": 0}

    def count(what: str, more: int) -> None:
        counts[what] += more
        if counts[what] > LARGEST[what]:
            raise InputError(f"{name} has more than {LARGEST[what]:,} {what}: its settings are too large")

    hooks = (
        register_module_module_registration_hook(lambda *_: count("modules", 1)),
        register_module_parameter_registration_hook(
            lambda *given: count("parameters", 0 if given[2] is None else given[2].numel())
        ),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_posterior(
    posterior: object, class_path: str, x: Tensor, latent_channels: int, downsample_factor: int
) -> DiagonalGaussian:
    """Check what an encoder gives for images x (B, 3, H, W), and return it.

    Raises:
        InputError: it is no DiagonalGaussian over (B, c, H/f, W/f).
    """
    if not isinstance(posterior, DiagonalGaussian):
        raise InputError(
            f"encoder {class_path} gives a {type(posterior).__name__}; its forward must give a DiagonalGaussian"
        )
    mean, factor = posterior.mean, downsample_factor
    batch, _, height, width = x.shape
    if tuple(mean.shape) != (batch, latent_channels, height // factor, width // factor):
        raise InputError(
            f"encoder {class_path} gives a latent of shape {tuple(mean.shape)} for images of shape {tuple(x.shape)}; "
            f"with latent_channels {latent_channels} and downsample_factor {factor} it must be "
            f"{(batch, latent_channels, height // factor, width // factor)}"
        )
    return posterior


def check_names(kind: str, given: Iterable[Any], accepted: Iterable[str]) -> None:
    """Refuse the first of the given names that is not accepted.

    Raises:
        InputError: names it and the accepted ones; `kind` says what it stands for.
    """
    accepted = list(accepted)
    for name in given:
        if name not in accepted:
            raise unknown_name(kind, name, accepted)


def _constructor(kind: type) -> tuple[dict[str, inspect.Parameter], bool]:
    """The parameters of a class's constructor by name, and whether it takes any others."""
    if issubclass(kind, nn.Module) and kind.__init__ is nn.Module.__init__:
        return {}, False  # PyTorch's own takes any, to refuse them
    try:
        parameters = inspect.signature(kind).parameters
    except ValueError:  # some classes written in C tell nothing
        return {}, False
    takes_any = any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: parameter for name, parameter in parameters.items() if parameter.kind not in variadic}, takes_any


def _type_hints(kind: type) -> dict[str, Any]:
    try:
        return get_type_hints(kind.__init__)  # type: ignore[misc]
    except (NameError, TypeError, AttributeError):  # hints that only a type checker can read
        return {}


def _check_hint(name: str, value: Any, hint: Any) -> None:
    """Check a setting of a user's class, whose hints may be wider than those of this package."""
    takes_bool = isinstance(value, bool) and bool in get_args(hint)
    if hint is not Any and not takes_bool:
        check_type(name, value, hint)


def _as_json(name: str, value: Any) -> Any:
    """A setting as it comes back from JSON: with lists for tuples and dicts for mappings."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list | tuple):
        return [_as_json(name, item) for item in value]
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {key: _as_json(name, item) for key, item in value.items()}
    raise InputError(
        f"{name} is {' '.join(repr(value).split())}, which config.json cannot hold; a setting is made of numbers, "
        "strings, true, false, null, lists, and mappings from strings"
    )


def _as_hinted(value: Any, hint: Any) -> Any:
    """Give a setting that JSON holds as a list, or as lists of lists, as the tuple that its type hint asks for."""
    if isinstance(value, list):
        for candidate in (value, tuple(value), _deep_tuple(value)):
            try:
                _check_hint("", candidate, hint)
            except InputError:
                continue
            return candidate
    return value


def _deep_tuple(value: Any) -> Any:
    return tuple(map(_deep_tuple, value)) if isinstance(value, list) else value
