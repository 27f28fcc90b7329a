"""The networks of tasks that are made from data alone."""

from __future__ import annotations

from torch import nn

__all__ = ["network_for_images", "network_for_rows"]

WIDTH = 128
# Below this height or width, two strided convolutions without a margin would leave nothing.
SMALL = 20
KERNEL, SIDE = 5, 4


def network_for_rows(columns: int, outputs: int) -> nn.Module:
    """Two hidden layers of 128: (batch, columns) to (batch, outputs)."""
    return nn.Sequential(
        nn.Linear(columns, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, outputs),
    )


def network_for_images(channels: int, height: int, width: int, outputs: int) -> nn.Module:
    """LeNet with strides in place of pooling: (batch, channels, height, width) to (batch, outputs).

    Source: LeCun et al. 1998, "Gradient-Based Learning Applied to Document Recognition",
    https://doi.org/10.1109/5.726791
    """
    margin = 2 if min(height, width) < SMALL else 0

    def left(size: int) -> int:
        """How much of a height or width two convolutions leave."""
        for _ in range(2):
            size = (size + 2 * margin - KERNEL) // 2 + 1
        return size

    # On MNIST this would change nothing, and take a third of the time of a step.
    pool = [] if left(height) == left(width) == SIDE else [nn.AdaptiveAvgPool2d(SIDE)]
    return nn.Sequential(
        nn.Conv2d(channels, 16, kernel_size=KERNEL, stride=2, padding=margin),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=KERNEL, stride=2, padding=margin),
        nn.ReLU(),
        *pool,
        nn.Flatten(),
        nn.Linear(32 * SIDE * SIDE, 64),
        nn.ReLU(),
        nn.Dropout(0.25),
        nn.Linear(64, outputs),
    )
