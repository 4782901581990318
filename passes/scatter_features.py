"""scatter-features: embed_tokens takes the encoders' features and puts them where the placeholders are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from passes.base import Finding, Pass
from surgery.errors import PassError
from surgery.graph.model import Model
from surgery.graph.node_builder import NodeBuilder
from surgery.graph.renaming import fresh, rename
from surgery.graph.scopes import value_names
from surgery.graph.tensor_types import TensorType, tensor_type

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    from onnx import GraphProto

IDS = "input_ids"
EMBEDS = "inputs_embeds"
SCOPE = "/model/media"


@dataclass(frozen=True)
class ScatterFeatures(Pass):
    """Replace the embeddings of placeholder tokens by the features of an image or a sound.

            before                            after, image=258880

            input_ids [B,S]                   input_ids [B,S]              image_features [n,H]
                |                                 |         |                     |
            [embed_tokens]                  [embed_tokens]  Equal(258880)         |
                |                                 |         And(S + n > 1)        |
                |                                 |         Reshape [B*S]         |
            inputs_embeds [B,S,H]           Reshape [B*S,H] NonZero [1,n]         |
                                                  |         Transpose [n,1]       |
                                                  +----> ScatterND <--------------+
                                                             |
                                                       Reshape -> inputs_embeds [B,S,H]

        `image` and `audio` are token ids; one that is left out gets no input. Features are taken as they come, unscaled,
        row by row in the order of the placeholders (transformers does the same). No feature and no placeholder is a
        prompt of text, or a step of decoding: [0,H]. A number of features other than that of the placeholders fails in
        ScatterND, `updates tensor should have shape equal to indices.shape[:-1] + data.shape[...]`; forms that gather
        features by position write zeros there, or drop features, without a word. Only a placeholder that a model generates,
    which comes alone in its step and has no feature, keeps the embedding of its own: generation goes on, as it does in
    a loop around the two graphs.

        Requires: input_ids integer [B,S]; inputs_embeds floating-point [B,S,H], H a number, made by a node; opset 16.
        Ensures: image_features and audio_features, as asked for, are inputs [n,H] of the dtype of inputs_embeds.
    """

    name: ClassVar[str] = "scatter-features"
    summary: ClassVar[str] = "image and audio features replace the embeddings of their placeholder tokens"

    image: int | None = None
    audio: int | None = None

    @property
    def tokens(self) -> dict[str, int]:
        """Input of features -> placeholder token id."""
        given = {"image_features": self.image, "audio_features": self.audio}
        return {name: token for name, token in given.items() if token is not None}

    def requires(self, model: Model) -> None:
        if not self.tokens:
            raise PassError("no placeholder token is given; write image=ID, audio=ID or both")
        if len(set(self.tokens.values())) < len(self.tokens):
            raise PassError(f"image and audio are both token {self.image}; each placeholder has an id of its own")
        if not (missing := self._missing(model.graph)):
            return
        _check_embedding(model.graph)
        if model.opset() < 16:
            raise PassError(f"ScatterND as it is used here needs opset 16, the model has {model.opset()}")
        if taken := value_names(model.graph) & missing.keys():
            raise PassError(f"a value inside the graph is named {min(taken)!r}, which the new input needs")

    def run(self, model: Model) -> list[Finding]:
        graph = model.graph
        missing = self._missing(graph)
        findings = [
            Finding("skipped", name, "the graph takes it already") for name in self.tokens if name not in missing
        ]
        if not missing:
            return findings
        scope = f"{SCOPE}/{'_and_'.join(_kind(name) for name in missing)}"  # a later run for the other kind has its own
        inner = fresh(f"{scope}/{EMBEDS}", value_names(graph))
        output = next(value for value in graph.output if value.name == EMBEDS)
        declared = tensor_type(output)
        rename(graph, {EMBEDS: inner})
        with model.edited() as view:
            _scatter(view, inner, missing, scope)
        for name, token in missing.items():
            assert declared is not None and declared.shape is not None  # `requires` has looked
            reason = f"graph input, {declared.dtype} [n, {declared.shape[-1]}], for each token {token} in turn"
            findings.append(Finding("added", name, reason))
        return findings

    def ensures(self, model: Model) -> None:
        inputs = {value.name: tensor_type(value) for value in model.graph.input}
        for name in self.tokens:
            declared = inputs.get(name)
            if declared is None or declared.shape is None or len(declared.shape) != 2:
                raise PassError(f"{name} is {declared or 'no input'}; an input [features, hidden size] is expected")

    def _missing(self, graph: GraphProto) -> dict[str, int]:
        inputs = {value.name for value in graph.input}
        return {name: token for name, token in self.tokens.items() if name not in inputs}


def _check_embedding(graph: GraphProto) -> None:
    ids = {value.name: tensor_type(value) for value in graph.input}.get(IDS)
    if ids is None or ids.dtype not in ("INT64", "INT32") or ids.shape is None or len(ids.shape) != 2:
        raise PassError(f"{IDS} is {ids or 'no input'}; token ids, INT64 or INT32 [batch, sequence], are expected")
    embeds = {value.name: tensor_type(value) for value in graph.output}.get(EMBEDS)
    if not _is_embedding(embeds):
        raise PassError(
            f"{EMBEDS} is {embeds or 'no output'}; floats [batch, sequence, hidden size] with a number for the last "
            "are expected"
        )
    if all(EMBEDS not in node.output for node in graph.node):
        raise PassError(f"output {EMBEDS!r} comes from no node")


def _is_embedding(declared: TensorType | None) -> bool:
    if declared is None or "FLOAT" not in declared.dtype or declared.shape is None or len(declared.shape) != 3:
        return False
    return isinstance(declared.shape[2], int)


def _kind(name: str) -> str:
    return name.removesuffix("_features")


def _scatter(view: gs.Graph, inner: str, tokens: dict[str, int], scope: str) -> None:
    """Nodes at the end of the graph, from the value `inner` to a new output inputs_embeds."""
    make = NodeBuilder(scope, nodes=view.nodes)
    ids = next(tensor for tensor in view.inputs if tensor.name == IDS)
    embeds = next(tensor for tensor in view.outputs if tensor.name == inner)
    size = embeds.shape[-1]
    rows = make("Reshape", [embeds, make.constant([-1, size])], embeds.dtype, ["tokens", size], "Rows")
    for name, token in tokens.items():
        kind = _kind(name)
        count = f"num_{kind}_tokens"
        features = NodeBuilder().variable(name, embeds.dtype, [count, size])
        view.inputs.append(features)
        placeholder = make.constant(token, ids.dtype, f"constants/{kind}_token")
        found = make("Equal", [ids, placeholder], bool, ids.shape, f"{kind}/Equal")
        width = make("Shape", [ids], "int64", [1], f"{kind}/Shape", start=1, end=2)
        given = make("Shape", [features], "int64", [1], f"{kind}/Shape_1", start=0, end=1)
        total = make("Add", [width, given], "int64", [1], f"{kind}/Add")
        prompt = make("Greater", [total, make.constant([1])], bool, [1], f"{kind}/Greater")
        found = make("And", [found, prompt], bool, ids.shape, f"{kind}/And")
        found = make("Reshape", [found, make.constant([-1])], bool, ["tokens"], f"{kind}/Reshape")
        places = make("NonZero", [found], "int64", [1, count], f"{kind}/NonZero")
        places = make("Transpose", [places], "int64", [count, 1], f"{kind}/Transpose", perm=[1, 0])
        rows = make("ScatterND", [rows, places, features], embeds.dtype, ["tokens", size], f"{kind}/ScatterND")
    shape = make("Shape", [embeds], "int64", [3], "Shape")
    result = NodeBuilder().variable(EMBEDS, embeds.dtype, embeds.shape)
    view.outputs[view.outputs.index(embeds)] = make.into(result, "Reshape", [rows, shape], "Reshape")
