"""The engine: open an ONNX model without its weights, apply passes to it, write and prove a GenAI folder.

    surgery.source.export     which graphs, precisions and files a source holds
    surgery.architecture     the architecture: layers, head sizes, KV heads, owners and borrowers
    surgery.graph.model      one ONNX graph, opened without its weights
    passes.base     what a pass is, and how passes are applied
    surgery.folder.building     the main job, from an export to a folder
    surgery.verify     proof: structure, numbers against the source, the real runtime

CONTRIBUTING.md has the whole map.
"""
