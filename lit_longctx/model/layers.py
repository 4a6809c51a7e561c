"""Which position scheme and which attention window each layer of a model has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from jaxtyping import Float, Num
from torch import Tensor

from lit_longctx.position import PositionScheme, QueryTemperature
from lit_longctx.position.scheme import InheritedSettings


@dataclass(frozen=True)
class LayerKind:
    """Position scheme, attention window and query temperature that a group of layers shares."""

    position: PositionScheme
    window: int | None = None
    """Keys that a query may attend to, its own included; None: all of its document so far."""
    query_temperature: QueryTemperature | None = None
    """Factor on queries by their position, whatever the scheme; None: 1."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be 1 or more; got {self.window}; leave it out for none")

    def query_factor(
        self, position_ids: Num[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq 1 1"] | None:
        """Return what the queries of each token are multiplied by, float32; None: nothing."""
        return self.query_temperature and self.query_temperature.factor(position_ids)

    def beyond_position(self) -> str:
        """Window and query temperature in words, "" without either."""
        window = f" in windows of {self.window}" if self.window else ""
        return window + (f" with {self.query_temperature}" if self.query_temperature else "")


@dataclass(frozen=True)
class Layers:
    """The kinds of layers that a model has, and of which kind each layer is.

        Layers((LayerKind(RoPE(), window=1024), LayerKind(NoPE())), (0, 0, 0, 1))

    is four layers: three with rotary positions and a local window, one with neither.
    """

    kinds: tuple[LayerKind, ...]
    """Each kind once; position codes and masks are made once for each."""
    kind_of: tuple[int, ...]
    """For every layer, the index of its kind."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.kind_of) - set(range(len(self.kinds)))):
            raise ValueError(f"kind_of names kind {unknown[0]}; there are {len(self.kinds)} kinds")

    @staticmethod
    def uniform(position: PositionScheme, num_layers: int) -> "Layers":
        """Return layers that all have this scheme and see whole documents."""
        return Layers((LayerKind(position),), (0,) * num_layers)

    @staticmethod
    def of(kind_by_layer: Sequence[LayerKind]) -> "Layers":
        """Return layers, given the kind of each; kinds that are equal become one."""
        kinds: list[LayerKind] = []
        for kind in kind_by_layer:
            if kind not in kinds:
                kinds.append(kind)
        return Layers(tuple(kinds), tuple(kinds.index(kind) for kind in kind_by_layer))

    @property
    def by_layer(self) -> list[LayerKind]:
        """The kind of each layer, from the first to the last."""
        return [self.kinds[number] for number in self.kind_of]

    @property
    def are_uniform(self) -> bool:
        """Whether one scheme says all of every layer."""
        return len(self.kinds) == 1 and not self.kinds[0].beyond_position()

    @property
    def position(self) -> PositionScheme:
        """The scheme that all layers share; ValueError where there are several."""
        schemes = {str(kind.position): kind.position for kind in self.kinds}
        if len(schemes) > 1:
            raise ValueError(f"layers have several position schemes: {', '.join(schemes)}")
        return next(iter(schemes.values()))

    @property
    def depend_on_length(self) -> bool:
        """Whether a position code of any kind depends on how long its document is."""
        return any(kind.position.depends_on_length for kind in self.kinds)

    def position_of(self, layer: int) -> PositionScheme:
        """Return the scheme of a layer."""
        return self.kinds[self.kind_of[layer]].position

    def resolved(self, source: InheritedSettings) -> "Layers":
        """Return the layers whose schemes' open fields are a checkpoint's or config's."""
        kinds = (replace(kind, position=kind.position.resolved(source)) for kind in self.kinds)
        return replace(self, kinds=tuple(kinds))

    def reach(self, context: int) -> tuple[int, str]:
        """Return the tokens that schemes with a factor stretch to, and how; (0, "") without one.

        Args:
            context: What schemes stretch that have no original context of their own; 0: unknown.
        """
        found = (0, "")
        for kind in self.kinds:
            factor = getattr(kind.position, "factor", None)
            original = getattr(kind.position, "original_context", None) or context
            tokens = round(original * factor) if factor else 0
            if tokens > found[0]:
                name = type(kind.position).__name__
                found = tokens, f"the reach of {name}, factor {factor:g} × {original:,}"
        return found

    def with_position(self, position: PositionScheme) -> "Layers":
        """Return layers that all have this scheme; their windows stay."""
        return Layers.of([replace(kind, position=position) for kind in self.by_layer])

    def with_theta(self, theta: float) -> "Layers":
        """Return the same layers with another rotary base; ValueError where several have one."""
        schemes = [cast(Any, kind.position) for kind in self.kinds]
        bases = {scheme.theta for scheme in schemes if hasattr(scheme, "theta")}
        if len(bases) != 1:
            known = ", ".join(f"{base:g}" for base in sorted(bases)) or "none"
            raise ValueError(f"theta {theta:g} is for layers that share a base; they have {known}")
        changed = (
            replace(kind, position=replace(cast(Any, kind.position), theta=theta))
            if hasattr(kind.position, "theta")
            else kind
            for kind in self.kinds
        )
        return replace(self, kinds=tuple(changed))

    def __str__(self) -> str:
        """Schemes, windows and numbers of layers on one line."""
        if self.are_uniform:
            return str(self.kinds[0].position)
        counts = [self.kind_of.count(i) for i in range(len(self.kinds))]
        return ", ".join(
            f"{count} × {kind.position}{kind.beyond_position()}"
            for count, kind in zip(counts, self.kinds, strict=True)
        )


@dataclass(frozen=True)
class LayerPattern:
    """Kinds of layers by name, and the order of layers, repeated over the depth of a model.

        position:
          layers: [local, local, local, global]
          kinds:
            local: {position: {class_path: RoPE}, window: 4096}
            global: {position: {class_path: NoPE}}

    is SmolLM3's order (https://hf.co/blog/smollm3) with windows in the layers that have positions.
    A last repetition that does not fit is cut off.
    """

    layers: Sequence[str]
    """Names of kinds, from the first layer to the last of one repetition."""
    kinds: Mapping[str, LayerKind]
    """Position scheme, window and query temperature of each name."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise ValueError("layers names no kind; expected one name or more, such as [global]")
        if unknown := sorted(set(self.layers) - set(self.kinds)):
            known = ", ".join(self.kinds) or "none"
            raise ValueError(f"layers names {unknown[0]}, which is none of the kinds: {known}")
        if spare := sorted(set(self.kinds) - set(self.layers)):
            raise ValueError(f"kinds has {spare[0]}, which no layer is; remove it")

    def over(self, num_layers: int) -> Layers:
        """Return the layers of a model of that depth."""
        names = (self.layers[i % len(self.layers)] for i in range(num_layers))
        return Layers.of([self.kinds[name] for name in names])

    def __str__(self) -> str:
        """Name of each layer of a repetition, and what the names stand for."""
        kinds = ", ".join(f"{name} {Layers((kind,), (0,))}" for name, kind in self.kinds.items())
        return f"[{' '.join(self.layers)}]: {kinds}"
