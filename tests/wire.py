"""Tinker's protocol spoken by hand, for what the SDK would never send."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np

from cookbook.serving import proto
from core import Datum
from tests.live_server import MODEL


class Wire:
    """One key's view of a server."""

    def __init__(self, url: str, key: str = "tml-x", seconds: float = 60) -> None:
        self.http = httpx.Client(base_url=f"{url}/api/v1", headers={"X-API-Key": key}, timeout=seconds)

    def post(self, path: str, body: dict | bytes, status: int = 200, **headers: str) -> dict:
        sent = {"content": body} if isinstance(body, bytes) else {"json": body}
        reply = self.http.post(path, **sent, headers=headers)  # type: ignore[arg-type]
        assert reply.status_code == status, (reply.status_code, reply.text)
        return reply.json()

    def result(self, promise: dict, status: int = 200) -> dict:
        return self.post("/retrieve_future", {"request_id": promise["request_id"]}, status)

    def output(self, promise: dict) -> Any:
        """A ForwardBackwardOutput."""
        reply = self.http.post("/retrieve_future", json={"request_id": promise["request_id"]})
        assert "x-protobuf" in reply.headers["content-type"], reply.text
        return proto.parse("ForwardBackwardOutput", reply.content)

    def session(self) -> str:
        return self.post("/create_session", {"type": "create_session"})["session_id"]

    def model(self, session: str, number: int = 0, base_model: str = MODEL, rank: int = 2) -> str:
        lora = {"rank": rank, "seed": 0}
        body = {"session_id": session, "model_seq_id": number, "base_model": base_model, "lora_config": lora}
        return self.result(self.post("/create_model", body))["model_id"]

    def step(self, model: str, seq_id: int, **adam: float) -> dict:
        return self.post("/optim_step", {"model_id": model, "seq_id": seq_id, "adam_params": adam})

    def save(self, model: str, seq_id: int, name: str, **more: object) -> dict:
        return self.post("/save_weights", {"model_id": model, "path": name, "seq_id": seq_id, **more})


def gradient(model: str, seq_id: int, token: int = 5) -> bytes:
    """The smallest forward_backward there is: one token."""
    message = proto.new("ForwardBackwardRequest")
    message.model_id, message.seq_id, message.loss_fn = model, seq_id, "cross_entropy"
    one = message.data.add()
    one.model_input.add().encoded_text.tokens = token.to_bytes(4, "little")
    targets = one.loss_fn_inputs["target_tokens"]
    targets.dense, targets.dtype = token.to_bytes(8, "little"), proto.INT64
    return message.SerializeToString()


def request(model: str, seq_id: int, data: list[Datum], loss_fn: str = "cross_entropy") -> Any:
    """A forward_backward of data of ours, as a message."""
    message = proto.new("ForwardBackwardRequest")
    message.model_id, message.seq_id, message.loss_fn = model, seq_id, loss_fn
    for one in data:
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = np.asarray(one.model_input.to_ints(), "<i4").tobytes()
        for key, value in one.loss_fn_inputs.items():
            array = np.asarray(value)
            tensor = datum.loss_fn_inputs[key]
            whole = array.dtype.kind == "i"
            tensor.dtype = proto.INT64 if whole else proto.FLOAT32
            tensor.dense = array.astype("<i8" if whole else "<f4").tobytes()
            tensor.shape.extend(array.shape)
    return message
