"""The frozen Vision Transformer: built from timm, loaded strictly, run at any image size.

Legend: B images, H W image size in pixels, p patch side, h w patch grid = ceil(H/p) x ceil(W/p), P prefix
tokens (class, distillation, registers), N = h w patches of one image, D channels. Weights are read by
``ppap.nets.weights``, which lists the accepted forms; the two streams on top are in ``ppap.nets.model``.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ppap.data.transforms import MEAN, STD
from ppap.errors import UsageError
from ppap.nets.architecture import DETAILS, SIZES, infer_spec, timm_arguments
from ppap.nets.timm_vit import architecture, create_vit, load_strictly
from ppap.nets.weights import RANDOM_ORIGIN, download, open_source
from ppap.settings.config import ModelConfig


class Backbone(nn.Module):
    """A frozen ViT: no parameter takes a gradient, and it stays in evaluation mode whatever is asked.

    Parameters are fp32. Images of any size are taken: rows and columns of zeros are added at the right and at
    the bottom up to a multiple of the patch. Images are normalised, so that zero is the mean colour of the
    training images, and the last row and column of patches are never lost. Drop the added pixels when going
    back to pixels (``ppap.nets.probes.upsample``). Images come with ImageNet's mean and deviation; a network
    that was trained with others changes them itself.

    Attributes:
        resize: fits the position embedding to a grid, :func:`resize_position`; ``ppap.exports`` puts a
            form in its place that a graph can hold.
    """

    def __init__(
        self,
        vit: VisionTransformer | Eva,
        name: str,
        pos_interp: Literal["dino", "timm"],
        origin: str,
        details: dict[str, Any] | None = None,
    ) -> None:
        """Freeze ``vit``; :func:`build_backbone` is the usual way here.

        Args:
            vit: the network, without classifier; its final norm stands in ``vit.norm``.
            name: timm architecture, for :attr:`spec`.
            pos_interp: rule by which the position embedding is resized; see :func:`resize_position`.
            origin: one line saying where the weights came from.
            details: what :attr:`spec` says beside name, sizes and ``pos_interp``, see
                :data:`ppap.nets.architecture.DETAILS`; ``mean`` and ``std`` are obeyed here.
        """
        super().__init__()
        self.vit = vit.requires_grad_(False)
        self.name = name
        self.pos_interp = pos_interp
        self.origin = origin
        self.details = dict(details or {})
        self.resize = resize_position
        self._rotary: tuple[Any, Tensor] | None = None  # of the last grid and device
        if "mean" in self.details:
            # (x STD + MEAN - mean) / std of images that are normalised with MEAN and STD.
            there = [torch.tensor(self.details[key]).view(3, 1, 1) for key in ("mean", "std")]
            here = [torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD)]
            self.register_buffer("pixel_scale", here[1] / there[1], persistent=False)
            self.register_buffer("pixel_shift", (here[0] - there[0]) / there[1], persistent=False)
        super().train(False)

    @property
    def patch_size(self) -> int:
        """Patch side [pixels]."""
        return self.vit.patch_embed.patch_size[0]

    @property
    def width(self) -> int:
        """Channels D of a token."""
        return self.vit.embed_dim

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.vit.blocks)

    @property
    def num_prefix(self) -> int:
        """Tokens P that stand before the patches: class, distillation and register tokens."""
        return self.vit.num_prefix_tokens

    @property
    def norm(self) -> nn.Module:
        """The final norm n, frozen; both streams pass through it."""
        return self.vit.norm

    @property
    def is_random(self) -> bool:
        """Whether the weights were never trained."""
        return RANDOM_ORIGIN in self.origin

    @property
    def spec(self) -> dict[str, Any]:
        """All that :func:`backbone_from_spec` needs to build this network again, without its weights."""
        return {
            "name": self.name,
            "patch_size": self.patch_size,
            "width": self.width,
            "depth": self.depth,
            # Some blocks keep it themselves, most in their attention.
            "heads": next(m.num_heads for m in self.vit.blocks.modules() if hasattr(m, "num_heads")),
            "image_size": self.vit.patch_embed.img_size[0],
            "pos_interp": self.pos_interp,
            **self.details,
        }

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in evaluation mode: a frozen network has no training mode."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised patch features n(t_L) of images (B, 3, H, W): (B, D, h, w), fp32."""
        _, last, grid = self.tokens(x)
        return self.patch_map(last, grid)

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Tokens before and after the last block, both without the final norm.

        Args:
            x: normalised images, float (B, 3, H, W), any H, W >= 1.

        Returns:
            t_before (B, P + N, D), t_last (B, P + N, D), and the grid (h, w) with N = h w patches in
            row-major order.
        """
        before, grid = self.tokens_before(x)
        return before, self.through(self.vit.blocks[-1], before, grid), grid

    def tokens_before(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """:meth:`tokens` without the last block: t_before (B, P + N, D) and the grid (h, w).

        Raises:
            ValueError: x is no batch of three-channel images.
        """
        if x.ndim != 4 or x.shape[1] != 3 or 0 in x.shape:
            raise ValueError(f"images must be (B, 3, H, W), not {tuple(x.shape)}")
        tokens, grid = self._embed(x)
        for block in self.vit.blocks[:-1]:
            tokens = self.through(block, tokens, grid)
        return tokens, grid

    def through(self, block: nn.Module, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """One block, which may be a trained copy, with the rotary positions of the grid where there are any.

        Args:
            block: of this network, or a copy.
            tokens: (B, P + N, D).
            grid: (h, w) with h w = N.

        Returns:
            (B, P + N, D).
        """
        if getattr(self.vit, "rope", None) is None:
            return block(tokens)
        key = (grid, tokens.device)
        if self._rotary is None or self._rotary[0] != key:
            # timm forms them on the CPU: once per size of images, whatever mode the caller is in.
            with torch.inference_mode(False), torch.no_grad():
                self._rotary = key, self.vit.rope.get_embed(shape=list(grid)).to(tokens.device)
        return block(tokens, rope=self._rotary[1])

    def patch_map(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Final norm of the patch tokens, as a map.

        Args:
            tokens: (B, P + N, D) in any float type.
            grid: (h, w) with h w = N.

        Returns:
            (B, D, h, w), fp32 also under autocast; a view of (B, N, D) memory, so rows per patch cost no
            copy. Gradients pass through to ``tokens``; the norm itself takes none.
        """
        # Tokens may be in half precision, and timm's fast norm would follow autocast.
        with torch.autocast(tokens.device.type, enabled=False):
            rows = self.norm(tokens[:, self.num_prefix :].float())
        return rows.transpose(1, 2).unflatten(2, grid)

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Patch, prefix and position embedding: (B, P + N, D) and the grid (h, w)."""
        vit, patch = self.vit, self.patch_size
        if "mean" in self.details:
            x = x * self.pixel_scale + self.pixel_shift
        x = F.pad(x, (0, -x.shape[3] % patch, 0, -x.shape[2] % patch))
        x = vit.patch_embed.proj(x)
        grid = (x.shape[2], x.shape[3])
        x = vit.patch_embed.norm(x.flatten(2).transpose(1, 2))
        prefix = [getattr(vit, name, None) for name in ("cls_token", "dist_token", "reg_token")]
        prefix = [token.expand(x.shape[0], -1, -1) for token in prefix if token is not None]
        position = self.position(grid)
        if vit.no_embed_class:
            x = torch.cat([*prefix, x + position], dim=1)
        else:
            x = torch.cat([*prefix, x], dim=1) + position
        return vit.norm_pre(x), grid

    def position(self, grid: tuple[int, int]) -> Tensor | float:
        """What is added on a grid (h, w): (1, P + N, D), or (1, N, D); 0 where there is nothing."""
        if self.vit.pos_embed is None:
            return 0.0
        num_prefix = 0 if self.vit.no_embed_class else self.num_prefix
        stored = tuple(self.vit.patch_embed.grid_size)
        return self.resize(self.vit.pos_embed, stored, grid, num_prefix=num_prefix, rule=self.pos_interp)


def resize_position(
    position: Tensor,
    stored: tuple[int, int],
    grid: tuple[int, int],
    *,
    num_prefix: int,
    rule: Literal["dino", "timm"],
) -> Tensor:
    """Position embedding for another patch grid.

    Both rules are bicubic and leave the prefix tokens and a stored square grid of the same size as they are.
    ``timm`` resizes to the exact size with antialiasing. ``dino`` repeats the rule that the DINO checkpoints
    were published and evaluated with: no antialiasing, and sampling positions spaced by stored / (size + 0.1)
    instead of stored / size.

    Args:
        position: (1, P + N, D), fp32.
        stored: patch grid (rows, columns) of ``position``.
        grid: wanted patch grid (h, w).
        num_prefix: tokens P in front that belong to no patch.
        rule: dino or timm.

    Returns:
        (1, P + h w, D), fp32.
    """
    if rule == "timm":
        return resample_abs_pos_embed(
            position, new_size=list(grid), old_size=list(stored), num_prefix_tokens=num_prefix
        )
    if grid == stored and grid[0] == grid[1]:
        return position
    prefix, patches = position[:, :num_prefix], position[:, num_prefix:]
    patches = patches.transpose(1, 2).unflatten(2, stored)
    # Given as scale factors, and not recomputed from the sizes, the 0.1 reaches the sampling positions; the
    # size itself is floor(stored * scale), which 0.1 keeps from losing a row to rounding.
    scale = [(wanted + 0.1) / have for wanted, have in zip(grid, stored, strict=True)]
    patches = F.interpolate(
        patches, scale_factor=scale, mode="bicubic", align_corners=False, recompute_scale_factor=False
    )
    assert tuple(patches.shape[2:]) == tuple(grid), (patches.shape, grid)
    return torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1)


def build_backbone(config: ModelConfig) -> Backbone:
    """The frozen backbone that ``config`` names, with its weights.

    Args:
        config: ``weights`` is the word random or one of the forms that ``ppap.nets.weights`` lists.
            ``backbone`` auto takes the architecture from the timm name, from the directory's config.json, or
            from the shapes of the tensors (heads = width / 64 unless given). Sizes that are not None are
            set; where the source states another value, that is an error. ``pos_interp`` is always taken
            from here.

    Returns:
        In evaluation mode, on the CPU, fp32. Random weights follow torch's global generator
        (``torch.manual_seed``) and nothing else; building a network to load weights into draws from it too.

    Raises:
        UsageError: unknown or unsuitable architecture, impossible or contradicting sizes, a weights key that
            names no backbone.
        DataError: weights that are missing, damaged, refused, not downloadable, or of another architecture.
        NumberError: weights that are not finite.
    """
    asked = {key: getattr(config, key) for key in SIZES}
    if config.weights == "random":
        if config.weights_key is not None:
            raise UsageError(f"--model.weights-key {config.weights_key!r}: random weights have no sections")
        if config.backbone == "auto":
            raise UsageError(
                "--model.weights random names no architecture; give --model.backbone, "
                "such as vit_small_patch16_224"
            )
        vit = create_vit(config.backbone, asked, initialise=True)
        return Backbone(vit, architecture(config.backbone), config.pos_interp, RANDOM_ORIGIN)
    source = open_source(config.weights, config.weights_key)
    spec = source.spec
    if "name" not in spec and config.backbone == "auto":
        spec = {**infer_spec(source.tensors, config.heads, config.weights), **spec}
    name, sizes = _agree(spec, config)
    details = {key: spec[key] for key in DETAILS if key in spec}
    try:
        vit = create_vit(name, {**sizes, **details}, initialise=False)
    except UsageError as error:
        if config.backbone != "auto":
            raise
        text = str(error).removeprefix("--model.backbone").lstrip(": ")
        raise UsageError(f"--model.weights {config.weights}: {text}") from None
    origin = source.origin
    tensors = source.tensors
    if tensors is None:
        tensors = download(name, timm_arguments(name, sizes))
        changed = [f"{key} {value}" for key, value in sizes.items() if value is not None]
        origin = f"{origin}, with {', '.join(changed)}" if changed else origin
    load_strictly(vit, tensors, config.weights, architecture(name))
    return Backbone(vit, architecture(name), config.pos_interp, origin, details)


def backbone_from_spec(spec: dict[str, Any], origin: str) -> Backbone:
    """A backbone built from :attr:`Backbone.spec`, for a caller who loads its weights next.

    Its parameters are undefined until then.

    Args:
        spec: name, patch_size, width, depth, heads, image_size (sizes may be missing: the architecture's
            own), pos_interp (default dino) and details.
        origin: where the weights that will be loaded came from.

    Raises:
        UsageError: unknown or unsuitable architecture, impossible sizes.
    """
    vit = create_vit(spec["name"], spec, initialise=False)
    details = {key: spec[key] for key in DETAILS if key in spec}
    return Backbone(vit, architecture(spec["name"]), spec.get("pos_interp", "dino"), origin, details)


def _agree(found: dict[str, Any], config: ModelConfig) -> tuple[str, dict[str, int | None]]:
    """Name and sizes from what the weights say of themselves and what ``config`` asks for."""
    remedy = "leave it out, or give other weights"
    name = found.get("name", config.backbone)
    if config.backbone != "auto" and architecture(config.backbone) != architecture(name):
        raise UsageError(
            f"--model.backbone {config.backbone}: {config.weights} is of {architecture(name)}; {remedy}"
        )
    sizes = {}
    for key in SIZES:
        asked, here = getattr(config, key), found.get(key)
        if None not in (asked, here) and asked != here:
            raise UsageError(
                f"--model.{key.replace('_', '-')} {asked}: {config.weights} has {here}; {remedy}"
            )
        sizes[key] = here if asked is None else asked
    return name, sizes
