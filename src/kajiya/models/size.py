"""One dial to a whole shape: width, depth, heads and feed-forward width from a number of parameters."""

import math
from dataclasses import dataclass, fields

from kajiya.config.quantities import parse_count
from kajiya.config.schema import ModelConfig

_NEAR = 0.15
"""By what share of the dial a model may miss it without a word."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; every field is a number of units."""

    hidden_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_size: int

    def n_params(self, vocab_size: int, tied: bool) -> int:
        """Parameters of a gated decoder without biases (Llama) of this shape."""
        head_size = self.hidden_size // self.n_heads
        attention = 2 * self.hidden_size**2 + 2 * self.hidden_size * head_size * self.n_kv_heads
        block = attention + 3 * self.hidden_size * self.ffn_size + 2 * self.hidden_size
        embeddings = vocab_size * self.hidden_size * (1 if tied else 2)
        return embeddings + self.n_layers * block + self.hidden_size


def derive_shape(config: ModelConfig, vocab_size: int) -> Shape:
    """The shape nearest to `config.n_params`; sizes that the config sets are kept as they are.

    Depth grows with width as in the published families: 256 × 6, 640 × 10, 2048 × 16, 4096 × 32. Heads are 32, 64 or
    128 wide, two query heads share a key head below width 2048 and four above it, and the feed-forward block is 8/3 as
    wide as the model.
    """
    if config.n_params is None:
        if config.hidden_size is None or config.n_layers is None:
            raise AssertionError("validate() lets no config without a dial and without sizes through")
        return _shape_at(config, config.hidden_size, config.n_layers)
    target = parse_count(config.n_params, "model.n_params")
    best: tuple[float, Shape] | None = None
    for hidden_size in [config.hidden_size] if config.hidden_size else _widths(target):
        natural = hidden_size / min(32 + hidden_size / 20, 128)
        depths = (
            [config.n_layers] if config.n_layers else range(max(1, int(0.7 * natural)), math.ceil(1.5 * natural) + 1)
        )
        for n_layers in depths:
            shape = _shape_at(config, hidden_size, n_layers)
            miss = abs(math.log(shape.n_params(vocab_size, config.tied) / target))
            cost = miss + 0.1 * abs(math.log(n_layers / natural))
            if best is None or cost < best[0]:
                best = (cost, shape)
    if best is None:
        raise AssertionError("no width was tried")
    return best[1]


def missed_words(config: ModelConfig, n_params: int) -> str:
    """Of a model from scratch that has `n_params`: by what its dial was missed; empty within 15 %."""
    if config.n_params is None or config.path is not None or ":" in config.name:
        return ""
    wanted = parse_count(config.n_params, "model.n_params")
    if abs(n_params / wanted - 1) <= _NEAR:
        return ""
    kept = [f"model.{size.name}" for size in fields(Shape) if getattr(config, size.name) is not None]
    why = f"{', '.join(kept)} set" if kept else "no shape comes nearer with this vocabulary"
    return f"{config.n_params} asked for ({why})"


def _widths(target: int) -> list[int]:
    # A block has about 12 × width² parameters, so the square root of the target bounds the width from above.
    top = max(64, round(1.5 * math.sqrt(target)))
    ranges = ((32, 32, 128), (64, 128, 512), (128, 512, 2048), (512, 2048, 32768))
    return [width for step, low, high in ranges for width in range(low, min(high, top + 1), step)]


def _shape_at(config: ModelConfig, hidden_size: int, n_layers: int) -> Shape:
    head_size = 32 if hidden_size < 512 else 64 if hidden_size < 2048 else 128
    n_heads = config.n_heads or max(1, hidden_size // head_size)
    share = 2 if hidden_size < 2048 else 4
    n_kv_heads = config.n_kv_heads or (n_heads // share if n_heads % share == 0 else n_heads)
    grain = 16 if hidden_size < 512 else 128
    ffn_size = config.ffn_size or math.ceil(8 * hidden_size / 3 / grain) * grain
    return Shape(hidden_size, n_layers, n_heads, n_kv_heads, ffn_size)
