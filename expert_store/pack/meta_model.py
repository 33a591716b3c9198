"""The model without its weights, and Transformers' own conversion of checkpoint tensors into it.

The one module that touches Transformers' internals: which modules are experts, which checkpoint tensors become which
parameter, and the conversion itself. Names and calls are those of transformers 5.17 to 5.23.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers import initialization as model_initialization
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from expert_store.pack.checkpoint import TensorReader
from promoe.errors import ModelUnsupported, PackDamaged
from promoe.model_spec import Dtype, ExpertLayout

_EXPERTS_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
"""What `use_experts_implementation` leaves on an experts module (transformers/integrations/moe.py)."""


_CONFIG_ERRORS = (
    StrictDataclassError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ImportError,
    RuntimeError,
    ZeroDivisionError,
)
"""What Transformers raises for configs that make no sense: it checks some fields, others fail where they are used."""

_PIECE_NBYTES = 8 << 20
"""Bytes of converted experts at a time."""


@dataclass(frozen=True)
class ExpertsModule:
    """One MoE layer's experts: the module's name and each parameter's shape without the experts dimension."""

    name: str
    num_experts: int
    shapes: dict[str, tuple[int, ...]]

    def target(self, parameter: str) -> str:
        """The parameter's name in the model's state dict."""
        return f"{self.name}.{parameter}"


@dataclass(frozen=True)
class ConversionUnit:
    """Checkpoint tensors that become model tensors together.

    Attributes:
        sources: the checkpoint tensors' names.
        patterns: for each, the pattern by which Transformers' converter takes it; None where it is only renamed.
        targets: the model tensors' names.
    """

    sources: tuple[str, ...]
    patterns: tuple[str | None, ...]
    targets: tuple[str, ...]

    def of_experts(self, chosen: range, num_experts: int) -> "ConversionUnit":
        """The part of a unit with `num_experts` sources per pattern that makes the chosen experts."""
        kept: list[tuple[str, str | None]] = []
        for pattern in dict.fromkeys(self.patterns):
            sources = [key for key, taken in zip(self.sources, self.patterns, strict=True) if taken == pattern]
            assert len(sources) == num_experts, f"{pattern} takes {len(sources)} tensors for {num_experts} experts"
            kept += [(sources[expert], pattern) for expert in chosen]
        return ConversionUnit(tuple(key for key, _ in kept), tuple(pattern for _, pattern in kept), self.targets)


@dataclass(frozen=True)
class ConversionPlan:
    """What becomes what.

    Attributes:
        layers: per MoE layer the units that make its experts.
        dense: the units that make everything else.
        ignored: checkpoint tensors the model has no place for (as Transformers ignores them).
    """

    layers: tuple[tuple[ConversionUnit, ...], ...]
    dense: tuple[ConversionUnit, ...]
    ignored: tuple[str, ...]


@dataclass
class _Unit:
    sources: list[str] = field(default_factory=list)
    patterns: list[str | None] = field(default_factory=list)
    targets: dict[str, None] = field(default_factory=dict)


