"""What travels on the wire, as what core takes and gives: data, prompts, tensors, results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cookbook.serving import proto
from core import Datum, EncodedTextChunk, ForwardBackwardOutput, ModelInput, SampledSequence, SampleResponse

MOST_ELEMENTS = 1 << 26  # of one tensor once a sparse one is spread out
MOST_CELLS = 1 << 22  # of the tables that one sampling request may ask for
_DTYPES = {proto.FLOAT32: np.dtype("<f4"), proto.INT64: np.dtype("<i8"), proto.INT32: np.dtype("<i4")}
_EMPTY_TOKEN, _EMPTY_LOGPROB = 0, -99999.0  # how a cell of a top-k table says that it is empty
Top = Sequence[Sequence[tuple[int, float]] | None]


# ---- requests


def data(message: Any, most_mb: int) -> list[Datum]:
    """The data of a ForwardBackwardRequest. Raises ValueError, also where sparse tensors would unfold beyond `most_mb`."""
    sparse = (one for datum in message.data for one in datum.loss_fn_inputs.values() if one.HasField("sparse_csr"))
    unfolded = sum(math.prod(max(0, size) for size in one.shape) * 8 for one in sparse)
    if unfolded > most_mb << 20:
        raise ValueError(
            f"sparse loss_fn_inputs unfold to {unfolded:,} bytes, expected at most {most_mb} MB (limits.body_mb)"
        )
    return [datum(one, f"data[{i}]") for i, one in enumerate(message.data)]


def datum(message: Any, where: str) -> Datum:
    """A Datum of the wire. Raises ValueError, naming what is wrong in `where`."""
    chunks = []
    for chunk in message.model_input:
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise ValueError(f"{where}.model_input has a chunk of {kind or 'no kind'}; this server trains on text alone")
        chunks.append(EncodedTextChunk(tuple(_array(chunk.encoded_text.tokens, "<i4", f"{where}.model_input").tolist())))
    inputs = {key: tensor(value, f"{where}.loss_fn_inputs['{key}']") for key, value in message.loss_fn_inputs.items()}
    return Datum(ModelInput(tuple(chunks)), inputs)


def loss_config(message: Any) -> dict[str, float]:
    """The loss's configuration; texts belong to server-side losses, which this server refuses."""
    config = {}
    for key, value in message.loss_fn_config_v2.items():
        if value.WhichOneof("value") != "number":
            raise ValueError(f"loss_fn_config['{key}'] is {value.text!r}, expected a number")
        config[key] = value.number
    return config or dict(message.loss_fn_config)


def tensor(message: Any, where: str) -> torch.Tensor:
    """A dense or sparse Tensor message."""
    if message.dtype not in (proto.FLOAT32, proto.INT64):
        raise ValueError(f"{where} has dtype {message.dtype}, expected float32 or int64")
    dtype, shape = _DTYPES[message.dtype], list(message.shape)
    if message.WhichOneof("encoding") == "sparse_csr":
        csr = message.sparse_csr
        values, crow, col = _array(csr.values, dtype, where), _array(csr.crow_indices, "<i8", where), csr.col_indices
        return _spread(values, crow, _array(col, "<i8", where), shape, where)
    values = _array(message.dense, dtype, where)
    if shape and (min(shape) < 0 or math.prod(shape) != len(values)):
        raise ValueError(f"{where} has {len(values)} values, its shape {shape} another number")
    return torch.from_numpy(values.reshape(shape or [len(values)]).copy())


def json_tensor(given: Mapping[str, Any], where: str) -> torch.Tensor:
    """A tensor of a JSON body, as target_prompt_logprobs is sent."""
    dtypes = {"float32": np.dtype("<f4"), "int64": np.dtype("<i8")}
    if (dtype := str(given.get("dtype"))) not in dtypes:
        raise ValueError(f"{where} has dtype {dtype}, expected float32 or int64")
    try:
        values = _numbers(given.get("data", []), dtypes[dtype])
        shape = [int(size) for size in given.get("shape") or [len(values)]]
        check_cells(where, math.prod(shape))
        if given.get("sparse_crow_indices") is not None:
            crow, col = (_numbers(given.get(f"sparse_{name}_indices", []), dtypes["int64"]) for name in ("crow", "col"))
            return _spread(values, crow, col, shape, where)
        return torch.from_numpy(values.reshape(shape).copy())
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where} is no tensor: {error}") from error


