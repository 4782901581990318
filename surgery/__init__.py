"""The engine: open an ONNX model without its weights, apply passes to it, write and prove a GenAI folder.

    surgery.export     which graphs, precisions and files a source holds
    surgery.gemma4     the architecture: layers, head sizes, KV heads, owners and borrowers
    surgery.model      one ONNX graph, opened without its weights
    surgery.engine     what a pass is, and how passes are applied
    surgery.repack     the main job, from an export to a folder
    surgery.verify     proof: structure, numbers against the source, the real runtime

CONTRIBUTING.md has the whole map.
"""
