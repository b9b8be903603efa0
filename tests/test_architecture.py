"""The house itself: what may import what, how large a room may grow, and that nothing heavy loads for --help."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "library").glob("*.py"))

# Lower layers know nothing of higher ones; modules of one layer may use each other.
LAYERS = [
    "errors interruptions processes imports main_memory file_hash concept_distance device_report text_files transfers",
    "option_types placeholder text_repair buckets resizing data_options training_options output_options options",
    "atomic_files npz_files captions clients config_file console option_checks option_notices options_page arguments "
    "dataset_schema dataset_sources batch_order",
    "dataset_config images random_masks tokens diffusion named_classes optimizers lr_schedulers frozen_layers metadata "
    "metadata_files caption_files embedding_files report runtime trackers architectures weight_files latent_files "
    "device_settings launcher lookout stored_tensors safetensors_header torch_pickle torch_files "
    "batches prompt_weights samplers sample_prompts",
    "frozen_vae latents learning_watch model_identity single_file model_folder model_family base_model objective "
    "distillation checkpoints text_encoding new_word image_sets found_images image_table inpainting sample_scene",
    "hub preflight dataset sampling custom_dataset debug_dataset denoising",
    "learning_report learner training_state state_fields sample_album ss_metadata results",
    "rescue",
    "trainer training",
    "command_line",
]
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names.split()}


def imports_of(module: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "library":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("library."):
            found.add(node.module.removeprefix("library."))
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("library.") for a in node.names if a.name.startswith("library.")}
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.stem)
def test_layers(module):
    if module.stem == "__init__":
        assert imports_of(module) == set()
        return
    higher = {name for name in imports_of(module) if LAYER_OF[name] > LAYER_OF[module.stem]}
    assert higher == set()


def test_every_layer_names_a_module():
    assert set(LAYER_OF) == {module.stem for module in MODULES} - {"__init__"}


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.stem)
def test_size(module):
    source = module.read_text(encoding="utf-8")
    assert source.count("\n") <= 450
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, node.name


def words_in_code(module: Path) -> set[str]:
    """Names and strings of a module, docstrings and comments left out."""
    nodes = list(ast.walk(ast.parse(module.read_text(encoding="utf-8"))))
    free_standing = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    words = {node.id for node in nodes if isinstance(node, ast.Name)}
    words |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    words |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    strings = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return words | {node.value for node in strings if id(node) not in free_standing}


def test_the_word_sdxl_has_its_place():
    """The difference between the families is the business of few modules; all others loop over lists."""
    knowing = {m.stem for m in MODULES if any("sdxl" in word.lower() for word in words_in_code(m))}
    options = {m.stem for m in MODULES if m.stem.startswith(("option", "arguments")) or m.stem.endswith("_options")}
    models = {"architectures", "model_family", "model_identity", "base_model", "weight_files"}
    assert knowing - options - models <= {"dataset_config"}  # an error there names both bucket steps


def test_help_imports_nothing_heavy():
    for script in ("train_textual_inversion", "sdxl_train_textual_inversion"):
        code = (
            f"import sys, {script} as s\ntry: s.main(['--help'])\nexcept SystemExit as e: assert e.code == 0\n"
            "assert not {'torch', 'transformers', 'diffusers', 'numpy', 'PIL', 'ftfy'} & set(sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "--token_string" in done.stdout
