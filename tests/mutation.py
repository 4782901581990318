"""A seeded mutator of ONNX graphs and of JSON files: what a damaged download or a hostile author would send.

`mutated_model(data, rng)` and `mutated_json(value, rng)` give (what was done, bytes). One seed gives one result.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

ModelMutation = Callable[[ModelProto, random.Random], None]

ESCAPE = "\x1b[2J\x1b]0;owned\x07"
NAMES = [
    "", "x", "logits", "input_ids", "attention_mask", "position_ids", "inputs_embeds", "per_layer_inputs",
    "num_logits_to_keep", "past_key_values.0.key", "present.0.key", "present.99.value", "past_key_values.0.key.extra",
    "past_key_values.²", f"{ESCAPE}name", "a\nb", "a\0b", "n" * 100_000, "\u202egnp.exe", "../../etc/passwd", "/abs", "%d",
]  # fmt: skip
SIZES = [0, 1, -1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63)]
DTYPES = [0, 1, 2, 6, 7, 8, 9, 10, 11, 14, 16, 17, 22, 23, 24, 25, 26, 99, 2**31 - 1, -1]
OPERATORS = [
    "Softmax", "GroupQueryAttention", "MultiHeadAttention", "Attention", "MatMul", "Concat", "Slice", "Neg", "Identity",
    "If", "Loop", "Constant", "Unsqueeze", "", "Reshape", "Gather", "RotaryEmbedding", "NoSuchOperator", ESCAPE,
]  # fmt: skip
LOCATIONS = [
    "../w.data", "/etc/passwd", "a/../../w.data", "", ".", "w.data\0.txt", "C:\\w.data", "\\\\host\\w", "sub/w.data", "./w.data",
    "model.onnx", "genai_config.json", "config.json", "tokenizer.json", "manifest.json", "decoder_model_merged_q4.onnx",
    ".", "..", "embed_tokens_q4.onnx_data", "n" * 300, f"{ESCAPE}.data", "missing.data",
]  # fmt: skip
NUMBERS = [
    "-1",
    "1e3",
    "0x10",
    "",
    " 1",
    "+1",
    "999999999999999999999999",
    str(2**63),
    str(2**64 - 1),
    "9" * 5000,
    "٣",
    "NaN",
    "0",
    "1",
]


def mutated_model(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    if rng.random() < 0.25:
        return _damaged(data, rng)
    proto = ModelProto()
    proto.ParseFromString(data)
    done = []
    try:
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            mutation = rng.choice(MUTATIONS)
            done.append(mutation.__name__)
            mutation(proto, rng)
        return "+".join(done), proto.SerializeToString()
    except (UnicodeEncodeError, DecodeError):  # half a surrogate pair; bodies too deep to be copied into bodies
        return _damaged(data, rng)


def _damaged(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    found = bytearray(data)
    kind = rng.choice(["bit flips", "byte", "cut", "grown", "hole", "not UTF-8"])
    if kind == "bit flips":
        for _ in range(rng.choice([1, 3, 30])):
            found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        found[rng.randrange(len(found))] = rng.randrange(256)
    elif kind == "cut":
        del found[rng.randrange(len(found)) :]
    elif kind == "grown":
        found += rng.randbytes(rng.choice([1, 2, 64]))
    elif kind == "hole":
        start = rng.randrange(len(found))
        del found[start : start + rng.choice([1, 2, 16])]
    else:
        start = data.find(rng.choice([b"/model/", b"past_key", b"present", b"MatMul", b"location", b"sequence_length"]))
        found[max(start, 0)] = 0xFF
    return kind, bytes(found)


MUTATIONS: list[ModelMutation] = []


def mutation(function: ModelMutation) -> ModelMutation:
    MUTATIONS.append(function)
    return function


def _node(proto: ModelProto, rng: random.Random) -> NodeProto:
    found: NodeProto = rng.choice(proto.graph.node) if proto.graph.node else proto.graph.node.add()
    return found


def _tensor(proto: ModelProto, rng: random.Random) -> TensorProto:
    tensors = proto.graph.initializer
    found: TensorProto = rng.choice(tensors) if tensors else tensors.add()
    return found


def _value(proto: ModelProto, rng: random.Random) -> ValueInfoProto:
    values = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
    found: ValueInfoProto = rng.choice(values) if values else proto.graph.input.add()
    return found


def _shuffled(field: Any, rng: random.Random) -> None:
    field.sort(key=lambda entry: rng.random())


@mutation
def nodes_removed(proto: ModelProto, rng: random.Random) -> None:
    for _ in range(rng.choice([1, 1, 5, 1000])):
        if proto.graph.node:
            del proto.graph.node[rng.randrange(len(proto.graph.node))]


@mutation
def node_twice(proto: ModelProto, rng: random.Random) -> None:
    proto.graph.node.append(_node(proto, rng))


@mutation
def nodes_shuffled(proto: ModelProto, rng: random.Random) -> None:
    _shuffled(proto.graph.node, rng)


@mutation
def operands_removed(proto: ModelProto, rng: random.Random) -> None:
    node = _node(proto, rng)
    field = rng.choice([node.input, node.output])
    del field[rng.randrange(len(field) + 1) :]


@mutation
def operands_renamed(proto: ModelProto, rng: random.Random) -> None:
    node = _node(proto, rng)
    for field in (node.input, node.output):
        if field and rng.random() < 0.7:
            other = _node(proto, rng)
            field[rng.randrange(len(field))] = rng.choice([*NAMES, *other.output, *other.input])


@mutation
def cycle(proto: ModelProto, rng: random.Random) -> None:
    node, later = _node(proto, rng), _node(proto, rng)
    if node.input and later.output:
        node.input[0] = later.output[0]


@mutation
def reads_itself(proto: ModelProto, rng: random.Random) -> None:
    node = _node(proto, rng)
    node.input.extend(node.output)


@mutation
def operator_changed(proto: ModelProto, rng: random.Random) -> None:
    node = _node(proto, rng)
    node.op_type, node.domain = rng.choice(OPERATORS), rng.choice(["", "ai.onnx", "com.microsoft", "x"])


@mutation
def interface_operator_changed(proto: ModelProto, rng: random.Random) -> None:
    """On the nodes that the passes look at: softmaxes, slices and what serves num_logits_to_keep."""
    known = [
        n
        for n in proto.graph.node
        if n.op_type in ("Softmax", "Slice", "Neg", "GroupQueryAttention", "Concat", "MatMul")
    ]
    if known:
        node = rng.choice(known)
        change = rng.randrange(4)
        if change == 0:
            node.op_type = rng.choice(OPERATORS)
        elif change == 1:
            del node.input[:]
        elif change == 2:
            del node.output[:]
        else:
            node.input.extend([""] * rng.choice([1, 20]))


@mutation
def node_name_changed(proto: ModelProto, rng: random.Random) -> None:
    _node(proto, rng).name = rng.choice(NAMES)


@mutation
def attributes_changed(proto: ModelProto, rng: random.Random) -> None:
    node = _node(proto, rng)
    if node.attribute and rng.random() < 0.5:
        attribute = rng.choice(node.attribute)
        attribute.type = rng.randrange(15)
        attribute.name = rng.choice([*NAMES, "axis", "value", attribute.name])
    else:
        added = node.attribute.add(name=rng.choice(NAMES), type=rng.randrange(15))
        if added.type == AttributeProto.STRING:
            added.s = b"\xff\xfe"


@mutation
def interface_renamed(proto: ModelProto, rng: random.Random) -> None:
    _value(proto, rng).name = rng.choice(NAMES)


@mutation
def interface_names_swapped(proto: ModelProto, rng: random.Random) -> None:
    one, other = _value(proto, rng), _value(proto, rng)
    one.name, other.name = other.name, one.name


@mutation
def interface_removed(proto: ModelProto, rng: random.Random) -> None:
    field = rng.choice([proto.graph.input, proto.graph.output, proto.graph.initializer])
    if field and rng.random() < 0.8:
        del field[rng.randrange(len(field))]
    else:
        del field[:]


@mutation
def interface_shuffled(proto: ModelProto, rng: random.Random) -> None:
    _shuffled(rng.choice([proto.graph.input, proto.graph.output]), rng)


@mutation
def interface_twice(proto: ModelProto, rng: random.Random) -> None:
    field = rng.choice([proto.graph.input, proto.graph.output, proto.graph.value_info])
    field.append(_value(proto, rng))


@mutation
def many_inputs(proto: ModelProto, rng: random.Random) -> None:
    kind = _value(proto, rng).type
    proto.graph.input.extend(
        ValueInfoProto(name=f"past_key_values.{index}.key", type=kind) for index in range(rng.choice([100, 10_000]))
    )


@mutation
def type_changed(proto: ModelProto, rng: random.Random) -> None:
    kind = _value(proto, rng).type
    choice = rng.randrange(5)
    if choice == 0:
        kind.Clear()
    elif choice == 1:
        kind.tensor_type.elem_type = rng.choice(DTYPES)
    elif choice == 2:
        kind.tensor_type.ClearField("shape")
    elif choice == 3:
        kind.sequence_type.elem_type.tensor_type.elem_type = 1
    else:
        kind.map_type.key_type = 7


@mutation
def dims_changed(proto: ModelProto, rng: random.Random) -> None:
    dims = _value(proto, rng).type.tensor_type.shape.dim
    change = rng.randrange(4)
    if change == 0 or not dims:
        dims.add(dim_value=rng.choice(SIZES))
    elif change == 1:
        del dims[rng.randrange(len(dims))]
    elif change == 2:
        rng.choice(dims).dim_value = rng.choice(SIZES)
    else:
        rng.choice(dims).dim_param = rng.choice(NAMES)


@mutation
def tensor_changed(proto: ModelProto, rng: random.Random) -> None:
    tensor = _tensor(proto, rng)
    choice = rng.randrange(6)
    if choice == 0:
        tensor.data_type = rng.choice(DTYPES)
    elif choice == 1:
        tensor.dims[:] = [rng.choice(SIZES) for _ in range(rng.randrange(6))]
    elif choice == 2:
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
    elif choice == 3:
        tensor.name = rng.choice(NAMES)
    elif choice == 4:
        tensor.ClearField("raw_data")
    else:
        tensor.int64_data.extend([rng.choice(SIZES)] * 4)


@mutation
def constants_changed(proto: ModelProto, rng: random.Random) -> None:
    """The small integers that Slice and its like read."""
    small = [t for t in proto.graph.initializer if t.data_type in (6, 7) and len(t.raw_data) <= 64]
    if small:
        tensor = rng.choice(small)
        tensor.raw_data = rng.randbytes(rng.choice([0, 3, len(tensor.raw_data), 8]))
        tensor.dims[:] = rng.choice([[], [1], [2], [-1], [2**40], list(tensor.dims)])


@mutation
def external_data_changed(proto: ModelProto, rng: random.Random) -> None:
    external = [t for t in proto.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    tensor = rng.choice(external) if external and rng.random() < 0.8 else _tensor(proto, rng)
    tensor.data_location = TensorProto.EXTERNAL
    choice = rng.randrange(5)
    if choice == 0:
        del tensor.external_data[:]
    elif choice == 1:
        tensor.external_data.add(key="location", value=rng.choice(LOCATIONS))
    elif choice in (2, 3):
        tensor.external_data.add(key=("offset", "length")[choice - 2], value=rng.choice(NUMBERS))
    else:
        tensor.external_data.add(key=rng.choice(NAMES), value=rng.choice(NAMES))


@mutation
def every_location_changed(proto: ModelProto, rng: random.Random) -> None:
    location = rng.choice(LOCATIONS)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location


@mutation
def bodies_nested(proto: ModelProto, rng: random.Random) -> None:
    """Deeper than protobuf reads again (its limit is 100 messages), or as deep as it does."""
    node = proto.graph.node.add(op_type="If", output=[rng.choice(["deep", *NAMES])])
    if proto.graph.input:
        node.input.append(proto.graph.input[0].name)
    for _ in range(rng.choice([1, 5, 30, 45])):
        attribute = node.attribute.add(name="then_branch", type=AttributeProto.GRAPH)
        attribute.g.name = "body"
        node = attribute.g.node.add(op_type="If", output=[rng.choice(NAMES)], input=[rng.choice(NAMES)])
        attribute.g.output.add(name=rng.choice([*NAMES, *node.output]))


@mutation
def body_added(proto: ModelProto, rng: random.Random) -> None:
    """A body that reads and hides outer values, in the middle of the graph."""
    body = GraphProto(name="body")
    body.node.append(_node(proto, rng))
    body.input.add(name=rng.choice(NAMES))
    body.output.add(name=rng.choice([*NAMES, *body.node[0].output]))
    if rng.random() < 0.3:
        body.initializer.append(_tensor(proto, rng))
    _node(proto, rng).attribute.add(name="body", type=AttributeProto.GRAPH, g=body)


@mutation
def header_changed(proto: ModelProto, rng: random.Random) -> None:
    choice = rng.randrange(6)
    if choice == 0:
        proto.ir_version = rng.choice(SIZES)
    elif choice == 1:
        proto.opset_import.add(domain=rng.choice([*NAMES, "ai.onnx"]), version=rng.choice(SIZES))
    elif choice == 2:
        del proto.opset_import[:]
    elif choice == 3:
        proto.ClearField("graph")
    elif choice == 4:
        function = proto.functions.add(name=rng.choice(NAMES), domain=rng.choice(NAMES))
        function.node.append(_node(proto, rng))
    else:
        proto.producer_name = rng.choice(NAMES)


@mutation
def metadata_changed(proto: ModelProto, rng: random.Random) -> None:
    tables = [
        "", "{", "[]", "null", '{"version": 1}', '{"version": 1, "layers": 7}', '{"version": 1, "layers": [7]}', "[" * 5000,
        '{"version": 1, "layers": [{"layer": 1e999, "attention": [], "head_size": {}, "kv_heads": 1, "owner": 1, "window": []}]}',
        '{"version": 1, "layers": [{"layer": 0, "attention": {}, "head_size": 1, "kv_heads": 1, "owner": 0, "window": null}]}',
    ]  # fmt: skip
    proto.metadata_props.add(key="gemma4_surgery.layers", value=rng.choice(tables))
    proto.metadata_props.add(key=rng.choice(NAMES), value=rng.choice(NAMES))


@mutation
def sparse_added(proto: ModelProto, rng: random.Random) -> None:
    sparse = proto.graph.sparse_initializer.add(dims=[rng.choice(SIZES)])
    sparse.values.CopyFrom(_tensor(proto, rng))
    sparse.values.name = rng.choice([*NAMES, sparse.values.name])


# JSON

JSON_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 0.5, 1e308, float("nan"), float("inf"), 2**31, 2**63, 2**64, 10**400, -(10**400), "", "x",
    "full_attention", ESCAPE, "\ud800", "\x00", "n" * 100_000, [], {}, [None], [[]], {"": {}}, [1] * 5000, {"0": {"head_dim": 8}},
    {str(index): index for index in range(300)}, list(range(-3, 3)), ["full_attention"] * 4, [True], [1, [2]], "../../x",
]  # fmt: skip


def mutated_json(value: Any, rng: random.Random) -> tuple[str, bytes]:
    kind = rng.choice(["value"] * 12 + ["text", "cut", "nested", "twice", "not UTF-8", "other", "byte order mark"])
    if kind == "value":
        changed = json.loads(json.dumps(value))
        for _ in range(rng.choice([1, 1, 2, 5])):
            _change(changed, rng)
        return kind, json.dumps(changed).encode()
    text = json.dumps(value)
    if kind == "text":
        data = bytearray(text.encode())
        for _ in range(rng.choice([1, 4])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return kind, bytes(data)
    if kind == "cut":
        return kind, text.encode()[: rng.randrange(len(text))]
    if kind == "nested":
        depth = rng.choice([50, 98, 101, 300, 900, 990, 100_000])
        opened, closed = rng.choice([("[", "]"), ('{"a":', "}")])
        return f"{kind} {depth}", f'{text[:-1]}, "deep": {opened * depth}0{closed * depth}}}'.encode()
    if kind == "twice":
        key = rng.choice(list(value) or ["x"])
        return kind, f"{text[:-1]}, {json.dumps(key)}: {json.dumps(rng.choice(JSON_VALUES))}}}".encode()
    if kind == "not UTF-8":
        return kind, text.encode("utf-16") if rng.random() < 0.5 else text[:-1].encode() + b', "\xff\xfe": 1}'
    if kind == "byte order mark":
        return kind, b"\xef\xbb\xbf" + text.encode()
    return kind, json.dumps(rng.choice(JSON_VALUES)).encode()


def _change(value: Any, rng: random.Random) -> None:
    """Change, remove or add one entry, at any depth."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not keys:
        return
    key = rng.choice(keys)
    if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.7:
        _change(value[key], rng)
    elif rng.random() < 0.2:
        del value[key]
    else:
        value[key] = copy.deepcopy(rng.choice(JSON_VALUES))


