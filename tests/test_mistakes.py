"""The table of mistakes: what a user does wrong, and what is told, word for word.

Each is made through the real script in one process where PyTorch cannot be imported, so none of them makes anyone wait.
Mistakes that take a model to see are in ``test_model_mistakes.py``.
"""

import io
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from inputs import arguments, write_dataset
from PIL import Image
from torchless import CommandLine, answers_to

from library.data.images import IMAGE_EXTENSIONS

DATASET = """\
[general]
caption_extension = '.txt'
[[datasets]]
resolution = 64
batch_size = 2
[[datasets.subsets]]
image_dir = 'images'
"""
IN_DATASET = "dataset.toml, [[datasets]] number 1"
IN_SUBSET = f"{IN_DATASET}, [[datasets.subsets]] number 1"
NOT_TOML = "The dataset file dataset.toml is not valid TOML"
CONFIG_NOT_TOML = "The file c.toml of --config_file is not valid TOML"
PHOTOS = "(looked at 2 images: images/photo_1.png, images/photo_2.png)"
TEMPLATES = "or use --use_object_template or --use_style_template."
NO_TOKEN = f'No caption holds the token "mychar", so nothing could be learned {PHOTOS}.'
WRITE_TOKEN = f"Write --token_string into the captions, set caption_prefix or class_tokens, {TEMPLATES}"
NO_TEXT = f"No image has a caption {PHOTOS}."
ENDINGS = ", ".join(sorted(IMAGE_EXTENSIONS))
OTHER_IMAGE = "Copy or export it again, or remove it."


@dataclass(frozen=True)
class Mistake:
    """Arguments that are added to a good command line, and files (None: none) in place of those that it reads."""

    arguments: tuple[str, ...] = ()
    files: Mapping[str, str | bytes | None] = field(default_factory=dict)


def given(*more: str, **files: str) -> Mistake:
    """Arguments; a file's name has "_" for its point."""
    return Mistake(more, {name.replace("_", "."): text for name, text in files.items()})


def config(text: str) -> Mistake:
    """A file for --config_file."""
    return Mistake(("--config_file=c",), {"c.toml": f"{text}\n"})


def dataset(old: str, new: str) -> Mistake:
    """A dataset file that has ``new`` in place of ``old``."""
    assert old in DATASET
    return Mistake(files={"dataset.toml": DATASET.replace(old, new)})


def with_keys(lines: str) -> Mistake:
    """A dataset file with more in its [[datasets]]."""
    return dataset("batch_size = 2", f"batch_size = 2\n{lines}")


def in_subset(lines: str) -> Mistake:
    """A dataset file with more in its [[datasets.subsets]]."""
    return Mistake(files={"dataset.toml": f"{DATASET}{lines}\n"})


def captions(text: str | bytes | None, **beside: str) -> Mistake:
    """Captions of the two images, and files with the same text of other extensions."""
    others = {f"images/photo_1.{extension}": other for extension, other in beside.items()}
    return Mistake(files={"images/photo_1.txt": text, "images/photo_2.txt": text, **others})


def image(content: bytes) -> Mistake:
    """The second image has another content."""
    return Mistake(files={"images/photo_2.png": content})


def folders(name: str) -> Mistake:
    """A sub-folder of --train_data_dir in place of a dataset file."""
    return Mistake(("--dataset_config=", "--train_data_dir=train"), {f"train/{name}/a.png": PNG})


def metadata(text: str) -> Mistake:
    """A metadata file for --in_json."""
    argv = ("--dataset_config=", "--in_json=m.json", "--train_data_dir=images", "--resolution=64")
    return Mistake(argv, {"m.json": text})


