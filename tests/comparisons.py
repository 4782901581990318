"""Comparisons made by hand, for what draws them: one as a repack of E2B gives it, one with nothing in it, one hostile."""

from __future__ import annotations

from dataclasses import replace

from surgery.compare.comparison import (
    Comparison,
    Edit,
    FieldChange,
    FileChange,
    GraphSummary,
    InterfaceChange,
    InterfaceValue,
    LayerCache,
    LayerChange,
    NodeChange,
    NodeGroup,
    Nodes,
    NumberGate,
    Numbers,
    PassFinding,
    PassRecord,
    Reason,
    SideSummary,
    Weight,
    WeightChange,
    Weights,
)

LAYERS, OWNERS = 35, 15
EVIL = "<script>document.title='owned'</script>\"'&\x1b[2J\u202e"
MERGED = Reason("merge-embeddings", "embed_tokens computes it now")


def cache(index: int, *, aliased: bool = True) -> LayerCache:
    full = index % 5 == 4
    owner = index if index < OWNERS else (14 if full else 13)
    return LayerCache(
        operator="Softmax" if full or index >= OWNERS else "GroupQueryAttention",
        attention="full" if full else "sliding", head_size=512 if full else 256, kv_heads=1, owner=owner,
        window=None if full else 512, past=f"past_key_values.{owner}.key", present=f"present.{owner}.key",
        alias=f"present.{index}.key" if aliased and index >= OWNERS else None,
    )  # fmt: skip


def nothing() -> Comparison:
    """Two models that are the same."""
    graph = GraphSummary("model", "model.onnx", "5f" * 32, 1634, 1900, 0)
    side = SideSummary("model.onnx", "file", (graph,), 3_110_000_000)
    weights = Weights("reference", (), (), 1400, 0, 0, ("the same file, offset and length",), ())
    layers = tuple(LayerChange(index, cache(index), cache(index)) for index in range(LAYERS))
    return Comparison(side, replace(side, label="out/"), (), layers, (), Nodes((), 1634), weights, (), None, ())


