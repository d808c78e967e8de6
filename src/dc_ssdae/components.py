"""The parts of a model, encoder, decoder and dynamics: their classes, built-in and users', and their settings."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from dc_ssdae.classes import find_imported, full_name
from dc_ssdae.dynamics import EquilibriumMatching, FlowMatching
from dc_ssdae.errors import InputError, as_json, check_names, check_type, unknown_name
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


def find_class(part: str, class_path: object, classes: Iterable[type] = ()) -> type:
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
    kind = _users_class(part, class_path, check_classes(classes))
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


def check_classes(classes: Iterable[type]) -> list[type]:
    """List the classes that a user has passed.

    Raises:
        InputError: it is no list, or holds something else.
    """
    if isinstance(classes, Iterable) and not isinstance(classes, type):
        listed = list(classes)
        if all(isinstance(kind, type) for kind in listed):
            return listed
    raise InputError(f"classes is {classes!r}; it must be a list of classes, such as classes=[MyEncoder]")


def _users_class(part: str, class_path: object, classes: Sequence[type]) -> type:
    """Find a class of the user's among those passed, or else among the imported ones."""
    steps = class_path.split(".") if isinstance(class_path, str) else []
    passed = [kind for kind in classes if full_name(kind) == class_path]
    passed = passed or [kind for kind in classes if steps and kind.__name__ == steps[-1]]
    if len(set(passed)) > 1:
        names = ", ".join(map(full_name, passed))
        raise InputError(f"{part} class {class_path!r} could be several of classes: {names}; pass one of them")
    if passed:
        return passed[0]
    if len(steps) < 2 or not all(step.isidentifier() or step == "<locals>" for step in steps):
        raise unknown_name(f"class of {part}", class_path, COMPONENTS[part])
    kind = find_imported(".".join(steps))
    if not isinstance(kind, type):
        raise InputError(
            f"{part} class {class_path!r} is not imported, or is no class: import {'.'.join(steps[:-1])} first, "
            f"or pass the class as classes=[{steps[-1]}]"
        )
    return kind


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
    hints, stored = _type_hints(kind), {}
    for key, value in {**defaults, **settings}.items():
        if value is inspect.Parameter.empty:
            raise InputError(f"{name} needs its setting {key!r}: give it in init_args of {part}")
        stored[key] = as_json(f"{key} of {name}", value)
        if key in settings:
            # As it will come back from config.json, so that what is accepted here can also be loaded.
            hint = hints.get(key, Any)
            check_type(f"{key} of {name}", _as_hinted(stored[key], hint), hint)
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
    hints, settings = _type_hints(kind), {}
    for key, value in resolved["init_args"].items():
        parameter = _constructor(kind)[0].get(key)
        had_tuple = parameter is not None and isinstance(parameter.default, tuple)
        settings[key] = _as_hinted(value, hints.get(key, tuple if had_tuple else Any))
    is_built_in = kind in COMPONENTS[part].values()
    try:
        # Of this package's classes the size is known before memory is taken; a user's may read numbers off tensors.
        with bounded_size(name), torch.device("meta") if is_built_in else nullcontext():
            built = kind(**handed_over, **settings)
        if is_built_in and torch.get_default_device().type != "meta":
            built = kind(**handed_over, **settings)
    except InputError:
        raise
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"{part} {name} cannot be built with its settings; its constructor raised {message}"
        ) from error
    for attribute in DYNAMICS_ATTRIBUTES if part == "dynamics" else ():
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
    expected = (len(x), latent_channels, *(side // downsample_factor for side in x.shape[2:]))
    given = f"a {type(posterior).__name__}"
    if isinstance(posterior, DiagonalGaussian):
        if tuple(posterior.mean.shape) == expected:
            return posterior
        given = f"a latent of shape {tuple(posterior.mean.shape)}"
    raise InputError(
        f"encoder {class_path} gives {given} for images of shape {tuple(x.shape)}; its forward must give a "
        f"DiagonalGaussian of shape {expected}"
    )


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
