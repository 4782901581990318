"""A merged graph as CUDA graph capture runs it: buffers that stay where they are, and a mask as wide as the caches.

ONNX Runtime GenAI does so where `enable_cuda_graph` is 1: attention_mask is [batch, max_length], with ones up to the
tokens so far; past and present of each cache are one buffer of max_length rows; what a token is given and gives lies
at one address. Prompts run as ever, single tokens from the captured graph. On the CPU the same is run without capture:
it tells whether the graph gives the same tokens, and nothing about CUDA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from surgery.attention.kv_wiring import Slot, slot_of_name
from surgery.choices import Provider
from surgery.errors import ModelError, RuntimeMissing
from surgery.runtime.sessions import Array, Feed, KVCaches, load_onnxruntime, one_line

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
_NOT_CAPTURED, _CAPTURED = "-1", "1"
"""Run option gpu_graph_id: a run of any shape, and the one graph that is captured and replayed."""


class FixedBuffers:
    """A surgery.runtime.sessions.Runner over buffers of `max_length` rows.

    The caches that `step` is given are not looked at: the buffers hold them, up to the mask's tokens. `caches` copies
    them out after each step, where they are to be compared.
    """

    def __init__(
        self, graph: Path, provider: Provider, max_length: int, *, capture: bool = False, caches: bool = False
    ) -> None:
        self._ort = load_onnxruntime(provider)
        self._device, self._length, self._keep = provider, max_length, caches
        self._session = _session(self._ort, graph, provider, capture)
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        (self._logits,) = (value for value in self._session.get_outputs() if value.name == "logits")
        self._buffers: dict[Slot, Any] = {}
        self._token: dict[str, Any] = {}

    def start(self, batch: int) -> KVCaches:
        """New buffers, all zero."""
        self._token = {}
        for name, declared in self._inputs.items():
            if (slot := slot_of_name(name)) and len(declared.shape) == 4:
                _, heads, _, size = declared.shape
                self._buffers[slot] = self._zeros((batch, heads, self._length, size), declared.type)
        return dict(self._buffers)

    def step(self, feed: Feed, cache: KVCaches, keep: int) -> tuple[Array, KVCaches]:
        """Logits [B,1,V] of each row's last token."""
        batch, new = feed.ids.shape
        wide = np.zeros((batch, self._length), np.int64)
        wide[:, : feed.mask.shape[1]] = feed.mask
        given = {"input_ids": feed.ids, "position_ids": feed.positions, "attention_mask": wide}
        given = {name: np.ascontiguousarray(value) for name, value in given.items() if name in self._inputs}
        vocabulary = self._logits.shape[2]
        if new > 1:
            tensors = {name: self._tensor(value) for name, value in given.items()}
            tensors["logits"] = self._zeros((batch, 1, vocabulary), self._logits.type)
        else:
            for name, value in given.items():
                if name in self._token:
                    self._token[name].update_inplace(value)
                else:
                    self._token[name] = self._tensor(value)
            if "logits" not in self._token:
                self._token["logits"] = self._zeros((batch, 1, vocabulary), self._logits.type)
            tensors = self._token
        self._run(tensors, _CAPTURED if new == 1 else _NOT_CAPTURED)
        tokens = feed.mask.shape[1]
        held = {slot: buffer.numpy()[:, :, :tokens] for slot, buffer in self._buffers.items()} if self._keep else {}
        return tensors["logits"].numpy(), held

    def _run(self, tensors: dict[str, Any], graph_id: str) -> None:
        binding = self._session.io_binding()
        for name in self._inputs:
            slot = slot_of_name(name)
            binding.bind_ortvalue_input(name, tensors[name] if name in tensors else self._buffers[slot])  # type: ignore[index]
        for value in self._session.get_outputs():
            slot = slot_of_name(value.name)
            binding.bind_ortvalue_output(value.name, self._buffers[slot] if slot else tensors[value.name])
        options = self._ort.RunOptions()
        if self._device == "cuda":
            options.add_run_config_entry("gpu_graph_id", graph_id)
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as error:  # the runtime's exceptions share no base class of their own
            raise ModelError(f"ONNX Runtime cannot run it over fixed buffers: {one_line(error)}") from None

    def _tensor(self, value: Array) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(value, self._device, 0)

    def _zeros(self, shape: tuple[int, ...], kind: str) -> Any:
        return self._tensor(np.zeros(shape, _DTYPES[kind]))


def _session(ort: Any, graph: Path, provider: Provider, capture: bool) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    wanted = [("CUDAExecutionProvider", {"enable_cuda_graph": "1" if capture else "0"})] if provider == "cuda" else []
    try:
        session = ort.InferenceSession(str(graph), options, providers=[*wanted, "CPUExecutionProvider"])
    except Exception as error:  # as in _run
        raise ModelError(f"ONNX Runtime cannot load {graph}: {one_line(error)}") from None
    if wanted and "CUDAExecutionProvider" not in session.get_providers():
        raise RuntimeMissing("onnxruntime could not start CUDAExecutionProvider; its libraries or the GPU are missing")
    return session
