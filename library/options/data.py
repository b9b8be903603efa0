"""Options about images, captions and caches. Each is declared once, here, with the help a user sees.

With ``--dataset_config`` most of them only fill gaps: a key of the file wins over the command line.
"""

from dataclasses import dataclass
from pathlib import Path

from library.options.declaration import DATASETS, FOLDERS, SUBSETS, OnResume, flag, option
from library.options.option_types import face_crop_range, number, path, whole_number
from library.options.option_types import resolution as size

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area")


@dataclass(frozen=True)
class DatasetOptions:
    """Images and captions"""

    dataset_config: Path | None = option(  # noqa: RUF009 - makes a field
        None,
        "TOML or JSON file that describes the images: folders, repeats, resolution, captions. Takes the place of "
        "--train_data_dir, --reg_data_dir and --in_json.",
        read=path,
        metavar="FILE",
        on_resume=OnResume.FREE,
    )
    train_data_dir: str | None = option(
        None,
        "Folder with sub-folders named <repeats>_<words>, for example 10_mychar; the images lie in the sub-folders. "
        "With --in_json: the folder of the images themselves.",
        metavar="DIR",
        on_resume=OnResume.FREE,
    )
    reg_data_dir: str | None = option(
        None,
        "Folder of regularisation images, laid out like --train_data_dir. Rarely useful here: an image whose "
        "caption lacks the token cannot teach it anything.",
        metavar="DIR",
        on_resume=OnResume.FREE,
    )
    in_json: str | None = option(
        None,
        "JSON or JSONL file with the captions and tags of the images in --train_data_dir, in place of caption files.",
        metavar="FILE",
        on_resume=OnResume.FREE,
    )
    allow_outside_images: bool = flag(
        "Use images that a metadata file (--in_json, metadata_file) lists outside its image folder. Caches are written "
        "beside them, so only for files that you trust."
    )
    dataset_class: str | None = option(
        None,
        "Dotted path of your own Python dataset class, used instead of all folders and files. Its module is imported: "
        "the code in it runs.",
        metavar="PKG.CLASS",
    )
    resolution: tuple[int, int] | None = option(
        None,
        "Training size in pixels: one number for a square, or width,height. Typical: 512 (SD 1), 512 or 768 (SD 2), "
        "1024 (SDXL). Needed here or in the dataset file.",
        read=size,
        table=DATASETS,
    )
    train_batch_size: int = option(
        1,
        "Images per step. 1 to 4 is typical; more gives steadier steps and needs more memory.",
        read=whole_number,
        at_least=1,
        at_most=4096,
        table=DATASETS,
        key="batch_size",
    )
    dataset_repeats: int = option(
        1,
        "How often each image is seen per epoch, where no num_repeats says so.",
        read=whole_number,
        at_least=1,
        at_most=1_000_000,
        table=SUBSETS,
        key="num_repeats",
    )
    enable_bucket: bool = flag(
        "Keep the images' shapes: each is trained in the bucket (a size of about the same area) that fits it best, "
        "instead of being cropped to one size. Recommended unless all images have one shape.",
        table=DATASETS,
    )
    min_bucket_reso: int = option(
        256,
        "Shortest side of a bucket in pixels.",
        read=whole_number,
        at_least=1,
        at_most=65536,
        needs=("enable_bucket",),
        table=DATASETS,
    )
    max_bucket_reso: int = option(
        1024,
        "Longest side of a bucket in pixels; must not be less than the resolution (SDXL: 2048 is usual).",
        read=whole_number,
        at_least=1,
        at_most=65536,
        needs=("enable_bucket",),
        table=DATASETS,
    )
    bucket_reso_steps: int = option(
        64,
        "Bucket sides are multiples of this many pixels: a multiple of 64 for SD 1 and 2, of 32 for SDXL.",
        read=whole_number,
        at_least=1,
        at_most=65536,
        needs=("enable_bucket",),
        table=DATASETS,
    )
    bucket_no_upscale: bool = flag("Never enlarge a small image: it gets a bucket of its own size.", table=DATASETS)
    skip_image_resolution: tuple[int, int] | None = option(
        None,
        "Leave out images whose area is no larger than that of this size: one number for a square, or width,height.",
        read=size,
        table=DATASETS,
    )
    resize_interpolation: str | None = option(
        None,
        "How images are resized. Unset: area for shrinking, lanczos for enlarging, which suits nearly everything.",
        choices=INTERPOLATIONS,
        table=SUBSETS,
    )
    cache_info: bool = flag(
        "Remember captions and sizes in metadata_cache.json beside the images, and which images are known to be "
        "whole, for a faster start with many thousands of them. Files that have changed since are read again.",
        table=FOLDERS,
    )
    shuffle_caption: bool = flag(
        "Shuffle the comma-separated parts of a caption every time it is used. For tag lists; harms sentences.",
        table=SUBSETS,
    )
    caption_separator: str = option(",", "What separates the parts of a caption.", table=SUBSETS)
    caption_extension: str | None = option(
        None,
        "Ending of the caption files beside the images, for example .txt. Unset: .caption is looked for first, "
        "then .txt; beside class tokens (also those of a folder such as 10_girl) .caption only.",
        metavar="EXT",
        table=FOLDERS,
    )
    caption_extention: str | None = option(
        None, "Old spelling of --caption_extension; wins over it.", metavar="EXT", spelling_of="caption_extension"
    )
    keep_tokens: int = option(
        0,
        "Parts at the caption's start that shuffling, warm-up and tag dropout leave alone. 1 keeps a leading token "
        "first. Ignored when none of the three is on.",
        read=whole_number,
        at_least=0,
        table=SUBSETS,
    )
    keep_tokens_separator: str = option(
        "",
        'Text, for example "|||", that divides a caption into a fixed start and the rest (and, a second time, a fixed '
        "end); used instead of --keep_tokens where a caption holds it.",
        table=SUBSETS,
    )
    secondary_separator: str | None = option(
        None,
        'Text, for example ";;;", that joins parts while they are shuffled and becomes the separator afterwards.',
        table=SUBSETS,
    )
    enable_wildcard: bool = flag(
        "Captions may hold choices, {red|blue} hair, and several lines: one choice and one line are drawn at each use.",
        table=SUBSETS,
    )
    caption_prefix: str | None = option(
        None, "Text put before every caption, for example the token itself.", table=SUBSETS
    )
    caption_suffix: str | None = option(None, "Text put after every caption.", table=SUBSETS)
    caption_dropout_rate: float = option(
        0.0,
        "Share of uses, 0 to 1, in which a caption is dropped and only the token stays. Typical: 0 to 0.1.",
        read=number,
        at_least=0,
        at_most=1,
        table=SUBSETS,
    )
    caption_dropout_every_n_epochs: int = option(
        0,
        "Drop all captions down to the token in every n-th epoch; 0 never.",
        read=whole_number,
        at_least=0,
        table=SUBSETS,
    )
    caption_tag_dropout_rate: float = option(
        0.0,
        "Share, 0 to 1, of a caption's parts dropped at each use; the token always stays. Typical: 0 to 0.2.",
        read=number,
        at_least=0,
        at_most=1,
        table=SUBSETS,
    )
    token_warmup_min: int = option(
        1,
        "Parts of a caption used at the first step of the caption warm-up. Ignored without --token_warmup_step.",
        read=whole_number,
        at_least=0,
        table=SUBSETS,
    )
    token_warmup_step: float = option(
        0.0,
        "Caption warm-up: the number of parts grows until this step (1 or more: steps; below 1: share of all steps); "
        "0 switches it off.",
        read=number,
        at_least=0,
        table=SUBSETS,
    )
    color_aug: bool = flag(
        "Vary colours slightly at each use. Not together with cached latents; harms concepts that live by their "
        "colour.",
        table=SUBSETS,
    )
    flip_aug: bool = flag(
        "Mirror each image half of the time. Good for few images, wrong for what is not symmetric: text, logos, "
        "a scar on one side.",
        table=SUBSETS,
    )
    face_crop_aug_range: tuple[float, float] | None = option(
        None,
        "Zoom on faces by a random factor, a,b with a ≤ b, for example 2.0,4.0. Only with buckets off, latents not "
        "cached, and file names ending in _cx_cy_w_h (centre and size of the face).",
        read=face_crop_range,
        table=SUBSETS,
    )
    random_crop: bool = flag(
        "Crop at a random place instead of the centre. Not together with cached latents.", table=SUBSETS
    )
    alpha_mask: bool = flag(
        "Use the images' transparency as a mask: transparent parts do not count. Without it transparency becomes white."
    )
    masked_loss: bool = flag(
        "Learn only from the white parts of mask images (--conditioning_data_dir) or from opaque parts "
        "(--alpha_mask). Keeps backgrounds out of the token."
    )
    conditioning_data_dir: str | None = option(
        None,
        "Folder of mask images, one per training image under the same name: white counts, black does not. "
        "Serves subsets that name none; needs --masked_loss.",
        metavar="DIR",
    )
    prior_loss_weight: float = option(
        1.0, "Weight of regularisation images in the loss, usually 0 to 1.", read=number, at_least=0
    )
    train_inpainting: bool = flag(
        "Train for an inpainting model (its U-Net takes 9 channels): random masks hide parts of the images, and the "
        "model sees the rest. Not together with --cache_latents.",
        table=DATASETS,
    )
    debug_dataset: bool = flag(
        "Show what the training would see (captions, token ids, buckets, crops) and stop. No diffusion model is loaded."
    )
    dry_run: bool = flag(
        "Do all but the training and write nothing: check everything, load the model, try three steps on the largest "
        "batch, and say how long the run would take, how much memory, and which files it would write.",
        on_resume=OnResume.FREE,
        yields_to=("debug_dataset",),
    )
    max_data_loader_n_workers: int = option(
        8,
        "Processes at most that prepare images while the model trains; 0 does it in between. None are started for "
        "latents that --cache_latents keeps in memory.",
        read=whole_number,
        at_least=0,
        at_most=1024,
        on_resume=OnResume.FREE,
    )
    persistent_data_loader_workers: bool = flag(
        "Keep those processes alive between epochs. This happens anyway, except with --dataset_class.",
        on_resume=OnResume.FREE,
    )


@dataclass(frozen=True)
class CacheOptions:
    """Caches"""

    cache_latents: bool = flag(
        "Encode every image once before training and free the VAE: faster and much less memory. Recommended "
        "unless --color_aug or --random_crop is wanted."
    )
    cache_latents_to_disk: bool = flag(
        "Also keep the encoded images as .npz files beside the images, so that the next run starts at once. "
        "Switches --cache_latents on.",
        on_resume=OnResume.FREE,
    )
    vae_batch_size: int = option(
        1,
        "Images encoded at once while caching. More is faster, needs more memory and rounds the latents "
        "a little differently.",
        read=whole_number,
        at_least=1,
        at_most=4096,
        needs=("cache_latents",),
        on_resume=OnResume.FREE,
    )
    skip_cache_check: bool = flag(
        "Trust what cached files hold (image and VAE may have changed since), for a faster start with very many "
        "images, which are not looked through for damaged ones either. Shapes are checked all the same.",
        needs=("cache_latents_to_disk",),
        on_resume=OnResume.FREE,
    )
    cache_text_encoder_outputs: bool = flag(
        "Keep the text encoders' output for captions that do not hold the token (regularisation images, "
        "validation). All others change with every step and stay live, so this saves little in most runs."
    )
