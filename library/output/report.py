"""What a run tells its user at the end: how far the rows moved, and what to write in which client.

Tensors in, text out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent

import torch
from torch import Tensor

from library.embedding.clients import diffusers_token, invokeai_name, usages

# Below this share of its start norm a row still means what it meant at the start.
BARELY_MOVED_PERCENT = 1.0
PROMPT_TOKENS = 75
# What trainings that work are run with (AdamW, and the like).
USUAL_RATES, USUAL_STEPS = (3e-4, 5e-3), (500, 2000)

_NOT_IN_FILE_NAMES = frozenset('<>:"/\\|?*')

_DIFFUSERS_ONE_ENCODER = "pipe.load_textual_inversion({path!r}, token={token!r})\n"
# With eos_token_id 2, as in many CLIP configs, transformers pools at the highest id: the new token. 49407 is the EOS.
_DIFFUSERS_TWO_ENCODERS = """\
{imports}
state = {load}
encoder_2 = pipe.text_encoder_2
for part in (encoder_2.config, encoder_2, getattr(encoder_2, "text_model", None)):
    if hasattr(part, "eos_token_id"):
        part.eos_token_id = 49407  # pool at the end of the text, not at the new token
pipe.load_textual_inversion(state["clip_l"], token={token!r}, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
pipe.load_textual_inversion(state["clip_g"], token={token!r}, text_encoder=encoder_2, tokenizer=pipe.tokenizer_2)
"""


@dataclass(frozen=True)
class Movement:
    """How far one row is from its start: L2 distance in % of the start's norm, cosine to the start, both norms."""

    name: str
    percent: float
    cosine: float
    start_norm: float
    norm: float


def movements(names: Sequence[str], start: Tensor, rows: Tensor) -> list[Movement]:
    """Compare rows [N, width] with what they were at the start of the run [N, width], one :class:`Movement` each."""
    start, rows = (tensor.detach().to("cpu", torch.float64) for tensor in (start, rows))
    distances, start_norms, norms = (rows - start).norm(dim=1), start.norm(dim=1), rows.norm(dim=1)
    cosines = torch.nn.functional.cosine_similarity(start, rows, dim=1)
    columns = zip(names, 100 * distances / start_norms, cosines, start_norms, norms, strict=True)
    return [Movement(name, *(float(value) for value in values)) for name, *values in columns]


def movement_table(moved: Sequence[Movement]) -> str:
    """The movements as a table, one line for each row."""
    width = max(len("vector"), *(len(row.name) for row in moved))
    lines = [f"{'vector':<{width}}  moved (% of start)  cosine to start  norm at start  norm now"]
    lines += [
        f"{row.name:<{width}}  {row.percent:>18.2f}  {row.cosine:>15.4f}  {row.start_norm:>13.4f}  {row.norm:>8.4f}"
        for row in moved
    ]
    return "\n".join(lines)


def movement_warning(moved: Sequence[Movement], learning_rate: float | None, steps: int) -> str | None:
    """A warning with the likely reasons when rows have hardly moved; None when all have.

    ``learning_rate`` is the highest of the run, or None where the optimizer finds its own.
    """
    still = [row.name for row in moved if not row.percent >= BARELY_MOVED_PERCENT]
    if not still:
        return None
    if len(still) == len(moved):
        headline = f"THE EMBEDDING HAS HARDLY CHANGED: every vector moved less than {BARELY_MOVED_PERCENT:g} %."
    else:
        headline = f"SOME VECTORS HAVE HARDLY CHANGED (less than {BARELY_MOVED_PERCENT:g} %): {', '.join(still)}."
    reasons = []
    if learning_rate is not None and learning_rate < USUAL_RATES[0]:
        reasons.append(
            f"The learning rate is too low. At {learning_rate:g}, an Adam-like optimizer moves a coordinate by at most "
            f"about {learning_rate * steps:.2g} in {steps} steps; {USUAL_RATES[0]:g} to {USUAL_RATES[1]:g} are usual."
        )
    if steps < USUAL_STEPS[0]:
        reasons.append(f"There were only {steps} steps; {USUAL_STEPS[0]} to {USUAL_STEPS[1]} are usual.")
    reasons.append("The captions lack the token, or the length limit cuts it off; --debug_dataset shows what is read.")
    likely = [f"  - {reason}" for reason in reasons]
    return "\n".join([headline, "Images made with it will look like those of its start. Likely reasons:", *likely])


def usage_card(path: Path | str, token: str, keys: Sequence[str], num_vectors: int, base: str) -> str:
    """How to use the file in every client: where it goes, what to write, and the lines for diffusers.

    ``keys`` are the tensors in the file, ``base`` is the base model in words ("Stable Diffusion 1.x").
    """
    path = Path(path)
    rows = usages(path.stem, path.suffix, token, num_vectors, pair=len(keys) > 1)
    clients, columns = max(len(row.client) for row in rows), max(len(row.word or "-") for row in rows)
    plural = "s" if num_vectors > 1 else ""
    lines = [
        f"How to use {path} ({base}; {num_vectors} vector{plural}, {num_vectors} of a prompt's {PROMPT_TOKENS} tokens)",
        *(f"  {row.client:<{clients}}  {row.word or '-':<{columns}}  {row.how}" for row in rows),
        *usage_notes(path, token, keys, num_vectors),
        "In diffusers, with a pipeline `pipe` of the same base:",
        indent(diffusers_snippet(path, diffusers_token(token, num_vectors), keys), "    ").rstrip(),
    ]
    return "\n".join(lines)


def diffusers_snippet(path: Path | str, token: str, keys: Sequence[str]) -> str:
    """Python lines that give the embedding to a diffusers pipeline named ``pipe``."""
    path = Path(path)
    if len(keys) == 1:
        return _DIFFUSERS_ONE_ENCODER.format(path=str(path), token=token)
    if path.suffix == ".safetensors":
        imports, load = "from safetensors.torch import load_file\n", f"load_file({str(path)!r})"
    else:
        imports, load = "import torch\n", f"torch.load({str(path)!r}, weights_only=True)"
    return _DIFFUSERS_TWO_ENCODERS.format(imports=imports, load=load, token=token)


def usage_notes(path: Path, token: str, keys: Sequence[str], num_vectors: int) -> list[str]:
    """What is worth knowing about this file and its name."""
    notes = []
    if path.stem.lower() != token.lower():
        note = (
            f"All but diffusers know the embedding by the name of its file: there the word is {path.stem}, not {token}."
        )
        if not set(token) & _NOT_IN_FILE_NAMES:
            note += f" To write {token} everywhere, rename the file to {token}{path.suffix}."
        notes.append(note)
    else:
        notes.append(
            "All but diffusers know the embedding by the name of its file: rename it, and the word changes too."
        )
    if invokeai_name(path.stem) != path.stem:
        notes.append(
            "InvokeAI reads only the letters a-z, digits and . , _ - in a name: give the model the name "
            f"{invokeai_name(path.stem)} there."
        )
    if not path.stem[-1:].isalnum():
        notes.append(f"In AUTOMATIC1111 and Forge leave a space between {path.stem} and a comma.")
    if diffusers_token(token, num_vectors) != token:
        notes.append(f"In diffusers type {token.lower()} in lower case: with capitals, only the first vector is found.")
    if len(keys) > 1:
        notes.append(
            "InvokeAI may pool the prompt at the new token and not at its end, so that its images differ slightly."
        )
    notes.append(f"AUTOMATIC1111 and Forge show {path.stem}.preview.png beside the file as its preview.")
    return notes
