"""merge-embeddings: one graph computes what the two computed, bit for bit, and no name is lost or mixed up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import small
from onnx import ModelProto, TensorProto
from onnx.helper import make_function, make_graph, make_node, make_operatorsetid, make_tensor_value_info
from onnx.numpy_helper import from_array
from small import (
    FLOAT,
    HIDDEN,
    INT32,
    INT64,
    LAYERS,
    Array,
    applied,
    decoder,
    embed_tokens,
    feeds,
    opened,
    refused,
    run,
    run_pair,
)  # fmt: skip

from passes import MergeEmbeddings
from passes.base import Outcome, apply
from passes.recipe import recipe_text
from surgery.errors import PassError, RecipeError
from surgery.graph.model import Model
from surgery.graph.renaming import rename


def merging(folder: Path, embed: ModelProto) -> MergeEmbeddings:
    return MergeEmbeddings(opened(folder, embed, "embed.onnx").path)


def assert_same_numbers(
    model: Model, embed: ModelProto, decode: ModelProto, given: dict[str, Array] | None = None
) -> None:
    given = given or feeds(np.ones((1, 6), np.int64), 2)
    truth, found = run_pair(embed, decode, given), run(model.proto, given)
    assert list(truth) == list(found)
    for name, values in truth.items():
        np.testing.assert_array_equal(found[name], values, strict=True, err_msg=name)


@pytest.mark.parametrize("per_layer", [True, False])
@pytest.mark.parametrize(
    ("batch", "total", "past"), [(2, 5, 0), (1, 6, 2), (2, 4, 3)], ids=["prefill", "chunk", "decode"]
)
def test_the_merged_graph_computes_what_the_pair_computes(
    per_layer: bool, batch: int, total: int, past: int, tmp_path: Path
) -> None:
    embed, decode = embed_tokens(per_layer=per_layer), decoder(per_layer=per_layer)
    model, outcome = applied(tmp_path, decode, merging(tmp_path, embed))
    assert outcome.changed
    assert_same_numbers(model, embed, decode, feeds(np.ones((batch, total), np.int64), past))


def test_the_embedding_graph_may_be_a_model_in_memory(tmp_path: Path) -> None:
    """It stays as it is, gives what its file gives, and no recipe can write it."""
    expected, _ = applied(tmp_path, decoder(), merging(tmp_path, embed_tokens()))
    embed = Model.from_proto(embed_tokens())
    before = embed.fingerprint()
    found, _ = apply(Model.from_proto(decoder()), [MergeEmbeddings(embed)])
    assert found.proto == expected.proto and embed.fingerprint() == before
    with pytest.raises(RecipeError, match="a Model in memory has no name that a recipe could write; give a file"):
        recipe_text([MergeEmbeddings(embed)])


def test_the_interface_takes_token_ids_in_place_of_embeddings(tmp_path: Path) -> None:
    model, outcome = applied(tmp_path, decoder(), merging(tmp_path, embed_tokens()))
    assert [value.name for value in model.graph.input][:5] == [
        "input_ids", "attention_mask", "position_ids", "num_logits_to_keep", "past_key_values.0.key",
    ]  # fmt: skip
    inner = {value.name for value in model.graph.value_info}
    assert {"inputs_embeds", "per_layer_inputs"} <= inner
    assert [str(finding) for finding in outcome.findings[:3]] == [
        "added input_ids: graph input, INT64 [batch_size, sequence_length]",
        "removed inputs_embeds: graph input; embed_tokens computes it now",
        "removed per_layer_inputs: graph input; embed_tokens computes it now",
    ]


def test_embedding_nodes_stand_before_their_first_consumer_and_the_rest_keeps_its_order(tmp_path: Path) -> None:
    decode = decoder()
    order = [node.name for node in decode.graph.node]
    first = next(i for i, node in enumerate(decode.graph.node) if "inputs_embeds" in node.input)
    assert first > 0, "the decoder begins with something else, or this test tests nothing"
    model, _ = applied(tmp_path, decode, merging(tmp_path, embed_tokens()))
    names = [node.name for node in model.graph.node]
    added = [node.name for node in embed_tokens().graph.node]
    assert names == order[:first] + added + order[first:]


def test_symbolic_sizes_get_the_decoders_names(tmp_path: Path) -> None:
    embed = embed_tokens()
    embed.graph.value_info.append(
        make_tensor_value_info("/model/embed_tokens/Gather/output_0", FLOAT, ["batch", "tokens", 16])
    )
    model, _ = applied(tmp_path, decoder(), merging(tmp_path, embed))
    dims = {
        dim.dim_param
        for value in (*model.graph.input, *model.graph.value_info)
        for dim in value.type.tensor_type.shape.dim
    }
    assert not dims & {"batch", "tokens"}


def test_a_second_run_finds_nothing_to_do_and_does_not_need_the_file(tmp_path: Path) -> None:
    model, _ = applied(tmp_path, decoder(), merging(tmp_path, embed_tokens()))
    (tmp_path / "embed.onnx").unlink()
    again, (outcome,) = apply(model, [MergeEmbeddings(tmp_path / "embed.onnx")])
    assert not outcome.changed and again.proto == model.proto
    assert [str(finding) for finding in outcome.findings] == [
        "skipped input_ids: the graph takes token ids already and no embeddings"
    ]


def test_a_decoder_with_oddly_named_positions_is_not_taken_for_merged(tmp_path: Path) -> None:
    decode = decoder()
    rename(decode.graph, {"position_ids": "pos", "inputs_embeds": "embeds"})
    refused(
        tmp_path,
        decode,
        merging(tmp_path, embed_tokens()),
        "gives 'inputs_embeds', which the decoder does not take; it takes embeds, ",
    )


def test_what_the_decoder_had_is_as_it_was(tmp_path: Path) -> None:
    decode = decoder()
    for node in decode.graph.node:
        node.metadata_props.add(key="k", value=node.name)
    decode.graph.doc_string = "kept"
    model, _ = applied(tmp_path, decode, merging(tmp_path, embed_tokens()))
    own = {node.name: node for node in model.graph.node}
    assert all(own[node.name] == node for node in decode.graph.node)
    assert list(model.graph.initializer)[: len(decode.graph.initializer)] == list(decode.graph.initializer)
    assert model.graph.doc_string == "kept"


# Names


@pytest.mark.parametrize(
    "taken",
    [
        "attention_mask",
        "logits",
        "present.0.key",
        "past_key_values.1.value",
        "/model/masks/Bias/output_0",
        "lm_head.weight",
    ],
)
def test_an_inner_value_of_the_embedding_that_the_decoder_knows_as_something_else(taken: str, tmp_path: Path) -> None:
    embed, decode = embed_tokens(), decoder()
    rename(embed.graph, {"/model/embed_tokens/Gather/output_0": taken})
    model, outcome = applied(tmp_path, decode, merging(tmp_path, embed))
    assert any(
        finding.subject == taken and "renamed to embed_tokens/" in finding.reason for finding in outcome.findings
    )
    assert_same_numbers(model, embed, decode)


def test_initializers_of_one_name_stay_two(tmp_path: Path) -> None:
    embed, decode = embed_tokens(), decoder()
    rename(embed.graph, {"model.embed_tokens.weight": "lm_head.weight", "embed_scale": "lowest"})
    model, _ = applied(tmp_path, decode, merging(tmp_path, embed))
    names = [tensor.name for tensor in model.graph.initializer]
    assert len(set(names)) == len(names) and {"embed_tokens/lm_head.weight", "embed_tokens/lowest"} <= set(names)
    assert_same_numbers(model, embed, decode)


def test_nodes_of_one_name_stay_two_and_the_prefix_is_free(tmp_path: Path) -> None:
    embed, decode = embed_tokens(), decoder()
    embed.graph.node[0].name = embed.graph.node[1].name = "/lm_head/MatMul"
    decode.graph.node[0].name = "embed_tokens/lm_head/MatMul"
    model, _ = applied(tmp_path, decode, merging(tmp_path, embed))
    names = [node.name for node in model.graph.node]
    assert names.count("/lm_head/MatMul") == 1 and names.count("embed_tokens/lm_head/MatMul_2") == 2


def embedding_with_an_if(taken: str, own: str) -> ModelProto:
    """inputs_embeds = If(true): scaled table rows; the branch captures `taken` and defines `own`."""
    embed = embed_tokens()
    scale = embed.graph.node[1]
    rename(embed.graph, {"/model/embed_tokens/Gather/output_0": taken})
    result = [make_tensor_value_info(own, FLOAT, None)]
    then = make_graph([make_node("Mul", [taken, "embed_scale"], [own], name="/lm_head/MatMul")], "then", [], result)
    other = make_graph([make_node("Neg", [taken], [own])], "else", [], result)
    choice = make_node("If", ["always"], ["inputs_embeds"], "if", then_branch=then, else_branch=other)
    scale.CopyFrom(choice)
    embed.graph.initializer.append(from_array(np.array(True), "always"))
    return embed


@pytest.mark.parametrize("own", ["attention_mask", "result", "logits"])
def test_names_inside_if_bodies_are_renamed_with_the_rest(own: str, tmp_path: Path) -> None:
    embed, decode = embedding_with_an_if("/model/masks/Bias/output_0", own), decoder()
    model, _ = applied(tmp_path, decode, merging(tmp_path, embed))
    assert_same_numbers(model, embed, decode)


def test_a_shadowing_value_in_an_if_body_still_shadows(tmp_path: Path) -> None:
    """The branch has an initializer of the name that the outer graph and the decoder use, too."""
    embed, decode = embedding_with_an_if("logits", "result"), decoder()
    body = next(attribute.g for attribute in embed.graph.node[1].attribute if attribute.name == "then_branch")
    body.initializer.append(from_array(np.full((1, 1, 16), 2, np.float32), "logits"))
    body.node.insert(0, make_node("Expand", ["logits", "shape"], ["wide"]))
    body.node[1].input[0] = "wide"
    body.initializer.append(from_array(np.array([1, 4, 16]), "shape"))
    model, _ = applied(tmp_path, decode, merging(tmp_path, embed))
    given = feeds(np.ones((1, 6), np.int64), 2)
    body.initializer[0].name, body.node[0].input[0] = "hidden", "hidden"  # for the truth: ORT refuses shadowing
    inner = next(
        a.g for node in model.graph.node if node.op_type == "If" for a in node.attribute if a.name == "then_branch"
    )
    assert inner.initializer[0].name == inner.node[0].input[0] == "embed_tokens/logits"
    inner.initializer[0].name = inner.node[0].input[0] = "hidden"
    assert_same_numbers(model, embed, decode, given)


def test_a_sparse_initializer_and_annotations_come_along(tmp_path: Path) -> None:
    embed = embed_tokens()
    sparse = embed.graph.sparse_initializer.add()
    sparse.values.CopyFrom(from_array(np.ones(1, np.float32), "lm_head.weight"))
    sparse.indices.CopyFrom(from_array(np.zeros(1, np.int64)))
    embed.graph.quantization_annotation.add(tensor_name="lm_head.weight")
    model, _ = applied(tmp_path, decoder(), merging(tmp_path, embed))
    assert [entry.values.name for entry in model.graph.sparse_initializer] == ["embed_tokens/lm_head.weight"]
    assert model.graph.quantization_annotation[0].tensor_name == "embed_tokens/lm_head.weight"


# Weight files


def outsource(proto: ModelProto, name: str, path: Path, location: str) -> None:
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


def with_files(folder: Path, embed_location: str, decoder_location: str, *, apart: bool) -> tuple[Model, Outcome]:
    embed, decode = embed_tokens(), decoder()
    other = folder / "other" if apart else folder
    outsource(decode, "lm_head.weight", folder / decoder_location, decoder_location)
    if apart:
        outsource(embed, "model.embed_tokens.weight", other / embed_location, embed_location)
    else:
        (tensor,) = (t for t in embed.graph.initializer if t.name == "model.embed_tokens.weight")
        shape = [int(d) for d in tensor.dims]
        tensor.CopyFrom(TensorProto(name=tensor.name, data_type=FLOAT, dims=shape, data_location=TensorProto.EXTERNAL))
        tensor.external_data.add(key="location", value=embed_location)
    path = opened(other, embed, "embed.onnx").path
    model, (outcome,) = apply(opened(folder, decode), [MergeEmbeddings(path)])
    return model, outcome


@pytest.mark.parametrize(("embed", "moved"), [("w.data", "embed_tokens.w.data"), ("./w.data", "embed_tokens.w.data")])
def test_two_files_of_one_name_are_told_apart(embed: str, moved: str, tmp_path: Path) -> None:
    model, outcome = with_files(tmp_path, embed, "w.data", apart=True)
    assert model.used_weight_files() == {"w.data": tmp_path / "w.data", moved: tmp_path / "other" / embed}
    assert any(finding.subject == embed and f"placed as {moved}" in finding.reason for finding in outcome.findings)
    (tmp_path / "out").mkdir()
    model.save(tmp_path / "out" / "model.onnx")
    import onnxruntime as ort

    session = ort.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    given = feeds(np.ones((1, 6), np.int64), 2)
    truth = run_pair(embed_tokens(), decoder(), given)["logits"]
    np.testing.assert_allclose(session.run(["logits"], given)[0], truth, atol=1e-5)


def test_two_files_of_one_name_in_a_folder(tmp_path: Path) -> None:
    model, _ = with_files(tmp_path, "data/w.data", "data/w.data", apart=True)
    assert list(model.used_weight_files()) == ["data/w.data", "data/embed_tokens.w.data"]


def test_one_file_of_both_graphs_stays_one(tmp_path: Path) -> None:
    model, _ = with_files(tmp_path, "w.data", "w.data", apart=False)
    assert model.used_weight_files() == {"w.data": tmp_path / "w.data"}


def test_weights_are_not_read(tmp_path: Path) -> None:
    embed, decode = embed_tokens(), decoder()
    outsource(embed, "model.embed_tokens.weight", tmp_path / "gone.data", "gone.data")
    (tmp_path / "gone.data").unlink()
    model, _ = applied(tmp_path, decode, merging(tmp_path, embed))
    assert model.used_weight_files() == {"gone.data": tmp_path / "gone.data"}


# Another rank, and inputs of images and sound


def of_rank_three(proto: ModelProto) -> ModelProto:
    """per_layer_inputs leave embed_tokens as they are looked up."""
    (reshape,) = [node for node in proto.graph.node if node.op_type == "Reshape"]
    rename(proto.graph, {reshape.input[0]: "per_layer_inputs", "per_layer_inputs": "gone"})
    proto.graph.node.remove(reshape)
    flat = make_tensor_value_info("per_layer_inputs", FLOAT, ["batch", "tokens", LAYERS * small.PER_LAYER])
    proto.graph.output[1].CopyFrom(flat)
    return proto


def test_per_layer_inputs_of_rank_three_are_reshaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "PER_LAYER", 6)  # not as many as layers
    model, outcome = applied(tmp_path, decoder(), merging(tmp_path, of_rank_three(embed_tokens())))
    assert "is reshaped to FLOAT [batch_size, sequence_length, 4, 6]" in "\n".join(map(str, outcome.findings))
    assert_same_numbers(model, embed_tokens(), decoder(), feeds(np.ones((2, 5), np.int64)))


def test_per_layer_inputs_of_another_size_are_refused(tmp_path: Path) -> None:
    embed = of_rank_three(embed_tokens())
    embed.graph.output[1].type.tensor_type.shape.dim[2].dim_value = LAYERS * small.PER_LAYER + 4
    refused(tmp_path, decoder(), merging(tmp_path, embed), "'per_layer_inputs' is .* but .* in the decoder")


def test_features_are_none(tmp_path: Path) -> None:
    """A graph that counts the features of images gives what it gives without any."""
    embed = embed_tokens()
    embed.graph.input.append(make_tensor_value_info("image_features", FLOAT, ["images", HIDDEN]))
    (scaled,) = [node for node in embed.graph.node if node.op_type == "Mul"]
    scaled.output[0] = "scaled"
    count = [make_node("Shape", ["image_features"], ["shape"], end=1), make_node("Cast", ["shape"], ["n"], to=FLOAT)]
    embed.graph.node.extend([*count, make_node("Add", ["scaled", "n"], ["inputs_embeds"])])
    model, outcome = applied(tmp_path, decoder(), merging(tmp_path, embed))
    assert next(finding.subject for finding in outcome.findings if finding.verb == "removed") == "image_features"
    assert_same_numbers(model, embed_tokens(), decoder())


def test_the_newer_ir_version_stays(tmp_path: Path) -> None:
    embed = embed_tokens()
    embed.ir_version += 1
    model, _ = applied(tmp_path, decoder(), merging(tmp_path, embed))
    assert model.proto.ir_version == embed.ir_version


# Refusals


@pytest.mark.parametrize(("embed_opset", "decoder_opset"), [(20, 21), (21, 23), (23, 21)])
def test_older_opset_is_raised_where_its_operators_stay_the_same(
    embed_opset: int, decoder_opset: int, tmp_path: Path
) -> None:
    embed, decode = embed_tokens(), decoder()
    given = feeds(np.ones((1, 5), np.int64), 2)
    truth = run(decode, given | run(embed, given))
    embed.opset_import[0].version, decode.opset_import[0].version = embed_opset, decoder_opset
    model, outcome = applied(tmp_path, decode, merging(tmp_path, embed))
    older, newer = sorted((embed_opset, decoder_opset))
    assert model.opset() == newer
    assert any(str(each).startswith(f"changed opset ai.onnx {older}: {newer} in") for each in outcome.findings)
    np.testing.assert_array_equal(run(model.proto, given)["logits"], truth["logits"])


def test_opset_is_not_raised_past_another_meaning(tmp_path: Path) -> None:
    """QuantizeLinear has a further attribute in 23."""
    embed, decode = embed_tokens(), decoder()
    decode.opset_import[0].version = 23
    codes = make_node("QuantizeLinear", ["embed_scale", "embed_scale"], ["codes"], name="round")
    embed.graph.node.append(codes)
    sentence = (
        r"embed\.onnx uses opset ai\.onnx 21, the decoder 23; one graph can have only one, and QuantizeLinear may"
    )
    refused(tmp_path, decode, merging(tmp_path, embed), sentence)


def test_other_versions_of_a_domain_that_is_not_onnx_are_refused(tmp_path: Path) -> None:
    embed = embed_tokens()
    embed.opset_import[1].version = 2
    refused(tmp_path, decoder(), merging(tmp_path, embed), r"uses opset com\.microsoft 2, the decoder 1")


def test_ai_onnx_and_the_empty_domain_are_one(tmp_path: Path) -> None:
    embed = embed_tokens()
    embed.opset_import[0].domain = "ai.onnx"
    model, _ = applied(tmp_path, decoder(), merging(tmp_path, embed))
    assert [(entry.domain, entry.version) for entry in model.proto.opset_import] == [("", 21), ("com.microsoft", 1)]


def test_a_domain_of_the_embedding_alone_is_imported(tmp_path: Path) -> None:
    embed = embed_tokens()
    embed.opset_import.append(make_operatorsetid("com.example", 3))
    model, _ = applied(tmp_path, decoder(), merging(tmp_path, embed))
    assert model.opset("com.example") == 3


def test_another_dtype_rank_or_size_is_refused(tmp_path: Path) -> None:
    for shape, dtype, found in (
        (["batch", "tokens", 16], TensorProto.FLOAT16, r"FLOAT16 \[batch, tokens, 16\]"),
        (["batch", "tokens"], FLOAT, r"FLOAT \[batch, tokens\]"),
        (["batch", "tokens", 24], FLOAT, r"FLOAT \[batch, tokens, 24\]"),
    ):
        embed = embed_tokens()
        embed.graph.output[0].CopyFrom(make_tensor_value_info("inputs_embeds", dtype, shape))
        expected = (
            rf"'inputs_embeds' is {found} in .*embed\.onnx but FLOAT \[batch_size, sequence_length, 16\] in the decoder"
        )
        refused(tmp_path, decoder(), merging(tmp_path, embed), expected)


def test_missing_per_layer_inputs_are_refused(tmp_path: Path) -> None:
    sentence = r"the decoder takes 'per_layer_inputs', but .*embed\.onnx gives only inputs_embeds"
    refused(tmp_path, decoder(), merging(tmp_path, embed_tokens(per_layer=False)), sentence)


def test_unasked_per_layer_inputs_are_refused(tmp_path: Path) -> None:
    refused(
        tmp_path,
        decoder(per_layer=False),
        merging(tmp_path, embed_tokens()),
        "gives 'per_layer_inputs', which the decoder does not take",
    )


def test_a_graph_that_is_no_embedding_is_refused(tmp_path: Path) -> None:
    refused(
        tmp_path,
        decoder(),
        merging(tmp_path, decoder()),
        "one input of token ids, INT64 .batch, sequence., is expected",
    )


def test_an_output_that_no_node_makes_is_refused(tmp_path: Path) -> None:
    embed = embed_tokens()
    del embed.graph.node[1]
    embed.graph.initializer.append(from_array(np.zeros((1, 1, 16), np.float32), "inputs_embeds"))
    refused(tmp_path, decoder(), merging(tmp_path, embed), "output 'inputs_embeds' comes from no node")


def test_an_ir_version_that_the_runtime_does_not_load_is_refused(tmp_path: Path) -> None:
    embed = embed_tokens()
    embed.ir_version = 14
    refused(tmp_path, decoder(), merging(tmp_path, embed), r"IR version 14 is newer than ONNX Runtime loads \(13\)")


def test_a_missing_embedding_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"merge-embeddings: .*none\.onnx does not exist"):
        apply(opened(tmp_path, decoder()), [MergeEmbeddings(tmp_path / "none.onnx")])


# Model fields


def test_functions_come_along_once_and_differing_ones_are_refused(tmp_path: Path) -> None:
    def function(op: str) -> object:
        return make_function(
            "com.example", "F", ["a"], ["b"], [make_node(op, ["a"], ["b"])], [make_operatorsetid("", 21)]
        )

    embed, decode = embed_tokens(), decoder()
    embed.functions.append(function("Neg"))
    model, _ = applied(tmp_path, decode, merging(tmp_path, embed))
    assert [f.name for f in model.proto.functions] == ["F"]
    decode.functions.append(function("Neg"))
    assert len(applied(tmp_path, decode, merging(tmp_path, embed))[0].proto.functions) == 1
    decode.functions[0].node[0].op_type = "Abs"
    refused(tmp_path, decode, merging(tmp_path, embed), "both graphs define a function com.example::F, and they differ")


def test_metadata_is_joined_and_the_decoders_stays(tmp_path: Path) -> None:
    embed, decode = embed_tokens(), decoder()
    for proto, value in ((embed, "e"), (decode, "d")):
        for place in (proto, proto.graph):
            place.metadata_props.add(key="both", value=value)
            place.metadata_props.add(key=f"only_{value}", value=value)
    model, outcome = applied(tmp_path, decode, merging(tmp_path, embed))
    for place in (model.proto, model.graph):
        assert {entry.key: entry.value for entry in place.metadata_props} == {"both": "d", "only_d": "d", "only_e": "e"}
    skipped = [str(finding) for finding in outcome.findings if finding.verb == "skipped"]
    assert skipped == [
        f"skipped {p} metadata 'both': both graphs have it; the decoder's stays" for p in ("model", "graph")
    ]


def test_token_ids_of_32_bits_are_taken(tmp_path: Path) -> None:
    embed = embed_tokens()
    embed.graph.input[0].type.tensor_type.elem_type = INT32
    model, _ = applied(tmp_path, decoder(), merging(tmp_path, embed))
    assert model.graph.input[0].type.tensor_type.elem_type == INT32 != INT64
