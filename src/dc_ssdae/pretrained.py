"""What makes an autoencoder a model of diffusers: its config, and saving, loading and uploading, all of it strict."""

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

import torch
from accelerate import init_empty_weights
from accelerate.utils import OffloadedWeightsLoader
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from dc_ssdae.card import upload_model, write_model_card
from dc_ssdae.classes import check_classes
from dc_ssdae.components import COMPONENTS
from dc_ssdae.errors import InputError, MissingInputError, check_names, shown
from dc_ssdae.hub import fetch_model
from dc_ssdae.model_folder import may_be_on_the_hub, model_folder, read_config, weight_files
from dc_ssdae.presets import SHIPPED_MODEL
from dc_ssdae.weights import (
    PICKLE_SUFFIXES,
    WEIGHTS,
    check_same_tensors,
    pickle_refused,
    read_safetensors,
    shard_files,
)

FOLLOWING_SETTINGS = (
    "block_out_channels",
    "encoder_block_out_channels",
    "spatial_compression_ratio",
    "in_channels",
    "out_channels",
    "force_upcast",
)
"""What `DCSSDAE.config` tells besides the model's own settings, because pipelines and training scripts ask for it."""

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
"""What `from_pretrained` takes for a model on the hub."""

LOADING_ARGUMENTS = (
    *HUB_ARGUMENTS,
    "device_map",
    "disable_mmap",
    "dtype",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_folder",
    "offload_state_dict",
    "output_loading_info",
    "subfolder",
    "torch_dtype",
    "variant",
)
"""What `from_pretrained` passes on to diffusers, which would drop an unknown argument without a word."""

FIXED_ARGUMENTS: Mapping[str, tuple[object, str]] = {
    "use_safetensors": (True, "only safetensors are loaded"),
    "use_flashpack": (False, "only safetensors are loaded"),
    "flashpack_kwargs": ({}, "only safetensors are loaded"),
    "ignore_mismatched_sizes": (False, "all weights must fit config.json"),
    "quantization_config": ({}, "models are loaded in floating point"),
    "parallel_config": ({}, "models are loaded whole"),
    "proxies": ({}, "set the environment variable HTTPS_PROXY"),
    "mirror": ("", "set the environment variable HF_ENDPOINT"),
}
"""Arguments of diffusers that have one value here besides None, and why."""

UPLOAD_ARGUMENTS = ("repo_id", "commit_message", "private", "token", "create_pr", "subfolder")
"""What `save_pretrained` hands on to `upload_model` where it also uploads."""

EMA_SETTINGS = (
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
)
"""What diffusers' `EMAModel` keeps in the config of the model whose averaged weights it saves."""