# Text, and files of other kinds

TEMPLATES = [
    "{% for a in range(10**9) %}{% for b in range(10**9) %}{% endfor %}{% endfor %}", "{{ 'x' * 10**10 }}", "{{ [0] * 10**10 }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ ''.__class__.__mro__ }}", "{{ messages.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].system('touch owned') }}", "{% include '/etc/passwd' %}", "{{ raise_exception('\x1b[2J\nno') }}",
    "{{ (" + "(" * 3000 + ")" * 3000 + ") }}", "{% if %}", "\ufeff{{ messages }}", "{{ 10**10**8 }}", "",
    "{{ '%999999999d' % 1 }}", "{{ '{:>999999999}'.format(1) }}", "{{ 'a'.center(999999999) }}", "{{ namespace(x=1).x }}\u202e",
]  # fmt: skip


def mutated_text(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Bytes of any kind of file, or a template in its place."""
    if rng.random() < 0.4:
        place = rng.randrange(len(TEMPLATES))
        return f"template {place}", TEMPLATES[place].encode()
    return _damaged(data, rng) if data else ("empty", b"")


ODD_NAMES = [
    b"\xff\xfe",
    b"\x1b[2J",
    b"a\nb",
    "\u202egnp".encode(),
    b"@user",
    b"-rf",
    b"n" * 240,
    b" ",
    b"decoder_model_merged_\xff",
]


def odd_neighbour(path: Path, rng: random.Random) -> str:
    """Put a file beside another, of a name that is no text, too long, or read as something else."""
    name = rng.choice(ODD_NAMES) + rng.choice(["", ".onnx", ".json", path.suffix]).encode()
    with contextlib.suppress(FileExistsError):
        Path(os.fsdecode(os.path.join(os.fsencode(path.parent), name))).write_bytes(path.read_bytes())
    return f"a neighbour {name!r}"


def mutated_file(path: Path, rng: random.Random) -> str:
    """Put something that is no regular file, or one of another size, in a file's place. Returns what."""
    kind = rng.choice(
        ["fifo", "folder", "link to itself", "link outside", "link to nothing", "empty", "sparse", "gone"]
    )
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 20 * 1024**3)
    elif kind != "gone":
        path.symlink_to(
            {"link to itself": path.name, "link outside": "/etc/hostname", "link to nothing": "nothing"}[kind]
        )
    return kind
