"""The seed document's own figures: its claims, not measurements of this project.

The tables print them beside what was measured, named as the seed's. Sequence length is the key of
every mapping; None stands for what the document gives as N/A.
"""

from __future__ import annotations

from typing import NamedTuple

HEADS = 32
HEAD_DIM = 64


class ForwardClaims(NamedTuple):
    """Forward times claimed for one card, in milliseconds."""

    card: str
    device_kind: str  # what a device's kind contains when it is this card
    batch: int
    columns: tuple[str, ...]
    times_ms: dict[int, tuple[float | None, ...]]


H100 = ForwardClaims(
    card="H100 80GB",
    device_kind="H100",
    batch=8,
    columns=("Standard", "Flash Attn 2", "Flash Attn 3 (FP16)", "Flash Attn 3 (FP8)"),
    times_ms={
        512: (0.8, 0.6, 0.4, 0.3),
        1024: (2.6, 1.0, 0.6, 0.4),
        2048: (9.8, 3.4, 2.0, 1.3),
        4096: (38.2, 12.5, 7.2, 4.8),
        8192: (151.4, 47.8, 27.1, 18.2),
    },
)
A100 = ForwardClaims(
    card="A100 80GB",
    device_kind="A100",
    batch=8,
    columns=("Standard", "Flash Attn 2", "Flash Attn 3"),
    times_ms={
        512: (1.2, 0.9, None),
        1024: (3.8, 1.4, None),
        2048: (14.2, 4.8, None),
        4096: (55.1, 17.3, None),
        8192: (218.5, 66.2, None),
    },
)
A10G = ForwardClaims(
    card="A10G 24GB",
    device_kind="A10G",
    batch=4,
    columns=("Standard", "Flash Attn 2"),
    times_ms={
        512: (2.1, 1.6),
        1024: (6.8, 2.8),
        2048: (25.9, 9.4),
        4096: (102.1, 35.2),
    },
)
FORWARD = (H100, A100, A10G)


class MemoryClaim(NamedTuple):
    """Memory claimed at batch 8, heads 32, head dim 64, as the document prints it."""

    attention_matrix: str
    kv_cache: str
    standard_total: str
    flash_total: str


MEMORY_BATCH = 8
MEMORY: dict[int, MemoryClaim] = {
    512: MemoryClaim("8 MB", "32 MB", "40 MB", "32 MB"),
    2048: MemoryClaim("128 MB", "128 MB", "256 MB", "128 MB"),
    8192: MemoryClaim("2048 MB (2 GB)", "512 MB", "2.5 GB", "512 MB"),
    32768: MemoryClaim("32768 MB (32 GB)", "2048 MB", "34 GB", "2 GB"),
}


def forward_claims(batch: int, device_kind: str) -> tuple[ForwardClaims, bool]:
    """The claims to show at a batch size, and whether they were made for this very card.

    Without a card of the document's own, its newest card with that batch is shown for reference.
    """
    for claims in FORWARD:
        if claims.batch == batch and claims.device_kind in device_kind:
            return claims, True
    same_batch = [claims for claims in FORWARD if claims.batch == batch]
    return (same_batch or list(FORWARD))[0], False


class ModelMemoryClaim(NamedTuple):
    """Memory claimed for Llama 2 7B, as the document prints it."""

    standard: str
    flash: str
    fits: str = ""


LLAMA_INFERENCE_MEMORY: dict[int, ModelMemoryClaim] = {  # float16, batch 1, on a 24 GB card
    2048: ModelMemoryClaim("3.2 GB", "2.1 GB", "Both"),
    4096: ModelMemoryClaim("5.8 GB", "2.8 GB", "Both"),
    8192: ModelMemoryClaim("12.1 GB", "4.2 GB", "Both"),
    16384: ModelMemoryClaim("26.3 GB (OOM)", "7.8 GB", "Only Flash"),
    32768: ModelMemoryClaim("OOM", "14.2 GB", "Only Flash"),
}
LLAMA_TRAINING_BATCH = 4
LLAMA_TRAINING_MEMORY: dict[int, ModelMemoryClaim] = {
    2048: ModelMemoryClaim("18.2 GB", "12.4 GB"),
    4096: ModelMemoryClaim("34.8 GB", "16.8 GB"),
    8192: ModelMemoryClaim("OOM (>40GB)", "26.2 GB"),
}


class PerTokenClaim(NamedTuple):
    """Claimed for attention alone, A100, batch 1, heads 32, head dim 64."""

    standard_ms: float
    flash_ms: float
    standard_mb: float
    flash_mb: float


PER_TOKEN: dict[int, PerTokenClaim] = {
    512: PerTokenClaim(0.15, 0.11, 0.08, 0.06),
    1024: PerTokenClaim(0.37, 0.14, 0.13, 0.06),
    2048: PerTokenClaim(1.11, 0.24, 0.25, 0.06),
    4096: PerTokenClaim(3.44, 0.43, 0.64, 0.06),
    8192: PerTokenClaim(13.4, 0.83, 2.05, 0.06),
    16384: PerTokenClaim(52.8, 1.64, 8.13, 0.06),
}


class RateClaim(NamedTuple):
    """Something a second, with standard attention and with flash; None where memory ran out."""

    standard: float | None
    flash: float

    def cells(self) -> list[str]:
        """As two cells of a table."""
        return ["OOM" if self.standard is None else f"{self.standard:g}", f"{self.flash:g}"]


# Llama 2 7B on an A100: samples a second by batch and length, tokens a second by context.
TRAINING: dict[tuple[int, int], RateClaim] = {
    (4, 2048): RateClaim(1.2, 3.1),
    (8, 2048): RateClaim(2.1, 5.8),
    (4, 4096): RateClaim(0.4, 1.3),
    (8, 4096): RateClaim(None, 2.4),
    (2, 8192): RateClaim(0.1, 0.4),
}
GENERATION: dict[int, RateClaim] = {
    512: RateClaim(48, 52),
    2048: RateClaim(42, 62),
    4096: RateClaim(31, 58),
    8192: RateClaim(18, 51),
    16384: RateClaim(None, 42),
}
# Training, A100, batch 4, length 2048, samples a second.
LLAMA_MODELS: dict[str, RateClaim] = {
    "llama-2-7b": RateClaim(1.2, 3.1),
    "llama-2-13b": RateClaim(0.6, 1.7),
    "llama-2-70b": RateClaim(0.12, 0.34),
}
# Length 1024, tokens a second.
GPT_MODELS: dict[str, RateClaim] = {
    "gpt-2": RateClaim(520, 680),
    "gpt-j-6b": RateClaim(42, 98),
    "gpt-neox-20b": RateClaim(8, 22),
}


class VersionClaim(NamedTuple):
    """Of one version, H100, length 4096, batch 8."""

    forward_ms: float
    memory_gb: float
    tflops: float
    utilisation: float


VERSIONS: dict[str, VersionClaim] = {
    "FA1": VersionClaim(28.4, 4.8, 180, 0.35),
    "FA2": VersionClaim(12.5, 4.2, 420, 0.55),
    "FA3 (FP16)": VersionClaim(7.2, 4.2, 740, 0.75),
    "FA3 (FP8)": VersionClaim(4.8, 2.8, 1150, 0.82),
}
FEATURES: dict[str, tuple[bool, bool, bool]] = {  # FA1, FA2, FA3
    "Basic attention": (True, True, True),
    "Causal masking": (True, True, True),
    "Multi-query attention": (False, True, True),
    "Sliding window": (False, True, True),
    "Paged KV cache": (False, True, True),
    "FP8 support": (False, False, True),
}
