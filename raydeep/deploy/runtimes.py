"""Opens ONNX files in the runtimes that models are checked in: onnxruntime, and OpenVINO where it is installed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raydeep.errors import ArtifactError, RaydeepError

if TYPE_CHECKING:
    from raydeep.config import Export

Run = Callable[[np.ndarray], np.ndarray]  # uint8 NHWC pictures → float32 logits NK
MAX_BYTES = 2**31 - 1  # protobuf holds no more


def check_runtimes(cfg: Export) -> None:
    """Check that the runtimes of the export section are installed.

    Raises:
        RaydeepError: one is not.
    """
    if "openvino" in cfg.runtimes and importlib.util.find_spec("openvino") is None:
        raise RaydeepError("export.runtimes openvino needs: pip install 'raydeep[openvino]'")


def open_onnx(path: Path, threads: int = 1) -> Run:
    """Open a file in onnxruntime.

    Args:
        path: the ONNX file.
        threads: of one call.

    Raises:
        ArtifactError: it is no ONNX file, is cut off, keeps tensors in other files, or does not load.
    """
    data = checked(path)
    try:
        return runner(data, threads)
    except Exception as err:  # onnxruntime's own kinds share no public base
        raise ArtifactError(f"{path}: onnxruntime can't load it: {err}") from None


def runner(data: bytes, threads: int = 1) -> Run:
    """The function of an ONNX model of ours, in onnxruntime."""
    opened = session(data, threads)
    return lambda images: opened.run(None, {"images": images})[0]


def session(data: bytes, threads: int = 1) -> Any:
    """An onnxruntime.InferenceSession on the CPU."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # importing it sends and stores facts about this machine
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle threads leave the cores to others
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def open_openvino(path: Path, threads: int = 1) -> Run:
    """Open a file in OpenVINO; see `open_onnx`."""
    import openvino

    data = checked(path)
    try:
        core = openvino.Core()
        how = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        compiled = core.compile_model(core.read_model(data, b""), "CPU", how)  # f32: by itself it may take bfloat16
    except Exception as err:  # RuntimeError and kinds of its own
        raise ArtifactError(f"{path}: OpenVINO can't load it: {err}") from None
    request = compiled.create_infer_request()
    return lambda images: np.array(request.infer({"images": images})[0])


OPENERS: dict[str, Callable[[Path, int], Run]] = {"onnxruntime": open_onnx, "openvino": open_openvino}


def checked(path: Path) -> bytes:
    """The bytes of an ONNX file that stands alone.

    A tensor can name another file, anywhere on the machine, that the runtime would read. raydeep writes no such file.

    Raises:
        ArtifactError: the file is missing, too large or no ONNX, or a tensor is kept elsewhere.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ArtifactError(f"{path}: {size:,} bytes, an ONNX file has at most {MAX_BYTES:,}")
        data = path.read_bytes()
    except OSError as err:
        raise ArtifactError(f"{path}: can't be read: {err.strerror or err}") from None
    try:
        model = onnx.load_model_from_string(data)  # reads no other file
    except DecodeError:
        raise ArtifactError(f"{path}: not an ONNX file, or cut off; export the model again") from None
    if not model.graph.node or not model.graph.output:
        raise ArtifactError(f"{path}: an ONNX file without a network; export the model again")
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            where = next((entry.value for entry in tensor.external_data if entry.key == "location"), "?")
            raise ArtifactError(
                f"{path}: tensor {tensor.name or '(no name)'} is kept in another file, {where!r}; raydeep writes no "
                f"such model and reads none"
            )
    return data


def _tensors(model: Any) -> Iterator[Any]:
    """Every TensorProto of a model, in subgraphs and functions too."""
    graphs = [model.graph]
    nodes = [node for function in model.functions for node in function.node]
    for attribute in (a for function in model.functions for a in function.attribute_proto):
        yield from _held(attribute, graphs)
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            yield from (part for sparse in graph.sparse_initializer for part in (sparse.values, sparse.indices))
            nodes.extend(graph.node)
            continue
        for attribute in nodes.pop().attribute:
            yield from _held(attribute, graphs)


def _held(attribute: Any, graphs: list[Any]) -> Iterator[Any]:
    """Tensors of an attribute; its graphs are put on the list."""
    graphs.extend(attribute.graphs)
    if attribute.HasField("g"):
        graphs.append(attribute.g)
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    sparse = [*attribute.sparse_tensors, *([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else [])]
    yield from (part for one in sparse for part in (one.values, one.indices))
