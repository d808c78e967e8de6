"""What makes an autoencoder a model of diffusers: its config, and saving, loading and uploading, all of it strict."""

import inspect
from collections.abc import Iterable, Mapping
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
from dc_ssdae.errors import InputError, MissingInputError, check_names, wrong_value
from dc_ssdae.hub import fetch_model
from dc_ssdae.model_folder import may_be_on_the_hub, model_folder, read_config
from dc_ssdae.presets import SHIPPED_MODEL
from dc_ssdae.weights import WEIGHTS, check_same_tensors, read_safetensors, shard_files

STAGES = ("block_out_channels", "encoder_block_out_channels")
FOLLOWING_SETTINGS = (*STAGES, "spatial_compression_ratio", "in_channels", "out_channels", "force_upcast")
"""What `DCSSDAE.config` tells besides the model's own settings, because pipelines and training scripts ask for it."""

EMA_SETTINGS = ("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup")
"""What diffusers' `EMAModel` keeps in the config of the model whose averaged weights it saves."""

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
"""What `from_pretrained` takes for a model on the hub."""

REFUSED_ARGUMENTS = ("ignore_mismatched_sizes", "parallel_config", "proxies", "quantization_config", "use_flashpack")
"""Arguments of diffusers' `from_pretrained` that would make loading less strict, or do nothing here."""

UPLOAD_ARGUMENTS = ("repo_id", "commit_message", "private", "token", "create_pr", "subfolder")
"""What `save_pretrained` hands on to `upload_model` where it also uploads."""


