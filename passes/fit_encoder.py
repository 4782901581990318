"""fit-encoder: an encoder of images or sound gets the interface that ONNX Runtime GenAI feeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from passes.base import Finding, Pass
from surgery.choices import Modality
from surgery.errors import PassError
from surgery.graph.model import Model
from surgery.graph.node_builder import FLOAT, FLOAT16, INT32, INT64, NodeBuilder
from surgery.graph.renaming import fresh, rename
from surgery.graph.scopes import value_names
from surgery.graph.tensor_types import TensorType, tensor_type
from surgery.source.encoders import encoder_inputs, encoder_output

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    from onnx import GraphProto

IMAGE_INPUTS = ("pixel_values", "pixel_position_ids")
AUDIO_INPUTS = ("input_features", "input_features_mask")
SCOPE = "/interface"


@dataclass(frozen=True)
class FitEncoder(Pass):
    """Check an encoder against what the runtime feeds and allocates, and adapt what differs.

        before                                      after

        pixel_values f16 [N,P,768]                  pixel_values f32 [N,P,768] -> Cast
        pixel_values [N,630,768]                    pixel_values [N,P,768] -> Pad with 0
        pixel_position_ids [N,630,2]                pixel_position_ids [N,P,2] -> Pad with -1
        image_features f16 [n,H]                    Cast -> image_features f32 [n,H]
        image_features [N,T,H]                      Reshape -> image_features [n,H]

        input_features_mask int64 [1,T]             input_features_mask bool [1,T] -> Cast
        audio_features f16 [1,t,H]                  Cast -> audio_features f32 [1,t,H]

    `kind` image takes pixel_values [images, patches, values] and pixel_position_ids [images, patches, 2], and gives
    image_features; audio takes input_features [1, frames, mel bins] and input_features_mask [1, frames], and gives
    audio_features. `hidden` is the text model's size. `patches` is the most that the processor makes of an image.

    The runtime's words for what this prevents: `Invalid rank for input: pixel_values Got: 3 Expected: 2`, `Got invalid
    dimensions for input: pixel_values`, `Unexpected input data type. Actual: (tensor(bool)) , expected:
    (tensor(int64))`, `Actual: (tensor(float16)) , expected: (tensor(float))` (for a prompt of text, too), and `Invalid
    rank for input: image_features Got: 3 Expected: 2` (for images alone: a prompt of text passes).

    Requires: one floating-point input and one of numbers or truth values, of these ranks; features H wide; sizes that
    the runtime varies (images, patches, frames) symbolic, or for patches at least `patches`.
    Ensures: the interface is the right column. The encoder's own nodes are left alone.
    """

    name: ClassVar[str] = "fit-encoder"
    summary: ClassVar[str] = "an encoder's names, ranks and dtypes become what GenAI feeds; what cannot is refused"

    kind: Modality
    hidden: int
    patches: int | None = None

    def requires(self, model: Model) -> None:
        self._interface(model.graph)

    def run(self, model: Model) -> list[Finding]:
        graph = model.graph
        names = self._interface(graph)
        renamed = {old: new for old, new in names.items() if old != new}
        if taken := value_names(graph) & set(renamed.values()):
            raise PassError(f"a value inside the graph is named {min(taken)!r}, which the interface needs")
        rename(graph, renamed)
        findings = [Finding("changed", old, f"is now {new}") for old, new in renamed.items()]
        findings += self._adapt(model)
        return findings or [Finding("skipped", self._features, "the runtime feeds the encoder as it is")]

    def ensures(self, model: Model) -> None:
        if left := self._wanted(model.graph):
            name, (dtype, shape, _) = next(iter(left.items()))
            raise PassError(f"{name} is not {TensorType(dtype, shape)}")

    @property
    def _inputs(self) -> tuple[str, str]:
        return IMAGE_INPUTS if self.kind == "image" else AUDIO_INPUTS

    @property
    def _features(self) -> str:
        return f"{self.kind}_features"

    def _interface(self, graph: GraphProto) -> dict[str, str]:
        """Name -> the name that the runtime is told, of the two inputs and the features. Raises PassError."""
        first, second = encoder_inputs(graph)
        declared = {value.name: tensor_type(value) for value in (*graph.input, *graph.output)}
        self._check_inputs(first, declared[first], second, declared[second])
        features = encoder_output(graph, self.kind)
        self._check_output(features, declared[features])
        return {**dict(zip((first, second), self._inputs, strict=True)), features: self._features}

    def _check_output(self, name: str, declared: TensorType | None) -> None:
        shape = declared.shape if declared is not None else None
        if shape is None or len(shape) not in (2, 3) or shape[-1] != self.hidden:
            raise PassError(f"{name} is {declared}; [tokens, {self.hidden}] is expected, as wide as the text model")

    def _check_inputs(self, first: str, one: TensorType | None, second: str, other: TensorType | None) -> None:
        assert one is not None
        shape, sizes = one.shape or (), (other.shape if other else None) or ()
        whole = ("INT64", "INT32") if self.kind == "image" else ("BOOL", "INT64", "INT32")
        rank = 3 if self.kind == "image" else 2
        if len(shape) != 3 or not isinstance(shape[2], int):
            raise PassError(f"{first} is {one}; [{_axes(self.kind)}] with a number for the last is expected")
        if other is None or other.dtype not in whole or len(sizes) != rank:
            expected = "INT64 [images, patches, 2]" if self.kind == "image" else "BOOL [1, frames]"
            raise PassError(f"{second} is {other}; {expected} is expected")
        if self.kind == "audio" and isinstance(shape[1], int):
            raise PassError(
                f"{first} is {one}: it takes {shape[1]} frames and no other number; the runtime feeds as many as a "
                "sound has, and expects a token for four of them"
            )
        if self.kind == "image" and isinstance(shape[1], int) and (self.patches is None or shape[1] < self.patches):
            raise PassError(
                f"{first} is {one}: an image may have {self.patches or 'any number of'} patches", hint=_SMALLER
            )

    def _wanted(self, graph: GraphProto) -> dict[str, tuple[str, tuple[Any, ...], TensorType]]:
        """What differs: name -> the dtype and shape that the runtime needs, and those that are declared."""
        values = {value.name: tensor_type(value) for value in (*graph.input, *graph.output)}
        wanted = {}
        first, second = self._inputs
        for name, dtype in ((first, "FLOAT"), (second, None), (self._features, "FLOAT")):
            declared = values.get(name)
            if declared is None or declared.shape is None:
                raise PassError(f"{name} is {declared or 'not in the interface'}")
            needed = dtype or (declared.dtype if self.kind == "image" else "BOOL")
            shape = declared.shape
            if self.kind == "image" and name == self._features:
                shape = shape if len(shape) == 2 else ("num_image_tokens", shape[-1])
            elif self.kind == "image" and isinstance(shape[1], int):
                shape = (shape[0], "num_patches", *shape[2:])
            if (needed, shape) != (declared.dtype, declared.shape):
                wanted[name] = (needed, shape, declared)
        return wanted

    def _adapt(self, model: Model) -> list[Finding]:
        wanted = self._wanted(model.graph)
        findings = []
        for name, (dtype, shape, declared) in wanted.items():
            inner = fresh(f"{SCOPE}/{name}", value_names(model.graph))
            rename(model.graph, {name: inner})
            with model.edited() as view:
                new = NodeBuilder().variable(name, _NUMPY[dtype], list(shape))
                if name == self._features:
                    _adapt_output(view, inner, new)
                else:
                    _adapt_input(view, inner, new, fill=-1 if name == IMAGE_INPUTS[1] else 0)
            findings.append(Finding("changed", name, f"{declared}; it is {TensorType(dtype, shape)} now"))
        return findings


_NUMPY = {"FLOAT": "float32", "BOOL": "bool", "INT64": "int64", "INT32": "int32"}
_SMALLER = "a smaller max_soft_tokens in processor_config.json's image_processor makes smaller images"


def _axes(kind: Modality) -> str:
    return "images, patches, values of a patch" if kind == "image" else "1, frames, mel bins"


def _adapt_output(view: gs.Graph, inner: str, new: gs.Variable) -> None:
    """Cast and Reshape after the encoder, as far as they are needed."""
    make = NodeBuilder(f"{SCOPE}/{new.name}", nodes=view.nodes)
    old = current = next(tensor for tensor in view.outputs if tensor.name == inner)
    reshaped = len(old.shape) != len(new.shape)
    if old.dtype != new.dtype:
        current = make("Cast", [old], new.dtype, None, "Cast", to=FLOAT)
    if reshaped:
        rows = make.constant([-1, new.shape[-1]], label="rows")
        current = make("Reshape", [current, rows], new.dtype, None, "Reshape")
    make.nodes[-1].outputs = [new]
    view.outputs[view.outputs.index(old)] = new


def _adapt_input(view: gs.Graph, inner: str, new: gs.Variable, fill: int) -> None:
    """Pad and Cast before the encoder, as far as they are needed."""
    import numpy as np

    make = NodeBuilder(f"{SCOPE}/{new.name}")
    old = next(tensor for tensor in view.inputs if tensor.name == inner)
    view.inputs[view.inputs.index(old)] = new
    current = new
    if isinstance(old.shape[1], int) and not isinstance(new.shape[1], int):
        count = make("Shape", [new], "int64", [1], "Shape", start=1, end=2)
        missing = make("Sub", [make.constant([old.shape[1]], label="most"), count], "int64", [1], "Sub")
        pads = make("Concat", [make.constant([0], label="none"), missing], "int64", [2], "Concat", axis=0)
        value, axis = make.constant(fill, new.dtype, "value"), make.constant([1], label="axis")
        current = make("Pad", [new, pads, value, axis], old.dtype, None, "Pad")
    if old.dtype != new.dtype:
        to = {"float16": FLOAT16, "int64": INT64, "int32": INT32}[np.dtype(old.dtype).name]
        make("Cast", [current], old.dtype, None, "Cast", to=to)
    make.nodes[-1].outputs = [old]
    view.nodes[:0] = make.nodes
