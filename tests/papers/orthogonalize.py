"""UVᵀ of X = U·S·Vᵀ, exactly or by an iteration that treats every singular value on its own.

    "newton_schulz": s ← s/max(‖X‖, ε), then `steps` times s ← a·s + b·s³ + c·s⁵
    "polar_express": s ← s/(1.01·‖X‖ + ε), then the same with other a, b, c in every step: those of the table
        divided by 1.01, 1.01³, 1.01⁵, except for its last row, which all later steps repeat
    "exact": s ← 1, but 0 where it is 0 up to rounding

(‖·‖ is Frobenius'.) Here it is float64; the libraries iterate in bfloat16.
Source: Jordan, Jin, Boza, You, Cesista, Newhouse & Bernstein 2024, https://kellerjordan.github.io/posts/muon/;
Amsel, Persson, Musco & Gower 2025, "The Polar Express", https://arxiv.org/abs/2505.16932, with the
coefficients and the safety factor of its listing
"""

import numpy as np

JORDAN = (3.4445, -4.7750, 2.0315)
POLAR_EXPRESS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
]


def orthogonalized(
    matrix: np.ndarray,
    method: str = "newton_schulz",
    steps: int = 5,
    coefficients: tuple[float, float, float] = JORDAN,
    eps: float = 1e-7,
) -> np.ndarray:
    """Return U·S'·Vᵀ for matrix = U·S·Vᵀ, or for each of a stack of them."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    size = np.sqrt(np.sum(s**2, axis=-1, keepdims=True))
    if method == "exact":
        s = np.where(
            s > max(matrix.shape[-2:]) * np.finfo(float).eps * np.max(s, axis=-1, keepdims=True), 1.0, 0.0
        )
    elif method == "polar_express":
        s = s / (1.01 * size + eps)
        for step in range(steps):
            a, b, c = POLAR_EXPRESS[step] if step < len(POLAR_EXPRESS) else (1.875, -1.25, 0.375)
            safe = 1.01 if step < len(POLAR_EXPRESS) else 1.0
            s = a * (s / safe) + b * (s / safe) ** 3 + c * (s / safe) ** 5
    else:
        s = s / np.maximum(size, eps)
        for _ in range(steps):
            a, b, c = coefficients
            s = a * s + b * s**3 + c * s**5
    return (u * s[..., None, :]) @ vt
