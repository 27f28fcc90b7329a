"""Small models of the kinds that people train, written as such models usually are."""

from __future__ import annotations

import torch
from torch import nn


class Bottleneck(nn.Module):
    def __init__(self, inner: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inner, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = nn.Sequential(nn.Conv2d(inner, width, 1, stride), nn.BatchNorm2d(width))


class ResNet(nn.Module):
    """Stages of blocks in Sequentials; the second convolution of a block is depthwise."""

    def __init__(self, blocks: tuple[int, ...] = (2, 3), width: int = 4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        for stage, count in enumerate(blocks, 1):
            inner = [width, *[2 * width] * (count - 1)]
            width = 2 * width
            self.add_module(f"layer{stage}", nn.Sequential(*(Bottleneck(x, width, 1) for x in inner)))
        self.fc = nn.Linear(width, 10)


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)


class VisionBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2)
        self.ls1 = nn.Parameter(torch.ones(width))
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)


class PatchEmbed(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, 4, 4)


class VisionTransformer(nn.Module):
    """A class token and a position table as raw parameters."""

    def __init__(self, depth: int = 3, width: int = 8):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, width))
        self.patch_embed = PatchEmbed(width)
        self.blocks = nn.Sequential(*(VisionBlock(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)


class DeclaredVisionTransformer(VisionTransformer):
    """It says what should not decay, and what its layers are, in the way of timm."""

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token", "dist_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


class TextBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)


class GPT(nn.Module):
    """Its output layer is its embedding."""

    def __init__(self, depth: int = 2, width: int = 8):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(11, width),
                "wpe": nn.Embedding(5, width),
                "h": nn.ModuleList([TextBlock(width) for _ in range(depth)]),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, 11, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight


class Experts(nn.Module):
    def __init__(self, width: int, count: int):
        super().__init__()
        self.gate = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList([Mlp(width) for _ in range(count)])


class MixtureBlock(nn.Module):
    def __init__(self, width: int, count: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, width)
        self.moe = Experts(width, count)


class Mixture(nn.Module):
    """A mixture of experts, more of them than there are layers."""

    def __init__(self, depth: int = 2, width: int = 8, count: int = 5):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList([MixtureBlock(width, count) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 11, bias=False)


class Adapted(nn.Module):
    """A Linear layer that stays as it is, and two small ones beside it that are trained."""

    def __init__(self, layer: nn.Linear, rank: int = 2):
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.Linear(layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, layer.out_features, bias=False)


def adapted() -> nn.Module:
    """A GPT of which only the adapters of its attention are trained."""
    model = GPT().requires_grad_(False)
    for block in model.transformer["h"]:
        block.c_attn = Adapted(block.c_attn)
    return model
