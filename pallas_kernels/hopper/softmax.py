"""Online softmax of the tiles of scores that a warpgroup visits, to base 2."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic, spec
from pallas_kernels.common.schedule import Work
from pallas_kernels.hopper import tile as tiles
from pallas_kernels.hopper.kernel import LOG2_E, RANGE_OF_HALF, Forward, Kernel


class Stats(NamedTuple):
    """Of the scores of the rows so far."""

    m: jax.Array  # [rows] largest, log2, or no less by more than `Forward.patience`
    l: jax.Array  # sum of powers relative to it, see `Orientation.sums`

    @classmethod
    def start(cls, k: Forward) -> "Stats":
        return cls(k.orientation.vector(-math.inf), k.orientation.no_sums())

    def finish(self, k: Forward, work: Work, row0: Any) -> tuple[jax.Array, jax.Array]:
        """What to multiply rows of O by, and their lse; the sink takes its part here."""
        x, m, total = k.refs.x, self.m, k.orientation.totals(self.l)
        seen = m != -math.inf
        count = k.row_count(work)
        if count is not None:
            seen &= k.orientation.index() < count - row0
        factor = jnp.where(seen, 1.0, 0.0)
        m = jnp.where(seen, m, 0.0)
        if x.sinks is not None:
            sink = x.sinks[work.head].astype(jnp.float32) * LOG2_E
            higher = jnp.maximum(m, sink)
            factor = factor * jnp.exp2(m - higher)
            total = total * factor + jnp.exp2(sink - higher)
            m = higher
        total = jnp.where(seen, total, 1.0)
        lse = jnp.where(seen, (m + jnp.log2(total)) / LOG2_E, -math.inf)
        return factor / total, lse


class Raised(NamedTuple):
    """What a visit's 8-bit elements or pages ask for, in each part of its keys."""

    scale: tuple[Any, ...]  # of products of queries with keys
    shift: tuple[Any, ...]  # by which log2 of probabilities is raised


