"""Masked autoencoder (He et al., CVPR 2022): hide most patches, encode the rest, reconstruct the hidden ones."""

from __future__ import annotations

from typing import Any, Self, TypeGuard

import torch
import torch.nn.functional as F
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from cluster.errors import UsageError
from training.configs import PretrainConfig
from training.encoder import sincos
from training.methods.method import Material, Method, Words


class MAE(Method):
    """Encoder on visible patches, light decoder on all, loss on normalised hidden patches.

    The encoder *is* a timm ViT: its keys and its forward pass on whole images are timm's own. Against the official
    code: only visible patches are embedded (the same numbers, a quarter of the work), only hidden ones are predicted.

    Args:
        encoder: a plain timm ViT without register tokens. Its positions stay fixed where they are sine-cosine.
        decoder_width, decoder_depth: of the decoder's blocks; heads are 32 wide.
        mask_ratio: share of patches hidden from the encoder, in (0, 1).
        norm_pix: reconstruct each patch normalised by its own mean and standard deviation (section 4 of the paper).

    Raises:
        UsageError: the encoder is not a plain ViT, or the mask leaves no visible or no hidden patch.
    """

    NAME = "mae"
    NEEDS_VIT = True
    OPTIONS = frozenset({"mask_ratio", "norm_pix", "decoder_width", "decoder_depth"})

    encoder: VisionTransformer

    def __init__(
        self, encoder: nn.Module, *, decoder_width: int, decoder_depth: int, mask_ratio: float, norm_pix: bool
    ) -> None:
        super().__init__()
        if not _plain(encoder) or encoder.pos_embed is None:
            raise UsageError(f"--method {self.NAME} needs a plain ViT: it feeds the encoder visible patches only")
        self.encoder = encoder
        self.patch = int(encoder.patch_embed.patch_size[0])
        self.grid = (int(encoder.patch_embed.grid_size[0]), int(encoder.patch_embed.grid_size[1]))
        self.channels = int(encoder.patch_embed.proj.weight.shape[1])
        self.patches = self.noise = self.grid[0] * self.grid[1]
        self.visible = int(self.patches * (1 - mask_ratio))
        if not 0 < self.visible < self.patches:
            raise UsageError(f"--mask-ratio {mask_ratio}: leaves {self.visible} of {self.patches} patches visible")
        self.norm_pix = norm_pix
        heads = max(1, decoder_width // 32)
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_blocks = nn.ModuleList(Block(decoder_width, heads, qkv_bias=True) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_width)
        self.decoder_head = nn.Linear(decoder_width, self.channels * self.patch**2)
        self.register_buffer("decoder_positions", sincos(list(self.grid), decoder_width)[None], persistent=False)
        encoder.pos_embed.requires_grad_(False)
        for unused in (encoder.head, encoder.fc_norm, encoder.attn_pool):
            if unused is not None:
                unused.requires_grad_(False)

    @classmethod
    def build(cls, material: Material) -> Self:
        return cls(material.encoder, **cls.options(material))

    @classmethod
    def options(cls, material: Material) -> dict[str, Any]:
        """Arguments of the constructor, as config and preset say."""
        config, preset = material.config, material.preset
        return {
            "decoder_width": config.decoder_width or preset.decoder_width,
            "decoder_depth": config.decoder_depth or preset.decoder_depth,
            "mask_ratio": config.mask_ratio,
            "norm_pix": config.norm_pix,
        }

    @staticmethod
    def words(config: PretrainConfig) -> Words:
        return Words(
            f"of each image it was shown {1 - config.mask_ratio:.0%}, in small squares chosen anew every time, and it "
            "had to fill in the rest (a masked autoencoder)",
            "The loss says how far the filled-in squares are from the true ones; lower is better",
            ", in units of each square's own variance, so that 1 is what evenly grey squares would reach"
            if config.norm_pix
            else "",
        )

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Reconstruction loss of each image.

        Args:
            images: normalised, [B, C, H, W].
            noise: [B, N]; the patches with the smallest values stay visible.

        Returns:
            Mean squared error over the hidden patches of each image, float32 [B].
        """
        pixels = self.patchify(images)
        order = noise.argsort(dim=1)
        predicted = self.decode(self.encode(pixels, order[:, : self.visible]), order)
        return self.reconstruction_loss(pixels, predicted, order)

    def reconstruction_loss(self, pixels: Tensor, predicted: Tensor, order: Tensor) -> Tensor:
        """Mean squared error of the prediction of each image's hidden patches, float32 [B]."""
        target = _pick(pixels, order[:, self.visible :])
        if self.norm_pix:
            target = _normalise(target)
        return F.mse_loss(predicted.float(), target.float(), reduction="none").mean(dim=(1, 2))

    def patchify(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, C * p * p], in the order of the patch embedding's weights."""
        b, c, p = len(images), self.channels, self.patch
        rows, columns = self.grid
        tiles = images.reshape(b, c, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        return tiles.reshape(b, rows * columns, c * p * p)

    def unpatchify(self, pixels: Tensor) -> Tensor:
        """The inverse of `patchify`."""
        b, c, p = len(pixels), self.channels, self.patch
        rows, columns = self.grid
        tiles = pixels.reshape(b, rows, columns, c, p, p).permute(0, 3, 1, 4, 2, 5)
        return tiles.reshape(b, c, rows * p, columns * p)

    def encode(self, pixels: Tensor, visible: Tensor) -> Tensor:
        """Tokens [B, 1 + V, D] (class token first) of the patches named by `visible` [B, V]."""
        encoder = self.encoder
        proj = encoder.patch_embed.proj
        prefix = encoder.num_prefix_tokens
        tokens = encoder.patch_embed.norm(F.linear(_pick(pixels, visible), proj.weight.flatten(1), proj.bias))
        positions: Any = encoder.pos_embed
        tokens = (
            tokens + positions[0, prefix:][visible] if not encoder.no_embed_class else tokens + positions[0][visible]
        )
        if encoder.cls_token is not None:
            first = encoder.cls_token if encoder.no_embed_class else encoder.cls_token + positions[:, :prefix]
            tokens = torch.cat([first.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = encoder.norm_pre(tokens)
        for block in encoder.blocks:
            tokens = block(tokens)
        normed: Tensor = encoder.norm(tokens)
        return normed

    def decode(self, tokens: Tensor, order: Tensor) -> Tensor:
        """Predicted pixels [B, N - V, C * p * p] of the hidden patches, in the order of `order[:, V:]`."""
        return self.predict(self.decoded(tokens, order))

    def predict(self, decoded: Tensor) -> Tensor:
        """The same, from what the decoder's blocks gave."""
        hidden = decoded[:, self.encoder.num_prefix_tokens + self.visible :]
        predicted: Tensor = self.decoder_head(self.decoder_norm(hidden))
        return predicted

    def decoded(self, tokens: Tensor, order: Tensor) -> Tensor:
        """What the decoder's blocks give [B, prefix + N, D]: prefix tokens, then patches in the order of `order`."""
        positions: Tensor = self.get_buffer("decoder_positions")[0]
        embedded = self.decoder_embed(tokens)
        prefix = self.encoder.num_prefix_tokens
        visible = embedded[:, prefix:] + positions[order[:, : self.visible]]
        hidden = self.mask_token + positions[order[:, self.visible :]]
        x = torch.cat([embedded[:, :prefix], visible, hidden.to(embedded.dtype)], dim=1)
        for block in self.decoder_blocks:
            x = block(x)
        return x

    @torch.no_grad()
    def pictures(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(masked, reconstructed) [B, C, H, W]: hidden patches grey; hidden patches predicted.

        With `norm_pix` the prediction is put back on each patch's own mean and deviation, so that it can be looked at.
        """
        pixels = self.patchify(images)
        order = noise.argsort(dim=1)
        hidden = order[:, self.visible :]
        predicted = self.decode(self.encode(pixels, order[:, : self.visible]), order).float()
        if self.norm_pix:
            target = _pick(pixels, hidden)
            predicted = predicted * _deviation(target) + target.mean(dim=-1, keepdim=True)
        index = hidden[..., None].expand(-1, -1, pixels.shape[2])
        masked = pixels.scatter(1, index, torch.zeros_like(predicted))
        return self.unpatchify(masked), self.unpatchify(pixels.scatter(1, index, predicted))


def _plain(encoder: nn.Module) -> TypeGuard[VisionTransformer]:
    """A ViT of patches with at most a class token; timm's subclasses and hybrids are none."""
    return (
        type(encoder) is VisionTransformer
        and isinstance(encoder.patch_embed, PatchEmbed)
        and not encoder.num_reg_tokens
    )


def _pick(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens [B, K, D] of [B, N, D] at `index` [B, K]."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))


def _deviation(patches: Tensor) -> Tensor:
    return (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()


def _normalise(patches: Tensor) -> Tensor:
    return (patches - patches.mean(dim=-1, keepdim=True)) / _deviation(patches)
