"""What each program makes of an embedding's file: the word to write there, what it cannot read, and why.

Measured with the programs' own loaders and prompt code.
"""

import re
from dataclasses import dataclass

_WHERE = {
    "AUTOMATIC1111, Forge": "put the file into embeddings/",
    "SD.Next": "put the file into models/embeddings/; mind upper and lower case",
    "ComfyUI": "put the file into models/embeddings/",
    "InvokeAI": "add the file in the model manager",
    "SwarmUI": "put the file into Models/Embeddings/",
    "diffusers": "load the file as shown below",
}
_NOT_FOR_INVOKEAI = re.compile(r"_*[^a-zA-Z0-9., _-]+_*")


@dataclass(frozen=True)
class Usage:
    """How one program takes a file; ``word`` is None where it cannot, and ``how`` then says why."""

    client: str
    word: str | None
    how: str


def usages(stem: str, suffix: str, token: str, num_vectors: int, *, pair: bool) -> list[Usage]:
    """How every program takes the file ``stem + suffix``; a ``pair`` of tensors is for a model with two encoders."""
    words = client_words(stem, token, num_vectors)
    if suffix == ".ckpt":
        words["ComfyUI"] = f"embedding:{_escaped(stem)}.ckpt"
    refusals = _refusals(stem, suffix, pair=pair)
    return [
        Usage(client, None if client in refusals else word, refusals.get(client, _WHERE[client]))
        for client, word in words.items()
    ]


def client_words(stem: str, token: str, num_vectors: int = 1) -> dict[str, str]:
    """What to write in a prompt, by program: most go by the file's stem, diffusers by the token that it is given."""
    return {
        "AUTOMATIC1111, Forge": _escaped(stem),
        "SD.Next": stem,
        "ComfyUI": f"embedding:{_escaped(stem)}",
        "InvokeAI": f"<{invokeai_name(stem)}>",
        "SwarmUI": f"<embed:{stem}>",
        "diffusers": diffusers_token(token, num_vectors),
    }


def diffusers_token(token: str, num_vectors: int) -> str:
    """The token to give to diffusers: its tokens for further vectors are found in lower case only."""
    return token.lower() if num_vectors > 1 else token


def invokeai_name(stem: str) -> str:
    """The file's stem as a name that InvokeAI finds in a prompt."""
    if not _NOT_FOR_INVOKEAI.search(stem):
        return stem
    return _NOT_FOR_INVOKEAI.sub("_", stem).strip("_ ") or "embedding"


def name_warnings(name: str) -> list[str]:
    """What makes an output name troublesome in some program, a sentence each, the last one proposing another name."""
    sentences = []
    if " " in name:
        sentences.append(f'ComfyUI and SwarmUI cannot use an embedding whose name has spaces ("{name}").')
    if "(" in name or ")" in name:
        sentences.append(
            f'AUTOMATIC1111, Forge and ComfyUI read round brackets as weights: "{name}" must be written '
            f"{_escaped(name)} in a prompt there."
        )
    if name and not name[-1].isalnum():
        sentences.append(
            f'CLIP reads the end of "{name}" and a comma behind it as one token: in AUTOMATIC1111 and Forge, leave a '
            "space before the comma."
        )
    if sentences:
        sentences.append(f"--output_name={_plain(name)} avoids this.")
    return sentences


def _plain(name: str) -> str:
    return re.sub(r"_*[^\w.-]+_*", "_", name).strip("_.-") or "embedding"


def _escaped(stem: str) -> str:
    return re.sub(r"[()]", r"\\\g<0>", stem)


def _refusals(stem: str, suffix: str, *, pair: bool) -> dict[str, str]:
    refusals = {}
    if suffix == ".ckpt":
        refusals = dict.fromkeys(("AUTOMATIC1111, Forge", "SD.Next"), "does not read .ckpt files: save as safetensors")
    elif suffix == ".pt" and pair:
        refusals = {"SD.Next": "does not read both encoders' vectors from .pt files: save as safetensors"}
    if " " in stem:
        refusals |= dict.fromkeys(("ComfyUI", "SwarmUI"), "does not find names with spaces: rename the file")
    return refusals