class Visit(NamedTuple):
    """A tile of scores, and what the operands say of it."""

    k: Kernel
    masked: bool
    span: tiles.Span | None  # if something depends on it
    tile: spec.Tile | None

    @classmethod
    def of(cls, k: Kernel, work: Work, find: Callable[[], tiles.Span], masked: bool) -> "Visit":
        """The visit of a tile of logits; ``find`` is asked where it lies if that matters."""
        if not (masked or k.modifies or k.problem.dropout_rate > 0):
            return cls(k, masked, None, None)
        span = find()
        # Opaque, so that what depends on it is not computed before the loop, to be held there.
        span = span._replace(row0=mosaic.opaque(span.row0), key0=mosaic.opaque(span.key0))
        tile = tiles.tile_of(k.problem, k.refs.x, work, span, masked, k.ends_within_tiles)
        return cls(k, masked, span, tile)

    def softmax(
        self, stats: Stats, s: jax.Array, raised: Raised | None = None
    ) -> tuple[Stats, jax.Array, jax.Array]:
        """Takes scores into the statistics; returns the decay of what came before, and P."""
        scores, _ = self.scores(stats, s, raised)
        p, sums = scores.probabilities(scores.sums)
        return Stats(scores.m, sums), scores.decay, p

    def scores(
        self,
        stats: Stats,
        s: jax.Array,
        raised: Raised | None = None,
        o: tuple[jax.Array, ...] = (),
    ) -> tuple["Scores", tuple[jax.Array, ...]]:
        """What there is before the exponentials, and O, decayed."""
        k, units = self.k, (self.k.unit * LOG2_E,)
        assert isinstance(k, Forward)
        side = k.orientation
        if raised is not None and k.modifies:
            s = s * side.over(raised.scale, s.shape)
        elif raised is not None:
            units = tuple(units[0] * scale for scale in raised.scale)
        s, m, sums, is_patient = self.logits(s), stats.m, stats.l, k.is_patient(self.masked)
        if is_patient:
            over = mosaic.excess(s, units, m + k.patience)
            m, (sums, *relative) = mosaic.grown(over, s, units, m, (sums, *o))
            o = tuple(relative)
        elif raised is not None and k.widens:  # by what may be anything
            m = jnp.maximum(m, side.row_max(s, units, raised.shift) - RANGE_OF_HALF)
        else:
            m = jnp.maximum(m, side.row_max(s, units, None))
        base = jnp.where(m == -math.inf, 0.0, m) if self.masked or k.modifies else m
        decay = jnp.exp2(stats.m - base)
        if not is_patient:
            sums, o = side.decayed_sums(sums, decay), k.decayed(o, decay, self.masked)
        return Scores(k, self, s, units, raised, m, base, decay, sums), o

    def signed(self, p: jax.Array, keys: slice = slice(None)) -> jax.Array:
        """Probabilities, negative where dropout drops them: the mask needs no registers.

        They may be those of some keys.
        """
        if self.k.problem.dropout_rate == 0:
            return p
        assert self.tile is not None
        seed = self.k.refs.x.dropout_seed
        keep = spec.dropout.keep(self.k.problem, self.tile, (seed[0], seed[1]))
        return jnp.where(keep[:, keys], p, -p)

    def kept(self, p: jax.Array) -> jax.Array:
        """What dropout makes of `signed` probabilities."""
        rate = self.k.problem.dropout_rate
        return p if rate == 0 else jnp.maximum(p, 0.0) * (1 / (1 - rate))

    def logits(self, s: jax.Array) -> jax.Array:
        """Logits in multiples of ``k.unit``, -inf where hidden."""
        if not self.k.modifies:
            return self.seen(s)
        return self.seen(self._modified(s, spec.score.modify))

    def logits_and_slope(self, s: jax.Array) -> tuple[jax.Array, Any]:
        """`logits`, and their derivative by ``scale * q.k``; None where that is 1."""
        if not self.k.modifies:
            return self.seen(s), None
        s, slope = self._modified(s, spec.score.modify_with_slope)
        return self.seen(s), slope

    def _modified(self, s: jax.Array, modify: Callable[..., Any]) -> Any:
        problem, unit, span = self.k.problem, self.k.unit, self.span
        assert self.tile is not None
        assert span is not None
        return tiles.modified(problem, self.tile, span, s * (problem.scale / unit), unit, modify)

    def seen(self, s: jax.Array) -> jax.Array:
        """Logits, -inf where hidden."""
        if not self.masked:
            return s
        span: Any = self.span
        assert self.tile is not None
        if self.k.modifies:  # one after the other, or registers run out
            s = lax.optimization_barrier(s)
            span = span._replace(key0=mosaic.opaque(span.key0))
        allowed = tiles.allowed(self.k.problem, self.tile, span)
        return s if allowed is None else jnp.where(allowed, s, -math.inf)


class Scores(NamedTuple):
    """Of a visit, beside what the statistics of its rows are now."""

    k: Forward
    visit: Visit
    s: jax.Array  # logits in multiples of ``k.unit``
    units: tuple[Any, ...]  # by which they are multiplied in each part that has scales
    raised: Raised | None
    m: jax.Array  # see `Stats`
    base: jax.Array  # the same, or 0 of rows that have seen nothing
    decay: jax.Array  # of what came before
    sums: jax.Array  # what came before, decayed; see `Stats`

    def probabilities(self, sums: jax.Array, part: int = 0) -> tuple[jax.Array, jax.Array]:
        """Those of a part of the keys, see `Config.parts`, and the sums with them."""
        c, side, raised = self.k.config, self.k.orientation, self.raised
        start, stop = part * c.part, (part + 1) * c.part

        def of_part(numbers: tuple[Any, ...]) -> tuple[Any, ...]:
            each = c.block_kv // len(numbers)
            return numbers[start // each : -(-stop // each)]

        keys = slice(None) if c.parts == 1 else slice(start, stop)
        s = self.s[:, keys]
        lowered = side.spread(self.base, s.shape)
        weights: tuple[Any, ...] = (1.0,)
        if raised is not None:
            shift = of_part(raised.shift)
            lowered = lowered - side.over(shift, s.shape)
            weights = tuple(jnp.exp2(-x) for x in shift)
        p = jnp.exp2(s * side.over(of_part(self.units), s.shape) - lowered)
        sums = sums + side.sums(p, weights)
        return self.visit.kept(self.visit.signed(p, keys)), sums
