"""The arithmetic of a plan: FLOP, bytes and hours, from numbers of items and tokens.

1. A forward pass over an input of T tokens takes 2 P T + 4 L a T² FLOP: two for each of the P weights of the language
   model (token embeddings are looked up, not multiplied) and each token; and the two products of attention, scores and
   their sum, with all T tokens in each of L layers of width a (heads x their size). The second half of the causal mask
   is counted, though some kernels skip it.
2. The vision tower takes the same of its own weights, layers and patches; of a picture's patches each attends to all.
3. An exact search of M candidates for N queries of d numbers takes 2 N M d FLOP, in float32 without tensor cores: its
   error bound needs full precision. SaHa searches fewer queries, since clusters use them up; N is the most.
4. Hours are FLOP / (GPUs x peak x utilization) / 3600. The peaks are the published ones, dense (without sparsity); the
   utilization is an assumption, which the output states. Reading and preparing pictures is assumed to keep up; how many
   each GPU needs per second is part of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.tables import as_text

TERA = 1e12
VECTOR_BYTES = 4
"""Bytes per number of a stored vector (float32)."""
RESULT_BYTES = 12
"""Bytes per candidate that a search keeps: its number and its score."""
SEARCH_BLOCK = 512
"""Queries that are searched together; all candidates are read once for each block."""
_IMAGE_READS = 2  # once for its digest and size, once to encode it


class Gpu(NamedTuple):
    """A type of GPU: published dense peaks in TFLOP/s, memory in GB, and its bandwidth in GB/s.

    `half` is bfloat16 or float16 with tensor cores, `single` float32 without them.
    """

    half: float
    single: float
    memory: float
    bandwidth: float


GPUS = {
    "T4": Gpu(65, 8.1, 16, 320),
    "V100": Gpu(125, 15.7, 32, 900),
    "A10": Gpu(125, 31.2, 24, 600),
    "L4": Gpu(121, 30.3, 24, 300),
    "L40S": Gpu(362, 91.6, 48, 864),
    "A100": Gpu(312, 19.5, 80, 2039),
    "H100": Gpu(989, 67, 80, 3350),
    "H200": Gpu(989, 67, 141, 4800),
    "B200": Gpu(2250, 75, 180, 7700),
    "MI300X": Gpu(1307, 163.4, 192, 5300),
}
"""From the makers' data sheets: V100, A100, H100, H200 and B200 as SXM modules, A100 with 80 GB."""


@dataclass(frozen=True)
class Layers:
    """Weights, layers and width of attention of a part of a model."""

    weights: int
    layers: int
    width: int

    def flop(self, length: float) -> float:
        """Return the FLOP of one sequence of a length."""
        return 2 * self.weights * length + 4 * self.layers * self.width * length**2


@dataclass(frozen=True)
class ModelCosts:
    """What a model costs.

    Attributes:
        parameters: All its weights.
        language: Its language model without token embeddings.
        vision: Its vision tower, with what maps its output; None for a model of text alone.
        dimensions: The width of a vector.
    """

    parameters: int
    language: Layers
    vision: Layers | None
    dimensions: int


class Lengths(NamedTuple):
    """Lengths of one input: its tokens that are run, and the patches of each of its pictures."""

    tokens: int
    patches: tuple[int, ...] = ()


@dataclass(frozen=True)
class Load:
    """Inputs of one side.

    Attributes:
        label: Their name in the table.
        num_items: The number of distinct inputs.
        sample: The lengths of some of them, which stand for all.
        image_bytes: The mean size of the picture files of one input.
        exact: Whether the lengths are given, not counted on some of the inputs.
    """

    label: str
    num_items: int
    sample: tuple[Lengths, ...]
    image_bytes: float = 0.0
    exact: bool = False

    @property
    def num_tokens(self) -> float:
        """The tokens of all inputs."""
        return self.num_items * _mean([one.tokens for one in self.sample])

    @property
    def num_images(self) -> float:
        """The pictures of all inputs."""
        return self.num_items * _mean([len(one.patches) for one in self.sample])

    def flop(self, model: ModelCosts) -> float:
        """Return the FLOP of all inputs."""
        costs = [
            model.language.flop(one.tokens)
            + (sum(model.vision.flop(patches) for patches in one.patches) if model.vision else 0.0)
            for one in self.sample
        ]
        return self.num_items * _mean(costs)