class PretrainedModel(ModelMixin, ConfigMixin):
    """A model of diffusers whose files are checked before anything is made of them, and that tells where it is from.

    For classes with the settings `latent_channels` and `downsample_factor`, and the parts of `COMPONENTS`.
    """

    _internal_dict: FrozenDict
    encoder: nn.Module
    ignore_for_config: ClassVar[list[str]] = ["classes"]

    def __getattr__(self, name: str) -> Any:
        # diffusers' own version answers with the config's entry of that name, which would hide encoder and decoder.
        return nn.Module.__getattr__(self, name)

    @property
    def config(self) -> FrozenDict:
        """The settings, and what diffusers' pipelines look for besides, which follows from them and is not saved."""
        channels, factor = self._internal_dict["latent_channels"], self._internal_dict["downsample_factor"]
        stages = factor.bit_length()  # pipelines take 2^(stages - 1) for f
        widths = getattr(self.encoder, "widths", None)
        if not (isinstance(widths, list | tuple) and len(widths) == stages):
            widths = [channels] * stages
        following = zip(FOLLOWING_SETTINGS, (list(widths), list(widths), factor, 3, 3, False), strict=True)
        return FrozenDict({**self._internal_dict, **dict(following)})

    @property
    def spatial_compression_ratio(self) -> int:
        """The factor f, under the name that some pipelines look for."""
        return self._internal_dict["downsample_factor"]

    def register_to_config(self, **kwargs: Any) -> None:
        """Change settings in the config, to be saved with it, as diffusers does.

        Raises:
            InputError: one of them follows from others, is unknown, does not fit, or would make another model.
        """
        settings = {name: value for name, value in kwargs.items() if not name.startswith("_")}
        if settings and "decoder" in self.__dict__.get("_modules", {}):  # once it is built
            parts = [type(getattr(self, part)) for part in COMPONENTS]
            built = self.without_weights({**self._internal_dict, **settings}, parts)._internal_dict
            for name in ("latent_channels", "downsample_factor", *COMPONENTS):
                if built[name] != self._internal_dict[name]:
                    raise InputError(f"{name} cannot be changed once the model is built; build one with from_config")
            kwargs = {name: built.get(name, value) for name, value in kwargs.items() if name not in FOLLOWING_SETTINGS}
        super().register_to_config(**kwargs)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **kwargs: Any) -> Any:
        """Build a model with fresh random weights from what `config` gives, or `load_config`.

        Args:
            config: the settings. What follows from others may be among them.
            kwargs: settings that go before those in `config`, `classes` as the constructor's, and diffusers' own
                arguments.

        Raises:
            InputError: a setting is unknown, missing or does not fit.
        """
        if not isinstance(config, Mapping):  # a folder, as diffusers takes it too
            config = read_config(Path(config))
        given = {name: config[name] for name in FOLLOWING_SETTINGS if name in config}
        built = super().from_config({name: config[name] for name in config if name not in given}, **kwargs)
        follows = (built[0] if isinstance(built, tuple) else built).config
        for name, value in given.items():
            if not (kwargs.keys() & set(cls._config_names())) and value != follows[name]:
                raise InputError(f"{name} is {value!r}; it follows from the other settings as {follows[name]!r}")
        return built

    @classmethod
    def without_weights(cls, config: Mapping[str, Any], classes: Iterable[type] = ()) -> Self:
        """Build a model on the meta device, for its shapes and costs.

        Args:
            config: as `read_config` gives it.
            classes: as the constructor's.

        Raises:
            InputError: the config does not fit.
        """
        named = [given.get("class_path") for part in COMPONENTS if isinstance(given := config.get(part), Mapping)]
        # A user's constructor could read no number off a meta tensor; without it, each tensor is made and dropped at
        # once. A stranger's file that asks for terabytes names no class of the user's.
        has_own = any(isinstance(path, str) and "." in path for path in named)
        with init_empty_weights() if has_own else torch.device("meta"):
            model = cls.from_config(dict(config), classes=classes)
        # Not model.to, with which diffusers warns of modules to be kept in float32, of which there are none.
        return nn.Module.to(model, "meta")

    @classmethod
    def extract_init_dict(
        cls, config_dict: Mapping[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Refuse what diffusers would drop with a warning: another class's config, or an unknown setting.

        `from_config` calls it with its arguments; among them `classes`, as the constructor's.
        """
        classes = kwargs.pop("classes", ())
        class_name = config_dict.get("_class_name", cls.__name__)
        if class_name not in [kind.__name__ for kind in cls._own_classes()]:
            raise InputError(f"config.json is of a {class_name!r}, not of a {cls.__name__!r}")
        ema = {name: value for name, value in config_dict.items() if name in EMA_SETTINGS}
        config_dict = {name: value for name, value in config_dict.items() if name not in ema}
        settings = [name for name in config_dict if not name.startswith("_")]
        check_names("setting in config.json", settings, cls._config_names())
        check_names(f"setting of {cls.__name__}", kwargs, cls._config_names())
        for name in ("latent_channels", "downsample_factor"):
            if name not in config_dict and name not in kwargs:
                raise InputError(f"config.json lacks {name}")
        init, unused, hidden = super().extract_init_dict(config_dict, **kwargs)
        return {**init, "classes": classes}, {**unused, **ema}, hidden

    @classmethod
    def _own_classes(cls) -> "list[type[PretrainedModel]]":
        """This class and those it derives from, whose models it can load."""
        return [kind for kind in cls.__mro__ if issubclass(kind, PretrainedModel) and kind is not PretrainedModel]

    @classmethod
    def _config_names(cls) -> list[str]:
        names = [name for kind in cls._own_classes() for name in inspect.signature(kind.__init__).parameters]
        return [name for name in dict.fromkeys(names) if name not in ("self", *cls.ignore_for_config)]

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Save config.json and the weights as safetensors, as diffusers does, readable for whom config.json is.

        A card, README.md, tells what the model is; one that is not ours stays as it is.

        Args:
            save_directory: a folder, made if need be.
            variant: of the weight files, such as "fp16".
            max_shard_size: of a weight file, in bytes or such as "5GB".
            safe_serialization: True; there is no other format.
            kwargs: diffusers' other saving arguments; with `push_to_hub`, those of that method, `repo_id` being the
                folder's name by default.

        Returns:
            With `push_to_hub`, as `huggingface_hub.upload_folder`.

        Raises:
            InputError: another format than safetensors is asked for; or the repository cannot be called so.
        """
        # Named parameters, because a pipeline that is saved hands on only what it finds in the signature.
        if not safe_serialization or kwargs.get("use_flashpack"):
            raise InputError("models are saved as safetensors only: leave safe_serialization and use_flashpack out")
        folder, push = Path(save_directory), kwargs.pop("push_to_hub", False)
        upload: dict[str, Any] = {"repo_id": folder.resolve().name}
        upload |= {name: kwargs.pop(name) for name in UPLOAD_ARGUMENTS if name in kwargs}
        suffix = f".{variant}" if variant else ""
        # diffusers takes an earlier save's shards away and leaves their index, which would be read in their place.
        Path(folder, f"{WEIGHTS}.safetensors.index{suffix}.json").unlink(missing_ok=True)
        with self._not_wrapped():
            super().save_pretrained(save_directory, variant=variant, max_shard_size=max_shard_size, **kwargs)
        if not kwargs.get("is_main_process", True):
            return None
        # safetensors writes files that only their owner may read, whatever the umask: useless to a team's folder.
        mode = Path(folder, "config.json").stat().st_mode
        for file in folder.glob(f"{WEIGHTS}*.safetensors"):
            file.chmod(mode)
        if push:
            return upload_model(folder, **upload)
        write_model_card(folder)
        return None

    @contextlib.contextmanager
    def _not_wrapped(self) -> Iterator[None]:
        """Take modules out of what torch.compile has put around them, whose tensors have other names."""
        wrapped = [(name, module) for name, module in self.named_modules() if hasattr(module, "_orig_mod")]
        try:
            for name, module in reversed(wrapped):  # inside ones first, whose names hold those around them
                self.set_submodule(name, module._orig_mod)
            yield
        finally:
            for name, module in wrapped:
                self.set_submodule(name, module)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> Any:
        """Upload the model to the hub, with a card; a card there that is not ours stays.

        Args:
            repo_id: of the repository, OWNER/NAME or, under your own name, NAME; made if it is not there.
            commit_message: of the commit.
            private: whether a new repository is private; None is its owner's default.
            token: of the hub; None is the one that is logged in with.
            create_pr: propose the files, and leave the repository as it is.
            safe_serialization: True; there is no other format.
            variant: of the weight files, such as "fp16".
            subfolder: where in the repository; without a card there.

        Returns:
            As `huggingface_hub.upload_folder`.

        Raises:
            InputError: the repository cannot be called so; or another format is asked for.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant, safe_serialization=safe_serialization)
            return upload_model(Path(folder), repo_id, commit_message, private, token, create_pr, subfolder)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path = SHIPPED_MODEL, classes: Iterable[type] = (), **kwargs: Any
    ) -> Self:
        """Load a saved model, in eval mode; strict where diffusers is lenient.

        Args:
            pretrained_model_name_or_path: a folder written by `save_pretrained`, or a hub id; "photos_f8c16" is the
                model that comes with this package.
            classes: as the constructor's; for classes of your own that are not imported, or have moved.
            kwargs: diffusers' loading arguments, such as `torch_dtype`, `subfolder`, `revision`, `variant`; and
                settings that go before those of config.json, such as `scaling_factor`.

        Returns:
            The model; with `output_loading_info`, also diffusers' lists of what did not fit, all empty.

        Raises:
            InputError: an unknown argument; a config that is not this class's or has an unknown setting; a tensor
                that is missing, left over, truncated, or of another shape. The message names it.
            MissingInputError: a folder, a file or the variant is not there.
        """
        names = cls._config_names()
        check_names("argument of from_pretrained", kwargs, ("classes", *LOADING_ARGUMENTS, *FIXED_ARGUMENTS, *names))
        for argument, (fixed, why) in FIXED_ARGUMENTS.items():
            if (value := kwargs.pop(argument, None)) not in (None, fixed):
                raise InputError(f"{argument} cannot be {shown(value)}: {why}; leave it out")
        classes = check_classes(classes)
        changed = {setting: kwargs[setting] for setting in names if setting in kwargs}
        with_info = kwargs.pop("output_loading_info", False)
        name = str(pretrained_model_name_or_path)
        name = str(model_folder(name)) if name == SHIPPED_MODEL else name
        subfolder, variant = kwargs.pop("subfolder", None), kwargs.get("variant")
        hub = {argument: kwargs.pop(argument, None) for argument in HUB_ARGUMENTS}
        is_local = bool(name) and Path(name).is_dir()
        if not (is_local or may_be_on_the_hub(name)):
            raise MissingInputError(f"{name!r}: no such folder, nor the id of a model on the hub")
        folder = Path(name, subfolder or "") if is_local else fetch_model(name, subfolder, variant, **hub)
        try:
            cls._check_folder(folder, variant, classes, changed)
        except InputError as error:
            # A path in the cache says little; the repository's name does.
            raise type(error)(str(error).replace(str(folder), str(folder) if is_local else name)) from None
        model, info = super().from_pretrained(
            str(folder), **{**kwargs, "classes": classes, "use_safetensors": True, "output_loading_info": True}
        )
        problems = [f"{kind.replace('_', ' ')}: {items}" for kind, items in info.items() if items]
        if problems:
            raise InputError(f"{name} does not fit its config.json; {'; '.join(problems)}")
        # diffusers would save and upload the path of a folder on this machine.
        known = {key: value for key, value in model._internal_dict.items() if key != "_name_or_path"}
        model._internal_dict = FrozenDict(known if is_local else {**known, "_name_or_path": name})
        if "disk" in (getattr(model, "hf_device_map", None) or {}).values():
            _restore_buffers(model, kwargs["offload_folder"])
        return (model, info) if with_info else model  # type: ignore[return-value]

    @classmethod
    def _check_folder(
        cls, folder: Path, variant: str | None, classes: Iterable[type], changed: Mapping[str, Any]
    ) -> None:
        """Check config and weights by their headers, before diffusers loads what it can and warns of the rest."""
        config = {**read_config(folder), **changed}
        if "quantization_config" in config:
            raise InputError(f"{folder}: its weights are quantised; take those in float32, float16 or bfloat16")
        expected = cls.without_weights(config, classes).state_dict()
        suffix = f".{variant}" if variant else ""
        index = folder / f"{WEIGHTS}.safetensors.index{suffix}.json"
        single = folder / f"{WEIGHTS}{suffix}.safetensors"
        if variant is not None and not index.is_file():
            _refuse_old_index(folder, variant)
        if not (index.is_file() or single.is_file()):
            raise _no_weights(single)
        files = shard_files(index) if index.is_file() else [single]
        check_same_tensors(f"{files[0] if len(files) == 1 else folder}", expected, read_safetensors(*files))


def _refuse_old_index(folder: Path, variant: str) -> None:
    """Refuse an index of shards where diffusers looks for one before it looks for the weights.

    It puts the variant behind the second dot of the whole path, or the third, wherever those are.
    """
    pieces = (folder / f"{WEIGHTS}.safetensors.index.json").as_posix().split(".")
    for place in (2, 3):
        index = Path(".".join([*pieces[:place], variant, *pieces[place:]]))
        if index.is_file():
            raise InputError(f"{index} is an index under a name that only older versions wrote; move it away")


def _no_weights(wanted: Path) -> InputError:
    """What to say of a folder that lacks the weight file that is wanted: whether it has a pickle, or a variant."""
    pickles = [file for file in sorted(wanted.parent.glob("*")) if file.suffix in PICKLE_SUFFIXES]
    if pickles:
        return pickle_refused(min(pickles, key=lambda file: file.stem != wanted.stem), wanted)
    found = [f"the variant {name!r}" if name else "one without a variant" for name in weight_files(wanted.parent)]
    there = f"there is {' and '.join(found)}" if found else "there are no safetensors, and a pickle is never loaded"
    return MissingInputError(f"{wanted}: no such file; {there}")


def _restore_buffers(model: nn.Module, folder: str | Path) -> None:
    """Read what diffusers puts on the disk with the weights and never reads back: the statistics of batch norm."""
    stored = OffloadedWeightsLoader(save_folder=str(folder))
    for name, buffer in model.named_buffers():
        if name in stored:
            buffer.copy_(stored[name])
