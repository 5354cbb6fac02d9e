"""Where a token stands: added to the embedding, or told to each attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from isoflop.arch.rules import Rules


@dataclass(frozen=True, slots=True)
class Learned:
    """A trained vector per position, added to the embedding.

    `offset` rows come before position 0 (OPT keeps 2).
    """

    n_positions: int
    offset: int = 0
    kind: Literal["learned"] = "learned"

    def __post_init__(self) -> None:
        Rules(self).size("n_positions").size("offset", least=0).close()


@dataclass(frozen=True, slots=True)
class Sinusoidal:
    """Fixed sines and cosines, added to the embedding (Vaswani 2017, section 3.5)."""

    kind: Literal["sinusoidal"] = "sinusoidal"


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by `factor` (position interpolation, Chen 2023)."""

    factor: float
    kind: Literal["linear"] = "linear"

    def __post_init__(self) -> None:
        Rules(self).real("factor", least=1).close()


@dataclass(frozen=True, slots=True)
class DynamicScaling:
    """NTK-aware base that grows with the length read (dynamic NTK)."""

    factor: float
    kind: Literal["dynamic"] = "dynamic"

    def __post_init__(self) -> None:
        Rules(self).real("factor", least=1).close()


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Wavelength-dependent scaling of Llama 3.1: long waves slowed, short ones kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int
    kind: Literal["llama3"] = "llama3"

    def __post_init__(self) -> None:
        rules = Rules(self).real("factor", least=1).real("low_freq_factor", above=0)
        rules.real("high_freq_factor", above=0).size("original_max_seq_len")
        if not rules.broken:
            rules.must("high_freq_factor", "exceeds low_freq_factor",
                       self.high_freq_factor > self.low_freq_factor)  # fmt: skip
        rules.close()


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (Peng 2023): a ramp between kept and interpolated waves, and a temperature.

    `attention_factor` None means 0.1 ln(factor) + 1, the paper's equation 22;
    `mscale` and `mscale_all_dim` are DeepSeek's replacement for it.
    """

    factor: float
    original_max_seq_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    kind: Literal["yarn"] = "yarn"

    def __post_init__(self) -> None:
        rules = Rules(self).real("factor", least=1).size("original_max_seq_len")
        rules.real("beta_fast", above=0).real("beta_slow", above=0).close()


@dataclass(frozen=True, slots=True)
class LongRopeScaling:
    """One factor per rotated pair, one set for short and one for long contexts (Phi-3)."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_seq_len: int
    attention_factor: float | None = None
    kind: Literal["longrope"] = "longrope"

    def __post_init__(self) -> None:
        rules = Rules(self).size("original_max_seq_len", least=2)  # its logarithm divides
        rules.must("long_factor", "has as many factors as short_factor",
                   len(self.long_factor) == len(self.short_factor))  # fmt: skip
        rules.close()


RopeScaling: TypeAlias = (
    LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling
)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions (Su 2021). `d_rotary` None rotates the whole head.

    `interleaved` pairs neighbours (GPT-J); otherwise halves are paired (GPT-NeoX, Llama).
    `sections` are how many of the pairs go by a token's time, row and column, in that order, where
    it is an image's; a text's has one place in all three (Qwen2-VL, 2409.12191, section 2.1).
    """

    theta: float = 10_000.0
    d_rotary: int | None = None
    interleaved: bool = False
    scaling: RopeScaling | None = None
    sections: tuple[int, ...] | None = None
    kind: Literal["rope"] = "rope"

    def __post_init__(self) -> None:
        rules = Rules(self).real("theta", least=1)
        if isinstance(self.scaling, YarnScaling) and not rules.broken:
            rules.must("theta", "exceeds 1 with yarn, whose ramp divides by its logarithm",
                       self.theta > 1)  # fmt: skip
        if self.d_rotary is not None:
            rules.size("d_rotary")
            if not rules.broken:
                rules.must("d_rotary", "is even: it is rotated in pairs", self.d_rotary % 2 == 0)
        if self.sections is not None:
            rules.must("sections", "is three numbers of pairs: by time, row and column",
                       len(self.sections) == 3 and min(self.sections) >= 0)  # fmt: skip
            rules.must("scaling", "does not go by the length where there are sections",
                       not isinstance(self.scaling, DynamicScaling | LongRopeScaling))  # fmt: skip
        rules.close()


@dataclass(frozen=True, slots=True)
class Rope2d:
    """Rotary positions of an image's patches: half of the pairs turn by row, half by column.

    Both halves have the same frequencies (Qwen2-VL: Wang 2024, 2409.12191, section 2.1).
    """

    theta: float = 10_000.0
    kind: Literal["rope_2d"] = "rope_2d"

    def __post_init__(self) -> None:
        Rules(self).real("theta", least=1).close()


@dataclass(frozen=True, slots=True)
class Alibi:
    """A penalty per head that grows linearly with distance (Press 2021).

    `scale` multiplies the paper's slopes (Falcon's are divided by sqrt(H) with the scores).
    """

    scale: float = 1.0
    kind: Literal["alibi"] = "alibi"

    def __post_init__(self) -> None:
        Rules(self).real("scale", above=0).close()


@dataclass(frozen=True, slots=True)
class RelativeBias:
    """T5's learned bias per head and distance bucket.

    `shared` means that the first layer's table serves all layers.
    """

    n_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False
    shared: bool = True
    kind: Literal["relative_bias"] = "relative_bias"

    def __post_init__(self) -> None:
        Rules(self).size("n_buckets").size("max_distance").close()


@dataclass(frozen=True, slots=True)
class RelativeProjection:
    """Transformer-XL's positions (Dai 2019, section 3.3), those of Gopher and Chinchilla.

    A sine wave of the distance goes through a trained map of D to N heads of H and is
    scored against the queries; two trained vectors per head (u and v) are added to them.
    """

    kind: Literal["relative_projection"] = "relative_projection"


Position: TypeAlias = Rope | Rope2d | Alibi | RelativeBias | RelativeProjection | None