class MetaModel:
    """A causal language model on the meta device that converts its checkpoint's tensors unit by unit.

    Not thread-safe.
    """

    def __init__(self, config: PretrainedConfig, dtype: Dtype) -> None:
        """Builds the model.

        Args:
            config: as `load_config` returns it.
            dtype: what the model computes in; parameters that Transformers keeps in float32 stay so.

        Raises:
            ModelUnsupported: Transformers cannot build a model from this config.
        """
        torch_dtype = getattr(torch, dtype.value)
        try:
            with torch.device("meta"), model_initialization.meta_device_safe_creation_ops():
                self._model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch_dtype)
        except _CONFIG_ERRORS as error:
            raise ModelUnsupported(f"Transformers cannot build this model from its config: {error}") from error
        self._state: dict[str, torch.Tensor] = self._model.state_dict()
        mapping = get_model_conversion_mapping(self._model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._converter_of = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        kept = self._model._get_dtype_plan(torch_dtype)
        assert set(kept.values()) <= {torch.float32}, "Transformers keeps parameters in float32 or not at all"
        self._kept_dtypes = build_glob_alternation(list(kept))[0] if kept else None
        self.dtype = dtype
        self.experts = tuple(_experts_modules(self._model))

    @property
    def config(self) -> PretrainedConfig:
        """The config that the model was built from (the text part of a composite one)."""
        return self._model.config

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of all parameters and persistent buffers."""
        return tuple(self._state)

    @property
    def tied(self) -> dict[str, str]:
        """Parameters that are another one under a second name: the second name, then the first."""
        return dict(self._model.all_tied_weights_keys)

    def state_nbytes(self, name: str) -> int:
        """Bytes of one parameter or buffer, in the format that it is packed in."""
        return self._state[name].numel() * self.dtype_of(name).itemsize

    def module(self, name: str) -> torch.nn.Module:
        """A submodule, on meta."""
        return self._model.get_submodule(name)

    def save_config(self, folder: Path) -> None:
        """Writes config.json so that `AutoModelForCausalLM` builds this very model from it."""
        self._model.config.architectures = [type(self._model).__name__]
        self._model.config.save_pretrained(folder)

    def layout(self) -> ExpertLayout:
        """The layout of one blob.

        Raises:
            ModelUnsupported: the experts differ from layer to layer.
        """
        first = self.experts[0]
        for module in self.experts[1:]:
            if (module.num_experts, module.shapes) != (first.num_experts, first.shapes):
                raise ModelUnsupported(
                    f"The experts of {module.name} ({module.num_experts} of {module.shapes}) differ from those of "
                    f"{first.name} ({first.num_experts} of {first.shapes}); promoe needs all experts alike."
                )
        return ExpertLayout.of(self.dtype, first.shapes)

    def plan(self, keys: Iterable[str]) -> ConversionPlan:
        """Which checkpoint tensors make which model tensors, by Transformers' own renaming.

        Raises:
            PackDamaged: the checkpoint lacks tensors of the model.
            ModelUnsupported: it holds experts the model has no place for, or ones that cannot be told apart.
        """
        units, unexpected = self._units(keys)
        self._refuse_unexpected_experts(unexpected)
        self._refuse_missing(units)
        self._refuse_missing_experts(units)
        layer_of = {module.target(p): n for n, module in enumerate(self.experts) for p in module.shapes}
        layers: list[list[ConversionUnit]] = [[] for _ in self.experts]
        dense: list[ConversionUnit] = []
        for unit in units:
            owners = {layer_of.get(target) for target in unit.targets}
            if owners == {None}:
                dense.append(unit)
                continue
            layer = owners.pop()
            if owners or layer is None:
                raise ModelUnsupported(
                    f"The checkpoint stores {unit.targets[0]} together with tensors outside of its layer's experts; "
                    "promoe cannot pack such a checkpoint a layer at a time."
                )
            layers[layer].append(unit)
        return ConversionPlan(tuple(tuple(layer) for layer in layers), tuple(dense), tuple(unexpected))

    def convert(self, unit: ConversionUnit, read: TensorReader) -> dict[str, torch.Tensor]:
        """The model tensors that this unit makes, on the CPU.

        A tensor that is only renamed and has the right dtype stays what `read` returned.

        Raises:
            PackDamaged: the checkpoint's tensors do not fit together or have other shapes than the config says.
        """
        dtype = self.dtype_of(unit.targets[0])
        patterns = [pattern for pattern in unit.patterns if pattern is not None]
        if not patterns:
            made = {unit.targets[0]: read(unit.sources[0]).to(dtype)}
        elif len(patterns) == len(unit.patterns):
            made = self._fused(unit, patterns, read, dtype)
        else:
            raise PackDamaged(f"The checkpoint holds {unit.targets[0]} twice: in one piece and in parts.")
        for target in unit.targets:
            self._refuse_other_shape(target, made.get(target), tuple(self._state[target].shape))
        return made

    def convert_layer(
        self, units: Sequence[ConversionUnit], read: TensorReader
    ) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """The experts of one layer, a few at a time: megabytes in memory instead of a layer, a file written in order.

        Yields:
            The first expert of the piece, and its tensors of shape (experts of the piece, ...) by target.
        """
        portions = [self._portions(unit, read) for unit in units]
        num_experts = self._state[units[0].targets[0]].shape[0]
        nbytes = sum(self._state[target].nbytes for unit in units for target in unit.targets)
        size = max(1, _PIECE_NBYTES * num_experts // nbytes)
        for first in range(0, num_experts, size):
            chosen = range(first, min(first + size, num_experts))
            yield first, {name: tensor for portion in portions for name, tensor in portion(chosen).items()}

    def _portions(self, unit: ConversionUnit, read: TensorReader) -> Callable[[range], dict[str, torch.Tensor]]:
        """Gives the unit's tensors for some experts; converts only those where the family's converter lets it."""
        target, pattern = unit.targets[0], unit.patterns[0]
        dtype = self.dtype_of(target)
        if len(unit.sources) == 1 and pattern is None:
            fused = read(unit.sources[0])
            self._refuse_other_shape(target, fused, tuple(self._state[target].shape))
            return lambda chosen: {target: fused[chosen.start : chosen.stop].to(dtype)}
        if pattern is None or None in unit.patterns or not _is_expert_by_expert(self._converter_of[pattern]):
            whole = self.convert(unit, read)
            return lambda chosen: {name: tensor[chosen.start : chosen.stop] for name, tensor in whole.items()}

        def convert_some(chosen: range) -> dict[str, torch.Tensor]:
            num_experts, *shape = self._state[target].shape
            piece = unit.of_experts(chosen, num_experts)
            made = self._fused(piece, [pattern for pattern in piece.patterns if pattern is not None], read, dtype)
            self._refuse_other_shape(target, made.get(target), (len(chosen), *shape))
            return made

        return convert_some

    def _fused(
        self, unit: ConversionUnit, patterns: list[str], read: TensorReader, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """Runs the family's converter over the unit, as `convert_and_load_state_dict_in_model` would."""
        converter = deepcopy(self._converter_of[patterns[0]])
        for key, pattern in zip(unit.sources, patterns, strict=True):
            # Its annotation says Future; plain tensors are what saving a model gives it (`materialize_tensors`).
            converter.add_tensor(unit.targets[0], key, pattern, read(key).to(dtype))  # type: ignore[arg-type]
        try:
            with torch.no_grad():
                made = converter.convert(unit.targets[0], model=self._model, config=self._model.config)
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            raise PackDamaged(
                f"The checkpoint's {len(unit.sources)} tensors for {unit.targets[0]} do not fit together ({error}): "
                "some are missing or of another shape."
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _refuse_other_shape(self, target: str, made: torch.Tensor | None, expected: tuple[int, ...]) -> None:
        if made is None:
            raise PackDamaged(f"The checkpoint's tensors do not make {target}: some are missing.")
        if tuple(made.shape) != expected:
            raise PackDamaged(
                f"The checkpoint's {target} has shape {tuple(made.shape)} where its config asks for {expected}. "
                "It is incomplete or does not belong to its config.json."
            )

    def dtype_of(self, target: str) -> torch.dtype:
        """As Transformers loads it and a pack keeps it: float32 where the family wants it, else the parameter's own."""
        if self._kept_dtypes is not None and self._kept_dtypes.search(target):
            return torch.float32
        return self._state[target].dtype

    def _units(self, keys: Iterable[str]) -> tuple[list[ConversionUnit], list[str]]:
        """Groups keys by what they become; the loop mirrors that of `convert_and_load_state_dict_in_model`."""
        prefix = self._model.base_model_prefix
        units: dict[str, _Unit] = {}
        unexpected: list[str] = []
        for key in sorted(keys, key=dot_natural_key):
            renamed, pattern = rename_source_key(key, self._renamings, self._converters, prefix, self._state)
            if renamed not in self._state and key in self._state:
                renamed, pattern = rename_source_key(key, [], [], prefix, self._state)
            if renamed not in self._state:
                unexpected.append(key)
                continue
            unit = units.setdefault(renamed, _Unit())
            unit.sources.append(key)
            unit.patterns.append(pattern)
            names = self._converter_of[pattern].target_patterns if pattern is not None else [renamed]
            for name in names:
                unit.targets[renamed.replace(names[0], name)] = None
        listed = [ConversionUnit(tuple(u.sources), tuple(u.patterns), tuple(u.targets)) for u in units.values()]
        return listed, unexpected

    def _refuse_missing(self, units: list[ConversionUnit]) -> None:
        made = {target for unit in units for target in unit.targets}
        groups: dict[str, set[str]] = {}
        for second, first in self.tied.items():
            groups.setdefault(first, {first}).add(second)
        covered = {name for group in groups.values() if group & made for name in group}
        missing = [name for name in self._state if name not in made | covered]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise PackDamaged(
                f"The checkpoint lacks tensors for {', '.join(missing[:3])}{more}. "
                "It is incomplete or does not belong to its config.json."
            )

    def _refuse_missing_experts(self, units: list[ConversionUnit]) -> None:
        for unit in units:
            for pattern, found in Counter(unit.patterns).items():
                expected = self._state[unit.targets[0]].shape[0]
                if pattern and _is_expert_by_expert(self._converter_of[pattern]) and found != expected:
                    raise PackDamaged(
                        f"The checkpoint holds {found} experts' tensors for {unit.targets[0]} where its config asks "
                        f"for {expected}. It is incomplete or does not belong to its config.json."
                    )

    def _refuse_unexpected_experts(self, unexpected: list[str]) -> None:
        ignorable = [re.compile(p) for p in self._model._keys_to_ignore_on_load_unexpected or ()]
        experts = [k for k in unexpected if ".experts." in k and not any(p.search(k) for p in ignorable)]
        if experts:
            raise ModelUnsupported(
                f"The checkpoint holds {len(experts)} expert tensors that its config.json has no place for, for "
                f"example {experts[0]}."
            )


def _is_expert_by_expert(converter: WeightConverter) -> bool:
    """Whether it stacks one tensor per expert and then touches no expert's neighbour: then experts can be converted
    in any portions. (In transformers 5.23 all 26 that stack are such.)"""
    stack, *others = converter.operations
    return (
        isinstance(stack, MergeModulelist)
        and stack.dim == 0
        and len(converter.target_patterns) == 1
        and all(isinstance(other, Concatenate) and other.dim > 0 for other in others)
    )


def load_config(folder: Path) -> PretrainedConfig:
    """The checkpoint's config as Transformers reads it; runs no remote code, raises ModelUnsupported if it cannot."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (*_CONFIG_ERRORS, OSError) as error:
        raise ModelUnsupported(f"Transformers cannot read {folder / 'config.json'}: {error}") from error
    return config


def _experts_modules(model: PreTrainedModel) -> Iterable[ExpertsModule]:
    for name, module in model.named_modules():
        if not all(hasattr(module, mark) for mark in _EXPERTS_MARKS):
            continue
        num_experts = int(module.num_experts)
        shapes = {
            parameter: tuple(tensor.shape[1:])
            for parameter, tensor in module.named_parameters(recurse=False)
            if tensor.dim() > 1 and tensor.shape[0] == num_experts
        }
        yield ExpertsModule(name, num_experts, shapes)