NO_IMAGES: dict[str, None] = {"images/photo_1.png": None, "images/photo_2.png": None}
PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00`"


def cut_off() -> bytes:
    """An image whose header is sound and whose end is missing."""
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "PNG")
    return whole.getvalue()[:1000]


COMMAND_LINE = {
    "a number with a comma": (
        given("--learning_rate=0,0005"),
        '--learning_rate: "0,0005" is not a number. Use a point: 0.0005.',
    ),
    "a thousand with a comma": (
        given("--max_train_steps=1,000"),
        '--max_train_steps: "1,000" is not a whole number. Write it without a comma: 1000.',
    ),
    "a list where a number belongs": (
        given("--noise_offset=0.1,0.2"),
        '--noise_offset: "0.1,0.2" is not a number.',
    ),
    "steps as a power of ten": (
        given("--lr_warmup_steps=1e2"),
        '--lr_warmup_steps: "1e2" is neither a whole number of steps nor a share below 1 such as 0.1 or '
        "10%. Write 100.",
    ),
    "a share above all steps": (
        given("--lr_warmup_steps=150%"),
        "--lr_warmup_steps is 150% of all steps; a share must be at most 100%.",
    ),
    "a word where a number belongs": (
        given("--seed=abc"),
        '--seed: "abc" is not a whole number.',
    ),
    "no value": (
        given("--seed"),
        "--seed needs a value.",
    ),
    "an empty number": (
        given("--max_train_steps="),
        '--max_train_steps: "" is not a whole number.',
    ),
    "half an epoch": (
        given("--max_train_epochs=0.5"),
        '--max_train_epochs: "0.5" is not a whole number.',
    ),
    "a rate that is not a number": (
        given("--learning_rate=nan"),
        '--learning_rate: "nan" is not a finite number.',
    ),
    "a negative rate": (
        given("--learning_rate=-1"),
        '--learning_rate: "-1" is no learning rate: it must be above 0.',
    ),
    "no steps": (
        given("--max_train_steps=0"),
        "--max_train_steps is 0; it must be at least 1 and at most 100000000.",
    ),
    "no vectors": (
        given("--num_vectors_per_token=0"),
        "--num_vectors_per_token is 0; it must be at least 1 and at most 225.",
    ),
    "too many vectors": (
        given("--num_vectors_per_token=300"),
        "--num_vectors_per_token is 300; it must be at least 1 and at most 225.",
    ),
    "a layer that is none": (
        given("--clip_skip=0"),
        "--clip_skip is 0; it must be at least 1.",
    ),
    "a size with an x": (
        given("--resolution=512x512"),
        '--resolution: "512x512" is not a size such as 512 or 512,768.',
    ),
    "a slip in an option": (
        given("--learning_rat=1"),
        '--learning_rat is not an option. Did you mean "--learning_rate"?',
    ),
    "an option that is none": (
        given("--qqqqqqqq"),
        "--qqqqqqqq is not an option. See --help.",
    ),
    "an option of LoRA training": (
        given("--network_dim=8"),
        "--network_dim is an option of LoRA training, and this trains an embedding. Leave it out; the "
        "size of an embedding is --num_vectors_per_token.",
    ),
    "a LoRA option with dashes": (
        given("--unet-lr=1e-4"),
        "--unet-lr is an option of LoRA training, and this trains an embedding. Leave it out; the size of "
        "an embedding is --num_vectors_per_token.",
    ),
    "a flag with a word behind it": (
        given("--cache_latents", "true"),
        '"true" belongs to no option. A flag is given alone, or with =true or =false: --cache_latents, '
        "--cache_latents=false.",
    ),
    "a flag that is neither": (
        given("--v2=maybe"),
        "--v2 is a flag: give it alone, or with =true or =false.",
    ),
    "a text without quotes": (
        given("--init_word=a", "girl"),
        '"girl" belongs to no option. A value with spaces needs quotes.',
    ),
    "a choice that is none": (
        given("--loss_type=l3"),
        '--loss_type: "l3" is not one of: l1, l2, huber, smooth_l1.',
    ),
    "a precision that is none": (
        given("--mixed_precision=fp8"),
        '--mixed_precision: "fp8" is not one of: no, fp16, bf16.',
    ),
    "a file format that is none": (
        given("--save_model_as=zip"),
        '--save_model_as: "zip" is not one of: ckpt, pt, safetensors.',
    ),
    "a tracker that is none": (
        given("--log_with=tensorbord"),
        '--log_with: "tensorbord" is not one of: tensorboard, wandb, all. Did you mean "tensorboard"?',
    ),
    "a repository without its owner": (
        given("--huggingface_repo_id=mychar"),
        '--huggingface_repo_id is "mychar"; it must be user/name.',
    ),
    "timesteps the wrong way round": (
        given("--min_timestep=500", "--max_timestep=100"),
        "--min_timestep 500 is not below --max_timestep 100. Both lie between 0 and 1000; unset they are 0 and 1000.",
    ),
    "full precision alone": (
        given("--full_bf16"),
        "--full_bf16 needs --mixed_precision bf16; it is not given.",
    ),
    "full precision with another": (
        given("--full_fp16", "--mixed_precision=bf16"),
        '--full_fp16 needs --mixed_precision fp16; it is "bf16".',
    ),
    "two optimizers": (
        given("--use_8bit_adam", "--use_lion_optimizer"),
        "--use_8bit_adam and --use_lion_optimizer name two optimizers. Keep one of them; --use_8bit_adam "
        "means --optimizer_type=AdamW8bit.",
    ),
    "an optimizer twice": (
        given("--use_8bit_adam", "--optimizer_type=Lion"),
        "--use_8bit_adam and --optimizer_type=Lion name two optimizers. Keep one of them; --use_8bit_adam "
        "means --optimizer_type=AdamW8bit.",
    ),
    "an offset's scale without an offset": (
        given("--adaptive_noise_scale=0.1"),
        "--adaptive_noise_scale changes the noise offset and needs --noise_offset, for example 0.05.",
    ),
    "a loss for the other objective": (
        given("--v_pred_like_loss=0.1", "--v_parameterization"),
        "--v_pred_like_loss is for models that predict noise. Leave it out with --v_parameterization.",
    ),
    "a loss for a v-prediction model": (
        given("--scale_v_pred_loss_like_noise_pred"),
        "--scale_v_pred_loss_like_noise_pred is for v-prediction models and needs --v_parameterization.",
    ),
    "DeepSpeed": (
        given("--deepspeed"),
        "--deepspeed cannot help here: it divides weights, gradients and optimizer states among GPUs, and "
        "only the few new vectors have any. Leave it out; several GPUs work with accelerate launch "
        "--multi_gpu.",
    ),
    "random masks with cached latents": (
        given("--train_inpainting"),
        "--train_inpainting hides another part of each image every time, so its latents cannot be made "
        "once and for all. Leave out --cache_latents and --cache_latents_to_disk.",
    ),
    "samples without prompts": (
        given("--sample_every_n_steps=5"),
        "--sample_prompts is missing: a file with the prompts to draw, one on each line, is needed for "
        "--sample_every_n_steps, --sample_every_n_epochs and --sample_at_first.",
    ),
    "no model": (
        given("--pretrained_model_name_or_path="),
        "--pretrained_model_name_or_path is missing: the base model that learns the token.",
    ),
    "no token": (
        given("--token_string="),
        "--token_string is missing: the token, for example --token_string mychar.",
    ),
    "a blank token": (
        given("--token_string= "),
        "--token_string is missing: the token, for example --token_string mychar.",
    ),
    "no images": (
        given("--dataset_config="),
        "No images are given: use --dataset_config (a TOML file) or --train_data_dir (a folder).",
    ),
    "no output folder": (
        given("--output_dir="),
        "--output_dir is missing: the folder for the embedding file.",
    ),
    "a folder in the output name": (
        given("--output_name=sub/mychar"),
        '--output_name "sub/mychar" is no file name. The folder belongs in --output_dir.',
    ),
    "options to write without a file": (
        given("--output_config"),
        "--output_config needs --config_file, which names the file to write.",
    ),
    "an output folder that is a file": (
        given("--output_dir=dataset.toml"),
        "--output_dir dataset.toml: dataset.toml is a file, not a folder. Choose another folder.",
    ),
}

CONFIG_FILE = {
    "a config file that is not there": (
        given("--config_file=nowhere"),
        "The file nowhere.toml of --config_file does not exist (looked for in HERE). Check the path.",
    ),
    "a config file in another encoding": (
        Mistake(("--config_file=c",), {"c.toml": b"output_name = '\xe9'"}),
        "The file c.toml of --config_file is not UTF-8 text (byte 15 cannot be decoded). Save it again as UTF-8.",
    ),
    "a text without quotes": (
        config("output_name = my char"),
        f"{CONFIG_NOT_TOML}: Invalid value (at line 1, column 15). Write output_name = 'my char': text needs quotes.",
    ),
    "a text without quotes and a comment": (
        config("output_name = mychar # a name"),
        f"{CONFIG_NOT_TOML}: Invalid value (at line 1, column 15). Write output_name = 'mychar': text needs quotes.",
    ),
    "a Windows path without quotes": (
        config("output_dir = C:\\new"),
        f"{CONFIG_NOT_TOML}: Invalid value (at line 1, column 14). Write output_dir = 'C:\\new': text needs quotes.",
    ),
    "True": (
        config("cache_latents = True"),
        f"{CONFIG_NOT_TOML}: Invalid value (at line 1, column 17). Write cache_latents = true, in lowercase.",
    ),
    "a number with a comma": (
        config("learning_rate = 0,0005"),
        f"{CONFIG_NOT_TOML}: Expected newline or end of document after a statement (at line 1, column 18). "
        "Write learning_rate = 0.0005, with a point.",
    ),
    "a word where a number belongs": (
        config('seed = "abc"'),
        'seed in c.toml: "abc" is not a whole number.',
    ),
    "half a step": (
        config("max_train_steps = 1.5"),
        "max_train_steps in c.toml: 1.5 is not a whole number.",
    ),
    "a flag that is neither": (
        config("v2 = 2"),
        "v2 in c.toml: 2 is neither true nor false.",
    ),
    "a choice that is none": (
        config('mixed_precision = "fp8"'),
        'mixed_precision in c.toml: "fp8" is not one of: no, fp16, bf16.',
    ),
    "a Windows path in double quotes": (
        config('output_dir = "D:\\train\\new"'),
        "output_dir in c.toml: 'D:\\train\\new' holds a control character. In double quotes, \\t, \\n and the "
        "like are such: write the backslashes of Windows paths as /, or use single quotes.",
    ),
    "a list without its end": (
        config("resolution = [512"),
        f"{CONFIG_NOT_TOML}: Unclosed array (at end of document). A list ends with ].",
    ),
    "an option twice": (
        config("seed = 1\nseed = 2"),
        f"{CONFIG_NOT_TOML}: Cannot overwrite a value (at line 2, column 9). It is given twice. Keep one of them.",
    ),
    "a dataset file as config file": (
        config("[[datasets]]\nresolution = 512"),
        "c.toml describes a dataset. Give it with --dataset_config instead of --config_file.",
    ),
}

DATASET_FILE = {
    "a dataset file that is not there": (
        given("--dataset_config=nowhere.toml"),
        "The dataset file nowhere.toml does not exist (looked for in HERE). Check the path.",
    ),
    "a folder as dataset file": (
        given("--dataset_config=images"),
        "The dataset file images is a folder, not a file. Check the path.",
    ),
    "another kind of dataset file": (
        given("--dataset_config=d.yaml", d_yaml=DATASET),
        'The dataset file d.yaml ends in ".yaml"; it must be a .toml or a .json file.',
    ),
    "a dataset file in another encoding": (
        Mistake(files={"dataset.toml": DATASET.encode("utf-16")}),
        "The dataset file dataset.toml is not UTF-8 text (byte 0 cannot be decoded). Save it again as UTF-8.",
    ),
    "JSON without its end": (
        given("--dataset_config=d.json", d_json='{"datasets": ['),
        "The dataset file d.json is not valid JSON: Expecting value: line 1 column 15 (char 14).",
    ),
    "an empty dataset file": (
        Mistake(files={"dataset.toml": ""}),
        "dataset.toml: there is no [[datasets]] in it, so there is nothing to train on.",
    ),
    "single brackets": (
        dataset("[[datasets]]", "[datasets]"),
        'dataset.toml: "datasets" must be a list of tables, each begun with [[datasets]], but it is a table.',
    ),
    "single brackets below": (
        dataset("[[datasets.subsets]]", "[datasets.subsets]"),
        f'{IN_DATASET}: "subsets" must be a list of tables, each begun with [[datasets.subsets]], but it is a table.',
    ),
    "no subset": (
        dataset("[[datasets.subsets]]\nimage_dir = 'images'", ""),
        f'{IN_DATASET}: there is no [[datasets.subsets]] in it. Add one with image_dir = "path/to/…".',
    ),
    "no image_dir": (
        dataset("image_dir = 'images'", ""),
        f'{IN_SUBSET}: "image_dir" is missing. Add image_dir = "path/to/…".',
    ),
    "no resolution": (
        dataset("resolution = 64", ""),
        f"{IN_DATASET}: there is no resolution. Write resolution = 512 (1024 for SDXL) in [general] or "
        "[[datasets]], or give --resolution.",
    ),
    "a path without quotes": (
        dataset("'images'", "/data/my images"),
        f"{NOT_TOML}: Invalid value (at line 7, column 13). Write image_dir = '/data/my images': text needs quotes.",
    ),
    "an extension without quotes": (
        dataset("'.txt'", ".txt"),
        f"{NOT_TOML}: Invalid value (at line 2, column 21). Write caption_extension = '.txt': text needs quotes.",
    ),
    "True": (
        with_keys("enable_bucket = True"),
        f"{NOT_TOML}: Invalid value (at line 6, column 17). Write enable_bucket = true, in lowercase.",
    ),
    "a Windows path in double quotes": (
        dataset("'images'", '"C:\\images"'),
        f"{NOT_TOML}: Unescaped '\\' in a string (at line 7, column 18). In double quotes, write the "
        "backslashes of Windows paths as /, or use single quotes.",
    ),
    "a Windows path with a tab in it": (
        dataset("'images'", '"C:\\new\\table"'),
        f'{IN_SUBSET}: "image_dir" must be a path in quotes (a Windows path in single quotes, or with /), '
        'but it is "C:\\new\\table".',
    ),
    "a number in quotes": (
        dataset("resolution = 64", 'resolution = "64"'),
        f'{IN_DATASET}: "resolution" must be a whole number from 8 to 16384, or two of them: [width, '
        'height], but it is "64". Write it without quotes: 64.',
    ),
    "a size in quotes": (
        dataset("resolution = 64", 'resolution = "64,64"'),
        f'{IN_DATASET}: "resolution" must be a whole number from 8 to 16384, or two of them: [width, '
        'height], but it is "64,64". Write it without quotes: [64, 64].',
    ),
    "a flag in quotes": (
        with_keys("enable_bucket = 'True'"),
        f'{IN_DATASET}: "enable_bucket" must be true or false, but it is "True". Write it without quotes: true.',
    ),
    "a flag as a number": (
        in_subset("shuffle_caption = 1"),
        f'{IN_SUBSET}: "shuffle_caption" must be true or false, but it is 1.',
    ),
    "a word where a number belongs": (
        dataset("batch_size = 2", "batch_size = 'two'"),
        f'{IN_DATASET}: "batch_size" must be a whole number from 1 to 4096, but it is "two".',
    ),
    "a key twice": (
        in_subset("num_repeats = 3\nnum_repeats = 4"),
        f"{NOT_TOML}: Cannot overwrite a value (at line 9, column 16). It is given twice. Keep one of them.",
    ),
    "a slip in a key": (
        in_subset("num_repeat = 3"),
        f'{IN_SUBSET}: "num_repeat" (here 3) is not a known key. Did you mean "num_repeats"?',
    ),
    "the option's name of a key": (
        with_keys("train_batch_size = 2"),
        f'{IN_DATASET}: "train_batch_size" (here 2) is not a known key. Did you mean "batch_size"?',
    ),
    "an option as a key": (
        with_keys("max_token_length = 150"),
        f'{IN_DATASET}: "max_token_length" (here 150) is not for dataset files: give --max_token_length on '
        "the command line.",
    ),
    "a dataset's key in a subset": (
        in_subset("batch_size = 4"),
        f'{IN_SUBSET}: "batch_size" (here 4) cannot stand in [[datasets.subsets]]; it belongs in [general] '
        "or [[datasets]].",
    ),
    "a subset's key in a dataset": (
        with_keys("is_reg = true"),
        f'{IN_DATASET}: "is_reg" (here true) cannot stand in [[datasets]]; it belongs in [[datasets.subsets]].',
    ),
    "a batch of nothing": (
        dataset("batch_size = 2", "batch_size = 0"),
        f'{IN_DATASET}: "batch_size" must be a whole number from 1 to 4096, but it is 0.',
    ),
    "a share above 1": (
        in_subset("caption_dropout_rate = 10"),
        f'{IN_SUBSET}: "caption_dropout_rate" must be a number from 0 to 1, but it is 10.',
    ),
    "all images for validation": (
        with_keys("validation_split = 1.0"),
        f'{IN_DATASET}: "validation_split" must be a number with a decimal point from 0.0 to below 1.0, but it is 1.0.',
    ),
    "a resolution of a few pixels": (
        dataset("resolution = 64", "resolution = 4"),
        f'{IN_DATASET}: "resolution" must be a whole number from 8 to 16384, or two of them: [width, '
        "height], but it is 4.",
    ),
    "a default that does not fit": (
        with_keys("enable_bucket = true"),
        f'{IN_DATASET}: "min_bucket_reso" is needed here. It must be at most the shorter side of the '
        "resolution 64x64, and left out it is 256.",
    ),
    "a default that does not fit above": (
        dataset("resolution = 64", "resolution = 1536\nenable_bucket = true"),
        f'{IN_DATASET}: "max_bucket_reso" is needed here. It must be at least the longer side of the '
        "resolution 1536x1536, and left out it is 1024.",
    ),
    "a default below one step": (
        dataset("resolution = 64", "resolution = 512\nenable_bucket = true\nbucket_reso_steps = 320"),
        f'{IN_DATASET}: "min_bucket_reso" is needed here. It must be at least bucket_reso_steps (320), and '
        "left out it is 256.",
    ),
    "a limit that does not fit above": (
        dataset("resolution = 64", "resolution = 640\nenable_bucket = true\nmax_bucket_reso = 512"),
        f'{IN_DATASET}: "max_bucket_reso" must be at least the longer side of the resolution 640x640, but it is 512.',
    ),
    "a limit that does not fit": (
        with_keys("enable_bucket = true\nmin_bucket_reso = 128"),
        f'{IN_DATASET}: "min_bucket_reso" must be at most the shorter side of the resolution 64x64, but it is 128.',
    ),
    "steps that do not fit the model": (
        with_keys("enable_bucket = true\nmin_bucket_reso = 64\nbucket_reso_steps = 48"),
        f'{IN_DATASET}: "bucket_reso_steps" must be a multiple of 64 for this model, but it is 48.',
    ),
    "random crops with cached latents": (
        in_subset("random_crop = true"),
        f"{IN_SUBSET}: random_crop cannot vary an image whose latents are cached, that is made once. "
        "Switch off either this or --cache_latents (and --cache_latents_to_disk). flip_aug works.",
    ),
    "masks without their option": (
        in_subset("conditioning_data_dir = 'masks'"),
        f'{IN_SUBSET}: "conditioning_data_dir" (here "masks") names masks. It needs --masked_loss on the '
        "command line and belongs in [[datasets.subsets]]: there in all of a dataset or in none, unless "
        "--conditioning_data_dir serves those without.",
    ),
    "the option without masks": (
        given("--masked_loss"),
        "--masked_loss has no masks: give the subsets conditioning_data_dir (or --conditioning_data_dir "
        "for all of them), or alpha_mask = true where the images' own transparency is the mask.",
    ),
    "masks of other names": (
        Mistake(("--masked_loss", "--conditioning_data_dir=masks"), {"masks/a.png": PNG}),
        'The mask folder "masks" has no mask of the same name for images/photo_1.png, images/photo_2.png.',
    ),
    "regularisation images alone": (
        in_subset("is_reg = true"),
        "There are only regularisation images (is_reg), so there is nothing to train on.",
    ),
}

IMAGES = {
    "a folder that is not there": (
        dataset("'images'", "'imagse'"),
        'The folder "imagse" does not exist (looked for in HERE). Check image_dir.',
    ),
    "an image as folder": (
        dataset("'images'", "'images/photo_1.png'"),
        '"images/photo_1.png" is a file, but image_dir must be a folder of images.',
    ),
    "a folder without images": (
        Mistake(files=NO_IMAGES),
        f'The image folder "images" holds no images ({ENDINGS}).',
    ),
    "images in a folder below": (
        Mistake(files={**NO_IMAGES, "images/inner/a.png": PNG}),
        f'The image folder "images" holds no images ({ENDINGS}). It has folders (inner), but folders '
        "inside it are not searched.",
    ),
    "an empty image": (
        image(b""),
        "The image images/photo_2.png is empty (0 bytes). Copy it again or remove it.",
    ),
    "a text as image": (
        image(b"no image"),
        "images/photo_2.png is not an image in a format known here (PNG, JPEG, WEBP, BMP, AVIF). Convert "
        "it, or remove it.",
    ),
    "an image that is cut off": (
        image(cut_off()),
        f"The image images/photo_2.png cannot be read: image file is truncated. {OTHER_IMAGE}",
    ),
    "an image that is cut off in its header": (
        image(PNG),
        f"The image images/photo_2.png cannot be read: Truncated File Read. {OTHER_IMAGE}",
    ),
    "a web page as image": (
        image(b"<html>"),
        "The image images/photo_2.png cannot be read: it is a web page, so the download did not work. "
        "Fetch it again, or remove it.",
    ),
    "an image that Git left out": (
        image(b"version https://git-lfs.github.com/spec/v1"),
        "The image images/photo_2.png cannot be read: it is a Git LFS pointer, so the file itself was not "
        "fetched (run `git lfs pull`). Fetch it again, or remove it.",
    ),
    "folders without repeats": (
        folders("mychar"),
        "--train_data_dir: train has no sub-folder named <repeats>_<words>, such as 10_mychar. Images "
        "that lie in it directly are not used: move them into one, or name the folder as image_dir in a "
        "file for --dataset_config.",
    ),
    "a folder flag that leads nowhere": (
        given("--dataset_config=", "--train_data_dir=imagse"),
        "--train_data_dir: imagse does not exist (looked for in HERE). Check the path.",
    ),
    "folders without a resolution": (
        folders("10_mychar"),
        "The dataset of --train_data_dir: there is no resolution. Write resolution = 512 (1024 for SDXL) "
        "in [general] or [[datasets]], or give --resolution.",
    ),
    "a metadata file that is not there": (
        in_subset("metadata_file = 'm.json'"),
        'The metadata file "m.json" does not exist (looked for in HERE). Check the path.',
    ),
    "metadata of images that are not there": (
        metadata('{"a.png": {"caption": "mychar"}}'),
        'The metadata file "m.json" lists 1 of 1 images that do not exist: images/a.png. Check its keys and image_dir.',
    ),
    "metadata of another form": (
        metadata('{"photo_1.png": 3}'),
        'The entry "photo_1.png" of the metadata file "m.json" must be an object such as {"caption": "…", '
        '"tags": "…"}, not 3.',
    ),
}

CAPTIONS = {
    "no captions": (
        captions(None),
        f'{NO_TEXT} Write for each a file of its name ending in .txt beside it, with the token "mychar" in '
        f"it, or set caption_extension, {TEMPLATES}",
    ),
    "empty captions": (
        captions(""),
        f'{NO_TEXT} Write for each a file of its name ending in .txt beside it, with the token "mychar" in '
        f"it, or set caption_extension, {TEMPLATES}",
    ),
    "captions of another extension": (
        captions(None, tags="mychar"),
        f"{NO_TEXT} images/photo_1.tags is not read: for captions in such files set caption_extension = "
        '".tags". Write for each a file of its name ending in .txt beside it, with the token "mychar" in '
        f"it, or set caption_extension, {TEMPLATES}",
    ),
    "captions without the token": (
        captions("a photo"),
        f"{NO_TOKEN} {WRITE_TOKEN}",
    ),
    "captions with the token in two words": (
        captions("a photo of my char"),
        f'{NO_TOKEN} A caption has "my char", but must hold the token just as it is given. {WRITE_TOKEN}',
    ),
    "captions with the token in the plural": (
        captions("two mychars"),
        f'{NO_TOKEN} A caption has "mychars", but must hold the token just as it is given. {WRITE_TOKEN}',
    ),
    "a token with a space": (
        Mistake(("--token_string=my new char",)),
        f'No caption holds the token "my new char", so nothing could be learned {PHOTOS}. A token with a '
        'space must stand in them just so; one word, such as "mynewchar", is easier to write. '
        f"{WRITE_TOKEN}",
    ),
    "a token that ends with a space": (
        given("--token_string=mychar "),
        "--token_string 'mychar ' cannot be a token: it must not be empty, begin or end with a space, or "
        'hold a line break. Give a made-up word such as "mychar".',
    ),
    "a token in full-width letters": (
        given("--token_string=ｍｙchar"),
        '--token_string "ｍｙchar" would never be found: text is repaired before it is read, and this '
        'becomes "mychar" in every caption. Give --token_string="mychar", or another made-up token.',
    ),
    "captions in another encoding": (
        captions("mychar".encode("utf-16")),
        'The caption file "images/photo_1.txt" is not UTF-8 text (byte 0 cannot be decoded). Save it '
        "again as UTF-8 in a text editor.",
    ),
    "a caption that is none": (
        captions("x" * 2**21),
        'The caption file "images/photo_1.txt" has more than 1,048,576 bytes, so it is not a caption. Remove it.',
    ),
}

OTHER_FILES = {
    "a model that is not there": (
        given("--pretrained_model_name_or_path=nowhere.safetensors"),
        "--pretrained_model_name_or_path nowhere.safetensors does not exist (looked for in HERE). Check the path.",
    ),
    "a VAE that is not there": (
        given("--vae=nowhere.pt"),
        "--vae nowhere.pt does not exist (looked for in HERE). Check the path.",
    ),
    "an embedding that is not there": (
        given("--weights=nowhere.pt"),
        "--weights nowhere.pt does not exist (looked for in HERE). Check the path.",
    ),
    "a state that is not there": (
        given("--resume=nowhere-state"),
        "--resume nowhere-state does not exist (looked for in HERE). States are made by --save_state, in --output_dir.",
    ),
    "prompts that are not there": (
        given("--sample_prompts=nowhere.txt", "--sample_at_first"),
        "--sample_prompts nowhere.txt does not exist (looked for in HERE). Check the path.",
    ),
}

WARNED_OF = {
    "a resolution that is no multiple": (
        dataset("resolution = 64", "resolution = 100"),
        f"{IN_DATASET}: the resolution 100x100 is no multiple of 8, as the VAE needs: it becomes 96x96.",
    ),
    "images of other formats": (
        Mistake(files={f"images/{name}": b"" for name in ("a.heic", "b.gif", "c.TIFF")}),
        'The folder "images" has 3 images in formats that are not read, which are left out: a.heic, '
        "b.gif, c.TIFF. Save as PNG, JPEG or WebP.",
    ),
    "a slip and a LoRA option in a config file": (
        config("learning_rat = 1\nnetwork_dim = 8"),
        'c.toml: unknown keys, which change nothing: learning_rat (did you mean "learning_rate"?), '
        "network_dim (of LoRA training; this trains an embedding).",
    ),
    "two sources of images": (
        given("--train_data_dir=images"),
        "--train_data_dir: ignored, because --dataset_config describes all images.",
    ),
    "an ending in the output name": (
        given("--output_name=my.safetensors"),
        '--output_name "my.safetensors" is taken as "my": --save_model_as adds the ending, .safetensors.',
    ),
    "a subset that is never repeated": (
        in_subset("num_repeats = 0\n[[datasets.subsets]]\nimage_dir = 'images'"),
        f"{IN_SUBSET} is left out: its num_repeats is 0.",
    ),
}
TABLE = {
    f"{place}: {mistake}": row
    for place, rows in {
        "command line": COMMAND_LINE,
        "config file": CONFIG_FILE,
        "dataset file": DATASET_FILE,
        "images": IMAGES,
        "captions": CAPTIONS,
        "other files": OTHER_FILES,
        "warned of": WARNED_OF,
    }.items()
    for mistake, row in rows.items()
}


def prepared(mistake: Mistake, sound: Path, folder: Path) -> CommandLine:
    """The command line of a mistake, with its files in a folder of its own."""
    shutil.copytree(sound, folder)
    for name, content in mistake.files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content.encode() if isinstance(content, str) else content)
    argv = arguments("sd1", Path("model.safetensors"), Path("dataset.toml"), Path("out"), *mistake.arguments)
    return CommandLine("train_textual_inversion", str(folder), argv)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What is answered to each mistake of the table, and once to none."""
    base = tmp_path_factory.mktemp("mistakes")
    write_dataset(base / "sound", count=2)
    (base / "sound" / "dataset.toml").write_text(DATASET, encoding="utf-8")
    (base / "sound" / "model.safetensors").touch()
    mistakes = {"none": Mistake(), **{name: mistake for name, (mistake, _) in TABLE.items()}}
    # What is told of options comes first: once Pillow is imported it stays.
    names = sorted(mistakes, key=lambda name: not name.startswith(("command line", "config file")))
    lines = [prepared(mistakes[name], base / "sound", base / str(number)) for number, name in enumerate(names)]
    found = answers_to(lines)
    yield {
        name: (answer, answer.said.replace(line.folder, "HERE"), Path(line.folder))
        for name, answer, line in zip(names, found, lines, strict=True)
    }
    shutil.rmtree(base)


@pytest.mark.parametrize("name", [name for name in TABLE if not name.startswith("warned of")])
def test_a_mistake_is_told_at_once_in_these_words(name, answers):
    answer, said, folder = answers[name]
    assert f"error: {TABLE[name][1]}\n" == said.splitlines(keepends=True)[-1]
    assert answer.code == 1
    assert not (folder / "out").exists()
    if name.startswith(("command line", "config file")):
        assert answer.slow == []


@pytest.mark.parametrize("name", [name for name in TABLE if name.startswith("warned of")])
def test_what_may_be_meant_is_warned_of_before_pytorch_is_imported(name, answers):
    answer, said, _ = answers[name]
    assert f" WARNING {TABLE[name][1]}\n" in said
    assert answer.code is None


def test_without_a_mistake_nothing_is_told(answers):
    answer, said, _ = answers["none"]
    assert answer.code is None
    assert [line.split()[1] for line in said.splitlines()] == ["INFO"]


def test_the_table_is_long():
    assert len({told for _, told in TABLE.values()}) >= 60
