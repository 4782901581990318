"""The interface of the encoders of images and sound, as an export publishes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.choices import Modality
from surgery.errors import ModelError
from surgery.graph.tensor_types import tensor_type

if TYPE_CHECKING:
    from onnx import GraphProto

FLOATS = ("FLOAT", "FLOAT16")


def encoder_inputs(graph: GraphProto) -> tuple[str, str]:
    """The floating-point input of an encoder, and the one that says where its values are. Raises ModelError."""
    inputs = {value.name: tensor_type(value) for value in graph.input}
    floats = [name for name, declared in inputs.items() if declared and declared.dtype in FLOATS]
    others = [name for name in inputs if name not in floats]
    if len(floats) != 1 or len(others) != 1:
        listed = ", ".join(f"{name} {declared}" for name, declared in inputs.items()) or "nothing"
        raise ModelError(f"an encoder takes values, and places or a mask of them; this one takes {listed}")
    return floats[0], others[0]


def encoder_output(graph: GraphProto, modality: Modality) -> str:
    """The features of an encoder: the output of that name, or the only floating-point one. Raises ModelError."""
    outputs = {value.name: tensor_type(value) for value in graph.output}
    floats = [name for name, declared in outputs.items() if declared and declared.dtype in FLOATS]
    name = f"{modality}_features"
    if name in floats or len(floats) == 1:
        return name if name in floats else floats[0]
    raise ModelError(f"floating-point {name} are expected; the outputs are {', '.join(outputs)}")
