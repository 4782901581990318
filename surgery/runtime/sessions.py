"""Sessions of ONNX Runtime, and the merged graph in one of them; surgery.runtime.two_graphs runs two graphs as one
model.

All run under equal session options, so that what differs is the graph; one with look-up tables has the option for them
too, as in a folder. onnxruntime is imported when a session is opened, not before. Values go from a step to the next as OrtValues on the provider's device: on the CPU that costs
what numpy arrays cost (370 and 373 ms a step, E2B q4f16 behind 4,096 tokens), on a GPU it saves the way to the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from surgery.attention.kv_wiring import Slot, slot_of_name
from surgery.attention.shared_buffer import KEY as IN_PLACE
from surgery.attention.shared_buffer import VALUE as IN_PLACE_VALUE
from surgery.choices import Provider, ProviderChoice
from surgery.cuda.layering import OPTION, SETTING
from surgery.errors import ModelError, RuntimeMissing
from surgery.graph.look_up_tables import OPTION as LUT_OPTION
from surgery.graph.look_up_tables import SETTING as LUT_SETTING
from surgery.graph.look_up_tables import has_lut_products
from surgery.graph.model import Model
from surgery.graph.token_inputs import token_role
from surgery.runtime.installing import how_to_install, installed, needs

if TYPE_CHECKING:
    import onnxruntime as ort

Array = NDArray[Any]
OrtTensor: TypeAlias = "ort.OrtValue"
"""A tensor on the device of its session; `host` makes a numpy array of it."""
KVCaches: TypeAlias = "dict[Slot, Array | ort.OrtValue]"
"""The KV caches between two steps: [batch, kv heads, tokens so far, head size] each."""

_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}
_UNKNOWN = "NOT_IMPLEMENTED"
"""In what ONNX Runtime says of an operator that its provider has no kernel for, with these types."""
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True, slots=True)
class Settings:
    """Session options, equal for every session of a comparison. `threads` 0 leaves it to ONNX Runtime."""

    provider: Provider = "cpu"
    threads: int = 0
    optimized: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Feed:
    """The tokens of one step, int64: `ids` and `positions` [B, S], and the `mask` [B, T] of the cache too."""

    ids: Array
    mask: Array
    positions: Array


class Runner(Protocol):
    """A model that takes tokens and caches, and gives logits and caches."""

    def start(self, batch: int) -> KVCaches:
        """Empty caches for `batch` rows."""

    def step(self, feed: Feed, cache: KVCaches, keep: int) -> tuple[Array, KVCaches]:
        """Logits [B, n, V] and the caches afterwards.

        `keep` asks for the logits of the last `keep` tokens, 0 for those of all; a graph that takes no
        num_logits_to_keep decides itself. Raises ModelError, with the runtime's words, where the graph fails.
        """


def versions() -> dict[str, str]:
    """The versions of what the numbers depend on."""
    return {"numpy": np.__version__, "onnxruntime": load_onnxruntime("cpu").__version__}


def load_onnxruntime(provider: Provider) -> Any:
    """The onnxruntime module. Raises RuntimeMissing where it is absent or not built for `provider`."""
    with needs("onnxruntime", provider):
        import onnxruntime
    if provider == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise RuntimeMissing(f"this onnxruntime has no CUDA provider: {how_to_install(provider)}")
    if provider == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # pip's CUDA libraries are found by no search path; GenAI does not load them itself
    return onnxruntime


def machine_provider() -> Provider:
    """The provider to use where none is named: cuda with a GPU's device file and a CUDA build, else cpu.

    `get_available_providers` alone does not tell: it lists CUDA on machines without a GPU (measured, 1.31.1).
    """
    if not Path("/dev/nvidiactl").exists():
        return "cpu"
    return "cuda" if "CUDAExecutionProvider" in load_onnxruntime("cpu").get_available_providers() else "cpu"


def provider_of(choice: ProviderChoice) -> Provider:
    """The provider that a choice means on this machine."""
    return machine_provider() if choice == "auto" else choice


def installed_onnxruntime() -> str | None:
    """The version of the onnxruntime that is installed, without loading it; None where none is."""
    return installed("onnxruntime") or installed("onnxruntime-gpu")


def host(value: Array | OrtTensor) -> Array:
    """A tensor as a numpy array in this process's memory."""
    array: Array = value if isinstance(value, np.ndarray) else value.numpy()
    return array