class PretrainedModel(ModelMixin, ConfigMixin):
    """A model of diffusers whose files are checked before anything is made of them, and that tells where it is from.

    For classes with the settings `latent_channels` and `downsample_factor`, and the parts of `COMPONENTS`.
    """

    _internal_dict: FrozenDict
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
        widths = list(widths) if isinstance(widths, list | tuple) and len(widths) == stages else [channels] * stages
        following = zip(FOLLOWING_SETTINGS, (widths, list(widths), factor, 3, 3, False), strict=True)
        return FrozenDict({**self._internal_dict, **dict(following)})

    def register_to_config(self, **kwargs: Any) -> None:
        """Change settings in the config, to be saved with it, as diffusers does.

        Raises:
            InputError: one of them is unknown, does not fit, follows from others, or would make another model.
        """
        if "decoder" in self.__dict__.get("_modules", {}) and not all(name.startswith("_") for name in kwargs):
            fixed = (*FOLLOWING_SETTINGS, "latent_channels", "downsample_factor", *COMPONENTS)
            if changed := [name for name in fixed if kwargs.get(name, self.config[name]) != self.config[name]]:
                raise InputError(f"{changed[0]} cannot be changed once the model is built; build one with from_config")
            parts = [type(getattr(self, part)) for part in COMPONENTS]
            built = self.without_weights({**self._internal_dict, **kwargs}, parts)._internal_dict
            kwargs = {name: built.get(name, value) for name, value in kwargs.items() if name not in fixed}
        super().register_to_config(**kwargs)

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
        for name in FOLLOWING_SETTINGS:
            if config.get(name, model.config[name]) != model.config[name]:
                raise wrong_value(name, config[name], f"{model.config[name]}, which follows from the other settings")
        # Not model.to, with which diffusers warns of modules to be kept in float32, of which there are none.
        return nn.Module.to(model, "meta")

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> tuple[dict[str, Any], ...]:
        """Refuse what diffusers would drop with a warning: another class's config, or an unknown setting.

        `from_config` calls it with its arguments; among them `classes`, as the constructor's.
        """
        classes = kwargs.pop("classes", ())
        class_name = config_dict.get("_class_name", cls.__name__)
        if class_name not in [kind.__name__ for kind in cls.__mro__]:
            raise InputError(f"config.json is of a {class_name!r}, not of a {cls.__name__!r}")
        ema = {name: config_dict[name] for name in EMA_SETTINGS if name in config_dict}
        config_dict = {name: config_dict[name] for name in config_dict if name not in (*ema, *FOLLOWING_SETTINGS)}
        settings = [name for name in (*config_dict, *kwargs) if not name.startswith("_")]
        check_names(f"setting of {cls.__name__}", settings, cls._config_names())
        if lacking := [name for name in ("latent_channels", "downsample_factor") if name not in settings]:
            raise InputError(f"config.json lacks {lacking[0]}")
        init, unused, hidden = super().extract_init_dict(config_dict, **kwargs)
        return {**init, "classes": classes}, {**unused, **ema}, hidden

    @classmethod
    def _config_names(cls) -> list[str]:
        return [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "classes")]

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
            InputError: another format than safetensors is asked for.
        """
        # Named parameters, because a pipeline that is saved hands on only what it finds in the signature.
        if not safe_serialization or kwargs.get("use_flashpack"):
            raise InputError("models are saved as safetensors only: leave safe_serialization and use_flashpack out")
        folder, push = Path(save_directory), kwargs.pop("push_to_hub", False)
        upload = {name: kwargs.pop(name) for name in UPLOAD_ARGUMENTS if name in kwargs}
        suffix = f".{variant}" if variant else ""
        # diffusers takes an earlier save's shards away and leaves their index, which would be read in their place.
        Path(folder, f"{WEIGHTS}.safetensors.index{suffix}.json").unlink(missing_ok=True)
        # What torch.compile has put around modules is taken off meanwhile: their tensors have other names in it.
        wrapped = [(name, module) for name, module in self.named_modules() if hasattr(module, "_orig_mod")]
        try:
            for name, module in reversed(wrapped):  # inside ones first, whose names hold those around them
                self.set_submodule(name, module._orig_mod)
            super().save_pretrained(folder, variant=variant, max_shard_size=max_shard_size, **kwargs)
        finally:
            for name, module in wrapped:
                self.set_submodule(name, module)
        if not kwargs.get("is_main_process", True):
            return None
        # safetensors writes files that only their owner may read, whatever the umask: useless to a team's folder.
        mode = Path(folder, "config.json").stat().st_mode
        for file in folder.glob(f"{WEIGHTS}*.safetensors"):
            file.chmod(mode)
        write_model_card(folder)
        return upload_model(folder, **{"repo_id": folder.resolve().name, **upload}) if push else None

    def push_to_hub(self, repo_id: str, commit_message: str | None = None, **settings: Any) -> Any:
        """Upload the model to the hub, with a card; a card there that is not ours stays.

        Args:
            repo_id: of the repository, OWNER/NAME or, under your own name, NAME; made if it is not there.
            commit_message: of the commit.
            settings: `private`, whether a new repository is; `token`, in place of the one that is logged in with;
                `create_pr`, to propose the files and leave the repository as it is; `subfolder`, where in the
                repository, without a card there; `variant` of the weight files, such as "fp16".

        Returns:
            As `huggingface_hub.upload_folder`.

        Raises:
            InputError: another format than safetensors is asked for.
        """
        with TemporaryDirectory() as folder:
            settings |= {"repo_id": repo_id, "commit_message": commit_message}
            return self.save_pretrained(folder, push_to_hub=True, **settings)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path = SHIPPED_MODEL, classes: Iterable[type] = (), **kwargs: Any
    ) -> Self:
        """Load a saved model, in eval mode; strict where diffusers is lenient.

        Args:
            pretrained_model_name_or_path: a folder written by `save_pretrained`, or a hub id; "photos_f8c16" is the
                model that comes with this package.
            classes: as the constructor's; for classes of your own that are not imported, or have moved.
            kwargs: diffusers' loading arguments, such as `torch_dtype`, `subfolder`, `revision`, `variant`
                (`use_safetensors` is always true); and settings that go before those of config.json, such as
                `scaling_factor`.

        Returns:
            The model; with `output_loading_info`, also diffusers' lists of what did not fit, all empty.

        Raises:
            InputError: an unknown argument; a config that is not this class's or has an unknown setting; a tensor
                that is missing, left over, truncated, or of another shape. The message names it.
            MissingInputError: a folder, a file or the variant is not there.
        """
        if refused := [argument for argument in REFUSED_ARGUMENTS if kwargs.pop(argument, None)]:
            raise InputError(f"{refused[0]} is not for these models, which load whole safetensors that fit config.json")
        classes = check_classes(classes)
        changed = {setting: kwargs[setting] for setting in cls._config_names() if setting in kwargs}
        name, folder = str(pretrained_model_name_or_path), model_folder(pretrained_model_name_or_path)
        subfolder, variant = kwargs.pop("subfolder", None), kwargs.get("variant")
        hub = {argument: kwargs.pop(argument, None) for argument in HUB_ARGUMENTS}
        is_local = name != "" and folder.is_dir()  # the empty name would stand for the current folder
        if not (is_local or may_be_on_the_hub(name)):
            raise MissingInputError(f"{name!r}: no such folder, nor the id of a model on the hub")
        folder = folder / (subfolder or "") if is_local else fetch_model(name, subfolder, variant, **hub)
        cls._check_folder(folder, variant, {**read_config(folder), **changed}, classes)
        loaded = super().from_pretrained(str(folder), **{**kwargs, "classes": classes, "use_safetensors": True})
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # diffusers would save and upload the path of a folder on this machine.
        known = {key: value for key, value in model._internal_dict.items() if key != "_name_or_path"}
        model._internal_dict = FrozenDict(known if is_local else {**known, "_name_or_path": name})
        if "disk" in (getattr(model, "hf_device_map", None) or {}).values():
            # diffusers puts the statistics of batch norm on the disk with the weights and never reads them back.
            stored = OffloadedWeightsLoader(save_folder=str(kwargs["offload_folder"]))
            for key, buffer in model.named_buffers():
                if key in stored:
                    buffer.copy_(stored[key])
        return loaded

    @classmethod
    def _check_folder(cls, folder: Path, variant: str | None, config: dict[str, Any], classes: list[type]) -> None:
        """Check config and weights by their headers, before diffusers loads what it can and warns of the rest."""
        expected = cls.without_weights(config, classes).state_dict()
        suffix = f".{variant}" if variant else ""
        index = folder / f"{WEIGHTS}.safetensors.index{suffix}.json"
        # diffusers also looks for an index under the names that older versions gave it, and before it looks for the
        # weights: with the variant behind the second dot of the whole path, or the third, wherever those are.
        pieces = (folder / f"{WEIGHTS}.safetensors.index.json").as_posix().split(".")
        for old in (Path(".".join([*pieces[:place], str(variant), *pieces[place:]])) for place in (2, 3)):
            if variant is not None and old != index and old.is_file():
                raise InputError(f"{old} is an index under a name that only older versions wrote; move it away")
        files = shard_files(index) if index.is_file() else [folder / f"{WEIGHTS}{suffix}.safetensors"]
        check_same_tensors(f"{files[0] if len(files) == 1 else folder}", expected, read_safetensors(*files))
