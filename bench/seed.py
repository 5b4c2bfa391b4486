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
