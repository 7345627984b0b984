"""Which part of a file is the backbone: sections opened, prefixes of surrounding networks stripped.

Training checkpoints nest their state dicts (``{"teacher": {...}, "student": {...}}``) or tell networks apart
by prefixes (``teacher.backbone.``); both become one dotted label, and ``--model.weights-key`` names it.
"""

from typing import Any

from torch import Tensor

from ppap.errors import DataError, UsageError

# The patch kernel of timm and of the official files, and of transformers; each backbone has exactly one.
STEMS = (
    "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.weight",
)
_DEPTH = 3  # of nested sections; the state of optimisers goes deeper and holds no network


def find_backbone(content: Any, where: str, key: str | None) -> tuple[dict[str, Tensor], str]:
    """The tensors of one ViT, under the names they have inside it.

    Args:
        content: what a file held; a dict of tensors, or of sections.
        where: name of the file, for messages.
        key: dotted name of the wanted section or prefix, or a part of it (``teacher``); None = the only
            backbone there is, or, of several, the teacher.

    Returns:
        The tensors, and the label of where they stood if there was a choice, else an empty string.

    Raises:
        DataError: no ViT in there, or several and no ``key``.
        UsageError: ``key`` names none of them, or several.
    """
    if not isinstance(content, dict):
        raise DataError(f"{where} holds a {type(content).__name__}, not a state dict")
    found = _backbones(content, (), _DEPTH)
    if not found:
        names = ", ".join([str(name) for name in content][:4]) or "nothing"
        raise DataError(f"{where} holds 0 ViT backbones ({STEMS[0]}), wanted one; found {names}, ...")
    labels = ", ".join(label or "(no key)" for label in found)
    if key is not None:
        wanted = [label for label in found if f".{key}." in f".{label}."]
        if len(wanted) != 1:
            what = f"fits {len(wanted)} of its backbones" if wanted else "names no backbone of it"
            remedy = "give one of" if any(found) else "leave the option out; it has"
            raise UsageError(f"--model.weights-key {key!r}: {where}: {what}; {remedy}: {labels}")
        return found[wanted[0]], wanted[0]
    if len(found) == 1:
        return next(iter(found.values())), ""
    teachers = [label for label in found if "teacher" in label.split(".")]
    if len(teachers) != 1:
        raise DataError(
            f"{where} holds {len(found)} ViT backbones; say which with --model.weights-key, one of: {labels}"
        )
    return found[teachers[0]], teachers[0]


def _backbones(content: dict, path: tuple[str, ...], depth: int) -> dict[str, dict[str, Tensor]]:
    """Dotted label -> tensors, of every ViT in a dict and the dicts inside it."""
    tensors = {
        name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)
    }
    found = {}
    for name in tensors:
        for stem in STEMS:
            # What stands around the backbone (module., backbone., vit., ...) shows before its patch kernel.
            prefix = name.removesuffix(stem)
            if name.endswith(stem) and (not prefix or prefix.endswith(".")):
                inside = {
                    key.removeprefix(prefix): value
                    for key, value in tensors.items()
                    if key.startswith(prefix)
                }
                found[".".join([*path, *prefix.split(".")[:-1]])] = inside
    if depth:
        for name, value in content.items():
            if isinstance(name, str) and isinstance(value, dict):
                found |= _backbones(value, (*path, name), depth - 1)
    return found
