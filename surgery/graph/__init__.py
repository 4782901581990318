"""One ONNX graph without its weights in memory: reading, editing, comparing and writing it."""
