"""Every option of the two scripts: small frozen dataclasses, and the ``Options`` that hold them all.

Everything else is made from these declarations: the command line, ``--config_file``, the checks and the reference page
docs/options.md. Nothing here imports torch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from library.options.data import CacheOptions, DatasetOptions
from library.options.declaration import OnResume, Option, flag, option, option_of
from library.options.option_types import boolean, texts, whole_number
from library.options.output import HubOptions, LoggingOptions, MetadataOptions, SampleOptions, SaveOptions
from library.options.recipe import RecipeOptions
from library.options.training import (
    DeepSpeedOptions,
    LossOptions,
    NoiseOptions,
    OptimizerOptions,
    RuntimeOptions,
    ScheduleOptions,
    TrainingOptions,
)


@dataclass(frozen=True)
class ModelOptions:
    """Model"""

    pretrained_model_name_or_path: str | None = option(
        None,
        "Base model that learns the token: a .safetensors or .ckpt file, a diffusers folder, or a Hugging Face name.",
        metavar="MODEL",
        required="the base model that learns the token.",
    )
    v2: bool = flag("The model is Stable Diffusion 2.x. Only train_textual_inversion.py.")
    v_parameterization: bool | None = option(
        None,
        "The model predicts v instead of noise (SD 2 at 768 pixels, some SDXL models). Unset: as the model says.",
        read=boolean,
    )
    vae: str | None = option(
        None, "Another VAE than the model's own: a file, a folder, or a Hugging Face name.", metavar="VAE"
    )
    no_half_vae: bool = flag(
        "Keep the VAE in float32. For VAEs that break down in fp16, such as SDXL's own. (A CPU without instructions "
        "for bfloat16 does so in any case.)"
    )
    clip_skip: int | None = option(
        None,
        "Layer of the text encoder, counted from the end, whose output is used. Unset: the last (SD) or the second "
        "last (SDXL). 2 for anime models made that way.",
        read=whole_number,
        at_least=1,
    )
    tokenizer_cache_dir: str | None = option(
        None, "Folder whose tokenizers are used instead of the bundled one.", metavar="DIR"
    )
    disable_mmap_load_safetensors: bool = flag(
        "Read the model file in one piece instead of mapping it into memory: faster on network drives."
    )


AUTO = "auto"  # in place of an --init_word


@dataclass(frozen=True)
class TokenOptions:
    """The token"""

    token_string: str | None = option(
        None,
        "The token, as it stands in your captions, for example mychar. It must not exist in the vocabulary yet.",
        metavar="WORD",
        required="the token, for example --token_string mychar.",
        on_resume=OnResume.REFUSED,
    )
    init_word: str | None = option(
        None,
        "A word for something close, for example girl: the new vectors start from it. It must be one token (or exactly "
        "as many as there are vectors). auto: tries many words on the images and takes the one that explains them "
        "best, in about 5 % of the run's time. Unset: an average of all words, which usually learns worse.",
        metavar="WORD",
        on_resume=OnResume.STATE_COUNTS,
    )
    init_word_candidates: tuple[str, ...] | None = option(
        None,
        "Words that --init_word=auto tries, and then those of the captions. Unset: those of the captions, and common "
        "nouns for people, animals, things and styles.",
        read=texts,
        metavar="WORD",
        needs=("init_word auto",),
        on_resume=OnResume.FREE,
    )
    num_vectors_per_token: int = option(
        1,
        "Vectors for the token. More can say more but use up the prompt's 75 places; 2 to 4 are common, up to 8 for "
        "styles.",
        read=whole_number,
        at_least=1,
        at_most=225,
        on_resume=OnResume.REFUSED,
    )
    weights: str | None = option(
        None, "Embedding file to start from instead of --init_word.", metavar="FILE", on_resume=OnResume.STATE_COUNTS
    )
    use_object_template: bool = flag(
        'Ignore captions; use sentences such as "a photo of a mychar". For things and characters without captions.'
    )
    use_style_template: bool = flag(
        'Ignore captions; use sentences such as "a painting in the style of mychar". For styles without captions.',
        yields_to=("use_object_template",),
    )
    max_token_length: int | None = option(
        None,
        "Longest caption in tokens: 75 (also when unset), 150 or 225. What is longer is cut off.",
        read=whole_number,
        choices=(75, 150, 225),
    )
    preserve_embedding_norm: bool = flag(
        "After each step bring every new vector back to the length of usual word vectors. Keeps the word easy to "
        "combine with others, at some cost in likeness."
    )

    @property
    def chooses_start(self) -> bool:
        """Whether the run finds its ``init_word`` itself."""
        return self.init_word == AUTO

    @property
    def candidates(self) -> list[str]:
        """The ``init_word_candidates`` as the models read them, each once; commas divide them as spaces do."""
        words = (word for text in self.init_word_candidates or () for word in text.split(","))
        return list(dict.fromkeys(word.strip().lower() for word in words if word.strip()))


@dataclass(frozen=True)
class Options:
    """All options of a run, checked; nothing changes them afterwards."""

    model: ModelOptions = field(default_factory=ModelOptions)
    token: TokenOptions = field(default_factory=TokenOptions)
    dataset: DatasetOptions = field(default_factory=DatasetOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    recipe: RecipeOptions = field(default_factory=RecipeOptions)
    noise: NoiseOptions = field(default_factory=NoiseOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    save: SaveOptions = field(default_factory=SaveOptions)
    metadata: MetadataOptions = field(default_factory=MetadataOptions)
    sample: SampleOptions = field(default_factory=SampleOptions)
    logging: LoggingOptions = field(default_factory=LoggingOptions)
    hub: HubOptions = field(default_factory=HubOptions)
    deepspeed: DeepSpeedOptions = field(default_factory=DeepSpeedOptions)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "Options":
        """Sort values by option name into their groups; names that are missing keep their default."""
        return cls(
            **{
                name: group(**{key: values[key] for key in (f.name for f in fields(group)) if key in values})
                for name, group in option_groups().items()
            }
        )


def option_groups() -> dict[str, type]:
    """The groups by their attribute name in :class:`Options`, in the order of the help."""
    return get_type_hints(Options)


def declared_options() -> Iterator[tuple[str, Option]]:
    """Name and declaration of every option."""
    for group in option_groups().values():
        for declared in fields(group):
            yield declared.name, option_of(declared)


def options_with(on_resume: OnResume) -> tuple[str, ...]:
    """Names of the options that resuming treats alike, in their order."""
    return tuple(name for name, option in declared_options() if option.on_resume is on_resume)


def told_options(options: Options) -> dict[str, Any]:
    """Those that an embedding file tells of (see ``Option.told``) and that are not as they are by default."""
    told, defaults = {name for name, option in declared_options() if option.told}, as_dict(Options())
    return {name: value for name, value in as_dict(options).items() if name in told and value != defaults[name]}


def dataset_keys(*tables: str) -> dict[str, tuple[str, Option]]:
    """The keys of a dataset file that fall back on an option: name and declaration of that, by the name of the key."""
    return {option.key or name: (name, option) for name, option in declared_options() if option.table in tables}


def as_dict(options: Options, secrets: bool = False) -> dict[str, Any]:
    """All values by option name; keys and tokens are left out unless ``secrets`` is True."""
    return {
        declared.name: getattr(getattr(options, group), declared.name)
        for group, kind in option_groups().items()
        for declared in fields(kind)
        if secrets or not option_of(declared).secret
    }
