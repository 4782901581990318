"""The jobs: each function of the front door in a file of its own, put together from the rooms below.

repacking      an export in, a folder for ONNX Runtime GenAI out
stripping      an export in, its two graphs for text out
validating     the proof of a folder
diffing        what differs between two models
inspecting     what is in a file, an export or a folder
generating     one prompt, answered
benchmarking   how fast a folder is
"""
