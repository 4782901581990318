"""The engine: open an ONNX model without its weights, apply passes to it, write and prove a GenAI folder.

    surgery.export     which graphs, precisions and files a source folder holds
    surgery.gemma4     the architecture: layers, head sizes, KV heads, owners and borrowers
    surgery.model      one ONNX graph, opened without its weights
    surgery.engine     what a pass is, and how passes are applied
    surgery.genai      the folder that ONNX Runtime GenAI loads
    surgery.verify     proof: structure, numbers against the source, the real runtime

Below them: surgery.weights and surgery.errors, and for graphs surgery.graph (walking and renaming),
surgery.view (the editing view) and surgery.wiring (which cache each layer's attention reads).
"""
