"""Tinker's protobuf messages, built from a table of their fields: no generated code."""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

PACKAGE = "tinker_public"

# `*` repeated, `?` with presence, `map` from strings; `|o` makes the field a member of oneof o.
_MESSAGES = {
    "LossConfigValue": "1 number double |value; 2 text string |value",
    "EncodedTextChunk": "1 tokens bytes",
    "ImageDimensions": "1 width uint32; 2 height uint32",
    "ImageChunk": "1 data bytes; 2 format string; 3 expected_tokens ?int32; 4 override_dimensions ?ImageDimensions",
    "DmelChunk": "1 dmel bytes",
    "Chunk": "1 encoded_text EncodedTextChunk |chunk; 2 image ImageChunk |chunk; 3 dmel DmelChunk |chunk",
    "PromptProvenanceSpan": "1 sequence_id string; 2 offset int64; 3 length int64",
    "SampledProvenanceSpan": "1 sequence_id string; 2 offset int64; 3 length int64",
    "ProvenanceSpan": "1 prompt_tokens PromptProvenanceSpan |span; 2 sampled_tokens SampledProvenanceSpan |span",
    "SparseCsr": "1 values bytes; 2 crow_indices bytes; 3 col_indices bytes",
    "Tensor": "1 dense bytes |encoding; 2 sparse_csr SparseCsr |encoding; 3 dtype DType; 4 shape *int64",
    "Datum": "1 model_input *Chunk; 2 loss_fn_inputs map Tensor; 3 model_input_spans *ProvenanceSpan;"
    " 4 loss_fn_input_spans *ProvenanceSpan",
    "ForwardBackwardRequest": "1 model_id string; 2 seq_id int32; 3 data *Datum; 4 loss_fn string;"
    " 5 loss_fn_config map double; 6 forward_only bool; 7 loss_fn_config_v2 map LossConfigValue",
    "BatchedTensor": "1 data bytes; 2 offsets bytes; 3 dtype DType; 4 trailing_shape *int64",
    "ArrayRecord": "1 type_tag string; 2 fields map BatchedTensor; 3 num_datums int64",
    "ForwardBackwardOutput": "1 loss_fn_output_type string; 2 loss_fn_outputs *ArrayRecord; 3 metrics map double",
    "TopkLogprobs": "1 token_ids bytes; 2 logprobs bytes; 3 k uint32; 4 length uint32",
    "PromptAltTokens": "1 tokens Tensor; 2 logprobs Tensor",
    "SampledSequence": "1 stop_reason StopReason; 2 tokens bytes; 3 logprobs ?bytes; 4 topk_sampled_logprobs ?TopkLogprobs",
    "SampleResponse": "1 sequences *SampledSequence; 2 prompt_logprobs ?bytes; 3 topk_prompt_logprobs ?TopkLogprobs;"
    " 4 prompt_cache_hit_tokens int32; 5 target_prompt_logprobs ?Tensor; 6 prompt_alt_tokens ?PromptAltTokens",
}
_ENUMS = {
    "DType": ("DTYPE_UNSPECIFIED", "DTYPE_FLOAT32", "DTYPE_INT64", "DTYPE_INT32", "DTYPE_BFLOAT16"),
    "StopReason": ("STOP_REASON_STOP", "STOP_REASON_LENGTH"),
}
FLOAT32, INT64, INT32 = 1, 2, 3
STOP, LENGTH = 0, 1

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    name: getattr(_Field, f"TYPE_{name.upper()}") for name in ("double", "string", "bytes", "bool", "int32", "int64", "uint32")
}


def _build() -> dict[str, type[message.Message]]:
    file = descriptor_pb2.FileDescriptorProto(name="tinker_public.proto", package=PACKAGE, syntax="proto3")
    for name, values in _ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in _MESSAGES.items():
        _describe(file.message_type.add(name=name), fields)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = {name: pool.FindMessageTypeByName(f"{PACKAGE}.{name}") for name in _MESSAGES}
    return {name: message_factory.GetMessageClass(descriptor) for name, descriptor in found.items()}


def _describe(target: descriptor_pb2.DescriptorProto, fields: str) -> None:
    present = []
    for line in fields.split(";"):
        number, name, *words = line.split()
        oneof = words.pop()[1:] if words[-1].startswith("|") else None
        field = target.field.add(name=name, number=int(number), label=_Field.LABEL_OPTIONAL)
        if words[0] == "map":
            entry = target.nested_type.add(name="".join(part.capitalize() for part in name.split("_")) + "Entry")
            entry.options.map_entry = True
            for place, (key, kind) in enumerate((("key", "string"), ("value", words[1])), start=1):
                _set_type(entry.field.add(name=key, number=place, label=_Field.LABEL_OPTIONAL), kind)
            field.label, field.type = _Field.LABEL_REPEATED, _Field.TYPE_MESSAGE
            field.type_name = entry.name
            continue
        kind = words[0].lstrip("*?")
        _set_type(field, kind)
        if words[0].startswith("*"):
            field.label = _Field.LABEL_REPEATED
        elif words[0].startswith("?"):
            present.append(field)
        if oneof is not None:
            names = [one.name for one in target.oneof_decl]
            if oneof not in names:
                target.oneof_decl.add(name=oneof)
                names.append(oneof)
            field.oneof_index = names.index(oneof)
    for field in present:  # the descriptor wants these oneofs after the real ones
        field.proto3_optional, field.oneof_index = True, len(target.oneof_decl)
        target.oneof_decl.add(name=f"_{field.name}")


def _set_type(field: descriptor_pb2.FieldDescriptorProto, kind: str) -> None:
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type = _Field.TYPE_ENUM if kind in _ENUMS else _Field.TYPE_MESSAGE
        field.type_name = f".{PACKAGE}.{kind}"


_CLASSES = _build()


def new(name: str) -> Any:
    """An empty message; its fields are those of the table."""
    return _CLASSES[name]()


def parse(name: str, data: bytes) -> Any:
    """Raises ValueError for bytes that are no such message."""
    try:
        return _CLASSES[name].FromString(data)
    except message.DecodeError as error:
        raise ValueError(f"the body is not a {PACKAGE}.{name} message: {error}") from error