def _numbers(given: Any, dtype: np.dtype) -> np.ndarray:
    """Raises ValueError for fractions where whole numbers are asked for: numpy would cut them off."""
    values = np.asarray(given, dtype)
    if dtype.kind == "i" and bool((values != np.asarray(given, "<f8")).any()):
        raise ValueError("expected whole numbers")
    return values


def check_cells(where: str, count: int) -> None:
    """Raises ValueError for tables whose size has nothing to do with that of the request."""
    if count > MOST_CELLS:
        raise ValueError(f"{where} asks for {count:,} numbers, expected at most {MOST_CELLS:,}")


def _array(data: bytes, dtype: str | np.dtype, where: str) -> np.ndarray:
    size = np.dtype(dtype).itemsize
    if len(data) % size:
        raise ValueError(f"{where} has {len(data)} bytes, expected a multiple of {size}")
    return np.frombuffer(data, dtype)


def _spread(values: np.ndarray, crow: np.ndarray, col: np.ndarray, shape: list[int], where: str) -> torch.Tensor:
    """Compressed sparse rows as a dense tensor; what is not listed is 0."""
    if len(shape) != 2 or min(shape) < 0 or math.prod(shape) > MOST_ELEMENTS:
        raise ValueError(f"{where} is sparse with shape {shape}, expected [rows, columns] of at most {MOST_ELEMENTS:,} cells")
    rows, columns = shape
    fits = len(crow) == rows + 1 and len(col) == len(values) and crow[0] == 0 and crow[-1] == len(values)
    if not fits or bool((np.diff(crow) < 0).any()) or bool(((col < 0) | (col >= columns)).any()):
        raise ValueError(f"{where} has sparse indices that do not fit its shape {shape} and {len(values)} values")
    dense = np.zeros(shape, values.dtype)
    dense[np.repeat(np.arange(rows), np.diff(crow)), col] = values
    return torch.from_numpy(dense)


def prompt(given: Mapping[str, Any], most: int) -> ModelInput:
    """The prompt of a JSON body: {"chunks": [{"type": "encoded_text", "tokens": [...]}]}, of at most `most` tokens."""
    found = []
    if not isinstance(given.get("chunks"), list):
        raise ValueError("the prompt has no list of chunks")
    for chunk in given["chunks"]:
        kind = chunk.get("type") if isinstance(chunk, dict) else chunk
        if kind != "encoded_text":
            raise ValueError(f"the prompt has a chunk of type {kind!r}; this server samples from text alone")
        tokens = chunk.get("tokens")
        if not isinstance(tokens, list):
            raise ValueError("the prompt's tokens are not a list of whole numbers")
        found.append(tokens)
    if (length := sum(map(len, found))) > most:  # before anybody looks at each of them
        raise ValueError(f"the prompt has {length} tokens, the model's context is {most}")
    if not all(type(token) is int for tokens in found for token in tokens):
        raise ValueError("the prompt's tokens are not a list of whole numbers")
    return ModelInput(tuple(EncodedTextChunk(tuple(tokens)) for tokens in found))


# ---- results


def forward_backward_output(output: ForwardBackwardOutput) -> bytes:
    """ForwardBackwardOutput's bytes; a record holds consecutive data whose arrays agree in all but the first dimension."""
    message = proto.new("ForwardBackwardOutput")
    message.loss_fn_output_type = "ArrayRecord"
    for key, value in output.metrics.items():
        message.metrics[key] = value
    run: list[torch.Tensor] = []
    for one in [*(out["logprobs"] for out in output.loss_fn_outputs), None]:
        if run and (one is None or one.shape[1:] != run[0].shape[1:]):
            _add_record(message, run)
            run = []
        if one is not None:
            run.append(one)
    return message.SerializeToString()


