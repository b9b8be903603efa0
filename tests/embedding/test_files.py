"""Writing and reading embedding files: golden cases, every client's loading rules, damage and mistakes."""

import ast
import collections
import hashlib
import json
import pickle
import re
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from departures import departure
from golden_data import golden_cases
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.embedding.files import (
    PAIR,
    SAVE_DTYPES,
    SINGLE,
    read_embedding,
    rows_from_file,
    write_embedding,
)
from library.embedding.metadata import TrainedFor, TrainingRecord, modelspec_metadata
from library.options.options import MetadataOptions
from library.support.errors import UserError

RECORD = TrainingRecord("mychar", 3, steps=1600, base_model="sd15", base_model_hash="ab12cd34ef")
WIDTHS = {SINGLE: (768,), PAIR: (768, 1280)}
SUFFIXES = (".safetensors", ".pt", ".ckpt")


def some_rows(keys=SINGLE, count=3, width=768):
    widths = (width,) if keys == SINGLE else WIDTHS[PAIR]
    generator = torch.Generator().manual_seed(1)
    return {key: torch.randn(count, width, generator=generator) for key, width in zip(keys, widths, strict=True)}


def header_metadata(path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def same(found, rows) -> bool:
    return set(found) == set(rows) and all(torch.equal(found[key], rows[key]) for key in rows)


# ---- golden cases ----


def shapes_to_content(described):
    """The content of a golden file: shapes become tensors; a sentence is taken by the literal that it ends with."""
    if isinstance(described, str):
        found = re.search(r"[\[{].*$", described)
        if found is None:
            return described
        literal = ast.literal_eval(found.group())
        content = shapes_to_content(literal)
        if "ParameterDict" in described:
            content = torch.nn.ParameterDict({name: torch.nn.Parameter(rows) for name, rows in content.items()})
        return (
            {"string_to_token": {"*": 265}, "string_to_param": content} if "string_to_param" in described else content
        )
    if isinstance(described, dict):
        return {
            name: value if isinstance(value, str) else shapes_to_content(value) for name, value in described.items()
        }
    return torch.randn(described)


@pytest.mark.parametrize("case", golden_cases("load_weights"))
def test_golden_load_weights(case, tmp_path):
    path = tmp_path / f"weights{case['ext']}"
    content = shapes_to_content(case["content"])
    save_file(content, path) if case["ext"] == ".safetensors" else torch.save(content, path)
    keys = PAIR if case["sdxl"] else SINGLE
    known = [shape for shape in case.get("loaded", []) if shape]
    if "error" in case or departure("load_weights", case):
        with pytest.raises(UserError):
            rows_from_file(path, keys, WIDTHS[keys], known[0][0] if known else 2)
        return
    widths = [shape[1] if shape else width for shape, width in zip(case["loaded"], WIDTHS[keys], strict=True)]
    rows = rows_from_file(path, keys, widths, known[0][0])
    assert [None if found is None else list(found.shape) for found in rows] == case["loaded"]
    written = content.get("string_to_param", content)
    for key, found in zip(keys, rows, strict=True):
        if found is not None:
            assert torch.equal(found, torch.atleast_2d(written.get(key, next(iter(written.values())))))


@pytest.mark.parametrize("case", golden_cases("saved_file"))
def test_golden_saved_file(case, tmp_path):
    path = tmp_path / f"n{case['ext']}"
    dtype = getattr(torch, case["save_dtype"].removeprefix("torch."), None)
    dtype = dtype if isinstance(dtype, torch.dtype) else None
    own = getattr(torch, case["embedding_dtype"].removeprefix("torch."))
    rows = {key: torch.nn.Parameter(torch.randn(shape, dtype=own)) for key, (_, shape) in case["keys"].items()}
    write_embedding(path, rows, RECORD, dtype=dtype, metadata=case.get("metadata"))

    content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    if "python_type" in case:
        assert type(content).__name__ == case["python_type"]
    # A torch file holds AUTOMATIC1111's fields too, which are not tensors at the top.
    assert departure("saved_file", case)
    tensors = {key: rows for key, rows in content.items() if isinstance(rows, torch.Tensor)}
    assert {key: [str(found.dtype), list(found.shape)] for key, found in tensors.items()} == case["keys"]
    for key, found in tensors.items():
        assert torch.equal(found, rows[key].detach().to(found.dtype))
    if "metadata" in case:
        # More keys than the golden's are ours to add.
        assert case["metadata"].items() <= header_metadata(path).items()


# ---- what is written ----


@pytest.mark.parametrize("keys", [SINGLE, PAIR])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_written_is_read_again(tmp_path, keys, suffix):
    rows = some_rows(keys)
    path = tmp_path / "new" / "folder" / f"mychar{suffix}"
    write_embedding(path, rows, RECORD)
    assert same(read_embedding(path), rows)
    assert [torch.equal(found, rows[key]) for found, key in zip(
        rows_from_file(path, keys, WIDTHS[keys], 3), keys, strict=True)] == [True] * len(keys)  # fmt: skip
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_slices_of_a_parameter_are_saved_as_plain_small_tensors(tmp_path, suffix):
    table = torch.nn.Parameter(torch.randn(50_000, 768))
    path = tmp_path / f"mychar{suffix}"
    write_embedding(path, {"emb_params": table[7:10]}, RECORD)
    content = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert type(content["emb_params"]) is torch.Tensor
    assert torch.equal(content["emb_params"], table[7:10].detach())
    assert path.stat().st_size < 3 * 768 * 4 + 4096


@pytest.mark.parametrize(("precision", "size"), [("float", 4), ("fp16", 2), ("bf16", 2)])
def test_save_precision(tmp_path, precision, size):
    path = tmp_path / "mychar.safetensors"
    write_embedding(path, some_rows(), RECORD, dtype=SAVE_DTYPES[precision])
    assert load_file(path)["emb_params"].dtype.itemsize == size


def test_the_torch_file_holds_the_web_ui_s_fields(tmp_path):
    rows = some_rows()
    write_embedding(tmp_path / "n.pt", rows, RECORD)
    content = torch.load(tmp_path / "n.pt", weights_only=True)
    assert torch.equal(content.pop("string_to_param")["*"], rows["emb_params"])
    assert torch.equal(content.pop("emb_params"), rows["emb_params"])
    assert content == {
        "string_to_token": {"*": 265}, "name": "mychar", "step": 1600, "sd_checkpoint": "ab12cd34ef",
        "sd_checkpoint_name": "sd15",
    }  # fmt: skip
    assert (tmp_path / "n.pt").stat().st_size < 1.2 * rows["emb_params"].nbytes


def test_the_hash_is_that_of_the_tensor_bytes(tmp_path):
    path = tmp_path / "mychar.safetensors"
    write_embedding(path, some_rows(PAIR), RECORD, metadata={"modelspec.title": "t"})
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    digest = hashlib.sha256(content[8 + length :]).hexdigest()
    assert header_metadata(path)["modelspec.hash_sha256"] == f"0x{digest}"
    assert len(content) - 8 - length == 3 * (768 + 1280) * 4


def test_metadata_names_the_file_it_is_in(tmp_path):
    path = tmp_path / "n-step00000100.safetensors"
    write_embedding(path, some_rows(), RECORD, metadata={"modelspec.title": "t"})
    metadata = header_metadata(path)
    assert metadata["modelspec.trigger_phrase"] == "n-step00000100"
    assert metadata["ti.token"] == "mychar"
    assert metadata["ti.base_model"] == "sd15"
    assert all(isinstance(value, str) for value in metadata.values())


def test_without_metadata_there_is_none(tmp_path):
    write_embedding(tmp_path / "n.safetensors", some_rows(), RECORD)
    assert header_metadata(tmp_path / "n.safetensors") is None


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_do_not_replace_a_good_file(tmp_path, suffix, bad):
    path = tmp_path / f"n{suffix}"
    write_embedding(path, some_rows(), RECORD)
    before = path.read_bytes()
    broken = some_rows()
    broken["emb_params"][1, 5] = bad
    with pytest.raises(UserError, match="NaN or infinite"):
        write_embedding(path, broken, RECORD)
    assert path.read_bytes() == before


# ---- each client's loading rules, written down anew from its documentation and behaviour ----

WEB_UI_CLASSES = {
    "collections": {"OrderedDict"},
    "torch._utils": {"_rebuild_tensor_v2", "_rebuild_parameter"},
    "torch": {"FloatStorage", "HalfStorage", "BFloat16Storage", "LongStorage", "IntStorage", "DoubleStorage"},
    "torch.nn.modules.container": {"ParameterDict"},
}
WEB_UI_ZIP_MEMBER = re.compile(r"[^/]+/(data/\d+|version|byteorder|\.data/serialization_id|data\.pkl)")


class WebUiUnpickler(pickle.Unpickler):
    """Knows only the classes that AUTOMATIC1111 lets through, and gives every tensor an empty storage."""

    def persistent_load(self, saved_id):
        assert saved_id[0] == "storage"
        return torch.storage.TypedStorage(_internal=True)

    def find_class(self, module, name):
        if name not in WEB_UI_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is forbidden")
        return super().find_class(module, name)


def web_ui_accepts_pickle(path: Path) -> bool:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return all(WEB_UI_ZIP_MEMBER.fullmatch(name) for name in archive.namelist())
    with path.open("rb") as file:
        unpickler = WebUiUnpickler(file)
        for _ in range(5):
            unpickler.load()
    return True


def web_ui_loads(path: Path) -> tuple[dict[str, torch.Tensor], int, int]:
    """AUTOMATIC1111 and Forge: the vectors, their joint width and their number."""
    if path.suffix == ".safetensors":
        content = load_file(path)
    else:
        assert web_ui_accepts_pickle(path)
        content = torch.load(path, weights_only=True)
    if "string_to_param" in content:
        (rows,) = content["string_to_param"].values()
        return {"": rows.detach().float()}, rows.shape[-1], rows.shape[0]
    if type(content) is dict and "clip_g" in content and "clip_l" in content:
        vectors = {name: rows.detach().float() for name, rows in content.items()}
        return vectors, content["clip_g"].shape[-1] + content["clip_l"].shape[-1], content["clip_g"].shape[0]
    ((_, rows),) = content.items()
    assert type(rows) is torch.Tensor
    return {"": rows.float()}, rows.shape[-1], rows.shape[0]


def comfy_ui_loads(path: Path, encoder: str, width: int) -> torch.Tensor | None:
    """ComfyUI: the rows for one encoder; None where it would warn of a shape mismatch."""
    content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    if "string_to_param" in content:
        rows = next(iter(content["string_to_param"].values()))
    else:
        rows = content[encoder] if encoder in content else next(iter(content.values()))
    return rows if rows.shape[-1] == width else None


def invoke_ai_loads(path: Path) -> tuple[str, torch.Tensor, torch.Tensor | None]:
    """InvokeAI: the base that it files the embedding under, and the rows of its one or two encoders."""
    content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    bases = {768: "sd-1", 1024: "sd-2", 1280: "sdxl"}
    if "string_to_param" in content:
        rows = next(iter(content["string_to_param"].values()))
        return bases[rows.shape[-1]], rows, None
    if "emb_params" in content:
        return bases[content["emb_params"].shape[-1]], content["emb_params"], None
    return bases[content["clip_g"].shape[-1]], content["clip_g"], content["clip_l"]


def diffusers_finds(content, token: str | None) -> tuple[str, torch.Tensor]:
    """diffusers: the token and the rows that ``load_textual_inversion`` makes of what it is given."""
    if isinstance(content, torch.Tensor):
        assert token is not None
        return token, content
    if len(content) == 1:
        ((own, rows),) = content.items()
        return token or own, rows
    return token or content["name"], content["string_to_param"]["*"]


def sd_next_loads(path: Path, widths: tuple[int, ...]) -> list[torch.Tensor]:
    """SD.Next: the tensors in the order of the encoders that their width belongs to; as many as the model has."""
    if path.suffix == ".safetensors":
        tensors = list(load_file(path).values())
    else:
        assert path.suffix == ".pt"
        tensors = [torch.load(path, weights_only=True)["string_to_param"]["*"]]
    found = [rows for width in widths for rows in tensors if rows.shape[-1] == width]
    assert len(found) == len(widths) == len(tensors)
    return found


def swarm_ui_reads(path: Path) -> tuple[str, dict[str, str]]:
    """SwarmUI: the class of the embedding from shapes in the header, and the ModelSpec values that it shows."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    shown = header.pop("__metadata__", {})
    width = {name: entry["shape"][-1] for name, entry in header.items()}
    if "emb_params" in width:
        kind = {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2-768-v"}[width["emb_params"]]
    else:
        assert (width["clip_g"], width["clip_l"]) == (1280, 768)
        kind = "stable-diffusion-xl-v1-base"
    sides = [int(side) for side in shown["modelspec.resolution"].split("x")]
    assert len(sides) == 2
    assert shown.get("modelspec.thumbnail", "data:image/").startswith("data:image/")
    assert shown.get("modelspec.is_negative_embedding", "true") in ("true", "false")
    return f"{kind}/textual-inversion", shown


@pytest.fixture(params=[768, 1024], ids=["SD 1", "SD 2"])
def single(request, tmp_path):
    """The rows of one encoder, and a function that writes them to a file of a given suffix."""
    rows = some_rows(width=request.param)
    return rows["emb_params"], lambda suffix, **options: _written(tmp_path, suffix, rows, options)


@pytest.fixture
def pair(tmp_path):
    """The rows of two encoders, and a function that writes them to a file of a given suffix."""
    rows = some_rows(PAIR)
    return rows, lambda suffix, **options: _written(tmp_path, suffix, rows, options)


def _written(folder, suffix, rows, options):
    write_embedding(folder / f"mychar{suffix}", rows, RECORD, **options)
    return folder / f"mychar{suffix}"


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_web_ui_loads_one_encoder(single, suffix, dtype):
    rows, write = single
    vectors, width, count = web_ui_loads(write(suffix, dtype=dtype))
    assert torch.equal(vectors[""], rows.to(dtype or rows.dtype).float())
    assert (width, count) == (rows.shape[1], 3)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_web_ui_loads_two_encoders(pair, suffix, dtype):
    rows, write = pair
    vectors, width, count = web_ui_loads(write(suffix, dtype=dtype))
    assert same(vectors, {key: value.to(dtype or value.dtype).float() for key, value in rows.items()})
    assert (width, count) == (2048, 3)


def test_web_ui_would_refuse_torch_s_newer_format(tmp_path):
    torch.save({"emb_params": torch.ones(1, 768)}, tmp_path / "zip.pt")
    assert not web_ui_accepts_pickle(tmp_path / "zip.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_comfy_ui_loads(single, pair, suffix):
    rows, write = single
    encoder = {768: "clip_l", 1024: "clip_h"}[rows.shape[1]]
    assert torch.equal(comfy_ui_loads(write(suffix), encoder, rows.shape[1]), rows)
    rows, write = pair
    for encoder, width in (("clip_l", 768), ("clip_g", 1280)):
        assert torch.equal(comfy_ui_loads(write(suffix), encoder, width), rows[encoder])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_invoke_ai_loads(single, pair, suffix):
    rows, write = single
    base, first, second = invoke_ai_loads(write(suffix))
    assert (base, second) == ({768: "sd-1", 1024: "sd-2"}[rows.shape[1]], None)
    assert torch.equal(first, rows)
    rows, write = pair
    base, first, second = invoke_ai_loads(write(suffix))
    assert base == "sdxl"
    assert same({"clip_g": first, "clip_l": second}, rows)


def test_diffusers_loads(single, pair):
    rows, write = single
    token, found = diffusers_finds(load_file(write(".safetensors")), "mychar")
    assert token == "mychar"
    assert torch.equal(found, rows)
    token, found = diffusers_finds(torch.load(write(".pt"), weights_only=True), None)
    assert token == "mychar"
    assert torch.equal(found, rows)
    rows, write = pair
    content = load_file(write(".safetensors"))
    assert [diffusers_finds(content[key], "mychar")[1].shape[1] for key in PAIR] == [768, 1280]


def test_sd_next_loads(single, pair):
    rows, write = single
    for suffix in (".safetensors", ".pt"):
        assert torch.equal(sd_next_loads(write(suffix), (rows.shape[1],))[0], rows)
    rows, write = pair
    assert same(dict(zip(PAIR, sd_next_loads(write(".safetensors"), (768, 1280)), strict=True)), rows)


def test_swarm_ui_reads(single, pair):
    for (_, write), architecture in ((single, None), (pair, "stable-diffusion-xl-v1-base")):
        if architecture is None:
            architecture = {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2-768-v"}[single[0].shape[1]]
        metadata = modelspec_metadata(
            MetadataOptions(metadata_is_negative_embedding="True"), TrainedFor(architecture), "mychar"
        )
        kind, shown = swarm_ui_reads(write(".safetensors", metadata=metadata))
        assert kind == shown["modelspec.architecture"]
        assert shown["modelspec.trigger_phrase"] == "mychar"
        assert shown["modelspec.is_negative_embedding"] == "true"


# ---- what is read ----

ROWS = some_rows()["emb_params"]
PARAMETERS = torch.nn.ParameterDict({"*": torch.nn.Parameter(ROWS.clone())})
LAYOUTS = {
    "sd-scripts": {"emb_params": ROWS},
    "OneTrainer": {"emp_params": ROWS, "emp_params_out": torch.zeros(3, 768)},
    "web UI": {"string_to_token": {"*": 265}, "string_to_param": {"*": ROWS}, "name": "x", "step": 3},
    "original": {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": PARAMETERS},
    "web UI, other name": {"string_to_param": {"cat": ROWS}},
    "diffusers": {"<mychar>": ROWS},
    "with other entries": {"mychar": ROWS, "step": 3},
    "parameter": {"emb_params": torch.nn.Parameter(ROWS.clone())},
    "ordered": collections.OrderedDict(emb_params=ROWS),
    "half": {"emb_params": ROWS.half()},
}


# torch's old format stores a module's source beside it, which no safe reader takes: modules come in zips only.
@pytest.mark.parametrize(
    ("layout", "zipped"), [(name, True) for name in LAYOUTS] + [(name, False) for name in LAYOUTS if name != "original"]
)
def test_pickled_layouts(tmp_path, layout, zipped):
    path = tmp_path / "x.pt"
    torch.save(LAYOUTS[layout], path, _use_new_zipfile_serialization=zipped)
    (rows,) = rows_from_file(path, SINGLE, (768,), 3)
    assert type(rows) is torch.Tensor
    assert rows.dtype == torch.float32
    assert torch.equal(rows, ROWS.half().float() if layout == "half" else ROWS)


def test_reading_lets_no_class_through_afterwards(tmp_path):
    torch.save(LAYOUTS["original"], tmp_path / "x.pt")
    rows_from_file(tmp_path / "x.pt", SINGLE, (768,), 3)
    assert torch.nn.ParameterDict not in torch.serialization.get_safe_globals()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.pt", weights_only=True)


@pytest.mark.parametrize(
    "content",
    [
        {"emb_params": ROWS},
        {"emp_params": ROWS, "emp_params_out": torch.zeros(3, 768)},
        {"anything": ROWS},
        {"clip_l": ROWS},
        {"bundle_emb.my.char.string_to_param.*": ROWS, "lora_unet_down.alpha": torch.ones(1)},
        {"bundle_emb.mychar.emb_params": ROWS, "lora_te_x": torch.ones(2, 2)},
    ],
    ids=lambda content: next(iter(content)),
)
def test_safetensors_layouts_for_one_encoder(tmp_path, content):
    save_file(content, tmp_path / "x.safetensors")
    assert torch.equal(rows_from_file(tmp_path / "x.safetensors", SINGLE, (768,), 3)[0], ROWS)


@pytest.mark.parametrize("prefix", ["", "bundle_emb.mychar."])
def test_safetensors_layouts_for_two_encoders(tmp_path, prefix):
    rows = some_rows(PAIR)
    others = {f"{prefix}clip_l_out": torch.zeros(3, 768), "lora_te1_x": torch.ones(2, 2)}
    save_file({**{f"{prefix}{key}": value for key, value in rows.items()}, **others}, tmp_path / "x.safetensors")
    assert same(dict(zip(PAIR, rows_from_file(tmp_path / "x.safetensors", PAIR, (768, 1280), 3), strict=True)), rows)


def test_a_single_vector_becomes_one_row(tmp_path):
    vector = torch.randn(768)
    torch.save({"<cat>": vector}, tmp_path / "x.bin")
    assert torch.equal(rows_from_file(tmp_path / "x.bin", SINGLE, (768,), 1)[0], vector[None])


@pytest.mark.parametrize("present", PAIR)
def test_one_of_two_encoders_leaves_the_other_open(tmp_path, present):
    rows = some_rows(PAIR)
    save_file({present: rows[present]}, tmp_path / "x.safetensors")
    found = dict(zip(PAIR, rows_from_file(tmp_path / "x.safetensors", PAIR, (768, 1280), 3), strict=True))
    assert torch.equal(found.pop(present), rows[present])
    assert list(found.values()) == [None]


@pytest.mark.parametrize(
    ("content", "keys", "widths", "message"),
    [
        ({"emb_params": torch.ones(3, 1024)}, SINGLE, (768,),
         r"belongs to Stable Diffusion 2\.x.*1024.*this model is Stable Diffusion 1\.x.*768"),
        ({"emb_params": torch.ones(3, 768)}, SINGLE, (1024,), r"belongs to Stable Diffusion 1\.x"),
        ({"emb_params": torch.ones(3, 1280)}, SINGLE, (768,), r"belongs to Stable Diffusion XL"),
        ({"emb_params": torch.ones(3, 100)}, SINGLE, (768,), r"belongs to an unknown base \(vectors of width 100\)"),
        (some_rows(PAIR), SINGLE, (768,), r"belongs to Stable Diffusion XL \(clip_l 768, clip_g 1280\)"),
        ({"clip_g": torch.ones(3, 1280)}, SINGLE, (768,), r"belongs to Stable Diffusion XL"),
        ({"emb_params": torch.ones(3, 768)}, PAIR, (768, 1280),
         r"belongs to Stable Diffusion 1\.x .*this model is Stable Diffusion XL"),
        ({"clip_l": torch.ones(3, 768), "clip_g": torch.ones(3, 768)}, PAIR, (768, 1280), r"clip_g 768"),
    ],
)  # fmt: skip
def test_a_file_of_another_base_is_named(tmp_path, content, keys, widths, message):
    save_file(content, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message):
        rows_from_file(tmp_path / "x.safetensors", keys, widths, 3)


@pytest.mark.parametrize("keys", [SINGLE, PAIR])
def test_another_number_of_vectors_names_both(tmp_path, keys):
    write_embedding(tmp_path / "x.pt", some_rows(keys), RECORD)
    with pytest.raises(UserError, match=r"holds 3 vectors?.*--num_vectors_per_token is 4.*--num_vectors_per_token=3"):
        rows_from_file(tmp_path / "x.pt", keys, WIDTHS[keys], 4)


class NotATensor:
    """A class that no embedding file has a reason to hold."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": "text"}, "holds no tensors"),
        ({}, "holds no tensors"),
        ([ROWS], "holds no named tensors"),
        (ROWS, "holds no named tensors"),
        ({"a": ROWS, "b": ROWS}, r"not an embedding but a file of 2 tensors \(a, b\)"),
        ({f"layer.{i}": ROWS for i in range(9)}, r"9 tensors \(layer.0, layer.1, layer.2, layer.3, layer.4, …\)"),
        ({"string_to_param": {"a": ROWS, "b": ROWS}}, "several embeddings"),
        ({"string_to_param": "text"}, "holds no tensors"),
        ({"emp_params_out": ROWS}, "only OneTrainer's output embedding"),
        ({"clip_l_out": ROWS}, "only OneTrainer's output embedding"),
        ({"clip_l_out": ROWS, "clip_g_out": ROWS}, r"output embedding \(clip_g_out, clip_l_out\)"),
        ({"emb_params": torch.ones(2, 3, 4)}, r"float32 \[2, 3, 4\]"),
        ({"emb_params": torch.ones(2, 3, dtype=torch.int64)}, "int64"),
        ({"emb_params": torch.ones(0, 768)}, r"\[0, 768\]"),
        ({"emb_params": torch.tensor(1.0)}, "not an embedding"),
        ({"emb_params": torch.full((3, 768), float("nan"))}, "NaN or infinite"),
        ({"emb_params": torch.full((3, 768), 1e300, dtype=torch.float64)}, "NaN or infinite"),
        ({"emb_params": ROWS, "extra": NotATensor()}, "could run code"),
        (NotATensor(), "could run code"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_files_that_are_no_embedding(tmp_path, content, message, zipped):
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=message) as caught:
        rows_from_file(tmp_path / "x.pt", SINGLE, (768,), 3)
    assert "x.pt" in str(caught.value)


def test_several_bundled_embeddings_are_too_many(tmp_path):
    content = {f"bundle_emb.{word}.clip_l": torch.ones(1, 768) for word in ("cat", "dog")}
    save_file(content, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"several embeddings \(cat, dog\)"):
        read_embedding(tmp_path / "x.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
@pytest.mark.parametrize("content", [b"", b"not a model", b"\x80\x02", b"PK\x03\x04 broken", bytes(4096)])
def test_garbage_is_named_as_such(tmp_path, suffix, content):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged|cut off|cannot be read as a file of weights"):
        read_embedding(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_pickled_file(tmp_path, share, zipped):
    path = tmp_path / "x.pt"
    torch.save({"emb_params": ROWS}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError, match=r"damaged|cut off"):
        read_embedding(path)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.99])
def test_a_truncated_safetensors_file(tmp_path, share):
    path = tmp_path / "x.safetensors"
    write_embedding(path, some_rows(), RECORD, metadata={})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError, match=r"damaged|cut off"):
        read_embedding(path)


def test_a_path_that_is_not_there_or_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"none\.pt does not exist"):
        read_embedding(tmp_path / "none.pt")
    with pytest.raises(UserError, match="is not a file"):
        read_embedding(tmp_path)
