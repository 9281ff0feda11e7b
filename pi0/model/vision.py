"""Vision towers: images of one camera to tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi0.model.config import ConvDims, SiglipDims
from pi0.model.precision import without_autocast


class SiglipTower(nn.Module):
    """SigLIP without its pooling head (Zhai et al. 2023, as used by PaliGemma): one token per patch.

    All cameras share its weights. Parameter names are those of published checkpoints.
    """

    def __init__(self, dims: SiglipDims):
        super().__init__()
        self.tokens = (dims.image_size // dims.patch_size) ** 2
        self.embeddings = nn.ModuleDict(
            {
                "patch_embedding": nn.Conv2d(3, dims.width, dims.patch_size, stride=dims.patch_size),
                "position_embedding": nn.Embedding(self.tokens, dims.width),
            }
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(SiglipLayer(dims) for _ in range(dims.depth))})
        self.post_layernorm = nn.LayerNorm(dims.width, eps=1e-6)

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        """One [B, 3, size, size] in [-1, 1] per camera to one [B, T, width] per camera."""
        with without_autocast(images[0].device):
            x = self.embeddings["patch_embedding"](torch.cat(images))  # [cameras * B, width, rows, columns]
        x = x.flatten(2).transpose(1, 2) + self.embeddings["position_embedding"].weight
        x = x.to(self.post_layernorm.weight.dtype)
        for layer in self.encoder["layers"]:
            x = layer(x)
        return list(self.post_layernorm(x).chunk(len(images)))


class SiglipLayer(nn.Module):
    """Pre-norm transformer layer with full attention and a gelu-tanh MLP."""

    def __init__(self, dims: SiglipDims):
        super().__init__()
        self.num_heads = dims.num_heads
        self.layer_norm1 = nn.LayerNorm(dims.width, eps=1e-6)
        self.layer_norm2 = nn.LayerNorm(dims.width, eps=1e-6)
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(dims.width, dims.width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        )
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(dims.width, dims.mlp_dim), "fc2": nn.Linear(dims.mlp_dim, dims.width)}
        )

    def forward(self, x: Tensor) -> Tensor:  # [N, T, width]
        h = self.layer_norm1(x)
        q, k, v = (
            self.self_attn[name](h)
            .unflatten(-1, (self.num_heads, -1))
            .transpose(1, 2)  # [N, heads, T, head_dim]
            for name in ("q_proj", "k_proj", "v_proj")
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.self_attn["out_proj"](attended)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh"))


class ConvTowers(nn.Module):
    """A small `ConvTower` per camera, or one for all of them."""

    def __init__(self, dims: ConvDims, cameras: tuple[str, ...]):
        super().__init__()
        self.tokens = dims.tokens
        self.names = ["shared"] * len(cameras) if dims.shared else list(cameras)
        self.towers = nn.ModuleDict({name: ConvTower(dims) for name in dict.fromkeys(self.names)})

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        """One [B, 3, size, size] in [-1, 1] per camera to one [B, T, width] per camera."""
        return [self.towers[name](image) for name, image in zip(self.names, images, strict=True)]


class ConvTower(nn.Module):
    """Convolutions, then spatial softmax (Levine et al. 2016): where each feature is, and how strong.

    Each keypoint is the expected (x, y) in [-1, 1] under the softmax of its feature map, and the expected
    activation. A linear layer spreads all keypoints over a handful of tokens.
    """

    def __init__(self, dims: ConvDims):
        super().__init__()
        widths = [3, *dims.channels]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, kernel, stride, padding=(kernel - 1) // 2)
            for a, b, kernel, stride in zip(widths[:-1], widths[1:], dims.kernels, dims.strides, strict=True)
        )
        self.keypoint_maps = nn.Conv2d(widths[-1], dims.keypoints, 1)
        self.to_tokens = nn.Linear(3 * dims.keypoints, dims.tokens * dims.width)
        self.tokens = dims.tokens

    def forward(self, image: Tensor) -> Tensor:  # [B, 3, size, size] -> [B, tokens, width]
        x = image.to(self.to_tokens.weight.dtype)
        for conv in self.convs:
            x = F.relu(conv(x))
        maps = self.keypoint_maps(x)  # [B, K, h, w]
        weights = maps.flatten(2).softmax(-1)  # [B, K, h * w]
        h, w = maps.shape[-2:]
        y, x = torch.meshgrid(
            torch.linspace(-1, 1, h, device=maps.device, dtype=maps.dtype),
            torch.linspace(-1, 1, w, device=maps.device, dtype=maps.dtype),
            indexing="ij",
        )
        positions = weights @ torch.stack([x.flatten(), y.flatten()], -1)  # [B, K, 2]
        strengths = (weights * maps.flatten(2)).sum(-1, keepdim=True)  # [B, K, 1]
        keypoints = torch.cat([positions, strengths], -1).flatten(1)
        return self.to_tokens(keypoints).unflatten(-1, (self.tokens, -1))