def _add_record(message: Any, logprobs: Sequence[torch.Tensor]) -> None:
    arrays = [one.contiguous().numpy().astype("<f4", copy=False) for one in logprobs]
    record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(arrays))
    field = record.fields["logprobs"]
    field.data = b"".join(array.tobytes() for array in arrays)
    field.offsets = np.cumsum([0, *(array.nbytes for array in arrays)], dtype="<i8").tobytes()
    field.dtype = proto.FLOAT32
    field.trailing_shape.extend(arrays[0].shape[1:])


def sample_response(
    response: SampleResponse,
    last_n: int | None,
    targets: tuple[torch.Tensor, Mapping[str, Any]] | None,
    tops: Sequence[Top] | None,
    sampled_k: int,
    prompt_k: int,
) -> bytes:
    """SampleResponse's bytes. `last_n`: how many prompt positions were to be scored; `targets`: logprobs of the tokens that
    were asked for, with the tensor that asked; `tops`: the likeliest tokens per sequence."""
    message = proto.new("SampleResponse")
    for i, sequence in enumerate(response.sequences):
        _add_sequence(message, sequence, None if tops is None else tops[i], sampled_k)
    if response.prompt_logprobs is not None:
        scored = _last(response.prompt_logprobs, last_n)
        message.prompt_logprobs = np.asarray([math.nan if lp is None else lp for lp in scored], "<f4").tobytes()
    if response.topk_prompt_logprobs is not None:
        _fill_top(message.topk_prompt_logprobs, _last(response.topk_prompt_logprobs, last_n), prompt_k)
    if targets is not None:
        _fill_like(message.target_prompt_logprobs, *targets)
    return message.SerializeToString()


def _fill_like(message: Any, values: torch.Tensor, asked: Mapping[str, Any]) -> None:
    """The values in the layout of the tensor that asked for them."""
    message.dtype = proto.FLOAT32
    message.shape.extend(values.shape)
    array = values.numpy().astype("<f4", copy=False)
    if asked.get("sparse_crow_indices") is None:
        message.dense = array.tobytes()
        return
    crow, col = (np.asarray(asked.get(f"sparse_{name}_indices") or [], "<i8") for name in ("crow", "col"))
    message.sparse_csr.values = array[np.repeat(np.arange(len(array)), np.diff(crow)), col].tobytes()
    message.sparse_csr.crow_indices, message.sparse_csr.col_indices = crow.tobytes(), col.tobytes()


def _last(values: Sequence, last_n: int | None) -> list:
    """All but the last n become None."""
    hidden = 0 if last_n is None else max(0, len(values) - last_n)
    return [None] * hidden + list(values[hidden:])


def _add_sequence(message: Any, sequence: SampledSequence, top: Top | None, top_k: int) -> None:
    one = message.sequences.add(stop_reason=proto.STOP if sequence.stop_reason == "stop" else proto.LENGTH)
    one.tokens = np.asarray(sequence.tokens, "<i4").tobytes()
    one.logprobs = np.asarray(sequence.logprobs, "<f4").tobytes()
    if top is not None:
        _fill_top(one.topk_sampled_logprobs, top, top_k)


def _fill_top(message: Any, rows: Top, k: int) -> None:
    tokens = np.full((len(rows), k), _EMPTY_TOKEN, "<i4")
    logprobs = np.full((len(rows), k), _EMPTY_LOGPROB, "<f4")
    for i, row in enumerate(rows):
        for j, (token, logprob) in enumerate(row or ()):
            tokens[i, j], logprobs[i, j] = token, logprob
    message.token_ids, message.logprobs, message.k, message.length = tokens.tobytes(), logprobs.tobytes(), k, len(rows)