class OpenGraph:
    """One session and what its interface declares. Values in `exposed` are outputs too, for this session alone.

    `graph` is a file, or a model in memory that was changed since it was read from one: its weights are that file's.
    """

    def __init__(self, graph: Path | Model, settings: Settings, exposed: Sequence[str] = ()) -> None:
        path = graph.path if isinstance(graph, Model) else graph
        self.path = path
        self._session = _open(graph, settings, exposed)
        self._device = settings.provider
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self._declared = {value.name: value.type for value in inputs}
        self._types = {value.name: _dtype(path, value) for value in inputs}
        self._shapes = {value.name: list(value.shape) for value in inputs}
        self._roles = {
            name: name if (role := token_role(name)) in self._types else role or name for name in self._types
        }
        self._no_features = {
            name: np.zeros((0, shape[1]), self._types[name])
            for name, shape in self._shapes.items()
            if name.endswith("_features") and len(shape) == 2 and isinstance(shape[1], int)
        }
        self._outputs = [value.name for value in outputs]
        self._in_place = self._session.get_modelmeta().custom_metadata_map.get(IN_PLACE) == IN_PLACE_VALUE
        ranked = {value.name: len(value.shape) for value in outputs}
        self._pasts = {
            found: name for name, shape in self._shapes.items() if len(shape) == 4 and (found := slot_of_name(name))
        }
        own = [name for name in self._outputs if name not in set(exposed)]
        if strange := next((value for value in outputs if value.name in own and "bfloat16" in value.type), None):
            raise ModelError(
                f"{path}: output {strange.name} is {strange.type}, which numpy does not have",
                hint="float32, float16 and their quantized forms can be run here: choose another precision",
            )
        self.presents: dict[str, Slot] = {
            name: found for name in own if ranked[name] == 4 and (found := slot_of_name(name))
        }
        kept = set(self.presents.values())
        if missing := [name for found, name in self._pasts.items() if found not in kept]:
            raise ModelError(f"{path}: {missing[0]} has no present of the same layer among the outputs")

    def empty_cache(self, batch: int) -> KVCaches:
        """Caches [batch, KV heads, 0, head size] for every past of the graph, by slot."""
        return {found: self._empty(name, batch) for found, name in self._pasts.items()}

    def _empty(self, name: str, batch: int) -> OrtTensor:
        _, heads, _, size = self._shapes[name]
        if not isinstance(heads, int) or not isinstance(size, int):
            raise ModelError(f"{self.path}: {name} is {self._shapes[name]}; KV heads and head size must be numbers")
        empty = np.zeros((batch, heads, 0, size), self._types[name])
        return load_onnxruntime(self._device).OrtValue.ortvalue_from_numpy(empty, self._device, 0)

    def _with_room(self, cache: KVCaches, tokens: int) -> KVCaches:
        """Caches of `tokens` rows, new ones zero: for a graph that writes new rows into its past."""
        grown: KVCaches = {}
        for found, value in cache.items():
            rows = host(value)
            room = np.pad(rows, ((0, 0), (0, 0), (0, tokens - rows.shape[2]), (0, 0)))
            grown[found] = load_onnxruntime(self._device).OrtValue.ortvalue_from_numpy(room, self._device, 0)
        return grown

    def run(self, values: Mapping[str, Array | OrtTensor], cache: KVCaches) -> tuple[dict[str, OrtTensor], KVCaches]:
        """Other outputs by name, and the caches by slot. Values that the graph does not take are left out.

        Features of images or sound, [n, size], that are not given are none.
        """
        feeds: dict[str, Array | OrtTensor] = {own: values[role] for own, role in self._roles.items() if role in values}
        if self._in_place and isinstance(mask := values.get("attention_mask"), np.ndarray):
            cache = self._with_room(cache, mask.shape[1])
        feeds |= {name: cache[found] for found, name in self._pasts.items()}
        feeds |= {name: value for name, value in self._no_features.items() if name not in feeds}
        if missing := [name for name in self._types if name not in feeds]:
            raise ModelError(f"{self.path} takes {', '.join(missing)}, which a text model is not known to take")
        try:
            results = self._bound_run(feeds)
        except Exception as error:  # the runtime's exceptions share no base class of their own
            raise ModelError(f"ONNX Runtime cannot run {self.path}: {one_line(error)}") from None
        if len(results) != len(self._outputs):
            twice = next((name for name in self._outputs if self._outputs.count(name) > 1), "")
            raise ModelError(
                f"{self.path} has {len(self._outputs)} outputs, and gives {len(results)}: {twice!r} is there twice"
            )
        others: dict[str, OrtTensor] = {}
        presents: KVCaches = {}
        for name, value in zip(self._outputs, results, strict=True):
            found = self.presents.get(name)
            if found is None:
                others[name] = value
            else:
                presents[found] = value
        return others, presents

    def _bound_run(self, feeds: Mapping[str, Array | OrtTensor]) -> Sequence[OrtTensor]:
        """Outputs stay on the device; without binding, ONNX Runtime copies each of them to the host."""
        binding = self._session.io_binding()
        arrays = []  # binding a numpy array copies nothing, and does not keep it alive
        for name, value in feeds.items():
            as_declared = len(value.shape() if not isinstance(value, np.ndarray) else value.shape) == len(
                self._shapes[name]
            )
            if not isinstance(value, np.ndarray) and value.data_type() == self._declared[name] and as_declared:
                binding.bind_ortvalue_input(name, value)
                continue
            plain = value if isinstance(value, np.ndarray) else host(value)
            if not as_declared and plain.ndim in (3, 4):  # per-layer inputs, flat on one side alone
                plain = plain.reshape(*plain.shape[:2], *self._shapes[name][2:])
            arrays.append(np.asarray(plain, self._types[name], order="C"))
            binding.bind_cpu_input(name, arrays[-1])
        for name in self._outputs:
            binding.bind_output(name, self._device, 0)
        self._session.run_with_iobinding(binding)
        results: Sequence[OrtTensor] = binding.get_outputs()
        return results

    def steering(self, feed: Feed, keep: int) -> dict[str, Array | OrtTensor]:
        """The inputs that are neither tokens nor caches."""
        kept = np.full([1] * len(self._shapes.get("num_logits_to_keep", [])), keep, np.int64)
        return {"attention_mask": feed.mask, "position_ids": feed.positions, "num_logits_to_keep": kept}

    def logits(self, outputs: Mapping[str, OrtTensor]) -> Array:
        """Raises ModelError where the outputs have no `logits` of rank 3."""
        logits = host(outputs["logits"]) if "logits" in outputs else None
        if logits is None or logits.ndim != 3:
            raise ModelError(f"{self.path}: an output `logits` of rank 3 is expected, {sorted(outputs)} is found")
        return logits