def repacked() -> Comparison:
    """A pair of E2B against its folder, about as the real report is."""
    embed = GraphSummary("embed_tokens", "onnx/embed_tokens_q4f16.onnx", "ab" * 32, 15, 20, 0)
    decoder = GraphSummary("decoder", "onnx/decoder_model_merged_q4f16.onnx", "cd" * 32, 1600, 1880, 0)
    merged = GraphSummary("model", "model.onnx", "ef" * 32, 1662, 1900, 1)
    before = SideSummary("onnx-community/gemma-4-E2B-it-ONNX q4f16", "pair", (embed, decoder), 3_110_000_000)
    after = SideSummary("out/", "folder", (merged,), 3_110_000_000)
    layers = tuple(
        LayerChange(k, cache(k, aliased=False), cache(k), () if k < OWNERS else (Reason("expand-shared-kv", "alias"),))
        for k in range(LAYERS)
    )
    aliases = tuple(
        NodeChange(
            "added", "Identity", None, f"/model/layers.{k}/alias/{kind}", "model", "", k,
            (), (Reason("expand-shared-kv", f"alias of layer {14 if k % 5 == 4 else 13}'s"),),
        )
        for k in range(OWNERS, LAYERS) for kind in ("key", "value")
    )  # fmt: skip
    moved = tuple(
        NodeChange("moved", op, f"/model/embed/{op}_{k}", f"/model/embed/{op}_{k}", "model", "", None, (), (MERGED,))
        for k, op in enumerate(["GatherBlockQuantized", "Equal", "And", "Not", "Where", "Mul", "Less", "Reshape"] * 2)
    )
    rewired = tuple(
        NodeChange(
            "changed", "Gather", f"/model/layers.{k}/per_layer/slice/Gather", f"/model/layers.{k}/per_layer/slice/Gather",
            "model", "", k, (Edit("input 0", "per_layer_inputs", "/model/embed/per_layer/Reshape/output_0"),
                             Edit("attribute axis", "1", "2"), Edit("type of output 0", "FLOAT16 [b, s, 256]", "FLOAT16 [b, s, 1, 256]")), (MERGED,),
        )
        for k in range(LAYERS)
    )  # fmt: skip
    renamed = tuple(
        NodeChange(
            "renamed",
            "com.microsoft::GroupQueryAttention",
            f"/old/{k}/MatMul",
            f"/model/layers.{k}/mlp/MatMul",
            "model",
            "",
            k,
        )
        for k in range(LAYERS)
        for _ in range(4)
    )
    in_body = NodeChange("removed", "Slice", "/lm_head/Slice", None, "decoder", "If '/gate' then_branch", None)
    nodes = Nodes(
        (
            NodeGroup(("merge-embeddings",), (), moved),
            NodeGroup(("merge-embeddings",), tuple(range(LAYERS)), rewired),
            NodeGroup(("expand-shared-kv",), tuple(range(OWNERS, LAYERS)), aliases),
            NodeGroup((), tuple(range(LAYERS)), renamed),
            NodeGroup(("fold-logits-to-keep",), (), (in_body,)),
        ),
        1200,
    )
    interface = [
        InterfaceChange("removed", "input", InterfaceValue("inputs_embeds", "FLOAT16 [batch_size, sequence_length, 1536]"), None, "", (MERGED,)),
        InterfaceChange("added", "input", None, InterfaceValue("input_ids", "INT64 [batch_size, sequence_length]"), "it was an input of embed_tokens", (Reason("merge-embeddings"),)),
        InterfaceChange("changed", "output", InterfaceValue("logits", "FLOAT16 [batch_size, num_logits_to_keep, 262144]"), InterfaceValue("logits", "FLOAT16 [batch_size, 1, 262144]"), "", (Reason("fold-logits-to-keep", "logits of the last token"),)),
    ]  # fmt: skip
    interface += [
        InterfaceChange(
            "added", "output", None, InterfaceValue(f"present.{k}.{kind}", f"FLOAT16 [batch_size, 1, total_sequence_length, {512 if k % 5 == 4 else 256}]"),
            "", (Reason("expand-shared-kv", f"alias of layer {14 if k % 5 == 4 else 13}'s"),),
        )
        for k in range(OWNERS, LAYERS) for kind in ("key", "value")
    ]  # fmt: skip
    inline = Weight("/model/constants/INT64/[0, 0, 10, 32]", "INT64 [4]", 32, None, None)
    stored = Weight("model.embed_tokens.weight", "UINT8 [262144, 1, 768]", 201_326_592, "embed.onnx_data", 4096)
    weights = Weights(
        "reference",
        (WeightChange("added", None, inline), WeightChange("renamed", stored, replace(stored, name="embed/model.embed_tokens.weight"))),
        (FileChange("decoder_model_merged_q4f16.onnx_data", 1_500_000_000, 1_500_000_000, True), FileChange("model.onnx", None, 652_311, False)),
        1400, 12, 0, ("SHA-256 of the data files, offset and length",), (),
    )  # fmt: skip
    gates = (
        NumberGate("numbers", "logits", True, "max |difference| 0, at most 0"),
        NumberGate("runtime", "og.Model loads the folder", True, ""),
    )
    passes = (
        PassRecord("merge-embeddings", {"And": 2, "Where": 1}, (PassFinding("removed", "inputs_embeds", MERGED.text),)),
        PassRecord("expand-shared-kv", {"Identity": 40}, (PassFinding("added", "present.15.key|value", "alias"),)),
    )
    return Comparison(
        before, after, tuple(interface), layers,
        (FieldChange("added", "gemma4_surgery.layers", None, '{"version":1,"layers":[...]}', (Reason("annotate-head-sizes"),)),),
        nodes, weights, (FieldChange("changed", "search.max_length", "4096", "8192"),),
        Numbers("repack's closing proof", True, True, "37 of 37 gates passed", gates), passes,
    )  # fmt: skip


def hostile() -> Comparison:
    """Names, values and paths that would run, hide or reach out if they were pasted into a page."""
    found = nothing()
    node = NodeChange(
        "changed", EVIL, EVIL, EVIL + "2", EVIL, EVIL, 3, (Edit(EVIL, EVIL, None),), (Reason(EVIL, EVIL),)
    )
    image = "<img src=http://evil.example/x onerror=alert(1)>"
    return replace(
        found,
        before=replace(found.before, label=EVIL),
        interface=(InterfaceChange("added", "input", None, InterfaceValue(EVIL, image), image),),
        metadata=(FieldChange("changed", image, EVIL, "</style></script><b>"),),
        nodes=Nodes((NodeGroup((EVIL,), (3,), (node,)),), 5),
        layers=(LayerChange(0, replace(cache(0), operator=EVIL, attention=EVIL), None), *found.layers[1:]),
        weights=replace(found.weights, uncompared=3, why=(image,), files=(FileChange(EVIL, 1, None, None),)),
    )