@dataclass(frozen=True)
class Search:
    """An exact search: N queries, M candidates, and the candidates that are kept for each query."""

    label: str
    num_queries: int
    num_candidates: int
    kept: int

    def flop(self, dimensions: int) -> float:
        """Return the FLOP of the search."""
        return 2.0 * self.num_queries * self.num_candidates * dimensions

    def bytes_read(self, dimensions: int) -> float:
        """Return the bytes of candidates that go through the GPUs, once for each block of queries."""
        blocks = -(-self.num_queries // SEARCH_BLOCK)
        return float(blocks * self.num_candidates * dimensions * VECTOR_BYTES)


@dataclass(frozen=True)
class Hardware:
    """The GPUs of a plan, and the share of their peak that is assumed to be reached.

    Raises:
        Gen2EmbedError: The type is unknown.
    """

    kind: str
    count: int
    utilization: float
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        """Check the type."""
        if self.kind not in GPUS:
            raise Gen2EmbedError(f"gpu is {self.kind!r}; known: {', '.join(GPUS)}")

    @property
    def gpu(self) -> Gpu:
        """The type's published figures."""
        return GPUS[self.kind]

    def peak(self, dtype: str) -> float:
        """Return the peak of one GPU in FLOP/s."""
        return TERA * (self.gpu.single if dtype == "float32" else self.gpu.half)

    def hours(self, flop: float, dtype: str) -> float:
        """Return the hours that all GPUs together take."""
        return flop / (self.count * self.peak(dtype) * self.utilization) / 3600

    def search_hours(self, search: Search, dimensions: int) -> float:
        """Return the hours of a search: its products, or reading the candidates, whichever takes longer."""
        reading = search.bytes_read(dimensions) / (self.count * self.gpu.bandwidth * 1e9) / 3600
        return max(self.hours(search.flop(dimensions), "float32"), reading)


def costs_of_config(config: Any) -> ModelCosts:
    """Count the weights of the model that a configuration describes; no memory is allocated for them.

    Args:
        config: A configuration of transformers.

    Raises:
        Gen2EmbedError: No model can be made of it.
    """
    import torch
    from transformers import AutoModel

    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config)
    except Exception as error:  # whatever it raises follows from the file
        raise Gen2EmbedError(f"no {config.model_type} model can be made of the configuration: {error}") from error
    text = config.get_text_config()
    decoder = model.get_decoder()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    embeddings = model.get_input_embeddings().weight.numel()
    total, of_text = (sum(one.numel() for one in part.parameters()) for part in (model, decoder))
    language = Layers(of_text - embeddings, text.num_hidden_layers, text.num_attention_heads * size)
    tower, vision = getattr(config, "vision_config", None), None
    if tower is not None and total > of_text:
        layers = _first(tower, "depth", "num_hidden_layers")
        vision = Layers(total - of_text, layers, _first(tower, "embed_dim", "hidden_size"))
    return ModelCosts(total, language, vision, text.hidden_size)


def report(name: str, model: ModelCosts, loads: Sequence[Load], searches: Sequence[Search], hardware: Hardware) -> str:
    """Return the plan as text.

    Args:
        name: The model's name.
        model: What it costs.
        loads: What is encoded.
        searches: What is searched.
        hardware: The GPUs.
    """
    size = 4 if hardware.dtype == "float32" else 2
    parts = [f"language {_big(model.language.weights)}"]
    parts += [f"vision {_big(model.vision.weights)}"] if model.vision else []
    lines = [
        f"model     {name}: {_big(model.parameters)} parameters ({' + '.join(parts)}, the rest token embeddings), "
        f"{_bytes(model.parameters * size)} in {hardware.dtype}; vectors of {model.dimensions:,} numbers",
        f"hardware  {hardware.count} x {hardware.kind}, {hardware.peak(hardware.dtype) / TERA:g} TFLOP/s in "
        f"{hardware.dtype} and {hardware.gpu.single:g} in float32 (published dense peaks), {hardware.gpu.memory:g} GB; "
        f"assumed to reach {100 * hardware.utilization:g} % of that (--utilization)",
        "",
    ]
    rows, hours = [], 0.0
    for load in loads:
        flop = load.flop(model)
        took = hardware.hours(flop, hardware.dtype)
        hours += took
        written = load.num_items * model.dimensions * VECTOR_BYTES
        read = load.num_items * load.image_bytes * _IMAGE_READS
        rows.append(
            [
                f"encode {load.label}",
                f"{load.num_items:,}",
                *map(_big, (load.num_tokens, load.num_images)),
                *(f"{flop:.3g}", _bytes(read), _bytes(written), f"{took:.3g}"),
            ]
        )
    for search in searches:
        flop, took = search.flop(model.dimensions), hardware.search_hours(search, model.dimensions)
        hours += took
        kept = search.num_queries * min(search.kept, search.num_candidates) * RESULT_BYTES
        read = search.bytes_read(model.dimensions)
        rows.append(
            [
                f"search {search.label}",
                f"{search.num_queries:,} x {search.num_candidates:,}",
                "–",
                "–",
                *(f"{flop:.3g}", _bytes(read), _bytes(kept), f"{took:.3g}"),
            ]
        )
    header = ["", "items", "tokens", "pictures", "FLOP", "bytes read", "bytes kept", "hours"]
    lines += [as_text([header, *rows]), ""]
    lines.append(
        f"total     {hours:.3g} hours on {hardware.count} x {hardware.kind}, {hours * hardware.count:.3g} GPU hours"
    )
    pictures = sum(load.num_images for load in loads)
    encoding = sum(hardware.hours(load.flop(model), hardware.dtype) for load in loads)
    if pictures and encoding:
        rate = pictures / (encoding * 3600 * hardware.count)
        lines.append(f"pictures  {rate:.3g} per second must be prepared for each GPU; slower preparation sets the time")
    sampled = [load for load in loads if not load.exact and len(load.sample) < load.num_items]
    if sampled:
        measured = ", ".join(f"{len(load.sample):,} of {load.num_items:,} {load.label}" for load in sampled)
        lines.append(f"lengths   of {measured}; the others are assumed to have the same mean")
    if model.parameters * size > 0.9 * 1e9 * hardware.gpu.memory:
        lines.append(f"warning   the weights do not fit into the {hardware.gpu.memory:g} GB of a {hardware.kind}")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _first(config: Any, *names: str) -> int:
    return int(next(value for name in names if (value := getattr(config, name, None)) is not None))


def _big(number: float) -> str:
    """Return a number with a unit: 1.53 B for 1,530,000,000."""
    for unit, power in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= power:
            return f"{number / power:.4g} {unit}"
    return f"{number:.4g}"


def _bytes(number: float) -> str:
    for unit, power in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= power:
            return f"{number / power:.3g} {unit}"
    return f"{number:.0f} B"