class MergedModel:
    """One graph that takes token ids."""

    def __init__(self, graph: Path | Model, settings: Settings) -> None:
        self._graph = OpenGraph(graph, settings)

    def start(self, batch: int) -> KVCaches:
        """Empty caches for a batch of so many rows."""
        return self._graph.empty_cache(batch)

    def step(self, feed: Feed, cache: KVCaches, keep: int) -> tuple[Array, KVCaches]:
        """One run: logits of the last `keep` positions, float32 [B, keep, V] (0: of all), and the caches after it."""
        outputs, presents = self._graph.run({"input_ids": feed.ids, **self._graph.steering(feed, keep)}, cache)
        return self._graph.logits(outputs), presents


def one_line(error: BaseException) -> str:
    """The words of a foreign exception, without line breaks and no longer than a screen's few lines."""
    words = " ".join(str(error).split())
    return words if len(words) <= 600 else f"{words[:600]} ..."


def _open(graph: Path | Model, settings: Settings, exposed: Sequence[str]) -> ort.InferenceSession:
    found = graph if isinstance(graph, Model) else Model.open(graph)
    found.check_weights()  # no session reads data from elsewhere
    path = found.path
    runtime = load_onnxruntime(settings.provider)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    levels = runtime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if settings.optimized else levels.ORT_DISABLE_ALL
    wanted = ["CUDAExecutionProvider"] if settings.provider == "cuda" else []
    if wanted:
        options.add_session_config_entry(OPTION, SETTING)
    elif has_lut_products(found.graph):
        options.add_session_config_entry(LUT_OPTION, LUT_SETTING)
    try:
        model: str | bytes = str(path)
        if exposed or found is graph:  # nothing is written: the graph goes in as bytes, its weights stay where they are
            model = _exposing(found, exposed)
            options.add_session_config_entry(_WEIGHTS_FOLDER, str(path.absolute().parent))
        session = runtime.InferenceSession(model, options, providers=[*wanted, "CPUExecutionProvider"])
    except Exception as error:  # as in OpenGraph.run
        more = "; take a precision that it has kernels for: fp32, fp16, q4, q4f16" if _UNKNOWN in str(error) else ""
        raise ModelError(f"ONNX Runtime cannot load {path}: {one_line(error)}{more}") from None
    # ONNX Runtime goes on without CUDA when its libraries do not load; the numbers would prove nothing.
    if missing := set(wanted) - set(session.get_providers()):
        raise RuntimeMissing(f"onnxruntime could not start {missing.pop()}; its CUDA libraries or the GPU are missing")
    return session


def _exposing(model: Model, names: Sequence[str]) -> bytes:
    """The graph with more outputs, their types left to the runtime."""
    model = model.copy()
    there = {value.name for value in model.graph.output}
    for name in names:
        if name not in there:
            model.graph.output.add(name=name)
    return model.to_bytes()


def _dtype(path: Path, value: Any) -> type[np.generic]:
    dtype = _DTYPES.get(value.type)
    if dtype is None:
        raise ModelError(f"{path}: input {value.name} is {value.type}; {', '.join(_DTYPES)} are known")
    return dtype
